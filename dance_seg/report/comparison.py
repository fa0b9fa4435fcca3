"""Runs side by side: scores, what training cost and what inference costs, with ratios to a baseline.

    print(compare_runs(["runs/camvid_dense", "runs/camvid_data_slimming"]).as_text())

Finished runs whose recipes differ only in the seed form one row, mean and standard deviation. What makes rows hard to
compare (other hardware, data, length, precision, commit) is said below the table.
"""

import html
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dance_seg.report.page import count_text, figure_text, listed
from dance_seg.report.runs import Run, flat, number, read_run, section

# Keys that change where a run is kept and how it is watched, not what it computes.
FREE_KEYS = ("name", "tracking.", "data.args.root", "data.args.workers", "data.args.cache_", "trainer.log_every",
             "trainer.save_every_minutes", "trainer.threads")  # fmt: skip
# Arguments of a data set that change training alone; all others may change what is validated on.
TRAINING_ARGS = {
    "batch_size",
    "workers",
    "crop",
    "random_scale",
    "flip",
    "color",
    "root",
    "cache_gb",
    "cache_dir",
    "statistics_images",
    "bad_files",
    "bad_files_cap",
    "num_train",
}

LATENCY_CONDITIONS = ("batch", "device", "dtype", "threads", "input_size")


@dataclass(frozen=True)
class Column:
    """One figure of the table. A cost is compared by its ratio, a score by its difference in points."""

    key: str
    heading: str
    group: str
    value: Callable[[Run], float | None]
    is_score: bool = False
    text: Callable[[float], str] = figure_text
    on_hardware: bool = False  # figures of different hardware are not compared


def _training(key: str) -> Callable[[Run], float | None]:
    return lambda run: number(run.training.get(key))


def _inference(key: str) -> Callable[[Run], float | None]:
    return lambda run: number(run.inference.get(key))


def _latency(key: str) -> Callable[[Run], float | None]:
    return lambda run: number(run.latency.get(key))


def _best(run: Run) -> float | None:
    return run.best.miou if run.best else None


def _last(run: Run) -> float | None:
    return run.last.miou if run.last else None


def _pixel_accuracy(run: Run) -> float | None:
    shown = run.best or run.last
    return shown.pixel_accuracy if shown else None


def points_text(value: float) -> str:
    """A score in points."""
    return f"{value:.2f}"


def whole_text(value: float) -> str:
    """A count, or the mean of some, without decimals."""
    return f"{value:,.0f}"


COLUMNS = (
    Column("val/miou_best", "mIoU best", "Score, in points", _best, True, points_text),
    Column("val/miou_last", "mIoU last", "Score, in points", _last, True, points_text),
    Column("val/pixel_accuracy", "pixel accuracy", "Score, in points", _pixel_accuracy, True, points_text),
    Column("cost/train_gmacs", "GMACs", "Training cost", _training("cost/train_gmacs")),
    Column("cost/train_seconds", "seconds", "Training cost", _training("cost/train_seconds"), on_hardware=True),
    Column("cost/pixels", "pixels", "Training cost", _training("cost/pixels"), text=count_text),
    Column("cost/images_paid", "images paid", "Training cost", _training("cost/images_paid"), text=whole_text),
    Column("cost/images_dropped", "dropped", "Training cost", _training("cost/images_dropped"), text=whole_text),
    Column("cost/train_joules", "joules", "Training cost", _training("cost/train_joules"), on_hardware=True),
    Column("inference/gmacs", "GMACs", "Inference cost", _inference("gmacs")),
    Column("inference/parameters", "parameters", "Inference cost", _inference("parameters"), text=count_text),
    Column(
        "inference/joules_per_image", "J per image", "Inference cost", _inference("joules_per_image"), on_hardware=True
    ),
    Column("inference/latency_p50_ms", "ms p50", "Inference cost", _latency("p50"), on_hardware=True),
    Column("inference/latency_p90_ms", "ms p90", "Inference cost", _latency("p90"), on_hardware=True),
)


