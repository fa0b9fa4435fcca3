"""metrics.jsonl: what a run has measured, one JSON object per line, and how it is read back. The truth about a run.

    {"step": 120, "time": "2026-01-31T12:00:00+00:00", "train/loss": 0.71, "epoch": 2}
    {"resumed_at": 100}

JSON knows no NaN and no infinity: such a value is written as null, and named under "not_finite".
"""

import json
import math
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from dance_seg.errors import DataError, first_line
from dance_seg.plain_data import parse_json

_RESERVED = ("step", "time", "resumed_at", "not_finite")


class MetricsFile:
    """Appends to a metrics.jsonl. Nothing is created before the first line.

    Every line is handed to the system when it is written, so that it outlives this process, and brought to the disk at
    most every `sync_seconds` and by `sync`, so that it outlives the machine. A line that a killed process has left
    unfinished is cut off. Raises OSError when the file cannot be written.
    """

    def __init__(self, path: str | Path, sync_seconds: float = 5.0) -> None:
        self.path = Path(path)
        self.sync_seconds = sync_seconds
        self._file: IO[bytes] | None = None
        self._synced_at = -math.inf

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write what was measured at a step; values are numbers or tensors of one."""
        values = {key: _number(value) for key, value in metrics.items() if key not in _RESERVED}
        infinite = {
            key: str(value) for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)
        }
        row = {"step": int(step), "time": datetime.now(UTC).isoformat(timespec="seconds"), **values}
        row.update(dict.fromkeys(infinite))
        if infinite:
            row["not_finite"] = infinite
        self._write(row)

    def mark_resumed(self, step: int) -> None:
        """Say that training goes on from a checkpoint taken after `step` steps: later rows so far are superseded."""
        self._write({"resumed_at": int(step)})
        self.sync()

    def sync(self) -> None:
        """Bring all lines to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._synced_at = time.monotonic()

    def close(self) -> None:
        """Bring all lines to the disk and let go of the file; a later line opens it again."""
        self.sync()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_unfinished_line(self.path)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (kept open between lines)
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        if time.monotonic() - self._synced_at >= self.sync_seconds:
            self.sync()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, as an undisturbed run would have left them.

    Rows past the step from which a run was resumed are left out when they came before it, and of rows with one step and
    the same metrics the last one counts. An unfinished last line is left out. Raises OSError when there is no such
    file and DataError, with path and line, for one that is no metrics.jsonl.
    """
    path = Path(path)
    *lines, _unfinished = path.read_bytes().split(b"\n")
    rows: dict[tuple[int, frozenset[str]], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if "resumed_at" in row:
                rows = {key: kept for key, kept in rows.items() if kept["step"] <= row["resumed_at"]}
            else:
                rows[int(row["step"]), frozenset(row) - {"not_finite"}] = row
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{path}:{number}: not a line of metrics ({why})") from None
    return list(rows.values())


def _number(value: Any) -> Any:
    """A tensor or NumPy scalar as the number it holds."""
    return value.item() if hasattr(value, "item") else value


def _cut_unfinished_line(path: Path) -> None:
    """End the file after its last whole line."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        data = file.read()
        if not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
