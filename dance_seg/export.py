"""A trained network as a file that other programs run: ONNX, compared with the network before it is put in place, and
safetensors, weights with the record that builds the network again.

Both carry what a reader must know as JSON strings in their own metadata: classes and colours, the recipe, the sizes
the network takes, how pixels become its input, the protocol its scores were taken by, and its structure. What a file
of this project is told by is the key `dance_seg.version`. Paths of the machine that trained are left out.

N images, C classes, H rows, W columns.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.errors import CheckpointError, DataError, first_line
from dance_seg.evaluator import labels_from_logits
from dance_seg.file_metadata import (
    PREFIX,
    Sizes,
    file_metadata,
    read_metadata,
    read_value,
    sizes_of,
)
from dance_seg.metrics import confusion_matrix, scores
from dance_seg.network_slimming.structure import structure_hash, structure_record
from dance_seg.normalise import normalise
from dance_seg.onnx_tools import LARGEST, OPSET, library, quiet, with_open_pooling

AGREEMENT = 0.9999
"""The share of pixels on which file and network must give the same class."""

ROUNDING = 1e-4
"""Of the largest logit: what two programs may differ by that add up in another order."""

_INPUT, _OUTPUT = "images", "logits"


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
        runtime = library("onnxruntime", "run")
        if not Path(path).is_file():
            raise DataError(f"{self.path}: no such file; python -m tools.export RUN writes ONNX files")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong is raised and said by us
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [provider for provider in wanted if provider in runtime.get_available_providers()]
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=providers)
            self.provider = self._session.get_providers()[0]
            metadata = self._session.get_modelmeta().custom_metadata_map
        except Exception as error:  # onnxruntime raises many kinds here
            raise DataError(f"{self.path}: no ONNX file that can be run: {first_line(error)}") from None
        self.record, self.sizes, self.structure = read_metadata(metadata, self.path)

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
            raise ValueError(f"{self.path}: cannot be run at {rows}x{columns}: {first_line(error)}") from None
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
    for needed in ("onnx", "onnxscript"):
        library(needed, "export")
    if sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) > LARGEST:
        raise ValueError(f"{path}: not written: an ONNX file holds 2 GiB at most; export to safetensors instead")
    sizes = sizes_of(model, None)
    size = sizes.padded(*input_size)
    if not any_size:
        sizes = sizes_of(model, size)
    program = _exported(model, size, sizes, path)
    for node in (node for graph in (program.model.graph, *program.model.functions.values()) for node in graph):
        node.metadata_props.clear()  # stack traces with the paths of this machine, most of a small file
    program.model.metadata_props.update(file_metadata(model, record, sizes))
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
    metadata = file_metadata(model, record, sizes_of(model, None))
    metadata[PREFIX + "tensors"] = json.dumps(structure_record(model))
    metadata[PREFIX + "sha256"] = json.dumps(_digest(tensors))
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
        raise CheckpointError(f"{path}: no safetensors file that can be read: {first_line(error)}") from None
    try:
        record, _, _ = read_metadata(metadata, path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    digest, structure = (read_value(metadata, key, path) for key in ("sha256", "tensors"))
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


class _FromPixels(nn.Module):
    """uint8 images (N, 3, H, W) -> logits, normalisation included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(normalise(images))


def _exported(model: nn.Module, size: tuple[int, int], sizes: Sizes, path: Path) -> Any:
    """The ONNX program of a network for images of `size`, with sizes left open unless they are fixed."""
    stride = sizes.multiple_of
    shapes: dict[int, Any] = {0: torch.export.Dim("N", min=1)}
    if sizes.only is None:
        # A length of one multiple would be taken for a constant.
        size = (max(size[0], 2 * stride), max(size[1], 2 * stride))
        least = -(-sizes.at_least // stride)
        shapes |= {2: stride * torch.export.Dim("h", min=least), 3: stride * torch.export.Dim("w", min=least)}
    whole = _FromPixels(with_open_pooling(model)).eval()
    example = torch.zeros((2, 3, *size), dtype=torch.uint8)
    try:
        with quiet(), torch.no_grad():
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
        raise ValueError(f"{path}: torch.onnx cannot export this network: {first_line(cause)}{other}") from error
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


def _tried(size: tuple[int, int], sizes: Sizes) -> list[tuple[int, int]]:
    """Sizes to compare file and network at: the one it was traced with, and others where it takes others."""
    more = sizes.multiple_of if sizes.only is None else 0
    return [size, size, (size[0] + more, size[1]), (size[0], size[1] + 2 * more)]


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
