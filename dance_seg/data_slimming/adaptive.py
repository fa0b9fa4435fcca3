"""Inference at adaptive resolution: each image at the size that its complexity calls for, by the table of training.

The paper's inference saving is of the network; showing simple images smaller at inference too is this project's option
(`data_slimming.inference: adaptive`). The score of an image is what it is in training, its quantile is looked up in the
complexities of the training images, which a checkpoint keeps, and the quantiles of the recipe divide the scales.
"""

from dataclasses import dataclass

import numpy as np

from dance_seg.data_slimming.complexity import complexity
from dance_seg.data_slimming.plan import DataSlimming
from dance_seg.sample import Sample


@dataclass(frozen=True)
class AdaptiveResolution:
    """Says at which scale an image is shown to the network; `complexity` (N,) are those of the training images."""

    options: DataSlimming
    complexity: np.ndarray
    seed: int = 0  # of the random control

    def __post_init__(self) -> None:
        values = np.sort(np.asarray(self.complexity, dtype=np.float64))
        if not len(values) or not np.isfinite(values).all():
            raise ValueError("adaptive resolution needs the complexity of the training images, finite numbers")
        object.__setattr__(self, "complexity", values)

    def scale(self, image: np.ndarray, name: str) -> float:
        """The scale, one of the options', for an image, RGB uint8 (H, W, 3)."""
        measure = self.options.measure
        how = {"seed": self.seed} if measure == "random" else {}
        value = complexity(measure, Sample(image, np.empty((0, 0), np.uint8)), name, **how)
        return scale_of(quantile_among(value, self.complexity), self.options)


def scale_of(quantile: float, options: DataSlimming) -> float:
    """The scale of an image of that quantile, once a schedule is in force.

    >>> [scale_of(q, DataSlimming(scales=(0.5, 0.75, 1.0), quantiles=(0.4, 0.8))) for q in (0.39, 0.4, 0.9)]
    [0.5, 0.75, 1.0]
    """
    return options.scales[int(np.searchsorted(np.asarray(options.quantiles), quantile, side="right"))]


def quantile_among(value: float, ascending_N: np.ndarray) -> float:
    """The share of N values below a value, those equal to it counted half: what `quantiles` gives one of them.

    >>> quantile_among(10.0, np.array([10.0, 10.0, 20.0, 30.0])), quantile_among(99.0, np.array([10.0, 20.0]))
    (0.25, 1.0)
    """
    below, up_to = (np.searchsorted(ascending_N, value, side=side) for side in ("left", "right"))
    return float(below + up_to) / 2 / len(ascending_N)
