"""A student follows a video and learns from a teacher at key frames; and what it has to be compared with.

Every method does the same with a frame: it predicts (that is what is scored), and at key frames the teacher labels the
frame afterwards. `online` then updates the student; `frozen` never asks; `hold` repeats the teacher's last mask;
`offline` learns from the first part of the stream and is frozen after it; `teacher` asks on every frame.

Accuracies are in [0, 1] like the threshold they are compared with; figures handed to `record` are in points.
"""

import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from dance_seg.distillation.learning import Lesson, agreement, attempt, images_of, learn, learn_offline, nearest
from dance_seg.distillation.options import OnlineDistillation
from dance_seg.distillation.state import StreamState
from dance_seg.distillation.teacher import Teacher, Teaching
from dance_seg.sample import IGNORE, Frame


class TeacherError(ValueError):
    """A teacher failed where the recipe says to stop; the state is that before the frame."""


class Asked(NamedTuple):
    """A frame that the teacher was asked of beside the stream."""

    frame: Frame
    prediction: np.ndarray  # (H, W) uint8, made before anything was learnt from it


class Followed(NamedTuple):
    """What became of one frame."""

    frame: Frame
    prediction: np.ndarray  # (H, W) uint8, made before anything was learnt from this frame: what is scored
    shown: np.ndarray  # (H, W) uint8: the teacher's mask where it came in time, else the prediction
    teaching: Teaching | None  # what the teacher said
    key_frame: bool  # whether the teacher was asked, and answered if this is not real time
    updates: int
    accuracy_before: float | None  # of the prediction against the teacher, in [0, 1]
    accuracy_after: float | None  # of the updated student on the same frame
    stride: int  # frames to the next key frame, as decided last
    seconds: Mapping[str, float]  # student, teacher, updates; 0 for what did not run
    scored: bool = True  # False in the part that an offline student learns from
    asked: Asked | None = None  # in real time: the frame that teaching, updates and accuracies are of; None: this one

    @property
    def taught(self) -> int | None:
        """The index of the frame that was asked of."""
        return None if self.asked is None else self.asked.frame.index


# The loop ---------------------------------------------------------------------------------------------------------


def follow(
    frames: Iterable[Frame],
    student: nn.Module,
    teacher: Teacher,
    options: OnlineDistillation,
    *,
    record: Callable[[dict[str, Any]], None] | None = None,
    state: StreamState | Mapping[str, Any] | None = None,
    key_frames: Collection[int] | None = None,
    num_frames: int | None = None,
    seed: int = 0,
) -> Generator[Followed, None, None]:
    """Follow a video by the options' method, each frame in turn: yields what became of each, when it is done with it.

    `record` gets the figures of each frame. `state` is where to go on: a StreamState, which the caller keeps and may
    save between any two frames (`state.record()`), or such a record; frames before its position, and frames that come
    again, are passed over. With `key_frames` the teacher is asked exactly there, whatever the accuracy: so that
    baselines can be given those of another run. `num_frames` and `seed` matter to `offline` alone, which has to know
    where the first part ends. A frame of another size than the one before is a key frame.

    Raises ValueError for options that do not fit teacher and student, for frames that are no images, for logits that
    are not finite; TeacherError where the teacher fails and the options say stop. State stays that of the last frame
    that was finished, so that the stream can be resumed from there.
    """
    state = state_of(state, student, teacher, options)
    first_part = 0
    if options.method == "offline":
        if num_frames is None:
            raise ValueError(
                "distillation.method offline learns from the first part of a stream; its length is unknown"
            )
        first_part = max(1, round(options.offline_share * num_frames))
    return _follow(frames, teacher, state, record, Schedule(key_frames, first_part, seed))


class Schedule(NamedTuple):
    """What a stream's method has to know besides its options and its state."""

    key_frames: Collection[int] | None = None
    first_part: int = 0  # frames that `offline` learns from
    seed: int = 0


def _follow(
    frames: Iterable[Frame],
    teacher: Teacher,
    state: StreamState,
    record: Callable[[dict[str, Any]], None] | None,
    schedule: Schedule,
) -> Generator[Followed, None, None]:
    follow_frame = METHODS[state.options.method]
    for frame in frames:
        if frame.index < state.position:
            state.passed_over += 1
            continue
        check_frame(frame)
        try:
            followed = follow_frame(frame, teacher, state, schedule)
        except TeacherError:
            raise
        except ValueError as error:
            raise told(error, frame, state.options) from error
        finish(state, followed)
        if record is not None:
            record(figures(followed))
        yield followed


def told(error: ValueError, frame: Frame, options: OnlineDistillation) -> ValueError:
    """What student or updates failed by, with the frame and with what is to blame more often than not."""
    return ValueError(f"frame {frame.index}: {error}; distillation.learning_rate is {options.learning_rate:g}")


