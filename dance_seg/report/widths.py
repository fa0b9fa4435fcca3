"""What network slimming kept, layer by layer and branch by branch, of one run or of several."""

from collections.abc import Sequence

from dance_seg.report.charts import Layer, stacked_chart
from dance_seg.report.page import Cell, Chart, Key, Section, Stack, Table
from dance_seg.report.runs import Run, Widths


def slimming(run: Run) -> Section:
    """The channels kept in each layer as a picture, the branches and the cuts as tables."""
    if run.widths is None:
        options = run.recipe.get("network_slimming")
        return Section("Network slimming", note="No cut yet." if options else "None: every channel was trained.")
    cuts = [
        (
            Cell(f"epoch {cut.epoch}"),
            Cell(f"{100 * cut.macs:.0f} %"),
            Cell(f"{100 * cut.channels:.0f} %"),
            Cell(f"{cut.parameters / 1e6:.2f} M"),
        )
        for cut in run.widths.cuts
    ]
    table = Table(("cut before", "MACs left", "channels left", "parameters"), tuple(cuts), title="Cuts")
    return Section("Network slimming", (widths_chart(run.widths), Stack((table, *branches_table([run])))))


def widths_chart(widths: Widths, title: str = "Channels of each layer") -> Chart:
    """Kept and cut channels of each layer, from the image to the classes."""
    kept = [now / full for _, full, now in widths.layers]
    drawing = stacked_chart(
        [Layer("kept", kept, 5), Layer("cut", [1 - share for share in kept], 0)],
        title="Share of its channels that each layer kept",
        x_label="layer, from the image to the classes",
        y_label="of its channels",
        notes=[f"{name}: {now} of {full} channels" for name, full, now in widths.layers],
    )
    return Chart(title, drawing, keys=(Key("kept", "shade-5"), Key("cut", "shade-0")))


def branches_table(runs: Sequence[Run]) -> tuple[Table, ...]:
    """The channels that each multi-scale branch and each part of the network kept, run by run."""
    known = [(run, run.widths) for run in runs if run.widths is not None]
    if not known:
        return ()
    rows: dict[str, dict[str, str]] = {}
    for run, widths in known:
        for name, full, now in widths.branches:
            rows.setdefault(name, {})[run.name] = f"{now} of {full}" if now else f"gone, of {full}"
        for part, (full, now) in widths.parts().items():
            rows.setdefault(f"all of {part}", {})[run.name] = f"{100 * now / full:.0f} % of {full:,}"
    table = Table(
        ("part or branch", *(run.name if len(known) > 1 else "channels kept" for run, _ in known)),
        tuple(
            (Cell(name), *(Cell(kept.get(run.name, "–")) for run, _ in known)) for name, kept in sorted(rows.items())
        ),
        title="What was kept where",
    )
    return (table,)


def compared(runs: Sequence[Run]) -> Section:
    """What several runs kept, so that slimming with and without smaller images can be told apart."""
    slimmed = [run for run in runs if run.widths is not None]
    if not slimmed:
        return Section("Channels kept", note="No run slimmed its network.")
    charts = [widths_chart(run.widths, run.name) for run in slimmed if run.widths is not None]
    return Section("Channels kept", (*charts, *branches_table(slimmed)))
