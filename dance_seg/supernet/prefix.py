"""Several networks in one pass: layers of which every image keeps its own first channels.

Multi-architectural sampling (ViT-ResNAS, arXiv 2109.00642): a batch is cut into groups of images, each group trains
another subnet, and all of them share one forward and one backward pass. The layers run at full width; what a subnet
does not have is set to zero, image by image (channel drop), and LayerNorm takes its mean and variance from the
channels that are kept. A subnet keeps the first channels of each layer, a prefix.

The same layers run one subnet alone by taking the corner of their weights, at its own MACs, and become plain layers
of that size. So a layer here knows two things: the sizes it keeps (`keep`), and masks, where a pass holds several
subnets (`mask`). At most one of them differs from the largest at a time.

N images in G groups of equal size, one after another; C channels, the last dimension of features (N, ..., C).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.supernet.space import Subnet

Layer = TypeVar("Layer", nn.LayerNorm, nn.Linear, nn.Conv2d)


@runtime_checkable
class MultiArchitectural(Protocol):
    """A supernet that can run several subnets in one pass.

    `active` is the subnet it runs as; `masked` are those whose masks are set, one for each group of images.
    """

    active: Subnet
    masked: tuple[Subnet, ...]

    def activate(self, subnet: Subnet | None) -> None:
        """Run as this subnet alone; takes masks away."""
        ...

    def set_masks(self, subnets: Sequence[Subnet]) -> None:
        """Let each group of images keep the channels of its subnet; none takes the masks away."""
        ...


@contextmanager
def several_at_once(model: MultiArchitectural, subnets: Sequence[Subnet]) -> Iterator[None]:
    """Run the forward passes inside with these subnets, one for each group of images; then as before, errors or not.

    The backward pass may come after: masks matter to the forward only.
    """
    active, masked = model.active, model.masked
    try:
        model.set_masks(subnets)
        yield
    finally:
        model.activate(active)
        if masked:
            model.set_masks(masked)


def prefix_mask(kept: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
    """Masks (G, C) of zeros and ones for the sizes that each group keeps; with several sizes, C is their product.

    >>> prefix_mask([[1], [3]], sizes=[3])
    tensor([[1., 0., 0.],
            [1., 1., 1.]])
    >>> prefix_mask([[1, 2]], sizes=[2, 3])  # one head of two, two dimensions of three
    tensor([[1., 1., 0., 0., 0., 0.]])
    """
    mask = torch.ones(len(kept), 1)
    for of_groups, size in zip(zip(*kept, strict=True), sizes, strict=True):
        ones = (torch.arange(size) < torch.tensor(of_groups)[:, None]).float()
        mask = (mask[:, :, None] * ones[:, None, :]).flatten(1)
    return mask


def masked(features: Tensor, mask: Tensor) -> Tensor:
    """Features (N, ..., C) times the mask (G, C) of their group.

    >>> masked(torch.ones(4, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist()
    [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    """
    groups = by_group(features, mask)
    return (groups * _beside(mask, groups).to(features.dtype)).flatten(0, 1)


def masked_layer_norm(features: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm of features (N, ..., C) over the channels that their group's mask (G, C) keeps; zero elsewhere.

    Sums go over all channels, zeros included, and are divided by the number that is kept. Each image's result is that
    of nn.LayerNorm on its kept channels alone, and so are the gradients. Features must be zero where the mask is. Keeps
    for backward what nn.LayerNorm keeps.
    """
    groups = by_group(features, mask)
    normalised: Tensor = _MaskedLayerNorm.apply(groups, weight, bias, _beside(mask, groups), eps)  # type: ignore[no-untyped-call]
    return normalised.flatten(0, 1)


class _MaskedLayerNorm(torch.autograd.Function):
    """Written out, since autograd would keep two more copies of the features, which is a quarter of a block's memory.

    Features (G, n, ..., C), mask (G, 1, ..., C).
    """

    @staticmethod
    def forward(context: Any, features: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, eps: float) -> Tensor:
        wide = features.to(weight.dtype)  # mean and variance in full precision under autocast too
        kept = mask.sum(-1, keepdim=True)
        mean = wide.sum(-1, keepdim=True) / kept
        centred = (wide - mean).mul_(mask)
        scale = torch.rsqrt(torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square() / kept + eps)
        context.save_for_backward(features, weight, bias, mask, kept, mean, scale)
        return torch.addcmul(bias * mask, centred.mul_(scale), weight).to(features.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Torch's own step takes two means over all channels; C over those kept, times it, is too much of the rest."""
        features, weight, bias, mask, kept, mean, scale = context.saved_tensors
        channels = features.shape[-1]
        gradient = gradient.to(weight.dtype) * mask
        over_all, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            gradient, features.to(weight.dtype), [channels], mean, scale, weight, bias, [True, True, True]
        )
        factor = channels / kept
        of_features = over_all.mul_(factor * mask).sub_(gradient.mul_(weight).mul_(scale * (factor - 1)))
        return of_features.to(features.dtype), of_weight, of_bias, None, None


def by_group(features: Tensor, mask: Tensor) -> Tensor:
    """Features (N, ...) as (G, N/G, ...), a view."""
    return features.unflatten(0, (len(mask), -1))


def _beside(mask: Tensor, groups: Tensor) -> Tensor:
    return mask.reshape(len(mask), *(1,) * (groups.ndim - 2), -1)


# Layers ----------------------------------------------------------------------------------------------------------


class ChannelDrop(nn.Module):
    """Features as they are, or with the channels gone that their group's subnet does not have.

    `sizes` are those of the channels, such as (heads, head dimensions).
    """

    mask: Tensor | None = None  # (G, C), no buffer: state dicts and DDP need not know it

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, ..., C)."""
        return features if self.mask is None else masked(features, self.mask)

    def plain(self) -> nn.Module:
        """A network of one size has nothing to drop."""
        return nn.Identity()


class PrefixNorm(nn.LayerNorm):
    """LayerNorm over the channels that are kept."""

    mask: Tensor | None = None

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.sizes = (channels,)
        self.kept = channels

    def keep(self, channels: int) -> None:
        """Take features of so many channels."""
        self.kept = channels

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, ..., C)."""
        if self.mask is not None:
            return masked_layer_norm(features, self.weight, self.bias, self.mask, self.eps)
        return F.layer_norm(features, (self.kept,), self.weight[: self.kept], self.bias[: self.kept], self.eps)

    def plain(self) -> nn.LayerNorm:
        """The layer at the size it keeps."""
        layer = nn.LayerNorm(self.kept, self.eps)
        return _with_values(layer, self.weight[: self.kept], self.bias[: self.kept])


class PrefixLinear(nn.Linear):
    """A linear layer whose inputs and outputs may each be of several sizes, such as (heads, head dimensions).

    >>> layer = PrefixLinear((4,), (2, 3))
    >>> layer.keep((4,), (1, 2))
    >>> layer(torch.zeros(1, 4)).shape, layer.plain()
    (torch.Size([1, 2]), Linear(in_features=4, out_features=2, bias=True))
    """

    def __init__(self, sizes_in: tuple[int, ...], sizes_out: tuple[int, ...]) -> None:
        super().__init__(prod(sizes_in), prod(sizes_out))
        self.sizes_in, self.sizes_out = sizes_in, sizes_out
        self.kept_in, self.kept_out = sizes_in, sizes_out

    def keep(self, kept_in: tuple[int, ...], kept_out: tuple[int, ...]) -> None:
        """Use this corner of the weights."""
        self.kept_in, self.kept_out = kept_in, kept_out

    def corner(self) -> tuple[Tensor, Tensor]:
        """The weight (outputs, inputs) and bias (outputs,) that are kept."""
        if (self.kept_in, self.kept_out) == (self.sizes_in, self.sizes_out):
            return self.weight, self.bias
        rows, columns = ([slice(kept) for kept in sizes] for sizes in (self.kept_out, self.kept_in))
        weight = self.weight.view(*self.sizes_out, *self.sizes_in)[(*rows, *columns)]
        bias = self.bias.view(self.sizes_out)[tuple(rows)]
        return weight.reshape(prod(self.kept_out), prod(self.kept_in)), bias.flatten()

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, ..., inputs kept) -> (N, ..., outputs kept)."""
        return F.linear(features, *self.corner())

    def plain(self) -> nn.Linear:
        """The layer at the sizes it keeps."""
        return _with_values(nn.Linear(prod(self.kept_in), prod(self.kept_out)), *self.corner())


class PrefixConv2d(nn.Conv2d):
    """A convolution on the first channels, to the first channels."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, padding: int = 0) -> None:
        super().__init__(channels_in, channels, kernel, stride, padding)
        self.kept_in, self.kept_out = channels_in, channels

    def keep(self, channels_in: int, channels: int) -> None:
        """Use this corner of the weights."""
        self.kept_in, self.kept_out = channels_in, channels

    def corner(self) -> tuple[Tensor, Tensor]:
        """The weight and bias that are kept."""
        assert self.bias is not None
        return self.weight[: self.kept_out, : self.kept_in], self.bias[: self.kept_out]

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, channels kept, h, w)."""
        return self._conv_forward(features, *self.corner())

    def plain(self) -> nn.Conv2d:
        """The layer at the sizes it keeps."""
        kernel, stride, padding = self.kernel_size, self.stride, self.padding
        layer = nn.Conv2d(self.kept_in, self.kept_out, kernel, stride, padding)  # type: ignore[arg-type]
        return _with_values(layer, *self.corner())


class DropPath(nn.Module):
    """What a branch adds to features, left out at random for whole images while training."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, features: Tensor, branch: Tensor) -> Tensor:
        """Features (N, ..., C) and what the branch adds; the mean over many draws is their sum."""
        chance = self.chance(branch)
        return features + branch if chance is None else torch.addcmul(features, branch, chance)

    def chance(self, branch: Tensor) -> Tensor | None:
        """Zero, or one over the share of images kept, for each image: (N, 1, ..., 1). None where all are kept."""
        if not self.training or self.rate == 0:
            return None
        kept = torch.rand(len(branch), *(1,) * (branch.ndim - 1), device=branch.device) >= self.rate
        return kept.to(branch.dtype) / (1 - self.rate)


