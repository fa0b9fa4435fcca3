"""Measure what a run's network costs to use: python -m tools.measure_cost RUN [--size H W] [--json FILE]."""

import json
from pathlib import Path

from tools.cli import parser, run, write_json


def main() -> int:
    """Print GMACs, parameters and milliseconds of one forward pass, and keep them in the run's cost.json."""
    arguments_parser = parser(__doc__, figures=True)
    arguments_parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/camvid_dense")
    arguments_parser.add_argument("--checkpoint", default="best", help="best, last or a path; default: best")
    arguments_parser.add_argument("--size", metavar=("H", "W"), type=int, nargs=2, help="default: the training crop")
    arguments_parser.add_argument("--batch", type=int, default=1, help="images at once; default 1")
    arguments_parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure; default 5")
    arguments_parser.add_argument("--threads", type=int, default=0, help="of the processor; default: as many as cores")
    arguments = arguments_parser.parse_intermixed_args()
    if arguments.size and min(arguments.size) < 1:
        raise ValueError(f"--size {arguments.size}: height and width in pixels, such as --size 360 480")
    if arguments.batch < 1 or arguments.seconds <= 0 or arguments.threads < 0:
        raise ValueError("--batch is at least 1, --seconds is positive, --threads is not negative")
    import os

    import torch

    from dance_seg.build import load_run
    from dance_seg.cost.energy import EnergyMeter
    from dance_seg.cost.latency import measure_latency
    from dance_seg.cost.macs import count_macs

    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    model, record, path = load_run(arguments.run, arguments.checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = tuple(arguments.size or record["recipe"]["data"]["args"].get("crop", (352, 480)))
    cost = count_macs(model, input_size=size)
    with EnergyMeter() as meter:
        latency = measure_latency(model.to(device), size, batch=arguments.batch, time_limit_s=arguments.seconds)
    figures = {
        "gmacs": cost.macs / 1e9,
        "parameters": cost.parameters,
        "input_size": list(size),
        "uncounted": list(cost.uncounted),
        "latency_ms": vars(latency),
        "joules_per_image": None if meter.joules is None else meter.joules / (latency.batch * latency.runs),
        "energy_source": meter.source,
    }
    print(f"{path} at {size[0]}x{size[1]}, one forward pass")
    print(f"  {figures['gmacs']:.3f} GMACs per image, {cost.parameters / 1e6:.3f} M parameters")
    print(f"  not counted: {', '.join(cost.uncounted) or 'nothing'}")
    print(
        f"  {latency.p50_ms:.2f} ms (p50), {latency.p90_ms:.2f} ms (p90), {latency.images_per_second:.1f} images/s: "
        f"batch {latency.batch}, {latency.dtype}, {latency.device}, {latency.threads} threads, {latency.runs} runs"
    )
    print(
        f"  energy: {meter.source}"
        + ("" if meter.joules is None else f", {figures['joules_per_image']:.3f} J per image")
    )
    there = arguments.run / "cost.json"
    if there.is_file():
        kept = json.loads(there.read_text())
        kept["inference"] = figures
        write_json(there, kept)
    write_json(arguments.json, figures)
    return 0


if __name__ == "__main__":
    run(main)
