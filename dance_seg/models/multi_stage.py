"""Multi-stage networks, and the supernet that holds them: stages are slices of the width, each with a mask of its own.

ENAS4D (Once-for-All network with early exits, arXiv 2009.09182). Its abstract says: a space built of "multi-stage
convolutions" with each stage's depth, kernels and channels and the input's resolution as choices, one supernet whose
networks need no training of their own, a prediction layer for each stage, and stopping at the first that is sure. No
code is published. Inferred, from the first author's S2DNAS, is what a stage is: a slice of the width, not a prefix of
the depth. We read it so:

- every layer's channels are in three groups, and group j of a layer reads groups 1..j of the layer before: a weight is
  block-lower-triangular, stage 1 a thin network of full depth, and a later stage uses all that earlier ones computed;
- each group has BatchNorm of its own, so that what a stage says is the same bit for bit whether later ones run or not;
- a block that a stage leaves out is the identity there, since blocks are residual.

Ours: the stem, two convolutions of stride 2, belongs to stage 1 and is not split, since narrow convolutions of the
largest features, and laying them side by side, take time without MACs. Then one convolution of stride 2 and residual
blocks at each of strides 8, 16 and 32. Stages are equally wide there, so their MACs are as 1, 2 and 3: with stem and
heads the largest network's first exit costs a quarter of it, and the second 55 %. A stage's convolution is one
convolution of all that it sees laid side by side. Blocks are kxk and 3x3 convolutions of all channels rather than
inverted bottlenecks: on one core of a CPU, at the shapes of these networks, they took 14 to 18 ms per GMAC, those with
depthwise convolutions 31 to 54, and training on half the MACs took 1 to 4 times as long. Widths are multiples of 8.
Kernels are 3 and 5: 7x7 of all channels costs more than five times 3x3. Depth, kernel and width are chosen for each
stage at each stride; the width is that of the blocks' inner channels alone, between blocks there is one size. The
resolution is one choice for a whole network, whose later stages read what earlier ones made.

Heads: 1x1 convolutions of what a stage sees at strides 8, 16 and 32, added up at stride 8, a 3x3, and logits. The
resolution is that of the images as the network sees them; masks have the images' own size.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.early_exit.exits import ExitNetwork, State
from dance_seg.models.smp import pad_to
from dance_seg.supernet.elastic import ElasticBatchNorm2d, ElasticConv2d, activated, check_belongs, copy_chosen, reorder
from dance_seg.supernet.space import SearchSpace, Subnet, Value, named_subnet

STAGES = 3
STRIDES = (8, 16, 32)
KERNELS = (3, 5)
RESOLUTIONS = (0.5, 0.75, 1.0)


class Widths(NamedTuple):
    """How large a network can be; channels are those of one stage but in the stem."""

    stem: tuple[int, int]  # at strides 2 and 4, which all stages share
    levels: tuple[int, int, int]  # at strides 8, 16 and 32
    depths: tuple[int, ...]  # choices: blocks of a stage at a stride
    inner: tuple[float, ...]  # choices: channels between the convolutions of a block, over those around it
    head: int


SIZES = {
    "tiny": Widths(stem=(16, 48), levels=(24, 32, 48), depths=(1, 2), inner=(0.5, 1.0), head=24),
    "small": Widths(stem=(24, 64), levels=(32, 48, 64), depths=(1, 2, 3), inner=(0.5, 0.75, 1.0), head=48),
}


class LevelShape(NamedTuple):
    """What one stage does at one stride."""

    depth: int  # blocks
    kernel: int  # of the first convolution of each
    inner: int  # channels between the two


def space_of(size: str) -> SearchSpace:
    """The networks of a size.

    Raises ValueError for a size that does not exist.

    >>> space = space_of("tiny")
    >>> len(space.values), space.count() == 3 * 8**9, space.largest["stage1.stride8.depth"]
    (28, True, 2)
    """
    if size not in tuple(SIZES):
        raise ValueError(f"model.args.size is {size!r}; choose one of {', '.join(SIZES)}")
    widths = SIZES[size]
    values: dict[str, tuple[Value, ...]] = {"resolution": RESOLUTIONS}
    for stage in range(1, STAGES + 1):
        for stride in STRIDES:
            values[f"stage{stage}.stride{stride}.depth"] = widths.depths
            values[f"stage{stage}.stride{stride}.kernel"] = KERNELS
            values[f"stage{stage}.stride{stride}.width"] = widths.inner
    return SearchSpace(values)


def shapes_of(size: str, subnet: Subnet) -> list[list[LevelShape]]:
    """What each stage of a network does at each stride.

    >>> shapes_of("tiny", space_of("tiny").smallest)[0]
    [LevelShape(depth=1, kernel=3, inner=16), LevelShape(depth=1, kernel=3, inner=16), \
LevelShape(depth=1, kernel=3, inner=24)]
    """
    chosen = subnet.as_record()
    return [
        [
            LevelShape(
                int(chosen[f"stage{stage}.stride{stride}.depth"]),
                int(chosen[f"stage{stage}.stride{stride}.kernel"]),
                rounded_up(channels * chosen[f"stage{stage}.stride{stride}.width"]),
            )
            for stride, channels in zip(STRIDES, SIZES[size].levels, strict=True)
        ]
        for stage in range(1, STAGES + 1)
    ]


def rounded_up(channels: float) -> int:
    """The next multiple of 8.

    >>> rounded_up(12), rounded_up(16)
    (16, 16)
    """
    return 8 * int(-(-channels // 8))


class BlockShape(NamedTuple):
    """One block that a network has."""

    stage: int  # from 0
    level: int
    visible: int  # channels that its first convolution reads
    channels: int  # that its second one makes
    kernel: int  # of the first
    inner: list[int]  # channels that the second one reads, of each stage up to its own


def every_block(size: str, subnet: Subnet) -> Iterator[BlockShape]:
    """The blocks of a network, stage by stage."""
    shapes = shapes_of(size, subnet)
    for stage in range(STAGES):
        for level, channels in enumerate(SIZES[size].levels):
            of_stages = [shape[level] for shape in shapes[: stage + 1]]
            for position in range(of_stages[-1].depth):
                inner = inner_widths(of_stages, position)
                yield BlockShape(stage, level, (stage + 1) * channels, channels, of_stages[-1].kernel, inner)


class MultiStage(ExitNetwork):
    """One network of the space, of plain layers: images (N, 3, H, W), normalised -> logits (N, C, H, W), any H and W.

    `subnet` maps every choice of `space_of(size)` to a value; by default it is the largest. There is an exit for each
    stage; while it trains, the network returns the `Outputs` of all. Raises ValueError for another size, choice or
    value.

    >>> import torch
    >>> model = MultiStage(num_classes=5, size="tiny").eval()
    >>> [tuple(logits.shape[-2:]) for logits, *_ in model.exits(torch.zeros(1, 3, 90, 120))]
    [(12, 16), (12, 16), (12, 16)]
    """

    stride = 32
    minimum_size = 64  # smaller images are padded: one image has more than one value for its statistics
    num_exits = STAGES
    align_corners = (False,) * STAGES
    stages: Sequence["Stage"]
    _elastic = False

    def __init__(
        self, num_classes: int, size: Literal["tiny", "small"] = "small", subnet: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.space = space_of(size)
        self.num_classes, self.size = num_classes, size
        self._active = named_subnet(self.space, subnet)
        shapes = shapes_of(size, self._active)
        half, quarter = SIZES[size].stem
        self.stem = nn.Sequential(
            fixed(3, half, self._elastic, stride=2), fixed(half, quarter, self._elastic, stride=2)
        )
        self.stages = nn.ModuleList(  # type: ignore[assignment]
            Stage(SIZES[size], shapes[: number + 1], num_classes, elastic=self._elastic) for number in range(STAGES)
        )
        self.apply(_initialise)

    @property
    def active(self) -> Subnet:
        """The network that runs."""
        return self._active

    def seen_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) at which the network sees images that are padded to height x width: resolution times them."""
        return seen_size((height, width), self._active["resolution"], self.minimum_size, self.stride)

    def begin(self, images: Tensor) -> State:
        """The stem's features of the images at the network's resolution; no stage has made anything yet."""
        padded = pad_to(images, self.padded_size(*images.shape[-2:]))
        size = self.seen_size(*padded.shape[-2:])
        if size != tuple(padded.shape[-2:]):
            padded = F.interpolate(padded, size=size, mode="bilinear", align_corners=False)
        return self.stem(padded), {}

    def part(self, exit: int, state: State) -> tuple[State, State]:
        """What a stage sees at strides 8, 16 and 32; then the stem's features, and what stages up to this have made."""
        stem, earlier = state
        later = self.stages[exit + 1 :]
        read = [max((stage.levels[level].depth for stage in later), default=0) for level in range(len(STRIDES))]
        seen, made = self.stages[exit](stem, earlier, read)
        return seen, (stem, made) if later else ()

    def head(self, exit: int, seen: State) -> Tensor:
        """The logits of a stage."""
        return self.stages[exit].head(seen)


