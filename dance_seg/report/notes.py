"""What a reader must know before comparing rows: how they ran differently, and how their recipes differ."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dance_seg.report.page import listed
from dance_seg.report.rows import Row, essential, hardware
from dance_seg.report.runs import Run, number, section

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
LATENCY_CONDITIONS = ("batch", "device", "dtype", "threads", "input_size", "channels_last", "runtime")


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
        ("Rows were trained for different numbers of epochs", lambda run: run.max_epochs),
        ("Rows count inference at different input sizes", lambda run: run.inference.get("input_size")),
        *((text, fact) for text, fact in RESPECTS.values()),
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


def ran_differently(rows: Sequence[Row]) -> list[str]:
    """The respects in which rows ran differently, such as hardware or precision: not what was trained, but how."""
    return [name for name, (text, fact) in RESPECTS.items() if differing(text, rows, fact) is not None]


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


def _root(run: Run) -> Any:
    return section(section(run.recipe, "data"), "args").get("root")


def _latency_conditions(run: Run) -> str | None:
    return _words({key: run.latency[key] for key in LATENCY_CONDITIONS if key in run.latency}) or None


def _words(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(record.items(), key=str))


def _value(value: Any) -> str:
    return "on" if isinstance(value, dict) else "off" if value is None else str(value)


def _trainer(key: str, default: Any = None) -> Callable[[Run], Any]:
    return lambda run: section(run.recipe, "trainer").get(key, default)


def _images_per_step(run: Run) -> Any:
    batch_size = number(section(section(run.recipe, "data"), "args").get("batch_size", 8))
    accumulated = number(section(run.recipe, "trainer").get("accumulate", 1))
    return None if batch_size is None or accumulated is None else f"{batch_size * accumulated:.0f}"


# How a run can have run differently: its name, what is said of it, and where it is read.
RESPECTS: dict[str, tuple[str, Callable[[Run], Any]]] = {
    "hardware": ("Rows ran on different hardware, their seconds cannot be compared", hardware),
    "precision": ("Rows ran in different precision", _trainer("precision", "32-true")),
    "memory layout": ("Rows ran with and without trainer.channels_last", _trainer("channels_last")),
    "compilation": ("Rows ran with and without trainer.compile", _trainer("compile")),
    "batch size": ("Rows took different numbers of images for a step", _images_per_step),
    "conditions of latency": ("Rows measured latency under different conditions", _latency_conditions),
    "commit": ("Rows were made at different commits", lambda run: run.circumstances.get("commit") or "unknown"),
    "versions": (
        "Rows ran with different versions",
        lambda run: _words(section(run.circumstances, "versions")) or None,
    ),
}
