"""How complex an image is, as one number: what data slimming ranks the training images by.

Spatial information is the mean strength of the edges (Yu and Winkler, "Image complexity and spatial information",
QoMEX 2013). The other measures are there to be compared with it; `random` is the control that knows nothing.

Images are RGB uint8 (H, W, 3), labels uint8 (H, W), Y is the luminance in float32 (H, W).
"""

import hashlib
import inspect
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from dance_seg.sample import IGNORE, Sample

VERSION = 2
"""Goes up when a measure's values change, so that tables of scores made before are not used."""

SHORT_SIDE = 256
"""Complexity depends on resolution, so every image is scored with its shorter side at this size."""

_STRIP_PIXELS = 70_000  # the four float arrays of a strip, 16 bytes a pixel, stay in a core's second-level cache

_DIFFERENCE, _SMOOTHING = np.array([-1, 0, 1], np.float32), np.array([1, 2, 1], np.float32)  # Sobel's two halves


_LUMINANCE = np.array([[299, 587, 114]], np.float32)
_WHITE = 255_000


def luminance(image: np.ndarray) -> np.ndarray:
    """Y = 299 R + 587 G + 114 B as float32 (H, W): thousandths of a grey level, from 0 to 255000.

    Whole numbers of this size are exact in float32, and so are their Sobel sums: flat areas have no edges at all,
    and faint ones are as exact as strong ones.

    >>> luminance(np.array([[[0, 0, 0], [10, 20, 30]]], np.uint8)).tolist()
    [[0.0, 18150.0]]
    """
    return cv2.transform(image.astype(np.float32), _LUMINANCE)


def reference_image(image: np.ndarray, short_side: int = SHORT_SIDE) -> np.ndarray:
    """The image with its shorter side at `short_side`, by averaging areas; smaller images are returned as they are.

    >>> reference_image(np.zeros((360, 480, 3), np.uint8)).shape
    (256, 341, 3)
    >>> reference_image(np.zeros((100, 480, 3), np.uint8)).shape
    (100, 480, 3)
    """
    return _at_reference_size(image, short_side, cv2.INTER_AREA)


def spatial_information(image: np.ndarray, statistic: Literal["mean", "rms", "std"] = "mean") -> float:
    """Mean Sobel magnitude G = |(Y * Sx, Y * Sy)| of the luminance in [0, 1]; or the root mean square of G, or its
    standard deviation.

    Sx = [1 2 1]^T [-1 0 1], not normalised, Sy its transpose; the border mirrors without repeating the edge pixel
    (OpenCV's BORDER_REFLECT_101, np.pad's "reflect"). Takes the image, or what `luminance` makes of it. Works in strips
    of rows that stay in the cache. Raises ValueError for another array or statistic.

    A step of height 1 gives G = 4 in the two columns beside it, here 2 of 4:

    >>> step = np.zeros((3, 4, 3), np.uint8)
    >>> step[:, 2:] = 255
    >>> round(spatial_information(step), 4)
    2.0
    """
    is_image = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if not (is_image or (image.ndim == 2 and image.dtype == np.float32)) or not image.size:
        raise ValueError(
            f"spatial_information takes an RGB uint8 image (H, W, 3) or a float32 luminance (H, W), "
            f"got {image.dtype} {image.shape}"
        )
    if statistic not in ("mean", "rms", "std"):
        raise ValueError(f"statistic is {statistic!r}; choose mean, rms or std")
    height, width = image.shape[:2]
    num_strips = max(1, min(height, round(height * width / _STRIP_PIXELS)))
    scratch = _scratch(4 * (-(-height // num_strips) + 2) * width)
    total = squares = 0.0
    for strip in range(num_strips):
        top, bottom = height * strip // num_strips, height * (strip + 1) // num_strips
        above, below = max(top - 1, 0), min(bottom + 1, height)
        across, down, _, y = scratch[: 4 * (below - above) * width].reshape(4, below - above, width)
        if is_image:
            rgb = scratch[: 3 * y.size].reshape(*y.shape, 3)  # in the place of the other three planes
            np.copyto(rgb, image[above:below])
            cv2.transform(rgb, _LUMINANCE, dst=y)
        else:
            y = image[above:below]
        cv2.sepFilter2D(y, cv2.CV_32F, _DIFFERENCE, _SMOOTHING, dst=across)
        cv2.sepFilter2D(y, cv2.CV_32F, _SMOOTHING, _DIFFERENCE, dst=down)
        magnitude = cv2.magnitude(across, down, across)[top - above : bottom - above]
        total += cv2.sumElems(magnitude)[0]
        if statistic != "mean":
            squares += cv2.norm(magnitude, cv2.NORM_L2SQR)
    mean, mean_square = total / (_WHITE * height * width), squares / (_WHITE**2 * height * width)
    if statistic == "mean":
        return mean
    return float(np.sqrt(mean_square if statistic == "rms" else max(0.0, mean_square - mean**2)))


def entropy(image: np.ndarray) -> float:
    """Entropy of the grey levels, -sum p log2 p over the 256 levels, in bits from 0 to 8.

    >>> entropy(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    1.0
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    counts = _histogram(grey)
    share = counts[counts > 0] / grey.size
    return float(-(share * np.log2(share)).sum()) + 0.0  # + 0.0: no negative zero


def jpeg_bytes(image: np.ndarray, quality: int = 75) -> float:
    """Bytes per pixel of the image as a JPEG of this quality (1 to 100).

    Raises ValueError for a quality outside 1 to 100.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality!r}: a whole number from 1 to 100")
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, quality))
    return data.size / (image.shape[0] * image.shape[1])


