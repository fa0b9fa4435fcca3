"""A trained network as a file that other programs run: ONNX, compared with the network before it is put in place, and
safetensors, weights with the record that builds the network again.

Both carry what a reader must know as JSON strings in their own metadata: classes and colours, the recipe, the sizes
the network takes, how pixels become its input, the protocol its scores were taken by, and its structure. What a file
of this project is told by is the key `dance_seg.version`. Paths of the machine that trained are left out.

N images, C classes, H rows, W columns.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.errors import CheckpointError, DataError
from dance_seg.evaluator import labels_from_logits
from dance_seg.metrics import confusion_matrix, scores
from dance_seg.network_slimming.structure import structure_hash, structure_record
from dance_seg.normalise import MEAN, STD, normalise

OPSET = 18
"""The version of ONNX's operators: what the exporter writes by itself, and runtimes of the last years read."""

AGREEMENT = 0.9999
"""The share of pixels on which file and network must give the same class."""

ROUNDING = 1e-4
"""Of the largest logit: what two programs may differ by that add up in another order."""

VERSION = 2  # of the metadata below
_PREFIX = "dance_seg."
_INPUT, _OUTPUT = "images", "logits"
_LARGEST = 2**31 - 1  # bytes of one protobuf message
_PRIVATE = ("root", "cache_dir")  # of data.args: paths of the machine that trained