class MultiStageSupernet(MultiStage):
    """All networks of a size in one, which trains and runs any of them; the largest until another is activated.

    While it trains it returns the `Outputs` of all exits of the active network.

    >>> from dance_seg.supernet.elastic import activated
    >>> model = MultiStageSupernet(num_classes=5, size="tiny").eval()
    >>> images = torch.randn(1, 3, 64, 64)
    >>> with torch.no_grad(), activated(model, model.space.smallest):
    ...     torch.allclose(model(images), model.extract(model.space.smallest)(images), atol=1e-5)
    True
    """

    sorted_kinds = ("width",)  # of choices, whose channels can be put in order before they open
    _elastic = True

    def __init__(self, num_classes: int, size: Literal["tiny", "small"] = "small") -> None:
        super().__init__(num_classes, size)

    def activate(self, subnet: Subnet | None) -> None:
        """Let a network of the space run from now on, None the largest. Raises ValueError for any other network."""
        subnet = self.space.largest if subnet is None else subnet
        check_belongs(subnet, self.space)
        self._active = subnet
        shapes = shapes_of(self.size, subnet)
        for number, stage in enumerate(self.stages):
            stage.choose(shapes[: number + 1])
        for layer in self.modules():
            if isinstance(layer, ElasticBatchNorm2d):
                layer.choose(layer.channels, keeps_statistics=subnet == self.space.largest)

    def like_largest(self, subnet: Subnet) -> Subnet:
        """The largest network of the same resolution."""
        return self.space.subnet({**self.space.largest.as_record(), "resolution": subnet["resolution"]})

    def choice_macs(self, subnet: Subnet, size: tuple[int, int]) -> list[int]:
        """The MACs of one image (H, W) in the blocks of each stage of a network."""
        rows, columns = seen_size(self.padded_size(*size), subnet["resolution"], self.minimum_size, self.stride)
        macs = [0] * STAGES
        for stage, level, visible, channels, kernel, inner in every_block(self.size, subnet):
            pixels = rows // STRIDES[level] * (columns // STRIDES[level])
            macs[stage] += pixels * (kernel**2 * visible * inner[-1] + 9 * sum(inner) * channels)
        return macs

    def step_choice_macs(self, subnet: Subnet, size: tuple[int, int], images: int) -> tuple[int, int]:
        """Those of a training step, forward and backward, and once those of making smaller kernels of larger ones."""
        macs = images * sum(self.choice_macs(subnet, size))
        for _, _, visible, _, kernel, inner in every_block(self.size, subnet):
            macs += sum(smaller**4 for smaller in KERNELS[:-1] if smaller >= kernel) * visible * inner[-1]
        return macs, 2 * macs

    def extract(self, subnet: Subnet) -> MultiStage:
        """A network of the space on its own, with copies of the weights, on the same device and in the same mode.

        Raises ValueError for a network of another space.
        """
        check_belongs(subnet, self.space)
        example = next(self.parameters())
        with torch.device("meta"):  # weights that are copied need not be drawn, which would move the random numbers on
            network = MultiStage(self.num_classes, self.size, subnet.as_record())
        network.to_empty(device=example.device).to(example.dtype).train(self.training)
        with activated(self, subnet):
            copy_chosen(self, network)
        return network

    @torch.no_grad()
    def sort_channels(
        self,
        kind: str = "width",
        optimizers: Sequence[torch.optim.Optimizer] = (),
        followers: Sequence["MultiStageSupernet"] = (),
    ) -> None:
        """Put the inner channels of every block in order of importance, so that narrower networks keep the best ones.

        Importance is the sum of absolute weights with which all stages read a channel, as in Once-for-All before widths
        are opened. The largest network stays the function it is; smaller ones change. What `optimizers` hold of the
        weights follows, and so do `followers`, such as an average of the weights.
        """
        for level in range(len(STRIDES)):
            for position in range(len(self.stages[0].levels[level].blocks)):
                for number in range(STAGES):
                    self._sort(level, position, number, optimizers, followers)

    def _sort(
        self,
        level: int,
        position: int,
        number: int,
        optimizers: Sequence[torch.optim.Optimizer],
        followers: Sequence["MultiStageSupernet"],
    ) -> None:
        blocks = [stage.levels[level].blocks[position] for stage in self.stages]
        inner = blocks[number].inner
        start = sum(block.inner for block in blocks[:number])
        readers: list[Any] = [block.second[0] for block in blocks[number:]]
        importance = torch.cat([reader.weight[:, start : start + inner] for reader in readers]).abs().sum(dim=(0, 2, 3))
        order = importance.argsort(descending=True, stable=True)
        for model in (self, *followers):
            held = optimizers if model is self else ()
            of_stages = [stage.levels[level].blocks[position] for stage in model.stages]
            for name, tensor in of_stages[number].first.state_dict(keep_vars=True).items():
                if tensor.ndim and ".changes." not in name:  # matrices of kernels are shared by all channels
                    reorder(tensor, 0, order, optimizers=held)
            for block in of_stages[number:]:
                reader: Any = block.second[0]
                reorder(reader.weight, 1, order, start, held)


