"""Stopping tile by tile: a simple part of an image leaves early although another part is hard.

The image is cut into tiles, each seen with a margin of its surroundings, and a tile is to the network what an image
was: tiles that leave are taken out of the batch, and what lies behind never runs for them (the routing of SegBlocks,
arXiv 2011.12025, without its repair of the features at the seams; margins are ours). What a tile does not see it does
not know: a whole image has more context, and margins are paid for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dance_seg.early_exit.exits import ExitNetwork
from dance_seg.early_exit.policy import ExitPolicy, decide

MARGIN = 32
"""Pixels around a tile that it sees too."""


class DecidedTiles(NamedTuple):
    """The labels of a batch, and where each tile of each image left."""

    labels: Tensor  # uint8 (N, H, W), on the CPU
    exits: Tensor  # int64 (N, rows, columns), from 0


class Span(NamedTuple):
    """Rows (or columns) of a tile: what of the image it labels, and what it sees."""

    labelled: slice
    seen: slice


@torch.no_grad()
def decide_tiles(
    model: ExitNetwork, images: Tensor, policy: ExitPolicy, tile: tuple[int, int], margin: int = MARGIN
) -> DecidedTiles:
    """Class indices of normalised images (N, 3, H, W), each tile by the exit where the policy stops it.

    `tile` (H, W) is what a tile labels; it sees `margin` pixels more on each side, moved into the image at borders, so
    that all tiles have one size and run as one batch. Tiles at the end are moved into the image too. A tile as large as
    the image is `decide`. Raises ValueError for a tile or margin that makes no sense, and as `decide` does.

    >>> [span.labelled for span in spans(100, 40, 8)]
    [slice(0, 40, None), slice(40, 80, None), slice(80, 100, None)]
    """
    if len(tile) != 2 or min(tile) < 1 or margin < 0:
        raise ValueError(
            f"tile is {tuple(tile)} and margin {margin}; give a height and a width in pixels, and 0 or more"
        )
    count, _, height, width = images.shape
    rows, columns = spans(height, tile[0], margin), spans(width, tile[1], margin)
    seen = torch.cat([images[:, :, row.seen, column.seen] for row in rows for column in columns])
    found = decide(model, seen, (seen.shape[-2], seen.shape[-1]), policy)
    of_tiles = found.labels.view(len(rows), len(columns), count, *found.labels.shape[1:])
    labels = torch.empty((count, height, width), dtype=torch.uint8)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            labels[:, row.labelled, column.labelled] = of_tiles[i, j][:, within(row), within(column)]
    exits = found.exits.view(len(rows), len(columns), count).permute(2, 0, 1)
    return DecidedTiles(labels, exits)


def tile_size(size: tuple[int, int], tile: tuple[int, int], margin: int = MARGIN) -> tuple[int, int]:
    """The size (H, W) at which each tile of images of a size is seen.

    >>> tile_size((100, 64), (40, 64), 8)
    (56, 64)
    """
    (row, *_), (column, *_) = (spans(side, part, margin) for side, part in zip(size, tile, strict=True))
    return row.seen.stop - row.seen.start, column.seen.stop - column.seen.start


def spans(length: int, tile: int, margin: int) -> list[Span]:
    """The tiles along one side of an image; all see as many pixels.

    >>> spans(10, 4, 1)[-1]
    Span(labelled=slice(8, 10, None), seen=slice(4, 10, None))
    """
    if tile >= length:
        return [Span(slice(0, length), slice(0, length))]
    size = min(length, tile + 2 * margin)
    found = []
    for start in range(0, length, tile):
        first = min(max(0, start - margin), length - size)
        found.append(Span(slice(start, min(start + tile, length)), slice(first, first + size)))
    return found


def within(span: Span) -> slice:
    """Where what a tile labels lies in what it sees.

    >>> within(Span(slice(8, 10), slice(4, 10)))
    slice(4, 6, None)
    """
    return slice(span.labelled.start - span.seen.start, span.labelled.stop - span.seen.start)