@dataclass(frozen=True)
class Sizes:
    """Which images a network takes as they are; others are padded at the bottom and on the right, or refused."""

    multiple_of: int = 32  # height and width must be divisible by this
    at_least: int = 32
    only: tuple[int, int] | None = None  # the one size (H, W) of a file that was exported for one

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) at which the network runs on an image. Raises ValueError when it cannot.

        >>> Sizes(32, 64).padded(45, 100)
        (64, 128)
        """
        rows, columns = (
            max(-(-side // self.multiple_of) * self.multiple_of, self.at_least) for side in (height, width)
        )
        if self.only is not None and (rows, columns) != self.only:
            raise ValueError(
                f"the network was exported for images of {self.only[0]}x{self.only[1]}, and this one is "
                f"{height}x{width} ({rows}x{columns} when padded); choose another resolution, or export again with "
                f"--size {rows} {columns}"
            )
        return rows, columns


@dataclass(frozen=True)
class Agreement:
    """How well an ONNX file repeats its network on some images."""

    argmax: float  # share of the pixels, at the size of the network's input, that get the same class
    largest_difference: float  # of a logit
    largest_logit: float  # absolute, of the network, to compare the difference with
    images: int
    pixels: int
    miou_network: float | None  # in points at the labels' size; None without labels
    miou_file: float | None


class OnnxFile:
    """A network in an ONNX file of this project, run by onnxruntime: uint8 images of any size -> logits.

    `threads` are onnxruntime's own; 0 is as many as it likes. Raises DataError for a file that is missing, damaged, not
    ONNX, or without this project's metadata, and ValueError when onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, *, threads: int = 0, named: str | Path | None = None) -> None:
        self.path = Path(named or path)
        runtime = _library("onnxruntime", "run")
        if not Path(path).is_file():
            raise DataError(f"{self.path}: no such file; python -m tools.export RUN writes ONNX files")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong is raised and said by us
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [provider for provider in wanted if provider in runtime.get_available_providers()]
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime raises many kinds here
            raise DataError(f"{self.path}: no ONNX file that can be run: {_first_line(error)}") from None
        self.provider = self._session.get_providers()[0]
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.record, self.sizes, self.structure = _read_metadata(metadata, self.path)

    def logits(self, images_NCHW: np.ndarray) -> np.ndarray:
        """Logits float32 (N, C, H, W) of RGB images uint8 (N, 3, H, W), padded by reflection where they need it.

        Raises ValueError, naming the file, for sizes that the network cannot take and when the run fails.
        """
        if images_NCHW.dtype != np.uint8 or images_NCHW.ndim != 4 or images_NCHW.shape[1] != 3:
            raise ValueError(
                f"{self.path} takes uint8 images (N, 3, H, W), got {images_NCHW.dtype} {images_NCHW.shape}"
            )
        height, width = images_NCHW.shape[2:]
        try:
            rows, columns = self.sizes.padded(height, width)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        down, right = rows - height, columns - width
        if down or right:
            mode: Any = "reflect" if down < height and right < width else "edge"
            images_NCHW = np.pad(images_NCHW, ((0, 0), (0, 0), (0, down), (0, right)), mode=mode)
        try:
            (logits,) = self._session.run([_OUTPUT], {_INPUT: np.ascontiguousarray(images_NCHW)})
        except Exception as error:  # onnxruntime raises many kinds here
            raise ValueError(f"{self.path}: cannot be run at {rows}x{columns}: {_first_line(error)}") from None
        return logits[..., :height, :width]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int],
    record: Mapping[str, Any],
    images: Sequence[np.ndarray] = (),
    labels: Sequence[np.ndarray] = (),
    any_size: bool = True,
    at_least: float = AGREEMENT,
) -> Agreement:
    """Write a network to an ONNX file that is put in place only once it agrees with the network.

    The graph takes RGB pixels, uint8 (N, 3, H, W), and holds the normalisation, since constants that are missing or
    wrong are how exported networks silently lose points; it gives float32 logits (N, C, H, W). It takes any number of
    images, of any height and width that are multiples of the network's stride; with `any_size=False` of `input_size`
    (H, W) only, for networks that do not export otherwise. `record` is what `load_run` returned with the network.
    `images` (H, W, 3) and `labels` (H, W) of train ids are what the file is checked on; without them, drawn pictures.

    Raises ValueError when the network cannot be exported or when the file disagrees (see check_onnx); what was at
    `path` before is then untouched.
    """
    path = Path(path)
    for library in ("onnx", "onnxscript"):
        _library(library, "export")
    if sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) > _LARGEST:
        raise ValueError(f"{path}: not written: an ONNX file holds 2 GiB at most; export to safetensors instead")
    sizes = _sizes(model, None)
    size = sizes.padded(*input_size)
    if not any_size:
        sizes = _sizes(model, size)
    program = _exported(model, size, sizes, path)
    for node in (node for graph in (program.model.graph, *program.model.functions.values()) for node in graph):
        node.metadata_props.clear()  # stack traces with the paths of this machine, most of a small file
    program.model.metadata_props.update(_metadata(model, record, sizes))
    with _whole(path, lambda: program.model_proto.SerializeToString()) as temporary:
        file = OnnxFile(temporary, threads=torch.get_num_threads(), named=path)
        return _agreement(file, model, images or drawn_images(_tried(size, sizes)), labels, at_least)


def check_onnx(
    model: nn.Module,
    path: str | Path,
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray] = (),
    *,
    at_least: float = AGREEMENT,
) -> Agreement:
    """Run an ONNX file and the network side by side on uint8 images (H, W, 3), with labels (H, W) where there are some.

    Raises ValueError, naming file, figure, threshold and what to do, when the file is of another network, when less
    than `at_least` of the pixels get the same class, or when either gives logits that are not finite.
    """
    return _agreement(OnnxFile(path, threads=torch.get_num_threads()), model, images, labels, at_least)


