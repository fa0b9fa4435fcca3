"""A comparison as one page: the saving at a glance, the same pictures for every run, curves, and the whole table."""

from collections.abc import Sequence

import numpy as np

from dance_seg.report.charts import Line, Mark, line_chart, scatter, series_class
from dance_seg.report.comparison import COSTS_WITH_FRONT, Comparison
from dance_seg.report.page import (
    Bar,
    Bars,
    Block,
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
    change_text,
    listed,
    seconds_text,
)
from dance_seg.report.pictures import embedded_image, embedded_indices, fitted, marked_errors, points_right
from dance_seg.report.predictions import PICTURE_BYTES, Shown, class_keys, panels_bytes, read_pictures
from dance_seg.report.rows import Column, Row
from dance_seg.report.runs import Run
from dance_seg.report.slimmed_data import plan_chart
from dance_seg.report.widths import compared

MOST_PICTURES = 3
MOST_READ = 12  # pictures of a run, to find those that all runs have
MOST_ROWS_WITH_PICTURES = 6
MOST_PLANS = 6
MOST_LABELS = 8  # names beside points; more would lie on one another


def comparison_page(comparison: Comparison) -> Page:
    """The page of a comparison."""
    rows, base = comparison.rows, comparison.rows[comparison.baseline]
    others = [row for row in rows if row is not base]
    title = f"{others[0].name} against {base.name}" if len(others) == 1 else f"{len(rows)} rows side by side"
    warnings = [f"Not finished: {', '.join(row.label for row in rows if not row.finished)}."] * (
        not comparison.finished
    )
    if not comparison.same_validation_data:
        warnings.append("The rows were scored on different data: their scores cannot be compared.")
    if comparison.ran_differently:
        what = ", ".join(comparison.ran_differently)
        warnings.append(f"The rows ran differently ({what}): part of a ratio may come from that; see the last lines.")
    return Page(
        title=title,
        subtitle=f"Ratios and differences are against {base.name}.",
        warning=" ".join(warnings),
        cards=cards(comparison, others[0]) if len(others) == 1 else (),
        sections=(
            glance(comparison),
            predictions(rows),
            curves(rows),
            trade_offs(comparison),
            savings(rows),
            compared([run for row in rows for run in row.runs]),
            figures(comparison),
        ),
        footer="Written by dance_seg. Scores are points, 0 to 100. One MAC is one multiplication and one addition.",
    )


def cards(comparison: Comparison, row: Row) -> tuple[Card, ...]:
    """How one row stands to the baseline."""
    base, found = comparison.rows[comparison.baseline], []
    names = {
        "val/miou_best": "mIoU, best",
        "cost/train_gmacs": "Training GMACs",
        "cost/train_seconds": "Training time",
        "cost/pixels": "Training pixels",
        "cost/images_dropped": "Images dropped",
        "inference/gmacs": "Inference GMACs",
    }
    for column in comparison.columns:
        ratio, difference = comparison.ratio(row, column), comparison.difference(row, column)
        if column.key not in names or difference is None:
            continue
        was, now = base.figures[column.key].mean, row.figures[column.key].mean
        note = f"{written(column, was)} → {written(column, now)}"
        if column.is_score:
            found.append(Card(names[column.key], f"{difference:+.2f}".replace("-", "−"), "points", note))
        elif ratio is not None and column.key != "cost/images_dropped":
            found.append(Card(names[column.key], change_text(ratio), "", note))
        else:
            found.append(Card(names[column.key], written(column, now), "", f"the baseline {written(column, was)}"))
    return tuple(found)


