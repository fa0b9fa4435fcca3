"""Teachers: whatever can say what is on a frame. One interface: frame -> labels, boxes of objects where it has them.

A teacher's labels are indices of its `classes`, uint8 (H, W) at the frame's own size, IGNORE where it does not know.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.cost.macs import count_macs
from dance_seg.errors import DataError, first_line
from dance_seg.evaluator import labels_from_logits
from dance_seg.inference import WHOLE, predict
from dance_seg.inference import Protocol as Views
from dance_seg.normalise import downsampled, downsampled_size, normalise
from dance_seg.randomness import generator
from dance_seg.sample import IGNORE, Frame

MAX_PIXELS = 100_000_000  # of a mask, as its header says
_NOISE = 0x7EAC  # counter of an oracle's random numbers, which no Stream of dance_seg.randomness has


class Teaching(NamedTuple):
    """What a teacher says of one frame."""

    labels: np.ndarray  # (H, W) uint8, class index or IGNORE
    boxes: np.ndarray | None = None  # (n, 4) of objects, as x0 y0 x1 y1 in pixels; None where it knows no instances


class Teacher(Protocol):
    """Whatever labels frames of a video by `classes`."""

    classes: tuple[str, ...]

    def macs(self, size: tuple[int, int]) -> int | None:
        """MACs of labelling a frame of size (H, W); None where nobody knows."""

    def __call__(self, frame: Frame) -> Teaching:
        """The labels of a frame."""


def check_classes(teacher: Sequence[str], student: Sequence[str]) -> None:
    """Raise ValueError, naming the classes, unless a teacher's are the student's, in the same order.

    >>> check_classes(("road", "car"), ("road", "bus"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: teacher and student differ in classes: the teacher alone has car, the student alone has bus; ...
    """
    if tuple(teacher) == tuple(student):
        return
    only_teacher = [name for name in teacher if name not in student]
    only_student = [name for name in student if name not in teacher]
    if not only_teacher and not only_student:
        raise ValueError(
            "teacher and student have the same classes in another order: "
            f"{', '.join(teacher)} and {', '.join(student)}; labels are indices, so the order has to agree"
        )
    alone = {"teacher": only_teacher, "student": only_student}
    said = [f"the {who} alone has {', '.join(names)}" for who, names in alone.items() if names]
    raise ValueError(
        f"teacher and student differ in classes: {', '.join(said)}; "
        "take a teacher of the same classes, or one that maps its names to yours (names: {theirs: yours})"
    )


def network_input(image: np.ndarray, resolution: float, device: torch.device) -> Tensor:
    """A frame's image (H, W, 3) as a network takes it: made smaller, areas averaged, and normalised (1, 3, h, w).

    >>> tuple(network_input(np.zeros((20, 30, 3), np.uint8), 0.5, torch.device("cpu")).shape)
    (1, 3, 10, 15)
    """
    pixels = torch.from_numpy(np.require(downsampled(image, resolution), requirements=["C", "W"]))
    return normalise(pixels[None].permute(0, 3, 1, 2), device)


class NetworkTeacher:
    """Any network of the platform: normalised images (N, 3, H, W) -> logits (N, C, H, W).

    It sees frames at `resolution` times their size, once or, by `protocol`, at several scales and mirrored, which
    costs so many times more and labels better. Runs on the first CUDA device unless told where.

    >>> teacher = NetworkTeacher(nn.Conv2d(3, 2, 1), ("road", "car"))
    >>> teacher(Frame(0, 0.0, np.zeros((4, 6, 3), np.uint8))).labels.shape, teacher.macs((4, 6))
    ((4, 6), 144)
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        resolution: float = 1.0,
        device: str | None = None,
        protocol: Views = WHOLE,
    ) -> None:
        if not 0 < resolution <= 1:
            raise ValueError(f"teacher.resolution is {resolution}: above 0 and at most 1")
        self.protocol = protocol
        self.classes, self.resolution = tuple(classes), resolution
        self.device = _device(device)
        self.model = model.to(self.device).eval()
        self._macs: dict[tuple[int, int], int] = {}

    def macs(self, size: tuple[int, int]) -> int:
        """MACs of a frame of size (H, W), counted once for each size."""
        if size not in self._macs:
            views = self.protocol.view_sizes(downsampled_size(size, self.resolution))
            self._macs[size] = sum(number * count_macs(self.model, view).macs for view, number in views.items())
        return self._macs[size]

    def __call__(self, frame: Frame) -> Teaching:
        """The labels of a frame. Raises ValueError for logits that are not finite."""
        images = network_input(frame.image, self.resolution, self.device)
        height, width = frame.image.shape[:2]
        return Teaching(predict(self.model, images, (height, width), self.protocol)[0].numpy())


class RecordedTeacher:
    """Masks from disk: single-channel PNG of class indices, as `tools.evaluate --save` or any other teacher left them.

    `by="index"` takes the file whose name ends in the frame's index ("12.png", "frame_000012.png"), `by="order"` the
    n-th file by name. `macs` is what one mask cost when it was made. Raises DataError for a folder without masks and,
    when asked for a frame, for a mask that is missing, cannot be read or is of another size.
    """

    def __init__(
        self, folder: str | Path, classes: Sequence[str], *, by: str = "index", macs: int | None = None
    ) -> None:
        if by not in ("index", "order"):
            raise ValueError(f"teacher.by is {by!r}: index (the number at the end of a mask's name) or order")
        self.folder, self.classes, self._macs = Path(folder), tuple(classes), macs
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder of recorded masks")
        files = sorted(path for path in self.folder.iterdir() if path.suffix.lower() == ".png")
        self.masks = dict(enumerate(files)) if by == "order" else _by_index(files)
        if not self.masks:
            raise DataError(
                f"{self.folder}: holds no masks (.png named by the index of their frame, such as 000012.png)"
            )

    def macs(self, size: tuple[int, int]) -> int | None:
        """What one mask cost, if that was said."""
        return self._macs

    def __call__(self, frame: Frame) -> Teaching:
        """The recorded mask of a frame."""
        path = self.masks.get(frame.index)
        if path is None:
            raise DataError(
                f"{self.folder}: no mask of frame {frame.index}; {len(self.masks)} are there, of frames "
                f"{min(self.masks)} to {max(self.masks)}"
            )
        labels = _read_mask(path)
        if labels.shape != frame.image.shape[:2]:
            raise DataError(
                f"{path}: is {labels.shape[0]} x {labels.shape[1]}, frame {frame.index} is "
                f"{frame.image.shape[0]} x {frame.image.shape[1]}"
            )
        return Teaching(labels)


class OracleTeacher:
    """The ground truth of a drawn stream, with a share of it wrong: for tests, and for what a perfect teacher would do.

    `noise` is the share of squares of `block` pixels that get a class at random, drawn anew for each frame and the
    same whenever that frame is asked for.

    >>> teacher = OracleTeacher(("road", "car"), noise=0.0)
    >>> teacher(Frame(0, 0.0, np.zeros((1, 2, 3), np.uint8), label=np.uint8([[0, 1]]))).labels.tolist()
    [[0, 1]]
    """

    def __init__(
        self, classes: Sequence[str], *, noise: float = 0.0, block: int = 4, seed: int = 0, macs: int | None = None
    ) -> None:
        if not 0 <= noise <= 1:
            raise ValueError(f"teacher.noise is {noise}: a share in [0, 1]")
        if block < 1:
            raise ValueError(f"teacher.block is {block}: at least 1 pixel")
        self.classes, self.noise, self.block, self.seed, self._macs = tuple(classes), noise, block, seed, macs

    def macs(self, size: tuple[int, int]) -> int | None:
        """What was given."""
        return self._macs

    def __call__(self, frame: Frame) -> Teaching:
        """The labels of a frame. Raises ValueError for one without ground truth."""
        if frame.label is None:
            raise ValueError(f"frame {frame.index} has no ground truth, which the oracle teaches; take another teacher")
        if not self.noise:
            return Teaching(frame.label)
        height, width = frame.label.shape
        squares = (-(-height // self.block), -(-width // self.block))
        random = generator(self.seed, _NOISE, frame.index)
        wrong = (random.random(squares) < self.noise).astype(np.uint8)
        classes = random.integers(0, len(self.classes), squares, dtype=np.uint8)
        enlarge = np.ones((self.block, self.block), np.uint8)
        wrong, classes = (np.kron(values, enlarge)[:height, :width] for values in (wrong, classes))
        return Teaching(np.where((wrong == 1) & (frame.label != IGNORE), classes, frame.label))


class MaskRCNNTeacher:
    """torchvision's Mask R-CNN (ResNet-50, FPN, COCO), its instances painted to classes: the paper's teacher.

    `weights` is the state dict that torchvision publishes for maskrcnn_resnet50_fpn, loaded without running code.
    Instances of at least `score` are painted, the surest on top. `names` maps COCO's names to yours (car: vehicle);
    a name that is one of your classes needs no entry, others are left out. Pixels of no instance are of the class
    `unpainted`, or ignored where that is None. Raises DataError for a file that is not such weights, and ValueError
    for names that do not exist.
    """

    def __init__(
        self,
        weights: str | Path,
        classes: Sequence[str],
        *,
        score: float = 0.5,
        names: Mapping[str, str] | None = None,
        unpainted: str | None = "background",
        shorter_side: int = 800,
        device: str | None = None,
    ) -> None:
        from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn

        if not 0 <= score <= 1:
            raise ValueError(f"teacher.score is {score}: in [0, 1]")
        coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        self.classes, self.score, self.device = tuple(classes), score, _device(device)
        self.table = _table(coco, self.classes, names, IGNORE)
        self.unpainted = _index(self.classes, unpainted, "teacher.unpainted")
        model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=shorter_side)
        _load_weights(model, Path(weights))
        self.model = model.to(self.device).eval()
        self._macs: dict[tuple[int, int], int] = {}

    def macs(self, size: tuple[int, int]) -> int:
        """MACs of a frame without objects: a lower bound, since each instance costs its mask as well."""
        if size not in self._macs:
            self._macs[size] = count_macs(self.model, size).macs
        return self._macs[size]

    @torch.inference_mode()
    def __call__(self, frame: Frame) -> Teaching:
        """The painted instances of a frame, and their boxes."""
        image = torch.from_numpy(np.require(frame.image, requirements=["C", "W"])).to(self.device)
        found = self.model([image.permute(2, 0, 1).float() / 255])[0]
        kept = [
            (float(score), int(self.table[label]), mask[0] >= 0.5, box)
            for score, label, mask, box in zip(
                found["scores"], found["labels"], found["masks"], found["boxes"], strict=True
            )
            if float(score) >= self.score and self.table[label] != IGNORE
        ]
        boxes = torch.stack([box for *_, box in kept]).cpu().numpy() if kept else np.zeros((0, 4), np.float32)
        painted = paint(
            frame.image.shape[:2],
            [(score, index, mask.cpu().numpy()) for score, index, mask, _ in kept],
            IGNORE if self.unpainted is None else self.unpainted,
        )
        return Teaching(painted, boxes)


def paint(size: tuple[int, ...], instances: Sequence[tuple[float, int, np.ndarray]], unpainted: int) -> np.ndarray:
    """Labels uint8 (H, W) of instances (score, class, mask bool (H, W)), those of higher score over the others.

    >>> left, right = np.array([[True, True, False]]), np.array([[False, True, True]])
    >>> paint((1, 3), [(0.9, 1, left), (0.6, 2, right)], unpainted=0).tolist()
    [[1, 1, 2]]
    """
    labels = np.full(size, unpainted, np.uint8)
    for _, index, mask in sorted(instances, key=lambda instance: instance[0]):
        labels[mask] = index
    return labels


class HuggingFaceTeacher:
    """A semantic segmentation model of Hugging Face's transformers from a local folder; the network is never asked.

    The folder holds config.json, preprocessor_config.json and the weights as .safetensors; no code of it is run.
    `names` maps the model's labels to your classes; a label that is one of your classes needs no entry, all others
    are of the class `others`, or ignored where that is None. Needs `pip install transformers`. Raises DataError for a
    folder that is not such a model, ValueError for names that do not exist.
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str],
        *,
        names: Mapping[str, str] | None = None,
        others: str | None = None,
        device: str | None = None,
    ) -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise DataError(
                f"{folder}: is no folder of a Hugging Face model: it needs config.json, preprocessor_config.json and "
                "weights as .safetensors (pickled weights could run code and are not loaded)"
            )
        try:
            from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation  # type: ignore
        except ImportError:
            raise ValueError(
                "a Hugging Face teacher needs the package transformers, which is not there: pip install transformers"
            ) from None
        only_local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.processor = AutoImageProcessor.from_pretrained(str(folder), **only_local)
            model = AutoModelForSemanticSegmentation.from_pretrained(str(folder), use_safetensors=True, **only_local)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: cannot be loaded: {first_line(error)}") from error
        self.classes, self.device = tuple(classes), _device(device)
        self.model = model.to(self.device).eval()
        theirs = [model.config.id2label[index] for index in range(len(model.config.id2label))]
        rest = _index(self.classes, others, "teacher.others")
        self.table = _table(theirs, self.classes, names, IGNORE if rest is None else rest)
        self._macs: dict[tuple[int, int], int] = {}

    def macs(self, size: tuple[int, int]) -> int:
        """MACs of a frame of size (H, W), at the size to which the model's own processor brings it."""
        if size not in self._macs:
            height, width = self._input(np.zeros((*size, 3), np.uint8)).shape[-2:]
            self._macs[size] = count_macs(self.model, (height, width)).macs
        return self._macs[size]

    @torch.inference_mode()
    def __call__(self, frame: Frame) -> Teaching:
        """The labels of a frame."""
        logits = self.model(self._input(frame.image)).logits
        size = (frame.image.shape[0], frame.image.shape[1])
        return Teaching(self.table[labels_from_logits(logits, size, align_corners=False)[0]])

    def _input(self, image: np.ndarray) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)


TEACHERS: dict[str, Callable[..., Teacher]] = {
    "network": NetworkTeacher,
    "recorded": RecordedTeacher,
    "oracle": OracleTeacher,
    "mask_rcnn": MaskRCNNTeacher,
    "hugging_face": HuggingFaceTeacher,
}
"""The teachers a recipe can name; `network` is given a built model."""


def _device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _by_index(files: Sequence[Path]) -> dict[int, Path]:
    masks: dict[int, Path] = {}
    for path in files:
        number = re.search(r"(\d+)$", path.stem)
        if number is None:
            raise DataError(
                f"{path}: its name does not end in the index of a frame; rename it, or take teacher.by=order"
            )
        if int(number[1]) in masks:
            raise DataError(f"{path}: is a second mask of frame {int(number[1])}, beside {masks[int(number[1])].name}")
        masks[int(number[1])] = path
    return masks


def _read_mask(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.height} x {picture.width}"
                raise DataError(f"{path}: claims {size} pixels; a mask has {MAX_PIXELS:,} at most")
            if picture.mode not in ("L", "P"):
                raise DataError(f"{path}: is a picture of mode {picture.mode}; a mask holds one class index per pixel")
            return np.array(picture)
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds here
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from error


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; fetch maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth from download.pytorch.org/models once"
        ) from None
    except Exception as error:  # torch raises many kinds here
        raise DataError(f"{path}: is no state dict of maskrcnn_resnet50_fpn: {first_line(error)}") from error


def _index(classes: Sequence[str], name: str | None, key: str) -> int | None:
    if name is None:
        return None
    if name not in classes:
        raise ValueError(f"{key} is {name!r}; choose one of {', '.join(classes)}, or null to ignore those pixels")
    return classes.index(name)


def _table(theirs: Sequence[str], ours: Sequence[str], names: Mapping[str, str] | None, rest: int) -> np.ndarray:
    """Their class index -> ours, uint8."""
    names = dict(names or {})
    for their_name, our_name in names.items():
        if their_name not in theirs:
            raise ValueError(f"teacher.names: the teacher has no class {their_name!r}; it has {', '.join(theirs)}")
        if our_name not in ours:
            raise ValueError(f"teacher.names.{their_name} is {our_name!r}; choose one of {', '.join(ours)}")
    found = [names.get(name, name) for name in theirs]
    if not set(found) & set(ours):
        raise ValueError(
            f"the teacher's classes {', '.join(theirs)} are none of {', '.join(ours)}; map them by names: "
            "{theirs: yours}"
        )
    return np.array([ours.index(name) if name in ours else rest for name in found], np.uint8)
