"""A stream followed into a run folder: what `dance_seg.distillation` does, bound to files, trackers and checkpoints.

    runs/NAME/  recipe.yaml  run.json  metrics.jsonl (a row for each frame)  scores.json  cost.json
                checkpoints/step-*.ckpt (the state after so many frames)  pictures/ (sample frames)  report.html

The same command again goes on after the last frame of the newest whole checkpoint. A student's checkpoint is one like
any other: `tools.predict` and `tools.export` take it.
"""

import copy
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from torch import nn

from dance_seg.checkpoint import forget_older, newest_valid, save_checkpoint
from dance_seg.cost.macs import count_macs
from dance_seg.distillation.learning import attempt, images_of, learn
from dance_seg.distillation.online import Followed, TeacherError, checked, figures, follow
from dance_seg.distillation.real_time import follow_in_real_time
from dance_seg.distillation.scores import StreamScores, pricing, scored
from dance_seg.distillation.state import StreamState
from dance_seg.distillation.teacher import Teacher, check_classes
from dance_seg.errors import DataError
from dance_seg.machine import use_threads, write_text
from dance_seg.metrics_file import MetricsFile
from dance_seg.normalise import downsampled_size
from dance_seg.randomness import Stream, seed_torch
from dance_seg.recipe import Recipe, recipe_record
from dance_seg.run_folder import note, notes, open_folder, run_id, written_by_this_process
from dance_seg.sample import Frame
from dance_seg.signals import NotedSignals, StoppedBySignal
from dance_seg.stream_pictures import Film, SampleFrames
from dance_seg.teachers import Source, build_student, build_teacher, palette_of
from dance_seg.tracking import guarded_wandb_logger

WINDOW = 100  # frames over which the progress bar averages accuracy


class Pace(Protocol):
    """Frames at the pace of their own time: what `datamodules.paced.paced` makes."""

    dropped: int
    delay: float
    longest_delay: float

    def __iter__(self) -> Iterator[Frame]: ...

    def close(self) -> None:
        """End its thread."""


