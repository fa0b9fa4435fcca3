"""A network with exits as a folder of ONNX files, one per exit, of which only those that an image reaches are run.

`stage_1.onnx` takes `images`, normalised float32 (1, 3, H, W), and gives the first exit's `logits` (1, C, h, w) and
whatever later files take, under the same names (`state_1`, ...); `stage_2.onnx` goes on from there. What a later file
never reads is not given, so nothing is handed on in vain. Who stops where is for the program that runs them: the policy
is in their metadata where the network was calibrated, and `StagesOnnx` runs them by it. `stages.json` holds the SHA-256
of each file, so that a file that is damaged, or of another export, is found.

One size and one image at a time: the kernels that BasisNet mixes are an image's own, and in ONNX the groups of a
convolution, by which torch runs several images at once, are constants. A head is part of its file and runs with it,
also where it is not asked. Between files tensors are in the processor's memory.

C classes, H rows, W columns, K exits.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.early_exit.exits import ExitNetwork, State, Walk, changed
from dance_seg.early_exit.policy import Decided, ExitPolicy, decide, never_early, refuse_training
from dance_seg.errors import DataError, first_line
from dance_seg.evaluator import labels_of
from dance_seg.export import AGREEMENT, Agreement, drawn_images
from dance_seg.file_metadata import PREFIX, file_metadata, read_metadata, read_value, sizes_of
from dance_seg.models.smp import pad_to
from dance_seg.network_slimming.structure import structure_hash
from dance_seg.normalise import normalise
from dance_seg.onnx_tools import LARGEST, OPSET, library, quiet, with_open_pooling
from dance_seg.plain_data import parse_json
from dance_seg.sample import CoarseLogits

CONTENTS = "stages.json"
_STAGE = re.compile(r"stage_[1-9][0-9]*\.onnx")
_IMAGES, _LOGITS = "images", "logits"


def is_stage(path: Path) -> bool:
    """Whether a path is called as one stage of a network, beside the list of all of them.

    >>> is_stage(Path("nowhere/stage_2.onnx"))
    False
    """
    return _STAGE.fullmatch(path.name) is not None and (path.parent / CONTENTS).is_file()


class StagesOnnx:
    """The ONNX files of a network with exits, run by onnxruntime one after another: as lazy as the network itself.

    `threads` are onnxruntime's own; 0 is as many as it likes. Raises DataError, naming the file, for files that are
    missing, damaged or not of one export, and ValueError when onnxruntime is not installed.
    """

    training = False

    def __init__(self, folder: str | Path, *, threads: int = 0, named: str | Path | None = None) -> None:
        self.path = Path(named or folder)
        runtime = library("onnxruntime", "run")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong is raised and said by us
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [provider for provider in wanted if provider in runtime.get_available_providers()]
        self._stages = [
            _opened(content, self.path / name, lambda content: runtime.InferenceSession(content, options, providers))
            for name, content in _contents(Path(folder), self.path)
        ]
        self.num_exits = len(self._stages)
        self.provider = self._stages[0].session.get_providers()[0]
        metadata = self._stages[0].session.get_modelmeta().custom_metadata_map
        self.record, self.sizes, self.structure = read_metadata(metadata, self.path / _name(0))
        self.policy = self._policy()
        """As calibrated before the export; None where the network was not."""

    def exits(self, images: Tensor, wanted: Sequence[bool] | None = None) -> Walk:
        """The logits of each exit for the images that are still there, as `ExitNetwork.exits` gives them.

        Images (N, 3, H, W), normalised, go through one by one, and a stage runs when the generator comes to it. Raises
        ValueError, naming the file, for a size that the network was not exported for and when a run fails.
        """
        wanted = (True,) * self.num_exits if wanted is None else tuple(wanted)
        if len(wanted) != self.num_exits:
            raise ValueError(f"wanted has {len(wanted)} values; {self.path} has {self.num_exits} exits, give one each")
        try:
            size = self.sizes.padded(images.shape[-2], images.shape[-1])
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return self._walk(pad_to(images, size).cpu(), wanted)

    def _walk(self, images: Tensor, wanted: Sequence[bool]) -> Walk:
        there = [{_IMAGES: np.ascontiguousarray(image[None].numpy())} for image in images]
        size = (images.shape[-2], images.shape[-1])
        for exit, (stage, is_wanted) in enumerate(zip(self._stages, wanted, strict=True)):
            found = [self._run(exit, values, is_wanted=is_wanted) for values in there]
            coarse = None
            if is_wanted:
                logits = torch.from_numpy(np.concatenate([values.pop(_LOGITS) for values in found]))
                coarse = CoarseLogits(logits, size, stage.align_corners)
            kept = yield coarse
            there = found if kept is None else [found[place] for place in kept.tolist()]

    def _run(self, exit: int, values: Mapping[str, np.ndarray], *, is_wanted: bool) -> dict[str, np.ndarray]:
        """What later stages take of one image, and its logits where they are wanted."""
        stage = self._stages[exit]
        gives = [name for name in stage.gives if is_wanted or name != _LOGITS]
        found: Sequence[np.ndarray] = ()
        if gives:
            try:
                found = stage.session.run(gives, {name: values[name] for name in stage.takes})
            except Exception as error:  # onnxruntime raises many kinds here
                raise ValueError(f"{stage.path}: cannot be run: {first_line(error)}") from None
        later = {name for behind in self._stages[exit + 1 :] for name in behind.takes}
        waiting = {name: value for name, value in values.items() if name in later}
        return waiting | dict(zip(gives, found, strict=True))

    def labels(self, image: np.ndarray, size: tuple[int, int], policy: ExitPolicy | None = None) -> Decided:
        """Class indices at `size` (H, W) of one RGB image uint8 (h, w, 3), by the exit where the policy stops it.

        Without a policy by the one that was exported, and if there is none by the last exit. Raises ValueError as
        `exits` does, for logits that are not finite, and for a policy of another number of exits.
        """
        policy = policy or self.policy or never_early(self.num_exits)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        # To a policy whatever has exits is a network.
        return decide(cast(ExitNetwork, self), normalise(pixels), size, policy)

    def _policy(self) -> ExitPolicy | None:
        if self.record["exits"] is None:
            return None
        try:
            policy = ExitPolicy.from_record(self.record["exits"]["policy"])
            policy.check_fits(self.num_exits)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path / _name(0)}: its exit policy is damaged: {error}; export it again") from None
        return policy


def export_stages(
    model: ExitNetwork,
    folder: str | Path,
    *,
    record: Mapping[str, Any],
    size: tuple[int, int],
    images: Sequence[np.ndarray] = (),
    at_least: float = AGREEMENT,
) -> list[Agreement]:
    """Write a network with exits to a folder of ONNX files that is put in place only once all agree with the network.

    The files take one image of `size` (H, W), padded to what the network takes. `record` is what `load_run` returned
    with the network. `images` uint8 (H, W, 3) of that size are what the files are checked on, each exit by itself;
    without them, drawn pictures. An earlier export in the folder is replaced as a whole.

    Raises ValueError when the network is in training mode or cannot be exported, when a file disagrees (see
    check_stages) and when the folder holds anything else; what was there before is then untouched.
    """
    folder = Path(folder)
    for needed in ("onnx", "onnxscript"):
        library(needed, "export")
    refuse_training(model)
    if sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) > LARGEST:
        raise ValueError(f"{folder}: not written: an ONNX file holds 2 GiB at most; export to safetensors instead")
    sizes = sizes_of(model, sizes_of(model, None).padded(*size))
    assert sizes.only is not None
    metadata = file_metadata(model, record, sizes)
    with _whole_folder(folder) as temporary:
        hashes = {}
        for stage, content in reversed(list(_exported(model, sizes.only, metadata, folder))):
            _write(temporary / _name(stage.exit), content, folder)
            hashes[_name(stage.exit)] = hashlib.sha256(content).hexdigest()
        _write(temporary / CONTENTS, json.dumps({"sha256": hashes}, indent=1).encode(), folder)
        written = StagesOnnx(temporary, threads=torch.get_num_threads(), named=folder)
        return _agreements(written, model, images or drawn_images([sizes.only] * 4), at_least)


def check_stages(
    model: ExitNetwork, folder: str | Path, images: Sequence[np.ndarray], *, at_least: float = AGREEMENT
) -> list[Agreement]:
    """Run the files and the network side by side on uint8 images (H, W, 3): how well each exit repeats its own.

    Raises ValueError, naming file, figure, threshold and what to do, when the files are of another network, when less
    than `at_least` of the pixels get the same class at an exit, and when either gives logits that are not finite.
    """
    refuse_training(model)
    return _agreements(StagesOnnx(folder, threads=torch.get_num_threads()), model, images, at_least)


# Writing --------------------------------------------------------------------------------------------------------------


class _Stage(nn.Module):
    """What lies between one exit and the next, of tensors by position; states are told by names in place of tensors."""

    def __init__(self, model: ExitNetwork, exit: int, before: State, after: State) -> None:
        super().__init__()
        self.model, self.exit, self.before, self.after = model, exit, before, after
        self.takes = list(dict.fromkeys(_leaves(before)))
        self.gives = [name for name in dict.fromkeys(_leaves(after)) if name not in self.takes]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The exit's logits and what it gives."""
        state = changed(self.before, dict(zip(self.takes, tensors, strict=True)).__getitem__)
        if self.exit == 0:
            state = self.model.begin(state)
        seen, state = self.model.part(self.exit, state)
        made = dict(zip(_leaves(self.after), _leaves(state), strict=True))
        return (self.model.head(self.exit, seen), *(made[name] for name in self.gives))


