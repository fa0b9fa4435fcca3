"""Runs as Weights & Biases keeps them on the disk: a .wandb file read back, without that library and without a network.

    run = read_offline_run("runs/camvid_dense/wandb/offline-run-20260131_120000-0a1b2c3d")

The file is a log in LevelDB's format with a header of its own. Each record is a protobuf message; of the few kinds that
matter here the field numbers are below, and those of a protobuf message never change their meaning. Values are JSON.
"""

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dance_seg.errors import DataError, first_line
from dance_seg.plain_data import MAX_BYTES, parse_json, write_yaml
from dance_seg.report.runs import Run, number, section

# The file: a header, then blocks; a record is one chunk, or a first, middle ones and a last, each in one block.
HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32768
CHUNK = struct.Struct("<IHB")  # checksum of kind and body, length of the body, kind
PADDING, WHOLE, FIRST, MIDDLE, LAST = range(5)

# Fields of a record, and of what is in it.
HISTORY, SUMMARY, CONFIG, RUN, ENVIRONMENT = 2, 3, 5, 17, 26
RUN_ID, RUN_CONFIG, RUN_NAME = 1, 4, 8
ITEM, ITEM_KEY, ITEM_NESTED_KEY, ITEM_JSON = 1, 1, 2, 16
CORES, ACCELERATOR, PROCESSOR, PROCESSOR_NAME = 16, 18, 22, 3

STEP = "trainer/global_step"
ADVICE = "compare the run folder itself, which holds metrics.jsonl, or let `wandb sync` say what is wrong with the file"


def is_offline_run(path: Path) -> bool:
    """Whether a path is a .wandb file or a folder that holds one, such as offline-run-20260131_120000-0a1b2c3d."""
    return (path.suffix == ".wandb" and path.is_file()) or (path.is_dir() and any(path.glob("run-*.wandb")))


def read_offline_run(path: str | Path, *more: str | Path) -> Run:
    """One run from its .wandb file, or from several when it was resumed: each begins where the one before was left.

    Raises ValueError when there is no such file and DataError, naming it, when it is damaged or of another format.
    """
    parts = [_read_part(_wandb_file(Path(one))) for one in (path, *more)]
    # The folders' names begin with the time, so their order is that in which they were written.
    parts.sort(key=lambda part: part.folder.name)
    newest = parts[-1]
    rows: list[Mapping[str, Any]] = []
    for part in parts:
        rows = _continued(rows, part.rows)
    run = replace(newest, rows=rows)
    spent = run.spent[max(run.spent)] if run.spent else {}
    finished = max(run.spent, default=0) >= run.max_epochs
    circumstances = {**newest.circumstances, **({"finished": True} if finished else {})}
    return replace(run, training=spent, circumstances=circumstances)


def run_id(run: Run) -> str:
    """The id under which Weights & Biases knows a run; empty when it was never tracked."""
    return str(run.circumstances.get("run_id", ""))


def _wandb_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("run-*.wandb")) if path.is_dir() else []
    if len(found) != 1:
        reason = "no such file" if not path.exists() else f"holds {len(found)} files run-ID.wandb, one is needed"
        raise ValueError(f"{path}: {reason}; name a folder such as runs/NAME/wandb/offline-run-DATE-ID")
    return found[0]


def _read_part(path: Path) -> Run:
    """What one .wandb file holds."""
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    rows, name = list[dict[str, Any]](), ""
    try:
        for record in _records(path):
            for kind, body in _fields(record):
                if kind == HISTORY:
                    rows.append(_items(body))
                elif kind == SUMMARY:
                    summary.update(_items(body))
                elif kind == CONFIG:
                    config.update(_items(body))
                elif kind == RUN:
                    for field, value in _fields(body):
                        if field == RUN_CONFIG:
                            config.update(_items(value))
                        elif field in (RUN_ID, RUN_NAME):
                            text = value.decode(errors="replace")
                            name = text if field == RUN_NAME else name
                            facts |= {"run_id": text} if field == RUN_ID else {}
                elif kind == ENVIRONMENT:
                    facts |= _environment(body)
    except (ValueError, IndexError, RecursionError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: not a run of Weights & Biases that can be read ({first_line(error)}); {ADVICE}"
        ) from None
    recipe = {key: value for key, value in config.items() if key not in ("_wandb", "run")}
    facts = {**facts, **section(config, "run")}
    inference = section(summary, "inference")
    title = str(recipe.get("name") or name or path.parent.name)
    return Run(
        folder=path.parent,
        recipe=recipe,
        recipe_text=write_yaml(recipe),
        circumstances=facts,
        rows=[_row(row, facts.get("classes") or ()) for row in rows],
        inference=inference,
        title=title,
    )


