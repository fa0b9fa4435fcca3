"""ViT-ResNAS for segmentation: a pyramid of transformer blocks in many sizes, trained together, searched afterwards.

From the published code (Searching for Efficient Multi-Stage Vision Transformers, arXiv 2109.00642, for
classification), written anew from its description:

- tokens by convolutions: three 3x3 with BatchNorm and ReLU, the first with stride 2, the other two in a residual,
  24 channels; then a projection of whole patches, and a learned table of positions;
- three stages with twice the channels each. Between them residual spatial reduction: LayerNorm, a 3x3 convolution with
  stride 2 and a new table of positions, added to the mean over 2x2 tokens as they were, zeros in the channels that are
  new. `residual_reduction=False` leaves that mean out, for the ablation;
- blocks with LayerNorm before attention and before the MLP, drop path that grows linearly with depth (0.2, small 0.3);
- what is elastic: the embedding's channels of each stage, heads and hidden channels of each block, and whether a
  droppable block is there. Where one is left out, so are the droppable ones after it in the same run;
- several subnets in one forward and backward pass by masks for every image (`dance_seg.supernet.prefix`); they are
  drawn whole, where the published code puts the groups' widths into another order in every layer;
- hidden channels and heads in order of importance before fewer of them are opened, here once and there every epoch.

Ours is what makes masks of any size of it, and some freedom:

- no class token. Strides 8, 16 and 32, or 4, 8 and 16; the patch of the projection is half the first. Images are padded
  to a multiple of `stride`, tables of positions resized bicubically to any grid;
- attention among all tokens at stride 8 would cost their number squared, so at strides below 16 tokens see keys and
  values averaged to stride 32 (`attention="reduced"`), or their window of 8x8 tokens ("window"; "global" is as
  published). This is a deviation;
- a segmentation head of MLPs alone, as SegFormer's: each stage normalised and brought to the same channels, the sum at
  the first stage's stride (a concatenation and a linear layer are the same), one hidden layer, logits;
- LayerNorm in the head too: BatchNorm is in the stem alone, whose input does not depend on the subnet, so that its
  statistics are those of every subnet as they are;
- head dimensions are elastic as well, one choice for each stage; embeddings of the stages are chosen apart, the
  smallest of one no narrower than the largest before it. Sizes are smaller, since masks have more tokens than classes;
  `tiny` has four blocks to a stage whose last two are one droppable run, `small` six, every second droppable, as
  published. A subnet that lacks a block is written with the largest sizes for it, so that it is in any space whose
  widths are opened from the largest down.

N images; features are (N, h, w, C), channels last.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.evaluator import full_size
from dance_seg.models.smp import pad_to
from dance_seg.normalise import padded_size
from dance_seg.sample import CoarseLogits
from dance_seg.supernet.elastic import reorder
from dance_seg.supernet.prefix import (
    ChannelDrop,
    Masks,
    PrefixConv2d,
    PrefixDropPath,
    PrefixLinear,
    PrefixNorm,
    make_plain,
    place_masks,
    prefix_mask,
    remove_masks,
)
from dance_seg.supernet.space import SearchSpace, Subnet, Value, named_subnet

STAGES = 3
REDUCED_STRIDE = 32  # to which keys and values are averaged
GLOBAL_STRIDE = 16  # from which on every token sees every other
WINDOW = 8  # tokens
GRIDS = (16, 8, 4)  # of the tables of positions, the published ones

AttentionKind = Literal["reduced", "window", "global"]


class Widths(NamedTuple):
    """How large a supernet is; values are in ascending order, one tuple for each stage where they are nested."""

    stem: int
    embed: tuple[int, ...]  # channels of the first stage; the next have two and four times as many
    head_dim: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    mlp: tuple[float, ...]  # hidden channels over the largest embedding
    blocks: int  # in each stage
    droppable: tuple[int, ...]  # of those, from 1
    head: int  # channels of the segmentation head
    drop_path: float


SIZES = {
    "tiny": Widths(
        stem=24,
        embed=(40, 48, 56, 64),
        head_dim=((8, 16), (16, 32), (16, 32)),
        heads=((1, 2, 3, 4), (1, 2, 3, 4), (2, 4, 6, 8)),
        mlp=(1, 2, 3, 4),
        blocks=4,
        droppable=(3, 4),
        head=64,
        drop_path=0.2,
    ),
    "small": Widths(
        stem=24,
        embed=(80, 96, 112, 128),
        head_dim=((24, 32), (32, 48), (48, 64)),
        heads=((1, 2, 3, 4), (2, 3, 4, 5), (2, 4, 6, 8)),
        mlp=(1, 1.5, 2, 2.5, 3, 3.5, 4),
        blocks=6,
        droppable=(2, 4, 6),
        head=128,
        drop_path=0.3,
    ),
}


class BlockSizes(NamedTuple):
    """The sizes of one block in one subnet."""

    channels: int
    heads: int
    head_dim: int
    mlp: int
    exists: bool


class VitResNas(nn.Module):
    """A supernet: images (N, 3, H, W), normalised -> logits (N, C, H, W), any H and W. Sizes are tiny and small.

    `stride` is that of the first stage's tokens, 8 or 4. `attention` says what tokens at strides below 16 see.
    `drop_path` is that of the last block. It runs the largest subnet until `activate` chooses another, or, while
    training, `set_masks` several. Raises ValueError for other values.

    >>> import torch
    >>> model = VitResNas(num_classes=5).eval()
    >>> tuple(model(torch.zeros(1, 3, 45, 67)).shape), model.space.largest["stage1.block3.mlp"]
    ((1, 5, 45, 67), 256)
    >>> small = model.extract(model.space.smallest)
    >>> sum(weight.numel() for weight in small.parameters()) < sum(weight.numel() for weight in model.parameters()) / 4
    True
    """

    space: SearchSpace
    network: "ResNasNetwork"
    active: Subnet  # the one it runs as
    sorted_kinds = ("mlp", "heads")  # of choices, whose channels can be put in order before they open
    masked: tuple[Subnet, ...] = ()  # those that share a pass, one for each group of images; none usually

    def __init__(
        self,
        num_classes: int,
        size: Literal["tiny", "small"] = "tiny",
        *,
        stride: Literal[4, 8] = 8,
        attention: AttentionKind = "reduced",
        residual_reduction: bool = True,
        drop_path: float | None = None,
    ) -> None:
        super().__init__()
        if size not in tuple(SIZES):
            raise ValueError(f"model.args.size is {size!r}; choose one of {', '.join(SIZES)}")
        if type(stride) is not int or stride not in (4, 8):
            raise ValueError(
                f"model.args.stride is {stride!r}, that of the first stage's tokens; choose 8, or 4 for finer"
            )
        if attention not in get_args(AttentionKind):
            raise ValueError(
                f"model.args.attention is {attention!r}; choose one of {', '.join(get_args(AttentionKind))}"
            )
        if not isinstance(residual_reduction, bool):
            raise ValueError(
                f"model.args.residual_reduction is {residual_reduction!r}; choose true, or false for the ablation"
            )
        widths = SIZES[size]
        rate = widths.drop_path if drop_path is None else drop_path
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ValueError(f"model.args.drop_path is {drop_path!r}; choose a share from 0 to below 1, such as 0.2")
        self.num_classes, self.size = num_classes, size
        self.space = search_space(widths)
        self.network = ResNasNetwork(widths, num_classes, stride, attention, residual_reduction, rate)
        self.active = self.space.largest

    @property
    def measured_whole(self) -> tuple[type[nn.Module], ...]:
        """What a latency table measures as one part: attention, whose products are no modules."""
        return (Attention,)

    @property
    def stride(self) -> int:
        """What height and width are padded to a multiple of."""
        return self.network.stride

    @property
    def minimum_size(self) -> int:
        """The smallest height and width that the network runs at."""
        return self.network.minimum_size

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C, H, W) of images (N, 3, H, W).

        Raises ValueError for a batch that does not divide into the groups of the masks.
        """
        return full_size(self.coarse_logits(images), images.shape[-2:])

    def coarse_logits(self, images: Tensor) -> CoarseLogits:
        """Logits at the first stage's stride, so that upsampling and argmax can be one pass over the image."""
        if self.masked and len(images) % len(self.masked):
            raise ValueError(
                f"{len(self.masked)} subnets are to share a batch of {len(images)} images evenly; set "
                f"data.args.batch_size (per rank) to a multiple of {len(self.masked)}, and drop a smaller last batch"
            )
        return self.network.coarse_logits(images)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) at which the network runs on an image of height x width."""
        return self.network.padded_size(height, width)

    def activate(self, subnet: Subnet | None) -> None:
        """Run as this subnet alone, at its MACs; None is the largest. Takes masks away.

        Raises ValueError for a network of another space.
        """
        self.active = self.space.largest if subnet is None else self.space.subnet(subnet.as_record())
        self.masked = ()
        remove_masks(self)
        self.network.keep(sizes_of(self.active))

    def set_masks(self, subnets: Sequence[Subnet]) -> None:
        """Run at full width with these subnets, one for each group of images, in order; without any, take masks away.

        The largest has to be among them, so that every weight learns at every step; all get a gradient in any case.
        Raises ValueError when it is not, and for networks of another space.
        """
        wanted = tuple(self.space.subnet(subnet.as_record()) for subnet in subnets)
        if not wanted:
            self.activate(self.active)
            return
        if self.space.largest not in wanted:
            raise ValueError("the largest subnet has to be one of those that share a step; add space.largest to them")
        self.activate(None)
        self.masked = wanted
        masks = self.network.masks([sizes_of(subnet) for subnet in wanted])
        place_masks(masks, next(self.parameters()).device)

    @torch.no_grad()
    def sort_channels(
        self,
        kind: str,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        followers: Sequence["VitResNas"] = (),
    ) -> None:
        """Put hidden channels (`mlp`) or `heads` of every block in order of importance, which narrower networks keep.

        Importance is the sum of absolute weights with which a channel or head is read, as published. The largest
        network stays the function it is; smaller ones change. What `optimizers` hold of the weights follows, and so do
        `followers`, such as an average of the weights.
        """
        of_models = [list(model.network.every_block()) for model in (self, *followers)]
        for blocks in zip(*of_models, strict=True):
            own: Block = blocks[0][2]
            order = own.mlp.order() if kind == "mlp" else own.attention.order()
            for model, (_, _, block) in enumerate(blocks):
                part = block.mlp if kind == "mlp" else block.attention
                part.reorder(order, () if model else optimizers)

    def like_largest(self, subnet: Subnet) -> Subnet:
        """The largest network: nothing that is chosen changes anything but channels and blocks."""
        return self.space.largest

    def choice_macs(self, subnet: Subnet, size: tuple[int, int]) -> list[int]:
        """The MACs of one image (H, W) in all that has a network's channels."""
        sizes = sizes_of(subnet)
        return [self.network.choice_macs(sizes, size) + self.network.table_macs(sizes, size)]

    def step_choice_macs(self, subnet: Subnet, size: tuple[int, int], images: int) -> tuple[int, int]:
        """Those of a training step, forward and backward; tables of positions are resized once for all images."""
        sizes = sizes_of(subnet)
        macs, tables = images * self.network.choice_macs(sizes, size), self.network.table_macs(sizes, size)
        return macs + tables, 2 * macs + tables

    def extract(self, subnet: Subnet | None = None) -> "ResNasNetwork":
        """A network of this subnet's size, with its own copy of the weights and plain layers; None is the active one.

        This model stays as it is. Raises ValueError for a network of another space.
        """
        active, masks = self.active, self.masked
        self.activate(subnet or active)
        try:
            with torch.random.fork_rng(devices=[]):  # new layers draw values, which training must not notice
                return self.network.as_plain()
        finally:
            self.activate(active)
            if masks:
                self.set_masks(masks)


