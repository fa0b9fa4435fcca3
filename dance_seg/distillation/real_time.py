"""The loop for a stream that does not wait: the teacher and the updates run beside inference, in one thread.

Inference has a copy of the student, which is renewed when the updates of a key frame are done: what the user sees
never waits for the teacher. So a teacher's labels come some frames after the frame they are of, and teach the frames
after that. Which frames come at all is the source's affair; one that the loop is handed is predicted.

When things happen depends on the clock, so two runs differ; dance_seg.distillation.online.follow is the one that is
repeatable, and the one to measure accuracies by.
"""

import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from dance_seg.distillation.learning import Lesson, attempt, images_of, learn
from dance_seg.distillation.online import (
    Asked,
    Followed,
    check_frame,
    checked,
    figures,
    finish,
    go_on_without,
    is_due,
    no_seconds,
    state_of,
    timed,
    told,
)
from dance_seg.distillation.options import OnlineDistillation
from dance_seg.distillation.state import StreamState
from dance_seg.distillation.teacher import Teacher, Teaching
from dance_seg.sample import Frame


class Round(NamedTuple):
    """A key frame that was taught beside the stream."""

    asked: Asked
    teaching: Teaching | None
    lesson: Lesson | None
    seconds: Mapping[str, float]
    failure: Exception | None = None


def follow_in_real_time(
    frames: Iterable[Frame],
    student: nn.Module,
    teacher: Teacher,
    options: OnlineDistillation,
    *,
    record: Callable[[dict[str, Any]], None] | None = None,
    state: StreamState | Mapping[str, Any] | None = None,
    left_over: Callable[[Followed], None] | None = None,
) -> Generator[Followed, None, None]:
    """Follow a stream as it comes, learning beside it; arguments and state as those of `online.follow`.

    A key frame is `key_frame` when the teacher is asked. What it taught (teaching, updates, accuracies, seconds) stands
    with the frame before which it came back, and `asked` is the frame it is of, with what was predicted of it. What
    comes back after the last frame is learnt and counted, and handed to `left_over` as the frame that it is of.

    While a key frame is being learnt no other is begun: where the next would be due before, the stream is ahead of its
    teacher, which is warned of once and counted in `state.late`. When the caller closes this early, a key frame that is
    being learnt is finished first.

    Raises what `online.follow` raises, and ValueError for a method other than online.
    """
    check_real_time(options)
    return _follow(frames, student, teacher, state_of(state, student, teacher, options), record, left_over)


def check_real_time(options: OnlineDistillation) -> None:
    """Raise ValueError for a method that does not run in real time."""
    if options.method != "online":
        raise ValueError(
            f"distillation.method is {options.method}; only online runs in real time, baselines are measured"
        )


def _follow(
    frames: Iterable[Frame],
    student: nn.Module,
    teacher: Teacher,
    state: StreamState,
    record: Callable[[dict[str, Any]], None] | None,
    left_over: Callable[[Followed], None] | None,
) -> Generator[Followed, None, None]:
    shown = copy.deepcopy(student).eval()
    running: Future[Round] | None = None
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher") as beside:
        try:
            for frame in frames:
                if frame.index < state.position:
                    state.passed_over += 1
                    continue
                check_frame(frame)
                taught = None
                if running is not None and running.done():
                    done, running = running, None
                    taught = take_in(state, done.result(), frame)
                    shown.load_state_dict(student.state_dict())
                seconds = no_seconds()
                prediction = _predicted(shown, frame, state, seconds)
                begins = running is None and is_due(state, frame)
                if begins:
                    running = beside.submit(teach, state, teacher, Asked(frame, prediction))
                followed = _followed(frame, prediction, begins, state, seconds, taught)
                finish(state, followed)
                if record is not None:
                    record(figures(followed))
                yield followed
        finally:  # the stream is over, was closed, or failed
            if running is not None:
                _take_left_over(state, running.result(), left_over)


def _predicted(shown: nn.Module, frame: Frame, state: StreamState, seconds: dict[str, float]) -> np.ndarray:
    try:
        with timed(seconds, "student"):
            images = images_of(shown, frame, state.options)
            return attempt(shown, images, frame.image.shape[:2], gradients=False).labels
    except ValueError as error:
        raise told(error, frame, state.options) from error


def _take_left_over(state: StreamState, taught: Round, left_over: Callable[[Followed], None] | None) -> None:
    take_in(state, taught, None)
    frame, prediction = taught.asked
    followed = _followed(frame, prediction, True, state, no_seconds(), taught)
    state.key_frames += followed.teaching is not None
    state.updates += followed.updates
    if left_over is not None:
        left_over(followed)


def teach(state: StreamState, teacher: Teacher, asked: Asked) -> Round:
    """Ask the teacher and update the student: what runs beside the stream. A teacher that fails is returned.

    Raises what the updates fail by, and notes it in the state, which is then not to be saved.
    """
    seconds, frame = no_seconds(), asked.frame
    try:
        with timed(seconds, "teacher"):
            teaching = checked(teacher(frame), frame, len(state.classes))
    except Exception as error:  # whatever a teacher may raise
        return Round(asked, None, None, seconds, error)
    with timed(seconds, "updates"), state.lock:
        try:
            images = images_of(state.student, frame, state.options)
            first = attempt(state.student, images, teaching.labels.shape, gradients=True)
            lesson = learn(state, images, teaching, first)
        except ValueError as error:
            state.failure = told(error, frame, state.options)
            raise state.failure from error
        except Exception as error:
            state.failure = error
            raise
    return Round(asked, teaching, lesson, seconds)


def take_in(state: StreamState, taught: Round, frame: Frame | None) -> Round:
    """Decide on the next key frame by what came back before `frame`. Raises TeacherError as the options say."""
    if taught.failure is not None:
        go_on_without(state, taught.asked.frame.index, taught.failure)
        return taught
    assert taught.lesson is not None
    state.stride = state.options.next_stride(state.stride, taught.lesson.after)
    state.next_key_frame = taught.asked.frame.index + state.stride
    late = frame.index - state.next_key_frame if frame is not None else 0
    if frame is not None and late > 0:
        if not state.late:
            needed = taught.seconds["teacher"] + taught.seconds["updates"]
            warnings.warn(
                f"frame {frame.index}: teacher and updates took {needed:.2f} s, {late} frames longer than the stride "
                f"of {state.stride}; key frames come later than the accuracy asks for",
                stacklevel=2,
            )
        state.late += late
    return taught


def _followed(
    frame: Frame,
    prediction: np.ndarray,
    begins: bool,
    state: StreamState,
    seconds: dict[str, float],
    taught: Round | None,
) -> Followed:
    lesson = taught.lesson if taught else None
    return Followed(
        frame=frame,
        prediction=prediction,
        shown=prediction,
        teaching=taught.teaching if taught else None,
        key_frame=begins,
        updates=lesson.updates if lesson else 0,
        accuracy_before=lesson.before if lesson else None,
        accuracy_after=lesson.after if lesson else None,
        stride=state.stride,
        seconds={**taught.seconds, "student": seconds["student"]} if taught else seconds,
        asked=taught.asked if taught else None,
    )