def _leaves(state: State) -> list[Any]:
    found: list[Any] = []
    changed(state, found.append)
    return found


def _exported(
    model: ExitNetwork, size: tuple[int, int], metadata: Mapping[str, str], folder: Path
) -> Iterator[tuple[_Stage, bytes]]:
    """The stages and their ONNX files from the last to the first: only then is known what later ones read."""
    stages, values = _stages(cast(ExitNetwork, with_open_pooling(model)), torch.zeros(1, 3, *size))
    read: set[str] = set()
    for stage in reversed(stages):
        stage.gives = [name for name in stage.gives if name in read]
        program = _program(stage, [values[name] for name in stage.takes], folder)
        graph = program.model.graph
        for given in list(graph.inputs):
            if not given.uses() and not given.is_graph_output():
                graph.inputs.remove(given)
        read |= {given.name for given in graph.inputs}
        for node in (node for part in (graph, *program.model.functions.values()) for node in part):
            node.metadata_props.clear()  # stack traces with the paths of this machine
        own = {"number": stage.exit + 1, "of": len(stages), "align_corners": bool(model.align_corners[stage.exit])}
        program.model.metadata_props.update({**metadata, PREFIX + "exit": json.dumps(own)})
        yield stage, program.model_proto.SerializeToString()


@torch.no_grad()
def _stages(model: ExitNetwork, images: Tensor) -> tuple[list[_Stage], dict[str, Tensor]]:
    """The stages, and every tensor that one hands on, by its name; one that is handed on unchanged keeps its name."""
    values = {_IMAGES: images}
    names = {id(images): _IMAGES}

    def name(tensor: Tensor) -> str:
        own = names.setdefault(id(tensor), f"state_{len(names)}")
        values[own] = tensor  # which stays alive, so that no other has its id
        return own

    stages, before, state = [], _IMAGES, model.begin(images)
    for exit in range(model.num_exits):
        _, state = model.part(exit, state)
        after = changed(state, name)
        stages.append(_Stage(model, exit, before, after).eval())
        before = after
    return stages, values


