"""From low-resolution logits to labels at the labels' size, exactly, without full-resolution logits.

Bilinear interpolation mixes the four corners of a cell of the logits' grid with weights that are not negative. So
where one class leads at all four corners it leads everywhere between them, and only cells through which a boundary
runs are interpolated, for the few classes that can win there. Rounding keeps this order too, except that a lead of
a few units in the last place may shrink to a tie: leads below `TIE` are interpolated as well.

"Exactly" means every bit of what torch computes for contiguous logits on this machine. Compilers decide whether a
product and a sum are rounded once or twice, so the arithmetic of this file is checked against torch's kernel for
each pair of lengths on first use; where it does not agree, every pixel is interpolated by torch itself. So are the
few shapes for which torch takes another kernel, with another order of operations.

C classes, h and w rows and columns of the logits, H and W of the labels, n cells.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dance_seg.sample import CoarseLogits

TIE = 2.0**-20
"""A lead below this share of the leading logit may be lost to rounding: four float32 roundings, of two values."""

SMALLEST_OUTPUT = 129
"""Below this sum of rows and columns torch takes another kernel."""

OTHER_KERNEL_CLASSES = 3
"""With this many classes torch takes another kernel when it has a single thread."""

SMALLEST_RATIO = 4
"""Below this many pixels per cell, interpolating every pixel is cheaper."""

LARGEST_BOUNDARY = 0.3
"""Share of boundary cells above which interpolating every pixel is cheaper."""

TILE_PIXELS = 32768
"""Pixels whose running maximum is taken together: small enough to stay in the processor's cache."""

FEW_PIXELS = 1024
"""Below this many pixels NumPy's argmax is through before a running maximum has begun."""

CELLS_AT_ONCE = 4096
"""Boundary cells interpolated together, which bounds the memory."""


class Axis(NamedTuple):
    """How each output row (or column) mixes two source rows: `first` and the next one, by two weights.

    Outputs that mix the same two are cut into pieces of one length, so that pieces can be computed side by side;
    a shorter piece repeats its last output.
    """

    first: np.ndarray  # (outputs,) index of the first source row
    weights: np.ndarray  # (2, outputs) float32: of the first and of the next
    fused: bool  # a product and a sum are rounded once
    piece_first: np.ndarray  # (pieces,) index of the first source row
    piece_outputs: np.ndarray  # (pieces, length) output rows


def resized_argmax(logits_CHW: Tensor, size: tuple[int, int], *, align_corners: bool) -> np.ndarray:
    """The class that leads at each pixel after bilinear interpolation to `size`: uint8 (H, W).

    Equals F.interpolate(logits.float(), size, mode="bilinear", align_corners=...).argmax, the lowest class winning
    ties, for logits that are contiguous; half precision is widened to float32 first. `align_corners` must be what
    the model's own upsampling uses: True for the heads of segmentation-models-pytorch. Raises ValueError for logits
    that are not finite, with their number, and for shapes or sizes that make no sense.

    >>> resized_argmax(torch.tensor([[[1.0, 0.0]], [[0.0, 1.5]]]), (1, 4), align_corners=True).tolist()
    [[0, 0, 1, 1]]
    """
    check_logits(logits_CHW, size)
    logits = logits_CHW.detach().float().contiguous()
    refuse_not_finite(logits)
    if logits.device.type != "cpu":
        resized = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=align_corners)[0]
        return resized.argmax(0).to(torch.uint8).cpu().numpy()
    if tuple(logits.shape[1:]) == tuple(size):
        return argmax(logits.numpy())
    if sum(size) < SMALLEST_OUTPUT or len(logits) == OTHER_KERNEL_CLASSES:
        return argmax(F.interpolate(logits[None], size=size, mode="bilinear", align_corners=align_corners)[0].numpy())
    labels = argmax_by_cells(logits.numpy(), size, align_corners)
    return argmax_of_every_pixel(logits, size, align_corners) if labels is None else labels


