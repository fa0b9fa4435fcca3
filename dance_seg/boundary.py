"""Boundary IoU: how well predictions follow the outlines of the labels.

Cheng, Girshick, Dollar, Berg and Kirillov, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation",
CVPR 2021: the IoU of the bands of pixels along the outlines, of a width that follows the image's diagonal. The paper
scores object by object; for classes, bands' intersections and unions are added up over the set, as mIoU does.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

from dance_seg.metrics import mean_of_present, refuse_outside, shares
from dance_seg.sample import IGNORE

DILATION_RATIO = 0.02
"""Width of the band over the image's diagonal; the paper's."""


class BoundaryScores(NamedTuple):
    """Boundary IoU in points from 0 to 100."""

    miou: float  # mean over the classes whose outline is in the labels or in the predictions
    iou: tuple[float | None, ...]  # per class; None where the class is in neither


class BoundaryIoU:
    """Boundary IoU of each class over a set of images, added one by one.

    Where the label is IGNORE the prediction is taken to be IGNORE too: ignored pixels are in no band, and both outlines
    run along an ignored region alike. The image's border is an outline, as in the authors' code.

    >>> metric = BoundaryIoU(num_classes=2)
    >>> label = np.zeros((50, 50), np.uint8)
    >>> label[20:30, 20:30] = 1
    >>> metric.update(label, label)
    >>> metric.compute().iou
    (100.0, 100.0)
    """

    def __init__(self, num_classes: int, dilation_ratio: float = DILATION_RATIO) -> None:
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(f"num_classes is {num_classes}; give 1 to {IGNORE}")
        if not 0 < dilation_ratio < 1:
            raise ValueError(f"dilation_ratio is {dilation_ratio}: a share of the image's diagonal, such as 0.02")
        self.num_classes, self.dilation_ratio = num_classes, dilation_ratio
        self.intersections, self.unions = (np.zeros(num_classes, np.int64) for _ in range(2))

    def update(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Add one image: train ids uint8 (H, W) both, IGNORE in the label only.

        Raises ValueError for shapes that differ, other types, and ids that are no class.
        """
        if (
            prediction.shape != label.shape
            or label.ndim != 2
            or {prediction.dtype, label.dtype} != {np.dtype(np.uint8)}
        ):
            raise ValueError(
                f"prediction is {prediction.dtype} {prediction.shape} and label {label.dtype} {label.shape}; give "
                "uint8 (H, W) both"
            )
        ignored = label == IGNORE
        outside = (label >= self.num_classes) | (prediction >= self.num_classes)
        if (outside & ~ignored).any():
            refuse_outside(label.reshape(1, -1), prediction.reshape(1, -1), self.num_classes)
        prediction = np.where(ignored, np.uint8(IGNORE), prediction)
        width = band_width(label.shape, self.dilation_ratio)
        bands = [band(ids, width) for ids in (label, prediction)]
        labelled, predicted = self._count(label, bands[0]), self._count(prediction, bands[1])
        both = self._count(label, bands[0] & bands[1] & (label == prediction))
        self.intersections += both
        self.unions += labelled + predicted - both

    def compute(self) -> BoundaryScores:
        """The scores of everything added so far; raises ValueError when nothing was counted."""
        if not self.unions.any():
            raise ValueError("no pixel was counted, so there is no boundary IoU: no image, or every label is IGNORE")
        iou = shares(self.intersections, self.unions)
        return BoundaryScores(mean_of_present(iou), iou)

    def _count(self, ids: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.bincount(ids[where], minlength=256)[: self.num_classes]  # IGNORE is 255: cut off


def band_width(size: tuple[int, ...], dilation_ratio: float = DILATION_RATIO) -> int:
    """The width in pixels of the bands in an image of size (H, W).

    >>> band_width((1024, 2048))
    46
    """
    return max(1, round(dilation_ratio * math.hypot(*size)))


def band(ids: np.ndarray, width: int) -> np.ndarray:
    """Which pixels (H, W) of an id map uint8 are within `width` pixels of another id or of the image's border.

    A pixel is inside its class when all of the square of 2 * width + 1 pixels around it has its id: so the minimum and
    maximum over that square tell the bands of all classes at once. The authors erode each class's mask `width` times by
    3 x 3, which leaves the same pixels.
    """
    # A frame of IGNORE makes the border an outline; beyond it OpenCV leaves morphology's border out of account.
    framed = cv2.copyMakeBorder(ids, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=IGNORE)
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    return (cv2.dilate(framed, square) != cv2.erode(framed, square))[1:-1, 1:-1]
