"""Pixels as the networks see them: per channel (x / 255 - mean) / std, with the constants of ImageNet."""

from typing import TypeGuard

import cv2
import numpy as np
import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of the RGB values of ImageNet in [0, 1]: what pretrained encoders were trained with."""

_VALUES_AT_ONCE = 131_072  # converted and scaled while they are in the second-level cache


def downsampled(image: np.ndarray, scale: float) -> np.ndarray:
    """An image uint8 (H, W, 3) at a fraction of its size, areas averaged: as evaluation and prediction show it.

    >>> downsampled(np.zeros((45, 60, 3), np.uint8), 0.5).shape
    (22, 30, 3)
    """
    height, width = downsampled_size(image.shape[:2], scale)
    if (height, width) == image.shape[:2]:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def downsampled_size(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    """The size (H, W) of an image at a fraction of its size.

    >>> downsampled_size((45, 60), 0.5)
    (22, 30)
    """
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def padded_size(size: tuple[int, int], stride: int, at_least: int = 1) -> tuple[int, int]:
    """The size (H, W) at which a network runs on an image: multiples of its stride, and at least so much.

    >>> padded_size((45, 100), 32, 64)
    (64, 128)
    """
    rows, columns = (max(-(-side // stride) * stride, at_least) for side in size)
    return rows, columns


def normalise(images: Tensor, device: torch.device | str | None = None, *, out: Tensor | None = None) -> Tensor:
    """Images (N, 3, H, W) or (3, H, W) uint8 -> float32 (x / 255 - mean) / std, on `device` where one is given.

    The uint8 values are what moves. The memory format stays as it is. `out` is the result of an earlier call that
    nobody needs any more: where it fits, its memory is used again, which on a processor is twice as fast as new
    memory. Raises ValueError for another type or another number of channels.

    >>> black = torch.zeros((1, 3, 1, 1), dtype=torch.uint8)
    >>> [round(value, 3) for value in normalise(black).flatten().tolist()]
    [-2.118, -2.036, -1.804]
    """
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(f"normalise takes uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if device is not None:
        images = images.to(device, non_blocking=True)
    if images.device.type == "cpu" and images.movedim(-3, -1).is_contiguous():
        return _normalise_channels_last(images, out)
    scale, offset = (torch.tensor(row, device=images.device).view(3, 1, 1) for row in _scale_and_offset())
    if not _fits(out, images):
        out = torch.empty_like(images, dtype=torch.float32)
    return out.copy_(images).mul_(scale).add_(offset)


def denormalise(images: Tensor) -> Tensor:
    """The uint8 pixels that `normalise` made these float images (N, 3, H, W) or (3, H, W) from.

    >>> pixels = torch.arange(12, dtype=torch.uint8).view(3, 2, 2) * 20
    >>> torch.equal(denormalise(normalise(pixels)), pixels)
    True
    """
    scale, offset = (torch.tensor(row, device=images.device).view(3, 1, 1) for row in _scale_and_offset())
    return ((images.float() - offset) / scale).round_().clamp_(0, 255).to(torch.uint8)


def _scale_and_offset() -> tuple[list[float], list[float]]:
    """(x / 255 - mean) / std as x * scale + offset."""
    return [1 / (255 * std) for std in STD], [-mean / std for mean, std in zip(MEAN, STD, strict=True)]


def _fits(out: Tensor | None, images: Tensor) -> TypeGuard[Tensor]:
    return (
        out is not None
        and (out.shape, out.stride(), out.device) == (images.shape, images.stride(), images.device)
        and out.dtype == torch.float32
        and not out.requires_grad
    )


def _normalise_channels_last(images: Tensor, out: Tensor | None) -> Tensor:
    """The same in one pass over the memory and without torch's threads, which stall where others use the cores.

    Six times as fast as scaling by channel, whose rows of three values are too short.
    """
    scale, offset = _scale_and_offset()
    affine = np.column_stack([np.diag(scale), offset]).astype(np.float32)
    pixels = images.movedim(-3, -1)
    normalised = out.movedim(-3, -1) if _fits(out, images) else torch.empty(pixels.shape, dtype=torch.float32)
    width = images.shape[-1]
    rows_in, rows_out = pixels.reshape(-1, width, 3).numpy(), normalised.view(-1, width, 3).numpy()
    at_once = max(1, _VALUES_AT_ONCE // (3 * width))
    floats = np.empty((at_once, width, 3), np.float32)
    for start in range(0, len(rows_in), at_once):
        rows = rows_in[start : start + at_once]
        np.copyto(floats[: len(rows)], rows)
        cv2.transform(floats[: len(rows)], affine, dst=rows_out[start : start + at_once])
    return normalised.movedim(-1, -3)