def state_of(
    state: StreamState | Mapping[str, Any] | None, student: nn.Module, teacher: Teacher, options: OnlineDistillation
) -> StreamState:
    """The state to go on from: the one given, one made of a record, or a new one."""
    if isinstance(state, StreamState):
        if state.student is not student or state.options != options:
            raise ValueError(
                "this state was started with another student or other options; StreamState.start a new one"
            )
        return state
    made = StreamState.start(student, teacher.classes, options)
    if state is not None:
        made.restore(state)
    return made


def finish(state: StreamState, followed: Followed) -> None:
    """Count a frame that is done; from here on a resumed stream does not see it again."""
    state.size = _size(followed.frame)
    state.position = followed.frame.index + 1
    state.frames += 1
    state.key_frames += followed.teaching is not None
    state.updates += followed.updates


# Methods ----------------------------------------------------------------------------------------------------------


def online_frame(frame: Frame, teacher: Teacher, state: StreamState, schedule: Schedule) -> Followed:
    """Predict; at a key frame ask the teacher, learn, and decide on the stride."""
    if not is_due(state, frame, schedule.key_frames):
        return predicted(frame, state)
    seconds = no_seconds()
    with timed(seconds, "student"):
        images = images_of(state.student, frame, state.options)
        first = attempt(state.student, images, _size(frame), gradients=True)
    teaching = ask(teacher, frame, state, seconds)
    if teaching is None:
        return _followed(frame, first.labels, state, seconds)
    with timed(seconds, "updates"):
        lesson = learn(state, images, teaching, first)
    state.stride = state.options.next_stride(state.stride, lesson.after)
    state.next_key_frame = frame.index + state.stride
    return _followed(frame, first.labels, state, seconds, teaching, lesson)


def frozen_frame(frame: Frame, teacher: Teacher, state: StreamState, schedule: Schedule) -> Followed:
    """Predict, and never learn."""
    return predicted(frame, state)


def teacher_frame(frame: Frame, teacher: Teacher, state: StreamState, schedule: Schedule) -> Followed:
    """The teacher's labels are the prediction, on every frame."""
    seconds = no_seconds()
    teaching = ask(teacher, frame, state, seconds)
    state.held = held_mask(state, frame) if teaching is None else without_unknown(teaching.labels, state, frame)
    state.next_key_frame = frame.index + 1
    return _followed(frame, state.held, state, seconds, teaching)


def hold_frame(frame: Frame, teacher: Teacher, state: StreamState, schedule: Schedule) -> Followed:
    """The last mask is the prediction; at key frames the teacher makes a new one, for the frames after.

    Key frames are those given, or the same controller decides by how well the old mask still fits.
    """
    prediction, seconds = held_mask(state, frame), no_seconds()
    teaching = ask(teacher, frame, state, seconds) if is_due(state, frame, schedule.key_frames) else None
    if teaching is None:
        return _followed(frame, prediction, state, seconds)
    fits = agreement(state, prediction, teaching)
    state.held = without_unknown(teaching.labels, state, frame)
    state.stride = state.options.next_stride(state.stride, fits)
    state.next_key_frame = frame.index + state.stride
    return _followed(frame, prediction, state, seconds, teaching, Lesson(0, fits, fits))


def offline_frame(frame: Frame, teacher: Teacher, state: StreamState, schedule: Schedule) -> Followed:
    """In the first part the teacher is asked every `stride_min` frames; at its end the student learns from them all.

    From then on it is frozen. The first part is not scored: the student is to be judged after it has learnt.
    """
    if frame.index >= schedule.first_part:
        trained_now = 0
        seconds = no_seconds()
        if not state.trained:
            with timed(seconds, "updates"):
                trained_now = learn_offline(state, schedule.seed)
        followed = predicted(frame, state)
        return followed._replace(updates=trained_now, seconds={**followed.seconds, "updates": seconds["updates"]})
    followed = predicted(frame, state)._replace(scored=False)
    if not is_due(state, frame, schedule.key_frames):
        return followed
    seconds = dict(followed.seconds)
    teaching = ask(teacher, frame, state, seconds)
    if teaching is None:
        return followed._replace(seconds=seconds)
    state.kept.append((frame.image, teaching))
    state.next_key_frame = frame.index + state.options.stride_min
    return followed._replace(teaching=teaching, key_frame=True, shown=teaching.labels, seconds=seconds)


METHODS: dict[str, Callable[[Frame, Teacher, StreamState, Schedule], Followed]] = {
    "online": online_frame,
    "teacher": teacher_frame,
    "frozen": frozen_frame,
    "hold": hold_frame,
    "offline": offline_frame,
}


# What the methods share -------------------------------------------------------------------------------------------


def is_due(state: StreamState, frame: Frame, key_frames: Collection[int] | None = None) -> bool:
    """Whether the teacher is to be asked."""
    if key_frames is not None:
        return frame.index in key_frames
    return frame.index >= state.next_key_frame or (state.size is not None and state.size != _size(frame))


