"""The run folder of a followed stream as one page: what the student scored, when it asked the teacher, what it cost.

    write_stream_report("runs/video_shapes")  # writes runs/video_shapes/report.html

Reads what `dance_seg.stream` writes: recipe.yaml, run.json, metrics.jsonl (a row for each frame), scores.json,
cost.json and pictures/. A part that is not there yet leaves one line that says so.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dance_seg.errors import DataError
from dance_seg.machine import write_text
from dance_seg.plain_data import read_object
from dance_seg.report.page import (
    Bar,
    Bars,
    Card,
    Cell,
    Chart,
    Key,
    Legend,
    Lines,
    Page,
    Panel,
    Panels,
    Section,
    Table,
    figure_text,
    listed,
    render,
    seconds_text,
)
from dance_seg.report.pictures import (
    IGNORED,
    WRONG,
    Indices,
    embedded_image,
    embedded_indices,
    fitted,
    marked_errors,
    points_right,
    read_image,
    read_indices,
)
from dance_seg.report.predictions import panels_bytes
from dance_seg.report.run_page import circumstances, recipe
from dance_seg.report.runs import Run, number, read_run, section
from dance_seg.report.timeline import Timeline, accuracy_chart, cost_chart, stride_chart

MOST_SAMPLES = 16
SAMPLE_BYTES = 3_200_000  # of sample frames in a page
_SAMPLE = re.compile(r"(\d+)_image\.png")
LESSON = ("accuracy", "accuracy_before", "accuracy_after", "updates", "stride")
"""What the row of a key frame says of its teaching; in real time the row before which that came back says it."""
COST_KINDS = {"student": "student, every frame", "teacher": "teacher, key frames", "updates": "updates of the student"}


@dataclass(frozen=True)
class StreamRun:
    """What the run folder of a stream holds."""

    run: Run
    scores: Mapping[str, Any]

    @property
    def costs(self) -> Mapping[str, Any]:
        """The sums of the stream in cost.json."""
        return section(dict(self.run.other_costs), "stream")

    @property
    def options(self) -> Mapping[str, Any]:
        """The section `distillation` of the recipe."""
        return section(self.run.recipe, "distillation")

    @property
    def method(self) -> str:
        """How the stream was followed, such as online."""
        return str(self.options.get("method", "online"))

    @property
    def is_real_time(self) -> bool:
        """Whether teacher and updates ran beside the stream."""
        return bool(section(dict(self.scores), "real_time")) or any("stream/taught" in row for row in self.run.rows)

    @cached_property
    def frame_rows(self) -> list[Mapping[str, Any]]:
        """The rows of metrics.jsonl that are about one frame, in order.

        In real time what a key frame taught stands in the row before which it came back; here it is in its own, and key
        frames of which nothing came back have no stride.
        """
        rows = [row for row in self.run.rows if number(row.get("stream/stride")) is not None]
        if not self.is_real_time:
            return rows
        lessons = {f"stream/{name}" for name in LESSON}
        by_frame = {int(row["step"]): {key: row[key] for key in row.keys() - lessons} for row in rows}
        for row in rows:
            taught = number(row.get("stream/taught"))
            if taught is not None and taught in by_frame:
                by_frame[int(taught)] |= {key: row[key] for key in row.keys() & lessons}
        return list(by_frame.values())

    @cached_property
    def timeline(self) -> Timeline | None:
        """The stream frame by frame; None when no frame was followed yet."""
        rows = self.frame_rows
        if not rows:
            return None
        keys = [row for row in rows if number(row.get("stream/key_frame"))]
        threshold = number(self.options.get("threshold"))
        return Timeline(
            frames=_column(rows, "step"),
            accuracy=_column(rows, "stream/accuracy"),
            key_frames=_column(keys, "step"),
            before=_column(keys, "stream/accuracy_before"),
            after=_column(keys, "stream/accuracy_after"),
            strides=_column(keys, "stream/stride"),
            cuts=tuple(int(row["step"]) for row in rows if number(row.get("stream/cut"))),
            threshold=float("nan") if threshold is None else 100 * threshold,
            limits=(
                number(self.options.get("stride_min")) or 8,
                number(self.options.get("stride_max")) or 64,
            ),
            times_cheaper={
                "milliseconds, measured": _column(rows, "cost/times_cheaper"),
                "MACs": _column(rows, "cost/times_cheaper_macs"),
            },
        )


def write_stream_report(folder: str | Path) -> Path:
    """Write report.html into the run folder of a stream, finished or not; returns its path.

    Raises ValueError when there is no such run, DataError when a file of it is damaged.
    """
    found = read_stream_run(folder)
    return write_text(found.run.folder / "report.html", render(stream_report(found)))


def read_stream_run(folder: str | Path) -> StreamRun:
    """Read the run folder of a stream. Raises ValueError and DataError as `read_run` does."""
    folder = Path(folder)
    return StreamRun(read_run(folder), read_object(folder / "scores.json"))


def stream_report(stream: StreamRun) -> Page:
    """The page of a stream."""
    run = stream.run
    done = len(stream.frame_rows)
    return Page(
        title=run.name,
        subtitle=subtitle(stream),
        warning="" if run.finished else f"Not finished: {done:,} frames so far.",
        cards=cards(stream),
        sections=(
            timeline(stream),
            samples(stream),
            class_scores(stream),
            costs(stream),
            recipe(run),
            circumstances(run),
        ),
        footer="Written by dance_seg. Scores are points, 0 to 100, of the student's prediction before any update on "
        "that frame. One MAC is one multiplication and one addition.",
    )


def subtitle(stream: StreamRun) -> str:
    """Who followed what, in a line."""
    recipe_record = stream.run.recipe
    source = str(stream.run.circumstances.get("source") or section(recipe_record, "data").get("name", "unknown video"))
    student = str(section(recipe_record, "model").get("name", "unknown student"))
    teacher = str(section(recipe_record, "teacher").get("name", "unknown teacher"))
    said = [source, f"student {student}", f"teacher {teacher}", f"method {stream.method}", f"seed {stream.run.seed}"]
    return " · ".join(said)


def foreground_miou(scored: Mapping[str, Any]) -> float | None:
    """The mIoU over the foreground classes, which a threshold goes by, where it is not that over all classes.

    >>> [foreground_miou({"miou": 84.5, "miou_foreground": foreground}) for foreground in (80.0, 84.5)]
    [80.0, None]
    """
    over_all, foreground = number(scored.get("miou")), number(scored.get("miou_foreground"))
    if over_all is None or foreground is None or abs(over_all - foreground) < 0.005:
        return None
    return foreground


def incidents(scores: Mapping[str, Any]) -> list[str]:
    """What a stream had to cope with, in lines; none where nothing was the matter.

    >>> incidents({"late": 0, "passed_over": 2, "problems": {"unreadable": 3}})
    ['2 frames came again or out of order, and were passed over', 'frames left out or changed: 3 unreadable']
    """
    waited, said = section(dict(scores), "real_time"), []
    if waited:
        dropped, delay = number(waited.get("dropped")) or 0, number(waited.get("longest_delay")) or 0.0
        said.append(f"in real time {dropped:,.0f} frames were dropped, and the longest delay was {delay:.2f} s")
    if late := number(scores.get("late")):
        said.append(f"key frames came {late:,.0f} frames late in all: teacher and updates were slower than the stride")
    if passed_over := number(scores.get("passed_over")):
        said.append(f"{passed_over:,.0f} frames came again or out of order, and were passed over")
    if problems := section(dict(scores), "problems"):
        kinds = ", ".join(f"{number(count) or 0:,.0f} {kind}" for kind, count in problems.items())
        said.append(f"frames left out or changed: {kinds}")
    if failures := number(scores.get("teacher_failures")):
        said.append(f"the teacher failed {failures:,.0f} times")
    return said


def cards(stream: StreamRun) -> tuple[Card, ...]:
    """The headline figures, those that are there."""
    found, scores, costs_ = [], stream.scores, stream.costs
    against_teacher = number(section(dict(scores), "against_teacher").get("miou"))
    if against_teacher is not None:
        scored = number(scores.get("frames_against_teacher"))
        note = f"{scored:,.0f} frames, before any update" if scored else ""
        note += _over_which(section(dict(scores), "against_teacher"))
        found.append(Card("mIoU against the teacher", f"{against_teacher:.2f}", "points", note))
    against_truth = number(section(dict(scores), "against_truth").get("miou"))
    if against_truth is not None:
        teacher = number(section(dict(scores), "teacher_against_truth").get("miou"))
        note = "" if teacher is None else f"the teacher {teacher:.2f}"
        note += _over_which(section(dict(scores), "against_truth"))
        found.append(Card("mIoU against ground truth", f"{against_truth:.2f}", "points", note))
    ratios = section(dict(costs_), "times_cheaper")
    if (ratio := number(ratios.get("milliseconds"))) is not None:
        macs = number(ratios.get("macs"))
        note = "measured milliseconds" + ("" if macs is None else f"; {figure_text(macs)} in MACs")
        found.append(Card("Than the teacher", f"{figure_text(ratio)}×", "cheaper", note))
    fraction, key_frames = number(scores.get("teacher_fraction")), number(scores.get("key_frames"))
    if fraction is not None:
        note = "" if key_frames is None else f"{key_frames:,.0f} key frames of {number(scores.get('frames')) or 0:,.0f}"
        found.append(Card("Frames with the teacher", f"{100 * fraction:.1f}", "%", note))
    if (updates := number(scores.get("updates"))) is not None:
        per_key = f"{figure_text(updates / key_frames, 2)} at a key frame" if key_frames else ""
        found.append(Card("Updates", f"{updates:,.0f}", "", per_key))
    stability = section(dict(scores), "stability")
    if (student := number(stability.get("student"))) is not None:
        teacher = number(stability.get("teacher"))
        note = "mIoU with the frame before, warped" + ("" if teacher is None else f"; the teacher {teacher:.1f}")
        found.append(Card("Temporal stability", f"{student:.1f}", "points", note))
    return tuple(found)


def _over_which(scored: Mapping[str, Any]) -> str:
    foreground = foreground_miou(scored)
    return "" if foreground is None else f"; over all classes, {foreground:.2f} over the foreground"


def timeline(stream: StreamRun) -> Section:
    """Accuracy, stride and cost along the stream."""
    line = stream.timeline
    if line is None:
        return Section("The stream", note="No frame was followed yet.")
    known_cuts = ("scene cut", "boundary") if line.cuts else None
    charts = (
        Chart(
            "Accuracy against the teacher",
            accuracy_chart(line),
            keys=(
                Key("each frame, before any update", "series-0"),
                Key("key frame before its updates", "series-1"),
                Key("and after them", "series-2"),
            ),
            wide=True,
        ),
        Chart(
            "Stride",
            stride_chart(line),
            keys=(Key("frames to the next key frame", "series-0"), Key("key frames", "series-1")),
            wide=True,
        ),
        Chart(
            "Cost so far",
            cost_chart(line),
            keys=tuple(
                Key(name, f"series-{k}")
                for k, name in enumerate(n for n, v in line.times_cheaper.items() if np.isfinite(v).any())
            ),
            wide=True,
        ),
    )
    notes = ["Accuracy of a frame is the mean IoU over the foreground classes found in either, in points."]
    notes.append("Dashed upright lines are scene cuts." if known_cuts else "Nobody told where scenes change.")
    if (missing := [chart.title for chart in charts if not chart.svg]) != []:
        notes.append(f"Not known: {listed(missing)}.")
    told = incidents(stream.scores)
    beside = (Lines(tuple(told), title="What it had to cope with"),) if told else ()
    return Section("The stream", (*(chart for chart in charts if chart.svg), *beside), " ".join(notes))


def samples(stream: StreamRun) -> Section:
    """Frames with the masks of student, teacher and ground truth side by side."""
    title, problems, shown = "Sample frames", [], []
    folder = stream.run.folder / "pictures"
    found = sorted((int(match[1]), path) for path in folder.glob("*_image.png") if (match := _SAMPLE.match(path.name)))
    for index, path in _spread(found, MOST_SAMPLES):
        try:
            masks = {
                kind: read_indices(mask)
                for kind in ("student", "teacher", "truth")
                if (mask := path.with_name(path.name.replace("_image", f"_{kind}"))).is_file()
            }
            shown.append((index, read_image(path), masks))
        except DataError as error:
            problems.append(str(error))
    left_out = f"Left out: {listed(problems, 2)}." if problems else ""
    if not shown:
        return Section(title, note=left_out or "No pictures yet: they are kept around cuts and key frames.")
    rows = {int(row["step"]): row for row in stream.frame_rows}

    def panels(width: int) -> list[Panels]:
        return [_sample(index, image, masks, rows.get(index, {}), width) for index, image, masks in shown]

    blocks = fitted(panels, SAMPLE_BYTES, panels_bytes)
    note = "The student's mask is from before any update on the frame. Wrong pixels, against the teacher, are red."
    legend = Legend(_class_keys(stream.run.classes, [masks for _, _, masks in shown]))
    return Section(title, (*blocks, legend), f"{note} {left_out}".strip())


def class_scores(stream: StreamRun) -> Section:
    """The IoU of each class: student against teacher, and both against ground truth where it exists."""
    title = "IoU of each class"
    columns = {
        "student, teacher as truth": section(dict(stream.scores), "against_teacher"),
        "student, ground truth": section(dict(stream.scores), "against_truth"),
        "teacher, ground truth": section(dict(stream.scores), "teacher_against_truth"),
    }
    columns = {name: scored for name, scored in columns.items() if scored}
    if not columns:
        return Section(title, note="No scores yet: they are written every few minutes and at the end.")
    classes = list(dict.fromkeys(name for scored in columns.values() for name in section(dict(scored), "iou")))

    def cell(value: Any) -> Cell:
        known = number(value)
        return Cell("–" if known is None else f"{known:.1f}")

    rows = [
        (Cell(name), *(cell(section(dict(scored), "iou").get(name)) for scored in columns.values())) for name in classes
    ]
    mean = (Cell("mIoU"), *(cell(scored.get("miou")) for scored in columns.values()))
    means = [mean]
    if any(foreground_miou(scored) is not None for scored in columns.values()):
        means.append((Cell("mIoU, foreground"), *(cell(scored.get("miou_foreground")) for scored in columns.values())))
    table = Table(("class", *columns), (*rows, *means), wide=True)
    return Section(title, (table,), "One confusion matrix over all scored frames; – where a class is in neither.")


def costs(stream: StreamRun) -> Section:
    """Where time went, what each part costs once, and the cost model beside what was measured."""
    title, found = "What it cost", stream.costs
    if not found:
        return Section(title, note="No cost yet: it is written every few minutes and at the end.")
    seconds = {kind: number(section(dict(found), "seconds").get(kind)) or 0.0 for kind in COST_KINDS}
    total = sum(seconds.values())
    bars = Bars(
        tuple(
            Bar(name, seconds[kind] / max(seconds.values()), _share_text(seconds[kind], total), f"series-{number_}")
            for number_, (kind, name) in enumerate(COST_KINDS.items())
        )
        if total
        else (),
        title="Seconds",
        note="Scoring, drawing and writing are no part of the cost, nor is the teacher on frames that are only scored.",
    )
    once, gmacs = section(dict(found), "milliseconds"), section(dict(found), "gmacs")
    counts = {kind: number(section(dict(found), "counts").get(kind)) for kind in COST_KINDS}
    rows = tuple(
        (Cell(name), *map(Cell, (_text(counts[kind], "{:,.0f}"), _figure(once.get(kind)), _figure(gmacs.get(kind)))))
        for kind, name in COST_KINDS.items()
    )
    table = Table(("part", "times", "ms once", "GMACs once"), rows, title="Each part once")
    ratios, model = section(dict(found), "times_cheaper"), section(dict(found), "model")
    sums = (
        (Cell("seconds, measured"), Cell(_figure(total)), Cell(_figure(ratios.get("milliseconds")))),
        (
            Cell("seconds, by the cost model"),
            Cell(_figure(model.get("seconds"))),
            Cell(_figure(model.get("times_cheaper"))),
        ),
        (Cell("GMACs"), Cell(_figure(gmacs.get("total"))), Cell(_figure(ratios.get("macs")))),
    )
    beside = Table(
        ("", "whole stream", "times cheaper than the teacher"),
        sums,
        title="The cost model beside what was measured",
        note="Model: frames × student + key frames × teacher + updates × update, each at its cost measured alone.",
    )
    return Section(title, (bars, table, beside))


def _sample(index: int, image: np.ndarray, masks: Mapping[str, Indices], row: Mapping[str, Any], width: int) -> Panels:
    names = {"student": "student", "teacher": "teacher", "truth": "ground truth"}
    panels = [Panel(embedded_image(image, width), "frame")]
    panels += [Panel(embedded_indices(masks[kind], width), name) for kind, name in names.items() if kind in masks]
    reference = masks.get("teacher") or masks.get("truth")
    if reference is not None and "student" in masks and masks["student"].ids.shape == reference.ids.shape:
        errors = marked_errors(image, reference.ids, masks["student"].ids)
        right = points_right(reference.ids, masks["student"].ids)
        panels.append(
            Panel(embedded_image(errors, width), "errors" if right is None else f"errors ({right:.1f} % right)")
        )
    return Panels(tuple(panels), title=f"Frame {index}{_occasion(row)}", note=_said_of(row))


def _occasion(row: Mapping[str, Any]) -> str:
    said = [
        name for key, name in (("stream/cut", "scene cut"), ("stream/key_frame", "key frame")) if number(row.get(key))
    ]
    return f": {', '.join(said)}" if said else ""


def _said_of(row: Mapping[str, Any]) -> str:
    before, after = number(row.get("stream/accuracy_before")), number(row.get("stream/accuracy_after"))
    if before is not None:
        updates = number(row.get("stream/updates")) or 0
        said = f"accuracy {before:.1f} before"
        if after is not None and updates:
            said += f", {after:.1f} after {updates:.0f} updates"
        stride = number(row.get("stream/stride"))
        return said + ("" if stride is None else f"; then a stride of {stride:.0f}")
    accuracy = number(row.get("stream/accuracy"))
    return "" if accuracy is None else f"accuracy {accuracy:.1f}"


def _class_keys(classes: Sequence[str], shown: Sequence[Mapping[str, Indices]]) -> tuple[Key, ...]:
    present = sorted({int(i) for masks in shown for mask in masks.values() for i in np.unique(mask.ids)})
    palette = next((mask.palette for masks in shown for mask in masks.values()), None)
    named = [] if palette is None else [(classes[i], palette[i]) for i in present if i < len(classes)]
    named += [("wrong", np.array(WRONG)), ("not scored", np.array(IGNORED))]
    return tuple(Key(name, color="rgb({}, {}, {})".format(*(int(value) for value in color))) for name, color in named)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    values = (number(row.get(key)) for row in rows)
    return np.array([float("nan") if value is None else value for value in values], dtype=float)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly over their order, the first and the last among them.

    >>> _spread(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def _share_text(seconds: float, total: float) -> str:
    return f"{seconds_text(seconds)} · {100 * seconds / total:.1f} %"


def _text(value: Any, form: str) -> str:
    known = number(value)
    return "–" if known is None else form.format(known)


def _figure(value: Any) -> str:
    known = number(value)
    return "–" if known is None else figure_text(known)
