"""Files that once crashed a reader, filled the memory, or gave a figure that was wrong or an error of no use."""

import json
import logging
import struct
import zlib
from contextlib import nullcontext

import pytest

from tools.fuzz.data_readers import SIGNATURE, chunk
from tools.fuzz.readers import READERS
from tools.fuzz.run_files import FILES
from tools.fuzz.run_readers import OVERRIDE, field
from tools.fuzz.target import SECRET, judge

DEEP = b"[" * 5000
MANY_DIGITS = b"9" * 5000


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    made = {}

    def target(reader):
        if reader not in made:
            made[reader] = READERS[reader](tmp_path_factory.mktemp(reader))
        return made[reader]

    return target


def repaired(change):
    """A file changed as text, its checksum put right."""
    return lambda target: target.repair(change(target.seeds[0]))


def instead(old, new, number=0):
    def change(target):
        assert old in target.seeds[number]
        return target.seeds[number].replace(old, new)

    return change


def table(**changes):
    return repaired(lambda seed: json.dumps(json.loads(seed) | changes).encode())


NO_EPOCH = FILES["widths.json"].replace(b": 1,", b": 1e999,")
NO_SCORE = FILES["calibration.json"].replace(b'"miou_random": 2.0', b'"miou_random": NaN')


def file_of_run(name, content):
    return lambda target: bytes([sorted(FILES).index(name)]) + content


def offline(record):
    def framed(target):
        header = target.seeds[0][:7]
        return header + struct.pack("<IHB", zlib.crc32(b"\1" + record), len(record), 1) + record

    return framed


def override(text):
    return lambda target: target.seeds[0] + OVERRIDE + text


def sample_beyond(target):
    """The last sample begins far behind the end of the file, and the checksum is right."""
    return target.repair(target.seeds[1][:-32] + struct.pack("<q", 1 << 40) + target.seeds[1][-24:])


def png_of(height, width):
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def with_block(kind, content):
    return lambda target: target.seeds[0][:-12] + chunk(kind, content) + chunk(b"IEND", b"")


def late_palette(target):
    return target.seeds[1][:-12] + chunk(b"PLTE", bytes(9)) + chunk(b"IEND", b"")


