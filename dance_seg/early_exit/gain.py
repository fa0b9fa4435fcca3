"""How much mIoU an image is expected to gain by going on, from what an exit sees of each class.

That an exit is unsure does not say that a later one knows better, and mIoU counts a pixel of a rare class for more. So
the score `gain` is fitted to what is wanted: a line, by ridge regression, from the means of each class's probability p
and of its uncertainty p (1 - p) to what mIoU gains when the last exit answers instead. It is ours, and from no paper.

n images, K exits, C classes, F = 2 C pieces of evidence.
"""

from typing import NamedTuple

import numpy as np

PENALTIES = 10.0 ** np.arange(-1, 5.5, 0.5)
"""Of the squared weights of standardised evidence, tried by leaving each image out in turn."""


class Line(NamedTuple):
    """The expected gain at one exit, in standard deviations over the images that it was fitted on."""

    weights: tuple[float, ...]  # a constant, then one per piece of evidence
    left_out: np.ndarray  # float64 (n,): of each image by the line fitted without it


def fit_lines(evidence: np.ndarray, matrices: np.ndarray) -> list[Line]:
    """One line per exit but the last, from evidence (n, K, F) and confusion matrices (n, K, C, C)."""
    exits = matrices.shape[1]
    return [fit_line(evidence[:, exit], gains(matrices[:, exit], matrices[:, -1])) for exit in range(exits - 1)]


def gains(early: np.ndarray, late: np.ndarray) -> np.ndarray:
    """By how many points mIoU over all images rises for each that is answered late, from matrices (n, C, C).

    mIoU is no sum over images: this is its slope half-way between all early and all late, so the sum is nearly the
    whole rise.

    >>> wrong, right = np.array([[0, 2], [0, 2]]), np.array([[2, 0], [0, 2]])
    >>> gains(np.stack([wrong, right]), np.stack([right, right])).round(1)
    array([41.,  0.])
    """
    counts = [_counts(matrices) for matrices in (early, late)]
    (right, union), (right_late, union_late) = counts
    mean_right, mean_union = (right + right_late).sum(0) / 2, (union + union_late).sum(0) / 2
    there = mean_union > 0
    safe = np.where(there, mean_union, 1.0)
    rise = (right_late - right) / safe - mean_right * (union_late - union) / safe**2
    slopes: np.ndarray = 100 * rise[:, there].sum(1) / max(1, np.count_nonzero(there))
    return slopes


def _counts(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that are right, and right or wrong, of each class: float64 (n, C) each."""
    right = np.diagonal(matrices, axis1=1, axis2=2).astype(np.float64)
    return right, matrices.sum(axis=2, dtype=np.float64) + matrices.sum(axis=1, dtype=np.float64) - right


def fit_line(evidence: np.ndarray, gain: np.ndarray) -> Line:
    """The ridge regression of gains (n,) on evidence (n, F) whose predictions for images left out are best.

    Predictions are in their own standard deviations, since only their order is used; all zero where nothing can be
    told, as of a single image. The mean gain is that of all images for those left out too: a mean without the image
    would, where little is explained, order the images against their own gains.

    >>> line = fit_line(np.array([[0.0], [0.1], [0.2], [0.3]]), np.array([0.0, 1.0, 2.0, 3.0]))
    >>> [round(weight, 1) for weight in line.weights], line.left_out.round(1)
    ([-1.3, 8.9], array([-1.3, -0.4,  0.4,  1.3]))
    """
    mean, deviation = evidence.mean(0), evidence.std(0)
    seen = deviation > 1e-9
    standard = (evidence[:, seen] - mean[seen]) / deviation[seen]
    centred = gain - gain.mean()
    best, least = (np.zeros(standard.shape[1]), np.zeros(len(gain))), np.inf
    for penalty in PENALTIES:
        inverse = np.linalg.inv(standard.T @ standard + penalty * np.eye(standard.shape[1]))
        hat = standard @ inverse @ standard.T
        errors = (centred - hat @ centred) / (1 - np.diag(hat))
        if (errors**2).sum() < least:
            best, least = (inverse @ (standard.T @ centred), centred - errors), float((errors**2).sum())
    slopes, left_out = best
    spread = float(np.std(standard @ slopes))
    if not spread > 1e-12 * max(1.0, float(np.abs(gain).max())):
        return Line((0.0,) * (1 + evidence.shape[1]), np.zeros(len(gain)))
    weights = np.zeros(evidence.shape[1])
    weights[seen] = slopes / deviation[seen] / spread
    return Line((float(-weights @ mean), *map(float, weights)), left_out / spread)
