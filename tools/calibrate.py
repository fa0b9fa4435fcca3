"""Choose the thresholds of a network's exits for a budget: python -m tools.calibrate RUN --budget 0.5 [key=value ...].

The budget is a share of what the whole network costs, in MACs or measured milliseconds, or a number of MACs. The
thresholds go into the run's checkpoint; evaluate and predict stop by them from then on. Calibrate on a split that you
do not report.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.cli import parser, run, write_json
from tools.evaluate import SPLITS

if TYPE_CHECKING:
    import numpy as np

    from dance_seg.calibration import Calibration
    from dance_seg.recipe import Recipe

SCORES = ("confident", "mean", "entropy", "gain")
METHODS = ("direct", "geometric")
UNITS = ("macs", "milliseconds")
FEW = 80  # images; a line fitted to fewer tells no more than the mean confidence (recipes/README.md)
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
    made.add_argument(
        "--score", choices=SCORES, help=f"how sure an exit is; default: gain, for fewer than {FEW} images mean"
    )
    made.add_argument("--confident-from", metavar="P", type=float, default=0.9, help="of the score confident")
    made.add_argument("--boundary-weight", metavar="W", type=float, default=1.0, help="of pixels at boundaries, 0 to 1")
    made.add_argument("--beside", metavar="RUN", type=Path, nargs="+", default=[], help="static runs, for the curve")
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
    score: Any = arguments.score or ("mean" if len(datamodule.source(arguments.split)) < FEW else "gain")
    policy = ExitPolicy(score=score, confident_from=arguments.confident_from, boundary_weight=arguments.boundary_weight)
    # Images are seen as evaluate and predict will show them.
    datamodule.adaptive = adaptive_of({**record, "recipe": recipe_record(recipe)})
    beside = [static_network(folder, arguments.split, arguments.overrides) for folder in arguments.beside]
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
    figures = calibration.as_record() | {
        "epochs": epochs_of(arguments.run),
        "curves": curves(found, calibration.costs, calibration.how),
        "beside": beside,
    }
    write_calibration(path, calibration)
    write_text(arguments.run / "calibration.json", json.dumps(figures, indent=1) + "\n")
    shown = some_of_each_exit(model, datamodule, calibration)
    save_pictures(arguments.run / "pictures", shown, datamodule.label_table.palette)
    write_report(arguments.run)
    track(recipe, arguments.run, figures, shown, datamodule.classes)
    print(
        f"{path} now stops by these thresholds; evaluate and predict use them, {arguments.run}/report.html shows them"
    )
    print_table(calibration)
    write_json(arguments.json, figures)
    return 0


def epochs_of(folder: Path) -> int:
    """How many epochs a run has had so far."""
    from dance_seg.tracking import read_metrics

    return 1 + max((int(row["epoch"]) for row in read_metrics(folder / "metrics.jsonl") if "epoch" in row), default=-1)


class Shown(NamedTuple):
    """An image of the split, what was predicted, and where it left."""

    exit: int  # from 0
    name: str
    image: "np.ndarray"  # uint8 (H, W, 3)
    prediction: "np.ndarray"  # uint8 (H, W)


def static_network(folder: Path, split: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a run's whole network comes to on a split of its own data: mIoU, and the costs of an image on average.

    Raises ValueError when there is no such run.
    """
    import numpy as np

    from dance_seg.build import load_run
    from dance_seg.calibration import price, whole_costs
    from dance_seg.inference import predictions
    from dance_seg.metrics import confusion_matrix, scores
    from dance_seg.recipe import adaptive_of, recipe_from_record, recipe_record
    from datamodules import build_datamodule

    model, record, _ = load_run(folder)
    recipe = recipe_from_record(record["recipe"], overrides)
    datamodule = build_datamodule(recipe)
    datamodule.adaptive = adaptive_of({**record, "recipe": recipe_record(recipe)})
    classes = len(datamodule.classes)
    matrix, seen = np.zeros((classes, classes), np.int64), list[tuple[int, int]]()
    for found in predictions(model, datamodule, split):  # puts the network where it runs
        matrix += confusion_matrix(found.prediction, found.label, classes)
        seen.append(found.seen)
    times = sum(price(model, size, seen[0]) for size in seen) / len(seen)
    costs = {unit: times * cost for unit, cost in whole_costs(model, seen[0]).items()}
    return {"name": folder.name, "miou": scores(matrix).miou, **costs}


