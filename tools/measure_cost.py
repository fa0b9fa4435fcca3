"""Measure what a network costs to use: python -m tools.measure_cost RUN [--batch 1 8] [--size H W] [--roofline].

RUN is a run folder, or an ONNX file, which onnxruntime runs. What is measured of a run is kept in its cost.json:
GMACs, parameters, milliseconds, images per second, peak memory, and joules where the machine has a meter. Where it has
none, an estimate is shown, apart from anything measured.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dance_seg.machine import threads
from dance_seg.plain_data import read_object
from tools.cli import parser, run, write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dance_seg.cost.latency import Latency
    from dance_seg.cost.roofline import Roofline, Usage

UNSTEADY = 1.3  # p90 over p50 from which something else was at work


def main() -> int:
    """Measure, print a table, and keep the figures in the run's cost.json."""
    given = arguments()
    if given.run.suffix == ".onnx":
        figures = measure_onnx_file(given)
    else:
        figures = measure_run(given)
    write_json(given.json, figures)
    return 0


def arguments() -> argparse.Namespace:
    """What the user asks for. Raises ValueError for what cannot be measured."""
    made = parser(__doc__, figures=True)
    made.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/camvid_dense, or FILE.onnx")
    made.add_argument("--checkpoint", default="best", help="best, last or a path; default: best")
    made.add_argument(
        "--size", metavar=("H", "W"), type=int, nargs=2, action="append",
        help="of the images, may be given several times; default: the training crop",
    )  # fmt: skip
    made.add_argument(
        "--batch", metavar="N", type=int, nargs="+", default=[1, 8], help="images at once; default: 1 and 8"
    )
    made.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), default="float32", help="of the products"
    )
    made.add_argument("--channels-last", action="store_true", help="lay channels innermost, as training may do")
    made.add_argument("--seconds", type=float, default=5.0, help="how long to measure each batch; default 5")
    made.add_argument("--threads", type=int, default=0, help="of torch; default: OMP_NUM_THREADS, else its cores")
    made.add_argument("--throughput", action="store_true", help="look for the batch with the most images per second")
    made.add_argument("--roofline", action="store_true", help="how much of the machine is used; writes roofline.html")
    made.add_argument("--watts", type=float, help="the device's power, to estimate joules from where there is no meter")
    given = made.parse_intermixed_args()
    for size in given.size or ():
        if min(size) < 1:
            raise ValueError(f"--size {size[0]} {size[1]}: height and width in pixels, such as --size 360 480")
    if min(given.batch) < 1:
        raise ValueError(f"--batch {min(given.batch)}: at least one image")
    if not 0 < given.seconds < float("inf"):
        raise ValueError(f"--seconds {given.seconds}: a number above 0")
    if given.threads < 0:
        raise ValueError(f"--threads {given.threads}: 0 for as many as this process may use cores, or more")
    if given.watts is not None and not 0 < given.watts < float("inf"):
        raise ValueError(f"--watts {given.watts}: a number above 0")
    given.threads = threads(given.threads)
    given.batch = list(dict.fromkeys(given.batch))
    return given


