"""Images and labels decoded once, into one memory-mapped file outside the data folder.

Decoding a PNG costs 17 times as much as copying its pixels from the page cache, in every epoch. A store is a folder
named after its source's fingerprint:

    samples.bin  image (H, W, 3) and label (H, W), uint8, one sample after the other
    index.npy    int64 (N, 4): where each sample begins, H, W, CRC-32; -1 where it did not fit the budget
    store.json   version, fingerprint, sizes and the CRC-32 of index.npy

It is built in a temporary folder and renamed, so a store that is there is whole. Its sizes and index are checked when
it is opened, and each sample's CRC-32 the first time it is read. What is damaged or cannot be written costs speed,
never wrong pixels and never the run.
"""

import hashlib
import io
import json
import logging
import mmap
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np

from dance_seg.plain_data import parse_json
from dance_seg.sample import Sample
from datamodules.sources import in_order, with_progress

try:
    import fcntl
except ImportError:  # Windows: two builders at once both build, and the first to finish is kept
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

VERSION = 1
_ALIGN = 64  # bytes; a cache line
_ABSENT = -1
_UNREAD, _GOOD, _DAMAGED = 0, 1, 2
_BEAT_SECONDS = 2.0  # how often a builder shows that it is alive


class Source(Protocol):
    """Samples in a fixed order, with a fingerprint that changes when they do."""

    names: tuple[str, ...]
    groups: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """What identifies the samples."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Sample:
        """The sample of one index."""
        ...


class CannotStore(OSError):
    """The store could not be written; the message names the folder."""


@dataclass(frozen=True)
class Store:
    """An open store: all its bytes, mapped, and where each sample is."""

    samples: np.ndarray  # uint8, read-only
    index: np.ndarray  # int64 (N, 4)


class CachedSource:
    """A source whose samples come from a store where they are in it, and are decoded where they are not.

    The arrays are read-only views of the mapped file: a crop touches the pages of its own rows only. Pickling carries
    the store's path, not its pixels.
    """

    def __init__(self, source: Source, folder: Path | None) -> None:
        self.source = source
        self.folder = folder
        self.names = source.names
        self.groups = source.groups
        self._open()

    def _open(self) -> None:
        self._store = None if self.folder is None else _read_store(self.folder, self.source)
        # Shared with the workers that are forked from this process, so that each sample is checked once for all.
        self._checked = mmap.mmap(-1, max(1, len(self.source)))

    @property
    def fingerprint(self) -> str:
        """The source's own: caching changes no sample."""
        return self.source.fingerprint

    @property
    def num_stored(self) -> int:
        """How many samples need no decoding."""
        return 0 if self._store is None else int((self._store.index[:, 0] != _ABSENT).sum())

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Sample:
        """The sample of one index; raises DataError when it has to be decoded and cannot be."""
        if self._store is None or self._checked[index] == _DAMAGED:
            return self.source.load(index)
        start, height, width, crc = self._store.index[index].tolist()
        if start == _ABSENT:
            return self.source.load(index)
        middle, end = start + 3 * height * width, start + 4 * height * width
        if self._checked[index] == _UNREAD:
            if zlib.crc32(self._store.samples[start:end].data) != crc:
                return self._load_damaged(index)
            self._checked[index] = _GOOD
        image = self._store.samples[start:middle].reshape(height, width, 3)
        return Sample(image, self._store.samples[middle:end].reshape(height, width))

    def _load_damaged(self, index: int) -> Sample:
        self._checked[index] = _DAMAGED
        _log.warning("%s: %s is damaged in the store; it is decoded now, the store is made anew at the next start",
                     self.folder, self.names[index])  # fmt: skip
        with suppress(OSError):
            (Path(str(self.folder)) / "damaged").touch()
        return self.source.load(index)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "folder": self.folder, "names": self.names, "groups": self.groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def cache_folder() -> Path:
    """Where stores are kept unless a recipe says otherwise: $DANCE_SEG_CACHE, or ~/.cache/dance_seg."""
    return Path(os.environ.get("DANCE_SEG_CACHE") or Path.home() / ".cache" / "dance_seg").expanduser()