FOUND = {
    # The command line had a reader of its own, which failed in the words of libraries.
    "recipe: an override with a tag": ("recipe", override(b"seed=!!python/object/new:os.system [id]")),
    "recipe: an override with an alias": ("recipe", override(b"seed=*a")),
    "recipe: an override of no end": ("recipe", override(b"a." * 5000 + b"b=1")),
    "recipe: an override with a bracket": ("recipe", override(b"[=1")),
    "recipe: a key given twice": ("recipe", lambda t: t.seeds[0] + b"\nseed: 1\nseed: 2\n"),
    "list: a name too long for a file": ("list", lambda t: b"ctrain/" + b"9" * 5000 + b".png trainannot/a_1.png\n"),
    "list: a name told in full": ("list", lambda t: b"fa_" + b"9" * 5000 + b"\n"),
    "list: a folder without a name": ("list", lambda t: b"fa_1\nimages/\n"),
    "video: frames of no known kind": ("video", instead(b"MJPG", b"\0QZX", 2)),
    "complexity: a class that would need gigabytes": ("complexity", table(classes=[[0], [2147483648], [1]])),
    "complexity: infinite values": ("complexity", table(values=[1.0, float("inf"), 2.0])),
    "complexity: seconds that are none": ("complexity", table(seconds_scoring={})),
    "complexity: no seconds": ("complexity", table(seconds_decoding=None)),
    "complexity: nested without end": ("complexity", lambda t: DEEP),
    "decoded: a header of Python": ("decoded", lambda t: t.repair(t.seeds[1].replace(b"'descr'", b"((((((("))),
    "decoded: an index cut off": ("decoded", lambda t: t.repair(t.seeds[1][:40])),
    "decoded: a sample beyond the end": ("decoded", sample_beyond),
    "audit: nested without end": ("audit", lambda t: b'{"version": 1, "bad": ' + DEEP),
    "network: no recipe": ("network", instead(b'"recipe"', b'"recip"')),
    "network: an argument that does not exist": ("network", instead(b'"encoder_depth"', b'"enboder_depth"')),
    "network: wider than any memory": ("network", instead(b"[16, 8, 8]", b"[100000000, 8, 8]")),
    "network: no classes": ("network", instead(b'"classes": ["a"', b'"classes": 3, "b": ["a"')),
    "safetensors: a name told in full": ("safetensors", instead(b"layer1.1.bn2", b"layer1.1.bn2" * 900)),
    "onnx: metadata that is no text": ("onnx", instead(b"dance_seg.resolution", b"dance_seg.resolutio\xff")),
    "onnx: a size that is no number": ("onnx", instead(b'"at_least": 32', b'"at_least": {}')),
    "onnx: a size of gigabytes": (
        "onnx", instead(b'"multiple_of": 8, "at_least": 32', b'"multiple_of":99999,"at_least":1')
    ),
    "run: a row of another kind": ("run_folder", file_of_run("metrics.jsonl", b"[1]\n")),
    "run: a step without end": ("run_folder", file_of_run("metrics.jsonl", b'{"step": 1e999}\n')),
    "run: a number that Python does not write": ("run_folder", file_of_run("plan.json", b'{"scales": ' + MANY_DIGITS)),
    "run: a cut at no epoch": ("run_folder", file_of_run("widths.json", NO_EPOCH)),
    "run: a score that is none": ("run_folder", file_of_run("calibration.json", NO_SCORE)),
    "run: half an epoch": ("run_folder", file_of_run("recipe.yaml", b"trainer: {max_epochs: 0.5}\n")),
    "offline run: a number for a text": ("offline_run", offline(b"\x8a\x01" + bytes([2, 8 | 0, 5]))),
    "offline run: a number for an item": ("offline_run", offline(field(2, bytes([8, 5])))),
    "storage: a candidate without a place": ("storage", instead(b'"index"', b'"endex"')),
    "storage: a candidate at no number": ("storage", instead(b'"index":1', b'"index":null')),
    "storage: a first line that is no JSON": ("storage", instead(b'0,"worker_id":', b'0,"worker_id" ')),
    "storage: a line that is no JSON": ("storage", instead(b'"op_code":6', b'"op_code" 6')),
    "storage: a cost that is none": ("storage", instead(b'"cost":1.0', b'"cost":NaN')),
    "storage: two scores for one": ("storage", instead(b'"values":[0.5]', b'"values":[0,5]')),
    "latency table: nested without end": ("latency_table", lambda t: DEEP),
    "latency table: a space told in full": ("latency_table", instead(b'"space": "', b'"space": "' + b"9" * 5000)),
    "label: a palette after the pixels": ("label", late_palette),
    "label: a colour profile that is cut off": ("label", with_block(b"iCCP", b"")),
    "label: packed in no known way": ("label", lambda t: t.repair(t.seeds[1][:26] + b"\x80" + t.seeds[1][27:])),
    "label: rows that do not end": ("label", lambda t: rows_missing(b"\0" + b"\2" * 13, 12)),
    "predictions: a colour profile that is cut off": ("predictions", with_block(b"iCCP", b"")),
    "image: a header of another picture": ("image", lambda t: png_of(40000, 40000)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_mended(name, targets):
    reader, made = FOUND[name]
    target = targets(reader)
    assert judge(target.check, made(target)) == ""


# Guards -----------------------------------------------------------------------------------------------------------


UNGUARDED = {
    "no look at what OmegaConf would look up": (
        "recipe", "dance_seg.recipe._refuse_tricks", lambda *_: None,
        override(b"start_from=${oc.env:FUZZ_SECRET_KEY}"),
        "wrong: a value of the environment",
    ),
    "no look at what is not finite": (
        "recipe", "dance_seg.recipe._refuse_tricks", lambda *_: None, override(b"data.args.flip=.inf"),
        "wrong: a number is not finite",
    ),
    "links are followed": (
        "list", "datamodules.listing.refuse_outside", lambda path, root: path,
        lambda t: b"ctrain/linked.png trainannot/a_1.png", "wrong:",
    ),
    "any class is believed": (
        "complexity", "datamodules.complexity_table.IGNORE", 1 << 40, table(classes=[[0], [70000], [1]]),
        "wrong: a table",
    ),
    "depth has no end": (
        "audit", "datamodules.sources.parse_json", json.loads, lambda t: b'{"version": 1, "bad": ' + DEEP, "crash:",
    ),
    "a journal is believed": (
        "storage", "dance_seg.supernet.storage.Store._reading", lambda self: nullcontext(),
        instead(b'"index"', b'"endex"'), "crash:",
    ),
    "Pillow is believed": (
        "label", "datamodules.image_files.PILLOW_ERRORS", OSError, with_block(b"iCCP", b""),
        "crash: builtins.IndexError",
    ),
    "rows that are missing are class 0": (
        "label", "datamodules.image_files._check_all_rows", lambda *_: None, lambda t: rows_missing(), "wrong: ids",
    ),
    "any score is believed": (
        "run_folder", "dance_seg.report.runs._finite", float, file_of_run("calibration.json", NO_SCORE),
        "wrong: a figure",
    ),
}  # fmt: skip


def rows_missing(row=b"\0" + b"\2" * 13, count=3):
    """Nine rows of class 2, of which the file holds three; libpng refuses it, and Pillow reads the rest as 0."""
    rows = zlib.compress(row * count)[: None if count < 9 else -6]
    return (
        SIGNATURE
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 13, 9, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("guard", UNGUARDED)
def test_without_its_guard_a_reader_fails(guard, targets, monkeypatch):
    reader, place, without, made, said = UNGUARDED[guard]
    monkeypatch.setenv("FUZZ_SECRET_KEY", SECRET)
    target = targets(reader)
    data = made(target)
    assert judge(target.check, data) == ""
    monkeypatch.setattr(place, without)
    assert judge(target.check, data).startswith(said)
