"""A run folder as one page: what came out, on pictures and by class, what it cost, and how it was trained.

    write_report("runs/camvid_data_slimming")  # writes runs/camvid_data_slimming/report.html

Each section is a function of the run; a part that is not there yet leaves one line that says so.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dance_seg.data_slimming.plan import DataSlimming
from dance_seg.errors import DataError
from dance_seg.machine import write_text
from dance_seg.report.charts import Layer, Line, Mark, Span, histogram, line_chart, shades, stacked_chart
from dance_seg.report.page import (
    Bar,
    Bars,
    Card,
    Cell,
    Chart,
    Details,
    Key,
    Legend,
    Page,
    Panel,
    Panels,
    Section,
    Stack,
    Table,
    change_text,
    count_text,
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
from dance_seg.report.runs import Picture, Run, Thumbnail, Validation, WholePlan, number, read_run, section
from dance_seg.report.widths import slimming

MOST_PICTURES = 8
PICTURE_BYTES = 2_600_000  # of validation pictures in a page
STEPS = ("step", "forward", "backward")  # kinds of cost that are training itself; the others are overheads
THUMBNAIL_BYTES = 600_000  # of each row of training images


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
            plan(run),
            complexity(run),
            slimming(run),
            recipe(run),
            circumstances(run),
        ),
        footer="Written by dance_seg. Scores are points, 0 to 100. One MAC is one multiplication and one addition.",
    )


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
        value, _, unit = seconds_text(seconds).partition(" ") if seconds < 120 else (seconds_text(seconds), "", "")
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


# Pictures ---------------------------------------------------------------------------------------------------------


def predictions(run: Run) -> Section:
    """Image, label, prediction and errors of a few validation images."""
    title = "Predictions beside labels"
    shown, problems = read_pictures(run.pictures[:MOST_PICTURES])
    if not shown:
        return Section(title, note=problems or "No pictures yet: they are kept at each validation.")
    rows = fitted(lambda width: [_panels(one, width) for one in shown], PICTURE_BYTES, panels_bytes)
    note = "Validation images as the newest validation saw them. Wrong pixels are red; dark ones are not scored."
    return Section(title, (*rows, Legend(class_keys(run, shown))), f"{note} {problems}".strip())


class Shown(NamedTuple):
    """A validation picture, read."""

    picture: Picture
    image: np.ndarray  # (H, W, 3)
    label: Indices
    prediction: Indices


def read_pictures(pictures: Sequence[Picture]) -> tuple[list[Shown], str]:
    """The pictures with image, label and prediction read, and a line about those that cannot be."""
    shown, problems = [], []
    for picture in pictures:
        try:
            label, prediction = read_indices(picture.label), read_indices(picture.prediction)
            if label.ids.shape != prediction.ids.shape:
                raise DataError(f"{picture.label}: label and prediction differ in size")
            shown.append(Shown(picture, read_image(picture.image), label, prediction))
        except DataError as error:
            problems.append(str(error))
    return shown, f"Left out: {listed(problems, 2)}." if problems else ""


def _panels(shown: Shown, width: int) -> Panels:
    picture, image, label, prediction = shown
    right = points_right(label.ids, prediction.ids)
    errors = marked_errors(image, label.ids, prediction.ids)
    return Panels(
        (
            Panel(embedded_image(image, width), "image"),
            Panel(embedded_indices(label, width), "label"),
            Panel(embedded_indices(prediction, width), "prediction"),
            Panel(embedded_image(errors, width), "errors"),
        ),
        title=picture.name,
        note="" if right is None else f"{right:.1f} % of the scored pixels are right",
    )


def panels_bytes(rows: Sequence[Panels]) -> int:
    """How large the pictures of rows are."""
    return sum(len(panel.uri) for row in rows for panel in row.panels)


def class_keys(run: Run, shown: Sequence[Shown]) -> tuple[Key, ...]:
    """The colours of the classes in the pictures; only of errors where the run does not name its classes."""
    present = sorted({int(i) for one in shown for ids in (one.label.ids, one.prediction.ids) for i in np.unique(ids)})
    palette = shown[0].label.palette
    named = [(run.classes[i], palette[i]) for i in present if i < len(run.classes)]
    named += [("wrong", np.array(WRONG)), ("not scored", np.array(IGNORED))]
    return tuple(Key(name, color="rgb({}, {}, {})".format(*(int(value) for value in color))) for name, color in named)


# Scores -----------------------------------------------------------------------------------------------------------


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


# Costs ------------------------------------------------------------------------------------------------------------


def costs(run: Run) -> Section:
    """Where seconds and MACs of training went; validation stands apart."""
    title = "Where the cost went"
    if not run.training:
        return Section(title, note="No cost yet: the ledger is written after each epoch.")
    blocks = [block for unit in ("seconds", "gmacs") if (block := cost_bars(run, unit)) is not None]
    return Section(
        title,
        (Stack(tuple(blocks)), Stack((inference_table(run), ledger_table(run)))),
        "Overheads of the method are part of its cost. Validation is not: it scores the run, it does not train it.",
    )


def cost_bars(run: Run, unit: str) -> Bars | None:
    """Bars of one unit: training steps, each overhead, and validation last in grey."""
    amounts = [(kind, figures[unit]) for kind, figures in run.charges.items() if figures.get(unit)]
    if not amounts:
        return None
    largest = max(value for _, value in amounts)
    total = sum(value for kind, value in amounts if kind != "validation")
    bars = []
    for kind, value in amounts:
        said = seconds_text(value) if unit == "seconds" else f"{figure_text(value)} GMACs"
        if kind == "validation":
            bars.append(Bar("validation (not training)", value / largest, said, "shade-0"))
        else:
            share = f" · {100 * value / total:.1f} %" if total and len(amounts) > 1 else ""
            bars.append(
                Bar(charge_name(kind), value / largest, said + share, "shade-5" if kind in STEPS else "series-1")
            )
    return Bars(tuple(bars), title="Seconds" if unit == "seconds" else "Multiply-accumulates")


def charge_name(kind: str) -> str:
    """A kind of cost in words."""
    words = {
        "step": "training steps",
        "forward": "steps, forward",
        "backward": "steps, backward",
        "scoring": "scoring complexity",
        "batch_norm": "BatchNorm statistics",
        "cache": "building caches",
        "cuts": "cutting channels",
    }
    return words.get(kind, kind.replace("_", " "))


def ledger_table(run: Run) -> Table:
    """Every sum of the ledger that is not zero, under the name by which it is logged."""
    rows = []
    for key, value in run.training.items():
        amount = number(value)
        if amount:
            rows.append((Cell(str(key)), Cell(f"{amount:,.0f}" if amount == int(amount) else figure_text(amount, 4))))
    return Table((), tuple(rows), title="The ledger", note="What is not listed is zero.")


def inference_table(run: Run) -> Table:
    """What one forward pass costs, and what was not counted."""
    inference = run.inference
    rows = [("input size", size_text(inference.get("input_size")))]
    for key, name in (("gmacs", "GMACs"), ("parameters", "parameters")):
        if (value := number(inference.get(key))) is not None:
            rows.append((name, figure_text(value, 4)))
    milliseconds = [f"{amount:.4g} ({key})" for key in ("p50", "p90") if (amount := number(run.latency.get(key)))]
    if milliseconds:
        rows.append(("milliseconds", ", ".join(milliseconds)))
        said = {"batch": "batch {}", "threads": "{} threads", "device": "{}", "dtype": "{}"}
        conditions = [form.format(run.latency[key]) for key, form in said.items() if key in run.latency]
        rows.append(("measured with", ", ".join(conditions) or "unknown"))
    if (joules := number(inference.get("joules_per_image"))) is not None:
        rows.append(("joules per image", figure_text(joules)))
    rows.append(("not counted", listed([str(name) for name in inference.get("uncounted") or ()], 8) or "nothing"))
    if not inference:
        rows = [("inference", "not measured")]
    return Table((), tuple((Cell(name), Cell(text)) for name, text in rows), title="One forward pass")


# Data slimming ----------------------------------------------------------------------------------------------------


def plan(run: Run) -> Section:
    """What each epoch does with the images: the share at each scale, what is dropped, the pixels paid."""
    title = "The plan, epoch by epoch"
    if not run.recipe.get("data_slimming"):
        return Section(title, note="No data slimming: every image is trained on at full resolution in every epoch.")
    if run.plan is None:
        return Section(title, note="No plan yet: it is written when training starts.")
    paid, dense = run.plan.pixels, run.plan.dense_pixels
    bars = Bars(
        (
            Bar("every image at full size in every epoch", 1.0, count_text(dense)),
            Bar("this plan", min(1.0, paid / dense), count_text(paid), "series-0"),
        ),
        title="Pixels of all epochs",
        note=f"{change_text(paid / dense)} against dense training.",
    )
    return Section(title, (plan_chart(run.plan), Stack((bars, plan_table(run.plan)))))


def plan_chart(plan: WholePlan, title: str = "Images of each epoch") -> Chart:
    """Stacked shares of the images offered, with the pixels paid as a line."""
    offered = np.array([max(epoch.images_offered, 1) for epoch in plan.epochs])
    served = np.array([epoch.images_per_scale for epoch in plan.epochs]).T / offered
    dropped = np.array([epoch.images_dropped for epoch in plan.epochs]) / offered
    height, width = plan.sizes[-1]
    pixels = np.array([epoch.pixels for epoch in plan.epochs]) / (offered * height * width)
    layers = [
        Layer(f"scale {scale:g} ({size_text(size)})", shares.tolist(), shade)
        for scale, size, shares, shade in zip(plan.scales, plan.sizes, served, shades(len(plan.scales)), strict=True)
    ]
    layers.append(Layer("dropped", dropped.tolist(), 0))
    notes = [
        f"epoch {k + 1}: "
        + ", ".join(f"{layer.name} {100 * layer.values[k]:.0f} %" for layer in layers)
        + f"; pixels {100 * pixels[k]:.0f} % of dense"
        for k in range(len(plan.epochs))
    ]
    line = Line((np.arange(len(pixels)) + 0.5).tolist(), pixels.tolist(), "pixels paid, of dense", series=1)
    drawing = stacked_chart(
        layers,
        title="Share of images at each scale and dropped, by epoch",
        x_label="epoch",
        y_label="of the images offered",
        notes=notes if len(notes) <= 400 else (),
        line=line,
    )
    return Chart(
        title,
        drawing,
        keys=(*(Key(layer.name, f"shade-{layer.shade}") for layer in layers), Key(line.name, "series-1")),
    )


def plan_table(plan: WholePlan) -> Table:
    """The plan's sums."""
    sums = {
        "steps": sum(epoch.steps for epoch in plan.epochs),
        "images offered": sum(epoch.images_offered for epoch in plan.epochs),
        "images paid": sum(epoch.images_paid for epoch in plan.epochs),
        "images dropped": sum(epoch.images_dropped for epoch in plan.epochs),
        "pixels": plan.pixels,
    }
    rows = [(Cell(name), Cell(f"{value:,}")) for name, value in sums.items()]
    if plan.weights:
        rows.append((Cell("loss weights at the end"), Cell(f"{min(plan.weights):.2f} to {max(plan.weights):.2f}")))
    return Table((), tuple(rows), title="All epochs together")