def open_cache(
    source: Source,
    *,
    folder: Path | None = None,
    budget_gb: float = 8.0,
    progress: bool = True,
    patience_seconds: float = 60.0,
) -> CachedSource:
    """The source with its samples decoded once, in `folder`/decoded/.

    Opens the store of this fingerprint, or builds it. Samples are stored in their order until `budget_gb` (1e9 bytes)
    is full. While another process builds the same store this one waits; when the builder has shown no sign of life for
    `patience_seconds` it builds its own. Where the folder cannot be written or the disk is full, a warning names the
    folder and every sample is decoded each time. Stores of other fingerprints are left alone.

    Raises DataError when a sample cannot be decoded, ValueError for a budget below 0.
    """
    if not budget_gb >= 0:
        raise ValueError(f"data.args.cache_gb is {budget_gb!r}; a number of gigabytes, 0 for no cache")
    budget = round(budget_gb * 1e9)
    if budget == 0 or len(source) == 0:
        return CachedSource(source, None)
    name = hashlib.sha256(source.fingerprint.encode()).hexdigest()[:32]
    place = Path(folder or cache_folder()).expanduser() / "decoded" / name
    if not _is_there(place, source, budget, say=True):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _building_alone(place, source, budget, patience_seconds) as beat:
                if not _is_there(place, source, budget):
                    _build(place, source, budget, progress, beat)
        except OSError as error:
            _log.warning(
                "%s: decoded images cannot be kept there (%s); they are decoded each time. Free some space, or choose "
                "another folder by data.args.cache_dir or DANCE_SEG_CACHE, or a smaller data.args.cache_gb",
                place.parent, error.strerror or error,
            )  # fmt: skip
            return CachedSource(source, None)
    return CachedSource(source, place)


# Open -------------------------------------------------------------------------------------------------------------


def _read_header(place: Path) -> dict[str, Any] | None:
    try:
        header = parse_json((place / "store.json").read_bytes())
        return header if isinstance(header, dict) else None
    except (OSError, ValueError):
        return None


def _is_there(place: Path, source: Source, budget: int, *, say: bool = False) -> bool:
    """Whether a whole store is there, with as many samples as the budget has room for."""
    if _read_store(place, source, say=say) is None:
        return False
    header = _read_header(place) or {}
    return bool(header.get("complete")) or int(header.get("budget", 0)) >= budget


def _read_store(place: Path, source: Source, *, say: bool = False) -> Store | None:
    """Open a store; None where it is not whole."""
    if not place.is_dir():
        return None
    try:
        header = _read_header(place)
        if header is None:
            raise ValueError("store.json is missing or damaged")
        if (header.get("version"), header.get("fingerprint")) != (VERSION, source.fingerprint):
            raise ValueError("it is of another version or of other files")
        if (place / "damaged").exists():
            raise ValueError("a sample of it was found damaged")
        index_bytes = (place / "index.npy").read_bytes()
        if zlib.crc32(index_bytes) != header.get("index_crc32"):
            raise ValueError("the checksum of index.npy is wrong")
        index = _index_of(index_bytes, len(source))
        num_bytes = (place / "samples.bin").stat().st_size
        if num_bytes != header.get("bytes"):
            raise ValueError(f"samples.bin has {num_bytes} bytes, not {header.get('bytes')}")
        for start, height, width, _ in index[index[:, 0] != _ABSENT].tolist():
            if start < 0 or height < 1 or width < 1 or start + 4 * height * width > num_bytes:
                raise ValueError("a sample of it lies beyond the end of samples.bin")
        samples = np.memmap(place / "samples.bin", np.uint8, mode="r") if num_bytes else np.empty(0, np.uint8)
        return Store(np.asarray(samples), index)
    except (OSError, ValueError) as error:
        if say:
            _log.warning("%s: the store of decoded images is damaged and is built anew: %s", place, error)
        return None


def _index_of(data: bytes, count: int) -> np.ndarray:
    """The index of `count` samples. Its header is compared and not read: NumPy's reader raises many kinds of errors."""
    beginning = _index_bytes(np.zeros((count, 4), np.int64))[: -32 * count]
    if len(data) != len(beginning) + 32 * count or not data.startswith(beginning):
        raise ValueError(f"index.npy is no index of {count} samples")
    return np.frombuffer(data, np.int64, offset=len(beginning)).reshape(count, 4)


def _index_bytes(index: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, index)
    return buffer.getvalue()


# Build ------------------------------------------------------------------------------------------------------------


def _build(place: Path, source: Source, budget: int, progress: bool, beat: "_Beat") -> None:
    """Decode in threads into a temporary folder, and rename it. Raises OSError, having removed the folder."""
    _remove_abandoned(place)
    unfinished = place.with_name(f"{place.name}.{os.getpid()}-{uuid4().hex[:8]}.partial")
    try:
        unfinished.mkdir()
        index, num_bytes = _write_samples(unfinished / "samples.bin", source, budget, progress, beat)
        index_bytes = _index_bytes(index)
        (unfinished / "index.npy").write_bytes(index_bytes)
        num_stored = int((index[:, 0] != _ABSENT).sum())
        header = {
            "version": VERSION,
            "fingerprint": source.fingerprint,
            "bytes": num_bytes,
            "budget": budget,
            "complete": num_stored == len(source),
            "index_crc32": zlib.crc32(index_bytes),
        }
        # Pixels need no fsync: what a power cut loses, each sample's checksum finds.
        (unfinished / "store.json").write_text(json.dumps(header))
        _publish(unfinished, place, source, budget)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if num_stored < len(source):
        _log.warning(
            "%s: %d of %d images fit in data.args.cache_gb=%g; the others are decoded each time",
            place.parent, num_stored, len(source), budget / 1e9,
        )  # fmt: skip