def vit_resnas(
    num_classes: int,
    size: Literal["tiny", "small"] = "tiny",
    subnet: Mapping[str, Any] | None = None,
    *,
    stride: Literal[4, 8] = 8,
    attention: AttentionKind = "reduced",
    residual_reduction: bool = True,
    drop_path: float | None = None,
) -> "ResNasNetwork":
    """One network of the space, of plain layers; `subnet` maps every choice to a value, by default it is the largest.

    Everything else is as of the supernet. Raises ValueError for other choices and values.

    >>> sum(weight.numel() for weight in vit_resnas(5).parameters()) > 4_000_000
    True
    """
    supernet = VitResNas(
        num_classes,
        size,
        stride=stride,
        attention=attention,
        residual_reduction=residual_reduction,
        drop_path=drop_path,
    )
    return supernet.extract(named_subnet(supernet.space, subnet))


# The space --------------------------------------------------------------------------------------------------------


def search_space(widths: Widths) -> SearchSpace:
    """All subnets of a supernet: `stageS.embed`, `stageS.head_dim`, `stageS.blockB.heads`, `.mlp`, `.exists` (0 or 1).

    >>> space = search_space(SIZES["tiny"])
    >>> without = space.subnet({**space.largest.as_record(), "stage2.block3.exists": 0})
    >>> without["stage2.block4.exists"], without["stage3.block3.exists"]  # one run with block 3; another stage
    (0, 1)
    """
    values: dict[str, tuple[Value, ...]] = {}
    for stage in range(1, STAGES + 1):
        embed = tuple(channels << (stage - 1) for channels in widths.embed)
        values[f"stage{stage}.embed"] = embed
        values[f"stage{stage}.head_dim"] = widths.head_dim[stage - 1]
        for block in range(1, widths.blocks + 1):
            name = f"stage{stage}.block{block}"
            values[f"{name}.heads"] = widths.heads[stage - 1]
            values[f"{name}.mlp"] = tuple(round(embed[-1] * ratio) for ratio in widths.mlp)
            values[f"{name}.exists"] = (0, 1) if block in widths.droppable else (1,)
    largest = {name: choice[-1] for name, choice in values.items()}
    return SearchSpace(values, partial(without_gaps, largest=largest, blocks=widths.blocks, droppable=widths.droppable))


