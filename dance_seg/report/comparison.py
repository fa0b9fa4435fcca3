"""Runs side by side: scores, what training cost and what inference costs, with ratios to a baseline.

    print(compare_runs(["runs/camvid_dense", "runs/camvid_data_slimming"]).as_text())

Finished runs whose recipes differ only in the seed form one row, mean and standard deviation. A ratio of rows that have
the same seeds has an interval (`dance_seg.report.ratios` says which). What makes rows hard to compare (other hardware,
data, length, precision, commit) is said below the table.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dance_seg.report.notes import differences, notes, ran_differently, validation_data
from dance_seg.report.offline_run import is_offline_run, read_offline_run, run_id
from dance_seg.report.page import listed
from dance_seg.report.ratios import CONFIDENCE, Interval, difference_interval, dominators, paired, ratio_interval
from dance_seg.report.rows import COLUMNS, Column, Row, grouped, hardware, row_name
from dance_seg.report.runs import Run, read_run

__all__ = ["COLUMNS", "Column", "Comparison", "Row", "compare_runs", "row_name"]


UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "kB": 1e3, "MB": 1e6, "GB": 1e9}

# Costs that people trade against the score, and whose Pareto front is told.
COSTS_WITH_FRONT = (
    "cost/train_gmacs",
    "cost/train_seconds",
    "cost/train_joules",
    "inference/gmacs",
    "inference/latency_p50_ms",
    "inference/joules_per_image",
)


@dataclass(frozen=True)
class Front:
    """The score against one cost: (cost, score) of each row, and which rows no other beats in both."""

    cost: Column
    score: Column
    points: Mapping[str, tuple[float, float]]

    @property
    def beaten_by(self) -> dict[str, list[str]]:
        """For each row, those that cost no more and score no less; none for a row of the front."""
        return dominators(self.points)

    @property
    def members(self) -> list[str]:
        """The rows of the front, the cheapest first."""
        names = [name for name, others in self.beaten_by.items() if not others]
        return sorted(names, key=lambda name: self.points[name])

    def text(self) -> str:
        """The front in a line."""
        beaten = [f"{name} (by {listed(others, 2)})" for name, others in self.beaten_by.items() if others]
        said = f"{self.score.heading} against {self.cost.title}: {', '.join(self.members)}"
        return said + (f"; dominated: {', '.join(beaten)}" if beaten else "")

    def record(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"score": self.score.key, "front": self.members, "dominated_by": self.beaten_by}


@dataclass(frozen=True)
class Comparison:
    """Rows to be read side by side."""

    rows: tuple[Row, ...]
    baseline: int  # index of the row that the others are compared with
    notes: tuple[str, ...]
    differences: tuple[str, ...]  # between the recipes

    @property
    def finished(self) -> bool:
        """Whether every run came to its end."""
        return all(row.finished for row in self.rows)

    @property
    def same_validation_data(self) -> bool:
        """Whether every run was scored on the same data, as far as the recipes tell."""
        return len({validation_data(run) for row in self.rows for run in row.runs}) == 1

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns in which any row has a figure."""
        return tuple(column for column in COLUMNS if any(column.key in row.figures for row in self.rows))

    def groups(self) -> list[tuple[str, list[Column]]]:
        """The columns under their common headings."""
        found: dict[str, list[Column]] = {}
        for column in self.columns:
            found.setdefault(column.group, []).append(column)
        return list(found.items())

    def ratio(self, row: Row, column: Column) -> float | None:
        """The row's mean over the baseline's; None where one is missing or they cannot be compared."""
        pair = self._pair(row, column)
        return pair[0] / pair[1] if pair and pair[1] else None

    def difference(self, row: Row, column: Column) -> float | None:
        """The row's mean minus the baseline's; None where one is missing or they cannot be compared."""
        pair = self._pair(row, column)
        return pair[0] - pair[1] if pair else None

    def interval(self, row: Row, column: Column) -> Interval | None:
        """How sure the ratio is, or for a score the difference; None unless both rows have the same seeds, two or more.

        The pairs are those of a seed: see `dance_seg.report.ratios`.
        """
        if row is self.rows[self.baseline] or self._pair(row, column) is None:
            return None
        pairs = paired(row.by_seed(column), self.rows[self.baseline].by_seed(column))
        return difference_interval(pairs) if column.is_score else ratio_interval(pairs)

    def fronts(self) -> list["Front"]:
        """The Pareto front of the score against each cost in which finished rows differ."""
        found = []
        score = next((column for column in self.columns if column.is_score), None)
        for column in self.columns if score is not None and self.same_validation_data else ():
            points = {
                row.name: (row.figures[column.key].mean, row.figures[score.key].mean)  # type: ignore[union-attr]
                for row in self.rows
                if column.key in COSTS_WITH_FRONT
                and row.finished
                and {column.key, score.key} <= row.figures.keys()  # type: ignore[union-attr]
                and not (column.on_hardware and hardware(row.runs[0]) != hardware(self.rows[self.baseline].runs[0]))
            }
            if len({cost for cost, _ in points.values()}) > 1:
                found.append(Front(column, score, points))  # type: ignore[arg-type]
        return found

    @property
    def ran_differently(self) -> tuple[str, ...]:
        """In what respects rows ran differently, such as precision; part of a ratio may come from that."""
        return tuple(ran_differently(self.rows))

    def _pair(self, row: Row, column: Column) -> tuple[float, float] | None:
        base = self.rows[self.baseline]
        comparable = (row.finished and base.finished) or column.group == "Inference cost"
        if column.is_score:
            comparable = comparable and validation_data(row.runs[0]) == validation_data(base.runs[0])
        if column.on_hardware:
            comparable = comparable and hardware(row.runs[0]) == hardware(base.runs[0])
        if not comparable or column.key not in row.figures or column.key not in base.figures:
            return None
        return row.figures[column.key].mean, base.figures[column.key].mean

    def cell(self, row: Row, column: Column) -> tuple[str, str]:
        """A figure as text, and how it stands to the baseline; `–` for a figure that is missing."""
        figure = row.figures.get(column.key)
        if figure is None:
            return "–", ""
        text = column.text(figure.mean)
        if figure.std or (figure.std is not None and column.is_score):  # what is counted is the same for every seed
            text += f" ± {alike(figure.std, text)}"
        if column.key == "val/miou_best" and len(row.runs) == 1 and row.runs[0].best:
            text += f" @{row.runs[0].best.epoch}"
        if row is self.rows[self.baseline]:
            return text, ""
        ratio, difference = self.ratio(row, column), self.difference(row, column)
        against = difference if column.is_score else ratio
        if against is None:
            return text, ""
        form = "+.2f" if column.is_score else ".2f"
        said = f"{against:{form}}" + ("" if column.is_score else "x")
        bounds = self.interval(row, column)
        if bounds is not None and bounds.high - bounds.low > 1e-9 * abs(bounds.high):  # what is only counted has none
            said += f" [{bounds.low:{form}}, {bounds.high:{form}}]"
        return text, said.replace("-", "−")

    def as_text(self) -> str:
        """Aligned tables for a terminal, one for each group of columns, then the notes."""
        lines = []
        for group, columns in self.groups():
            table = [[group, *(text for column in columns for text in (column.heading, ""))]]
            for row in self.rows:
                table.append([self._row_title(row), *(text for column in columns for text in self.cell(row, column))])
            head, *body = aligned(table)
            lines += [head, "-" * max(map(len, (head, *body))), *body, ""]
        lines += [f"* {note}" for note in self.all_notes()]
        if fronts := self.fronts():
            lines += ["", "Pareto fronts:", *(f"* {front.text()}" for front in fronts)]
        if self.differences:
            lines += ["", "Recipes:", *(f"* {difference}" for difference in self.differences)]
        return "\n".join(lines).rstrip() + "\n"

    def as_markdown(self) -> str:
        """The same as Markdown tables."""
        lines = []
        for group, columns in self.groups():
            lines.append("| " + " | ".join([group, *(column.heading for column in columns)]) + " |")
            lines.append("|---" + "|---:" * len(columns) + "|")
            for row in self.rows:
                cells = [text + (f" ({note})" if note else "") for text, note in (self.cell(row, c) for c in columns)]
                lines.append("| " + " | ".join([markdown_text(self._row_title(row)), *cells]) + " |")
            lines.append("")
        lines += [f"- {markdown_text(note)}" for note in self.all_notes()]
        if fronts := self.fronts():
            lines += ["", "Pareto fronts:", "", *(f"- {markdown_text(front.text())}" for front in fronts)]
        if self.differences:
            lines += ["", "Recipes:", "", *(f"- {markdown_text(difference)}" for difference in self.differences)]
        return "\n".join(lines).rstrip() + "\n"

    def as_record(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "baseline": self.rows[self.baseline].name,
            "rows": [self._row_record(row) for row in self.rows],
            "notes": list(self.all_notes()),
            "ran_differently": list(self.ran_differently),
            "fronts": {front.cost.key: front.record() for front in self.fronts()},
            "recipe_differences": list(self.differences),
        }

    def all_notes(self) -> tuple[str, ...]:
        """The notes, the gravest first, and how intervals were made where there are any."""
        found = self.notes
        if respects := self.ran_differently:
            what = ", ".join(respects)
            found = (f"WARNING: rows ran differently ({what}); part of a ratio may come from that.", *found)
        if any(self.interval(row, column) for row in self.rows for column in self.columns):
            found = (
                *found,
                f"Brackets: {100 * CONFIDENCE:.0f} % intervals of Student's t over the pairs of runs with one seed; of "
                "costs in logarithms. Two or three seeds make them wide.",
            )
        return found

    def _row_title(self, row: Row) -> str:
        return row.label + (", baseline" if row is self.rows[self.baseline] and len(self.rows) > 1 else "")

    def _row_record(self, row: Row) -> dict[str, Any]:
        figures = {}
        for column in self.columns:
            if figure := row.figures.get(column.key):
                figures[column.key] = {
                    "mean": figure.mean,
                    "std": figure.std,
                    "values": list(figure.values),
                    "ratio": self.ratio(row, column),
                    "difference": self.difference(row, column),
                    "interval": bounds._asdict() if (bounds := self.interval(row, column)) else None,
                }
        return {
            "name": row.name,
            "finished": row.finished,
            "runs": [str(run.folder) for run in row.runs],
            "seeds": [run.seed for run in row.runs],
            "best_epochs": [run.best.epoch if run.best else None for run in row.runs],
            "commits": sorted({str(run.circumstances.get("commit", "")) for run in row.runs}),
            "hardware": sorted({hardware(run) for run in row.runs}),
            "figures": figures,
        }


