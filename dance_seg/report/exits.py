"""Where images leave a network with exits: what each exit is worth, what stopping saves, and who left where."""

from dance_seg.errors import DataError
from dance_seg.report.charts import Line, Mark, line_chart
from dance_seg.report.page import Bar, Bars, Block, Cell, Chart, Key, Panel, Panels, Section, Table, figure_text
from dance_seg.report.pictures import embedded_image, fitted, read_image
from dance_seg.report.predictions import panels_bytes
from dance_seg.report.runs import Exits, Run

PICTURE_BYTES = 600_000
UNITS = {"macs": ("GMACs", 1e9), "milliseconds": ("ms", 1.0)}


def exits(run: Run) -> Section:
    """The exits as a table, the curve of mIoU against cost, and pictures of what left at each."""
    found = run.exits
    if found is None:
        return Section("Exits", note=f"Not calibrated yet: python -m tools.calibrate {run.folder} --budget 0.5")
    spent = ", ".join(f"{figure_text(cost / UNITS[u][1])} {UNITS[u][0]}" for u, cost in found.spent.items())
    note = (
        f"Calibrated on {found.split} ({found.images} images) for {found.budget:g} of the whole network's "
        f"{UNITS[found.unit][0]}: mIoU {found.achieved[0]:.2f} at {spent} on average. Images leaving at random in the "
        f"same shares score {found.achieved[1]:.2f}. The thresholds were chosen on these images, which flatters; "
        "tools.evaluate scores others."
    )
    if found.epochs is not None and last_epoch(run) >= found.epochs:
        note = f"The network was trained on since: calibrate again. {note}"
    blocks: list[Block] = [exits_table(found), exits_bars(found)]
    blocks += [chart for unit in found.curves if (chart := exits_chart(found, unit)).svg]
    return Section("Exits", (*blocks, *leaving_rows(found)), note)


def last_epoch(run: Run) -> int:
    """The last epoch of which there are figures, from 0; -1 without any."""
    return max((int(row["epoch"]) for row in run.rows if "epoch" in row), default=-1)


def exits_table(found: Exits) -> Table:
    """One row per exit."""
    thresholds = ["never asked" if value is None else f"{value:.4f}" for value in found.thresholds]
    rows = [
        (
            Cell(f"exit {exit}"),
            Cell(threshold),
            Cell(f"{miou:.2f}"),
            *(Cell(figure_text(found.costs[unit][exit - 1] / UNITS[unit][1])) for unit in found.costs),
        )
        for exit, (threshold, miou) in enumerate(zip([*thresholds, "–"], found.mious, strict=True), start=1)
    ]
    head = ("exit", "leaves from", "mIoU if all leave here", *(UNITS[unit][0] for unit in found.costs))
    return Table(head, tuple(rows), title="What each exit is worth", wide=True)


def exits_bars(found: Exits) -> Bars:
    """The share of the images that leave at each exit."""
    bars = (Bar(f"exit {exit}", share, f"{share:.0%}".replace("%", " %")) for exit, share in enumerate(found.shares, 1))
    return Bars(tuple(bars), title="Where images leave")


def exits_chart(found: Exits, unit: str) -> Chart:
    """mIoU against the average cost: stopping by thresholds, by chance, and every image at one exit."""
    name, factor = UNITS[unit]
    points = found.curves[unit]
    lines = [
        Line([p[0] / factor for p in points], [p[1] for p in points], "by thresholds", 0),
        Line([p[2] / factor for p in points], [p[3] for p in points], "by chance", 1),
    ]
    marks = [
        Mark(cost / factor, miou, f"exit {exit}", hollow=True)
        for exit, (cost, miou) in enumerate(zip(found.costs[unit], found.mious, strict=True), start=1)
    ]
    marks += [Mark(one.costs[unit] / factor, one.miou, one.name, series=2) for one in found.beside]
    drawing = line_chart(
        lines,
        title=f"mIoU against {name}",
        x_label=f"{name} of an image, on average",
        y_label="mIoU",
        marks=[*marks, Mark(found.spent[unit] / factor, found.achieved[0], "chosen")],
    )
    keys = [Key("by thresholds", "series-0"), Key("by chance", "series-1")]
    if found.beside:
        keys.append(Key("networks that never stop", "series-2"))
    return Chart(f"mIoU against {name}", drawing, keys=tuple(keys))


def leaving_rows(found: Exits) -> tuple[Panels, ...]:
    """Images that left at each exit, with what was predicted."""
    numbers = sorted({one.exit for one in found.leaving})

    def rows(width: int) -> list[Panels]:
        made = []
        for exit in numbers:
            panels = []
            for one in found.leaving:
                if one.exit == exit:
                    try:
                        panels.append(Panel(embedded_image(read_image(one.path), width), one.name))
                    except DataError:
                        continue
            if panels:
                made.append(Panels(tuple(panels), title=f"Left at exit {exit}", small=True))
        return made

    return tuple(fitted(rows, PICTURE_BYTES, panels_bytes, widths=(320, 240, 160, 100))) if numbers else ()