def without_gaps(
    chosen: Mapping[str, Value], largest: Mapping[str, Value], blocks: int, droppable: Sequence[int]
) -> Mapping[str, Value]:
    """The network as it is built: after a block that is left out, the droppable ones that follow at once are too.

    Blocks that are left out have the largest sizes, which say nothing.
    """
    normal = dict(chosen)
    for stage in range(1, STAGES + 1):
        left_out = False
        for block in range(1, blocks + 1):
            name = f"stage{stage}.block{block}"
            left_out = block in droppable and (left_out or not chosen[f"{name}.exists"])
            if left_out:
                normal.update({f"{name}.{size}": largest[f"{name}.{size}"] for size in ("heads", "mlp")})
                normal[f"{name}.exists"] = 0
    return normal


Sizes = list[list[BlockSizes]]  # of each block of each stage


def sizes_of(subnet: Subnet) -> Sizes:
    """The sizes of every block of a subnet, those that are left out too."""
    record = subnet.as_record()
    sizes: Sizes = []
    for stage in range(1, STAGES + 1):
        channels, head_dim = int(record[f"stage{stage}.embed"]), int(record[f"stage{stage}.head_dim"])
        blocks: list[BlockSizes] = []
        while f"stage{stage}.block{len(blocks) + 1}.heads" in record:
            name = f"stage{stage}.block{len(blocks) + 1}"
            heads, mlp, exists = (int(record[f"{name}.{size}"]) for size in ("heads", "mlp", "exists"))
            blocks.append(BlockSizes(channels, heads, head_dim, mlp, bool(exists)))
        sizes.append(blocks)
    return sizes