def compare_runs(folders: Sequence[str | Path], baseline: str | Path | None = None) -> Comparison:
    """Read runs and set them side by side; the baseline is the first when none is named.

    A folder is a run folder or an offline run of Weights & Biases; the parts of one that was resumed are one run. A
    baseline that is not among the folders is put before them; a run given twice counts once, and its run folder, which
    holds more, goes before its offline runs. Raises ValueError for a folder that holds no run.
    """
    wanted = [Path(folder) for folder in folders]
    if baseline is not None and Path(baseline).resolve() not in {folder.resolve() for folder in wanted}:
        wanted.insert(0, Path(baseline))
    if not wanted:
        raise ValueError("no run to compare; name at least one run folder, such as runs/shapes_dense")
    runs = _read_runs(list({folder.resolve(): folder for folder in wanted}.values()))
    rows = grouped(list({id(run): run for run in runs.values()}.values()))
    base = runs[(Path(baseline) if baseline is not None else wanted[0]).resolve()]
    place = next(i for i, row in enumerate(rows) if any(run is base for run in row.runs))
    return Comparison(rows, place, tuple(notes(rows)), tuple(differences(rows, place)))


def _read_runs(folders: Sequence[Path]) -> dict[Path, Run]:
    """The run of each folder; several folders may hold the same."""
    offline = [folder for folder in folders if is_offline_run(folder) and not (folder / "recipe.yaml").is_file()]
    known = {folder: read_run(folder) for folder in folders if folder not in offline}
    by_id = {run_id(run): run for run in known.values() if run_id(run)}
    parts: dict[str, list[Path]] = {}
    for folder in offline:
        parts.setdefault(run_id(read_offline_run(folder)), []).append(folder)
    for name, own in parts.items():
        run = by_id[name] if name in by_id else read_offline_run(*own)
        known |= dict.fromkeys(own, run)
    return {folder.resolve(): known[folder] for folder in folders}


