"""From decoded samples to training batches: crop first, then one resize, then flip, straight into the batch's memory.

Random scale and data slimming's downsampling are one and the same resize, so a small image costs the worker less too.
Everything is drawn from (seed, epoch, image, occurrence), so a sample looks the same on any number of workers and
ranks and after a restart. What changes colours is albumentations', imported here only. Normalisation happens later, on
the device (`dance_seg.normalise`).

N images, H rows, W columns; images are RGB uint8, labels class indices uint8.
"""

import math
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dance_seg.data_slimming.adaptive import AdaptiveResolution
from dance_seg.normalise import downsampled
from dance_seg.randomness import Stream, generator, paired_generators
from dance_seg.sample import IGNORE, Batch, Draw, Sample
from datamodules.image_files import decodes
from datamodules.sources import num_threads

_BLUR_FROM = 1.25  # below this reduction bilinear interpolation alone is as close to averaging areas as Pillow's filter


class Images(Protocol):
    """Decoded images in a fixed order."""

    @property
    def names(self) -> Sequence[str]:
        """A name for each image."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Sample:
        """The image and label of one index."""
        ...


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How a training image is varied. A part that changes nothing is not run."""

    random_scale: tuple[float, float] = (0.5, 2.0)  # the image is enlarged by a factor drawn evenly between these
    flip: float = 0.5  # the probability of mirroring left and right
    color: float = 0.0  # strength, from 0 to 1, of changes in brightness, contrast, saturation and hue

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if len(self.random_scale) != 2 or not all(math.isfinite(scale) for scale in self.random_scale):
            raise ValueError(f"random_scale is {self.random_scale!r}; two numbers, such as (0.5, 2.0)")
        low, high = self.random_scale
        if not 0 < low <= high:
            raise ValueError(f"random_scale is {self.random_scale!r}; the first is above 0 and at most the second")
        for key in ("flip", "color"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} is {getattr(self, key)!r}; a number from 0 to 1")