def _write_samples(path: Path, source: Source, budget: int, progress: bool, beat: "_Beat") -> tuple[np.ndarray, int]:
    index = np.full((len(source), 4), _ABSENT, np.int64)
    end = 0
    with open(path, "wb", buffering=0) as file, closing(in_order(source.load, len(source))) as loaded:
        for number, sample in enumerate(with_progress(loaded, len(source), "decoding once", progress)):
            image, label = np.ascontiguousarray(sample.image), np.ascontiguousarray(sample.label)
            start = -(-end // _ALIGN) * _ALIGN
            if start + image.nbytes + label.nbytes > budget:
                break
            if number == 0:
                _check_space(path.parent, min(budget, len(source) * (image.nbytes + label.nbytes)))
            _write(file.fileno(), memoryview(bytes(start - end)), image.data.cast("B"), label.data.cast("B"))
            index[number] = start, *label.shape, zlib.crc32(label.data, zlib.crc32(image.data))
            end = start + image.nbytes + label.nbytes
            beat()
    return index, end


def _write(descriptor: int, *parts: memoryview) -> None:
    for part in parts:
        while part:
            part = part[os.write(descriptor, part) :]


def _check_space(folder: Path, needed: int) -> None:
    """Say before the work, not after it, that the disk is too small; the estimate takes all images to be alike."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CannotStore(f"about {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")


def _publish(unfinished: Path, place: Path, source: Source, budget: int) -> None:
    """Give the folder its name; whoever comes second with a good store gives up its own."""
    for _ in range(10):
        try:
            os.rename(unfinished, place)
            return
        except OSError:
            if not place.exists():
                raise
        if _is_there(place, source, budget):
            return
        aside = place.with_name(f"{place.name}.{uuid4().hex[:8]}.partial")
        with suppress(FileNotFoundError):  # another process may be doing the same
            os.rename(place, aside)
        shutil.rmtree(aside, ignore_errors=True)
    raise CannotStore(f"{place} is being replaced over and over by other processes")


def _remove_abandoned(place: Path) -> None:
    """Remove what killed builders of this store left behind; a builder writes every few seconds."""
    for left in place.parent.glob(f"{place.name}.*.partial"):
        with suppress(OSError):
            times = [file.stat().st_mtime for file in [left, *left.iterdir()]]
            if time.time() - max(times) > 3600:
                shutil.rmtree(left, ignore_errors=True)


# One builder at a time --------------------------------------------------------------------------------------------


class _Beat:
    """Called after each sample: now and then changes the lock file's time, so that others see the builder is alive."""

    def __init__(self, lock: Path | None) -> None:
        self.lock = lock
        self.next = 0.0

    def __call__(self) -> None:
        if self.lock is not None and time.monotonic() >= self.next:
            self.next = time.monotonic() + _BEAT_SECONDS
            with suppress(OSError):
                os.utime(self.lock)


@contextmanager
def _building_alone(place: Path, source: Source, budget: int, patience_seconds: float) -> Iterator[_Beat]:
    """Hold the store's lock. Ends waiting when the store is there, the lock is free, or its holder shows no life.

    The lock is the kernel's, so that it is free at once when its holder is killed.
    """
    path = place.with_name(f"{place.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _wait_for_lock(descriptor, place, source, budget, patience_seconds):
            yield _Beat(None)
            return
        beat = _Beat(path)
        beat()
        yield beat
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, place: Path, source: Source, budget: int, patience_seconds: float) -> bool:
    if fcntl is None:
        return False
    last_beat, seen = os.fstat(descriptor).st_mtime_ns, time.monotonic()
    said = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError:  # a file system without locks
            return False
        if place.is_dir() and _is_there(place, source, budget):
            return False
        if not said:
            said = True
            _log.warning("%s: waiting for another process that decodes the same images", place)
        beat = os.fstat(descriptor).st_mtime_ns
        if beat != last_beat:
            last_beat, seen = beat, time.monotonic()
        elif time.monotonic() - seen > patience_seconds:
            _log.warning("%s: the other process shows no sign of life; decoding here", place)
            return False
        time.sleep(0.1)