def _row(items: Mapping[str, Any], classes: Sequence[Any]) -> dict[str, Any]:
    """A row as metrics.jsonl would hold it: the step, the metrics, those that are not finite as null and named."""
    values = {key: value for key, value in items.items() if not key.startswith("_") and key != STEP}
    infinite = {key: str(value) for key, value in values.items() if isinstance(value, float) and number(value) is None}
    row: dict[str, Any] = {"step": int(number(items.get(STEP)) or 0)}
    # The file has no order of keys; classes come in that of their train ids.
    place = {f"val/iou/{name}": index for index, name in enumerate(classes)}
    row |= {key: values[key] for key in sorted(values, key=lambda key: (place.get(key, -1), key))}
    row |= dict.fromkeys(infinite)
    return row | ({"not_finite": infinite} if infinite else {})


def _continued(rows: Sequence[Mapping[str, Any]], later: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows with those of a resumed run after them; what that run did again counts once, as in metrics.jsonl."""
    begin = min((row["step"] for row in later), default=None)
    kept = [row for row in rows if begin is None or row["step"] <= begin]
    by_step_and_keys = {(row["step"], frozenset(row) - {"not_finite"}): row for row in (*kept, *later)}
    return list(by_step_and_keys.values())


def _environment(body: bytes) -> dict[str, Any]:
    """The hardware, as far as the library has noted it."""
    facts: dict[str, Any] = {}
    for field, value in _fields(body):
        if field == CORES and isinstance(value, int):
            facts["cores"] = value
        elif field == ACCELERATOR:
            facts["accelerator"] = value.decode(errors="replace")
        elif field == PROCESSOR:
            names = [text.decode(errors="replace") for inner, text in _fields(value) if inner == PROCESSOR_NAME]
            facts |= {"processor": names[0]} if names else {}
    return facts


def _items(body: bytes) -> dict[str, Any]:
    """The keys and values of a history, summary or config record; a nested key leads into a nested value."""
    found: dict[str, Any] = {}
    for field, item in _fields(body):
        if field != ITEM:
            continue
        keys, value = list[str](), None
        for inner, content in _fields(item):
            if inner in (ITEM_KEY, ITEM_NESTED_KEY):
                keys.append(content.decode())
            elif inner == ITEM_JSON:
                value = parse_json(content)
        place = found
        for key in keys[:-1]:
            place = place.setdefault(key, {}) if isinstance(place.get(key, {}), dict) else {}
        if keys:
            place[keys[-1]] = value
    return found


def _records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file; one that a killed run has left unfinished at its end is left out."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{path}: {size} bytes; a run of this project writes no tracking file above {MAX_BYTES}")
    data = path.read_bytes()
    if not data.startswith(HEADER):
        known = "is empty" if not data else f"begins with {data[: len(HEADER)].hex()}, not with {HEADER.hex()}"
        raise DataError(f"{path}: no .wandb file of the known format (it {known}); {ADVICE}")
    at, waiting, open_record = len(HEADER), list[bytes](), False
    while at + CHUNK.size <= size:
        left = BLOCK - at % BLOCK
        if left < CHUNK.size:
            at += left  # a header does not fit: the block ends here
            continue
        checksum, length, kind = CHUNK.unpack_from(data, at)
        begin = at + CHUNK.size
        if kind == PADDING and not length:
            at += left
            continue
        if begin + length > size:
            return  # killed while it wrote
        body = data[begin : begin + length]
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or zlib.crc32(body, zlib.crc32(bytes([kind]))) != checksum:
            raise DataError(f"{path}: damaged at byte {at}; {ADVICE}")
        if (kind in (MIDDLE, LAST)) != open_record:
            raise DataError(f"{path}: a record at byte {at} has no beginning or no end; {ADVICE}")
        waiting.append(body)
        open_record = kind in (FIRST, MIDDLE)
        if not open_record:
            yield b"".join(waiting)
            waiting = []
        at = begin + length


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message by number: integers, and bytes for what has a length.

    >>> list(_fields(bytes([0x08, 0x96, 0x01, 0x12, 0x02, 0x68, 0x69])))
    [(1, 150), (2, b'hi')]
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number_, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number_, value
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("a field is longer than its record")
            yield number_, message[at : at + length]
            at += length
        else:
            raise ValueError(f"a field of kind {kind}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = message[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number without end")