# The network ------------------------------------------------------------------------------------------------------


class ResNasNetwork(nn.Module):
    """The network itself, at the sizes it keeps; once extracted, a plain network of one size. Used as VitResNas is."""

    reductions: Sequence["Reduction"]
    stages: Sequence[list["Block"]]

    def __init__(
        self,
        widths: Widths,
        num_classes: int,
        stride: int,
        attention: AttentionKind,
        residual_reduction: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        channels = [widths.embed[-1] << stage for stage in range(STAGES)]
        strides = [stride << stage for stage in range(STAGES)]
        windows = attention == "window"
        self.num_classes = num_classes
        self.stride = max(WINDOW * max(s for s in strides if s < GLOBAL_STRIDE) if windows else 0, REDUCED_STRIDE)
        self.minimum_size = self.stride
        self.drop_path = drop_path
        self.embedding = Embedding(widths.stem, channels[0], patch=stride // 2, grid=GRIDS[0])
        self.reductions = nn.ModuleList(  # type: ignore[assignment]
            Reduction(given, made, grid, residual_reduction)
            for (given, made), grid in zip(pairwise(channels), GRIDS[1:], strict=True)
        )
        self.stages = nn.ModuleList(  # type: ignore[assignment]
            nn.ModuleList(
                Block(
                    BlockSizes(
                        channels[stage],
                        widths.heads[stage][-1],
                        widths.head_dim[stage][-1],
                        round(channels[stage] * widths.mlp[-1]),
                        True,
                    ),
                    attention if strides[stage] < GLOBAL_STRIDE else "global",
                    REDUCED_STRIDE // strides[stage],
                )
                for _ in range(widths.blocks)
            )
            for stage in range(STAGES)
        )
        self.head = MlpHead(channels, widths.head, num_classes)
        self.apply(_initialise)
        self.spread_drop_path()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C, H, W) of images (N, 3, H, W)."""
        return full_size(self.coarse_logits(images), images.shape[-2:])

    def coarse_logits(self, images: Tensor) -> CoarseLogits:
        """Logits at the first stage's stride."""
        padded = pad_to(images, self.padded_size(*images.shape[-2:]))
        features = self.embedding(padded)
        levels = []
        for stage, blocks in enumerate(self.stages):
            features = self.reductions[stage - 1](features) if stage else features
            for block in blocks:
                features = block(features) if block.exists else features
            levels.append(features)
        return CoarseLogits(self.head(levels), (padded.shape[-2], padded.shape[-1]), align_corners=False)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) at which the network runs on an image of height x width."""
        return padded_size((height, width), self.stride)

    def choice_macs(self, sizes: Sizes, size: tuple[int, int]) -> int:
        """The MACs of one image (H, W) in all layers whose channels are chosen, at the sizes given."""
        channels = [blocks[0].channels for blocks in sizes]
        tokens = [rows * columns for rows, columns in self.grids(size)]
        first = self.embedding.project
        macs = tokens[0] * first.kernel_size[0] ** 2 * first.in_channels * channels[0]
        for stage, (given, made) in enumerate(pairwise(channels), start=1):
            macs += tokens[stage] * 9 * given * made
        for stage, place, block in self.every_block():
            macs += block.choice_macs(sizes[stage][place], tokens[stage])
        return macs + sum(number * given for number, given in zip(tokens, channels, strict=True)) * self.head.width

    def table_macs(self, sizes: Sizes, size: tuple[int, int]) -> int:
        """The MACs of resizing the tables of positions bicubically for images (H, W), where they are resized."""
        tables = [self.embedding.position, *(reduction.position for reduction in self.reductions)]
        return sum(
            16 * rows * columns * blocks[0].channels
            for table, (rows, columns), blocks in zip(tables, self.grids(size), sizes, strict=True)
            if tuple(table.table.shape[-2:]) != (rows, columns)
        )

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of the tokens of each stage, for images (H, W)."""
        rows, columns = self.padded_size(*size)
        stride = 2 * self.embedding.project.kernel_size[0]
        return [(rows // (stride << stage), columns // (stride << stage)) for stage in range(STAGES)]

    def every_block(self) -> Iterator[tuple[int, int, "Block"]]:
        """Stage and place of every block, from 0, and the block."""
        for stage, blocks in enumerate(self.stages):
            for place, block in enumerate(blocks):
                yield stage, place, block

    def keep(self, sizes: Sizes) -> None:
        """Use this corner of the weights."""
        channels = [blocks[0].channels for blocks in sizes]
        self.embedding.project.keep(self.embedding.project.in_channels, channels[0])
        self.embedding.position.keep(channels[0])
        for reduction, (given, made) in zip(self.reductions, pairwise(channels), strict=True):
            reduction.norm.keep(given)
            reduction.conv.keep(given, made)
            reduction.position.keep(made)
        for stage, place, block in self.every_block():
            block.keep(sizes[stage][place])
        self.head.keep(channels)

    def masks(self, groups: Sequence[Sizes]) -> Masks:
        """The mask (G, C) of every layer that has one, with the sizes that each group keeps."""
        channels = [[[sizes[stage][0].channels] for sizes in groups] for stage in range(STAGES)]
        masks: Masks = [(self.embedding.drop, prefix_mask(channels[0], self.embedding.drop.sizes))]
        for stage, reduction in enumerate(self.reductions):
            masks.append((reduction.norm, prefix_mask(channels[stage], reduction.norm.sizes)))
            masks.append((reduction.drop, prefix_mask(channels[stage + 1], reduction.drop.sizes)))
        for stage, place, block in self.every_block():
            masks.extend(block.masks([sizes[stage][place] for sizes in groups]))
        masks.extend(
            (norm, prefix_mask(kept, norm.sizes)) for norm, kept in zip(self.head.norms, channels, strict=True)
        )
        return masks

    def as_plain(self) -> "ResNasNetwork":
        """A copy with plain layers of the sizes that are kept, without the blocks that are left out."""
        network = deepcopy(self)
        for blocks in network.stages:
            for place in reversed(range(len(blocks))):
                if not blocks[place].exists:
                    del blocks[place]
        make_plain(network)
        network.spread_drop_path()
        return network

    def spread_drop_path(self) -> None:
        """Let the rate of drop path grow linearly from 0 at the first block to its full value at the last."""
        blocks = [block for _, _, block in self.every_block()]
        for number, block in enumerate(blocks):
            for layer in (block.add_attention, block.add_mlp):
                layer.rate = self.drop_path * number / max(1, len(blocks) - 1)


class Embedding(nn.Module):
    """Images (N, 3, H, W) -> tokens (N, h, w, C) by three convolutions and a projection of whole patches."""

    def __init__(self, stem: int, channels: int, patch: int, grid: int) -> None:
        super().__init__()
        self.first = conv_norm(3, stem, stride=2)
        self.residual = nn.Sequential(conv_norm(stem, stem), conv_norm(stem, stem))
        self.project = PrefixConv2d(stem, channels, patch, patch)
        self.position = PositionTable(channels, grid)
        self.drop = ChannelDrop(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens at twice the patch's stride."""
        features = self.first(images)
        features = features + self.residual(features)
        return self.drop(self.position(channels_behind(self.project(features))))


class Reduction(nn.Module):
    """Residual spatial reduction: tokens (N, h, w, C) -> (N, h/2, w/2, C'), C' at least C; h and w even."""

    def __init__(self, channels_in: int, channels: int, grid: int, residual: bool = True) -> None:
        super().__init__()
        self.norm = PrefixNorm(channels_in)
        self.conv = PrefixConv2d(channels_in, channels, 3, 2, padding=1)
        self.position = PositionTable(channels, grid)
        self.drop = ChannelDrop(channels)
        self.residual = residual

    def forward(self, tokens: Tensor) -> Tensor:
        """The convolution of the normalised tokens, beside the mean of four as they were."""
        reduced = channels_behind(self.conv(self.norm(tokens).permute(0, 3, 1, 2)))
        reduced = self.drop(self.position(reduced))
        if not self.residual:
            return reduced
        pooled = F.avg_pool2d(tokens.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return reduced + F.pad(pooled, (0, reduced.shape[-1] - pooled.shape[-1]))


class PositionTable(nn.Module):
    """Adds to tokens (N, h, w, C) what was learned for their places, on a grid that is resized to theirs."""

    def __init__(self, channels: int, grid: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(channels, grid, grid))
        self.kept = channels

    def keep(self, channels: int) -> None:
        """Use the first channels."""
        self.kept = channels

    def forward(self, tokens: Tensor) -> Tensor:
        """The tokens at their places."""
        table = self.table[None, : self.kept]
        if table.shape[-2:] != tokens.shape[1:3]:
            table = F.interpolate(table, size=tokens.shape[1:3], mode="bicubic", align_corners=False)
        return tokens + table.permute(0, 2, 3, 1)

    def plain(self) -> "PositionTable":
        """The table of the channels that are kept."""
        layer = PositionTable(self.kept, self.table.shape[-1])
        layer.table = nn.Parameter(self.table[: self.kept].detach().clone())
        return layer


class Block(nn.Module):
    """A transformer block on tokens (N, h, w, C): attention, then an MLP, each normalised before and added."""

    def __init__(self, sizes: BlockSizes, attention: AttentionKind, reduction: int) -> None:
        super().__init__()
        self.exists = sizes.exists
        self.norm = PrefixNorm(sizes.channels)
        self.attention = Attention(sizes, attention, reduction)
        self.add_attention = PrefixDropPath(sizes.channels)
        self.mlp_norm = PrefixNorm(sizes.channels)
        self.mlp = Mlp(sizes)
        self.add_mlp = PrefixDropPath(sizes.channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of the same size."""
        tokens = self.add_attention(tokens, self.attention(self.norm(tokens)))
        return self.add_mlp(tokens, self.mlp(self.mlp_norm(tokens)))

    def keep(self, sizes: BlockSizes) -> None:
        """Use this corner of the weights."""
        self.exists = sizes.exists
        self.norm.keep(sizes.channels)
        self.mlp_norm.keep(sizes.channels)
        self.attention.keep(sizes)
        self.mlp.keep(sizes)

    def choice_macs(self, sizes: BlockSizes, tokens: int) -> int:
        """The MACs of so many tokens of one image; none in a block that is not there."""
        if not sizes.exists:
            return 0
        return self.attention.choice_macs(sizes, tokens) + 2 * tokens * sizes.channels * sizes.mlp

    def masks(self, groups: Sequence[BlockSizes]) -> Masks:
        """The mask of every layer; a group without the block adds nothing to its tokens."""
        channels = prefix_mask([[sizes.channels] for sizes in groups], self.norm.sizes)
        exists = torch.tensor([[float(sizes.exists)] for sizes in groups])
        hidden = prefix_mask([[sizes.mlp] for sizes in groups], self.mlp.drop.sizes)
        return [
            (self.norm, channels),
            (self.mlp_norm, channels),
            (self.add_attention, channels * exists),
            (self.add_mlp, channels * exists),
            (self.mlp.drop, hidden),
            *self.attention.masks(groups),
        ]


class Attention(nn.Module):
    """Multi-head self-attention of tokens (N, h, w, C).

    kind: `global` among all of them; `window` within 8x8; `reduced` to the means over `reduction` x `reduction`.
    """

    def __init__(self, sizes: BlockSizes, kind: AttentionKind, reduction: int) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.window = WINDOW if kind == "window" else None
        self.reduction = reduction if kind == "reduced" else 1
        of_heads = sizes.heads, sizes.head_dim
        self.query = PrefixLinear((sizes.channels,), of_heads)
        self.drop_query = ChannelDrop(*of_heads)
        self.key_value = PrefixLinear((sizes.channels,), (2, *of_heads))
        self.drop = ChannelDrop(*of_heads)
        self.project = PrefixLinear(of_heads, (sizes.channels,))

    def forward(self, tokens: Tensor) -> Tensor:
        """What each token takes from those that it sees."""
        size = tokens.shape[1:3]
        seen = averaged(tokens, self.reduction)
        query = to_windows(self.drop_query(self.query(tokens)), self.window)
        key_value = to_windows(self.key_value(seen), self.window)
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, tokens, head dimension)
        key, value = key_value.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        taken = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.project(self.drop(from_windows(taken, self.window, size)))

    def extra_repr(self) -> str:
        """What the weights do not tell, and the time depends on."""
        return f"heads={self.heads}, window={self.window}, reduction={self.reduction}"

    def keep(self, sizes: BlockSizes) -> None:
        """Use this corner of the weights."""
        self.heads = sizes.heads
        of_heads = sizes.heads, sizes.head_dim
        self.query.keep((sizes.channels,), of_heads)
        self.key_value.keep((sizes.channels,), (2, *of_heads))
        self.project.keep(of_heads, (sizes.channels,))

    def order(self) -> Tensor:
        """The heads, the most important first."""
        heads, head_dim = self.drop.sizes
        return self.project.weight.view(-1, heads, head_dim).abs().sum((0, 2)).argsort(descending=True, stable=True)

    def reorder(self, order: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Put the heads into another order."""
        heads, head_dim = self.drop.sizes
        channels = (head_dim * order[:, None] + torch.arange(head_dim, device=order.device)).flatten()
        for tensor in (self.query.weight, self.query.bias):
            reorder(tensor, 0, channels, optimizers=optimizers)
        for tensor in (self.key_value.weight, self.key_value.bias):
            for start in (0, heads * head_dim):
                reorder(tensor, 0, channels, start, optimizers)
        reorder(self.project.weight, 1, channels, optimizers=optimizers)

    def choice_macs(self, sizes: BlockSizes, tokens: int) -> int:
        """The MACs of so many tokens: queries and what comes back of all, keys and values of those seen, products."""
        width, keys = sizes.heads * sizes.head_dim, tokens // self.reduction**2
        seen = keys if self.window is None else self.window**2
        return 2 * tokens * sizes.channels * width + 2 * keys * sizes.channels * width + 2 * tokens * seen * width

    def masks(self, groups: Sequence[BlockSizes]) -> Masks:
        """Masks of the queries and of what attention takes. Keys need none: they meet queries that are zero.

        Attention divides by the root of the largest head dimension; queries of smaller heads make up for that.
        """
        mask = prefix_mask([[sizes.heads, sizes.head_dim] for sizes in groups], self.drop.sizes)
        largest = self.drop.sizes[1]
        scale = torch.tensor([[(largest / sizes.head_dim) ** 0.5] for sizes in groups])
        return [(self.drop_query, mask * scale), (self.drop, mask)]


class Mlp(nn.Module):
    """Each token (N, h, w, C) by itself: a linear layer, GELU, a linear layer."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.expand = PrefixLinear((sizes.channels,), (sizes.mlp,))
        self.drop = ChannelDrop(sizes.mlp)
        self.gelu = nn.GELU()
        self.project = PrefixLinear((sizes.mlp,), (sizes.channels,))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of the same size."""
        return self.project(self.gelu(self.drop(self.expand(tokens))))

    def order(self) -> Tensor:
        """The hidden channels, the most important first."""
        return self.project.weight.abs().sum(0).argsort(descending=True, stable=True)

    def reorder(self, order: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Put the hidden channels into another order."""
        for tensor in (self.expand.weight, self.expand.bias):
            reorder(tensor, 0, order, optimizers=optimizers)
        reorder(self.project.weight, 1, order, optimizers=optimizers)

    def keep(self, sizes: BlockSizes) -> None:
        """Use this corner of the weights."""
        self.expand.keep((sizes.channels,), (sizes.mlp,))
        self.project.keep((sizes.mlp,), (sizes.channels,))


class MlpHead(nn.Module):
    """Logits (N, classes, h, w) at the first stage's size, from the tokens (N, h, w, C) of all stages."""

    norms: Sequence[PrefixNorm]
    linears: Sequence[PrefixLinear]

    def __init__(self, levels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(PrefixNorm(given) for given in levels)  # type: ignore[assignment]
        linears = (PrefixLinear((given,), (channels,)) for given in levels)
        self.linears = nn.ModuleList(linears)  # type: ignore[assignment]
        self.hidden = nn.Sequential(nn.LayerNorm(channels), nn.GELU(), nn.Linear(channels, channels), nn.GELU())
        self.logits = nn.Linear(channels, num_classes)
        self.width = channels

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits of what the stages made, finest first."""
        size = levels[0].shape[1:3]
        brought = [
            resized(linear(norm(level)), size)
            for norm, linear, level in zip(self.norms, self.linears, levels, strict=True)
        ]
        fused = brought[0]
        for level in brought[1:]:
            fused = fused + level
        return self.logits(self.hidden(fused)).permute(0, 3, 1, 2)

    def keep(self, levels: Sequence[int]) -> None:
        """Take so many channels from each stage."""
        for norm, linear, given in zip(self.norms, self.linears, levels, strict=True):
            norm.keep(given)
            linear.keep((given,), linear.sizes_out)


def channels_behind(features: Tensor) -> Tensor:
    """Features (N, C, h, w) as tokens (N, h, w, C), in memory too: every linear layer after this reads them so."""
    return features.permute(0, 2, 3, 1).contiguous()


def averaged(tokens: Tensor, factor: int) -> Tensor:
    """The means of tokens (N, h, w, C) over factor x factor of them."""
    if factor == 1:
        return tokens
    return tokens.unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).mean((2, 4))


def to_windows(tokens: Tensor, side: int | None) -> Tensor:
    """Tokens (N, h, w, C) as (N, h w, C), or by windows (N windows, side side, C), the first image's first."""
    if side is None:
        return tokens.flatten(1, 2)
    split = tokens.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (N, rows, side, columns, side, C)
    return split.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(tokens: Tensor, side: int | None, size: Sequence[int]) -> Tensor:
    """The reverse: tokens (N, h, w, C) of the size (h, w)."""
    if side is None:
        return tokens.unflatten(1, (size[0], size[1]))
    split = tokens.unflatten(1, (side, side)).unflatten(0, (-1, size[0] // side, size[1] // side))
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def resized(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens (N, h, w, C) brought to the size (h, w) bilinearly."""
    if tokens.shape[1:3] == tuple(size):
        return tokens
    features = F.interpolate(tokens.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", align_corners=False)
    return features.permute(0, 2, 3, 1)


def conv_norm(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with BatchNorm and ReLU."""
    convolution = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is None:  # a norm and a ReLU follow
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PositionTable):
        nn.init.trunc_normal_(module.table, std=0.02)
