"""The complexity of each training image and the classes found in it: scored once, kept beside the decoded cache.

A table is a JSON file. It is used only if it was made from the same files by the same measure, and if its checksum
shows that no byte has changed; otherwise the images are scored again.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dance_seg.data_slimming.complexity import SHORT_SIDE, VERSION, check_measure, classes_in, complexity
from dance_seg.plain_data import parse_json
from dance_seg.sample import IGNORE, Sample
from datamodules.sources import in_order, with_progress

_log = logging.getLogger(__name__)


class Images(Protocol):
    """Decoded images in a fixed order; the fingerprint changes when a file is added, removed or modified."""

    @property
    def names(self) -> Sequence[str]:
        """A name for each image."""
        ...

    @property
    def fingerprint(self) -> str:
        """What tells these files from others."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Sample:
        """The image and label of one index."""
        ...


@dataclass(frozen=True)
class ComplexityTable:
    """The scores of N images, in the order of the source.

    The seconds are those of the pass that made the table, waiting for images and scoring them, whether or not it was
    made now: together they are the time that it took.
    """

    names: tuple[str, ...]
    values: np.ndarray  # (N,) float64
    classes_present: np.ndarray  # (N, C) bool, C = the highest class found + 1
    measure: str
    fingerprint: str
    seconds_decoding: float
    seconds_scoring: float
    from_cache: bool


def complexity_table(
    source: Images, measure: str, *, folder: Path | str | None, progress: bool = True, **options: Any
) -> ComplexityTable:
    """The complexity of every image of the source, from `folder` where the table is there, or scored now.

    Without a folder it is scored and kept nowhere.
    `options` are the measure's own. A table made from other files, another measure, other options or an older version
    of it is left alone; a damaged one is reported and replaced. A folder that cannot be written costs a warning and
    the time to score again. Raises ValueError when the measure does not exist or does not take the options, and
    whatever `source.load` raises.
    """
    check_measure(measure, options)
    names = tuple(source.names)
    fingerprint = table_fingerprint(source.fingerprint, names, measure, options)
    if folder is None:
        return _score(source, names, measure, fingerprint, progress, options)
    path = Path(folder) / f"{measure}-{fingerprint[:16]}.json"
    table = _read(path, fingerprint, names, measure)
    if table is None:
        table = _score(source, names, measure, fingerprint, progress, options)
        _write(path, table, options)
    return table


def table_fingerprint(source_fingerprint: str, names: Sequence[str], measure: str, options: dict[str, Any]) -> str:
    """What a table depends on: the files, the measure, its options, its version and the reference size.

    >>> one, other = (table_fingerprint("files", ["a.png"], "random", {"seed": seed}) for seed in (0, 1))
    >>> one == other
    False
    """
    parts = [source_fingerprint, list(names), measure, sorted(options.items()), VERSION, SHORT_SIDE]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _score(
    source: Images, names: tuple[str, ...], measure: str, fingerprint: str, progress: bool, options: dict[str, Any]
) -> ComplexityTable:
    values = np.empty(len(source))
    classes: list[np.ndarray] = []
    decoding = scoring = 0.0
    num_small = 0
    with closing(in_order(source.load, len(source))) as loaded:
        start = time.perf_counter()
        for index, sample in enumerate(with_progress(loaded, len(source), f"scoring {measure}", progress)):
            arrived = time.perf_counter()
            values[index] = complexity(measure, sample, names[index], **options)
            classes.append(classes_in(sample.label))
            num_small += min(sample.label.shape) < SHORT_SIDE
            decoding += arrived - start
            start = time.perf_counter()
            scoring += start - arrived
    if num_small and measure != "random":
        _log.warning(
            "%d of %d images are smaller than the reference size (short side %d) and were scored as they are: "
            "their complexity compares only roughly with that of the others",
            num_small,
            len(source),
            SHORT_SIDE,
        )
    return ComplexityTable(
        names=names,
        values=values,
        classes_present=_as_mask(classes),
        measure=measure,
        fingerprint=fingerprint,
        seconds_decoding=decoding,
        seconds_scoring=scoring,
        from_cache=False,
    )


def _as_mask(classes: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    present = np.zeros((len(classes), 1 + max((int(max(found)) for found in classes if len(found)), default=-1)), bool)
    for row, found in zip(present, classes, strict=True):
        row[np.asarray(found, np.int64)] = True
    return present


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(path: Path, table: ComplexityTable, options: dict[str, Any]) -> None:
    """Write under another name and rename, so that a reader never meets half a table, whoever else is writing."""
    content = {
        "fingerprint": table.fingerprint,
        "measure": table.measure,
        "options": options,
        "seconds_decoding": table.seconds_decoding,
        "seconds_scoring": table.seconds_scoring,
        "names": list(table.names),
        "values": table.values.tolist(),
        "classes": [np.flatnonzero(row).tolist() for row in table.classes_present],
    }
    unfinished = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, suffix=".part", encoding="utf-8", delete=False
        ) as file:
            unfinished = file.name
            json.dump(content | {"sha256": _checksum(content)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        _log.warning("the complexity table cannot be kept in %s (%s); it will be scored again next time", path, error)
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)


def _read(path: Path, fingerprint: str, names: tuple[str, ...], measure: str) -> ComplexityTable | None:
    """The table at `path`; None where there is none, or where it is not to be trusted."""
    try:
        content = parse_json(path.read_bytes())
        checksum = content.pop("sha256")
        if checksum != _checksum(content):
            raise ValueError("its checksum is wrong")
        if content["fingerprint"] != fingerprint or tuple(content["names"]) != names:
            raise ValueError("it belongs to other images")
        values = np.array(content["values"], dtype=np.float64)
        classes = [np.array(found, dtype=np.int64) for found in content["classes"]]
        seconds_decoding, seconds_scoring = (float(content[f"seconds_{what}"]) for what in ("decoding", "scoring"))
        if values.shape != (len(names),) or len(classes) != len(names):
            raise ValueError(f"it has {len(values)} values for {len(names)} images")
        if not np.isfinite([*values, seconds_decoding, seconds_scoring]).all():
            raise ValueError("a number of it is not finite")
        # A number that is no class would be a column for each number below it.
        if any(found.ndim != 1 or (len(found) and not 0 <= found.min() <= found.max() < IGNORE) for found in classes):
            raise ValueError("it names classes that cannot be")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        _log.warning("the complexity table %s is not used: %s; the images are scored again", path, error)
        return None
    return ComplexityTable(
        names=names,
        values=values,
        classes_present=_as_mask(classes),
        measure=measure,
        fingerprint=fingerprint,
        seconds_decoding=seconds_decoding,
        seconds_scoring=seconds_scoring,
        from_cache=True,
    )
