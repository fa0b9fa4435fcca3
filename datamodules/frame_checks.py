"""What happens to frames of a video that are not as they should be: one stated policy for every source."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from dance_seg.errors import DataError
from dance_seg.sample import Frame

_log = logging.getLogger(__name__)

MOST_IN_A_ROW = 1000
"""So many bad frames one after another end a stream, whatever its policy: a camera with its cap on says nothing."""


class Unreadable(NamedTuple):
    """In the place of a frame that cannot be decoded."""

    index: int  # type: ignore[assignment]  # in the stream, like a frame's
    reason: str  # begins with the path


@dataclass(frozen=True)
class FrameChecks:
    """Options of a source: what to do with frames that are not as they should be.

    bad_frames, which cannot be decoded or are empty, all of one colour: skip leaves them out, stop ends the stream with
    DataError. changed_size: resize brings a frame of another size than the first to that size, areas averaged; stop.
    repeated: keep shows a frame that equals the one before like any other, skip leaves it out. The first frame that is
    left out or resized is logged; the index of those that follow counts it. Raises ValueError for other values.
    """

    bad_frames: str = "skip"
    changed_size: str = "resize"
    repeated: str = "keep"

    def __post_init__(self) -> None:
        choices = {"bad_frames": ("skip", "stop"), "changed_size": ("resize", "stop"), "repeated": ("keep", "skip")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"data.args.{name} is {getattr(self, name)!r}; choose {' or '.join(allowed)}")


def checked(
    found: Iterable[Frame | Unreadable], checks: FrameChecks, *, start: int, problems: Counter[str], name: str
) -> Iterator[Frame]:
    """The frames from `start` on that are to be used, all of the size of the first good one found.

    What is found before `start` says which size that is, and with which frame a repeated one is compared. `problems`
    counts what was left out or changed: unreadable, empty, changed size, repeated. Raises DataError by the policy, when
    no frame is good, and after MOST_IN_A_ROW bad ones.

    >>> dark, light = np.zeros((2, 2, 3), np.uint8), np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    >>> found = [Frame(0, 0.0, light), Frame(1, 0.1, dark), Frame(2, 0.2, light)]
    >>> [frame.index for frame in checked(found, FrameChecks(), start=0, problems=Counter(), name="film")]
    [0, 2]
    """
    size: tuple[int, ...] | None = None
    before: np.ndarray | None = None
    first_reason, in_a_row = "", 0
    for frame in found:
        reason = _fault(frame, name)
        if reason is not None:
            first_reason, in_a_row = first_reason or reason, in_a_row + 1
            if in_a_row >= MOST_IN_A_ROW:
                raise DataError(f"{reason}; it is the last of {in_a_row} bad frames in a row, so the stream ends here")
            if frame.index >= start:
                if checks.bad_frames == "stop":
                    raise DataError(f"{reason}; data.args.bad_frames=skip leaves such frames out")
                _count(problems, "unreadable" if isinstance(frame, Unreadable) else "empty", f"{reason}; left out")
            continue
        assert isinstance(frame, Frame)
        in_a_row, size = 0, size or frame.image.shape[:2]
        is_wanted = frame.index >= start
        if frame.image.shape[:2] != size:
            frame = _resized(frame, size, checks, problems if is_wanted else Counter(), name, log=is_wanted)
        if checks.repeated == "skip":
            is_repeated = before is not None and np.array_equal(before, frame.image)
            before = frame.image
            if is_repeated and is_wanted:
                _count(problems, "repeated", f"{name}: frame {frame.index} repeats the one before; left out")
                continue
        if is_wanted:
            yield frame
    if size is None and first_reason:
        raise DataError(f"{first_reason}; none of its frames can be used")


def is_empty(image: np.ndarray) -> bool:
    """Whether an image (H, W, 3) is all of one colour.

    >>> is_empty(np.full((4, 5, 3), 7, np.uint8)), is_empty(np.arange(60).reshape(4, 5, 3))
    (True, False)
    """
    color = image[:1, :1]
    return bool((image[::16, ::16] == color).all() and (image == color).all())  # a few pixels settle most frames


def _fault(frame: Frame | Unreadable, name: str) -> str | None:
    if isinstance(frame, Unreadable):
        return frame.reason
    if is_empty(frame.image):
        color = tuple(frame.image[0, 0].tolist())
        return f"{name}: frame {frame.index} is empty, all of the colour {color}"
    return None


def _resized(
    frame: Frame, size: tuple[int, ...], checks: FrameChecks, problems: Counter[str], name: str, *, log: bool
) -> Frame:
    was = frame.image.shape
    message = f"{name}: frame {frame.index} is {was[0]}x{was[1]} and the first was {size[0]}x{size[1]}"
    if checks.changed_size == "stop":
        raise DataError(f"{message}; data.args.changed_size=resize makes it as large as the first")
    _count(problems, "changed size", f"{message}; it and others like it are resized", log=log)
    image = cv2.resize(frame.image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return frame._replace(image=image, label=None if frame.label is None else resized_label(frame.label, size))


def resized_label(label: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A label (H, W) at another size, by nearest neighbour: labels are names, not numbers."""
    return cv2.resize(label, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)


def _count(problems: Counter[str], kind: str, message: str, *, log: bool = True) -> None:
    if log and not problems[kind]:
        _log.warning("%s", message)
    problems[kind] += 1
