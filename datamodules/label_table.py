"""Which raw id of a label file is which class: one explicit table per data set, applied once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dance_seg.errors import DataError
from dance_seg.sample import IGNORE

NOT_ALLOWED = -1
"""The entry of a raw id that no label file of the data set may hold."""

MAX_CLASSES = 254  # 254 marks ids that are not allowed while the table is applied, 255 is IGNORE
_MARK = 254

FINDS_ALL = "python -m tools.check_data RECIPE finds all such files"

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The labelIds of Cityscapes that are evaluated, in the order of their train ids."""


@dataclass(frozen=True)
class LabelTable:
    """Class names, their colours, and the train id of each of the 256 raw ids.

    `table[raw]` is the train id 0 to num_classes - 1, 255 to ignore the pixel, or -1 where meeting the id is an error.

    >>> table = label_table(("road", "car"), raw_to_train={7: 0, 26: 1}, ignore=[0])
    >>> table.apply(np.array([[7, 26, 0]], np.uint8), Path("a.png")).tolist()
    [[0, 1, 255]]
    >>> table.apply(np.array([[7, 26, 9]], np.uint8), Path("a.png"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dance_seg.errors.DataError: a.png: raw id 9 (1 pixel) is not in the label table, which knows 0, 7 and 26; ...
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    table: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"a label table needs 1 to {MAX_CLASSES} classes, got {len(self.classes)}")
        if len(set(self.classes)) < len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ValueError(f"the class {twice[0]!r} is named twice")
        if len(self.palette) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes need as many colours, got {len(self.palette)}")
        if any(len(color) != 3 or not all(0 <= value <= 255 for value in color) for color in self.palette):
            raise ValueError("each colour of a label table is three numbers from 0 to 255")
        if len(self.table) != 256:
            raise ValueError(f"a label table has an entry for each of 256 raw ids, got {len(self.table)}")
        for raw, train in enumerate(self.table):
            if train not in (NOT_ALLOWED, IGNORE) and not 0 <= train < len(self.classes):
                raise ValueError(f"raw id {raw} is mapped to {train}, but there are {len(self.classes)} classes")

    @property
    def num_classes(self) -> int:
        """How many classes a network has to tell apart."""
        return len(self.classes)

    @property
    def allowed(self) -> tuple[int, ...]:
        """The raw ids that a label file may hold."""
        return tuple(raw for raw, train in enumerate(self.table) if train != NOT_ALLOWED)

    @cached_property
    def _lookup(self) -> np.ndarray:
        return np.array([_MARK if train == NOT_ALLOWED else train for train in self.table], np.uint8)

    def apply(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """Map raw ids (H, W) to train ids, uint8 (H, W) with IGNORE = 255.

        Raises DataError, naming the path, the ids and how many pixels hold them, when an id is not in the table.
        """
        if raw.dtype != np.uint8:
            if raw.size and (raw.min() < 0 or raw.max() > 255):
                raise DataError(f"{path}: {self.describe_outside(count_ids(raw))}; {FINDS_ALL}")
            raw = raw.astype(np.uint8)
        train = cv2.LUT(np.ascontiguousarray(raw), self._lookup).reshape(raw.shape)
        if len(self.allowed_set) < 256 and (train == _MARK).any():
            raise DataError(f"{path}: {self.describe_outside(count_ids(raw))}; {FINDS_ALL}")
        return train

    @cached_property
    def raw_ids(self) -> tuple[int, ...]:
        """For each class, in the order of the train ids, the first raw id that means it: what predictions are saved as.

        Raises ValueError when a class has no raw id.
        """
        missing = [name for train, name in enumerate(self.classes) if train not in self.table]
        if missing:
            raise ValueError(f"no raw id is mapped to the class {missing[0]!r}, so it cannot be saved")
        return tuple(self.table.index(train) for train in range(self.num_classes))

    def to_raw(self, train: np.ndarray) -> np.ndarray:
        """Map predicted train ids, uint8 (H, W), to raw ids, the way back from `apply`.

        Raises ValueError for an id that is no class; IGNORE is none, since a prediction always names one.

        >>> table = label_table(("road", "car"), raw_to_train={7: 0, 26: 1, 27: 1}, ignore=[0])
        >>> table.to_raw(np.array([[0, 1]], np.uint8)).tolist()
        [[7, 26]]
        """
        if train.dtype != np.uint8 or (train.size and train.max() >= self.num_classes):
            raise ValueError(
                f"predictions are {train.dtype} up to {train.max()}; with {self.num_classes} classes they are uint8 "
                f"from 0 to {self.num_classes - 1}"
            )
        lookup = np.zeros(256, np.uint8)
        lookup[: self.num_classes] = self.raw_ids
        return cv2.LUT(np.ascontiguousarray(train), lookup).reshape(train.shape)

    @cached_property
    def allowed_set(self) -> frozenset[int]:
        """The raw ids that a label file may hold, for asking `id in table.allowed_set`."""
        return frozenset(self.allowed)

    def describe_outside(self, counts: Mapping[int, int]) -> str:
        """What is wrong with a label that holds these raw ids (id -> pixels), in words a person can act on."""
        outside = {raw: number for raw, number in counts.items() if raw not in self.allowed_set}
        shown = [f"{raw} ({number:,} pixel{'s' if number > 1 else ''})" for raw, number in sorted(outside.items())[:8]]
        more = f" and {len(outside) - 8} more" if len(outside) > 8 else ""
        message = (
            f"raw id{'s' if len(outside) > 1 else ''} {', '.join(shown)}{more} {'are' if len(outside) > 1 else 'is'} "
            f"not in the label table, which knows {_ranges(self.allowed)}"
        )
        reason = diagnose(counts, self)
        return f"{message}; {reason}" if reason else message

    def as_record(self) -> dict[str, Any]:
        """Plain lists and strings, to be kept in a checkpoint."""
        return {
            "classes": list(self.classes),
            "palette": [list(color) for color in self.palette],
            "table": list(self.table),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "LabelTable":
        """The table of a record made by `as_record`; raises ValueError when the record is not one."""
        try:
            return cls(
                classes=tuple(str(name) for name in record["classes"]),
                palette=tuple((int(red), int(green), int(blue)) for red, green, blue in record["palette"]),
                table=tuple(int(train) for train in record["table"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the record of a label table: {error!r}") from None


def label_table(
    classes: Sequence[str],
    *,
    raw_to_train: Mapping[int, int],
    ignore: Iterable[int] = (IGNORE,),
    palette: Sequence[tuple[int, int, int]] | None = None,
) -> LabelTable:
    """Make a table from the raw ids that mean a class and those to ignore; every other id is not allowed.

    Raises ValueError when an id is given twice, is not in 0 to 255, or when a class is reached by no id.
    """
    table = [NOT_ALLOWED] * 256
    for raw, train in [*raw_to_train.items(), *((raw, IGNORE) for raw in ignore)]:
        if not 0 <= raw <= 255:
            raise ValueError(f"raw id {raw} is not in 0 to 255")
        if table[raw] != NOT_ALLOWED:
            raise ValueError(f"raw id {raw} is both a class and to be ignored; choose one")
        table[raw] = train
    unreached = [name for train, name in enumerate(classes) if train not in table]
    if unreached:
        raise ValueError(f"no raw id is mapped to the class {unreached[0]!r}")
    colors = default_palette(len(classes)) if palette is None else tuple(palette)
    return LabelTable(tuple(classes), colors, tuple(table))


def default_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Colours far apart from one another: the bits of the class number, dealt out to the three channels.

    >>> default_palette(4)
    ((128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    """
    colors = []
    for number in range(1, num_classes + 1):  # black is left for what is ignored
        red, green, blue = (sum((number >> 3 * i + channel & 1) << 7 - i for i in range(3)) for channel in range(3))
        colors.append((red, green, blue))
    return tuple(colors)