def _program(stage: _Stage, tensors: Sequence[Tensor], folder: Path) -> Any:
    try:
        with quiet(), torch.no_grad():
            # Traced before the exporter is told of it, as in dance_seg.export.
            traced = torch.export.export(stage, tuple(tensors), strict=False)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=stage.takes,
                output_names=[_LOGITS, *stage.gives],
            )
    except Exception as error:  # torch and onnxscript raise many kinds here
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(
            f"{folder / _name(stage.exit)}: torch.onnx cannot export this part of the network: {first_line(cause)}; "
            "safetensors holds any network of this project: --to safetensors"
        ) from error
    assert program is not None
    return program


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that is put in place of `folder` when the block ends well, an earlier export with it gone."""
    if folder.exists() and not (folder.is_dir() and all(_is_ours(path.name) for path in folder.iterdir())):
        raise ValueError(f"{folder}: holds something else than the stages of a network; choose another folder")
    temporary, earlier = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("partial", "replaced"))
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written: {error}; free it or choose another folder") from None
        yield temporary
        if folder.exists():
            os.rename(folder, earlier)  # no folder that holds something can be replaced in one step
        try:
            os.rename(temporary, folder)
        except OSError:
            if earlier.exists():
                os.rename(earlier, folder)
            raise
    finally:
        for left in (temporary, earlier):
            shutil.rmtree(left, ignore_errors=True)


def _write(path: Path, content: bytes, folder: Path) -> None:
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error}; free it or choose another folder") from None


def _name(exit: int) -> str:
    return f"stage_{exit + 1}.onnx"


def _is_ours(name: str) -> bool:
    return name == CONTENTS or _STAGE.fullmatch(name) is not None


# Reading --------------------------------------------------------------------------------------------------------------


class _Opened(NamedTuple):
    """A stage ready to run."""

    path: Path
    session: Any
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    align_corners: bool


def _opened(content: bytes, path: Path, open_session: Callable[[bytes], Any]) -> _Opened:
    try:
        session = open_session(content)
        metadata = session.get_modelmeta().custom_metadata_map
        both = (session.get_inputs(), session.get_outputs())
        takes, gives = (tuple(value.name for value in values) for values in both)
    except Exception as error:  # onnxruntime raises many kinds here
        raise DataError(f"{path}: no ONNX file that can be run: {first_line(error)}") from None
    own = read_value(metadata, "exit", path)
    if not isinstance(own, dict) or not isinstance(own.get("align_corners"), bool):
        raise DataError(f"{path}: its metadata does not say how its logits are resized; export it again from its run")
    return _Opened(path, session, takes, gives, own["align_corners"])


def _contents(folder: Path, named: Path) -> Iterator[tuple[str, bytes]]:
    """The names of a folder's files and what is in them, from the first stage on; all of one export."""
    again = "python -m tools.export RUN writes them anew"
    try:
        hashes = parse_json((folder / CONTENTS).read_bytes())["sha256"]
        if not isinstance(hashes, dict) or not hashes or list(hashes) != [_name(exit) for exit in range(len(hashes))]:
            raise ValueError
    except OSError:
        raise DataError(f"{named / CONTENTS}: cannot be read; it says which stages belong together; {again}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{named / CONTENTS}: does not say which stages belong together; {again}") from None
    for name, expected in hashes.items():
        try:
            content = (folder / name).read_bytes()
        except OSError:
            raise DataError(f"{named / name}: cannot be read; the network has {len(hashes)} stages; {again}") from None
        if hashlib.sha256(content).hexdigest() != expected:
            raise DataError(f"{named / name}: is not the file that was written with the others; {again}")
        yield name, content


