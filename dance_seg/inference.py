"""From a network to labels: whole images, sliding windows, several scales, mirrored; and the scores of a split.

N images, C classes, H and W rows and columns of the labels, h and w of the images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dance_seg.early_exit.exits import ExitNetwork
from dance_seg.early_exit.policy import ExitPolicy, decide
from dance_seg.early_exit.tiles import decide_tiles
from dance_seg.evaluator import labels_from_logits, labels_of, refuse_not_finite
from dance_seg.metrics import Scores, confusion_matrix, scores
from dance_seg.normalise import normalise

if TYPE_CHECKING:
    from datamodules.base import SegmentationDataModule

SMALLEST_SCALE, LARGEST_SCALE = 0.1, 4.0


def _two_thirds(side: int) -> int:
    return max(1, round(2 * side / 3))


def _scales(value: Any) -> tuple[float, ...]:
    allowed = f"numbers from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}, each once, such as 0.75 1 1.25"
    if not isinstance(value, tuple | list) or not value:
        raise ValueError(f"scales is {value!r}: {allowed}")
    for scale in value:
        number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
        if not number or not SMALLEST_SCALE <= scale <= LARGEST_SCALE or value.count(scale) > 1:
            raise ValueError(f"scales holds {scale!r}: {allowed}")
    return tuple(float(scale) for scale in value)


def _size(value: Any, key: str) -> tuple[int, int]:
    whole = isinstance(value, tuple | list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    if not whole or len(value) != 2 or min(value) < 1:
        raise ValueError(f"{key} is {value!r}: height and width in pixels, such as 512 1024")
    return value[0], value[1]


@dataclass(frozen=True)
class Protocol:
    """How labels are taken from a network: what has to stand beside every figure.

    Each image is seen at each of the `scales` (times the size it is given at), and with `flip` mirrored as well. With
    a `window` (H, W) each view is cut into windows, one every `stride` (H, W) pixels, by default two thirds of the
    window. Raises ValueError for values that make no sense.

    >>> print(Protocol())
    whole image, scale 1, no flip
    >>> print(Protocol(scales=(0.5, 1.0), flip=True, window=(768, 768)))
    windows of 768 x 768 every 512 x 512 pixels, mean of scales 0.5 and 1, mean with horizontal flip
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse values that make no sense; lists become tuples."""
        object.__setattr__(self, "scales", _scales(self.scales))
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip is {self.flip!r}; True to average with the mirrored image, or False")
        if self.window is None:
            if self.stride is not None:
                raise ValueError(f"stride is {self.stride!r} but there is no window; give the window's size (H, W) too")
            return
        window = _size(self.window, "window")
        stride = _size(self.stride, "stride") if self.stride is not None else None
        if stride is not None and (stride[0] > window[0] or stride[1] > window[1]):
            raise ValueError(f"stride is {stride}, larger than the window {window}: pixels would be left out between")
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "stride", stride or (_two_thirds(window[0]), _two_thirds(window[1])))

    @property
    def views(self) -> int:
        """How many times the network sees each image."""
        return len(self.scales) * (1 + self.flip)

    def view_sizes(self, size: tuple[int, int]) -> dict[tuple[int, int], int]:
        """The sizes (H, W) at which whole images of `size` are seen, and how often each.

        >>> Protocol(scales=(0.5, 1), flip=True).view_sizes((20, 30))
        {(10, 15): 2, (20, 30): 2}
        """
        return {scaled_size(size, scale): 1 + self.flip for scale in self.scales}

    def windows(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """The windows (rows, columns) that cover an image; one for all of it where it is no larger than a window.

        >>> Protocol(window=(4, 6), stride=(3, 4)).windows(4, 9)
        [(slice(0, 4, None), slice(0, 6, None)), (slice(0, 4, None), slice(3, 9, None))]
        """
        if self.window is None or self.stride is None:
            return [(slice(0, height), slice(0, width))]
        rows = _intervals(height, self.window[0], self.stride[0])
        columns = _intervals(width, self.window[1], self.stride[1])
        return [(row, column) for row in rows for column in columns]

    def as_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        window, stride = (list(size) if size else None for size in (self.window, self.stride))
        return {"scales": list(self.scales), "flip": self.flip, "window": window, "stride": stride}

    def __str__(self) -> str:
        where = "whole image"
        if self.window is not None and self.stride is not None:
            (height, width), (down, right) = self.window, self.stride
            where = f"windows of {height} x {width} every {down} x {right} pixels"
        listed = [f"{scale:g}" for scale in self.scales]
        sizes = (
            f"scale {listed[0]}" if len(listed) == 1 else f"mean of scales {', '.join(listed[:-1])} and {listed[-1]}"
        )
        return f"{where}, {sizes}, {'mean with horizontal flip' if self.flip else 'no flip'}"


WHOLE = Protocol()
"""Each image once, as it is: how validation scores."""


class Predicted(NamedTuple):
    """A prediction and what it is compared with: train ids uint8 (H, W) both, IGNORE in the label only."""

    name: str
    prediction: np.ndarray
    label: np.ndarray
    exits: tuple[int, ...] = ()  # where a network with exits stopped, from 0, for each tile; none where nobody asked
    seen: tuple[int, int] = (0, 0)  # (h, w) at which the network saw the image; (0, 0) where a file holds what it said


class View(NamedTuple):
    """Logits of one view of the images, and how to bring them to its size: resize bilinearly, keep the first rows."""

    logits: Tensor  # (N, C, rows, columns) as the network makes them
    resized_to: tuple[int, int]
    kept: tuple[int, int]
    align_corners: bool

    def plane(self, index: int, size: tuple[int, int]) -> Tensor:
        """One class's logits (N, H, W) at `size`."""
        plane = self.logits[:, index : index + 1].float()
        plane = resized(plane, self.resized_to, self.align_corners)[..., : self.kept[0], : self.kept[1]]
        return resized(plane, size)[:, 0]


