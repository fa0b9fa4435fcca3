"""Pixels near objects count more: boxes -> a weight for each pixel -> the loss of an update.

A box is x0, y0, x1, y1 in pixels, from the left and upper edge of its first pixel to the right and lower of its last.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from dance_seg.losses import pixel_mean
from dance_seg.sample import IGNORE


def object_boxes(labels: np.ndarray, objects: Sequence[int]) -> np.ndarray:
    """The box of each connected region (8 neighbours) of each of the classes: float32 (n, 4).

    Stands in for instances where the teacher has none; two cars that touch are one object to it.

    >>> object_boxes(np.uint8([[0, 1, 1, 0, 1]]), [1]).tolist()
    [[1.0, 0.0, 3.0, 1.0], [4.0, 0.0, 5.0, 1.0]]
    """
    boxes = [np.zeros((0, 4), np.float32)]
    for index in objects:
        _, _, statistics, _ = cv2.connectedComponentsWithStats((labels == index).astype(np.uint8), connectivity=8)
        left, top, width, height = statistics[1:, :4].T  # the first region is all the rest
        boxes.append(np.stack([left, top, left + width, top + height], axis=1).astype(np.float32))
    return np.concatenate(boxes)


def grown(boxes: np.ndarray, growth: float, growth_of: str) -> np.ndarray:
    """Boxes (n, 4) made wider and higher by a share of their size: `total` in all, `side` on each side.

    >>> box = np.array([[10.0, 0, 30, 40]])
    >>> grown(box, 0.1, "total").tolist(), grown(box, 0.1, "side").tolist()
    ([[9.0, -2.0, 31.0, 42.0]], [[8.0, -4.0, 32.0, 44.0]])
    """
    margin = (boxes[:, 2:] - boxes[:, :2]) * (growth / 2 if growth_of == "total" else growth)
    return np.concatenate([boxes[:, :2] - margin, boxes[:, 2:] + margin], axis=1)


def pixel_weights(boxes: np.ndarray, size: tuple[int, int], object_weight: float) -> np.ndarray:
    """The weight of each pixel, float32 (H, W): `object_weight` where a box covers any of it, 1 elsewhere.

    >>> pixel_weights(np.array([[0.5, 0, 1.5, 9]]), (1, 4), 5.0).tolist()
    [[5.0, 5.0, 1.0, 1.0]]
    """
    weights = np.ones(size, np.float32)
    first = np.maximum(np.floor(boxes[:, :2]), 0).astype(int)
    last = np.maximum(np.ceil(boxes[:, 2:]), 0).astype(int)
    for (left, top), (right, bottom) in zip(first.tolist(), last.tolist(), strict=True):
        weights[top:bottom, left:right] = object_weight
    return weights


def weighted_cross_entropy(logits_NCHW: Tensor, labels_NHW: Tensor, weights_NHW: Tensor) -> Tensor:
    """Cross-entropy of each image (N,), its pixels weighted; divided by the number of pixels that are not ignored.

    >>> import torch
    >>> logits, labels = torch.zeros(1, 2, 1, 3), torch.tensor([[[0, 1, 255]]])
    >>> weighted_cross_entropy(logits, labels, torch.tensor([[[5.0, 1.0, 5.0]]]))  # (5 + 1) / 2 x ln 2
    tensor([2.0794])
    """
    losses_NHW = F.cross_entropy(logits_NCHW.float(), labels_NHW.long(), ignore_index=IGNORE, reduction="none")
    return pixel_mean(losses_NHW * weights_NHW, labels_NHW)