def export_safetensors(model: nn.Module, path: str | Path, *, record: Mapping[str, Any]) -> Path:
    """Write the weights of a network, with the record that builds it again, to a safetensors file; whole or not at all.

    The metadata also holds the SHA-256 of the tensors, since the format itself does not notice a flipped bit.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = _metadata(model, record, _sizes(model, None))
    metadata[_PREFIX + "tensors"] = json.dumps(structure_record(model))
    metadata[_PREFIX + "sha256"] = json.dumps(_digest(tensors))
    with _whole(path, lambda: save(tensors, metadata)):
        return path


def load_safetensors(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a safetensors file, on the CPU in evaluation mode, and its record (recipe, labels).

    Raises CheckpointError when the file is missing, damaged or holds no network of this project.
    """
    from safetensors import SafetensorError, safe_open

    from dance_seg.build import model_of_record  # brings the training libraries; an ONNX file is run without

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; python -m tools.export RUN --to safetensors writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: no safetensors file that can be read: {_first_line(error)}") from None
    try:
        record, _, _ = _read_metadata(metadata, path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    digest, structure = (_read(metadata, key, path) for key in ("sha256", "tensors"))
    if digest != _digest(tensors):
        raise CheckpointError(f"{path}: is damaged: its tensors are not those it was written with; export it again")
    return model_of_record(record, structure, tensors, at=str(path)), record


def drawn_images(sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Smooth coloured pictures uint8 (H, W, 3) of these sizes, the same ones each time.

    >>> [image.shape for image in drawn_images([(64, 96), (48, 48)])]
    [(64, 96, 3), (48, 48, 3)]
    """
    import cv2

    random, images = np.random.default_rng(0), []
    for height, width in sizes:
        picture = sum(
            cv2.resize(random.uniform(0, 255, (cells, cells, 3)), (width, height), interpolation=cv2.INTER_CUBIC) / 3
            for cells in (4, 12, 32)
        )
        images.append(np.clip((picture - 127.5) * 1.7 + 127.5, 0, 255).astype(np.uint8))
    return images


def protocol(resolution: float) -> str:
    """How labels come from an image, in words.

    >>> protocol(1.0)[:27]
    'whole images at full size; '
    """
    scaled = "full size" if resolution == 1 else f"{resolution:g} of their size, areas averaged"
    return (
        f"whole images at {scaled}; padded at the bottom and on the right by reflection to what the network takes, "
        "logits cut back, resized bilinearly to the image's own size (align_corners=False), argmax; RGB"
    )


class _FromPixels(nn.Module):
    """uint8 images (N, 3, H, W) -> logits, normalisation included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(normalise(images))


class _BinAverages(nn.Module):
    """AdaptiveAvgPool2d as two products, which export with sizes left open.

    The exporter unrolls AdaptiveAvgPool2d for the size it was shown; at other sizes it fails or takes other pixels.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, maps: Tensor) -> Tensor:
        rows, columns = (
            _bins(length, bins, maps) for length, bins in zip(maps.shape[-2:], (self.rows, self.columns), strict=True)
        )
        return rows @ maps @ columns.T


def _bins(length: int, bins: int, like: Tensor) -> Tensor:
    """The share (bins, length) of each pixel in the average of each bin, which overlap as in torch."""
    bin_number = torch.arange(bins, device=like.device)[:, None]
    start, end = bin_number * length // bins, ((bin_number + 1) * length + bins - 1) // bins
    place = torch.arange(length, device=like.device)[None]
    return ((place >= start) & (place < end)).to(like.dtype) / (end - start).to(like.dtype)


def _with_open_pooling(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in evaluation mode, whose pooling into bins does not depend on the size."""
    copied = deepcopy(model).to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    for path, module in list(copied.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d):
            given = module.output_size
            rows, columns = given if isinstance(given, tuple) else (given, given)
            if rows is not None and columns is not None and (rows, columns) != (1, 1):
                parent, _, name = path.rpartition(".")
                setattr(copied.get_submodule(parent), name, _BinAverages(rows, columns))
    return copied


def _exported(model: nn.Module, size: tuple[int, int], sizes: Sizes, path: Path) -> Any:
    """The ONNX program of a network for images of `size`, with sizes left open unless they are fixed."""
    stride = sizes.multiple_of
    shapes: dict[int, Any] = {0: torch.export.Dim("N", min=1)}
    if sizes.only is None:
        # A length of one multiple would be taken for a constant.
        size = (max(size[0], 2 * stride), max(size[1], 2 * stride))
        least = -(-sizes.at_least // stride)
        shapes |= {2: stride * torch.export.Dim("h", min=least), 3: stride * torch.export.Dim("w", min=least)}
    whole = _FromPixels(_with_open_pooling(model)).eval()
    example = torch.zeros((2, 3, *size), dtype=torch.uint8)
    try:
        with _quiet(), torch.no_grad():
            # Traced before the exporter is told of it: SMP takes another path when it knows, one of a fixed size.
            traced = torch.export.export(whole, (example,), dynamic_shapes={"images": shapes}, strict=False)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
            )
    except Exception as error:  # torch and onnxscript raise many kinds here
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        rows, columns = size
        other = (
            f"; try one size only: any_size=False, or python -m tools.export RUN --one-size --size {rows} {columns}"
            if sizes.only is None
            else "; safetensors holds any network of this project: --to safetensors"
        )
        raise ValueError(f"{path}: torch.onnx cannot export this network: {_first_line(cause)}{other}") from error
    assert program is not None
    return program


def _agreement(
    file: OnnxFile, model: nn.Module, images: Sequence[np.ndarray], labels: Sequence[np.ndarray], at_least: float
) -> Agreement:
    if labels and len(labels) != len(images):
        raise ValueError(
            f"there are {len(images)} images and {len(labels)} labels; give a label for each image, or none"
        )
    if not images:
        raise ValueError(f"{file.path}: nothing to check it on; give at least one image")
    if file.structure != structure_hash(model):
        raise ValueError(
            f"{file.path} holds another network than the one it is checked against: other layers or other widths; "
            "export it again from this run, or check it against the run that it came from"
        )
    device = next(model.parameters()).device
    num_classes = len(file.record["labels"]["classes"])
    matrices = np.zeros((2, num_classes, num_classes), np.int64)
    same = pixels = 0
    difference = largest = 0.0
    with torch.inference_mode():
        for number, image in enumerate(images):
            pixels_NCHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()
            logits = [
                model(normalise(pixels_NCHW, device)).float().cpu(),
                torch.from_numpy(np.array(file.logits(pixels_NCHW.numpy()))),
            ]
            if logits[0].shape != logits[1].shape:
                raise ValueError(
                    f"{file.path}: gives logits {tuple(logits[1].shape)} where the network gives "
                    f"{tuple(logits[0].shape)}; export it again"
                )
            by_network, by_file = (_labels(each, image.shape[:2], file.path) for each in logits)
            same += int((by_network == by_file).sum())
            pixels += by_network.size
            difference = max(difference, float((logits[0] - logits[1]).abs().max()))
            largest = max(largest, float(logits[0].abs().max()))
            if labels:
                for matrix, each in zip(matrices, logits, strict=True):
                    predicted = _labels(each, labels[number].shape, file.path)
                    matrix += confusion_matrix(predicted, labels[number], num_classes)
    share = same / pixels
    if share < at_least:
        if difference < ROUNDING * largest:
            why = (
                "That is rounding: the network hardly tells the classes apart here. Compare on more images of its own "
                "data (--images 50 data.args.root=DIR), and train it further if it stays so"
            )
        else:
            why = (
                "Export it again; if it stays so, these versions of torch and onnxruntime do not export this network "
                "rightly: try --one-size, or use the safetensors file"
            )
        raise ValueError(
            f"{file.path}: refused: it gives the network's class on {share:.6f} of {pixels} pixels, and {at_least:g} "
            f"is asked for (largest difference of a logit {difference:.3g}, largest logit {largest:.3g}). {why}"
        )
    miou = [scores(matrix).miou if matrix.any() else None for matrix in matrices]
    return Agreement(share, difference, largest, len(images), pixels, *miou)


def _labels(logits: Tensor, size: tuple[int, ...], path: Path) -> np.ndarray:
    try:
        return labels_from_logits(logits, (size[0], size[1]), align_corners=False)[0]
    except ValueError as error:
        raise ValueError(f"{path}: refused: {error}") from None


def _sizes(model: nn.Module, only: tuple[int, int] | None) -> Sizes:
    stride = int(getattr(model, "stride", 32))
    return Sizes(stride, int(getattr(model, "minimum_size", stride)), only)


def _tried(size: tuple[int, int], sizes: Sizes) -> list[tuple[int, int]]:
    """Sizes to compare file and network at: the one it was traced with, and others where it takes others."""
    more = sizes.multiple_of if sizes.only is None else 0
    return [size, size, (size[0] + more, size[1]), (size[0], size[1] + 2 * more)]


def _metadata(model: nn.Module, record: Mapping[str, Any], sizes: Sizes) -> dict[str, str]:
    """What a file says of itself, as JSON strings."""
    data = record["recipe"]["data"]
    arguments = {key: value for key, value in data.get("args", {}).items() if key not in _PRIVATE}
    resolution, exits = float(arguments.get("resolution", 1.0)), record.get("exits")
    facts = {
        "version": VERSION,
        "labels": dict(record["labels"]),
        "recipe": {**record["recipe"], "data": {**data, "args": arguments}},
        "complexity": record.get("complexity"),  # by which adaptive inference finds an image's size
        "exits": exits and {"policy": exits["policy"]},  # by which a network with exits stops
        "resolution": resolution,
        "protocol": protocol(resolution),
        "normalisation": {"formula": "(x / 255 - mean) / std", "mean": MEAN, "std": STD, "order": "RGB"},
        "sizes": asdict(sizes),
        "structure": structure_hash(model),
        "written_by": {"torch": str(torch.__version__)},
    }
    return {_PREFIX + key: json.dumps(value) for key, value in facts.items()}


def _read_metadata(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, Any], Sizes, str]:
    """The record, the sizes and the structure's hash that a file carries."""
    if _PREFIX + "version" not in metadata:
        raise DataError(
            f"{path}: exported by something else: it says nothing of classes, sizes and normalisation; "
            "python -m tools.export RUN writes files that do"
        )
    if _read(metadata, "version", path) != VERSION:
        raise DataError(f"{path}: written by another version of dance_seg; export it again from its run")
    labels, recipe, structure, complexity, exits = (
        _read(metadata, key, path) for key in ("labels", "recipe", "structure", "complexity", "exits")
    )
    try:
        sizes = Sizes(**_read(metadata, "sizes", path))
        if sizes.only is not None:
            sizes = Sizes(sizes.multiple_of, sizes.at_least, (int(sizes.only[0]), int(sizes.only[1])))
        if len(labels["classes"]) != len(labels["palette"]) or not isinstance(recipe["data"], dict):
            raise ValueError
        if complexity is not None and not all(isinstance(value, int | float) for value in complexity):
            raise ValueError
    except (TypeError, KeyError, ValueError, IndexError):
        raise DataError(f"{path}: its metadata is damaged; export it again from its run") from None
    return {"labels": labels, "recipe": recipe, "complexity": complexity, "exits": exits}, sizes, structure


def _read(metadata: Mapping[str, str], key: str, path: Path) -> Any:
    try:
        return json.loads(metadata[_PREFIX + key])
    except (KeyError, ValueError):
        raise DataError(f"{path}: its metadata is damaged ({_PREFIX}{key}); export it again from its run") from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _whole(path: Path, content: Callable[[], bytes]) -> Any:
    """Write a file under another name and put it in place when the block ends well.

    Raises ValueError with the path when it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(content())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error}; free it or choose another folder") from None
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _library(name: str, use: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"{name} is needed to {use} ONNX files and is not installed: pip install 'dance-seg[export]'"
        ) from None


@contextmanager
def _quiet() -> Any:
    """What the exporter says of its own steps concerns nobody; what fails is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
