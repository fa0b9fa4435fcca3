"""From complexity to a plan: how far each image is downsampled, whether it is dropped, how much its loss counts.

A plan is a pure function of (options, complexity, seed, epoch, progress), so it can be printed, plotted, tested and
made again after a crash. The three actions and the complexity score are DANCE's (arXiv 2107.07706); the paper's text
could not be read in full, so the formulas and every default here are this project's own.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dance_seg.randomness import Stream, generator


@dataclass(frozen=True, kw_only=True)
class DataSlimming:
    """Which pixels are worth paying for; a recipe without this section trains every image at full resolution.

    Complexity is used as its quantile q in [0, 1] among the images trained on. `progress` is the share of training
    that is over, in [0, 1].
    """

    measure: Literal["spatial_information", "entropy", "jpeg_bytes", "label_boundary_density", "random"] = (
        "spatial_information"
    )
    scales: tuple[float, ...] = (0.5, 0.75, 1.0)  # of the crop's sides; the last is full resolution
    quantiles: tuple[float, ...] = (0.4, 0.8)  # q below the first takes the first scale, and so on
    schedule: Literal["static", "progressive"] = "progressive"
    sizes: Literal["fixed", "drawn"] = "drawn"  # drawn: anew each epoch, from a distribution that complexity shifts
    complexity_pull: float = 0.5  # with drawn sizes: 1 follows complexity alone, 0 chance alone
    drop_below: float = 0.2  # images with q below this may be dropped
    drop_rate: float = 0.5  # the probability with which they are, drawn anew each epoch
    rare_class_images: float = 0.02  # never drop an image with a class found in fewer than this share of the images
    min_weight: float = 0.5  # loss weight of the simplest image over that of the most complex
    warm_up: float = 0.05  # progress before which nothing is dropped, and static schedules are at full resolution
    ramp_until: float = 0.3  # progress at which dropping, and a static schedule's downsampling, are in full force
    full_resolution_tail: float = 0.2  # the last share of training: full resolution, nothing dropped
    batch_by: Literal["images", "pixels"] = "images"  # pixels: small images come in larger batches
    inference: Literal["full", "adaptive"] = "full"  # adaptive: simple images are shown smaller at inference too

    def __post_init__(self) -> None:
        """Refuse options that contradict one another."""
        at = "data_slimming."
        if not self.scales or any(not 0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"{at}scales {list(self.scales)}: each is above 0 and at most 1")
        if list(self.scales) != sorted(set(self.scales)) or self.scales[-1] != 1.0:
            raise ValueError(f"{at}scales {list(self.scales)}: ascending, ending in 1.0, such as [0.5, 0.75, 1.0]")
        if len(self.quantiles) != len(self.scales) - 1:
            raise ValueError(
                f"{at}quantiles {list(self.quantiles)} must be one fewer than {at}scales {list(self.scales)}: "
                f"give {len(self.scales) - 1}"
            )
        if list(self.quantiles) != sorted(self.quantiles) or any(not 0 <= q <= 1 for q in self.quantiles):
            raise ValueError(f"{at}quantiles {list(self.quantiles)}: ascending, each in [0, 1]")
        for key in ("complexity_pull", "drop_below", "drop_rate", "rare_class_images", "full_resolution_tail"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{at}{key} is {getattr(self, key)}: a share in [0, 1]")
        if not 0 < self.min_weight <= 1:
            raise ValueError(f"{at}min_weight is {self.min_weight}: above 0 (nothing is weighted away) and at most 1")
        if self.inference == "adaptive" and self.measure == "label_boundary_density":
            raise ValueError(
                f"{at}inference is adaptive and {at}measure label_boundary_density: there are no labels at inference; "
                "choose another measure, or inference full"
            )
        if not 0 <= self.warm_up <= self.ramp_until <= 1 - self.full_resolution_tail:
            raise ValueError(
                f"{at[:-1]} needs 0 <= warm_up <= ramp_until <= 1 - full_resolution_tail, got "
                f"{self.warm_up}, {self.ramp_until} and 1 - {self.full_resolution_tail}"
            )


@dataclass(frozen=True)
class Plan:
    """What one epoch does with each of the N images; `scale` indexes the options' scales."""

    scale: np.ndarray  # (N,) int64, index into the scales
    weight: np.ndarray  # (N,) float64, mean 1 over the kept images
    keep: np.ndarray  # (N,) bool


