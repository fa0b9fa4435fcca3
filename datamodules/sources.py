"""Pairs of image and label files, and the samples they hold: hold out some, leave bad ones out, decode the rest."""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from dance_seg.errors import DataError
from dance_seg.machine import cores
from dance_seg.plain_data import parse_json
from dance_seg.sample import IGNORE, Sample
from datamodules.image_files import exif_orientation, image_size, read_image, read_label
from datamodules.label_table import LabelTable
from datamodules.listing import read_lines, some

T = TypeVar("T")

_log = logging.getLogger(__name__)

_AUDIT_VERSION = 1


class Pair(NamedTuple):
    """An image file and its label file; `group` is the drive, city or scene it belongs to."""

    image: Path
    label: Path | None  # None where a test split keeps its labels
    name: str
    group: str


class BadFile(NamedTuple):
    """A file that cannot be used, and why."""

    path: Path
    reason: str


class FileSource:
    """Samples decoded from files each time they are asked for, with labels of train ids.

    Raises ValueError when two pairs have the same name.
    """

    def __init__(self, pairs: Sequence[Pair], label_table: LabelTable) -> None:
        self.pairs = tuple(pairs)
        self.label_table = label_table
        self.names = tuple(pair.name for pair in self.pairs)
        self.groups = tuple(pair.group for pair in self.pairs)
        if len(set(self.names)) < len(self.names):
            seen: set[str] = set()
            twice = [name for name in self.names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
            raise ValueError(f"{len(twice)} images have the name of another: {some(twice)}")

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files' paths, sizes and times of change, and of the label table."""
        return fingerprint(self.pairs, self.label_table)

    def load(self, index: int) -> Sample:
        """Decode one image and its label; where there is no label file every pixel is IGNORE.

        Raises DataError when a file cannot be used or image and label differ in size.
        """
        return load_pair(self.pairs[index], self.label_table)


def load_pair(pair: Pair, label_table: LabelTable) -> Sample:
    """Decode a pair to RGB uint8 (H, W, 3) and train ids uint8 (H, W).

    Raises DataError when a file cannot be used or image and label differ in size.
    """
    image = read_image(pair.image)
    if pair.label is None:
        return Sample(image, np.full(image.shape[:2], IGNORE, np.uint8))
    raw = read_label(pair.label)
    check_sizes(pair, (image.shape[0], image.shape[1]), (raw.shape[0], raw.shape[1]))
    return Sample(image, label_table.apply(raw, pair.label))


def check_sizes(pair: Pair, image: tuple[int, int], label: tuple[int, int]) -> None:
    """Raise DataError, naming both sizes (H, W), when image and label differ in size."""
    if image == label:
        return
    message = f"{pair.label} has {label[0]} x {label[1]} pixels but its image {pair.image} has {image[0]} x {image[1]}"
    if image == label[::-1] and exif_orientation(pair.image) >= 5:
        message += "; the image is turned by its EXIF orientation, which is not applied: turn its pixels instead"
    raise DataError(message)


def fingerprint(pairs: Sequence[Pair], label_table: LabelTable) -> str:
    """SHA-256 over the paths, sizes and times of change of all files, the pairs' names and groups, and the table.

    Raises DataError when a file is missing.
    """
    digest = hashlib.sha256(json.dumps(label_table.as_record(), sort_keys=True).encode())
    for pair in pairs:
        digest.update(f"\0{pair.name}\0{pair.group}".encode(errors="surrogatepass"))
        for path in (pair.image, pair.label):
            if path is None:
                digest.update(b"\0none")
                continue
            try:
                status = os.stat(path)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
            line = f"\0{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
            digest.update(line.encode(errors="surrogatepass"))
    return digest.hexdigest()


# Hold out ---------------------------------------------------------------------------------------------------------


def hold_out(pairs: Sequence[Pair], spec: str | float | Path | Sequence[str] | None) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into those to train on and those taken away for choosing models.

    spec: the name of a group (drive, city, scene) or of an image, several of them, the path of a text file with such
    names, or a fraction in (0, 1). A fraction takes the images whose names have the smallest hashes: no random state,
    the same images on every machine, and nearly the same ones when images are added.

    Raises ValueError when a name is unknown, when nothing would be left to train on, or the fraction is not in (0, 1).

    >>> pairs = [Pair(Path(f"{name}.png"), None, name, name[0]) for name in ("a1", "a2", "b1")]
    >>> [[pair.name for pair in part] for part in hold_out(pairs, "a")]
    [['b1'], ['a1', 'a2']]
    """
    if spec is None:
        return list(pairs), []
    if isinstance(spec, bool) or not isinstance(spec, str | Path | int | float | Sequence):
        raise ValueError(f"data.args.hold_out is {spec!r}: a group, a list of names, a text file or a fraction")
    known = {pair.group for pair in pairs} | {pair.name for pair in pairs}
    if isinstance(spec, int | float):
        spec = _unread_number(spec, known)
    if isinstance(spec, int | float):
        chosen = _fraction_by_hash([pair.name for pair in pairs], spec)
    else:
        chosen = _named(pairs, _names(spec, known))
    held = [pair for pair in pairs if pair.name in chosen]
    kept = [pair for pair in pairs if pair.name not in chosen]
    if not held or not kept:
        nothing = "nothing" if not held else f"all {len(held)} images"
        raise ValueError(f"data.args.hold_out {spec!r} takes away {nothing}; {_groups_found(pairs)}")
    return kept, held


def _fraction_by_hash(names: Sequence[str], fraction: float) -> set[str]:
    if not 0 < fraction < 1:
        raise ValueError(f"data.args.hold_out is {fraction:g}; a fraction lies between 0 and 1, such as 0.1")
    count = min(max(1, round(fraction * len(names))), max(0, len(names) - 1))
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogatepass")).digest())
    return set(by_hash[:count])


def _unread_number(value: str | float, known: Iterable[str]) -> str | float:
    """The name that was read as a number: to YAML CamVid's drive 0016E5 is 1600000.0.

    >>> _unread_number(1600000.0, ["0006R0", "0016E5"]), _unread_number(0.2, ["0016E5"])
    ('0016E5', 0.2)
    """
    return value if isinstance(value, str) else next((name for name in known if _reads_as(name, value)), value)


def _reads_as(name: str, value: float) -> bool:
    try:
        return float(name) == value
    except ValueError:
        return False


def _names(spec: str | Path | Sequence[str], known: Collection[str]) -> list[str]:
    if not isinstance(spec, str | Path):
        return [str(_unread_number(name, known)) for name in spec]
    if str(spec) in known or not str(spec).endswith(".txt"):
        return [str(spec)]
    lines = [line for _, line in read_lines(Path(spec).expanduser())]
    return [line if line in known else Path(line.split()[0]).stem for line in lines]


def _named(pairs: Sequence[Pair], names: Sequence[str]) -> set[str]:
    by_group: dict[str, set[str]] = {}
    for pair in pairs:
        by_group.setdefault(pair.group, set()).add(pair.name)
    images = {pair.name for pair in pairs}
    chosen: set[str] = set()
    for name in names:
        if name in by_group:
            chosen |= by_group[name]
        elif name in images:
            chosen.add(name)
        else:
            close = get_close_matches(name, [*by_group, *images], n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"data.args.hold_out names {name!r}, neither a group nor an image; {hint}{_groups_found(pairs)}"
            )
    return chosen


def _groups_found(pairs: Sequence[Pair]) -> str:
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.group] = counts.get(pair.group, 0) + 1
    return "groups found: " + some((f"{group or '(none)'} ({number} images)" for group, number in counts.items()), 12)


# Quarantine -------------------------------------------------------------------------------------------------------


def audit(pairs: Sequence[Pair], label_table: LabelTable, *, deep: bool = True, progress: bool = True) -> list[BadFile]:
    """Every pair with a file that cannot be used, in the order of the pairs.

    deep: decode everything and look at every label; otherwise read the headers and compare the sizes only.
    """

    def problem(index: int) -> BadFile | None:
        pair = pairs[index]
        try:
            if deep:
                load_pair(pair, label_table)
            else:
                size = image_size(pair.image)
                if pair.label is not None:
                    check_sizes(pair, size, image_size(pair.label))
        except DataError as error:
            blamed = pair.label if pair.label is not None and str(error).startswith(str(pair.label)) else pair.image
            return BadFile(blamed, str(error))
        return None

    checked = with_progress(in_order(problem, len(pairs)), len(pairs), "checking files", progress)
    return [bad for bad in checked if bad is not None]


def usable_pairs(
    pairs: Sequence[Pair],
    label_table: LabelTable,
    policy: Literal["error", "quarantine"] = "error",
    cap: float = 0.01,
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> list[Pair]:
    """The pairs to work with.

    policy "error" returns all of them and looks at nothing: a bad file is an error when it is read. "quarantine"
    decodes every file once, logs the bad ones and leaves their pairs out. Up to `cap` of the pairs, rounded down, but
    one at least unless cap is 0. The result depends on the files alone, so it is the same on every rank. With a
    `folder` it is kept in `folder`/audits under the fingerprint of the files, and not worked out again.

    Raises DataError when more files are bad than the cap allows, ValueError for another policy or cap.
    """
    if policy == "error":
        return list(pairs)
    if policy != "quarantine":
        raise ValueError(f"data.args.bad_files is {policy!r}; choose error or quarantine")
    if not 0 <= cap <= 1:
        raise ValueError(f"data.args.bad_files_cap is {cap!r}; a fraction from 0 to 1")
    bad = _audit_once(pairs, label_table, folder, progress)
    if not bad:
        return list(pairs)
    allowed = max(1, int(cap * len(pairs))) if cap > 0 else 0
    reasons = "; ".join(file.reason for file in bad[:10]) + (f"; and {len(bad) - 10} more" if len(bad) > 10 else "")
    if len(bad) > allowed:
        raise DataError(
            f"{bad[0].path} and others: {len(bad)} of {len(pairs)} pairs cannot be used, more than the {allowed} that "
            f"data.args.bad_files_cap={cap:g} lets be left out: {reasons}"
        )
    _log.warning("%d of %d pairs left out as bad: %s", len(bad), len(pairs), reasons)
    bad_paths = {file.path for file in bad}
    return [pair for pair in pairs if pair.image not in bad_paths and pair.label not in bad_paths]


def _audit_once(pairs: Sequence[Pair], label_table: LabelTable, folder: Path | None, progress: bool) -> list[BadFile]:
    missing = any(not os.path.exists(path) for pair in pairs for path in (pair.image, pair.label) if path is not None)
    if folder is None or missing:  # a missing file has no size and time to recognise it by
        return audit(pairs, label_table, progress=progress)
    kept = Path(folder) / "audits" / f"{fingerprint(pairs, label_table)[:32]}.json"
    try:
        record = parse_json(kept.read_bytes())
        if record["version"] == _AUDIT_VERSION:
            return [BadFile(Path(path), str(reason)) for path, reason in record["bad"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole: work it out
    bad = audit(pairs, label_table, progress=progress)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}.partial")
        unfinished.write_text(json.dumps({"version": _AUDIT_VERSION, "bad": [[str(b.path), b.reason] for b in bad]}))
        os.replace(unfinished, kept)
    except OSError as error:
        _log.warning("%s: the list of bad files cannot be kept: %s", kept.parent, error)
    return bad


# Work in threads --------------------------------------------------------------------------------------------------


def in_order(call: Callable[[int], T], count: int, threads: int | None = None) -> Generator[T, None, None]:
    """call(0), call(1), ... in this order, worked on by threads; few results are held at a time.

    >>> list(in_order(lambda index: index * index, 4))
    [0, 1, 4, 9]
    """
    threads = threads or num_threads()
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for index in range(count):
                waiting.append(pool.submit(call, index))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def num_threads() -> int:
    """How many threads decode: the cores this process may use, at most 8."""
    return min(8, cores())


def with_progress(items: Iterable[T], count: int, what: str, progress: bool) -> Iterable[T]:
    """The items, with a bar on standard error while they are worked off."""
    from tqdm import tqdm

    return tqdm(items, total=count, desc=what, unit="image", disable=not progress, leave=False, delay=1)