class Window(NamedTuple):
    """The part of an image that becomes a training sample, in its pixels; it may reach beyond the image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def draw_window(
    shape: tuple[int, int], crop: tuple[int, int], augmentation: Augmentation, random: np.random.Generator
) -> Window:
    """The window of an image of `shape` (H, W) that a crop of size `crop` sees once the image is enlarged by a random
    factor: crop / factor. It lies anywhere inside the image, or the image anywhere inside it where it is larger.

    >>> augmentation = Augmentation(random_scale=(2.0, 2.0), flip=0.0)
    >>> window = draw_window((360, 480), (100, 200), augmentation, np.random.default_rng(0))
    >>> window.height, window.width, 0 <= window.top <= 310, 0 <= window.left <= 380
    (50, 100, True, True)
    """
    enlarge, down, across, flip = random.random(4).tolist()
    low, high = augmentation.random_scale
    factor = low + (high - low) * enlarge
    height, width = (max(1, round(side / factor)) for side in crop)
    return Window(
        _place(shape[0] - height, down), _place(shape[1] - width, across), height, width, flip < augmentation.flip
    )


def cut(sample: Sample, window: Window, image_out: np.ndarray, label_out: np.ndarray) -> None:
    """Resize the window of the sample into `image_out` uint8 (H, W, 3) and `label_out` uint8 (H, W), and flip.

    The image is smoothed before it is made smaller, the label takes the nearest pixel; both are aligned by pixel
    centres. Beyond the image the label is IGNORE and the image its own reflection, whose statistics BatchNorm meets
    again at inference, unlike those of a flat colour.
    """
    rows = _inside(window.top, window.height, sample.label.shape[0], label_out.shape[0])
    columns = _inside(window.left, window.width, sample.label.shape[1], label_out.shape[1])
    image, label = sample.image[rows.source, columns.source], sample.label[rows.source, columns.source]
    target = (rows.target, columns.target)
    padded = label_out[target].shape != label_out.shape
    if padded:
        label_out[:] = IGNORE
    resize(image, label, image_out[target], label_out[target])
    if padded:
        _reflect(image_out, rows.target, columns.target)
    if window.flip:
        cv2.flip(image_out, 1, dst=image_out)
        cv2.flip(label_out, 1, dst=label_out)


def resize(image: np.ndarray, label: np.ndarray, image_out: np.ndarray, label_out: np.ndarray) -> None:
    """Resize an image and its label to the sizes of `image_out` and `label_out`, smaller or larger.

    By whole factors areas are averaged exactly. What is left of the reduction, a factor r below 2, is a three-tap
    blur of variance (r^2 - 1) / 8 and bilinear interpolation, in a third of the time of OpenCV's INTER_AREA. On CamVid
    the two differ by 1 to 2.5 grey levels (root mean square) up to a reduction by 2, and by 4 to 5.5 beyond, where
    interpolation alone differs by 1 to 5.5 and 7 to 12. What the whole factor leaves over, less than one pixel of the
    result, is cut off at the edges, of image and label alike.
    """
    height, width = label_out.shape
    whole = min(label.shape[0] // height, label.shape[1] // width)
    if whole >= 2:
        kept = tuple(slice(side % whole // 2, side % whole // 2 + side // whole * whole) for side in label.shape)
        image, label = image[kept], label[kept]
    _resize_image(image, whole, image_out)
    cv2.resize(label, (width, height), dst=label_out, interpolation=cv2.INTER_NEAREST_EXACT)


def make_batch(
    source: Images, draws: Sequence[Draw], crop: tuple[int, int], augmentation: Augmentation, seed: int
) -> Batch:
    """The batch of these draws, written image by image into one buffer; images are (N, 3, H, W) in channels_last.

    `crop` is the size at full resolution of what a draw shows at its own size. Raises ValueError when the draws
    differ in size, and whatever `source.load` raises.
    """
    height, width = draws[0].size
    if any(draw.size != (height, width) for draw in draws):
        raise ValueError(f"the images of a batch have one size, got {sorted({draw.size for draw in draws})}")
    decodes_before = decodes()
    images = _empty_bytes(len(draws), height, width, 3)
    labels = _empty_bytes(len(draws), height, width)
    images_NHWC, labels_NHW = images.numpy(), labels.numpy()

    def write(numbers: range) -> None:
        for n in numbers:
            draw = draws[n]
            place = (seed, Stream.AUGMENTATION, draw.epoch, draw.index, draw.occurrence)
            sample = source.load(draw.index)
            shape = (sample.label.shape[0], sample.label.shape[1])
            window = draw_window(shape, crop, augmentation, generator(*place))
            cut(sample, window, images_NHWC[n], labels_NHW[n])
            if augmentation.color:
                images_NHWC[n] = _change_colors(images_NHWC[n], augmentation.color, place)

    # Every thread takes each `threads`-th image. A worker is one of many, and albumentations keeps its generators.
    threads = 1 if get_worker_info() or augmentation.color else min(num_threads(), len(draws))
    others = [_pool(os.getpid()).submit(write, range(first, len(draws), threads)) for first in range(1, threads)]
    write(range(0, len(draws), threads))
    for other in others:
        other.result()
    return Batch(
        images=images.permute(0, 3, 1, 2),
        labels=labels,
        weights=torch.tensor([draw.weight for draw in draws], dtype=torch.float32),
        names=tuple(source.names[draw.index] for draw in draws),
        progress=draws[0].progress,
        decodes=decodes() - decodes_before,
    )


class TrainingImages(Dataset):
    """Batches for a DataLoader whose batch sampler yields lists of Draw; its collate_fn has nothing left to do."""

    def __init__(self, source: Images, crop: tuple[int, int], augmentation: Augmentation, seed: int) -> None:
        self.source, self.crop, self.augmentation, self.seed = source, crop, augmentation, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw) -> Batch:
        return self.__getitems__([draw])

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        """The whole batch at once; DataLoader asks for it where this method is there."""
        return make_batch(self.source, draws, self.crop, self.augmentation, self.seed)


class EvaluationImages(Dataset):
    """Whole images, a batch of one each: the image at `resolution` times its size, the label at its own.

    With `adaptive` each image's complexity makes it smaller still. Raises ValueError for a resolution outside (0, 1].
    """

    def __init__(self, source: Images, resolution: float = 1.0, adaptive: AdaptiveResolution | None = None) -> None:
        if not 0 < resolution <= 1:
            raise ValueError(f"resolution is {resolution!r}; a number above 0 and at most 1")
        self.source, self.resolution, self.adaptive = source, resolution, adaptive

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        decodes_before = decodes()
        image, label = self.source.load(index)
        scale = self.resolution
        if self.adaptive is not None:
            scale *= self.adaptive.scale(image, self.source.names[index])
        return Batch(
            # Copied, since the source's may be read-only.
            images=torch.from_numpy(np.array(downsampled(image, scale))).permute(2, 0, 1)[None],
            labels=torch.from_numpy(np.array(label))[None],
            weights=torch.ones(1),
            names=(self.source.names[index],),
            decodes=decodes() - decodes_before,
        )


class NothingToCount(Dataset):
    """The first of some whole images without its label: for a rank that has no image of its own.

    Lightning passes over the validation of a rank without batches, and the others would wait for its counts.
    """

    def __init__(self, images: EvaluationImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Batch:
        batch = self.images[0]
        return batch._replace(labels=torch.full_like(batch.labels, IGNORE))


def worker_init(worker: int) -> None:
    """For DataLoader's worker_init_fn: the workers are the parallelism, OpenCV's threads would only get in the way.

    A signal that asks the run to end, which a terminal sends to all its processes, is the main process's to follow;
    SIGTERM is left alone, since that is how a worker is ended.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)