def ask(teacher: Teacher, frame: Frame, state: StreamState, seconds: dict[str, float]) -> Teaching | None:
    """What the teacher says of a frame; None where it failed, and is asked again `stride_min` frames later.

    Raises TeacherError where the options say to stop then.
    """
    try:
        with timed(seconds, "teacher"):
            return checked(teacher(frame), frame, len(state.classes))
    except Exception as error:  # whatever a teacher may raise
        go_on_without(state, frame.index, error)
        return None


def go_on_without(state: StreamState, index: int, error: Exception) -> None:
    """Count a failure of the teacher and ask it again `stride_min` frames after that frame.

    Raises TeacherError where the options say to stop.
    """
    reason = f"frame {index}: the teacher failed: {str(error) or type(error).__name__}"
    if state.options.teacher_failure == "stop":
        raise TeacherError(f"{reason}; distillation.teacher_failure=skip goes on without it") from error
    if not state.teacher_failures:
        warnings.warn(f"{reason}; the student goes on alone, and later failures are only counted", stacklevel=2)
    state.teacher_failures += 1
    state.next_key_frame = index + state.options.stride_min


def checked(teaching: Teaching, frame: Frame, num_classes: int) -> Teaching:
    """What a teacher said, if it is labels of this frame. Raises ValueError if it is not."""
    labels = teaching.labels
    if labels.dtype != np.uint8 or labels.shape != frame.image.shape[:2]:
        raise ValueError(
            f"its labels are {labels.dtype} {labels.shape} for a frame of {frame.image.shape[:2]}; they must be uint8 "
            "of the frame's size"
        )
    largest = int(labels.max(where=labels != IGNORE, initial=0))
    if largest >= num_classes:
        raise ValueError(f"it says class {largest}, and there are {num_classes}, from 0 on ({IGNORE} for unknown)")
    return teaching


def predicted(frame: Frame, state: StreamState) -> Followed:
    """A frame that the student labels alone."""
    seconds = no_seconds()
    with timed(seconds, "student"):
        labels = attempt(
            state.student, images_of(state.student, frame, state.options), _size(frame), gradients=False
        ).labels
    return _followed(frame, labels, state, seconds)


def held_mask(state: StreamState, frame: Frame) -> np.ndarray:
    """The mask held for this frame, at its size; before there is any, class 0 everywhere."""
    return np.zeros(_size(frame), np.uint8) if state.held is None else nearest(state.held, _size(frame))


def without_unknown(labels: np.ndarray, state: StreamState, frame: Frame) -> np.ndarray:
    """The teacher's labels, and where it does not know the mask held so far."""
    return np.where(labels == IGNORE, held_mask(state, frame), labels)


def check_frame(frame: Frame) -> None:
    """Raise ValueError for a frame that is no image, or whose ground truth is not of its size."""
    image = frame.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            f"frame {frame.index}: is {image.dtype} {image.shape}; a frame is RGB uint8 (H, W, 3), not empty"
        )
    if frame.label is not None and frame.label.shape != image.shape[:2]:
        raise ValueError(f"frame {frame.index}: its label is {frame.label.shape}, its image {image.shape[:2]}")


def figures(followed: Followed) -> dict[str, Any]:
    """The figures of one frame, for metrics.jsonl: accuracies in points, times in milliseconds."""
    found: dict[str, Any] = {
        "stream/frame": followed.frame.index,
        "stream/seconds": followed.frame.seconds,
        "stream/key_frame": int(followed.key_frame),
        "stream/stride": followed.stride,
        "stream/updates": followed.updates,
        **{f"cost/{what}_ms": 1000 * seconds for what, seconds in followed.seconds.items()},
    }
    if followed.frame.cut is not None:
        found["stream/cut"] = int(followed.frame.cut)
    if followed.accuracy_before is not None and followed.accuracy_after is not None:
        found["stream/accuracy_before"] = 100 * followed.accuracy_before
        found["stream/accuracy_after"] = 100 * followed.accuracy_after
    if followed.taught is not None:
        found["stream/taught"] = followed.taught
    return found


def no_seconds() -> dict[str, float]:
    """Times of a frame on which nothing ran yet."""
    return {"student": 0.0, "teacher": 0.0, "updates": 0.0}


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add how long something took. What is timed ends with labels on the CPU, so accelerators are waited for."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] += time.perf_counter() - began


def _followed(
    frame: Frame,
    prediction: np.ndarray,
    state: StreamState,
    seconds: Mapping[str, float],
    teaching: Teaching | None = None,
    lesson: Lesson | None = None,
) -> Followed:
    return Followed(
        frame,
        prediction,
        prediction if teaching is None else teaching.labels,
        teaching,
        teaching is not None,
        lesson.updates if lesson else 0,
        lesson.before if lesson else None,
        lesson.after if lesson else None,
        state.stride,
        seconds,
    )


def _size(frame: Frame) -> tuple[int, int]:
    return frame.image.shape[0], frame.image.shape[1]