def follow_stream(
    recipe: Recipe,
    source: Source,
    folder: Path,
    teacher: Teacher | None = None,
    *,
    overlay: Path | None = None,
    stop_after: int | None = None,
    pace: Callable[[Iterable[Frame]], Pace] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Follow a video by a recipe into a run folder, going on where an interrupted run was; returns the folder.

    Without a `teacher` the recipe's is built. `overlay` is a film of what the user is shown. `stop_after` ends this
    call after so many frames, with the state saved. With a `pace` teacher and updates run beside inference, and frames
    that come too fast are dropped. SIGINT, SIGTERM and SIGUSR1 end it after the frame at hand, with the state saved.

    Raises StoppedBySignal then; ValueError when the folder holds a run of another recipe, when another process writes
    into it, and when classes of teacher, student and video differ; what the source and the teacher raise where they are
    told to stop, after the state was saved.
    """
    options = recipe.distillation
    if options is None:
        raise ValueError("the recipe has no section distillation, so nothing follows a video; train it by tools.train")
    if teacher is None:
        teacher = build_teacher(recipe, source)
    if source.classes:
        check_classes(teacher.classes, source.classes)
    broken: list[Exception] = []  # what frames could not be had by
    with ExitStack() as opened:  # closed in the reverse order, each also where closing another fails
        opened.enter_context(written_by_this_process(folder))
        recipe = open_folder(recipe, folder)
        use_threads(recipe.trainer.threads)
        if notes(folder).get("finished"):
            say(f"{folder} is finished; give another name= to follow anew")
            return folder
        student, student_recipe, structure = build_student(recipe, teacher.classes)
        run = StreamRunFiles(folder, recipe, student_recipe, structure, source, teacher, student)
        opened.callback(run.close)
        start = run.resume()
        if start:
            say(f"Going on after frame {start - 1}")
        film: Film | None = None
        if overlay is not None:
            film = Film(overlay, source.frames_per_second, run.palette, run.classes, start)
            opened.callback(film.close)
        frames = seeded(watched(run.frames(start), broken), recipe.seed)
        paced: Pace | None = None
        if pace is None:
            opened.callback(frames.close)
            known = source.num_frames
            stream = follow(frames, student, teacher, options, state=run.state, num_frames=known, seed=recipe.seed)
        else:
            paced = pace(begun(frames) if start else frames)  # which closes the frames: its thread reads them
            opened.callback(paced.close)
            stream = follow_in_real_time(
                watched(paced, broken),
                student,
                teacher,
                options,
                state=run.state,
                left_over=run.scores.add_left_over,
            )
        opened.callback(stream.close)
        judge = teacher if options.score_every_frame and paced is None else None
        bar = ProgressBar(run, source, progress)
        opened.callback(bar.close)
        try:
            with NotedSignals() as noted:
                for number, (followed, labels, found) in enumerate(scored(stream, run.scores, judge), start=1):
                    run.take(followed, labels, found, paced)
                    bar.show(followed, found)
                    if film is not None:
                        film.add(followed)
                    if noted.number or number == stop_after:
                        break
                else:
                    run.finish(paced)
                stream.close()  # in real time what is being learnt is finished and counted first
            run.save()
        except Exception as error:
            if not isinstance(error, TeacherError) and error not in broken:
                raise
            run.save()  # nothing was learnt from the frame at hand
            kind = TeacherError if isinstance(error, TeacherError) else DataError
            said = error if isinstance(error, ValueError) else f"{source.name}: {type(error).__name__}: {error}"
            saved = f"the state after {run.state.position} frames is saved in {folder}"
            raise kind(f"{said} ({saved})") from error
    if noted.number:
        raise StoppedBySignal(noted.number)
    return folder


class StreamRunFiles:
    """Everything that a stream writes into its run folder."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        student_recipe: Recipe,
        structure: dict[str, Any] | None,
        source: Source,
        teacher: Teacher,
        student: nn.Module,
    ) -> None:
        assert recipe.distillation is not None
        self.folder, self.recipe, self.teacher = folder, recipe, teacher
        self.classes, self.palette = tuple(teacher.classes), palette_of(source, teacher)
        self.state = StreamState.start(student, teacher.classes, recipe.distillation)
        self.source, self.structure = source, structure
        # What is counted is a copy: in real time another thread teaches the student meanwhile.
        self._counted = copy.deepcopy(student)
        self.price = pricing(self._counted, teacher, recipe.distillation)
        # Temporal stability takes up to four optical flows a frame: not for a camera that never ends.
        follows_motion = source.num_frames is not None
        self.scores = StreamScores(self.classes, recipe.distillation, price=self.price, stability=follows_motion)
        self.samples = SampleFrames(folder / "pictures", self.palette, source.num_frames)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self._record = {
            "recipe": recipe_record(student_recipe),
            "labels": label_record(source, self.classes, self.palette),
            "complexity": None,
        }
        self._saved_at, self._saved_position = time.monotonic(), -1
        self._last: Frame | None = None
        self._alone: dict[str, float] | None = None
        self._is_over = False  # whether the stream was followed to its end
        self._pace: dict[str, float] = {}
        self._dropped_before, self._problems_before = 0, Counter[str]()  # by the calls that this one goes on after
        self._problems: Mapping[str, int] = {}
        note(folder, classes=list(self.classes), source=source.name, num_frames=source.num_frames)
        tracking = recipe.tracking
        self.tracker = guarded_wandb_logger(
            folder,
            mode=tracking.wandb,
            project=tracking.project,
            name=recipe.name,
            run_id=run_id(folder),
            config=recipe_record(recipe) | {"run": notes(folder)},
            group=tracking.group,
            tags=[recipe.distillation.method, *tracking.tags],
            artifacts=tracking.artifacts,
        )

    def resume(self) -> int:
        """Stand where the newest whole checkpoint says; returns the index of the first frame to follow."""
        found = newest_valid(self.folder / "checkpoints", "step-*.ckpt")
        if found is None:
            self._give_up_from(0)
            return 0
        path, checkpoint = found
        stream = checkpoint["stream"]
        prefix = "model."
        weights = {name.removeprefix(prefix): tensor for name, tensor in checkpoint["state_dict"].items()}
        try:
            self.state.restore({**stream["state"], "student": weights})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.scores.load_state_dict(stream["scores"])
        self.samples.counts = dict(stream["samples"])
        self._problems_before = Counter(stream.get("problems", {}))
        self._pace = dict(stream.get("real_time") or {})
        self._dropped_before = int(self._pace.get("dropped", 0))
        self._saved_position = self.state.position
        self._give_up_from(self.state.position)
        return self.state.position

    def frames(self, start: int) -> Iterator[Frame]:
        """The frames from `start` on."""
        found = self.source.frames(start)
        self._problems = getattr(self.source, "problems", {})  # from now on: a source counts anew for each call
        return found

    def take(
        self, followed: Followed, labels: np.ndarray | None, found: Mapping[str, float], pace: Pace | None
    ) -> None:
        """Write what became of a frame."""
        row = {**figures(followed), **found}
        if pace is not None:
            self._note_pace(pace)
            row |= {"stream/delay_ms": 1000 * pace.delay, "stream/dropped": self._pace["dropped"]}
        index = followed.frame.index
        self.metrics.append(index, row)
        self._last = followed.frame
        if self.tracker is not None and (followed.key_frame or index % self.recipe.trainer.log_every == 0):
            self.tracker.log_metrics(row, index)
        sample, of_teacher = (followed, labels) if pace is None else known_by_now(followed)
        if sample is not None and self.samples.wants(sample):
            masks = self.samples.keep(sample, of_teacher)
            if self.tracker is not None:
                shown = {name: [mask] for name, mask in masks.items()}
                self.tracker.log_images("stream/samples", [sample.frame.image], shown, self.classes, index)
        if time.monotonic() - self._saved_at >= 60 * self.recipe.trainer.save_every_minutes:
            self.save()

    def finish(self, pace: Pace | None) -> None:
        """The stream is over: measure each part by itself, for the cost model."""
        if pace is not None:
            self._note_pace(pace)  # of frames that were dropped after the last one
        self._is_over = self.state.position > 0
        is_known = self.source.num_frames is not None  # a camera would be opened again, for another frame
        if self._last is None and self._is_over and is_known:  # it was stopped exactly at its end, and nothing came
            with suppress(Exception), closing(watched(self.source.frames(self.state.position - 1), [])) as frames:
                self._last = next(frames, None)
        if self._last is not None:
            self._alone = seconds_alone(self.state, self.teacher, self._last)

    def save(self) -> None:
        """Write scores, costs and the state, whole or not at all; nothing where nothing came since the last time."""
        if self.state.position == self._saved_position and not self._is_over:
            return
        state = self.state.record()  # first: it refuses to be saved where learning failed
        self._write_figures()
        student = state.pop("student")
        checkpoint = {
            "global_step": self.state.position,
            "dance_seg": self._record,
            "state_dict": {f"model.{name}": tensor for name, tensor in student.items()},
            "stream": {
                "state": state,
                "scores": self.scores.state_dict(),
                "samples": dict(self.samples.counts),
                "problems": self.problems(),
                "real_time": self._pace or None,
            },
            **({"structure": self.structure} if self.structure is not None else {}),
        }
        folder = self.folder / "checkpoints"
        save_checkpoint(checkpoint, folder / f"step-{self.state.position:08d}.ckpt")
        forget_older(folder)
        self.metrics.sync()
        self._saved_at, self._saved_position = time.monotonic(), self.state.position
        if self._is_over:
            note(self.folder, finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def close(self) -> None:
        """Let go of files and tracker."""
        self.metrics.close()
        if self.tracker is not None:
            self.tracker.finish()

    def problems(self) -> dict[str, int]:
        """Frames that the source left out or changed, by kind."""
        return dict(self._problems_before + Counter(self._problems))

    def _give_up_from(self, position: int) -> None:
        """Give up rows and pictures of frames that were followed after what was saved: in real time others come now."""
        if self.metrics.path.exists():
            self.metrics.mark_resumed(position - 1)
        for picture in self.samples.folder.glob("*_*.png"):
            index = picture.name.partition("_")[0]
            if index.isdecimal() and int(index) >= position:
                picture.unlink()

    def _note_pace(self, pace: Pace) -> None:
        longest = max(pace.longest_delay, self._pace.get("longest_delay", 0.0))
        self._pace = {"dropped": self._dropped_before + pace.dropped, "longest_delay": longest}

    def _write_figures(self) -> None:
        scores_ = self.scores.record()
        counted = {name: getattr(self.state, name) for name in ("teacher_failures", "passed_over", "late")}
        counted |= {"problems": self.problems(), "real_time": self._pace or None}
        write_text(self.folder / "scores.json", _json({**scores_, **counted}))
        costs: dict[str, Any] = {"stream": self.scores.costs(self._alone)}
        if self._last is not None:
            assert self.recipe.distillation is not None
            height, width = self._last.image.shape[:2]
            seen = downsampled_size((height, width), self.recipe.distillation.resolution)
            costs["inference"] = count_macs(self._counted, seen).as_record()
        write_text(self.folder / "cost.json", _json(costs))


def known_by_now(followed: Followed) -> tuple[Followed | None, np.ndarray | None]:
    """In real time: the frame that can be a sample now, with the teacher's labels of it.

    A key frame can when it was taught. Else a frame at which the scene changes can, without labels.
    """
    if followed.asked is not None and followed.teaching is not None:
        frame, prediction = followed.asked
        return followed._replace(frame=frame, prediction=prediction, key_frame=True), followed.teaching.labels
    return (followed if followed.frame.cut and not followed.key_frame else None), None


def label_record(source: Source, classes: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """The classes and colours of a checkpoint, as `LabelTable.as_record` writes them."""
    if source.label_table is not None:
        return source.label_table.as_record()
    table = [index if index < len(classes) or index == 255 else -1 for index in range(256)]
    return {"classes": list(classes), "palette": [list(color) for color in palette], "table": table}


FrameIterator = Generator[Frame, None, None]  # an iterator that can be closed


def watched(frames: Iterable[Frame], broken: list[Exception]) -> FrameIterator:
    """The frames, closed with this; what they raise is put into `broken`, and raised."""
    try:
        yield from frames
    except Exception as error:
        broken.append(error)
        raise


def seeded(frames: FrameIterator, seed: int) -> FrameIterator:
    """The frames; before each, torch is seeded by its index, so that resuming cannot change what is drawn for it."""
    with closing(frames):
        for frame in frames:
            seed_torch(seed, Stream.STEP, frame.index)
            yield frame


def begun(frames: FrameIterator) -> FrameIterator:
    """The frames, the first of them read already: to leave out those before it takes long, and is no stalling."""
    first = list(islice(frames, 1))

    def all_of_them() -> FrameIterator:
        with closing(frames):
            yield from first
            yield from frames

    return all_of_them()


def seconds_alone(state: StreamState, teacher: Teacher, frame: Frame, runs: int = 5) -> dict[str, float]:
    """Median seconds of the student, the teacher and one update, each measured by itself on a copy of the student.

    What this frame cannot tell is left out: the teacher where it fails, updates where there is nothing to learn or the
    weights diverge.
    """
    options = replace(state.options, threshold=1 - 1e-9, u_max=3, restore_best=False, method="online")
    size = frame.image.shape[:2]
    found: dict[str, list[float]] = {"student": [], "teacher": [], "updates": []}
    teaching = None
    with suppress(Exception):  # a teacher that fails has no time
        for _ in range(runs):
            began = time.perf_counter()
            teaching = checked(teacher(frame), frame, len(state.classes))
            found["teacher"].append(time.perf_counter() - began)
    with suppress(ValueError):  # logits that are not finite, after more updates than the stream itself would make
        for _ in range(runs):
            trial = StreamState.start(copy.deepcopy(state.student), state.classes, options)
            began = time.perf_counter()
            attempt(trial.student, images_of(trial.student, frame, options), size, gradients=False)
            found["student"].append(time.perf_counter() - began)
            if teaching is None:
                continue
            images = images_of(trial.student, frame, options)
            first = attempt(trial.student, images, size, gradients=True)
            began = time.perf_counter()
            lesson = learn(trial, images, teaching, first)
            if lesson.updates:
                found["updates"].append((time.perf_counter() - began) / lesson.updates)
    return {part: median(times) for part, times in found.items() if times}


class ProgressBar:
    """Frames per second, stride and accuracy of the last frames, on one line."""

    def __init__(self, run: StreamRunFiles, source: Source, shown: bool) -> None:
        from tqdm import tqdm

        at = run.state.position
        self.bar = tqdm(total=source.num_frames, initial=at, unit="frame", desc=source.name, disable=not shown)
        self.accuracies = deque[float](maxlen=WINDOW)

    def show(self, followed: Followed, found: Mapping[str, float]) -> None:
        """One frame further."""
        if "stream/accuracy" in found:
            self.accuracies.append(found["stream/accuracy"])
        self.bar.update(followed.frame.index + 1 - self.bar.n)  # dropped frames are passed too
        said = {"stride": followed.stride}
        if self.accuracies:
            said["accuracy"] = round(sum(self.accuracies) / len(self.accuracies), 1)  # type: ignore[assignment]
        if "cost/times_cheaper" in found:
            said["cheaper"] = f"{found['cost/times_cheaper']:.1f}x"  # type: ignore[assignment]
        self.bar.set_postfix(said, refresh=False)

    def close(self) -> None:
        """Leave the line as it is."""
        self.bar.close()


# Scores that outlive an interruption ------------------------------------------------------------------------------


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, default=float) + "\n"