def label_boundary_density(label: np.ndarray) -> float:
    """Share of the pairs of neighbouring pixels, across and down, that hold two classes; for training images only.

    Pairs with an ignored pixel are left out; 0 where nothing is left.

    >>> label_boundary_density(np.array([[0, 1, 255], [0, 0, 255]], np.uint8))  # 2 of 4 pairs
    0.5
    """
    pairs = boundaries = 0
    for one, other in ((label[:, 1:], label[:, :-1]), (label[1:], label[:-1])):
        known = (one != IGNORE) & (other != IGNORE)
        pairs += int(np.count_nonzero(known))
        boundaries += int(np.count_nonzero(known & (one != other)))
    return boundaries / pairs if pairs else 0.0


def random(name: str, seed: int = 0) -> float:
    """A number in [0, 1) from the image's name and a seed: the control, which knows nothing of the image.

    >>> random("a.png", seed=0) == random("a.png", seed=0), random("a.png", seed=0) == random("a.png", seed=1)
    (True, False)
    """
    digest = hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class Measure(NamedTuple):
    """A measure and what it looks at; all but the name are brought to the reference size first."""

    looks_at: Literal["luminance", "image", "label", "name"]
    function: Callable[..., float]


MEASURES = {
    "spatial_information": Measure("luminance", spatial_information),
    "entropy": Measure("image", entropy),
    "jpeg_bytes": Measure("image", jpeg_bytes),
    "label_boundary_density": Measure("label", label_boundary_density),
    "random": Measure("name", random),
}


def complexity(measure: str, sample: Sample, name: str, **options: Any) -> float:
    """The complexity of one sample at the reference size; `options` are the measure's own.

    >>> complexity("entropy", Sample(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)), "a.png")
    0.0
    """
    looks_at, function = MEASURES[measure]
    if looks_at == "luminance":
        # Averaged before rounding, and a third of the work of averaging three channels. Relative to one pixel, so that
        # averaging leaves a flat image exactly flat.
        y = luminance(sample.image)
        return function(reference_image(y - y[0, 0]), **options)
    if looks_at == "image":
        return function(reference_image(sample.image), **options)
    if looks_at == "label":
        return function(_at_reference_size(sample.label, SHORT_SIDE, cv2.INTER_NEAREST_EXACT), **options)
    return function(name, **options)


def check_measure(measure: str, options: dict[str, Any]) -> None:
    """Raise ValueError when there is no such measure, or it does not take these options.

    >>> check_measure("entropy", {"seed": 1})
    Traceback (most recent call last):
    ValueError: the measure entropy takes no option 'seed'; it takes: none
    """
    if measure not in MEASURES:
        raise ValueError(f"the complexity measure is {measure!r}; choose one of {', '.join(MEASURES)}")
    known = list(inspect.signature(MEASURES[measure].function).parameters)[1:]
    for key in options:
        if key not in known:
            raise ValueError(
                f"the measure {measure} takes no option {key!r}; it takes: {', '.join(known) if known else 'none'}"
            )


def classes_in(label: np.ndarray) -> np.ndarray:
    """The class indices that occur in a label, ascending, without IGNORE.

    >>> classes_in(np.array([[3, 0], [255, 3]], np.uint8)).tolist()
    [0, 3]
    """
    return np.flatnonzero(_histogram(label)[:IGNORE])


def quantiles(values: np.ndarray) -> np.ndarray:
    """Each value's place among all N, in (0, 1): (rank - 0.5) / N, equal values sharing their mean rank.

    With this form the share of images below a quantile q is q itself, and equal images all get one half. Take it
    over the images that are trained on. Raises ValueError for values that are not finite.

    >>> quantiles(np.array([30.0, 10.0, 20.0, 10.0])).tolist()  # ranks 4, 1.5, 3, 1.5
    [0.875, 0.25, 0.625, 0.25]
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"the complexity of image {bad} is {values[bad]}; every image needs a finite one")
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return ((np.cumsum(counts) - counts / 2) / max(1, len(values)))[group]


def _at_reference_size(pixels: np.ndarray, short_side: int, interpolation: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    shrink = short_side / min(height, width)
    if shrink >= 1:
        return pixels
    return cv2.resize(pixels, (round(width * shrink), round(height * shrink)), interpolation=interpolation)


_memory = threading.local()


def _scratch(count: int) -> np.ndarray:
    """Float32 values to work in, the same memory in every call of a thread: new memory would cost a fifth of the time.

    They begin on a cache line, since cv2.magnitude rounds by where its arrays begin, and an image must score the same
    to the last bit on every rank and after a restart.
    """
    if getattr(_memory, "floats", None) is None or len(_memory.floats) < count:
        floats = np.empty(count + 16, np.float32)
        start = -floats.ctypes.data % 64 // 4
        _memory.floats = floats[start : start + count]
    return _memory.floats[:count]


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """How often each of the 256 values occurs; exact while an image has fewer than 2**24 pixels of one value."""
    return cv2.calcHist([np.ascontiguousarray(pixels)], [0], None, [256], [0, 256]).ravel()
