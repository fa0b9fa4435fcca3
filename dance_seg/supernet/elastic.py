"""Layers that run at several sizes, and which of them runs now.

A layer holds the weights of its largest size. A narrower one is the first channels of it, a smaller kernel the centre
of the larger one, mapped by a matrix that is learnt (Once-for-All, arXiv 1908.09791: 7 -> 5 -> 3, beginning with the
plain centre). `choose` says which size runs, and `chosen_state` gives its weights to a plain layer of that size.

Running statistics belong to the largest network: only it updates them, so that it can be judged while smaller ones
train beside it. Those of any other network are taken anew (`dance_seg.supernet.recalibrate`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.supernet.space import SearchSpace, Subnet


@runtime_checkable
class Supernet(Protocol):
    """What a network that holds many looks like, beside being an nn.Module."""

    space: SearchSpace

    @property
    def active(self) -> Subnet:
        """The network that runs."""

    def activate(self, subnet: Subnet | None) -> None:
        """Let a network run from now on, None the largest. Raises ValueError for one of another space."""

    def extract(self, subnet: Subnet) -> nn.Module:
        """A network of its own: plain layers with copies of the weights."""


AnySupernet = TypeVar("AnySupernet", bound=Supernet)


@contextmanager
def activated(model: AnySupernet, subnet: Subnet) -> Iterator[AnySupernet]:
    """Let one network of a supernet run; what ran before does so again on leaving, also after an error.

    Raises ValueError for a network of another space.
    """
    before, masked = model.active, getattr(model, "masked", ())
    try:
        model.activate(subnet)
        yield model
    finally:
        model.activate(before)
        if masked:  # several subnets at once
            model.set_masks(masked)  # type: ignore[attr-defined]


def check_belongs(subnet: Subnet, space: SearchSpace) -> None:
    """Raise ValueError, naming the choice, unless a network is one of a space."""
    if space.subnet(subnet.as_record()) != subnet:
        raise ValueError(f"{subnet} is another way to write a network of this search space; use space.subnet")


class ElasticConv2d(nn.Module):
    """A convolution (N, in, h, w) -> (N, channels, h / stride, w / stride) without bias, at several widths and kernels.

    `channels_in` are the widths of the features that are laid side by side as its input; of each of them the first
    channels can be what is given, or none. `kernels` are odd and ascend by 2. Raises ValueError for other kernels.

    >>> convolution = ElasticConv2d((4, 4), 8, kernels=(3, 5))
    >>> convolution.choose(channels_in=(4, 2), channels=6, kernel=3)
    >>> tuple(convolution(torch.zeros(1, 6, 10, 12)).shape), tuple(convolution.chosen_state()["weight"].shape)
    ((1, 6, 10, 12), (6, 6, 3, 3))
    """

    def __init__(
        self, channels_in: Sequence[int], channels: int, kernels: Sequence[int] = (3,), stride: int = 1
    ) -> None:
        super().__init__()
        if not kernels or any(kernel % 2 == 0 for kernel in kernels) or any(b - a != 2 for a, b in pairwise(kernels)):
            raise ValueError(f"kernels are {tuple(kernels)}; give odd ones that ascend by 2, such as 3, 5, 7")
        self.channels_in, self.channels, self.kernels = tuple(channels_in), channels, tuple(kernels)
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, sum(channels_in), kernels[-1], kernels[-1]))
        # What is added to the identity, so that weight decay pulls towards the plain centre and not towards zero.
        self.changes = nn.ParameterList(torch.zeros(kernel**2, kernel**2) for kernel in reversed(self.kernels[:-1]))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.choose()

    def choose(
        self, channels_in: Sequence[int] | None = None, channels: int | None = None, kernel: int | None = None
    ) -> None:
        """Which size runs; what is not given is the largest. Raises ValueError for a size that the layer has not."""
        self.chosen_in = self.channels_in if channels_in is None else tuple(channels_in)
        self.chosen_channels = self.channels if channels is None else channels
        self.kernel = self.kernels[-1] if kernel is None else kernel
        if self.kernel not in self.kernels:
            raise ValueError(f"kernel is {kernel}; this convolution has {', '.join(map(str, self.kernels))}")
        if not 1 <= self.chosen_channels <= self.channels:
            raise ValueError(f"channels is {channels}; this convolution makes 1 to {self.channels}")
        if len(self.chosen_in) != len(self.channels_in) or any(
            not 0 <= some <= all for some, all in zip(self.chosen_in, self.channels_in, strict=True)
        ):
            raise ValueError(f"channels_in is {self.chosen_in}; this convolution takes at most {self.channels_in}")

    def chosen_weight(self) -> Tensor:
        """The weight (channels, in, kernel, kernel) of the size that runs; gradients reach what it is made of."""
        weight = self.weight[: self.chosen_channels]
        if self.chosen_in != self.channels_in:
            parts = weight.split(self.channels_in, dim=1)
            weight = torch.cat([part[:, :some] for part, some in zip(parts, self.chosen_in, strict=True)], dim=1)
        for change in self.changes:
            if weight.shape[-1] > self.kernel:
                weight = smaller_kernel(weight, change)
            elif self.training:
                weight = weight + 0 * change.sum()  # every parameter has a gradient, which ranks must agree on
        return weight

    def forward(self, features: Tensor) -> Tensor:
        """The features (N, channels, h / stride, w / stride)."""
        return F.conv2d(features, self.chosen_weight(), stride=self.stride, padding=self.kernel // 2)

    @torch.no_grad()
    def chosen_state(self) -> dict[str, Tensor]:
        """The state of an nn.Conv2d of the size that runs; copies."""
        return {"weight": self.chosen_weight().clone(memory_format=torch.contiguous_format)}


def smaller_kernel(weight: Tensor, change: Tensor) -> Tensor:
    """The weight (O, I, k, k) of the next smaller kernel: identity + change, applied to the centre of (O, I, k+2, k+2).

    >>> weight = torch.arange(25.0).reshape(1, 1, 5, 5)
    >>> smaller_kernel(weight, torch.zeros(9, 9))[0, 0].tolist()
    [[6.0, 7.0, 8.0], [11.0, 12.0, 13.0], [16.0, 17.0, 18.0]]
    """
    centre = weight[:, :, 1:-1, 1:-1]
    return centre + F.linear(centre.flatten(2), change).view(centre.shape)


class ElasticBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm of the first channels of its features: (N, c, h, w), c up to `num_features`.

    Weight and bias are shared by all widths. In training features are normalised by their own statistics, as always,
    but running statistics are kept of the largest network alone.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.choose()

    def choose(self, channels: int | None = None, *, keeps_statistics: bool = True) -> None:
        """Which width runs, None the largest, and whether it is part of the largest network."""
        self.channels = self.num_features if channels is None else channels
        self.keeps_statistics = keeps_statistics

    def forward(self, features: Tensor) -> Tensor:
        """The normalised features, scaled and shifted."""
        whole = self.channels == self.num_features
        if whole and (self.keeps_statistics or not self.training):
            return super().forward(features)
        weight, bias = self.weight[: self.channels], self.bias[: self.channels]
        if self.training or self.running_mean is None or self.running_var is None:
            return F.batch_norm(features, None, None, weight, bias, training=True, eps=self.eps)
        mean, variance = self.running_mean[: self.channels], self.running_var[: self.channels]
        return F.batch_norm(features, mean, variance, weight, bias, training=False, eps=self.eps)

    def reset_running_stats(self) -> None:
        """As usual. Raises ValueError while a smaller network runs: the statistics are not its own."""
        if not getattr(self, "keeps_statistics", True):
            raise ValueError(
                "the running statistics of a supernet belong to its largest network, and a smaller one is active; use "
                "dance_seg.supernet.recalibrate.recalibrated for a network's own"
            )
        super().reset_running_stats()

    @torch.no_grad()
    def chosen_state(self) -> dict[str, Tensor]:
        """The state of an nn.BatchNorm2d of the width that runs; copies."""
        state = nn.BatchNorm2d.state_dict(self)
        return {name: (value[: self.channels] if value.ndim else value).clone() for name, value in state.items()}


def copy_chosen(supernet: nn.Module, network: nn.Module) -> None:
    """Copy the weights that run in a supernet to a network of plain layers, whose modules have the same names.

    Raises RuntimeError, as load_state_dict does, for a layer of another size.
    """
    for name, layer in network.named_modules():
        if not any(True for _ in layer.children()):
            source: Any = supernet.get_submodule(name)
            layer.load_state_dict(source.chosen_state() if hasattr(source, "chosen_state") else source.state_dict())


@torch.no_grad()
def reorder(
    tensor: Tensor, dim: int, order: Tensor, start: int = 0, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> None:
    """Put `len(order)` channels of a tensor from `start` on into another order, in place, with what optimisers hold.

    Its gradient too, which a step over several batches has not used yet.

    >>> weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> reorder(weight, 0, torch.tensor([1, 0]), start=2)
    >>> weight.tolist()
    [1.0, 2.0, 4.0, 3.0]
    """
    held = [
        value for optimizer in optimizers if tensor in optimizer.state for value in optimizer.state[tensor].values()
    ]
    gradient = [tensor.grad] if tensor.is_leaf and tensor.grad is not None else []
    for each in (
        tensor,
        *gradient,
        *(value for value in held if torch.is_tensor(value) and value.shape == tensor.shape),
    ):
        part = each.narrow(dim, start, len(order))
        part.copy_(part.index_select(dim, order.to(each.device)))