@dataclass(frozen=True)
class Spread:
    """One figure over the runs of a row."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the runs."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The standard deviation of a sample; None for one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """One run, or several that differ only in the seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> bool:
        """Whether every run of the row came to its end."""
        return all(run.finished for run in self.runs)

    @property
    def label(self) -> str:
        """The name with what must be known about the row."""
        if not self.finished:
            (run,) = self.runs
            return f"{self.name} (unfinished: epoch {run.epochs_done} of {run.max_epochs})"
        return f"{self.name} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.name

    @cached_property
    def figures(self) -> Mapping[str, Spread]:
        """The figures by column; a figure that any run of the row lacks is left out."""
        found = {}
        for column in COLUMNS:
            values = [value for run in self.runs if (value := column.value(run)) is not None]
            if len(values) == len(self.runs):
                found[column.key] = Spread(tuple(values))
        return found


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
            text += f" ± {column.text(figure.std)}"
        if column.key == "val/miou_best" and len(row.runs) == 1 and row.runs[0].best:
            text += f" @{row.runs[0].best.epoch}"
        if row is self.rows[self.baseline]:
            return text, ""
        ratio, difference = self.ratio(row, column), self.difference(row, column)
        if column.is_score:
            return text, f"{difference:+.2f}".replace("-", "−") if difference is not None else ""
        return text, f"{ratio:.2f}x" if ratio is not None else ""

    def as_text(self) -> str:
        """Aligned tables for a terminal, one for each group of columns, then the notes."""
        lines = []
        for group, columns in self.groups():
            table = [[group, *(text for column in columns for text in (column.heading, ""))]]
            for row in self.rows:
                table.append([self._row_title(row), *(text for column in columns for text in self.cell(row, column))])
            head, *body = aligned(table)
            lines += [head, "-" * max(map(len, (head, *body))), *body, ""]
        lines += [f"* {note}" for note in self.notes]
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
        lines += [f"- {markdown_text(note)}" for note in self.notes]
        if self.differences:
            lines += ["", "Recipes:", "", *(f"- {markdown_text(difference)}" for difference in self.differences)]
        return "\n".join(lines).rstrip() + "\n"

    def as_record(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "baseline": self.rows[self.baseline].name,
            "rows": [self._row_record(row) for row in self.rows],
            "notes": list(self.notes),
            "recipe_differences": list(self.differences),
        }

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

    A baseline that is not among the folders is put before them; a folder given twice counts once.
    Raises ValueError for a folder that holds no run.
    """
    wanted = [Path(folder) for folder in folders]
    if baseline is not None and Path(baseline).resolve() not in {folder.resolve() for folder in wanted}:
        wanted.insert(0, Path(baseline))
    if not wanted:
        raise ValueError("no run to compare; name at least one run folder, such as runs/shapes_dense")
    runs = [read_run(folder) for folder in {folder.resolve(): folder for folder in wanted}.values()]
    rows = grouped(runs)
    base = Path(baseline).resolve() if baseline is not None else wanted[0].resolve()
    place = next(i for i, row in enumerate(rows) if any(run.folder.resolve() == base for run in row.runs))
    return Comparison(rows, place, tuple(notes(rows)), tuple(differences(rows, place)))


def grouped(runs: Sequence[Run]) -> tuple[Row, ...]:
    """Rows of runs that differ only in the seed; an unfinished run has its own."""
    found: dict[Any, list[Run]] = {}
    for run in runs:
        alike = (repr(sorted(essential(run).items(), key=str)), hardware(run))
        found.setdefault(alike if run.finished else run.folder, []).append(run)
    names = [row_name(members) for members in found.values()]
    # The same name in two places: the whole path tells them apart.
    names = [
        name if names.count(name) == 1 else str(members[0].folder)
        for name, members in zip(names, found.values(), strict=True)
    ]
    return tuple(Row(name, tuple(members)) for name, members in zip(names, found.values(), strict=True))


def essential(run: Run) -> dict[str, Any]:
    """The recipe by dotted keys, without the seed and what does not change the result."""
    values = flat(dict(run.recipe))
    return {key: value for key, value in values.items() if key != "seed" and not key.startswith(FREE_KEYS)}


def row_name(runs: Sequence[Run]) -> str:
    """What the names of the runs have in common, without a seed's number at its end."""
    names = [run.name for run in runs]
    if len(set(names)) == 1:
        return names[0]
    shared = names[0]
    while not all(name.startswith(shared) for name in names):
        shared = shared[:-1]
    return re.sub(r"[-_.]?(seed|s)?[-_.]?\d*$", "", shared) or names[0]