def glance(comparison: Comparison) -> Section:
    """Score and cost of every row as bars of common scales."""
    keys = ("val/miou_best", "cost/train_gmacs", "cost/train_seconds", "cost/pixels")
    columns = [column for column in comparison.columns if column.key in keys]
    if "val/miou_best" not in [column.key for column in columns]:
        columns = [column for column in comparison.columns if column.key == "val/miou_last"] + columns
    blocks = []
    for column in columns:
        present = {row.name: row.figures[column.key].mean for row in comparison.rows if column.key in row.figures}
        longest = 100.0 if column.is_score else max(present.values()) or 1.0
        bars = []
        for number, row in enumerate(comparison.rows):
            if row.name in present:
                against = comparison.cell(row, column)[1].partition(" [")[0]  # no room for the interval
                share = min(1.0, max(0.0, present[row.name] / longest))
                mark = "" if row.finished else " (unfinished)"
                said = column.text(present[row.name]) + (f" · {against}" if against else "")
                bars.append(Bar(row.name + mark, share, said, series_class(number)))
        blocks.append(Bars(tuple(bars), title=column.heading if column.is_score else f"Training {column.heading}"))
    return Section("At a glance", tuple(blocks), "" if blocks else "No run has a score or a cost yet.", narrow=True)


def predictions(rows: Sequence[Row]) -> Section:
    """The same validation images, predicted by each row."""
    title = "The same images, predicted by each"
    first = [(row, run) for row in rows if (run := next((run for run in row.runs if run.pictures), None))]
    compared = first[:MOST_ROWS_WITH_PICTURES]
    if not compared:
        return Section(title, note="No run has pictures yet.")
    common = set.intersection(*({picture.name for picture in run.pictures} for _, run in compared))
    read, problems = [], ""
    for _, run in compared:
        found, problem = read_pictures([picture for picture in run.pictures if picture.name in common][:MOST_READ])
        read.append({shown.picture.name: shown for shown in found})
        problems = problems or problem
    # The same name may stand for another image in another data set.
    names = [
        name for name, one in read[0].items() if all(name in other and same_label(one, other[name]) for other in read)
    ]
    if not names:
        return Section(title, note=f"The runs have no validation picture in common. {problems}".strip())
    images = [[by_name[name] for by_name in read] for name in names[:MOST_PICTURES]]
    titles = [row.name for row, _ in compared]
    blocks = fitted(lambda width: [_panels(titles, image, width) for image in images], PICTURE_BYTES, panels_bytes)
    keys = class_keys(compared[0][1], [shown for image in images for shown in image])
    note = "Above the image and the predictions, below the label and the errors: wrong pixels red, unscored ones dark."
    if len(compared) < len(rows):
        note += f" {len(rows) - len(compared)} of {len(rows)} rows are not shown."
    return Section(title, (*blocks, Legend(keys)), f"{note} {problems}".strip())


def same_label(one: Shown, other: Shown) -> bool:
    """Whether two pictures are of the same labelled image."""
    return np.array_equal(one.label.ids, other.label.ids)


def _panels(titles: Sequence[str], image: Sequence[Shown], width: int) -> Panels:
    first = image[0]
    above = [Panel(embedded_image(first.image, width), "image")]
    below = [Panel(embedded_indices(first.label, width), "label")]
    for title, shown in zip(titles, image, strict=True):
        right = points_right(shown.label.ids, shown.prediction.ids)
        errors = marked_errors(shown.image, shown.label.ids, shown.prediction.ids)
        above.append(Panel(embedded_indices(shown.prediction, width), title))
        below.append(Panel(embedded_image(errors, width), "" if right is None else f"{right:.1f} % right"))
    return Panels((*above, *below), title=first.picture.name, columns=len(above))


def curves(rows: Sequence[Row]) -> Section:
    """mIoU of every run against epochs, seconds and MACs of training."""
    charts = []
    against = (
        ("epochs", "", "epoch"),
        ("training time", "cost/train_seconds", "seconds"),
        ("training cost", "cost/train_gmacs", "GMACs"),
    )
    for title, key, unit in against:
        lines = []
        for number, row in enumerate(rows):
            for run in row.runs:
                x, y = score_against(run, key)
                lines.append(Line(x, y, run.name, series=number, markers=len(rows) <= 4 and len(row.runs) == 1))
        drawing = line_chart(lines, title=f"mIoU against {title}", x_label=unit, y_label="mIoU, points", whole=not key)
        if drawing:
            charts.append(Chart(f"mIoU against {title}", drawing))
    if not charts:
        return Section("Curves", note="No validation yet.")
    return Section("Curves", (Legend(row_keys(rows)), *charts))