def some_of_each_exit(model: Any, datamodule: Any, calibration: "Calibration") -> list[Shown]:
    """A few images of the split that left at each exit."""
    from dance_seg.inference import predictions

    source, counts = datamodule.source(calibration.split), dict.fromkeys(range(model.num_exits), 0)
    shown = []
    for index, found in enumerate(predictions(model, datamodule, calibration.split, policy=calibration.policy)):
        (exit,) = found.exits
        if counts[exit] < PICTURES:
            counts[exit] += 1
            shown.append(Shown(exit, Path(found.name).name, source.load(index).image, found.prediction))
    return shown


def save_pictures(folder: Path, shown: Sequence[Shown], palette: Any) -> None:
    """The images with what was predicted laid over them, for the report; those of an earlier calibration go."""
    from PIL import Image

    from dance_seg.predict import overlay

    for old in folder.glob("exit_*.png"):
        old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(shown):
        rank = 1 + sum(other.exit == one.exit for other in shown[:number])
        picture = Image.fromarray(overlay(one.image, one.prediction, palette))
        picture.thumbnail((320, 320))
        picture.save(folder / f"exit_{one.exit + 1}_{rank}_{one.name}.png")


def track(
    recipe: "Recipe", folder: Path, figures: Mapping[str, Any], shown: Sequence[Shown], classes: Sequence[str]
) -> None:
    """The curve, what leaves where, and the pictures in the tracker, where the run has one."""
    from dance_seg.build import tracker_of

    logger = tracker_of(recipe, folder, "calibrated")
    if logger is None:
        return
    for unit, points in figures["curves"].items():
        for step, point in enumerate(points):
            logger.log_metrics({f"exits/{unit}/{key}": value for key, value in point.items()}, step)
    achieved, thresholds = figures["achieved"], figures["policy"]["thresholds"]
    leaving = {f"exits/leaving/exit_{exit}": share for exit, share in enumerate(achieved["exits"], start=1)}
    asked = {f"exits/threshold/exit_{exit}": one for exit, one in enumerate(thresholds, start=1) if one is not None}
    chosen = {f"exits/{key}": achieved[key] for key in ("miou", "miou_random", "macs_share", "milliseconds_share")}
    logger.log_metrics({**leaving, **asked, **chosen}, 0)
    for exit in sorted({one.exit for one in shown}):
        own = [one for one in shown if one.exit == exit]
        masks = {"prediction": [one.prediction for one in own]}
        logger.log_images(f"exits/exit_{exit + 1}", [one.image for one in own], masks, classes, 0)
    logger.finish()


def print_table(calibration: "Calibration") -> None:
    """One row per exit, and below what stopping comes to on the calibration split."""
    achieved, times = calibration.achieved, calibration.mean_price
    print(f"calibrated on {calibration.split}: {achieved['images']} images, score {calibration.policy.score}")
    print("  exit  threshold     mIoU   GMACs      ms  leaves here")
    thresholds = [*(f"{value:9.4f}" for value in calibration.policy.thresholds), "        -"]
    for exit, threshold in enumerate(thresholds):
        alone = [place == exit for place in range(len(thresholds))]
        cost = {unit: times * costs.total(exit, alone) for unit, costs in calibration.costs.items()}
        miou, leaves = achieved["miou_of_exits"][exit], achieved["exits"][exit]
        gmacs, milliseconds = cost["macs"] / 1e9, cost["milliseconds"]
        print(f"  {exit + 1:4}  {threshold}  {miou:7.2f}  {gmacs:6.2f}  {milliseconds:6.1f}  {leaves:10.0%}")
    print(
        f"mIoU {achieved['miou']:.2f} (random exits {achieved['miou_random']:.2f}) at {achieved['macs_share']:.3f} of "
        f"the MACs and {achieved['milliseconds_share']:.3f} of the milliseconds; the budget was "
        f"{calibration.budget:g} of the {calibration.unit}"
    )
    expected = achieved["expected"]
    share, deviation = (expected[f"{calibration.unit}_share{what}"] for what in ("", "_deviation"))
    print(
        f"{achieved['images']} other images are expected to spend {share:.3f} +- {deviation:.3f} of the "
        f"{calibration.unit} at mIoU {expected['miou']:.2f}; more images calibrate it closer"
    )


if __name__ == "__main__":
    run(main)