def hardware(run: Run) -> str:
    """What a run ran on."""
    facts = run.circumstances
    trainer = section(run.recipe, "trainer")
    accelerator = facts.get("accelerator", "none") if trainer.get("accelerator") != "cpu" else "none"
    devices = number(trainer.get("devices")) or 1
    times = f"{devices:.0f} x " if devices > 1 else ""
    if accelerator != "none":
        return f"{times}{accelerator}"
    threads = f", {trainer['threads']} threads" if trainer.get("threads") else ""
    return f"{times}{facts.get('processor', 'unknown processor')}, {facts.get('cores', '?')} cores{threads}"


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing the rows."""
    found = []
    unfinished = [row.name for row in rows if not row.finished]
    if unfinished:
        found.append(
            f"Unfinished: {listed(unfinished)}; what they spent and scored is as of their last complete epoch."
        )

    said = (
        ("Rows were scored on different data, their scores cannot be compared", validation_data),
        ("Rows were trained on different data sets", lambda run: section(run.recipe, "data").get("name")),
        ("Rows read their data from different folders, make sure that they hold the same", _root),
        ("Rows ran on different hardware, their seconds cannot be compared", hardware),
        ("Rows ran in different precision", lambda run: section(run.recipe, "trainer").get("precision", "32-true")),
        ("Rows were trained for different numbers of epochs", lambda run: run.max_epochs),
        ("Rows count inference at different input sizes", lambda run: run.inference.get("input_size")),
        ("Rows measured latency under different conditions", _latency_conditions),
        ("Rows were made at different commits", lambda run: run.circumstances.get("commit") or "unknown"),
        ("Rows ran with different versions", lambda run: _words(section(run.circumstances, "versions"))),
    )
    found += [note for text, fact in said if (note := differing(text, rows, fact)) is not None]
    changed = [
        row.name for row in rows if any(str(run.circumstances.get("commit", "")).endswith("+") for run in row.runs)
    ]
    if changed:
        found.append(f"Made with changes that are in no commit: {listed(changed)}.")
    for row in rows:
        twice = sorted({str(run.seed) for run in row.runs if [other.seed for other in row.runs].count(run.seed) > 1})
        if twice:
            found.append(f"{row.name} holds seed {listed(twice)} more than once; its spread is too small.")
        operations = sorted({str(name) for run in row.runs for name in run.inference.get("uncounted") or ()})
        if operations:
            found.append(f"{row.name}: not counted in its GMACs: {listed(operations)}.")
    single = [row for row in rows if row.finished and len(row.runs) == 1]
    if single and len(rows) > 1:
        who = "Each row is" if len(single) == len(rows) else f"{listed([row.name for row in single])}:"
        found.append(f"{who} one seed; a difference of a point or two may be chance.")
    return found


def differing(text: str, rows: Sequence[Row], fact: Callable[[Run], Any]) -> str | None:
    """A note that names a fact in which runs differ and who has which; None when all agree or none says."""
    by_value: dict[str, list[str]] = {}
    for row in rows:
        for run in row.runs:
            value = fact(run)
            if value is not None:
                names = by_value.setdefault(str(value), [])
                names += [row.name] if row.name not in names else []
    if len(by_value) < 2:
        return None
    return f"{text}: " + "; ".join(f"{listed(names, 3)}: {value}" for value, names in by_value.items()) + "."


def differences(rows: Sequence[Row], baseline: int) -> list[str]:
    """What sets each row's recipe apart from the baseline's."""
    base = rows[baseline].runs[0]
    found = []
    for row in rows:
        if row is rows[baseline]:
            continue
        changed, here = [], row.runs[0]
        mine, theirs = essential(here), essential(base)
        for key in sorted(mine.keys() | theirs.keys()):
            name = key.partition(".")[0]
            was, now = base.recipe.get(name), here.recipe.get(name)
            if isinstance(was, dict) != isinstance(now, dict):  # the whole section comes or goes
                changed.append(f"{name} {_value(was)} → {_value(now)}")
            elif mine.get(key) != theirs.get(key):
                changed.append(f"{key} {_value(theirs.get(key))} → {_value(mine.get(key))}")
        found.append(f"{row.name}: {listed(list(dict.fromkeys(changed)), 8) or 'the same recipe as the baseline'}")
    return found


def validation_data(run: Run) -> str:
    """The data that a run is scored on, as far as its recipe tells."""
    data = section(run.recipe, "data")
    args = {key: value for key, value in section(data, "args").items() if key not in TRAINING_ARGS}
    return f"{data.get('name')} {_words(args)}".strip()


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


def _root(run: Run) -> Any:
    return section(section(run.recipe, "data"), "args").get("root")


def _latency_conditions(run: Run) -> str | None:
    return _words({key: run.latency[key] for key in LATENCY_CONDITIONS if key in run.latency}) or None


def _words(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(record.items(), key=str))


def _value(value: Any) -> str:
    return "on" if isinstance(value, dict) else "off" if value is None else str(value)
