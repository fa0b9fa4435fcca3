"""Rows of a comparison: runs that differ only in the seed, and the figures that they are compared by."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dance_seg.report.page import bytes_text, count_text, figure_text
from dance_seg.report.runs import Run, flat, number, section

# Keys that change where a run is kept and how it is watched, not what it computes.
FREE_KEYS = ("name", "tracking.", "data.args.root", "data.args.workers", "data.args.cache_", "trainer.log_every",
             "trainer.save_every_minutes", "trainer.threads")  # fmt: skip


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

    @property
    def title(self) -> str:
        """What it is where no group stands above it, such as `training GMACs`."""
        group = self.group.partition(" ")[0].lower()
        return self.heading if self.is_score else f"{group} {self.heading}"


def _training(key: str) -> Callable[[Run], float | None]:
    return lambda run: number(run.training.get(key))


def _inference(key: str) -> Callable[[Run], float | None]:
    return lambda run: number(run.inference.get(key))


def _latency(key: str) -> Callable[[Run], float | None]:
    return lambda run: number(run.latency.get(key))


def _first_batch(*keys: str) -> Callable[[Run], float | None]:
    """A figure of the batch that was measured first, as a rule of one image."""

    def value(run: Run) -> float | None:
        batches = run.inference.get("batches")
        found: Any = batches[0] if isinstance(batches, list) and batches else None
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return number(found)

    return value


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
    Column(
        "inference/images_per_second", "images/s", "Inference cost", _first_batch("images_per_second"), on_hardware=True
    ),
    Column(
        "inference/peak_memory_bytes",
        "peak memory",
        "Inference cost",
        _first_batch("peak_memory", "total_bytes"),
        text=bytes_text,
        on_hardware=True,
    ),
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

    def by_seed(self, column: Column) -> dict[str, float]:
        """A figure of each run by its seed; empty when a run lacks it or a seed is there twice."""
        if column.key not in self.figures or len({str(run.seed) for run in self.runs}) < len(self.runs):
            return {}
        return {str(run.seed): v for run, v in zip(self.runs, self.figures[column.key].values, strict=True)}


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
