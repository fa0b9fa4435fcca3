"""Predictions beside labels as pictures that fit into a page: read, coloured, errors marked, embedded."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.sample import IGNORE

T = TypeVar("T")
MAX_PIXELS = 64 << 20  # of one picture; the largest images of the field have a tenth
IGNORED = (0, 0, 0)  # the colour of pixels that are not scored
WRONG = (230, 30, 50)
WIDTHS = (640, 480, 360, 240, 160)  # of embedded pictures, tried in this order until all fit


class Indices(NamedTuple):
    """Class ids (H, W) uint8 and the colour of each id (256, 3)."""

    ids: np.ndarray
    palette: np.ndarray


def read_indices(path: Path) -> Indices:
    """The class ids and the palette of a palette PNG.

    Raises DataError when the file is no palette or grey picture.
    """
    picture = _opened(path)
    if picture.mode not in ("P", "L"):
        raise DataError(f"{path}: a {picture.mode} picture; labels and predictions are palette PNGs of class ids")
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    given = np.array(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3)[:256]
    palette[: len(given)] = given
    palette[IGNORE] = IGNORED
    return Indices(np.array(picture, np.uint8), palette)


def read_image(path: Path) -> np.ndarray:
    """An RGB image (H, W, 3) uint8.

    Raises DataError when the file cannot be read.
    """
    return np.array(_opened(path).convert("RGB"))


def points_right(label: np.ndarray, prediction: np.ndarray) -> float | None:
    """The share of right pixels among those that are scored, in points; None when there are none.

    >>> points_right(np.array([[0, 1, 255]]), np.array([[0, 0, 0]]))
    50.0
    """
    scored = label != IGNORE
    return float(100 * (prediction == label)[scored].mean()) if scored.any() else None


def marked_errors(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image faded to grey with wrong pixels in red, (H, W, 3) at the label's size; ignored pixels are dark.

    Raises ValueError when label and prediction differ in size.
    """
    if label.shape != prediction.shape:
        raise ValueError(f"the label is {label.shape} and the prediction {prediction.shape}; they must be of one size")
    height, width = label.shape
    grey = np.array(Image.fromarray(image).convert("L").resize((width, height), Image.Resampling.BILINEAR), np.float32)
    faded = np.repeat((110 + 0.5 * grey)[..., None], 3, axis=2)
    faded[label == IGNORE] *= 0.45
    wrong = (prediction != label) & (label != IGNORE)
    faded[wrong] = 0.25 * faded[wrong] + 0.75 * np.array(WRONG, np.float32)
    return faded.clip(0, 255).astype(np.uint8)


def embedded_image(image: np.ndarray, width: int) -> str:
    """A JPEG data URI of an RGB image (H, W, 3), at most `width` pixels wide."""
    picture = Image.fromarray(image)
    picture = picture.resize(_fitted(picture.size, width), Image.Resampling.BOX)
    return _uri(picture, "jpeg", quality=82, subsampling=0)


def embedded_indices(indices: Indices, width: int) -> str:
    """A palette PNG data URI of class ids, at most `width` pixels wide; colours are never mixed."""
    picture = Image.fromarray(indices.ids)
    picture = picture.resize(_fitted(picture.size, width), Image.Resampling.NEAREST)
    coloured = Image.frombytes("P", picture.size, picture.tobytes())
    coloured.putpalette(indices.palette.tobytes())
    return _uri(coloured, "png", optimize=True)


def fitted(make: Callable[[int], T], budget: int, size: Callable[[T], int], widths: Sequence[int] = WIDTHS) -> T:
    """What `make` makes at the largest width at which it stays within `budget` bytes, or at the smallest width."""
    for width in widths[:-1]:
        made = make(width)
        if size(made) <= budget:
            return made
    return make(widths[-1])


def _opened(path: Path) -> Image.Image:
    try:
        picture = Image.open(path, formats=("PNG",))
        if picture.width * picture.height > MAX_PIXELS:
            raise DataError(f"{path}: {picture.width} x {picture.height} pixels is no picture of a run")
        picture.load()
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds here
        raise DataError(f"{path}: cannot be read as a picture ({error})") from None
    return picture


def _fitted(size: tuple[int, int], width: int) -> tuple[int, int]:
    width = min(width, size[0])
    return width, max(1, round(size[1] * width / size[0]))


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