def _agreements(
    stages: StagesOnnx, model: ExitNetwork, images: Sequence[np.ndarray], at_least: float
) -> list[Agreement]:
    if stages.structure != structure_hash(model):
        raise ValueError(
            f"{stages.path} holds another network than the one it is checked against: other layers or other widths; "
            "export it again from this run, or check it against the run that it came from"
        )
    if not images:
        raise ValueError(f"{stages.path}: nothing to check it on; give at least one image")
    device = next(model.parameters()).device
    same, difference, largest = np.zeros(model.num_exits), np.zeros(model.num_exits), np.zeros(model.num_exits)
    with torch.inference_mode():
        for image in images:
            normalised = normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], device)
            walks = zip(model.exits(normalised), stages.exits(normalised), strict=True)
            for exit, (by_network, by_file) in enumerate(walks):
                assert by_network is not None
                assert by_file is not None
                path = stages.path / _name(exit)
                classes = [_labels(coarse, image.shape[:2], path) for coarse in (by_network, by_file)]
                same[exit] += float((classes[0] == classes[1]).sum())
                apart = (by_network.logits.float().cpu() - by_file.logits).abs().max()
                difference[exit] = max(difference[exit], float(apart))
                largest[exit] = max(largest[exit], float(by_network.logits.abs().max()))
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    found = [
        Agreement(float(share) / pixels, float(apart), float(most), len(images), pixels, None, None)
        for share, apart, most in zip(same, difference, largest, strict=True)
    ]
    for exit, each in enumerate(found):
        if each.argmax < at_least:
            raise ValueError(
                f"{stages.path / _name(exit)}: refused: it gives the network's class on {each.argmax:.6f} of {pixels} "
                f"pixels, and {at_least:g} is asked for (largest difference of a logit {each.largest_difference:.3g}, "
                f"largest logit {each.largest_logit:.3g}). Where the difference is rounding, compare on images of the "
                "network's own data (data.args.root=DIR); else use the safetensors file: --to safetensors"
            )
    return found


def _labels(coarse: CoarseLogits, size: tuple[int, ...], path: Path) -> Tensor:
    try:
        return labels_of(coarse, size, (size[0], size[1]))
    except ValueError as error:
        raise ValueError(f"{path}: refused: {error}") from None