def plan(
    quantile_N: np.ndarray, options: DataSlimming, *, progress: float, seed: int, epoch: int, rare_N: np.ndarray
) -> Plan:
    """The plan of an epoch that begins at `progress`, for images of these complexity quantiles.

    `rare_N` (bool) marks the images that are never dropped.

    >>> options = DataSlimming(schedule="static", sizes="fixed", drop_rate=0.0, min_weight=1.0)
    >>> quantiles = np.array([0.1, 0.5, 0.9])
    >>> plan(quantiles, options, progress=0.5, seed=0, epoch=5, rare_N=np.zeros(3, bool)).scale.tolist()
    [0, 1, 2]
    >>> plan(quantiles, options, progress=0.9, seed=0, epoch=9, rare_N=np.zeros(3, bool)).scale.tolist()
    [2, 2, 2]
    """
    keep = rare_N | (quantile_N >= options.drop_below)
    keep |= generator(seed, Stream.DROP, epoch).random(len(quantile_N)) >= options.drop_rate * force(options, progress)
    if not keep.any():
        keep = quantile_N == quantile_N.max()
    key = quantile_N if options.sizes == "fixed" else drawn_quantiles(quantile_N, options.complexity_pull, seed, epoch)
    scale = np.searchsorted(np.asarray(thresholds(options, progress)), key, side="right")
    weight = options.min_weight + (1 - options.min_weight) * quantile_N
    return Plan(scale=scale, weight=weight / weight[keep].mean(), keep=keep)


def force(options: DataSlimming, progress: float) -> float:
    """How much of the slimming is in force: 0 in warm-up and tail, rising linearly to 1 in between.

    >>> options = DataSlimming(warm_up=0.1, ramp_until=0.3, full_resolution_tail=0.2)
    >>> [round(force(options, p), 3) for p in (0.0, 0.2, 0.3, 0.7, 0.8)]
    [0.0, 0.5, 1.0, 1.0, 0.0]
    """
    if in_tail(options, progress) or progress < options.warm_up:
        return 0.0
    if progress >= options.ramp_until:
        return 1.0
    return (progress - options.warm_up) / (options.ramp_until - options.warm_up)


def in_tail(options: DataSlimming, progress: float) -> bool:
    """Whether `progress` lies in the full-resolution tail."""
    return progress >= 1 - options.full_resolution_tail - 1e-9


def thresholds(options: DataSlimming, progress: float) -> tuple[float, ...]:
    """The quantiles that divide the scales at `progress`; below the first lies the smallest scale.

    A static schedule raises them from 0 (all at full resolution) to their values during the ramp. A progressive one
    slides them from above 1 (all small) through their values at half time to below 0 (all at full resolution) when
    the tail begins, so that complex images grow first.

    >>> thresholds(DataSlimming(schedule="progressive", full_resolution_tail=0.2), 0.4)
    (0.4, 0.8)
    """
    if in_tail(options, progress):
        return tuple(-1.0 for _ in options.quantiles)
    if options.schedule == "static":
        amount = force(options, progress)
        return tuple(q * amount if amount > 0 else -1.0 for q in options.quantiles)
    shift = 1 - 2 * progress / (1 - options.full_resolution_tail)
    return tuple(q + shift for q in options.quantiles)


def drawn_quantiles(quantile_N: np.ndarray, pull: float, seed: int, epoch: int) -> np.ndarray:
    """Quantiles mixed with chance and ranked again, so that the share of each scale stays what the options say.

    >>> drawn_quantiles(np.array([0.25, 0.75]), pull=1.0, seed=0, epoch=0).tolist()
    [0.25, 0.75]
    """
    mixed = pull * quantile_N + (1 - pull) * generator(seed, Stream.SIZE, epoch).random(len(quantile_N))
    ranks = np.empty(len(mixed))
    ranks[np.argsort(mixed, kind="stable")] = np.arange(len(mixed))
    return (ranks + 0.5) / len(mixed)


def rare_images(classes_present_NC: np.ndarray, share: float) -> np.ndarray:
    """Which images hold a class that is found in fewer than `share` of the images (and in at least one).

    >>> present = np.array([[True, False], [True, False], [True, True]])
    >>> rare_images(present, share=0.5).tolist()
    [False, False, True]
    """
    images_per_class = classes_present_NC.sum(axis=0)
    rare_class = (images_per_class > 0) & (images_per_class < share * len(classes_present_NC))
    return np.asarray(classes_present_NC[:, rare_class].any(axis=1))


def scaled_size(crop: tuple[int, int], scale: float, stride: int) -> tuple[int, int]:
    """The size (H, W) of a crop at a scale, rounded to the model's stride so that no padding is paid for.

    >>> scaled_size((352, 480), 0.75, stride=32)
    (256, 352)
    """
    height, width = (max(stride, stride * int(side * scale / stride + 0.5)) for side in crop)
    return height, width
