"""Temporal consistency of a video's predictions: what was said of a frame, moved on by the motion, against the next.

Liu, Shen, Yu and Wang, "Efficient Semantic Video Segmentation with Per-frame Inference", ECCV 2020: the mIoU between
one frame's prediction and its neighbour's, warped by optical flow. Labels are not needed. Ours, other than theirs: the
flow is OpenCV's DIS and not FlowNet2, so figures of the two do not compare; labels are warped by nearest neighbour; and
pixels seen in one frame only are left out, by comparing the flow forward and backward.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from dance_seg.metrics import confusion_matrix, scores
from dance_seg.sample import IGNORE

SMALLEST_SIDE = 32
"""Below this there is too little to match for the flow."""


class ConsistencyScores(NamedTuple):
    """Temporal consistency in points from 0 to 100."""

    miou: float  # mean over the classes found in either of two frames
    iou: tuple[float | None, ...]  # per class; None where the class is in no frame
    frame_pairs: int
    compared: float  # share of the pixels that both frames show, in points


class TemporalConsistency:
    """mIoU between each prediction and the one before it, warped; one confusion matrix over all pairs of frames."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.matrix = np.zeros((num_classes, num_classes), np.int64)
        self.frame_pairs, self.pixels = 0, 0
        self._previous: tuple[np.ndarray, np.ndarray] | None = None

    def start(self) -> None:
        """Begin another clip: the next frame has none before it."""
        self._previous = None

    def state_dict(self) -> dict[str, Any]:
        """All that was counted and the frame to go on from, as plain data and tensors."""
        previous = self._previous
        return {
            "matrix": torch.from_numpy(self.matrix.copy()),
            "frame_pairs": self.frame_pairs,
            "pixels": self.pixels,
            "previous": None if previous is None else [torch.tensor(part) for part in previous],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where a state says."""
        self.matrix, self.frame_pairs, self.pixels = state["matrix"].numpy(), state["frame_pairs"], state["pixels"]
        previous = state["previous"]
        self._previous = None if previous is None else (previous[0].numpy(), previous[1].numpy())

    def update(self, frame: np.ndarray, prediction: np.ndarray) -> None:
        """Add the next frame, RGB uint8 (H, W, 3), and its predicted train ids, uint8 (H, W).

        Raises ValueError when their sizes differ, from one another or from the frame before.
        """
        if frame.shape[:2] != prediction.shape or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"a frame is (H, W, 3) and its prediction (H, W), got {frame.shape}, {prediction.shape}")
        if self._previous is not None:
            before, predicted_before = self._previous
            if before.shape != frame.shape:
                raise ValueError(f"a frame of {frame.shape[:2]} follows one of {before.shape[:2]}; start() a new clip")
            backward, forward = optical_flow(frame, before), optical_flow(before, frame)
            warped = warp_labels(predicted_before, backward)
            warped[~visible(backward, forward)] = IGNORE
            self.matrix += confusion_matrix(prediction, warped, self.num_classes)
            self.frame_pairs += 1
            self.pixels += prediction.size
        self._previous = frame, prediction

    def compute(self) -> ConsistencyScores:
        """The scores of all pairs of frames added so far.

        Raises ValueError when there is none, or no pixel was seen twice.
        """
        counted = int(self.matrix.sum())
        if not counted:
            raise ValueError(
                f"no pixel could be followed over {self.frame_pairs} pairs of frames, so there is no temporal "
                "consistency; it needs frames of one clip that follow closely"
            )
        found = scores(self.matrix)
        return ConsistencyScores(found.miou, found.iou, self.frame_pairs, 100 * counted / self.pixels)


def optical_flow(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Where each pixel of `start` is in `end`: offsets (x, y) in pixels, float32 (H, W, 2), of RGB uint8 (H, W, 3).

    Dense inverse search (Kroeger et al. 2016). Raises ValueError for frames too small to match.
    """
    if min(start.shape[:2]) < SMALLEST_SIDE:
        raise ValueError(
            f"frames of {start.shape[0]} x {start.shape[1]} are too small; at least {SMALLEST_SIDE} a side"
        )
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    gray_start, gray_end = (cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (start, end))
    return search.calc(gray_start, gray_end, None)  # type: ignore[call-overload]


def warp_labels(labels: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """labels (H, W) at the nearest pixel to which the flow (H, W, 2) points; IGNORE where that is outside.

    >>> one_left = np.full((1, 3, 2), (-1, 0), np.float32)
    >>> warp_labels(np.uint8([[4, 5, 6]]), one_left).tolist()
    [[255, 4, 5]]
    """
    rows, columns, inside = _target(flow)
    warped = labels[rows, columns]
    warped[~inside] = IGNORE
    return warped


def visible(flow: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Which pixels (H, W) the other frame shows too: the flow there and back (H, W, 2) ends where it began.

    The tolerance is that of Sundaram, Brox and Keutzer 2010: |there + back|^2 < 0.01 (|there|^2 + |back|^2) + 0.5.
    """
    rows, columns, inside = _target(flow)
    returned = back[rows, columns]
    squares = (flow**2).sum(axis=2) + (returned**2).sum(axis=2)
    return inside & (((flow + returned) ** 2).sum(axis=2) < 0.01 * squares + 0.5)


def _target(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column of the nearest pixel that the flow points to, kept inside, and whether it was inside."""
    height, width = flow.shape[:2]
    rows = np.rint(np.arange(height, dtype=np.float32)[:, None] + flow[..., 1])
    columns = np.rint(np.arange(width, dtype=np.float32) + flow[..., 0])
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return rows.clip(0, height - 1).astype(np.intp), columns.clip(0, width - 1).astype(np.intp), inside
