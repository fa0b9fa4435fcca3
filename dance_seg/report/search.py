"""A search of a supernet: what it found, how fast, and where that stands among other networks."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from dance_seg.errors import DataError
from dance_seg.report.charts import Line, Mark, line_chart, scatter
from dance_seg.report.page import Block, Cell, Chart, Key, Section, Table, figure_text
from dance_seg.report.runs import Run

UNITS = {"MACs": ("GMACs", 1e9), "ms": ("ms", 1.0)}
TITLE = "Search"


def search(run: Run) -> Section:
    """The plot of mIoU against cost, the best score so far, and the choices of the network that was found.

    Raises DataError when search.json is damaged.
    """
    found = run.search
    try:
        blocks: list[Block] = [chart for chart in (front_chart(found), progress_chart(found)) if chart.svg]
        if "best" in found:
            blocks.append(choices_table(found["best"]["subnet"]))
        return Section(TITLE, tuple(blocks), note(found))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{run.folder / 'search.json'}: is not what a search came to ({reason}); search again"
        ) from None


def note(found: Mapping[str, Any]) -> str:
    """How networks were judged, and what the best comes to."""
    about, (unit, factor) = found["about"], UNITS[found["unit"]]
    said = f"{len(found['history'])} networks judged on {about['images']} images of {about['split']}"
    if "best" in found:
        best = found["best"]
        said += f"; the best: mIoU {best['score']:.2f} at {figure_text(spent(best) / factor)} {unit} an image"
        said += ", leaving early where it is sure" if about["performance"] == "dynamic" else ""
    if "control" in found:
        said += f". Random search, as many networks: {found['control']['best']['score']:.2f}"
    return f"{said}. Networks have the weights of the supernet, and were chosen on these images, which flatters."


def spent(candidate: Mapping[str, Any]) -> float:
    """The cost of an image, on average where images leave early."""
    return float(candidate["details"].get("average_cost", candidate["cost"]))


def front_chart(found: Mapping[str, Any]) -> Chart:
    """What was found, beside the supernet's largest and smallest networks and other models."""
    unit, factor = UNITS[found["unit"]]
    front = [(one["cost"] / factor, one["score"]) for one in found.get("front", ())]
    marks = [Mark(cost, score, "") for cost, score in front]
    if "best" in found:
        marks.append(Mark(spent(found["best"]) / factor, found["best"]["score"], "found"))
    others = found.get("beside", ())
    marks += [
        Mark(one["cost"] / factor, one["score"], str(one["name"]), 1, hollow=one["name"] in ("largest", "smallest"))
        for one in others
    ]
    drawing = scatter(marks, title=f"mIoU against {unit}", x_label=f"{unit} of an image", y_label="mIoU", front=front)
    keys = (Key("by the search", "series-0"), *((Key("beside it", "series-1"),) if others else ()))
    return Chart(f"mIoU against {unit}", drawing, keys=keys)


def progress_chart(found: Mapping[str, Any]) -> Chart:
    """The best score after so many networks, and that of random search."""
    if "best" not in found or len(found["history"]) < 2:
        return Chart("", line_chart([], title="", x_label="", y_label=""))
    method = str(found["about"]["method"])
    lines = [best_so_far(found["history"], method, 0)]
    if "control" in found:
        lines.append(best_so_far(found["control"]["history"], "random", 1))
    drawing = line_chart(lines, title="The best score so far", x_label="networks judged", y_label="mIoU", whole=True)
    return Chart("The best so far", drawing, keys=tuple(Key(line.name, f"series-{line.series}") for line in lines))


def best_so_far(history: Sequence[Mapping[str, Any]], name: str, series: int) -> Line:
    """The best score of the first networks, of as many as the x axis says."""
    best = list(accumulate((float(one["score"]) for one in history), max))
    return Line(list(range(1, len(best) + 1)), best, name, series)


def choices_table(choices: Mapping[str, Any]) -> Table:
    """A row for each place in the network, a column for each kind of choice."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in choices))
    places = list(dict.fromkeys(name.rpartition(".")[0] for name in choices))
    rows = []
    for place in places:
        values = [choices.get(f"{place}.{kind}" if place else kind) for kind in kinds]
        cells = [Cell("" if value is None else f"{value:g}") for value in values]
        rows.append((Cell(place.replace(".", ", ") or "network"), *cells))
    return Table(("", *kinds), tuple(rows), title="The network that was found", wide=True)
