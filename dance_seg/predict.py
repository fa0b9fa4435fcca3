"""From an image to labels by whatever holds a network: a run, a checkpoint, a safetensors or an ONNX file, or a folder
of ONNX files, one per exit; and labels as pictures a person can read.

Images are RGB uint8 (H, W, 3); labels are train ids uint8 (H, W), at the image's own size, by the protocol of a run's
own evaluation: the image made smaller by the recipe's `data.args.resolution`, areas averaged, the logits resized; with
`data_slimming.inference: adaptive` simple images are made smaller still, except by a folder of stages, whose files take
one size.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from dance_seg.normalise import downsampled

if TYPE_CHECKING:
    from PIL import Image

    from dance_seg.data_slimming.adaptive import AdaptiveResolution

CHECKPOINTS = (".ckpt", ".safetensors", ".onnx")
_TEXT, _SWATCH, _MARGIN, _LINE = 13, 14, 6, 22  # pixels of a legend


@dataclass(frozen=True)
class Predictor:
    """A network ready to label images: calling it with an image (H, W, 3) gives its labels (H, W).

    Raises ValueError for sizes that the network cannot take and for logits that are not finite.
    """

    path: Path  # of the file that holds the network
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    resolution: float  # images are made smaller by this factor
    runs_on: str  # such as "torch on cuda" or "onnxruntime, CPUExecutionProvider"
    labels_at: Callable[[np.ndarray, tuple[int, int]], np.ndarray]  # of a smaller image, at a size (H, W)
    adaptive: "AdaptiveResolution | None" = None  # makes simple images smaller still

    def __call__(self, image: np.ndarray, name: str = "") -> np.ndarray:
        """The labels of one image, at its own size; its name matters to the random control alone."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is RGB uint8 (H, W, 3), got {image.dtype} {image.shape}")
        scale = self.adaptive.scale(image, name) if self.adaptive is not None else 1.0
        return self.labels_at(downsampled(image, scale * self.resolution), (image.shape[0], image.shape[1]))


def load_predictor(
    path: str | Path, *, checkpoint: str = "best", resolution: float | None = None, deadline_ms: float | None = None
) -> Predictor:
    """What labels images: from a run folder (its `best`, `last` or a named checkpoint) or a file that holds a network.

    ONNX files run by onnxruntime, the others by torch; each on a GPU where it finds one. A network with exits stops as
    it was calibrated, also where its stages are a folder of ONNX files. With `deadline_ms` it answers by the first exit
    at which so many milliseconds are over since it was given the image (anytime inference), asking every exit, or
    earlier where it is sure. `resolution` is the recipe's by default. Raises ValueError, naming the path, for what
    holds no network of this project, and for a deadline of one without exits or of ONNX files.
    """
    path = Path(path)
    if deadline_ms is not None and not 0 <= deadline_ms < math.inf:
        raise ValueError(f"deadline_ms is {deadline_ms!r}; milliseconds from 0 up, after which an image leaves")
    if deadline_ms is not None and (path.suffix.lower() == ".onnx" or any(path.glob("stage_*.onnx"))):
        raise ValueError(f"{path}: a deadline is asked of networks that run by torch; give the run or its checkpoint")
    if resolution is not None and not 0 < resolution <= 1:
        raise ValueError(f"resolution is {resolution!r}; a number above 0 and at most 1")
    if path.suffix.lower() == ".onnx":
        return _onnx_predictor(path, resolution)
    if path.is_dir() and any(path.glob("stage_*.onnx")):
        return _stages_predictor(path, resolution)
    return _torch_predictor(path, checkpoint, resolution, deadline_ms)


def palette_picture(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> "Image.Image":
    """Labels as a palette picture: shown in the classes' colours, read as train ids (its indices).

    >>> picture = palette_picture(np.array([[0, 1, 255]], np.uint8), [(128, 0, 0), (0, 128, 0)])
    >>> np.array(picture).tolist(), np.array(picture.convert("RGB"))[0, 1].tolist()
    ([[0, 1, 255]], [0, 128, 0])
    """
    from PIL import Image

    picture = Image.frombytes("P", (labels.shape[1], labels.shape[0]), np.ascontiguousarray(labels).tobytes())
    # All 256 colours: with fewer Pillow writes 4 bits a pixel, and an ignored 255 becomes 15.
    picture.putpalette(_colors(palette).tobytes())
    return picture


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.5
) -> np.ndarray:
    """The image with the classes' colours laid over it, from opacity 0 (the image) to 1 (the colours).

    >>> overlay(np.full((1, 1, 3), 100, np.uint8), np.zeros((1, 1), np.uint8), [(200, 0, 100)]).tolist()
    [[[150, 50, 100]]]
    """
    return cv2.addWeighted(image, 1 - opacity, _colors(palette)[labels], opacity, 0)