def count_ids(raw: np.ndarray) -> dict[int, int]:
    """How many pixels hold each raw id.

    >>> count_ids(np.array([[3, 3], [0, 3]], np.uint8))
    {0: 1, 3: 3}
    """
    if raw.dtype == np.uint8:  # counting takes a tenth of the time of sorting
        counts = np.bincount(raw.ravel(), minlength=256)
        ids = np.flatnonzero(counts)
        return dict(zip(ids.tolist(), counts[ids].tolist(), strict=True))
    ids, counts = np.unique(raw, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def diagnose(counts: Mapping[int, int], table: LabelTable) -> str:
    """The likely reason why a label (raw id -> pixels) does not fit the table; empty when there is none.

    >>> cars = label_table(("road", "car"), raw_to_train={0: 0, 1: 1})
    >>> diagnose({0: 90, 1: 5, 2: 5}, cars)
    ''
    >>> diagnose({1: 95, 2: 5}, cars)
    'the ids seem to count from 1; let them count from 0, or map them in the label table'
    """
    present = {raw for raw, number in counts.items() if number}
    outside = sorted(present - table.allowed_set)
    if not outside:
        return ""
    if min(present) < 0:
        return "negative ids: an unsigned label was read as signed, or -1 was used for void"
    if present <= {0, 255} or (len(present) == 2 and max(present) == 255):
        return "it is a two-valued mask saved with 255 for white; save it with the ids 0 and 1, or map 255 in the table"
    if outside == [table.num_classes] and 0 not in present:
        return "the ids seem to count from 1; let them count from 0, or map them in the label table"
    streets = present & set(CITYSCAPES_IDS)
    if max(present) <= 33 and len(streets) >= 2 and streets & set(outside) and streets & {7, 8, 11, 21, 23, 26}:
        shown = ", ".join(str(raw) for raw in sorted(streets)[:3])
        return (
            f"ids {shown}: these are Cityscapes labelIds; read them with data.name=cityscapes, or map them in the table"
        )
    step = gcd(*present)
    if step >= 5 and max(present) >= 128:
        return f"all are multiples of {step}: a label stretched for viewing; divide its values by {step}"
    if len(present) > 50 and len(present) > 2 * table.num_classes:
        return f"{len(present)} different values: a gray picture, or a mask resized with interpolation, not class ids"
    if sum(counts[raw] for raw in outside) < 0.02 * sum(counts.values()) and len(outside) > 1:
        return "few pixels hold them: perhaps a mask resized with interpolation or drawn with soft edges"
    return ""


def _ranges(ids: Sequence[int]) -> str:
    """Runs of numbers in words.

    >>> _ranges((0, 1, 2, 3, 7, 255))
    '0 to 3, 7 and 255'
    """
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(low) if low == high else f"{low} to {high}" for low, high in runs]
    if len(shown) > 12:
        shown = [*shown[:11], f"{len(shown) - 11} more ranges"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)
