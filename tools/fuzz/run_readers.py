"""Readers of runs: recipes, checkpoints, exported files, run folders, trackers' files, storages of a search."""

import hashlib
import json
import math
import os
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dance_seg import checkpoint as checkpoint_file
from dance_seg.build import build_model, model_of_record
from dance_seg.checkpoint import load_checkpoint, save_checkpoint
from dance_seg.export import OnnxFile, export_safetensors, load_safetensors
from dance_seg.file_metadata import file_metadata, sizes_of
from dance_seg.network_slimming.structure import structure_record
from dance_seg.plain_data import write_yaml
from dance_seg.recipe import load_recipe, parse_recipe, recipe_from_record, recipe_record
from dance_seg.report.offline_run import BLOCK, HEADER, read_offline_run
from dance_seg.report.runs import Run, read_run
from dance_seg.supernet.latency_table import Conditions, LatencyTable, load_table
from dance_seg.supernet.space import SearchSpace
from dance_seg.supernet.storage import Proposal, Store
from tools.fuzz.data_readers import JSON_WORDS, YAML_WORDS
from tools.fuzz.target import SECRET, Target, Wrong

ROOT = Path(__file__).resolve().parents[2]
OVERRIDE = b"\n--override "

SMALL = """
data: {name: shapes, args: {num_train: 8, num_val: 2, size: [64, 64], crop: [64, 64], batch_size: 4}}
model: {name: smp, args: {arch: unet, encoder_name: resnet18, encoder_depth: 3, decoder_channels: [16, 8, 8]}}
trainer: {max_epochs: 2}
data_slimming: {scales: [0.5, 1.0], quantiles: [0.5]}
"""


# Recipes --------------------------------------------------------------------------------------------------------------


def recipe(folder: Path) -> Target:
    """Recipes with overrides: numbers are finite, nothing of the environment is in them, and they survive writing."""
    path = folder / "run.yaml"

    def check(data: bytes) -> None:
        content, *overrides = data.split(OVERRIDE)
        path.write_bytes(content)
        found = load_recipe(path, [override.decode(errors="replace") for override in overrides])
        record = recipe_record(found)
        if SECRET in json.dumps(record):
            raise Wrong("a value of the environment is in the recipe")
        if not all(math.isfinite(value) for value in _numbers(record)):
            raise Wrong("a number is not finite")
        if os.sep in found.name or found.name in ("", ".", ".."):
            raise Wrong(f"a run named {found.name!r}")
        if recipe_from_record(record) != found or parse_recipe(write_yaml(record)) != found:
            raise Wrong("it is another when it was written and read")

    seeds = sorted((ROOT / "recipes").glob("*.yaml"), key=lambda file: file.stat().st_size)[:6]
    overrides = [
        b"trainer.max_epochs=2",
        b"data.args.hold_out=[0016E5, 0006R0]",
        b"optimizer.lr=1e-3",
        b"model.args={}",
    ]
    return Target(
        [file.read_bytes() + OVERRIDE + override for file, override in zip(seeds, overrides * 2, strict=False)],
        check,
        (*YAML_WORDS, OVERRIDE, OVERRIDE + b"trainer.max_epochs=", b"seed: ", b"../../x", b"name: ../x", b"trainer: "),
    )


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float) else []


# Networks -------------------------------------------------------------------------------------------------------------


@cache
def small_network() -> torch.nn.Module:
    """A network that is built in a moment."""
    torch.manual_seed(0)
    return build_model(parse_recipe(SMALL), 3).eval()


def small_record() -> dict[str, Any]:
    """What a checkpoint of that network says of it."""
    labels = {
        "classes": ["a", "b", "c"], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]],
        "table": [0, 1, 2, *[-1] * 252, 255],
    }  # fmt: skip
    return {"recipe": recipe_record(parse_recipe(SMALL)), "labels": labels, "complexity": [0.1, 0.2]}


def checkpoint(folder: Path) -> Target:
    """Checkpoints: plain data, no more of it than the file has bytes, and the record itself where nothing changed."""
    path = folder / "a.ckpt"
    shared = torch.arange(6.0)
    record = {
        "global_step": 7, "state_dict": {"a": torch.randn(3, 4), "b": shared, "c": shared[2:4]}, "text": "x",
        "numbers": [1, 2.5, None, True, (1, 2)], "whole": torch.tensor([1, 2, 3]), "size": torch.Size([2, 3]),
    }  # fmt: skip
    save_checkpoint(record, path)
    good = path.read_bytes()
    squeezed = folder / "squeezed.zip"
    with zipfile.ZipFile(path) as there, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as other:
        for name in there.namelist():
            other.writestr(name, there.read(name))
        other.comment = there.comment

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = load_checkpoint(path)
        if data == good and str(found) != str(record):
            raise Wrong("another record than was written")
        for tensor in _tensors(found):
            if tensor.numel() * tensor.element_size() > len(data):
                raise Wrong(f"a tensor {tuple(tensor.shape)} out of {len(data)} bytes")

    words = (
        b"cos\nsystem\n", b"cposix\nsystem\n(S'id'\ntR.", b"\x8c\x02os", b"ctorch\n_utils\n", b"PK\x05\x06",
        b"PK\x01\x02", b"K\x03", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x88", b"h\x00", b"q\x00",
        b"]", b"}", b"t", b"FloatStorage", b"DoubleStorage", b"meta", b"cuda",
    )  # fmt: skip
    return Target([good, squeezed.read_bytes()], check, words, with_digest)


