"""What following a stream came to: agreement with the teacher and with the truth, over time and in total, and its cost.

Only predictions made before anything was learnt from their frame are counted (`Followed.prediction`), on every frame of
which the teacher's labels, or the ground truth, are known. Scores are points, 0 to 100.
"""

import copy
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dance_seg.consistency import SMALLEST_SIDE, TemporalConsistency
from dance_seg.cost.macs import count_macs, count_training_macs
from dance_seg.distillation.accuracy import foreground_of
from dance_seg.distillation.online import Followed, TeacherError, checked
from dance_seg.distillation.options import OnlineDistillation
from dance_seg.distillation.teacher import Teacher
from dance_seg.metrics import confusion_matrix, mean_of_present, scores
from dance_seg.normalise import downsampled_size
from dance_seg.sample import IGNORE, Frame

_SUMS = ("seconds", "counts", "macs", "teacher_macs", "_macs_known", "judging_seconds")
RECENT = 1001
"""Times of each part whose median is what it takes once: bounded, since streams are not."""


class Price(NamedTuple):
    """MACs of each part once, at one size of frame; None where nobody knows."""

    student: int
    teacher: int | None
    update: int  # forward and backward


def pricing(student: nn.Module, teacher: Teacher, options: OnlineDistillation) -> Callable[[tuple[int, int]], Price]:
    """Size of a frame -> what each part costs at it, counted once for each size.

    Call it when the stream has begun: where only the tail of the student learns, its updates are cheaper.
    """
    known: dict[tuple[int, int], Price] = {}

    def price(size: tuple[int, int]) -> Price:
        if size not in known:
            seen = downsampled_size(size, options.resolution)
            update = count_training_macs(student, seen).macs
            known[size] = Price(count_macs(student, seen).macs, teacher.macs(size), update)
        return known[size]

    return price


def stream_macs(frames: int, key_frames: int, updates: int, price: Price) -> int | None:
    """The cost model of a student that follows: (N - n_T) c_S + n_T (c_T + c_S) + n_U c_train.

    Key frames pay the student too: its prediction is what the teacher's labels are compared with, and what the first
    update starts from.

    >>> stream_macs(100, 10, 20, Price(student=1, teacher=50, update=3))  # 90 + 10 x 51 + 60
    660
    """
    if price.teacher is None and key_frames:
        return None
    return (
        (frames - key_frames) * price.student
        + key_frames * ((price.teacher or 0) + price.student)
        + updates * price.update
    )


class Window(NamedTuple):
    """A stretch of the stream."""

    start: int  # index of its first frame
    frames: int
    miou_against_teacher: float | None  # foreground classes
    miou_against_truth: float | None
    teacher_against_truth: float | None
    taught: int  # frames the teacher labelled for the student
    updates: int


