"""RANet for segmentation: the coarse sub-network gives a whole mask first, and finer ones begin from what it found.

From the published code (Resolution Adaptive Networks for Efficient Inference, arXiv 2003.07326, for classification):

- base features of all resolutions are one chain of 3x3 convolutions with stride 2 from the full image, computed once;
- sub-network 1 works on the lowest resolution, h > 1 begins at a higher one, has two blocks more than h - 1, and comes
  down to the lowest again, by stride 2 after equal shares of its blocks, where a 1x1 halves the channels;
- a block is dense: each layer, a 1x1 bottleneck and a 3x3, is laid beside what it was given. Growth takes the factors
  4, 2, 1 from low to high resolution, and the bottleneck is 4, 2, 1 times the growth and at most what is given;
- a block of h that h - 1 has too is a fusion block: a quarter of each layer's growth comes from the features of the
  same layer of h - 1, upsampled, and so does at its end a quarter of what it added, from the block's output;
- exits are behind blocks that are no fusion blocks, one or two to a sub-network; nothing is detached.

Ours is what makes masks of it:

- strides 32, 16 and 8. The chain is what every image pays, so it is narrow where it is large: 16 and 32 channels at
  strides 2 and 4 in the size `small`, 6 % of the network's MACs and 8 % of its time;
- each exit has a mask decoder: from stride 32, with the mean over the image beside it, up to stride 8, at each stride
  with the sub-network's own features or, where it has none, the base features. Exits of the last sub-network go on to
  stride 4, with the base features there; those before it are narrower, since every image that goes on pays them;
- blocks of the last sub-network have two layers, all others one. With equal layers the first exit would cost a third
  of the network, since the factors 4, 2, 1, taken twice, make a layer cheaper faster than its pixels grow; so it is
  less than a quarter, and the second half. Layers are few and wide: growth 64 with 1, 2 and 4 layers took a fifth more
  time per MAC on a CPU, where laying narrow features side by side is time without MACs;
- stride 2 is the mean over 2x2 pixels before the 1x1, which then costs a quarter; the convolutions on coarser features
  are 1x1; widths are multiples of 8; images of any size.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.early_exit.exits import ExitNetwork, State
from dance_seg.early_exit.heads import ExitHead
from dance_seg.models.smp import pad_to

FACTORS = (4, 2, 1)  # of the growth, and of the bottleneck over the growth, from low to high resolution
BLOCKS, BLOCK_STEP = 2, 2  # of the first sub-network, and how many more each next one has


class Widths(NamedTuple):
    """How large a network is."""

    chain: tuple[int, int, int, int, int]  # channels of the base features at strides 2, 4, 8, 16 and 32
    growth: int  # that a layer of the last sub-network adds; a multiple of 32, so that quarters are of 8
    layers: tuple[int, int, int]  # in each block, by sub-network
    decoders: tuple[int, int]  # channels of the mask decoders before the last sub-network, and of its own


SIZES = {
    "tiny": Widths(chain=(16, 24, 32, 64, 64), growth=64, layers=(1, 1, 2), decoders=(24, 32)),
    "small": Widths(chain=(16, 32, 64, 128, 128), growth=96, layers=(1, 1, 2), decoders=(40, 64)),
    "base": Widths(chain=(24, 48, 96, 192, 256), growth=160, layers=(1, 1, 2), decoders=(64, 96)),
}


class RANet(ExitNetwork):
    """Three sub-networks from coarse to fine: images (N, 3, H, W), normalised -> logits (N, C, H, W), any H and W.

    `exits_per_network` is 1, or 2 as published: then each sub-network gives a mask before its last block too.
    `exits="last"` builds the same network with the last exit alone, the twin that never stops early. While training
    it returns the `Outputs` of all exits. Raises ValueError for other values.

    >>> import torch
    >>> model = RANet(num_classes=5, size="tiny").eval()
    >>> [tuple(logits.shape[-2:]) for logits, *_ in model.exits(torch.zeros(1, 3, 90, 120))]
    [(12, 16), (12, 16), (24, 32)]
    """

    stride = 32
    minimum_size = 64  # smaller images are padded: one image has more than one value for its statistics
    networks: Sequence["SubNetwork"]

    def __init__(
        self,
        num_classes: int,
        size: Literal["tiny", "small", "base"] = "small",
        exits_per_network: int = 1,
        exits: Literal["all", "last"] = "all",
    ) -> None:
        super().__init__()
        if size not in tuple(SIZES):
            raise ValueError(f"model.args.size is {size!r}; choose one of {', '.join(SIZES)}")
        if type(exits_per_network) is not int or exits_per_network not in (1, 2):
            raise ValueError(
                f"model.args.exits_per_network is {exits_per_network!r}; choose 1, or 2 for a mask before the last "
                "block of each sub-network too"
            )
        if exits not in ("all", "last"):
            raise ValueError(f"model.args.exits is {exits!r}; choose all, or last for the twin with a single exit")
        widths = SIZES[size]
        self.num_classes = num_classes
        self.chain = Chain(widths.chain)
        networks: list[SubNetwork] = []
        for number in range(len(FACTORS)):
            coarse = networks[-1].made if networks else []
            networks.append(SubNetwork(number, widths.chain[-1 - number], widths, coarse))
        self.networks = nn.ModuleList(networks)  # type: ignore[assignment]

        positions = [
            (number, len(network.made) - before)
            for number, network in enumerate(networks)
            for before in range(exits_per_network, 0, -1)
        ]
        positions = positions if exits == "all" else positions[-1:]  # (sub-network, block) that exits are behind
        blocks = [(number, block) for number, network in enumerate(networks) for block in range(len(network.made))]
        ends = [blocks.index(position) + 1 for position in positions]
        self.between = [blocks[start:end] for start, end in pairwise((0, *ends))]  # one exit and the next
        self.num_exits, self.align_corners = len(positions), (False,) * len(positions)
        base = list(widths.chain[1:])
        self.decoders = nn.ModuleList()
        for number, position in positions:
            network = networks[number]
            levels = network.by_level(base[1:], network.made[: position + 1])
            is_last = number == len(FACTORS) - 1
            detail = base[0] if is_last else None
            self.decoders.append(MaskDecoder(levels, widths.decoders[is_last], num_classes, detail))
        self.apply(_initialise)

    def begin(self, images: Tensor) -> State:
        """The base features, finest first, and what no block has made yet."""
        return self.chain(pad_to(images, self.padded_size(*images.shape[-2:]))), []

    def part(self, exit: int, state: State) -> tuple[State, State]:
        """What a decoder sees; then the base features that are left, and what the sub-network's blocks have made.

        A sub-network takes the coarsest base features that are left, and what the one before it made.
        """
        base, made = state
        coarse: list[list[Tensor]] = []  # no fusion block is behind the first exit of a sub-network
        for number, position in self.between[exit]:
            if position == 0:
                coarse, made = made, []
                *base, features = base
            else:
                features = made[-1][-1]
            block = self.networks[number].blocks[position]
            made = [*made, block(features, coarse[position]) if position < len(coarse) else block(features)]
        seen = self.networks[number].by_level(base[1:], made), base[0]
        return seen, (base, made) if exit < self.num_exits - 1 else ()

    def head(self, exit: int, seen: State) -> Tensor:
        """The logits of a mask decoder."""
        return self.decoders[exit](*seen)


class Chain(nn.Module):
    """Base features: images (N, 3, H, W) -> features at strides 4, 8, 16 and 32, each made from the one before."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            conv_norm(given, made, stride=2) for given, made in zip((3, *channels), channels, strict=False)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """The base features, finest first."""
        made = [images]
        for step in self.steps:
            made.append(step(made[-1]))
        return made[2:]


T = TypeVar("T")


class SubNetwork(nn.Module):
    """The blocks of one sub-network, which the network calls one by one.

    `number` counts from 0, the coarsest. `coarse` and `made` are channels of features: of each block, of each layer.
    """

    def __init__(self, number: int, channels: int, widths: Widths, coarse: Sequence[Sequence[int]]) -> None:
        super().__init__()
        growth = widths.growth * FACTORS[number]
        num_blocks, num_levels = BLOCKS + BLOCK_STEP * number, number + 1
        self.levels = [
            len(FACTORS) - num_levels + position * num_levels // num_blocks for position in range(num_blocks)
        ]
        self.blocks = nn.ModuleList()
        self.made: list[list[int]] = []
        for position in range(num_blocks):
            halves = position > 0 and self.levels[position] > self.levels[position - 1]
            shape = BlockShape(channels, growth, growth * FACTORS[number], widths.layers[number], halves)
            block = FusionBlock(shape, coarse[position]) if position < len(coarse) else DenseBlock(shape)
            self.blocks.append(block)
            self.made.append(block.made)
            channels = block.made[-1]

    def by_level(self, base: Sequence[T], made: Sequence[Sequence[T]]) -> list[T]:
        """What a decoder sees at strides 8, 16 and 32: the last that these blocks made there, or the base features."""
        own = {level: of_block[-1] for level, of_block in zip(self.levels, made, strict=False)}
        return [*base[: self.levels[0]], *own.values()]


class BlockShape(NamedTuple):
    """What a block of layers is given and makes."""

    channels: int  # given
    growth: int  # that each layer adds
    bottleneck: int  # of a layer, at most
    layers: int
    halves: bool  # whether it begins by going down to half the rows and columns and half the channels


class DenseBlock(nn.Module):
    """Layers that each lay what they make of all before them beside it; gives the features after every layer."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.down, channels = _down(shape)
        self.made = [channels + shape.growth * (number + 1) for number in range(shape.layers)]
        self.layers = nn.ModuleList(
            bottlenecked(given, shape.growth, shape.bottleneck) for given in (channels, *self.made[:-1])
        )

    def forward(self, features: Tensor) -> list[Tensor]:
        """Features (N, made[i], h, w) after every layer i."""
        made = [self.down(features)]
        for layer in self.layers:
            made.append(torch.cat([made[-1], layer(made[-1])], dim=1))
        return made[1:]


