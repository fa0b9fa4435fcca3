"""Where seconds and MACs of training went, and what one forward pass costs, as a page shows them."""

from typing import Any

from dance_seg.report.page import Bar, Bars, Cell, Section, Stack, Table, bytes_text, figure_text, listed, seconds_text
from dance_seg.report.runs import Run, flat, number, section

STEPS = ("step", "forward", "backward")  # kinds of cost that are training itself; the others are overheads


def costs(run: Run) -> Section:
    """Where seconds and MACs of training went; validation stands apart."""
    title = "Where the cost went"
    if not run.training:
        return Section(title, note="No cost yet: the ledger is written after each epoch.")
    blocks = [block for unit in ("seconds", "gmacs") if (block := cost_bars(run, unit)) is not None]
    return Section(
        title,
        (
            Stack((*blocks, *operation_bars(run), *batches_table(run))),
            Stack((inference_table(run), ledger_table(run), *other_tables(run))),
        ),
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
    """What one forward pass costs, and what was not counted; then whatever else was measured, under its own name."""
    inference = run.inference
    if not inference:
        return Table((), ((Cell("inference"), Cell("not measured")),), title="One forward pass")
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
    guess = section(inference, "estimated_energy")
    if (joules := number(guess.get("joules_per_image"))) is not None:
        rows.append(("joules per image, an ESTIMATE", f"{figure_text(joules)}, by {guess.get('model', 'a model')}"))
    fastest = section(inference, "throughput")
    if (speed := number(fastest.get("images_per_second"))) is not None:
        rows.append(("most images per second", f"{figure_text(speed)}, in batches of {fastest.get('batch', '?')}"))
    shown = {
        "input_size",
        "throughput",
        "gmacs",
        "parameters",
        "joules_per_image",
        "uncounted",
        "estimated_energy",
        "batches",
    }
    shown |= {"other_sizes", "gmacs_by_operation", "checkpoint", "notes"} | ({"latency_ms"} if milliseconds else set())
    rest = {key: value for key, value in inference.items() if key not in shown}
    rows += [(name.replace("_", " "), text) for name, value in flat(rest).items() if (text := value_text(value))]
    rows.append(("not counted", listed([str(name) for name in inference.get("uncounted") or ()], 8) or "nothing"))
    note = " ".join(f"{str(line).capitalize()}." for line in inference.get("notes") or ())
    return Table((), tuple((Cell(name), Cell(text)) for name, text in rows), title="One forward pass", note=note)


def batches_table(run: Run) -> tuple[Table, ...]:
    """Milliseconds, images per second and memory at every size and batch that was measured."""
    sizes = [run.inference, *(run.inference.get("other_sizes") or ())]
    rows = []
    for measured in sizes:
        for one in measured.get("batches") or () if isinstance(measured, dict) else ():
            p50, p90, speed = (number(one.get(key)) for key in ("p50_ms", "p90_ms", "images_per_second"))
            memory, joules = number(section(one, "peak_memory").get("total_bytes")), number(one.get("joules_per_image"))
            texts = (
                "–" if p50 is None else figure_text(p50),
                "–" if p90 is None else figure_text(p90),
                "–" if speed is None else figure_text(speed),
                "–" if memory is None else bytes_text(memory),
                "–" if joules is None else figure_text(joules),
            )
            size = f"{size_text(measured.get('input_size'))}, batch {one.get('batch', '?')}"
            rows.append((Cell(size), *(Cell(text) for text in texts)))
    head = ("images", "ms p50", "ms p90", "images/s", "peak memory", "J per image")
    # A column without a figure is left out.
    there = [k for k in range(len(head)) if any(row[k].text != "–" for row in rows)]
    shown = tuple(tuple(row[k] for k in there) for row in rows)
    return (Table(tuple(head[k] for k in there), shown, title="Forward passes as measured"),) if rows else ()


def operation_bars(run: Run) -> tuple[Bars, ...]:
    """Where the MACs of a forward pass are."""
    found = {
        str(name): value
        for name, item in section(run.inference, "gmacs_by_operation").items()
        if (value := number(item))
    }
    if not found:
        return ()
    total, largest = sum(found.values()), max(found.values())
    ranked = sorted(found.items(), key=lambda item: -item[1])
    bars = (
        Bar(name, v / largest, f"{figure_text(v)} GMACs · {100 * v / total:.1f} %", "shade-3") for name, v in ranked
    )
    return (Bars(tuple(bars), title="A forward pass, by operation"),)


def other_tables(run: Run) -> tuple[Table, ...]:
    """What else cost.json holds, section by section."""
    found = []
    for title, record in run.other_costs.items():
        if title == "roofline":  # has a section of its own
            continue
        values = flat(record if isinstance(record, dict) else {title: record})
        rows = [(Cell(name.replace("_", " ")), Cell(text)) for name, v in values.items() if (text := value_text(v))]
        if rows:
            found.append(Table((), tuple(rows), title=title.replace("_", " ").capitalize()))
    return tuple(found)


def value_text(value: Any) -> str:
    """Any value of a record in words; empty for what says nothing.

    >>> value_text(1234.5), value_text([352, 480]), value_text("cpu"), value_text(None), value_text(True)
    ('1,234', '352, 480', 'cpu', '', 'yes')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if (amount := number(value)) is not None:
        return f"{amount:,.0f}" if amount == int(amount) else figure_text(amount, 4)
    if isinstance(value, list | tuple):
        return listed([text for item in value if (text := value_text(item))], 8)
    return value if isinstance(value, str) else ""


def size_text(size: Any) -> str:
    """A size (H, W) in words.

    >>> size_text([192, 256]), size_text(None)
    ('192 × 256', 'unknown size')
    """
    if isinstance(size, list | tuple) and len(size) == 2:
        return f"{size[0]} × {size[1]}"
    return "unknown size"
