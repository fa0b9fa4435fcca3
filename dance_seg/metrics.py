"""Exact scores: one integer confusion matrix over the whole set, and what is read off it.

The benchmarks define a class's IoU over all pixels of all images (Cityscapes, CamVid, ADE20K), so pixels are
counted first, in integers, and divided once at the end. Averaging IoU per image is another figure.
C classes, H rows, W columns.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from dance_seg.sample import IGNORE

EXACT_IN_FLOAT32 = 2**24
"""cv2.calcHist returns float32, which holds every count only up to here."""


class Scores(NamedTuple):
    """What a confusion matrix says, in points from 0 to 100."""

    miou: float  # mean IoU over the classes that are in the labels or in the predictions
    iou: tuple[float | None, ...]  # per class; None where the class is in neither
    pixel_accuracy: float  # share of the counted pixels predicted right
    class_accuracy: float  # mean over the classes in the labels of the share of their pixels predicted right
    accuracies: tuple[float | None, ...]  # that share per class; None where the class is not in the labels


def confusion_matrix(predictions: np.ndarray | Tensor, labels: np.ndarray | Tensor, num_classes: int) -> np.ndarray:
    """Count pixels by (label, prediction): an int64 matrix (C, C), rows are labels, columns predictions.

    Pixels whose label is IGNORE are left out, whatever was predicted there. Takes integer arrays or tensors of
    one shape; uint8 is counted in place, which is the fast way. Raises ValueError when the shapes differ, when a
    label is neither a class nor IGNORE, or when a counted pixel has a prediction that is no class.

    >>> confusion_matrix(np.uint8([[0, 1, 1]]), np.uint8([[0, 0, 255]]), num_classes=2).tolist()
    [[1, 1], [0, 0]]
    """
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(
            f"num_classes is {num_classes}; labels are uint8 and {IGNORE} is IGNORE, so give 1 to {IGNORE}"
        )
    if tuple(predictions.shape) != tuple(labels.shape):
        raise ValueError(
            f"predictions are {tuple(predictions.shape)} and labels {tuple(labels.shape)}; resize the predictions "
            "to the labels' size first (dance_seg.evaluator.resized_argmax does)"
        )
    label_bytes = as_bytes(labels, "labels")
    predicted_bytes = as_bytes(predictions, "predictions", label_bytes)
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for start in range(0, label_bytes.size, EXACT_IN_FLOAT32):
        chunks = [values[:, start : start + EXACT_IN_FLOAT32] for values in (label_bytes, predicted_bytes)]
        ranges = [0, num_classes, 0, num_classes]
        matrix += cv2.calcHist(chunks, [0, 1], None, [num_classes, num_classes], ranges).astype(np.int64)
    # calcHist leaves out what is outside its ranges without a word: too few pixels counted means a bad value.
    if matrix.sum() != np.count_nonzero(label_bytes != IGNORE):
        refuse_outside(label_bytes, predicted_bytes, num_classes)
    return matrix


def scores(matrix: np.ndarray | Tensor) -> Scores:
    """The scores of a confusion matrix (C, C) of counts, rows labels and columns predictions.

    IoU = right / (labelled + predicted - right). Raises ValueError when the matrix is not square or counts nothing.

    >>> scores(np.array([[3, 1], [0, 0]])).iou
    (75.0, 0.0)
    """
    counts = np.asarray(matrix.cpu() if isinstance(matrix, Tensor) else matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a confusion matrix is (C, C), got {counts.shape}")
    total = int(counts.sum())
    if total == 0:
        raise ValueError(
            f"no pixel was counted, so there is no score: no image was given, or every label is IGNORE ({IGNORE}); "
            "check the labels with python -m tools.check_data"
        )
    right = counts.diagonal()
    labelled, predicted = counts.sum(axis=1), counts.sum(axis=0)
    iou = shares(right, labelled + predicted - right)
    accuracies = shares(right, labelled)
    return Scores(
        miou=mean_of_present(iou),
        iou=iou,
        pixel_accuracy=100 * int(right.sum()) / total,
        class_accuracy=mean_of_present(accuracies),
        accuracies=accuracies,
    )


class ConfusionMatrix(Metric):
    """The confusion matrix as a torchmetrics Metric: one int64 state (C, C), summed over ranks.

    >>> metric = ConfusionMatrix(num_classes=2)
    >>> metric.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]))
    >>> metric.compute().pixel_accuracy
    50.0
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    matrix: Tensor

    def __init__(self, num_classes: int, **arguments: bool) -> None:
        super().__init__(**arguments)
        self.num_classes = num_classes
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> None:
        """Add the pixels of one image or one batch."""
        counted = confusion_matrix(predictions, labels, self.num_classes)
        self.matrix += torch.from_numpy(counted).to(self.matrix.device)

    def compute(self) -> Scores:
        """The scores of everything added so far, on all ranks."""
        return scores(self.matrix)


def as_bytes(values: np.ndarray | Tensor, what: str, labels: np.ndarray | None = None) -> np.ndarray:
    """The values as uint8 in one row (1, pixels); with labels given, values under IGNORE may be anything."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if values.dtype.kind not in "iu":
        raise ValueError(f"{what} are {values.dtype}; give class indices as integers (take the argmax of logits first)")
    row = np.ascontiguousarray(values).reshape(1, -1)
    if row.dtype == np.uint8:
        return row
    outside = (row < 0) | (row > 255)
    if labels is not None:
        outside &= labels != IGNORE
    if outside.any():
        raise ValueError(f"{what} hold {listed(row[outside])}; class indices fit into 0 to 255")
    return row.astype(np.uint8)


def refuse_outside(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> None:
    """Raise ValueError that names the values that are no class, and on how many pixels."""
    bad_labels = labels[(labels >= num_classes) & (labels != IGNORE)]
    if bad_labels.size:
        raise ValueError(
            f"labels hold {listed(bad_labels)}; with {num_classes} classes a label is 0 to {num_classes - 1}, "
            f"or {IGNORE} to be ignored. Labels must be train ids: check the data set's label table"
        )
    bad_predictions = predictions[(predictions >= num_classes) & (labels != IGNORE)]
    raise ValueError(
        f"predictions hold {listed(bad_predictions)}; with {num_classes} classes a prediction is 0 to "
        f"{num_classes - 1}. The model has more outputs than the data set has classes, or label ids were predicted"
    )


def listed(values: np.ndarray) -> str:
    """The values and how many pixels have them, for a message.

    >>> listed(np.array([7, 200, 7]))
    '7 (2 pixels), 200 (1 pixels)'
    """
    found, counts = np.unique(values, return_counts=True)
    shown = [f"{value} ({count} pixels)" for value, count in zip(found[:10], counts[:10], strict=True)]
    return ", ".join(shown) + (f" and {len(found) - 10} more values" if len(found) > 10 else "")


def shares(parts: np.ndarray, wholes: np.ndarray) -> tuple[float | None, ...]:
    """Part of each whole in points, None where the whole is nothing; Python integers, so that nothing overflows."""
    return tuple(100 * int(part) / int(whole) if whole else None for part, whole in zip(parts, wholes, strict=True))


def mean_of_present(values: tuple[float | None, ...]) -> float:
    """The mean of the values that are not None."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present)