class FusionBlock(nn.Module):
    """A dense block, a quarter of whose growth comes from the same block of the sub-network before, at half its size.

    Of fewer layers there, the one at the same share of the block is the same layer.
    """

    def __init__(self, shape: BlockShape, coarse: Sequence[int]) -> None:
        super().__init__()
        self.down, channels = _down(shape)
        quarter = shape.growth // 4
        self.same = [number * len(coarse) // shape.layers for number in range(shape.layers)]
        self.made = [channels + shape.growth * (number + 1) for number in range(shape.layers)]
        self.layers = nn.ModuleList(
            bottlenecked(given, shape.growth - quarter, shape.bottleneck) for given in (channels, *self.made[:-1])
        )
        self.ups = nn.ModuleList(conv_norm(coarse[same], quarter, kernel=1) for same in self.same)
        self.end = conv_norm(coarse[-1], quarter * shape.layers, kernel=1)
        self.made[-1] += quarter * shape.layers

    def forward(self, features: Tensor, coarse: list[Tensor]) -> list[Tensor]:
        """Features (N, made[i], h, w) after every layer i; those of the coarser block are (N, coarse[i], h/2, w/2)."""
        made = [self.down(features)]
        for layer, up, same in zip(self.layers, self.ups, self.same, strict=True):
            beside = [made[-1], layer(made[-1]), _doubled(up(coarse[same]))]
            if len(made) == len(self.layers):
                beside.append(_doubled(self.end(coarse[-1])))
            made.append(torch.cat(beside, dim=1))
        return made[1:]


class MaskDecoder(nn.Module):
    """Logits (N, C, H/8, W/8) from features at strides 8, 16 and 32, of `levels` channels.

    With `detail`, the channels of features at stride 4 that it takes too, logits are (N, C, H/4, W/4).
    """

    def __init__(self, levels: Sequence[int], channels: int, num_classes: int, detail: int | None = None) -> None:
        super().__init__()
        *finer, coarsest = levels
        self.coarsest = nn.Conv2d(coarsest, channels, 1, bias=False)
        self.context = nn.Conv2d(coarsest, channels, 1, bias=False)
        self.norm = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.laterals = nn.ModuleList(conv_norm(given, channels, kernel=1) for given in reversed(finer))
        self.smooth = nn.ModuleList(conv_norm(channels, channels) for _ in finer)
        self.with_detail = detail is not None
        self.head = ExitHead(channels + (detail or 0), num_classes, channels)

    def forward(self, levels: Sequence[Tensor], detail: Tensor) -> Tensor:
        """Logits of features, finest first, and those at stride 4."""
        *finer, coarsest = levels
        # A 1x1 on features beside their mean is the sum of two, one of which sees a single pixel.
        features = self.norm(self.coarsest(coarsest) + self.context(F.adaptive_avg_pool2d(coarsest, 1)))
        for lateral, smooth, given in zip(self.laterals, self.smooth, reversed(finer), strict=True):
            features = smooth(_doubled(features) + lateral(given))
        if self.with_detail:
            features = torch.cat([_doubled(features), detail], dim=1)
        return self.head(features)


def conv_norm(channels_in: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution with BatchNorm and ReLU."""
    convolution = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def bottlenecked(channels_in: int, channels: int, bottleneck: int) -> nn.Sequential:
    """A 1x1 convolution to the bottleneck, which is no wider than what is given, and a 3x3."""
    between = min(channels_in, bottleneck)
    return nn.Sequential(conv_norm(channels_in, between, kernel=1), conv_norm(between, channels))


def _down(shape: BlockShape) -> tuple[nn.Module, int]:
    if not shape.halves:
        return nn.Identity(), shape.channels
    half = 8 * round(shape.channels / 16)
    return nn.Sequential(nn.AvgPool2d(2), *conv_norm(shape.channels, half, kernel=1)), half


def _doubled(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is None:  # a norm and a ReLU follow
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