class Stage(nn.Module):
    """All layers of one slice of the width: stem and what earlier stages made -> what it sees, and what is made by now.

    `shapes` are those of the stages up to this one. What is made is kept by the name of the layer that reads it.
    """

    levels: Sequence["Level"]

    def __init__(
        self, widths: Widths, shapes: Sequence[Sequence[LevelShape]], num_classes: int, *, elastic: bool
    ) -> None:
        super().__init__()
        number = len(shapes)
        given = (widths.stem[-1], *(number * channels for channels in widths.levels))
        self.levels = nn.ModuleList(  # type: ignore[assignment]
            Level(given[level], channels, [stage[level] for stage in shapes], elastic=elastic)
            for level, channels in enumerate(widths.levels)
        )
        self.head = Head(given[1:], widths.head, num_classes, elastic)

    def choose(self, shapes: Sequence[Sequence[LevelShape]]) -> None:
        """Which size of an elastic stage runs."""
        for number, level in enumerate(self.levels):
            level.choose([stage[number] for stage in shapes])

    def forward(
        self, stem: Tensor, earlier: Mapping[str, Tensor], read: Sequence[int]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What is visible at strides 8, 16 and 32; `read` is how many blocks later stages have there, 0 without any."""
        made: dict[str, Tensor] = {}

        def kept(name: str, visible: Tensor) -> Tensor:
            if any(read):  # behind the last stage nobody reads, and nothing should wait in memory
                made[name] = visible
            return visible

        visible, seen = stem, []
        for number, level in enumerate(self.levels):
            own = level.down(visible)
            for position in range(max(level.depth, read[number])):
                name = f"level{number}.block{position}"
                visible = kept(name, beside(earlier.get(name), own))
                inner = earlier.get(f"{name}.inner")
                if position < level.depth:
                    block = level.blocks[position]
                    inner = beside(inner, block.first(visible))
                    own = block.relu(own + block.second(inner))
                if inner is not None:
                    kept(f"{name}.inner", inner)
            visible = kept(f"level{number}", beside(earlier.get(f"level{number}"), own))
            seen.append(visible)
        return seen, made


class Level(nn.Module):
    """What a stage does at one stride: down to it, then blocks, which the stage calls one by one.

    `shapes` are those of the stages up to this one.
    """

    blocks: Sequence["Block"]

    def __init__(self, channels_in: int, channels: int, shapes: Sequence[LevelShape], *, elastic: bool) -> None:
        super().__init__()
        self.depth = shapes[-1].depth
        self.down = fixed(channels_in, channels, elastic, stride=2)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            Block(len(shapes) * channels, channels, shapes[-1].kernel, inner_widths(shapes, position), elastic=elastic)
            for position in range(self.depth)
        )

    def choose(self, shapes: Sequence[LevelShape]) -> None:
        """Which size of an elastic level runs."""
        self.depth = shapes[-1].depth
        for position, block in enumerate(self.blocks[: self.depth]):
            block.choose(shapes[-1].kernel, inner_widths(shapes, position))


def seen_size(size: tuple[int, int], resolution: Value, minimum: int, stride: int) -> tuple[int, int]:
    """A size (H, W) times the resolution, to the nearest multiple of the stride, at least the minimum.

    >>> seen_size((160, 192), 0.5, 64, 32)
    (96, 96)
    """
    rows, columns = (max(minimum, stride * int(side * resolution / stride + 0.5)) for side in size)
    return rows, columns


def inner_widths(shapes: Sequence[LevelShape], position: int) -> list[int]:
    """The inner channels of each stage's block; a stage without such a block has none.

    >>> inner_widths([LevelShape(1, 3, 16), LevelShape(2, 3, 24)], position=1)
    [0, 24]
    """
    return [shape.inner if position < shape.depth else 0 for shape in shapes]


class Block(nn.Module):
    """The two convolutions of a residual block of one stage, from all that is visible to its own channels."""

    def __init__(self, visible: int, channels: int, kernel: int, inner: Sequence[int], *, elastic: bool) -> None:
        super().__init__()
        self.inner = inner[-1]
        self.relu = nn.ReLU()
        first: nn.Module = plain(visible, self.inner, kernel)
        second: nn.Module = plain(sum(inner), channels, 3)
        if elastic:
            first, second = ElasticConv2d((visible,), self.inner, KERNELS), ElasticConv2d(inner, channels)
        self.first = nn.Sequential(first, norm_of(self.inner, elastic), nn.ReLU(inplace=True))
        self.second = nn.Sequential(second, norm_of(channels, elastic))

    def choose(self, kernel: int, inner: Sequence[int]) -> None:
        """Which size of an elastic block runs."""
        first, norm, second = self.first[0], self.first[1], self.second[0]
        assert isinstance(first, ElasticConv2d)
        assert isinstance(second, ElasticConv2d)
        assert isinstance(norm, ElasticBatchNorm2d)
        first.choose(channels=inner[-1], kernel=kernel)
        norm.choose(inner[-1])
        second.choose(channels_in=inner)


class Head(nn.Module):
    """Logits (N, C, H/8, W/8) of what a stage sees at strides 8, 16 and 32."""

    def __init__(self, visible: Sequence[int], channels: int, num_classes: int, elastic: bool) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(given, channels, 1, bias=False) for given in visible)
        self.norm = nn.Sequential(norm_of(channels, elastic), nn.ReLU(inplace=True))
        self.smooth = fixed(channels, channels, elastic)
        self.logits = nn.Conv2d(channels, num_classes, 1)

    def forward(self, seen: Sequence[Tensor]) -> Tensor:
        """The logits of features, finest first; a 1x1 before the upsampling is the same function for less."""
        total: Tensor | None = None
        for reduce, features in zip(reversed(list(self.reduce)), reversed(seen), strict=True):
            reduced = reduce(features)
            total = reduced if total is None else reduced + _doubled(total)
        assert total is not None
        return self.logits(self.smooth(self.norm(total)))


def beside(earlier: Tensor | None, own: Tensor) -> Tensor:
    """What earlier stages made, and behind it what this one did."""
    return own if earlier is None else torch.cat([earlier, own], dim=1)


def fixed(channels_in: int, channels: int, elastic: bool, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with BatchNorm and ReLU that has one size; its statistics depend on the network that runs."""
    return nn.Sequential(plain(channels_in, channels, 3, stride), norm_of(channels, elastic), nn.ReLU(inplace=True))


def plain(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that a norm follows."""
    return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)


def norm_of(channels: int, elastic: bool) -> nn.BatchNorm2d:
    """The BatchNorm of a network of its own, or of a supernet."""
    return ElasticBatchNorm2d(channels) if elastic else nn.BatchNorm2d(channels)


def _doubled(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is None:  # a norm and a ReLU follow
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