def _place(slack: int, share: float) -> int:
    """One of the |slack| + 1 offsets of a window in an image that is `slack` pixels larger (or smaller) than it."""
    offset = int(share * (abs(slack) + 1))
    return offset if slack >= 0 else -offset


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process; those of the process that it was forked from do not run in it."""
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="make_batch")


class _Inside(NamedTuple):
    source: slice  # the pixels of the image that lie in the window
    target: slice  # where they go


def _inside(start: int, length: int, length_source: int, length_target: int) -> _Inside:
    """Along one axis: the part of a window that lies in the image, and its place among `length_target` pixels."""
    first, last = max(start, 0), min(start + length, length_source)
    begin = min(round((first - start) * length_target / length), length_target - 1)
    end = max(begin + 1, round((last - start) * length_target / length))
    return _Inside(slice(first, last), slice(begin, end))


def _reflect(image: np.ndarray, rows: slice, columns: slice) -> None:
    """Fill what is outside `rows` and `columns` with the reflection of what is inside, in place."""
    height, width = image.shape[:2]
    sides = (rows.start, height - rows.stop, columns.start, width - columns.stop)
    cv2.copyMakeBorder(image[rows, columns], *sides, cv2.BORDER_REFLECT_101, dst=image)


def _resize_image(image: np.ndarray, whole: int, image_out: np.ndarray) -> None:
    height, width = image_out.shape[:2]
    if whole >= 2:
        size = (image.shape[1] // whole, image.shape[0] // whole)
        if size == (width, height):
            cv2.resize(image, size, dst=image_out, interpolation=cv2.INTER_AREA)
            return
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    down, across = image.shape[0] / height, image.shape[1] / width
    if max(down, across) > _BLUR_FROM:
        image = cv2.sepFilter2D(image, -1, _blur(across), _blur(down))
    cv2.resize(image, (width, height), dst=image_out, interpolation=cv2.INTER_LINEAR)


@lru_cache(maxsize=1024)
def _blur(reduction: float) -> np.ndarray:
    variance = max(0.0, min(reduction, 2.0) ** 2 - 1) / 8
    return np.array([variance / 2, 1 - variance, variance / 2], np.float32)


def _empty_bytes(*shape: int) -> Tensor:
    """A uint8 tensor, in shared memory in a worker process: what is made there need not be copied to be sent."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)  # type: ignore[call-overload]


@lru_cache(maxsize=1)
def _color_jitter(strength: float) -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for a newer version when it is imported
    import albumentations

    # Brightness reaches down to dusk, which is a quarter of a day's light; the rest varies evenly.
    brightness = (1 - 0.75 * strength, 1 + 0.5 * strength)
    span = (1 - 0.4 * strength, 1 + 0.4 * strength)
    hue = (-0.1 * strength, 0.1 * strength)
    jitter = albumentations.ColorJitter(brightness=brightness, contrast=span, saturation=span, hue=hue, p=1.0)
    return albumentations.Compose([jitter])


def _change_colors(image: np.ndarray, strength: float, place: tuple[int, ...]) -> np.ndarray:
    jitter = _color_jitter(strength)
    # One pair of generators for all transforms: seeded one by one they would all draw the same numbers.
    jitter.set_random_state(*paired_generators(*place))
    return jitter(image=image)["image"]