class Counts:
    """Confusion matrices and counters of a stretch of the stream."""

    def __init__(self, num_classes: int, start: int = 0) -> None:
        self.start, self.frames, self.taught, self.updates = start, 0, 0, 0
        self.against_teacher, self.against_truth, self.teacher_against_truth = (
            np.zeros((num_classes, num_classes), np.int64) for _ in range(3)
        )
        self.frames_against_teacher, self.frames_against_truth = 0, 0

    def state_dict(self) -> dict[str, Any]:
        """All that was counted, as plain data and tensors."""
        return {
            name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where a state says."""
        for name in vars(self):
            value = state[name]
            setattr(self, name, value.numpy().copy() if isinstance(value, torch.Tensor) else value)


class StreamScores:
    """Adds up the frames of a stream; `record()` and `costs()` are plain data for JSON at any time.

    Scores of classes are over all frames together: one confusion matrix. `miou` is the mean over all classes found,
    `miou_foreground` over those of the foreground, which is the paper's. Frames before `score_from` are paid for and
    not scored, so that methods can be compared on the part of a stream that one of them did not learn from. In real
    time a frame that the teacher was asked of is scored against it when its labels come back, by what was predicted of
    it then. A window is so many frames of the stream. With `stability` temporal consistency is measured, which takes
    two optical flows a frame, and two more for the teacher. `price` gives the MACs of each part.
    """

    def __init__(
        self,
        classes: Sequence[str],
        options: OnlineDistillation,
        *,
        price: Callable[[tuple[int, int]], Price] | None = None,
        window: int = 100,
        score_from: int = 0,
        stability: bool = False,
    ) -> None:
        self.classes, self.options, self.price = tuple(classes), options, price
        self.foreground = foreground_of(self.classes, options.background)
        self.window, self.score_from = window, score_from
        self.total, self.windows = Counts(len(self.classes)), list[Window]()
        self._current: Counts | None = None
        self.seconds = {"student": 0.0, "teacher": 0.0, "updates": 0.0}
        self.counts = {"student": 0, "teacher": 0, "updates": 0}
        self.macs: list[int] = [0, 0, 0]  # of student, teacher, updates
        self.teacher_macs = 0  # of the teacher on every frame
        self._macs_known = price is not None
        self._recent = {part: deque[float](maxlen=RECENT) for part in ("student", "teacher", "update", "judging")}
        self.judging_seconds = 0.0  # of a teacher that was asked for scores alone
        self._stability = (
            {who: TemporalConsistency(len(classes)) for who in ("student", "teacher")} if stability else {}
        )
        self._last: Frame | None = None

    def add(
        self, followed: Followed, teacher_labels: np.ndarray | None = None, judging_seconds: float = 0.0
    ) -> dict[str, float]:
        """Count a frame; returns its own figures for metrics.jsonl.

        `teacher_labels` are the teacher's where it was asked for scores alone, which took `judging_seconds`.
        """
        if teacher_labels is None and followed.teaching is not None and followed.asked is None:
            teacher_labels = followed.teaching.labels
        self._pay(followed, judging_seconds)
        index = followed.frame.index
        if self._current is None or index // self.window != self._current.start // self.window:
            self._close_window()
            self._current = Counts(len(self.classes), index)
        found: dict[str, float] = {}
        for counts in self._counting():
            counts.frames += 1
            counts.taught += followed.teaching is not None
            counts.updates += followed.updates
        if followed.scored and index >= self.score_from:
            found = self._score_against_truth(followed)
            if teacher_labels is not None:
                found |= self._score_against_teacher(followed.frame, followed.prediction, teacher_labels)
        if teacher_labels is None:
            found |= self._score_asked(followed)
        self._follow_motion(followed, teacher_labels)
        return {**found, **self._times_cheaper()}

    def add_left_over(self, followed: Followed) -> None:
        """Count what came back after the last frame of a stream in real time: what was taught, and no frame more."""
        self._pay(followed, 0.0, frames=0)
        for counts in self._counting():
            counts.taught += followed.teaching is not None
            counts.updates += followed.updates
        self._score_asked(followed)

    def record(self) -> dict[str, Any]:
        """The scores so far, for scores.json. A score is None where nothing was counted."""
        total = self.total
        return {
            "frames": total.frames,
            "frames_against_teacher": total.frames_against_teacher,
            "frames_against_truth": total.frames_against_truth,
            "key_frames": total.taught,
            "updates": total.updates,
            "teacher_fraction": total.taught / total.frames if total.frames else None,
            "against_teacher": self._scored(total.against_teacher),
            "against_truth": self._scored(total.against_truth),
            "teacher_against_truth": self._scored(total.teacher_against_truth),
            "stability": {who: _consistency(found) for who, found in self._stability.items()},
            "windows": [window._asdict() for window in (*self.windows, *self._open_window())],
        }

    def costs(self, alone: Mapping[str, float] | None = None) -> dict[str, Any]:
        """What the stream cost so far, for cost.json: measured seconds, MACs, and the cost model beside them.

        `alone` are the seconds of student, teacher and update measured each by itself; the model adds them up, and
        takes the median of the stream where one is not there.
        `times_cheaper` compares with the teacher on every frame. What was asked for scores alone is kept apart.
        """
        found: dict[str, Any] = {
            "seconds": dict(self.seconds),
            "counts": dict(self.counts),
            "milliseconds": {
                "student": _milliseconds(self._recent["student"]),
                "teacher": _milliseconds(self._recent["teacher"] or self._recent["judging"]),
                "updates": _milliseconds(self._recent["update"]),
            },
            "judging_seconds": self.judging_seconds,
        }
        ratios = self._times_cheaper()
        found["times_cheaper"] = {
            "milliseconds": ratios.get("cost/times_cheaper"),
            "macs": ratios.get("cost/times_cheaper_macs"),
        }
        if self._macs_known:
            each = {
                part: self.macs[place] / self.counts[part] / 1e9 if self.counts[part] else None
                for place, part in enumerate(self.counts)
            }
            each["teacher"] = self.teacher_macs / self.total.frames / 1e9 if self.total.frames else None
            found["gmacs"] = {**each, "total": sum(self.macs) / 1e9, "teacher_every_frame": self.teacher_macs / 1e9}
        if alone is not None:
            once = {part: (known or 0.0) / 1000 for part, known in found["milliseconds"].items()} | dict(alone)
            modelled = sum(self.counts[part] * once[part] for part in self.counts)
            every_frame = self.total.frames * once["teacher"]
            is_known = modelled and every_frame  # a teacher that never answered has no time to compare with
            found["model"] = {"seconds": modelled, "times_cheaper": every_frame / modelled if is_known else None}
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that was counted so far, as plain data and tensors."""
        return {
            **{name: copy.deepcopy(getattr(self, name)) for name in _SUMS},
            "total": self.total.state_dict(),
            "current": None if self._current is None else self._current.state_dict(),
            "windows": [list(window) for window in self.windows],
            "recent": {part: list(times) for part, times in self._recent.items()},
            "stability": {who: found.state_dict() for who, found in self._stability.items()},
            "last": None if self._last is None else [self._last.index, list(self._last.image.shape)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where a state says."""
        for name in _SUMS:
            setattr(self, name, copy.deepcopy(state[name]))
        self.total.load_state_dict(state["total"])
        self._current = None
        if state["current"] is not None:
            self._current = Counts(len(self.classes))
            self._current.load_state_dict(state["current"])
        self.windows = [Window(*window) for window in state["windows"]]
        for part, times in state["recent"].items():
            self._recent[part].extend(times)
        for who, kept in state["stability"].items():
            if who in self._stability:
                self._stability[who].load_state_dict(kept)
        if state["last"] is not None:
            index, shape = state["last"]
            self._last = Frame(index, 0.0, np.empty(shape, np.uint8))  # its place and size are all that is asked of it

    def _counting(self) -> list[Counts]:
        return [self.total] if self._current is None else [self.total, self._current]

    def _pay(self, followed: Followed, judging_seconds: float, frames: int = 1) -> None:
        for part, seconds in followed.seconds.items():
            self.seconds[part] += seconds
        ran = {
            "student": frames * int(self.options.method in ("online", "frozen", "offline")),
            "teacher": int(followed.teaching is not None),
            "updates": followed.updates,
        }
        for part, times in ran.items():
            self.counts[part] += times
            if times:
                self._recent["update" if part == "updates" else part].append(followed.seconds[part] / times)
        if judging_seconds:
            self.judging_seconds += judging_seconds
            self._recent["judging"].append(judging_seconds)
        if self.price is None or not self._macs_known:
            return
        price = self.price((followed.frame.image.shape[0], followed.frame.image.shape[1]))
        if price.teacher is None:
            self._macs_known = False
            return
        once = (price.student, price.teacher, price.update)
        self.macs = [paid + times * macs for paid, times, macs in zip(self.macs, ran.values(), once, strict=True)]
        self.teacher_macs += frames * price.teacher

    def _score_asked(self, followed: Followed) -> dict[str, float]:
        """In real time: what was predicted of the frame that the teacher was asked of, before it was learnt from."""
        if followed.asked is None or followed.teaching is None or followed.asked.frame.index < self.score_from:
            return {}
        return self._score_against_teacher(*followed.asked, followed.teaching.labels)

    def _score_against_teacher(self, frame: Frame, prediction: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        num_classes, counted = len(self.classes), self._counting()
        matrix = confusion_matrix(prediction, labels, num_classes)
        for counts in counted:
            counts.against_teacher += matrix
            counts.frames_against_teacher += 1
        miou = self._foreground(matrix)
        if frame.label is not None:
            # Where the teacher does not know, it says nothing that could be scored.
            known = np.where(labels < num_classes, frame.label, IGNORE).astype(np.uint8)
            matrix = confusion_matrix(labels, known, num_classes)
            for counts in counted:
                counts.teacher_against_truth += matrix
        return {} if miou is None else {"stream/accuracy": miou}

    def _score_against_truth(self, followed: Followed) -> dict[str, float]:
        truth = followed.frame.label
        if truth is None:
            return {}
        matrix = confusion_matrix(followed.prediction, truth, len(self.classes))
        for counts in self._counting():
            counts.against_truth += matrix
            counts.frames_against_truth += 1
        miou = self._foreground(matrix)
        return {} if miou is None else {"stream/accuracy_truth": miou}

    def _follow_motion(self, followed: Followed, teacher_labels: np.ndarray | None) -> None:
        """Temporal consistency of neighbouring frames of one scene; the teacher's where it labels both."""
        if not self._stability:
            return
        frame, last = followed.frame, self._last
        self._last = frame
        follows = last is not None and frame.index == last.index + 1 and not frame.cut
        if not follows or last is None or last.image.shape != frame.image.shape:
            for consistency in self._stability.values():
                consistency.start()
        if min(frame.image.shape[:2]) < SMALLEST_SIDE:
            return
        if followed.scored and frame.index >= self.score_from:
            self._stability["student"].update(frame.image, followed.prediction)
        if teacher_labels is None or teacher_labels.max() >= len(self.classes):
            self._stability["teacher"].start()
        else:
            self._stability["teacher"].update(frame.image, teacher_labels)

    def _times_cheaper(self) -> dict[str, float]:
        """Than the teacher on every frame, so far."""
        found: dict[str, float] = {}
        measured = sum(self.seconds.values())
        once = self._recent["teacher"] or self._recent["judging"]
        if once and measured:
            found["cost/times_cheaper"] = self.total.frames * median(once) / measured
        paid = sum(self.macs)
        if self._macs_known and paid:
            found["cost/times_cheaper_macs"] = self.teacher_macs / paid
        return found

    def _foreground(self, matrix: np.ndarray) -> float | None:
        if not matrix.any():
            return None
        iou = scores(matrix).iou
        chosen = tuple(iou[index] for index in self.foreground)
        return mean_of_present(chosen) if any(value is not None for value in chosen) else None

    def _scored(self, matrix: np.ndarray) -> dict[str, Any] | None:
        if not matrix.any():
            return None
        found = scores(matrix)
        return {
            "miou": found.miou,
            "miou_foreground": self._foreground(matrix),
            "foreground": [self.classes[index] for index in self.foreground],
            "pixel_accuracy": found.pixel_accuracy,
            "iou": dict(zip(self.classes, found.iou, strict=True)),
        }

    def _open_window(self) -> list[Window]:
        counts = self._current
        if counts is None:
            return []
        matrices = (counts.against_teacher, counts.against_truth, counts.teacher_against_truth)
        against = [self._foreground(matrix) for matrix in matrices]
        return [Window(counts.start, counts.frames, against[0], against[1], against[2], counts.taught, counts.updates)]

    def _close_window(self) -> None:
        self.windows += self._open_window()


def scored(
    stream: Iterable[Followed], scores: StreamScores, teacher: Teacher | None = None
) -> Iterator[tuple[Followed, np.ndarray | None, dict[str, float]]]:
    """Each frame of a followed stream with the teacher's labels of it, where known, and its figures.

    With a `teacher` (the option `score_every_frame`) it is asked on the frames that it was not asked on before, outside
    what is timed; a frame on which it then fails is not scored against it, and the first such is told. Not for real
    time, where it would be asked in two threads at once. Raises TeacherError after a frame on which it fails where the
    options say to stop.
    """
    has_failed = False
    for followed in stream:
        failure: Exception | None = None
        labels = followed.teaching.labels if followed.teaching is not None and followed.asked is None else None
        seconds = 0.0
        if labels is None and teacher is not None:
            began = time.perf_counter()
            try:
                labels = checked(teacher(followed.frame), followed.frame, len(scores.classes)).labels
                seconds = time.perf_counter() - began
            except Exception as error:  # whatever a teacher may raise
                failure = error
        yield followed, labels, scores.add(followed, labels, seconds)
        if failure is None:
            continue
        reason = str(failure) or type(failure).__name__
        said = f"frame {followed.frame.index}: the teacher failed where it was asked for scores alone: {reason}"
        if scores.options.teacher_failure == "stop":  # not earlier, since the student is done with this frame
            raise TeacherError(f"{said}; distillation.teacher_failure=skip goes on without it") from failure
        if not has_failed:
            warnings.warn(f"{said}; the frame has no score against it, nor have later ones like it", stacklevel=2)
        has_failed = True


def _consistency(found: TemporalConsistency) -> float | None:
    return found.compute().miou if found.matrix.any() else None


def _milliseconds(seconds: Iterable[float]) -> float | None:
    known = list(seconds)
    return 1000 * median(known) if known else None