def measure_run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure the network of a run at each size, print the figures and keep them; returns the kept ones."""
    import torch

    from dance_seg.build import load_run
    from dance_seg.cost.latency import load_average
    from dance_seg.machine import write_text

    load = load_average()  # before our own work is part of it
    torch.set_num_threads(given.threads)
    model, record, path = load_run(given.run, given.checkpoint)
    kept = read_object(given.run / "cost.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    if given.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    crop = record["recipe"]["data"]["args"].get("crop", (352, 480))
    sizes = [(int(height), int(width)) for height, width in given.size or [crop]]
    figures: list[dict[str, Any]] = []
    for size in sizes:
        try:
            found, operations = measure_size(model, size, given, load)
        except RuntimeError as error:  # the memory does not do, or the network refuses the size
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} at {size[0]}x{size[1]}, batch {given.batch}: {reason}") from None
        print("\n".join([f"{path} at {size[0]}x{size[1]}", *text_of(found)]))
        if given.roofline and not figures:
            under_roof = roofline_of(model, device, record["recipe"], kept, operations, found, given)
            print("\n".join(text_of_roofline(under_roof)))
            kept["roofline"] = under_roof.as_record()
        figures.append(found)
    inference = {**figures[0], "checkpoint": str(path), "other_sizes": figures[1:]}
    there = kept.get("inference")
    if isinstance(there, dict) and "sizes" in there and not given.size:
        # The run infers at several sizes: its GMACs are their mean, and stay; what is measured is one size.
        inference |= {"gmacs": there["gmacs"], "sizes": there["sizes"]}
        inference["notes"] = [*inference["notes"], f"milliseconds and memory are those of {sizes[0][0]}x{sizes[0][1]}"]
    if kept:
        kept["inference"] = inference
        kept["training_estimated_energy"] = estimate_of_training(model, record["recipe"], kept, given)
        if guess := kept["training_estimated_energy"]:
            print(f"  training     estimate {guess['joules']:.3g} J, NOT measured: {guess['model']}")
        write_text(given.run / "cost.json", json.dumps(kept, indent=2, default=float, allow_nan=False) + "\n")
        if given.roofline:
            print(f"{write_roofline_page(given.run)} shows the roofline")
    return {**inference, "roofline": kept.get("roofline")} if given.roofline else inference


def measure_size(
    model: "nn.Module", size: tuple[int, int], given: argparse.Namespace, load: float | None
) -> tuple[dict[str, Any], tuple["Usage", ...]]:
    """All figures of inference at one size, as plain data, and the operations of one forward of the first batch."""
    from dance_seg.cost.energy import EnergyMeter
    from dance_seg.cost.latency import is_noisy, measure_latency
    from dance_seg.cost.macs import count_macs
    from dance_seg.cost.memory import measure_memory
    from dance_seg.cost.roofline import time_operations
    from dance_seg.cost.throughput import measure_throughput

    device = next(model.parameters()).device
    cost = count_macs(model, input_size=size)
    batches = []
    for batch in given.batch:
        meter = EnergyMeter(gpus=(device.index or 0,) if device.type == "cuda" else ())
        latency = measure_latency(
            model, size, batch=batch, dtype=given.precision, time_limit_s=given.seconds, meter=meter
        )
        memory = measure_memory(model, size, batch=batch, dtype=given.precision)
        batches.append(
            {
                **latency_record(latency),
                "peak_memory": {**asdict(memory), "total_bytes": memory.total_bytes},
                "joules_per_image": None if meter.joules is None else meter.joules / (batch * latency.runs),
                "energy_source": meter.source,
            }
        )
    # A second or so for the sums by kind of operation; a roofline is worth more.
    operations = time_operations(
        model, size, batch=given.batch[0], dtype=given.precision, time_limit_s=min(given.seconds, 2.0) * given.roofline
    )
    first = batches[0]
    figures = {
        "gmacs": cost.macs / 1e9,
        "parameters": cost.parameters,
        "input_size": list(size),
        "uncounted": list(cost.uncounted),
        "gmacs_by_operation": {kind: macs / 1e9 for kind, macs in cost.by_operation.items()},
        "latency_ms": {key: value for key, value in first.items() if key in LATENCY_KEYS},
        "joules_per_image": first["joules_per_image"],
        "energy_source": first["energy_source"],
        "estimated_energy": None if first["joules_per_image"] is not None else estimate(operations, first, given),
        "batches": batches,
        "throughput": None,
        "load_average": load,
        "notes": notes(batches, is_noisy(load, given.threads)),
    }
    if given.throughput:
        figures["throughput"] = asdict(
            measure_throughput(model, size, dtype=given.precision, time_limit_s=4 * given.seconds)
        )
    return figures, operations


LATENCY_KEYS = (
    "p50_ms", "p90_ms", "mean_ms", "runs", "batch", "device", "dtype", "input_size", "threads", "channels_last",
    "runtime", "load_average",
)  # fmt: skip


def latency_record(latency: "Latency") -> dict[str, Any]:
    """A latency as plain data, with its images per second."""
    return {**asdict(latency), "input_size": list(latency.input_size), "images_per_second": latency.images_per_second}


def estimate(operations: Sequence["Usage"], first: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """What one image may take, from the stated power or from its operations; marked as an estimate."""
    from dance_seg.cost.energy import estimate_from_watts, estimate_joules

    batch = first["batch"]
    if given.watts is not None:
        made = estimate_from_watts(first["mean_ms"] / 1000 / batch, given.watts)
    else:
        macs, moved = (sum(getattr(usage, key) for usage in operations) // batch for key in ("macs", "bytes"))
        made = estimate_joules(macs, moved, given.precision)
    return {"joules_per_image": made.joules, "model": made.model, "is_estimate": made.is_estimate}


def notes(batches: Sequence[dict[str, Any]], noisy: bool) -> list[str]:
    """What makes the milliseconds doubtful."""
    found = []
    if noisy:
        found.append("the machine had other work: its load average left fewer cores than threads; measure again")
    for one in batches:
        if one["p90_ms"] > UNSTEADY * one["p50_ms"]:
            found.append(
                f"batch {one['batch']}: p90 is {one['p90_ms'] / one['p50_ms']:.1f} times p50; something disturbed it"
            )
    return found


def roofline_of(
    model: "nn.Module",
    device: "torch.device",
    recipe: dict[str, Any],
    costs: dict[str, Any],
    operations: tuple["Usage", ...],
    figures: dict[str, Any],
    given: argparse.Namespace,
) -> "Roofline":
    """One forward of the first batch under the roof of this machine, and the training where it ran here."""
    from dance_seg.cost.roofline import measure_peak, roofline, training_usage

    said: list[str] = []
    peak = measure_peak(device, given.precision)
    first, training, training_peak = figures["batches"][0], None, None
    if elsewhere := trained_elsewhere(given.run / "run.json", device):
        said.append(elsewhere)
    else:
        trainer, spent = recipe["trainer"], ledger_of(costs)
        size, batch, ranks, dtype = step_of(recipe)
        steps_gmacs = spent.get("cost/forward_gmacs", 0.0) + spent.get("cost/backward_gmacs", 0.0)
        seconds = spent.get("cost/step_seconds", 0.0)
        training = training_usage(model, size, batch, gmacs=steps_gmacs / ranks, seconds=seconds)
        training_peak = peak if dtype == given.precision else measure_peak(device, dtype)
        used = threads(int(trainer.get("threads", 0)))
        if device.type == "cpu" and used != given.threads:
            said.append(f"training used {used} threads, the roof is that of {given.threads}; see --threads")
    return roofline(
        operations,
        peak,
        seconds=first["p50_ms"] / 1000,
        batch=first["batch"],
        input_size=tuple(figures["input_size"]),
        training=training,
        training_peak=training_peak,
        notes=tuple(said),
    )


def ledger_of(costs: dict[str, Any]) -> dict[str, float]:
    """The sums of the training's ledger that are numbers."""
    spent = costs.get("training")
    pairs = spent.items() if isinstance(spent, dict) else ()
    return {key: float(value) for key, value in pairs if isinstance(value, int | float)}


