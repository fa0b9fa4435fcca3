"""Choose the thresholds of a network's exits for a budget: python -m tools.calibrate RUN --budget 0.5 [key=value ...].

The budget is a share of what the whole network costs, in MACs or measured milliseconds, or a number of MACs. The
thresholds go into the run's checkpoint; evaluate and predict stop by them from then on. Calibrate on a split that you
do not report.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.cli import parser, run, write_json
from tools.evaluate import SPLITS

if TYPE_CHECKING:
    from dance_seg.calibration import Calibration

SCORES = ("confident", "mean", "entropy")
METHODS = ("direct", "geometric")
UNITS = ("macs", "milliseconds")
PICTURES = 4  # of each exit


def arguments_parser() -> argparse.ArgumentParser:
    """What the tool takes."""
    made = parser(__doc__ or "", figures=True)
    made.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/shapes_ranet")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="such as data.args.root=DIR")
    budget = made.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget", type=float, help="share of the whole network's cost, such as 0.5")
    budget.add_argument("--budget-macs", metavar="N", type=float, help="MACs of an image on average, such as 1e8")
    made.add_argument("--unit", choices=UNITS, default="macs", help="what the budget counts; default: macs")
    made.add_argument("--split", choices=SPLITS, default="val", help="do not score on it; default: val")
    made.add_argument("--checkpoint", default="best", help="best, last or a path; default: best")
    made.add_argument("--method", choices=METHODS, default="direct", help="direct seeks mIoU; geometric is RANet's")
    made.add_argument("--score", choices=SCORES, default="confident", help="how sure an exit is; default: confident")
    made.add_argument("--confident-from", metavar="P", type=float, default=0.9, help="of the score confident")
    made.add_argument("--boundary-weight", metavar="W", type=float, default=1.0, help="of pixels at boundaries, 0 to 1")
    return made


def main() -> int:
    """Print what each exit is worth and what the thresholds come to, and keep them in the checkpoint."""
    arguments = arguments_parser().parse_intermixed_args()
    from dance_seg.build import load_run
    from dance_seg.calibration import calibrate, curves, write_calibration
    from dance_seg.early_exit.exits import ExitNetwork
    from dance_seg.early_exit.policy import ExitPolicy
    from dance_seg.machine import write_text
    from dance_seg.recipe import adaptive_of, recipe_from_record, recipe_record
    from dance_seg.report.run_page import write_report
    from datamodules import build_datamodule

    policy = ExitPolicy(
        score=arguments.score, confident_from=arguments.confident_from, boundary_weight=arguments.boundary_weight
    )
    model, record, path = load_run(arguments.run, arguments.checkpoint)
    recipe = recipe_from_record(record["recipe"], overrides=arguments.overrides)
    if arguments.budget_macs is not None and arguments.unit != "macs":
        raise ValueError(f"--budget-macs counts MACs, and --unit is {arguments.unit}; give --budget for a share of it")
    if not isinstance(model, ExitNetwork):
        raise ValueError(
            f"{arguments.run} trained {recipe.model.name}, which has one exit; train a network with exits, such as "
            "recipes/shapes_ranet.yaml"
        )
    datamodule = build_datamodule(recipe)
    # Images are seen as evaluate and predict will show them.
    datamodule.adaptive = adaptive_of({**record, "recipe": recipe_record(recipe)})
    calibration, found = calibrate(
        model,
        datamodule,
        budget=arguments.budget if arguments.budget_macs is None else arguments.budget_macs,
        is_share=arguments.budget_macs is None,
        split=arguments.split,
        unit=arguments.unit,
        how=arguments.method,
        policy=policy,
    )
    write_calibration(path, calibration)
    figures = as_record(calibration) | {"curves": curves(found, calibration.costs, calibration.how)}
    write_text(arguments.run / "calibration.json", json.dumps(figures, indent=1) + "\n")
    save_pictures(arguments.run / "pictures", model, datamodule, calibration)
    write_report(arguments.run)
    print(
        f"{path} now stops by these thresholds; evaluate and predict use them, {arguments.run}/report.html shows them"
    )
    print_table(calibration)
    write_json(arguments.json, figures)
    return 0


def as_record(calibration: "Calibration") -> dict[str, Any]:
    """The figures as plain data."""
    return calibration.as_record()


def save_pictures(folder: Path, model: Any, datamodule: Any, calibration: "Calibration") -> None:
    """A few images of the split that left at each exit, with what was predicted, for the report."""
    from PIL import Image

    from dance_seg.inference import predictions
    from dance_seg.predict import overlay

    for old in folder.glob("exit_*.png"):
        old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    source, saved = datamodule.source(calibration.split), dict.fromkeys(range(model.num_exits), 0)
    for index, found in enumerate(predictions(model, datamodule, calibration.split, policy=calibration.policy)):
        (exit,) = found.exits
        if saved[exit] == PICTURES:
            continue
        saved[exit] += 1
        shown = overlay(source.load(index).image, found.prediction, datamodule.label_table.palette)
        picture = Image.fromarray(shown)
        picture.thumbnail((320, 320))
        picture.save(folder / f"exit_{exit + 1}_{saved[exit]}_{Path(found.name).name}.png")


def print_table(calibration: "Calibration") -> None:
    """One row per exit, and below what stopping comes to on the calibration split."""
    macs, milliseconds, achieved = calibration.costs["macs"], calibration.costs["milliseconds"], calibration.achieved
    print(f"calibrated on {calibration.split}: {achieved['images']} images")
    print("  exit  threshold     mIoU   GMACs      ms  leaves here")
    thresholds = [*(f"{value:9.4f}" for value in calibration.policy.thresholds), "        -"]
    for exit, threshold in enumerate(thresholds):
        alone = [place == exit for place in range(len(thresholds))]
        gmacs, taken = macs.total(exit, alone) / 1e9, milliseconds.total(exit, alone)
        miou, leaves = achieved["miou_of_exits"][exit], achieved["exits"][exit]
        print(f"  {exit + 1:4}  {threshold}  {miou:7.2f}  {gmacs:6.2f}  {taken:6.1f}  {leaves:10.0%}")
    print(
        f"mIoU {achieved['miou']:.2f} (random exits {achieved['miou_random']:.2f}) at {achieved['macs_share']:.3f} of "
        f"the MACs and {achieved['milliseconds_share']:.3f} of the milliseconds; the budget was "
        f"{calibration.budget:g} of the {calibration.unit}"
    )


if __name__ == "__main__":
    run(main)