# A split ----------------------------------------------------------------------------------------------------------


def evaluate(model: nn.Module, datamodule: "SegmentationDataModule", split: str, protocol: Protocol = WHOLE) -> Scores:
    """The scores of a network on a split, at the labels' own resolution, with a progress bar."""
    num_classes = len(datamodule.classes)
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for found in predictions(model, datamodule, split, protocol):
        matrix += confusion_matrix(found.prediction, found.label, num_classes)
    return scores(matrix)


@torch.inference_mode()
def predictions(
    model: nn.Module,
    datamodule: "SegmentationDataModule",
    split: str,
    protocol: Protocol = WHOLE,
    policy: ExitPolicy | None = None,
    tile: tuple[int, int] | None = None,
) -> Iterator[Predicted]:
    """The prediction of each image of a split at its label's size, in the split's order, with a progress bar.

    With a `policy` a network with exits stops where it says, for the whole image or for each `tile` (H, W). Runs on the
    first CUDA device where there is one. Raises ValueError when logits are not finite, for a policy with a protocol of
    several views or a network of one exit, and for tiles without a policy or of images that are not at full size.
    """
    if tile is not None and policy is None:
        raise ValueError("tiles stop by a policy, and there is none; calibrate the network's exits first")
    if policy is not None and not (isinstance(model, ExitNetwork) and protocol == WHOLE):
        raise ValueError(f"exits are asked of whole images seen once, by a network that has exits; got {protocol}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    for batch in tqdm(datamodule.evaluation_loader(split), desc=f"evaluate {split}", unit="image"):
        height, width = batch.labels.shape[-2:]
        images = normalise(batch.images.to(device))
        exits: list[tuple[int, ...]] = [()] * len(batch.names)
        if policy is not None and isinstance(model, ExitNetwork):
            found, taken = decided(model, images, (height, width), policy, tile)
            exits = [tuple(of_image) for of_image in taken.tolist()]
        else:
            found = predict(model, images, (height, width), protocol)
        for name, prediction, label, left in zip(batch.names, found.numpy(), batch.labels.numpy(), exits, strict=True):
            yield Predicted(name, prediction, label, left, (images.shape[-2], images.shape[-1]))


def decided(
    model: ExitNetwork, images: Tensor, size: tuple[int, int], policy: ExitPolicy, tile: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Labels uint8 (N, H, W) at `size`, and the exits (N, T) of whole images (T = 1) or of their tiles."""
    if tile is None:
        whole = decide(model, images, size, policy)
        return whole.labels, whole.exits[:, None]
    if tuple(images.shape[-2:]) != size:
        raise ValueError(
            f"tiles are cut from images at the labels' size {size}, and these are {tuple(images.shape[-2:])}"
        )
    tiles = decide_tiles(model, images, policy, tile)
    return tiles.labels, tiles.exits.flatten(1)


# Images -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, size: tuple[int, int], protocol: Protocol = WHOLE) -> Tensor:
    """Class indices uint8 (N, H, W) on the CPU at `size`, from normalised images (N, 3, h, w).

    What is averaged where is MMSegmentation's convention (`slide_inference` and `aug_test` of its EncoderDecoder):

    * within a view, the logits of overlapping windows, at the view's own size; the last window of a row or column is
      shifted to end at the border, and a view no larger than the window goes whole;
    * over the views, scales and mirrored ones, softmax probabilities at `size`, to which each view's logits are
      resized bilinearly (align_corners=False) first and mirrored back after.

    Other than there, images are made smaller with antialiasing. The protocol WHOLE is `predict_labels`.

    Memory beside the network's own: nothing of full size for a whole image seen once. Otherwise one float32 array
    (N, C, H, W), which is 159 MB for an image of Cityscapes; windows seen in several views need one more, of the size
    of the view. Raises ValueError when logits are not finite.

    >>> model = nn.Conv2d(3, 5, 1)
    >>> predict(model, torch.zeros(1, 3, 8, 8), (16, 16), Protocol(scales=(0.5, 1), flip=True)).shape
    torch.Size([1, 16, 16])
    """
    if protocol.views > 1 or protocol.scales != (1.0,):
        return _labels(mean_probabilities(model, images, size, protocol), size)
    if len(protocol.windows(images.shape[-2], images.shape[-1])) == 1:
        return predict_labels(model, images, size)
    return _labels(slide(model, images, protocol), size)


@torch.no_grad()
def predict_labels(model: nn.Module, images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Class indices (N, H, W) uint8 at `size`, from normalised images (N, 3, h, w) seen once as they are.

    Logits are interpolated bilinearly to `size` where the images were smaller than the labels.
    Raises ValueError when logits are not finite.
    """
    if not hasattr(model, "coarse_logits"):
        return _labels(model(images), (size[0], size[1]))
    return labels_of(model.coarse_logits(images), images.shape[-2:], (size[0], size[1]))  # type: ignore[operator]


def mean_probabilities(model: nn.Module, images: Tensor, size: tuple[int, int], protocol: Protocol) -> Tensor:
    """Softmax probabilities (N, C, H, W) at `size`, averaged over the protocol's views."""
    total: Tensor | None = None
    for scale in protocol.scales:
        scaled = _scaled(images, scale)
        for mirrored in (False, True) if protocol.flip else (False,):
            view = logits_of(model, scaled.flip(-1) if mirrored else scaled, protocol)
            if total is None:
                total = torch.zeros(*view.logits.shape[:2], *size, device=images.device)
            add_probabilities(total, view, mirrored=mirrored)
    assert total is not None
    return total.div_(protocol.views)


def add_probabilities(total: Tensor, view: View, *, mirrored: bool) -> None:
    """Add a view's softmax probabilities to `total` (N, C, H, W), resizing class by class to spare memory."""
    size = (total.shape[-2], total.shape[-1])
    log_sum = view.plane(0, size)
    for index in range(1, total.shape[1]):
        log_sum = torch.logaddexp(log_sum, view.plane(index, size))
    for index in range(total.shape[1]):
        probability = (view.plane(index, size) - log_sum).exp_()
        total[:, index] += probability.flip(-1) if mirrored else probability


def logits_of(model: nn.Module, images: Tensor, protocol: Protocol) -> View:
    """The logits of one view of the images, whole or averaged over windows.

    Raises ValueError when they are not finite.
    """
    size = (images.shape[-2], images.shape[-1])
    if len(protocol.windows(*size)) > 1:
        return View(slide(model, images, protocol), size, size, align_corners=False)
    if hasattr(model, "coarse_logits"):
        logits, resized_to, align_corners = model.coarse_logits(images)  # type: ignore[operator]
        view = View(logits, tuple(resized_to), size, align_corners)
    else:
        logits = model(images)
        own = (logits.shape[-2], logits.shape[-1])
        view = View(logits, own, own, align_corners=False)
    refuse_not_finite(view.logits)
    return view


def slide(model: nn.Module, images: Tensor, protocol: Protocol) -> Tensor:
    """Logits (N, C, h, w) of images, averaged over the protocol's windows.

    Raises ValueError when they are not finite.
    """
    height, width = images.shape[-2:]
    count = torch.zeros(height, width, device=images.device)
    total: Tensor | None = None
    for rows, columns in protocol.windows(height, width):
        crop = images[..., rows, columns]
        logits = model(crop).float()
        refuse_not_finite(logits)
        if total is None:
            total = torch.zeros(*logits.shape[:2], height, width, device=images.device)
        total[..., rows, columns] += resized(logits, (crop.shape[-2], crop.shape[-1]))
        count[rows, columns] += 1
    assert total is not None
    return total.div_(count)


def resized(planes: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Planes (N, C, rows, columns) interpolated bilinearly to `size`; as they are where they have it."""
    if tuple(planes.shape[-2:]) == tuple(size):
        return planes
    return F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=align_corners)


def _scaled(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    size = scaled_size((images.shape[-2], images.shape[-1]), scale)
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width times a scale, halves up, and at least one pixel each."""
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def _labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.stack(labels_from_logits(logits, size, align_corners=False)))


def _intervals(length: int, window: int, stride: int) -> list[slice]:
    """Windows along one side: one each stride, the last one shifted to end at the border.

    >>> _intervals(10, 4, 4)
    [slice(0, 4, None), slice(4, 8, None), slice(6, 10, None)]
    """
    count = max(0, -(-(length - window) // stride)) + 1
    ends = [min(index * stride + window, length) for index in range(count)]
    return [slice(max(0, end - window), end) for end in ends]
