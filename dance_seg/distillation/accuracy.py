"""How far a student's labels agree with the teacher's on one frame, from 0 to 1: what decides on updates and stride."""

from collections.abc import Sequence

import numpy as np

from dance_seg.metrics import confusion_matrix


def accuracy(
    prediction: np.ndarray, labels: np.ndarray, num_classes: int, *, of: str = "mean", foreground: Sequence[int]
) -> float:
    """The agreement of a prediction uint8 (H, W) with the teacher's labels uint8 (H, W), in [0, 1].

    `mean` is the mean IoU over the foreground classes found in either of the two, `min` the smallest of those IoU,
    `pixel` the share of pixels that are equal. Pixels that the teacher labels IGNORE are left out. Where there is
    nothing to agree on, no foreground in either, it is 1.

    >>> prediction, labels = np.uint8([[0, 1, 1, 2]]), np.uint8([[0, 1, 2, 2]])
    >>> [accuracy(prediction, labels, 4, of=of, foreground=(1, 2, 3)) for of in ("mean", "min", "pixel")]
    [0.5, 0.5, 0.75]
    >>> accuracy(np.uint8([[0, 0]]), np.uint8([[0, 0]]), 2, foreground=(1,))
    1.0
    """
    matrix = confusion_matrix(prediction, labels, num_classes)
    right = matrix.diagonal()
    if of == "pixel":
        return int(right.sum()) / int(matrix.sum()) if matrix.any() else 1.0
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - right
    present = [index for index in foreground if union[index]]
    if not present:
        return 1.0
    iou = right[present] / union[present]
    return float(iou.mean() if of == "mean" else iou.min())


def foreground_of(classes: Sequence[str], background: Sequence[str] | None) -> tuple[int, ...]:
    """The indices of the classes that are not background; None: all but a class named "background".

    Raises ValueError for a background that is no class, and when no class is left.

    >>> foreground_of(("background", "car"), None), foreground_of(("road", "car"), None)
    ((1,), (0, 1))
    """
    for name in background or ():
        if name not in classes:
            raise ValueError(f"distillation.background holds {name!r}; the classes are {', '.join(classes)}")
    names = ("background",) if background is None else background
    left = tuple(index for index, name in enumerate(classes) if name not in names)
    if not left:
        raise ValueError(f"distillation.background leaves no class of {', '.join(classes)}; name fewer")
    return left
