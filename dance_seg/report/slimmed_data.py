"""What data slimming did with the images: the plan, their complexity, and how that goes with their loss."""

from collections.abc import Sequence

import numpy as np

from dance_seg.data_slimming.plan import DataSlimming
from dance_seg.errors import DataError
from dance_seg.report.charts import Layer, Line, cloud, histogram, shades, stacked_chart
from dance_seg.report.costs import size_text
from dance_seg.report.page import (
    Bar,
    Bars,
    Cell,
    Chart,
    Key,
    Panel,
    Panels,
    Section,
    Stack,
    Table,
    change_text,
    count_text,
    figure_text,
)
from dance_seg.report.pictures import embedded_image, fitted, read_image
from dance_seg.report.predictions import MOST_PICTURES, panels_bytes
from dance_seg.report.runs import Run, Thumbnail, WholePlan, number, section

MOST_NAMED = 6  # images of the highest and the lowest loss
THUMBNAIL_BYTES = 600_000  # of each row of training images


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


def image_losses(run: Run) -> Section:
    """The loss of each training image against its complexity, and the images that are hardest to learn."""
    title, losses = "Loss of the training images", run.image_losses
    if losses is None or not losses.by_name:
        return Section(title, note="Not known yet: it is kept at the end of each epoch.")
    blocks: list[Chart | Bars] = []
    scored = dict(zip(run.plan.names, run.plan.complexity, strict=False)) if run.plan else {}
    known = [(scored[name], loss) for name, loss in losses.by_name.items() if name in scored]
    note = f"The mean unweighted loss of {len(losses.by_name):,} images over epoch {losses.epoch}, as trained:"
    note += " at the size and with the augmentation of the step."
    if known:
        complexities, found = zip(*known, strict=True)
        measure = (run.plan.measure if run.plan else "").replace("_", " ") or "complexity"
        drawing = cloud(
            complexities, found, title="Loss of each image against its complexity", x_label=measure, y_label="loss"
        )
        together = rank_correlation(complexities, found)
        told = (
            "" if together is None else f"Rank correlation {together:+.2f}".replace("-", "−") + f": {_words(together)}."
        )
        keys = (Key("an image", "series-0"), Key("mean of images of like complexity", "series-1"))
        blocks.append(Chart("Against complexity", drawing, told, keys))
    ranked = sorted(losses.by_name.items(), key=lambda item: -item[1])
    largest = max(ranked[0][1], 1e-12)
    for name, some, style in (
        ("Hardest", ranked[:MOST_NAMED], "series-1"),
        ("Easiest", ranked[::-1][:MOST_NAMED], "shade-3"),
    ):
        bars = tuple(Bar(image, max(0.0, loss) / largest, figure_text(loss), style) for image, loss in some)
        blocks.append(Bars(bars, title=f"{name} images"))
    return Section(title, tuple(blocks), note)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where it is undefined: fewer than three pairs, or no variation.

    >>> rank_correlation([1, 2, 3], [10, 20, 90]), rank_correlation([1, 2, 3], [5, 5, 5])
    (1.0, None)
    """
    if len(x) < 3:
        return None
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (x, y)]
    centred = [values - values.mean() for values in ranks]
    length = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return round(float((centred[0] * centred[1]).sum()) / length, 12) if length else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]


def _words(correlation: float) -> str:
    strength = "hardly" if abs(correlation) < 0.2 else "somewhat" if abs(correlation) < 0.5 else "clearly"
    if strength == "hardly":
        return "loss hardly goes with complexity"
    return f"complex images have {strength} {'higher' if correlation > 0 else 'lower'} losses"


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