def with_digest(data: bytes) -> bytes:
    """A checkpoint whose digest is that of what it holds now."""
    end = checkpoint_file._COMMENT_LENGTH
    body = data[:-end]
    match = checkpoint_file._COMMENT_PATTERN.fullmatch(data[-end:])
    step = int(match[1]) if match else 7
    whole = hashlib.sha256(body[:-2] + b"\0\0")
    whole.update(f"step={step:012d}".encode())
    comment = checkpoint_file._COMMENT.format(step=step, digest=whole.hexdigest()).encode()
    return body[:-2] + len(comment).to_bytes(2, "little") + comment


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def network(folder: Path) -> Target:
    """The record and the structure that a network is built from: one with the tensors at hand, or none."""
    model = small_network()
    weights = model.state_dict()
    whole = json.dumps({"record": small_record(), "structure": structure_record(model)}).encode()
    bare = json.dumps({"record": small_record(), "structure": None}).encode()

    def check(data: bytes) -> None:
        try:
            given = json.loads(data)
            record, structure = given["record"], given["structure"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        found = model_of_record(record, structure, dict(weights), at="network")
        if {name: tensor.shape for name, tensor in found.state_dict().items()} != {
            n: t.shape for n, t in weights.items()
        }:
            raise Wrong("a network of other shapes")

    return Target([bare, whole], check, (*JSON_WORDS, b'"encoder_depth": 5', b'"decoder_channels": [1000000, 8, 8]'))


def safetensors(folder: Path) -> Target:
    """The header of a safetensors file, before tensors that stay as they are."""
    path = export_safetensors(small_network(), folder / "a.safetensors", record=small_record())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = data[8 + length :]

    def check(header: bytes) -> None:
        path.write_bytes(len(header).to_bytes(8, "little") + header + tensors)
        load_safetensors(path)

    return Target([data[8 : 8 + length]], check, (*JSON_WORDS, b"F64", b"BOOL", b"F8_E4M3", b'"shape":[0]', b"[0,0]"))


def onnx(folder: Path) -> Target:
    """An ONNX file: it runs, or it is refused when it is opened or run; logits that are no numbers are no labels."""
    import numpy as np
    import onnx as library
    from onnx import TensorProto, helper, numpy_helper

    from dance_seg.evaluator import labels_from_logits

    path = folder / "a.onnx"
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["pixels", "weight"], ["logits"], kernel_shape=[1, 1]),
    ]
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, "h", "w"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3, "h", "w"])],
        [numpy_helper.from_array(np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1), "weight")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    said = file_metadata(small_network(), small_record(), sizes_of(small_network(), None))
    helper.set_model_props(model, said)
    seeds = [model.SerializeToString()]
    library.external_data_helper.set_external_data(model.graph.initializer[0], "../outside/secret.bin", length=36)
    seeds.append(model.SerializeToString())
    image = np.zeros((1, 3, 32, 32), np.uint8)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        file = OnnxFile(path, threads=1)
        try:
            labels_from_logits(torch.from_numpy(np.array(file.logits(image))), (32, 32), align_corners=False)
        except ValueError as error:
            if not str(error):
                raise

    return Target(
        seeds, check, (*JSON_WORDS, b"Conv", b"Cast", b"Loop", b"If", b"images", b"logits", b"location", b"/etc/passwd")
    )


# Run folders ----------------------------------------------------------------------------------------------------------