def step_of(recipe: dict[str, Any]) -> tuple[tuple[int, int], int, int, str]:
    """A full-size training step of one rank: (H, W), images, ranks, and the type of its products."""
    trainer, args = recipe["trainer"], recipe["data"]["args"]
    ranks = int(trainer.get("devices", 1)) * int(trainer.get("num_nodes", 1))
    height, width = args.get("crop", (352, 480))
    dtype = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(str(trainer.get("precision")), "float32")
    return (int(height), int(width)), max(2, int(args.get("batch_size", 8)) // ranks), ranks, dtype


def estimate_of_training(
    model: "nn.Module", recipe: dict[str, Any], costs: dict[str, Any], given: argparse.Namespace
) -> dict[str, Any] | None:
    """Joules that the training may have taken, marked as an estimate; None where a meter or nothing was running."""
    from dance_seg.cost.energy import estimate_from_watts, estimate_joules
    from dance_seg.cost.roofline import training_usage

    spent = ledger_of(costs)
    size, batch, ranks, dtype = step_of(recipe)
    gmacs, seconds = spent.get("cost/train_gmacs", 0.0), spent.get("cost/train_seconds", 0.0)
    if "cost/train_joules" in spent or gmacs <= 0 or seconds <= 0:
        return None
    if given.watts is not None:
        made = estimate_from_watts(seconds * ranks, given.watts)
    else:
        usage = training_usage(model, size, batch, gmacs=gmacs, seconds=seconds)
        if usage is None:
            return None
        made = estimate_joules(usage.macs, usage.bytes, dtype)
    return asdict(made)


def trained_elsewhere(path: Path, device: "torch.device") -> str:
    """Why the training's seconds say nothing of this machine; empty where they do."""
    from dance_seg.machine import processor

    there = read_object(path)
    where = str(there.get("processor", "another machine"))
    if where != processor():
        return f"training ran on {where}, so its share of this machine is not known"
    if (there.get("accelerator", "none") == "none") != (device.type == "cpu"):
        return f"training ran on {there.get('accelerator')}, not on what was measured here"
    return ""


def write_roofline_page(folder: Path) -> Path:
    """Write the run's roofline.html."""
    from dance_seg.machine import write_text
    from dance_seg.report.page import Page, render
    from dance_seg.report.roofline import roofline
    from dance_seg.report.runs import read_run

    found = read_run(folder)
    return write_text(folder / "roofline.html", render(Page(f"{found.name}: roofline", sections=(roofline(found),))))


def measure_onnx_file(given: argparse.Namespace) -> dict[str, Any]:
    """Measure an ONNX file by onnxruntime, print the figures and return them."""
    from dance_seg.cost.energy import EnergyMeter
    from dance_seg.cost.latency import is_noisy, load_average, measure_onnx_latency

    if not given.run.is_file():
        raise ValueError(f"{given.run}: no such file")
    for option in ("roofline", "throughput", "channels_last"):
        if getattr(given, option):
            raise ValueError(f"--{option.replace('_', '-')} needs a run folder, not an ONNX file")
    load, results = load_average(), []
    for size in given.size or [None]:
        batches = []
        for batch in given.batch:
            meter = EnergyMeter()
            latency = measure_onnx_latency(
                given.run, tuple(size) if size else None, batch=batch, threads=given.threads,
                time_limit_s=given.seconds, meter=meter,
            )  # fmt: skip
            joules = None if meter.joules is None else meter.joules / (batch * latency.runs)
            batches.append({**latency_record(latency), "joules_per_image": joules, "energy_source": meter.source})
        figures = {
            "input_size": batches[0]["input_size"],
            "latency_ms": {key: value for key, value in batches[0].items() if key in LATENCY_KEYS},
            "batches": batches,
            "load_average": load,
            "notes": notes(batches, is_noisy(load, given.threads)),
        }
        height, width = figures["input_size"]
        print("\n".join([f"{given.run} at {height}x{width}", *text_of(figures)]))
        results.append(figures)
    return {**results[0], "file": str(given.run), "other_sizes": results[1:]}


def text_of(figures: dict[str, Any]) -> list[str]:
    """The figures of one size as lines of a table."""
    first = figures["batches"][0]
    lines = []
    if "gmacs" in figures:
        kinds = ", ".join(f"{kind} {gmacs:.3f}" for kind, gmacs in figures["gmacs_by_operation"].items())
        lines += [
            f"  GMACs        {figures['gmacs']:.3f} per image ({kinds}); not counted: "
            + (", ".join(figures["uncounted"]) or "nothing"),
            f"  parameters   {figures['parameters'] / 1e6:.3f} M, with buffers "
            f"{first['peak_memory']['parameter_bytes'] / 1e6:.1f} MB",
        ]
    order = ", channels last" if first["channels_last"] else ""
    lines += [
        f"  measured     {first['runtime']}, {first['dtype']}{order}, {first['device']}, {first['threads']} threads",
        "",
        f"  {'batch':>5} {'p50 ms':>10} {'p90 ms':>10} {'images/s':>10} {'peak MB':>10} {'J/image':>10} {'runs':>6}",
    ]
    for one in figures["batches"]:
        memory = f"{one['peak_memory']['peak_bytes'] / 1e6:.1f}" if "peak_memory" in one else "–"
        joules = "–" if one["joules_per_image"] is None else f"{one['joules_per_image']:.4g}"
        lines.append(
            f"  {one['batch']:>5} {one['p50_ms']:>10.2f} {one['p90_ms']:>10.2f} {one['images_per_second']:>10.2f} "
            f"{memory:>10} {joules:>10} {one['runs']:>6}"
        )
    lines.append("")
    if "peak_memory" in first:
        lines.append(
            f"  peak memory  images, results and output, without parameters; by {first['peak_memory']['counted_by']}"
        )
    if found := figures.get("throughput"):
        tried = ", ".join(f"{batch}: {per_second:.2f}" for batch, per_second in found["tried"])
        lines.append(
            f"  throughput   {found['images_per_second']:.2f} images/s at batch {found['batch']} "
            f"({tried}; {found['ended_by']})"
        )
    lines.append(f"  energy       {first['energy_source']}")
    if guess := figures.get("estimated_energy"):
        lines.append(f"  estimate     {guess['joules_per_image']:.3g} J per image, NOT measured: {guess['model']}")
    lines += [f"  note         {note}" for note in figures["notes"]]
    return lines


def text_of_roofline(found: "Roofline") -> list[str]:
    """A roofline as lines of a table."""
    peak = found.peak
    watched = sum(usage.seconds for usage in found.operations)
    lines = [
        "",
        f"  roofline     {peak.gmacs_per_second:.1f} GMAC/s in matrix products and {peak.gigabytes_per_second:.1f} "
        f"GB/s in copies ({peak.dtype}, {peak.device}, {peak.threads} threads); they meet at {peak.ridge:.1f} "
        "MACs per byte",
        f"  {'batch ' + str(found.batch):17} {'GMACs':>8} {'MB moved':>9} {'MACs/byte':>9} {'ms':>9} {'of time':>7} "
        f"{'GMAC/s':>8} {'bound':>8} {'of roof':>8}",
    ]
    for usage in (*found.operations, found.total):
        share_of_time = f"{100 * usage.seconds / watched:.0f} %" if usage is not found.total and watched else ""
        lines.append(
            f"  {usage.name:17} {usage.macs / 1e9:8.3f} {usage.bytes / 1e6:9.1f} {usage.macs_per_byte:9.1f} "
            f"{1000 * usage.seconds:9.2f} {share_of_time:>7} "
            f"{f'{usage.gmacs_per_second:.1f}' if usage.macs else '–':>8} {usage.bound(peak):>8} "
            f"{100 * usage.share(peak):6.0f} %"
        )
    if found.training is not None:
        against = found.training_peak or peak
        lines.append(
            f"  training     {found.training.gmacs_per_second:.1f} GMAC/s over {found.training.seconds:.1f} s of "
            f"steps, {100 * found.training.share(against):.0f} % of the roof in {against.dtype} "
            f"({against.gmacs_per_second:.1f} GMAC/s, bound by {found.training.bound(against)})"
        )
    return lines + [f"  note         {note}" for note in found.notes]


if __name__ == "__main__":
    run(main)
