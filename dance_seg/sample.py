"""The records that flow from the data to the loss.

N images in a batch, C channels or classes, H rows, W columns. Labels hold class indices, or IGNORE where
the data set does not say what is there.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor  # a record need not wait for torch to load

IGNORE = 255
"""The label of a pixel that counts neither in the loss nor in a score."""


class Draw(NamedTuple):
    """One image as an epoch's plan wants it: everything a worker needs, so that a worker keeps no state."""

    index: int  # type: ignore[assignment]  # which image of the training set
    size: tuple[int, int]  # (H, W) after downsampling, divisible by the model's stride
    weight: float = 1.0  # how much this image counts in the loss; mean 1 over the epoch's plan
    epoch: int = 0  # with index and occurrence: the counter of the augmentation's randomness
    occurrence: int = 0  # 1 when the image comes a second time in the epoch, carried over from the one before
    progress: float = 0.0  # where in training its batch stands, in [0, 1]


class Sample(NamedTuple):
    """An image with its label, as decoded: RGB uint8 (H, W, 3) and class indices uint8 (H, W)."""

    image: np.ndarray
    label: np.ndarray


class Batch(NamedTuple):
    """What one step sees; every image of a batch has the same size.

    Leaves the loader as uint8 images and labels (a quarter of the bytes to move) and is normalised on the device.
    """

    images: "Tensor"  # (N, 3, H, W): uint8 from the loader, float32 normalised on the device
    labels: "Tensor"  # (N, H, W): uint8 from the loader, int64 on the device; class index or IGNORE
    weights: "Tensor"  # (N,) float32
    names: tuple[str, ...]
    progress: float = 0.0  # where in training this batch stands, in [0, 1]
    decodes: int = 0  # image files decoded for this batch; 0 where the decoded cache served it


class Frame(NamedTuple):
    """One image of a video, in order of time."""

    index: int  # type: ignore[assignment]  # its place in the stream from 0; frames that are dropped count too
    seconds: float  # since the stream began
    image: np.ndarray  # RGB uint8 (H, W, 3)
    label: np.ndarray | None = None  # ground truth, class indices uint8 (H, W), where it exists
    cut: bool | None = None  # whether the scene changes with this frame; None where nobody knows


class CoarseLogits(NamedTuple):
    """Logits as the network makes them, and how to bring them to the size of the images.

    Resize them bilinearly to `padded_size` and keep the first H rows and W columns, for images of H x W.
    """

    logits: "Tensor"  # (N, C, h, w)
    padded_size: tuple[int, int]  # of the images as the network saw them
    align_corners: bool  # how they are to be resized, in the sense of torch's interpolate