class PrefixDropPath(DropPath):
    """The same, with the channels gone that an image's subnet does not have, all of them where it has no such block."""

    mask: Tensor | None = None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes = (channels,)

    def forward(self, features: Tensor, branch: Tensor) -> Tensor:
        """Features (N, ..., C) and what the branch adds."""
        if self.mask is None:
            return super().forward(features, branch)
        chance = self.chance(branch)
        groups = by_group(branch, self.mask)
        factor = _beside(self.mask, groups).to(branch.dtype)
        if chance is not None:
            factor = factor * by_group(chance, self.mask)
        return torch.addcmul(by_group(features, self.mask), groups, factor).flatten(0, 1)  # one pass for both

    def plain(self) -> DropPath:
        """The layer without masks."""
        return DropPath(self.rate)


MASKABLE = (ChannelDrop, PrefixNorm, PrefixDropPath)
Masks = list[tuple[ChannelDrop | PrefixNorm | PrefixDropPath, Tensor]]


def place_masks(masks: Masks, device: torch.device) -> None:
    """Give layers their masks (G, C); one that keeps everything is left out. One copy to the device for all."""
    needed = [(layer, mask) for layer, mask in masks if not bool((mask == 1).all())]
    if not needed:
        return
    together = torch.cat([mask for _, mask in needed], dim=1).to(device, non_blocking=True)
    ends = torch.tensor([0, *(mask.shape[1] for _, mask in needed)]).cumsum(0).tolist()
    for (layer, _), (start, end) in zip(needed, pairwise(ends), strict=True):
        layer.mask = together[:, start:end]


def remove_masks(model: nn.Module) -> None:
    """Let all layers run as one network."""
    for layer in model.modules():
        if isinstance(layer, MASKABLE):
            layer.mask = None


def make_plain(module: nn.Module) -> nn.Module:
    """Replace the layers inside by plain ones of the sizes that they keep, in place, with their own values."""
    for name, child in module.named_children():
        plain: Any = getattr(child, "plain", None)
        if plain is not None:
            setattr(module, name, plain().train(child.training))
        else:
            make_plain(child)
    return module


def _with_values(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    layer = layer.to(weight.device, weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)  # type: ignore[union-attr]
    return layer
