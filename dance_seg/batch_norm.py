"""BatchNorm statistics re-estimated on given images: after a cut, for a subnet, before choosing a checkpoint. And what
BatchNorm normalises by in a network that follows a video.

While training, BatchNorm keeps moving averages over the batches seen last, at whatever sizes they had. Statistics of
small images do not fit large ones (and those of one subnet not another), so before a network is judged they are taken
anew from images like those it will be judged on.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dance_seg.distributed import num_ranks, sum_over_ranks

BnOnline = Literal["frame", "running", "frozen"]


def set_bn_online(model: nn.Module, mode: BnOnline) -> None:
    """Choose what every BatchNorm layer of a model normalises by, in place; it can be chosen anew at any time.

    frame: the statistics of the images at hand, in evaluation too, since running ones lag behind a video that changes
    and behind weights that do. running: as usual, running statistics in evaluation. frozen: running statistics in
    training too, where they stay as they are. With `frame` the running ones are still kept up to date in training and
    never touched in evaluation, and tensors' names are the same in all modes, so a checkpoint of one fits the others.

    A layer that sees a single value per channel (ASPP's pooling of one image, say) takes its running statistics in mode
    `frame`, since one value has no variance. Raises ValueError for another mode.

    >>> model = nn.Sequential(nn.BatchNorm2d(1)).eval()
    >>> set_bn_online(model, "frame")
    >>> model(torch.tensor([[[[5.0, 7.0]]]])).round().tolist(), model[0].running_mean.tolist()
    ([[[[-1.0, 1.0]]]], [0.0])
    """
    if mode not in get_args(BnOnline):
        raise ValueError(f"bn_online is {mode!r}; choose one of {', '.join(get_args(BnOnline))}")
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            if not hasattr(layer, "bn_online"):
                layer.register_forward_pre_hook(_take_statistics)
                layer.register_forward_hook(_give_back, always_call=True)
            layer.bn_online = mode  # type: ignore[assignment]


def _take_statistics(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Set a layer's mode for one forward: torch and timm read these two attributes and nothing else."""
    values = layer.__dict__  # nn.Module's own way of setting an attribute takes longer than a small layer's work
    values["_mode_before"] = layer.training, values["track_running_stats"]
    images, mode = inputs[0], values["bn_online"]
    if mode == "frozen" or (mode == "frame" and images.numel() == images.shape[1]):
        values["training"] = False
    elif mode == "frame" and not layer.training and not images.is_meta:
        # Without values there is nothing to normalise by, and who follows the channels must see the statistics.
        values["training"], values["track_running_stats"] = True, False


def _give_back(layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
    values = layer.__dict__
    if "_mode_before" in values:
        values["training"], values["track_running_stats"] = values.pop("_mode_before")


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the statistics of every BatchNorm layer by those of the given images.

    Each batch of images (N, 3, H, W), on the model's device, is passed once; sizes may differ between batches. A
    layer's mean and variance are those of all the values that reached it, over all images and ranks (law of total
    variance), so that neither the order of batches nor a smaller last one matters; inside, each batch is normalised by
    its own statistics. Other layers run as in evaluation. The model's mode is restored; a layer that nothing reached
    keeps its statistics, and without any BatchNorm the images are not even fetched.

    Raises ValueError when there are no images, and for a batch with a single value per channel. After any error the old
    statistics are back.

    >>> layer = nn.BatchNorm2d(1)
    >>> reestimate_batch_norm(layer, [torch.tensor([[[[1.0, 2.0, 6.0]]]]), torch.tensor([[[[3.0, 3.0, 3.0]]]])])
    >>> layer.running_mean, layer.running_var  # of 1, 2, 6, 3, 3, 3: the variance is 14 / 5, unbiased
    (tensor([3.]), tensor([2.8000]))
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return
    with (
        _restored_on_error(layers),
        _as_usual(layers),
        local_batch_norm(model),
        _only_these_train(model, layers),
        _Moments(layers) as moments,
    ):
        num_batches = 0
        for images in batches:
            model(images)
            num_batches += 1
        if not num_batches:
            raise ValueError("no images to re-estimate BatchNorm statistics from; give at least one batch")
        for layer in layers:
            moments.write(layer)


class _LocalBatchNorm(_BatchNorm):
    """BatchNorm of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@contextmanager
def local_batch_norm(model: nn.Module) -> Iterator[None]:
    """SyncBatchNorm layers normalise by the images of their own rank, on any device, until the end of the block.

    Theirs is a collective operation in training mode, which waits for ranks that have fewer batches, and refuses all
    but GPUs while ranks are joined.

    >>> layer = nn.SyncBatchNorm(2)
    >>> with local_batch_norm(layer):
    ...     layer(torch.zeros(1, 2, 3, 3)).shape
    torch.Size([1, 2, 3, 3])
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.SyncBatchNorm]
    for layer in layers:
        layer.__class__ = _LocalBatchNorm  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.SyncBatchNorm


class _Moments:
    """Count, sum and sum of squares of the values that reach each layer, from the statistics it takes of each batch."""

    def __init__(self, layers: list[_BatchNorm]) -> None:
        self.layers = layers
        self.sums = {layer: torch.zeros(3, layer.num_features, dtype=torch.float64) for layer in layers}

    def __enter__(self) -> "_Moments":
        self.momenta = [layer.momentum for layer in self.layers]
        self.hooks = [
            layer.register_forward_pre_hook(lambda layer, inputs: layer.reset_running_stats()) for layer in self.layers
        ]
        self.hooks += [layer.register_forward_hook(self._add) for layer in self.layers]
        for layer in self.layers:
            layer.momentum = 1.0  # the running statistics are then those of the last batch, computed anyway
        return self

    def __exit__(self, *error: object) -> None:
        for layer, momentum in zip(self.layers, self.momenta, strict=True):
            layer.momentum = momentum
        for hook in self.hooks:
            hook.remove()

    def _add(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count = inputs[0].numel() // layer.num_features
        mean = layer.running_mean.cpu().double()
        variance = layer.running_var.cpu().double() * (count - 1) / count  # torch keeps the unbiased one
        self.sums[layer] += torch.stack([torch.full_like(mean, count), count * mean, count * (variance + mean**2)])

    def write(self, layer: Any) -> None:
        sums = self.sums[layer]
        if num_ranks() > 1:
            sums = sum_over_ranks(sums.to(layer.running_mean.device)).cpu()
        count, total, squares = sums
        if not count.any():
            return
        mean = total / count
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((squares / count - mean**2).clamp(min=0) * count / (count - 1))


@contextmanager
def _only_these_train(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """The whole model evaluates, dropout off, and only the layers take statistics."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _as_usual(layers: list[_BatchNorm]) -> Iterator[None]:
    """Layers that `set_bn_online` froze, say, take statistics too: they are asked for."""
    modes = [(layer, layer.bn_online) for layer in layers if hasattr(layer, "bn_online")]
    for layer, _ in modes:
        layer.bn_online = "running"  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.bn_online = mode


@contextmanager
def _restored_on_error(layers: list[_BatchNorm]) -> Iterator[None]:
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    try:
        yield
    except BaseException:
        for layer, buffers in zip(layers, before, strict=True):
            for name, buffer in layer.named_buffers():
                buffer.copy_(buffers[name])
        raise