def run_folder(folder: Path) -> Target:
    """The files of a run folder, one of which was changed: figures are finite, and none is missing that was there."""
    from tools.fuzz.run_files import FILES

    run, names = folder / "run", sorted(FILES)
    run.mkdir()

    def check(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        for other, content in FILES.items():
            (run / other).write_bytes(data[1:] if other == name else content)
        look_at(read_run(run))

    seeds = [bytes([number]) + FILES[name] for number, name in enumerate(names)]
    return Target(seeds, check, (*JSON_WORDS, *YAML_WORDS))


def look_at(run: Run) -> None:
    """Ask a run for everything that reports show."""
    shown = [run.name, run.seed, run.finished, run.max_epochs, run.classes, run.best, run.last, run.choose_from]
    shown += [run.spent, run.charges, run.latency, run.epochs_done, run.curve("train/loss"), run.validations]
    figures = [*run.curve("train/loss")[1], *(one.miou for one in run.validations)]
    if run.plan is not None:
        figures += [*run.plan.complexity, *run.plan.weights, float(run.plan.dense_pixels)]
    if run.image_losses is not None:
        figures += run.image_losses.by_name.values()
    if run.exits is not None:
        figures += [
            *run.exits.mious,
            *run.exits.shares,
            *run.exits.achieved,
            *run.exits.spent.values(),
            run.exits.budget,
        ]
    if run.widths is not None:
        figures += [value for cut in run.widths.cuts for value in (cut.macs, cut.channels)]
    if not all(math.isfinite(value) for value in figures):
        raise Wrong("a figure is not finite")
    if SECRET in str(shown):
        raise Wrong("a value of the environment is in a run")


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def field(number: int, body: bytes) -> bytes:
    """A field with a length."""
    return varint(number << 3 | 2) + varint(len(body)) + body


def items(kind: int, **values: Any) -> bytes:
    """A record of history (2), summary (3) or config (5)."""
    parts = (field(2, key.replace("__", "/").encode()) + field(16, json.dumps(v).encode()) for key, v in values.items())
    return field(kind, b"".join(field(1, part) for part in parts))


def offline_run(folder: Path) -> Target:
    """A .wandb file of Weights & Biases."""
    path = folder / "run-abc.wandb"
    records = [
        field(17, field(1, b"abc") + field(8, b"a run") + field(4, items(5, name="a", seed=1)[2:])),
        items(5, trainer={"max_epochs": 2}, run={"classes": ["a", "b"]}),
        items(2, **{"trainer__global_step": 1, "epoch": 0, "train__loss": 0.5, "cost__train_gmacs": 3.0}),
        items(2, **{"trainer__global_step": 2, "epoch": 1, "val__miou": 50.5, "val__iou__a": 40.0}),
        items(3, inference={"gmacs": 1.5}),
    ]

    def framed(bodies: list[bytes]) -> bytes:
        data = HEADER
        for body in bodies:
            if len(data) % BLOCK + 7 + len(body) <= BLOCK:
                data += struct.pack("<IHB", zlib.crc32(b"\1" + body), len(body), 1) + body
        return data

    def repair(data: bytes) -> bytes:
        """Checksums of all chunks, whose lengths are believed."""
        found, at = data[: len(HEADER)], len(HEADER)
        while at + 7 <= len(data):
            _, length, kind = struct.unpack_from("<IHB", data, at)
            body = data[at + 7 : at + 7 + length]
            found += struct.pack("<IHB", zlib.crc32(bytes([kind]) + body), len(body), kind) + body
            at += 7 + length
        return found

    def check(data: bytes) -> None:
        path.write_bytes(data)
        look_at(read_offline_run(path))

    seeds = [framed(records), framed([items(2, a=1)]), framed([b"".join(records)])]
    return Target(seeds, check, (*JSON_WORDS, b"train/loss", b"trainer/global_step", b"\x12\x00", b"\xff" * 12), repair)


# Searches -------------------------------------------------------------------------------------------------------------


SPACE = SearchSpace({"width": (1, 2, 3), "depth": (1, 2)})


def storage(folder: Path) -> Target:
    """The journal of a search: judged candidates are networks of the space with finite scores, or it is refused."""
    path = folder / "search.log"
    store = Store(path, SPACE, {"seed": 0})
    networks = [SPACE.smallest, SPACE.largest]
    store.close(0, 2)
    store.judge(0, [Proposal(one, 1.0) for one in networks], lambda _: 0.5, lambda: None)
    good = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(FileNotFoundError):
            Path(f"{path}.lock").unlink()
        opened = Store(path, SPACE, {"seed": 0})
        for candidate in opened.judged(0):
            if not math.isfinite(candidate.score) or not math.isfinite(candidate.cost):
                raise Wrong(f"a candidate with score {candidate.score} and cost {candidate.cost}")
            if SPACE.subnet(candidate.subnet.as_record()) != candidate.subnet:
                raise Wrong("a candidate of another space")

    words = (
        *JSON_WORDS,
        b'"op_code":',
        b'"study_id":',
        b'"state":',
        b'"values": [NaN]',
        b"\n",
        b'"generation"',
        b'"index"',
    )
    return Target([good], check, words)


def latency_table(folder: Path) -> Target:
    """Tables of latency: finite milliseconds of this space and machine."""
    path = folder / "table.json"
    conditions = Conditions((8, 8), 1, "any", "cpu", 1, "2")
    record = asdict(LatencyTable(SPACE.fingerprint, conditions, {"small": 2.0, "large": 3.0}))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        table = load_table(path, SPACE, conditions)
        if not all(math.isfinite(value) and value >= 0 for value in (*table.parts.values(), table.factor)):
            raise Wrong(f"milliseconds {table.parts}")

    return Target([json.dumps(record).encode()], check, JSON_WORDS)