def complexity(run: Run) -> Section:
    """How complex the training images are, where the plan divides them, and the extreme ones."""
    title, values = "Complexity of the training images", run.plan.complexity if run.plan else ()
    rows = (thumbnail_row("Simplest", run.simplest, sorted(values)),
            thumbnail_row("Most complex", run.most_complex, sorted(values, reverse=True)))  # fmt: skip
    thumbnails = tuple(row for row in rows if row is not None)
    if run.plan is None or not values:
        slimmed = bool(run.recipe.get("data_slimming"))
        note = "Not scored yet." if slimmed else "No image was scored: the run has no data slimming."
        return Section(title, thumbnails, note)
    chart, note = complexity_chart(run, values, run.plan.measure.replace("_", " ") or "complexity")
    if not thumbnails:
        note += " There are no pictures of the simplest and the most complex images."
    return Section(title, (chart, *thumbnails), note)


def complexity_chart(run: Run, values: Sequence[float], measure: str) -> tuple[Chart, str]:
    """The histogram with the boundaries between scales, and a line that explains it."""
    options, defaults = section(run.recipe, "data_slimming"), DataSlimming()
    quantiles = [q for item in options.get("quantiles", defaults.quantiles) if (q := number(item)) is not None]
    drop_below = number(options.get("drop_below", defaults.drop_below)) or 0.0
    drop_rate = number(options.get("drop_rate", defaults.drop_rate)) or 0.0
    boundaries = [(float(np.quantile(values, min(max(q, 0.0), 1.0))), f"q {q:g}") for q in quantiles]
    drops = drop_below > 0 and drop_rate > 0
    svg = histogram(
        values,
        title="Histogram of complexity",
        x_label=measure,
        boundaries=boundaries,
        marked_below=float(np.quantile(values, min(drop_below, 1.0))) if drops else None,
    )
    keys = (Key("may be dropped", "shade-0"), Key("always kept", "shade-4")) if drops else ()
    note = f"{len(values):,} images, by {measure}. Lines: the quantiles that divide the scales"
    note += " (sizes are drawn, complexity shifts them)." if options.get("sizes") == "drawn" else "."
    return Chart("Distribution", svg, keys=keys), note


