"""A run folder as one page: what came out, on pictures and by class, what it cost, and how it was trained.

    write_report("runs/camvid_data_slimming")  # writes runs/camvid_data_slimming/report.html

Each section is a function of the run; a part that is not there yet leaves one line that says so.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dance_seg.machine import write_text
from dance_seg.report.charts import Line, Mark, Span, line_chart
from dance_seg.report.costs import costs, size_text
from dance_seg.report.exits import exits
from dance_seg.report.page import (
    Bar,
    Bars,
    Card,
    Cell,
    Chart,
    Details,
    Page,
    Section,
    Table,
    change_text,
    count_text,
    figure_text,
    listed,
    render,
    seconds_text,
)
from dance_seg.report.predictions import predictions
from dance_seg.report.roofline import roofline
from dance_seg.report.runs import Run, Validation, number, read_run, section
from dance_seg.report.search import search
from dance_seg.report.slimmed_data import complexity, image_losses, plan
from dance_seg.report.widths import slimming


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder, finished or not; returns its path.

    Raises ValueError when there is no such run, DataError when a file of it is damaged.
    """
    run = read_run(folder)
    return write_text(run.folder / "report.html", render(report(run)))


def report(run: Run) -> Page:
    """The page of a run."""
    return Page(
        title=run.name,
        subtitle=subtitle(run),
        warning="" if run.finished else f"Not finished: {run.epochs_done} of {run.max_epochs} epochs so far.",
        cards=cards(run),
        sections=(
            predictions(run),
            class_scores(run),
            curves(run),
            costs(run),
            *([roofline(run)] if run.other_costs.get("roofline") else []),
            plan(run),
            complexity(run),
            image_losses(run),
            slimming(run),
            *([exits(run)] if has_exits(run) else []),
            *([search(run)] if run.search else []),
            recipe(run),
            circumstances(run),
        ),
        footer="Written by dance_seg. Scores are points, 0 to 100. One MAC is one multiplication and one addition.",
    )


def has_exits(run: Run) -> bool:
    """Whether the network has several exits: it was calibrated, or validated at each."""
    return run.exits is not None or any("val/miou/exit_1" in row for row in run.rows)


def subtitle(run: Run) -> str:
    """What was trained on what, in a line."""
    arguments = section(section(run.recipe, "model"), "args")
    model = [section(run.recipe, "model").get("name"), arguments.get("arch"), arguments.get("encoder_name")]
    names = [str(name) for name in model if name and name != "smp"]
    halves = [name for name in ("data slimming", "network slimming") if run.recipe.get(name.replace(" ", "_"))]
    trained = " and ".join(halves) or "every image at full resolution"
    data = str(section(run.recipe, "data").get("name", "unknown data"))
    return " · ".join([data, " / ".join(names) or "smp", trained, f"{run.max_epochs} epochs", f"seed {run.seed}"])


def cards(run: Run) -> tuple[Card, ...]:
    """The headline figures, those that are there."""
    found = []
    chosen, training, inference = shown_validation(run), run.training, run.inference
    if chosen is not None and run.last is not None:
        note = f"best checkpoint, epoch {chosen.epoch}; last {run.last.miou:.2f}"
        note = note if run.best else f"last validation, epoch {chosen.epoch}"
        found.append(Card("mIoU", f"{chosen.miou:.2f}", "points", note))
    if (gmacs := number(training.get("cost/train_gmacs"))) is not None:
        found.append(Card("Training", figure_text(gmacs), "GMACs", against_dense(run)))
    if (seconds := number(training.get("cost/train_seconds"))) is not None:
        for unit, length in (("h", 3600), ("min", 60), ("s", 1)):  # in one word, to fit into the card
            if seconds >= 2 * length or unit == "s":
                break
        value = figure_text(seconds / length)
        found.append(Card("Training time", value, unit, str(run.circumstances.get("processor", ""))))
    dropped, offered = number(training.get("cost/images_dropped")), number(training.get("cost/images_offered"))
    if dropped is not None:
        share = f"{100 * dropped / offered:.1f} % of {offered:,.0f} offered" if offered else ""
        found.append(Card("Images dropped", f"{dropped:,.0f}", "", share))
    if (gmacs := number(inference.get("gmacs"))) is not None:
        found.append(
            Card("Inference", figure_text(gmacs), "GMACs", f"one image of {size_text(inference.get('input_size'))}")
        )
    if (parameters := number(inference.get("parameters"))) is not None:
        found.append(Card("Parameters", *count_text(parameters).split(" ", 1)))
    return tuple(found)


def shown_validation(run: Run) -> Validation | None:
    """The validation that the page is about: of the best checkpoint, or else the last."""
    return run.best or run.last


def against_dense(run: Run) -> str:
    """The pixels of the plan against those of the same epochs with every image at full resolution."""
    if run.plan is None:
        return ""
    return f"{change_text(run.plan.pixels / run.plan.dense_pixels)} pixels against dense epochs of full images"