def legend(classes: Sequence[str], palette: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """A strip (h, at least width, 3) on white that names each class beside its colour, in as many lines as it takes."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TEXT)
    lengths = [_SWATCH + 3 * _MARGIN + int(np.ceil(font.getlength(name))) for name in classes]
    width = max([width, *(length + 2 * _MARGIN for length in lengths)])
    places, x, y = [], _MARGIN, _MARGIN
    for length in lengths:
        if x > _MARGIN and x + length > width:
            x, y = _MARGIN, y + _LINE
        places.append((x, y))
        x += length
    strip = Image.new("RGB", (width, y + _LINE), "white")
    draw = ImageDraw.Draw(strip)
    for name, color, (left, top) in zip(classes, palette, places, strict=True):
        draw.rectangle((left, top, left + _SWATCH, top + _SWATCH), fill=tuple(color), outline="black")
        draw.text((left + _SWATCH + _MARGIN, top + _SWATCH // 2), name, fill="black", font=font, anchor="lm")
    return np.array(strip)


def figure(image: np.ndarray, labels: np.ndarray, predictor: Predictor, opacity: float = 0.5) -> np.ndarray:
    """The image, beside it the image under its labels, and below the names of the classes found in it."""
    found = [index for index in np.unique(labels).tolist() if index < len(predictor.classes)]
    pictures = np.hstack([image, overlay(image, labels, predictor.palette, opacity)])
    names = [predictor.classes[index] for index in found]
    return stacked(pictures, legend(names, [predictor.palette[index] for index in found], pictures.shape[1]))


def stacked(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Two pictures one under the other, the narrower one continued in white.

    >>> stacked(np.zeros((2, 3, 3), np.uint8), np.zeros((1, 5, 3), np.uint8)).shape
    (3, 5, 3)
    """
    width = max(above.shape[1], below.shape[1])
    return np.vstack([_widened(above, width), _widened(below, width)])


def label_video(
    frames: Iterable[np.ndarray], predictor: Predictor, opacity: float = 0.5, most_named: int = 40
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For each frame (H, W, 3) its labels (H, W) and its overlay above the names of all classes, height and width even.

    Beyond `most_named` classes the names are left out, since they would take more room than the frame.
    """
    names: np.ndarray | None = None
    for frame in frames:
        labels = predictor(frame)
        shown = overlay(frame, labels, predictor.palette, opacity)
        if len(predictor.classes) <= most_named:
            if names is None or names.shape[1] < frame.shape[1]:
                names = legend(predictor.classes, predictor.palette, frame.shape[1])
            shown = stacked(shown, names)
        height, width = shown.shape[:2]
        yield labels, np.pad(shown, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _onnx_predictor(path: Path, resolution: float | None) -> Predictor:
    from dance_seg.export import OnnxFile
    from dance_seg.export_exits import is_stage

    if is_stage(path):
        raise ValueError(f"{path}: is one stage of a network with exits; give its folder, {path.parent}")
    file = OnnxFile(path)
    return _predictor(path, file.record, resolution, f"onnxruntime, {file.provider}", partial(_labels_by_onnx, file))


def _stages_predictor(folder: Path, resolution: float | None) -> Predictor:
    from dance_seg.export_exits import StagesOnnx

    stages = StagesOnnx(folder)
    runs_on = f"onnxruntime, {stages.provider}, {stages.num_exits} exits"
    predictor = _predictor(folder, stages.record, resolution, runs_on, partial(_labels_by_stages, stages))
    return replace(predictor, adaptive=None)  # stages take images of one size


def _torch_predictor(path: Path, checkpoint: str, resolution: float | None, deadline_ms: float | None) -> Predictor:
    import torch

    from dance_seg.build import load_model, load_run
    from dance_seg.calibration import calibrated_policy
    from dance_seg.early_exit.exits import ExitNetwork
    from dance_seg.early_exit.policy import never_early
    from dance_seg.export import load_safetensors

    if path.is_dir():
        model, record, path = load_run(path, checkpoint)
    elif not path.exists():
        load_run(path)  # says which runs there are
        raise AssertionError
    elif path.suffix.lower() == ".safetensors":
        model, record = load_safetensors(path)
    elif path.suffix.lower() == ".ckpt":
        model, record = load_model(path)
    else:
        raise ValueError(f"{path}: holds no network; give a run folder or a file ending in {', '.join(CHECKPOINTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = calibrated_policy(record, model, at=str(path)) if isinstance(model, ExitNetwork) else None
    if deadline_ms is not None:
        if not isinstance(model, ExitNetwork):
            raise ValueError(f"{path}: has one exit, so no answer before its end; leave the deadline out")
        policy = policy or never_early(model.num_exits)
    call = partial(_labels_by_torch, model.to(device).eval(), device, policy, deadline_ms)
    return _predictor(path, record, resolution, f"torch on {device.type}", call)


def _predictor(path: Path, record: dict[str, Any], resolution: float | None, runs_on: str, call: Any) -> Predictor:
    if resolution is None:
        resolution = float(record["recipe"]["data"].get("args", {}).get("resolution", 1.0))
    from dance_seg.recipe import adaptive_of

    labels = record["labels"]
    palette = tuple((int(red), int(green), int(blue)) for red, green, blue in labels["palette"])
    return Predictor(path, tuple(labels["classes"]), palette, resolution, runs_on, call, adaptive_of(record))


def _labels_by_onnx(file: Any, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import torch

    from dance_seg.evaluator import labels_from_logits

    logits = file.logits(image.transpose(2, 0, 1)[None])
    try:
        return labels_from_logits(torch.from_numpy(np.ascontiguousarray(logits)), size, align_corners=False)[0]
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _labels_by_stages(stages: Any, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return stages.labels(image, size).labels[0].numpy()


def _labels_by_torch(
    model: Any, device: Any, policy: Any, deadline_ms: float | None, image: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    import torch

    from dance_seg.early_exit.policy import decide
    from dance_seg.inference import predict_labels
    from dance_seg.normalise import normalise

    passed = None if deadline_ms is None else partial(_is_over, time.perf_counter() + deadline_ms / 1000)
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    with torch.inference_mode():
        images = normalise(pixels, device)
        found = decide(model, images, size, policy, passed).labels if policy else predict_labels(model, images, size)
        return found[0].numpy()


def _is_over(until: float) -> bool:
    return time.perf_counter() >= until


def _colors(palette: Sequence[Sequence[int]]) -> np.ndarray:
    """The colour of each of 256 ids; black for those that are no class."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    return colors


def _widened(picture: np.ndarray, width: int) -> np.ndarray:
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