def thumbnail_row(title: str, found: Sequence[Thumbnail], values: Sequence[float]) -> Panels | None:
    """Training images in a row with their complexity, which is that of their rank among the values."""

    def panels(width: int) -> list[Panels]:
        made = []
        for one in found[:MOST_PICTURES]:
            try:
                uri = embedded_image(read_image(one.path), width)
            except DataError:
                continue
            made.append(Panel(uri, one.name, f"complexity {values[one.rank]:.4g}" if one.rank < len(values) else ""))
        return [Panels(tuple(made), title=title, small=True)]

    (row,) = fitted(panels, THUMBNAIL_BYTES, panels_bytes, widths=(320, 240, 160, 100))
    return row if row.panels else None


# The run ----------------------------------------------------------------------------------------------------------


def recipe(run: Run) -> Section:
    """The resolved recipe."""
    return Section("Recipe", (Details("recipe.yaml, every value resolved", run.recipe_text.strip()),))


def circumstances(run: Run) -> Section:
    """Where, when and with what the run was made."""
    facts, trainer = run.circumstances, section(run.recipe, "trainer")
    rows = [
        ("processor", f"{facts.get('processor', 'unknown')}, {facts.get('cores', '?')} cores"),
        ("accelerator", facts.get("accelerator", "unknown")),
        ("precision", trainer.get("precision", "32-true")),
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
    return Section("Circumstances", (table,), "" if facts else "run.json is missing.")


def elapsed_seconds(facts: Mapping[str, Any]) -> float | None:
    """Seconds from start to end, breaks included."""
    form = "%Y-%m-%dT%H:%M:%S%z"
    try:
        ended = datetime.strptime(str(facts.get("finished")), form) - datetime.strptime(str(facts.get("started")), form)
    except (ValueError, TypeError):
        return None
    return ended.total_seconds()


def size_text(size: Any) -> str:
    """A size (H, W) in words.

    >>> size_text([192, 256]), size_text(None)
    ('192 × 256', 'unknown size')
    """
    if isinstance(size, list | tuple) and len(size) == 2:
        return f"{size[0]} × {size[1]}"
    return "unknown size"