def alike(value: float, text: str) -> str:
    """A spread with as many decimals, and in the same unit, as the figure that is written beside it.

    >>> alike(0.0728, "60.2"), alike(31.4, "1,200"), alike(1_234_567.0, "13.1 M")
    ('0.1', '31', '1.2 M')
    """
    digits, _, unit = text.partition(" ")
    factor = UNITS.get(unit, 1.0)
    decimals = len(digits.partition(".")[2])
    return f"{value / factor:,.{decimals}f}" + (f" {unit}" if unit else "")


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is a title, followed by pairs of a figure and a remark.

    >>> aligned([["cost", "GMACs", ""], ["a", "100", ""], ["bc", "61", "0.61x"]])
    ['cost   GMACs', 'a        100', 'bc        61  0.61x']
    """
    lines = []
    widths = [max(len(text) for text in column) for column in zip(*table, strict=True)]
    for row in table:
        line = f"{row[0]:<{widths[0]}}"
        for number_ in range(1, len(row), 2):
            line += f"   {row[number_]:>{widths[number_]}}"
            if widths[number_ + 1]:
                line += f"  {row[number_ + 1]:<{widths[number_ + 1]}}"
        lines.append(line.rstrip())
    return lines


def markdown_text(text: str) -> str:
    """A text that stays one cell of a table and no markup.

    >>> markdown_text("a|b <c>")
    'a\\\\|b &lt;c&gt;'
    """
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())
