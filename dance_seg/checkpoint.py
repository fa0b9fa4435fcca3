"""Checkpoints that are whole or not there: written atomically, verified by a hash, and free of pickled code.

A checkpoint is one file that plain `torch.load(path, weights_only=True)` reads. It is a zip archive, and its digest
stands in the archive's comment, the last bytes of the file:

    dance_seg step=000000001234 sha256=<64 hexadecimal digits>

over the archive as torch wrote it, followed by the step. torch itself does not notice a flipped bit in a tensor.
"""

import hashlib
import os
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch

from dance_seg.errors import CheckpointError, first_line

_COMMENT = "dance_seg step={step:012d} sha256={digest}"
_COMMENT_PATTERN = re.compile(rb"dance_seg step=(\d{12}) sha256=([0-9a-f]{64})")
_COMMENT_LENGTH = len(_COMMENT.format(step=0, digest="0" * 64))
_NO_COMMENT = b"\0\0"  # how a zip archive without a comment ends: the comment's length, 16 bits
_CHUNK = 1 << 22  # bytes hashed at a time
_MAX_DEPTH, _MAX_BITS = 100, 128  # of nesting and of a whole number: no honest record has as many
_SLACK = 1 << 20  # bytes by which a tensor may be larger than its file, where it repeats a part of it
_TEMPORARY = ".partial"  # ending of a file being written; its name begins with a dot

# What torch's weights_only loading gives back, by exact type: a subclass would be pickled as code to import.
_PLAIN = {type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.nn.Parameter}
_PLAIN |= {torch.Size, torch.dtype, torch.device}