def score_against(run: Run, key: str) -> tuple[list[float], list[float]]:
    """mIoU of each validation, and what had been spent by then; epochs when there is no key."""
    x, y = [], []
    for validation in run.validations:
        spent = validation.epoch if not key else run.spent.get(validation.epoch, {}).get(key)
        if spent is not None:
            x.append(float(spent))
            y.append(validation.miou)
    return x, y


def trade_offs(comparison: Comparison) -> Section:
    """Score against each cost, a point for each row, with the Pareto front of the finished ones."""
    title, rows = "Score against cost", comparison.rows
    score = next((column for column in comparison.columns if column.is_score), None)
    fronts = {front.cost.key: front for front in comparison.fronts()}
    charts = []
    for column in comparison.columns:
        if score is None or column.key not in COSTS_WITH_FRONT:
            continue
        front = fronts.get(column.key)
        beaten = front.beaten_by if front else {}
        points = [
            Mark(
                row.figures[column.key].mean,
                row.figures[score.key].mean,
                row.name,
                number,
                hollow=bool(beaten.get(row.name)),
                spread=row.figures[score.key].std or 0.0,
            )
            for number, row in enumerate(rows)
            if {column.key, score.key} <= row.figures.keys()
        ]
        if len({point.x for point in points}) < 2:  # nothing to trade
            continue
        drawing = scatter(
            points,
            title=f"{score.heading} against {column.title}",
            x_label=column.heading,
            y_label=score.heading,
            front=[front.points[name] for name in front.members] if front else (),
            labelled=len(rows) <= MOST_LABELS,
        )
        said = [f"{name} (by {listed(others, 2)})" for name, others in beaten.items() if others]
        note = f"Dominated: {'; '.join(said)}." if said else ""
        charts.append(Chart(f"{column.group}: {column.heading}", drawing, note))
    if not charts:
        return Section(title, note="No two rows have a score and different costs.")
    note = "Up and to the left is better. The line is the Pareto front: no row costs less and scores more."
    note += " Hollow points are dominated: another row costs no more and scores no less."
    note += " Whiskers: the standard deviation over seeds." * any(len(row.runs) > 1 for row in rows)
    return Section(title, (Legend(row_keys(rows)), *charts), note)


def savings(rows: Sequence[Row]) -> Section:
    """How the slimmed rows spent less: their plans."""
    first = [(row.name, row.runs[0]) for row in rows]
    slimmed = [(name, run.plan) for name, run in first if run.plan and run.recipe.get("data_slimming")]
    blocks = tuple(plan_chart(plan, name) for name, plan in slimmed[:MOST_PLANS])
    note = "What each epoch did with the images." if blocks else "No row has data slimming."
    return Section("Where pixels were saved", blocks, note)


def figures(comparison: Comparison) -> Section:
    """All figures, then what to know before comparing them."""
    blocks: list[Block] = []
    for group, columns in comparison.groups():
        rows = []
        for number, row in enumerate(comparison.rows):
            cells = [Cell(*comparison.cell(row, column)) for column in columns]
            title = Cell(row.label, "baseline" if number == comparison.baseline else "", series_class(number))
            rows.append((title, *cells))
        head = ("", *(column.heading for column in columns))
        blocks.append(Table(head, tuple(rows), title=group, wide=True))
    if notes := comparison.all_notes():
        blocks.append(Lines(notes, title="Before comparing"))
    if comparison.differences:
        blocks.append(Lines(comparison.differences, title="How the recipes differ from the baseline's"))
    return Section("All figures", tuple(blocks))


def row_keys(rows: Sequence[Row]) -> tuple[Key, ...]:
    """The colour of each row."""
    return tuple(Key(row.label, series_class(number)) for number, row in enumerate(rows))


def written(column: Column, value: float) -> str:
    """A figure as people say it."""
    return seconds_text(value) if column.key == "cost/train_seconds" else column.text(value)