def class_scores(run: Run) -> Section:
    """The IoU of each class, highest first."""
    title, chosen = "IoU of each class", shown_validation(run)
    if chosen is None or not chosen.iou:
        return Section(title, note="No validation yet.")
    ranked = sorted(chosen.iou.items(), key=lambda item: -item[1])
    bars = tuple(Bar(name, min(max(iou, 0.0), 100.0) / 100, f"{iou:.1f}") for name, iou in ranked)
    which = "of the best checkpoint" if run.best else "(the last; none may choose the best checkpoint yet)"
    accuracies = [
        f"{what} {value:.2f}"
        for what, value in (
            ("mIoU", chosen.miou),
            ("pixel accuracy", chosen.pixel_accuracy),
            ("class accuracy", chosen.class_accuracy),
        )
        if value is not None
    ]
    return Section(
        title, (Bars(bars, columns=True),), f"Validation {which}, after epoch {chosen.epoch}: {', '.join(accuracies)}."
    )


def curves(run: Run) -> Section:
    """Loss, mIoU and learning rate over the epochs."""
    scored = [v.epoch for v in run.validations]
    start = run.choose_from * run.max_epochs
    best = run.best
    marks = [Mark(best.epoch, best.miou, f"best {best.miou:.2f}")] if best else []
    charts = [
        Chart(
            "Loss",
            line_chart(
                [Line(*run.curve("train/loss"), name="loss")],
                title="Training loss over the epochs",
                x_label="epoch",
                y_label="loss of a batch",
                x_end=run.max_epochs,
                whole=True,
                from_zero=True,
            ),
        ),
        Chart(
            "mIoU",
            line_chart(
                [Line(scored, [v.miou for v in run.validations], name="mIoU", markers=True)],
                title="mIoU of each validation",
                x_label="epoch",
                y_label="points",
                x_end=run.max_epochs,
                whole=True,
                marks=marks,
                spans=[Span(start, run.max_epochs, "the best is chosen here")],
            ),
        ),
        Chart(
            "Learning rate",
            line_chart(
                [Line(*run.curve("train/lr"), name="learning rate")],
                title="Learning rate over the epochs",
                x_label="epoch",
                y_label="learning rate",
                x_end=run.max_epochs,
                whole=True,
                from_zero=True,
            ),
        ),
    ]
    missing = [chart.title for chart in charts if not chart.svg]
    notes = [f"Not logged yet: {', '.join(missing)}."] if missing else []
    broken = [str(row.get("step")) for row in run.rows if "train/loss" in (row.get("not_finite") or ())]
    if broken:
        notes.append(f"The loss was not finite at step {listed(broken, 3)}.")
    return Section("Curves", tuple(chart for chart in charts if chart.svg), " ".join(notes))


def recipe(run: Run) -> Section:
    """The resolved recipe."""
    return Section("Recipe", (Details("recipe.yaml, every value resolved", run.recipe_text.strip()),))


def circumstances(run: Run) -> Section:
    """Where, when and with what the run was made."""
    facts, trainer = run.circumstances, section(run.recipe, "trainer")
    rows = [
        ("processor", f"{facts.get('processor', 'unknown')}, {facts.get('cores', '?')} cores"),
        ("accelerator", facts.get("accelerator", "unknown")),
        ("executed in", execution_text(trainer)),
        ("commit", facts.get("commit") or "unknown"),
        ("seed", run.seed),
        ("started", facts.get("started", "unknown")),
        ("finished", facts.get("finished") or "not yet"),
        *((("elapsed", seconds_text(elapsed)),) if (elapsed := elapsed_seconds(facts)) is not None else ()),
        ("run id", facts.get("run_id", "unknown")),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in section(facts, "versions").items()) or "unknown",
        ),
    ]
    table = Table((), tuple((Cell(name), Cell(str(value))) for name, value in rows), figures=False)
    tried = trials_table(facts)
    return Section("Circumstances", (table, *((tried,) if tried else ())), "" if facts else "run.json is missing.")


def execution_text(trainer: Mapping[str, Any]) -> str:
    """Precision, memory layout and compilation, as the recipe has them.

    >>> execution_text({"precision": "bf16-mixed", "channels_last": True})
    'bf16-mixed, channels last'
    """
    layout = "" if "channels_last" not in trainer else f", channels {'last' if trainer['channels_last'] else 'first'}"
    return f"{trainer.get('precision', '32-true')}{layout}{', compiled' if trainer.get('compile') else ''}"


def trials_table(facts: Mapping[str, Any]) -> Table | None:
    """The ways to execute a step that were measured before training, the fastest first; None when none was."""
    trials = [trial for trial in facts.get("execution") or () if isinstance(trial, dict)]
    if not trials:
        return None
    timed = [(number(trial.get("milliseconds")), execution_text(trial)) for trial in trials]
    timed.sort(key=lambda pair: (pair[0] is None, pair[0]))
    rows = [(Cell(how), Cell("not run" if took is None else figure_text(took))) for took, how in timed]
    return Table(("a step executed in", "ms per image"), tuple(rows), title="Measured before training")


def elapsed_seconds(facts: Mapping[str, Any]) -> float | None:
    """Seconds from start to end, breaks included."""
    form = "%Y-%m-%dT%H:%M:%S%z"
    try:
        ended = datetime.strptime(str(facts.get("finished")), form) - datetime.strptime(str(facts.get("started")), form)
    except (ValueError, TypeError):
        return None
    return ended.total_seconds()