def save_checkpoint(record: dict[str, Any], path: str | Path) -> None:
    """Write a record of tensors and plain data; `path` holds the old file or the new one, never a part of one.

    The file is written beside `path`, flushed to the disk and renamed. Its hash is taken on the way out, so that the
    record is in memory once. Raises CheckpointError, with the path, when something in the record is no plain data
    (naming its key) and when the file cannot be written; what was there before is then untouched.
    """
    path = Path(path)
    check_plain(record, path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    writer = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            writer = _HashingWriter(file)
            torch.save(record, cast(IO[bytes], writer))
            _close_with_comment(file, writer.hash, _step(record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a wrong position in the file; the writer knows what happened.
        reason = writer.error if writer is not None and writer.error is not None else error
        raise CheckpointError(f"{path}: could not be written: {reason}; what was saved before is untouched") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_plain(record: dict[str, Any], path: str | Path) -> None:
    """Raise CheckpointError, naming path and key, when a record holds more than tensors and plain data."""
    foreign = next(_foreign(record), None)
    if foreign is not None:
        raise CheckpointError(
            f"{path}: not saved: {foreign}, which could not be loaded without running its code; save plain data"
        )


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The record of a checkpoint, tensors on the CPU, after its hash was verified; nothing in it is ever executed.

    Raises CheckpointError, with path and reason, for a file that is missing, truncated, changed, or not a checkpoint.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = _verify(file, path)
            _refuse_packed(file, path, size)
            file.seek(0)
            record = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = named[1] if named else "objects"
        raise CheckpointError(
            f"{path}: is refused: it holds {what}, which could run code; only plain data is loaded"
        ) from error
    except Exception as error:  # torch raises many kinds here
        raise CheckpointError(f"{path}: is refused: {first_line(error)}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: holds a {type(record).__name__}, not a checkpoint's record")
    strange = next(_foreign(record, size + _SLACK), None)
    if strange is not None:
        raise CheckpointError(f"{path}: is refused: {strange}; a checkpoint holds plain data")
    return record


def forget_older(folder: Path) -> None:
    """Let go of all but the two checkpoints of a run that were written last; if one is damaged the other is whole.

    Not those of most steps: where these are damaged and training began anew, what it writes has fewer steps.
    """
    for old in sorted(folder.glob("step-*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))[:-2]:
        old.unlink(missing_ok=True)


def newest_valid(folder: str | Path, pattern: str = "*.ckpt") -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of a folder that is furthest in training and whole, with its record; None when there is none.

    The furthest by `global_step`, the latest written among equals. Damaged ones met on the way are skipped with a
    warning that names each; nothing is deleted.
    """
    found = []
    for path in Path(folder).glob(pattern):
        try:
            found.append((_recorded_step(path), path.stat().st_mtime_ns, path))
        except (CheckpointError, OSError) as error:
            warnings.warn(f"skipped a damaged checkpoint: {error}", stacklevel=2)
    for _, _, path in sorted(found, reverse=True):
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"skipped a damaged checkpoint: {error}", stacklevel=2)
    return None


def clean_temporary(folder: str | Path) -> list[Path]:
    """Remove what writers that were killed have left in a folder; call it before this run writes. Returns the paths."""
    left = sorted(Path(folder).glob(f".*{_TEMPORARY}"))
    for path in left:
        path.unlink(missing_ok=True)
    return left


def check_writable(folder: str | Path) -> None:
    """Create the folder and write a file in it, so that a run that could never be saved ends before it begins.

    Raises CheckpointError with the folder and the reason.
    """
    folder = Path(folder)
    probe = folder / f".probe.{os.getpid()}{_TEMPORARY}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}; free it or choose another folder") from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


class _HashingWriter:
    """A file to write to, for torch.save, that hashes what passes and remembers why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        return written

    def flush(self) -> None:
        self.file.flush()


def _close_with_comment(file: IO[bytes], archive_hash: Any, step: int) -> None:
    """Put step and digest in the comment of the zip archive that was just written."""
    file.seek(-len(_NO_COMMENT), os.SEEK_END)
    comment = _COMMENT.format(step=step, digest=_digest(archive_hash, step)).encode()
    file.write(len(comment).to_bytes(2, "little") + comment)


def _verify(file: IO[bytes], path: Path) -> int:
    """The bytes of the archive. Raises CheckpointError unless the whole file is as it was written."""
    step, digest, length = _read_comment(file, path)
    file.seek(0)
    archive_hash, left = hashlib.sha256(), length
    while left:
        chunk = file.read(min(_CHUNK, left))
        if not chunk:
            raise CheckpointError(f"{path}: became shorter while it was read")
        archive_hash.update(chunk)
        left -= len(chunk)
    archive_hash.update(_NO_COMMENT)
    if _digest(archive_hash, step) != digest:
        raise CheckpointError(
            f"{path}: is damaged: its SHA-256 is not the one it was written with; use an older checkpoint"
        )
    return length


def _refuse_packed(file: IO[bytes], path: Path, size: int) -> None:
    """Refuse an archive whose parts are larger than itself: torch would unpack 800 MB out of 800 KB.

    A digest does not tell who wrote it. torch packs nothing, so that each part is as large as it says.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: is no archive that can be read: {error}") from None
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
        raise CheckpointError(f"{path}: is refused: its parts are packed, which torch never does; it could be a bomb")


def _read_comment(file: IO[bytes], path: Path) -> tuple[int, str, int]:
    """Step, digest and number of bytes before the comment's length, from the last bytes of a checkpoint."""
    size = file.seek(0, os.SEEK_END)
    length = size - _COMMENT_LENGTH - len(_NO_COMMENT)
    if length > 0:
        file.seek(length)
        end = file.read()
        match = _COMMENT_PATTERN.fullmatch(end[len(_NO_COMMENT) :])
        if match and end.startswith(_COMMENT_LENGTH.to_bytes(len(_NO_COMMENT), "little")):
            return int(match[1]), match[2].decode(), length
    file.seek(0)
    is_archive = file.read(4) == b"PK\x03\x04"
    reason = (
        "has no digest at its end: it is cut short, or another program wrote it" if is_archive else "is no checkpoint"
    )
    others = sorted(other.name for other in path.parent.glob("*.ckpt") if other != path)
    hint = f"; beside it there are {', '.join(others[:4])}" if others else ""
    raise CheckpointError(f"{path}: {reason} ({size} bytes){hint}")


def _recorded_step(path: Path) -> int:
    with open(path, "rb") as file:
        return _read_comment(file, path)[0]


def _digest(archive_hash: Any, step: int) -> str:
    whole = archive_hash.copy()
    whole.update(f"step={step:012d}".encode())
    return whole.hexdigest()


def _step(record: dict[str, Any]) -> int:
    step = record.get("global_step", 0)
    return step if isinstance(step, int) and 0 <= step < 10**12 else 0


def _foreign(record: Any, most_bytes: int | None = None) -> Iterator[str]:
    """The places in a record that hold something else than tensors and plain data, or tensors above `most_bytes`.

    What is met again is not looked at again: a few lines of pickle can say more by that than fits any memory.
    """
    waiting, seen = [(record, "", 0)], set[int]()
    while waiting:
        value, at, depth = waiting.pop()
        kind = type(value)
        if kind is int and value.bit_length() > _MAX_BITS:
            yield f"{at} is a number of {value.bit_length()} bits"
        elif kind in (torch.Tensor, torch.nn.Parameter) and most_bytes is not None:
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                yield f"{at} is a tensor {value.layout} on {value.device}"
            elif value.numel() * value.element_size() > most_bytes:
                yield f"{at} is a tensor {tuple(value.shape)}, larger than the file"
        if kind in _PLAIN or id(value) in seen:
            continue
        seen.add(id(value))
        if depth > _MAX_DEPTH:
            yield f"{at[:80]}... is nested too deeply"
        elif kind in (dict, OrderedDict, Counter):
            for key, item in reversed(value.items()):
                waiting.append((item, f"{at}.{key}" if at else str(key), depth + 1))
                waiting.append((key, f"{at}, the key {key!r}," if at else f"the key {key!r}", depth + 1))
        elif kind in (list, tuple, set):
            for number, item in reversed(list(enumerate(value))):
                waiting.append((item, f"{at}[{number}]", depth + 1))
        else:
            yield f"{at or 'the record'} is a {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")


def _flush_folder(folder: Path) -> None:
    """Bring a rename to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