def labels_of(coarse: CoarseLogits, image_size: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Class indices uint8 (N, H, W) on the CPU at `size`, of images that were shown at `image_size`.

    Where that is the labels' own size the last interpolation is fused with the argmax, and full logits are never made.
    """
    if tuple(image_size) == size:
        logits, resized_to, align_corners = coarse
    else:
        logits, resized_to, align_corners = full_size(coarse, image_size), size, False
    labels = labels_from_logits(logits, resized_to, align_corners=align_corners)
    return torch.from_numpy(np.stack([label[: size[0], : size[1]] for label in labels]))


def full_size(coarse: CoarseLogits, size: Sequence[int]) -> Tensor:
    """Logits (N, C, H, W) of the images, of size (H, W)."""
    logits, padded_size, align_corners = coarse
    if tuple(logits.shape[-2:]) != tuple(padded_size):
        logits = F.interpolate(logits, size=padded_size, mode="bilinear", align_corners=align_corners)
    return logits[..., : size[0], : size[1]]


def labels_from_logits(
    logits_NCHW: Tensor, sizes: tuple[int, int] | Sequence[tuple[int, int]], *, align_corners: bool
) -> list[np.ndarray]:
    """The labels of a batch, each at its own size (H, W), or all at the one size given: uint8 arrays.

    Raises ValueError as resized_argmax does, and when there is not one size per image.

    >>> [labels.shape for labels in labels_from_logits(torch.zeros(2, 3, 4, 4), (8, 8), align_corners=True)]
    [(8, 8), (8, 8)]
    """
    if logits_NCHW.ndim != 4:
        raise ValueError(f"logits of a batch are (N, C, h, w), got {tuple(logits_NCHW.shape)}")
    each = list(sizes) if np.ndim(sizes) == 2 else [sizes] * len(logits_NCHW)
    if len(each) != len(logits_NCHW):
        raise ValueError(f"there are {len(logits_NCHW)} images and {len(each)} sizes; give one size per image, or one")
    return [
        resized_argmax(logits, (int(size[0]), int(size[1])), align_corners=align_corners)  # type: ignore[index]
        for logits, size in zip(logits_NCHW, each, strict=True)
    ]


def argmax(logits_CHW: np.ndarray) -> np.ndarray:
    """The leading class of each pixel, uint8 (H, W), the lowest class winning ties; logits are finite float32.

    A running maximum over tiles that stay in the cache: torch.argmax over the first dimension strides through
    memory and is several times slower.

    >>> argmax(np.float32([[[1, 2, 3]], [[1, 5, 0]]])).tolist()
    [[0, 1, 0]]
    """
    planes = logits_CHW.reshape(len(logits_CHW), -1)
    if planes.shape[1] < FEW_PIXELS:
        return planes.argmax(0).astype(np.uint8).reshape(logits_CHW.shape[1:])
    labels = np.zeros(planes.shape[1], np.uint8)
    for start in range(0, planes.shape[1], TILE_PIXELS):
        tile = planes[:, start : start + TILE_PIXELS]
        best = tile[0].copy()
        take_over = np.empty(best.shape, bool)
        tile_labels = labels[start : start + TILE_PIXELS]
        for index in range(1, len(tile)):
            lead(tile[index], index, best, tile_labels, take_over)
    return labels.reshape(logits_CHW.shape[1:])


def lead(plane: np.ndarray, index: int, best: np.ndarray, labels: np.ndarray, take_over: np.ndarray) -> None:
    """One step of a running maximum: where the plane is above the best, its index becomes the label."""
    np.greater(plane, best, out=take_over)
    np.maximum(best, plane, out=best)
    # Indices grow from step to step, so the larger of old and new label is the new one wherever there is one.
    np.maximum(labels, take_over.view(np.uint8) * np.uint8(index), out=labels)


def argmax_of_every_pixel(logits_CHW: Tensor, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """resized_argmax by interpolating every pixel, one class at a time to spare memory."""
    labels = np.zeros(size, np.uint8)
    take_over = np.empty(size, bool)
    best: np.ndarray | None = None
    for index, plane in enumerate(logits_CHW):
        resized = F.interpolate(plane[None, None], size=size, mode="bilinear", align_corners=align_corners)[0, 0]
        if best is None:
            best = resized.numpy()
        else:
            lead(resized.numpy(), index, best, labels, take_over)
    return labels


def argmax_by_cells(logits_CHW: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray | None:
    """resized_argmax by interpolating boundary cells only; None where that is not exact or does not pay."""
    num_rows, num_columns = logits_CHW.shape[1:]
    enlarges = size[0] >= num_rows and size[1] >= num_columns
    if not enlarges or size[0] * size[1] < SMALLEST_RATIO * num_rows * num_columns:
        return None
    rows, columns = axis(num_rows, size[0], align_corners), axis(num_columns, size[1], align_corners)
    if rows is None or columns is None:
        return None
    labels, close = leaders(logits_CHW)
    boundary = boundary_cells(labels, close)
    if boundary.mean() > LARGEST_BOUNDARY:
        return None
    resized = np.take(np.take(labels, columns.first, axis=1), rows.first, axis=0)
    fill_boundary(resized, logits_CHW, boundary, rows, columns)
    return resized


def leaders(logits_CHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The leading class (h, w), and a mask (h, w), 255 where another class is so close that rounding could decide."""
    best = logits_CHW.max(axis=0)
    threshold = best - tie(np.abs(best).max())
    labels = np.zeros(best.shape, np.uint8)
    seen, close, leads = (np.zeros(best.shape, np.uint8) for _ in range(3))
    for index, plane in enumerate(logits_CHW):
        cv2.compare(plane, threshold, cv2.CMP_GE, leads)
        close |= seen & leads
        seen |= leads
        np.maximum(labels, leads & np.uint8(index), out=labels)
    return labels, close


def tie(size_of_leader: np.ndarray) -> np.ndarray:
    """The lead that rounding may turn into a tie, for a leading logit of this absolute size.

    The follower's size does not matter: where it is much larger, so is the lead.
    """
    return np.float32(TIE) * size_of_leader + np.finfo(np.float32).tiny


def boundary_cells(labels: np.ndarray, close: np.ndarray) -> np.ndarray:
    """Which cells (h, w), named by their first corner, do not have one clear leader at all four corners.

    The last row's and column's cells have their corners inside the grid only.

    >>> boundary_cells(np.uint8([[0, 0, 1]]), np.zeros((1, 3), np.uint8)).tolist()
    [[False, True, False]]
    """
    square = np.ones((2, 2), np.uint8)
    first_corner = (0, 0)
    differ = cv2.dilate(labels, square, anchor=first_corner) != cv2.erode(labels, square, anchor=first_corner)
    if close.any():
        differ |= cv2.dilate(close, square, anchor=first_corner) != 0
    return differ


def fill_boundary(resized: np.ndarray, logits_CHW: np.ndarray, boundary: np.ndarray, rows: Axis, columns: Axis) -> None:
    """Write the leading class of each pixel of the boundary cells into `resized` (H, W)."""
    num_classes, num_rows, num_columns = logits_CHW.shape
    planes = logits_CHW.reshape(num_classes, -1)
    pieces = np.nonzero(boundary[rows.piece_first][:, columns.piece_first])
    for start in range(0, len(pieces[0]), CELLS_AT_ONCE):
        row_pieces, column_pieces = (piece[start : start + CELLS_AT_ONCE] for piece in pieces)
        top, left = rows.piece_first[row_pieces], columns.piece_first[column_pieces]
        bottom, right = np.minimum(top + 1, num_rows - 1), np.minimum(left + 1, num_columns - 1)
        places = np.stack([y * num_columns + x for y in (top, bottom) for x in (left, right)])  # (4, n)
        corners = planes[:, places]  # (C, 4, n)
        # A class whose best corner is below another's worst corner is below it everywhere in the cell.
        worst = corners.min(axis=1).max(axis=0)  # (n,)
        can_win = corners.max(axis=1) >= worst - tie(np.abs(worst))  # (C, n)
        num_candidates = can_win.sum(axis=0)
        for count in np.unique(num_candidates):
            cells = np.flatnonzero(num_candidates == count)
            classes = np.nonzero(can_win[:, cells].T)[1].reshape(-1, count).T  # (count, cells), lowest class first
            row_outputs = rows.piece_outputs[row_pieces[cells]]  # (cells, R)
            column_outputs = columns.piece_outputs[column_pieces[cells]]  # (cells, S)
            values = interpolate(corners[classes, :, cells], row_outputs, column_outputs, rows, columns)
            winners = argmax_of_candidates(values, classes)
            places_out = row_outputs[:, :, None] * resized.shape[1] + column_outputs[:, None, :]
            resized.reshape(-1)[places_out] = winners


def interpolate(
    corners: np.ndarray, row_outputs: np.ndarray, column_outputs: np.ndarray, rows: Axis, columns: Axis
) -> np.ndarray:
    """Values (count, cells, R, S) between the corners (count, cells, 4), columns first as torch has it."""
    across = columns.weights[:, column_outputs]  # (2, cells, S)
    down = rows.weights[:, row_outputs][..., None]  # (2, cells, R, 1)
    top_left, top_right, bottom_left, bottom_right = np.moveaxis(corners[..., None], 2, 0)
    top = mix(top_left, top_right, across, columns.fused)
    bottom = mix(bottom_left, bottom_right, across, columns.fused)
    return mix(top[..., None, :], bottom[..., None, :], down, rows.fused)


def mix(first: np.ndarray, second: np.ndarray, weights: np.ndarray, fused: bool) -> np.ndarray:
    """first * weights[0] + second * weights[1] in float32, the second product rounded alone if fused.

    float64 holds a product of two float32 numbers exactly, so adding in float64 and rounding once is what a fused
    multiply-add does.
    """
    rounded = second * weights[1]
    if not fused:
        return first * weights[0] + rounded
    return (np.multiply(first, weights[0], dtype=np.float64) + rounded).astype(np.float32)


def argmax_of_candidates(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The class (cells, R, S) with the largest of values (count, cells, R, S), the first winning ties."""
    winners = np.broadcast_to(classes[0][:, None, None], values.shape[1:]).astype(np.uint8)
    best = values[0]
    for value, class_of_cell in zip(values[1:], classes[1:], strict=True):
        np.copyto(winners, class_of_cell[:, None, None].astype(np.uint8), where=value > best)
        best = np.maximum(best, value)
    return winners


@lru_cache(maxsize=1024)
def axis(num_inputs: int, num_outputs: int, align_corners: bool) -> Axis | None:
    """The weights of one direction as torch's kernel has them; None if this file's arithmetic is not torch's."""
    signal = np.random.default_rng(0).standard_normal((3, num_inputs)).astype(np.float32)
    # As wide as to select the kernel for larger outputs; the single column is copied, not mixed.
    given, size = torch.from_numpy(signal)[:, None, :, None], (num_outputs, SMALLEST_OUTPUT)
    reference = F.interpolate(given, size=size, mode="bilinear", align_corners=align_corners)[:, 0, :, 0].numpy()
    for fused in (False, True):
        first, weights = source_of(num_inputs, num_outputs, align_corners, fused)
        following = np.minimum(first + 1, num_inputs - 1)
        if np.array_equal(mix(signal[:, first], signal[:, following], weights, fused), reference):
            return Axis(first, weights, fused, *in_pieces(first, max(1, round(num_outputs / num_inputs))))
    return None


def source_of(num_inputs: int, num_outputs: int, align_corners: bool, fused: bool) -> tuple[np.ndarray, np.ndarray]:
    """First source index (outputs,) and weights (2, outputs) of each output, rounded to float32 step by step.

    With align_corners the first and last outputs lie on the first and last inputs; without, pixels are areas and
    an output's centre is mapped, those before the first centre taking the first input.
    """
    outputs = np.arange(num_outputs, dtype=np.float32)
    if align_corners:
        scale = np.float32(num_inputs - 1) / np.float32(num_outputs - 1) if num_outputs > 1 else np.float32(0)
        position = scale * outputs
    else:
        scale = np.float32(num_inputs) / np.float32(num_outputs)
        centre, half = outputs + np.float32(0.5), np.float32(0.5)
        if fused:
            position = (np.multiply(scale, centre, dtype=np.float64) - half).astype(np.float32)
        else:
            position = scale * centre - half
        position = np.maximum(position, np.float32(0))
    first = np.minimum(position.astype(np.int64), num_inputs - 1)
    second_weight = np.clip(position - first.astype(np.float32), np.float32(0), np.float32(1))
    return first, np.stack([np.float32(1) - second_weight, second_weight])


def in_pieces(first: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs of equal source index, cut to pieces of at most `length` outputs: their index, and their outputs.

    >>> in_pieces(np.array([0, 0, 0, 1]), length=2)[1].tolist()
    [[0, 1], [2, 2], [3, 3]]
    """
    starts_run = np.r_[True, first[1:] != first[:-1]]
    run_starts = np.flatnonzero(starts_run)
    run_ends = np.r_[run_starts[1:], len(first)]
    bounds = [
        (start, min(start + length, end))
        for run_start, end in zip(run_starts.tolist(), run_ends.tolist(), strict=True)
        for start in range(run_start, end, length)
    ]
    starts, ends = np.array(bounds).T
    return first[starts], np.minimum(starts[:, None] + np.arange(length), ends[:, None] - 1)


def check_logits(logits_CHW: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError unless the logits are (C, h, w), floating, of 1 to 255 classes, and the size is positive."""
    if logits_CHW.ndim != 3 or 0 in logits_CHW.shape or len(logits_CHW) > 255:
        raise ValueError(f"logits of one image are (C, h, w) with 1 to 255 classes, got {tuple(logits_CHW.shape)}")
    if not logits_CHW.dtype.is_floating_point:
        raise ValueError(f"logits are {logits_CHW.dtype}; give the network's output before the argmax")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {tuple(size)}; give (H, W), both at least 1")


def refuse_not_finite(logits: Tensor) -> None:
    """Raise ValueError when a logit is NaN or infinite: an argmax of it would still give a plausible score."""
    # A sum over finite numbers may overflow, but one over NaN or infinity is never finite: one cheap pass decides.
    if torch.isfinite(logits.sum()):
        return
    bad = int((~torch.isfinite(logits)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {logits.numel()} logits are NaN or infinite; no label can be read off them. "
            "Training has diverged, or half precision has overflowed: try a smaller learning rate or float32"
        )
