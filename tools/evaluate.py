"""Score a run, or files of predictions, on a split: python -m tools.evaluate RUN [--split S] [key=value ...].

RUN is a run folder; with --predictions also a recipe, which says which data. Every figure comes with its protocol.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.cli import parser, run, write_json

if TYPE_CHECKING:
    from dance_seg.boundary import BoundaryScores
    from dance_seg.consistency import ConsistencyScores
    from dance_seg.early_exit.policy import ExitPolicy
    from dance_seg.metrics import Scores
    from datamodules.base import SegmentationDataModule

SPLITS = ("train", "held_out", "val", "test")
Left = tuple[tuple[int, int], tuple[int, ...]]
"""Of an image, the size (h, w) at which it was seen, and at which exit it or its tiles left."""
VIDEO = ("camvid", "folder")  # groups of images are clips, in order of time by their names


def arguments_parser() -> argparse.ArgumentParser:
    """What the tool takes."""
    made = parser(__doc__ or "", figures=True)
    made.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/camvid_dense")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="such as data.args.root=DIR")
    made.add_argument("--split", help=f"{', '.join(SPLITS)}; default: what the run validated on")
    made.add_argument("--checkpoint", default="best", help="best, last or a path; default: best")
    made.add_argument("--window", metavar=("H", "W"), type=int, nargs=2, help="slide a window instead of whole images")
    made.add_argument("--stride", metavar=("H", "W"), type=int, nargs=2, help="of the window; default: two thirds")
    made.add_argument("--scales", metavar="S", type=float, nargs="+", help="average over them, such as 0.75 1 1.25")
    made.add_argument("--flip", action="store_true", help="average with the mirrored image")
    made.add_argument("--boundary", action="store_true", help="boundary IoU too")
    made.add_argument("--consistency", action="store_true", help="temporal consistency too, for clips of video")
    made.add_argument(
        "--exit", metavar="K", help="of a network with exits: 1, 2, ... or last; default: as calibrated, else last"
    )
    made.add_argument("--tile", metavar=("H", "W"), type=int, nargs=2, help="stop tile by tile, not for whole images")
    made.add_argument("--save", metavar="DIR", type=Path, help="write the predictions in the data's official form")
    made.add_argument("--predictions", metavar="DIR", type=Path, help="score these files instead of the network")
    return made


def main() -> int:
    """Print mIoU, accuracies and the IoU of each class, with the protocol they were taken by."""
    arguments = arguments_parser().parse_intermixed_args()
    given = ("scales", "window", "stride", "flip", "save", "exit", "tile")
    if arguments.predictions and any(getattr(arguments, name) for name in given):
        raise ValueError(
            f"--predictions scores files as they are: {', '.join(f'--{name}' for name in given)} do not go along"
        )
    import numpy as np

    from dance_seg.boundary import BoundaryIoU
    from dance_seg.consistency import TemporalConsistency
    from dance_seg.inference import Protocol, predictions
    from dance_seg.metrics import confusion_matrix, scores
    from dance_seg.recipe import adaptive_of, load_recipe, recipe_from_record, recipe_record
    from datamodules import build_datamodule
    from datamodules.predictions import PredictionWriter, official_form, read_predictions

    policy = None
    protocol = Protocol(
        scales=tuple(arguments.scales or (1.0,)), flip=arguments.flip, window=arguments.window, stride=arguments.stride
    )
    if arguments.predictions:
        scored = arguments.predictions
        recipe = load_recipe(recipe_file(arguments.run), arguments.overrides)
    else:
        from dance_seg.build import load_run

        model, record, scored = load_run(arguments.run, arguments.checkpoint)
        recipe = recipe_from_record(record["recipe"], overrides=arguments.overrides)
    datamodule = build_datamodule(recipe)
    classes = datamodule.classes
    split = arguments.split or datamodule.validate_on
    if split not in SPLITS:
        raise ValueError(f"--split is {split!r}; choose one of {', '.join(SPLITS)}")
    if arguments.consistency and recipe.data.name not in VIDEO:
        raise ValueError(f"--consistency needs clips of video; {recipe.data.name} holds single images")
    source, form = datamodule.source(split), official_form(recipe.data.name, datamodule.label_table)
    writer = PredictionWriter(arguments.save, form) if arguments.save else None
    if arguments.predictions:
        pairs = getattr(datamodule.raw_source(split), "pairs", ())
        found = read_predictions(arguments.predictions, source, form, label_files=[pair.label for pair in pairs])
    else:
        if list(classes) != record["labels"]["classes"]:
            trained = ", ".join(record["labels"]["classes"])
            raise ValueError(f"{scored} was trained on the classes {trained}; the data has {', '.join(classes)}")
        # The complexity that decides is that of the images it was trained on, which the checkpoint keeps.
        datamodule.adaptive = adaptive_of({**record, "recipe": recipe_record(recipe)})
        policy = exit_policy(model, record, arguments, datamodule, split, scored)
        found = predictions(model, datamodule, split, protocol, policy, arguments.tile and tuple(arguments.tile))

    matrix = np.zeros((len(classes), len(classes)), np.int64)
    boundary = BoundaryIoU(len(classes)) if arguments.boundary else None
    consistency = TemporalConsistency(len(classes)) if arguments.consistency else None
    sizes, previous_group, taken = set(), None, list[Left]()
    for index, (name, prediction, label, left, seen) in enumerate(found):
        if left:
            taken.append((seen, left))
        matrix += confusion_matrix(prediction, label, len(classes))
        sizes.add(label.shape)
        if boundary:
            boundary.update(prediction, label)
        if consistency:
            if source.groups[index] != previous_group:
                consistency.start()
            previous_group = source.groups[index]
            consistency.update(source.load(index).image, prediction)
        if writer:
            writer.write(name, prediction)

    figures: dict[str, Any] = {
        "scored": str(scored),
        "data": recipe.data.name,
        "split": split,
        "images": len(source),
        "label_sizes": sorted(sizes),
        "seed": recipe.seed,
    }
    if arguments.predictions:
        how = "predictions from files"
    else:
        adaptive = datamodule.adaptive.options.scales if datamodule.adaptive else None
        shown = f"images at {datamodule.resolution:g} times their size"
        if adaptive:
            shown += f", simple ones smaller (adaptive, {' '.join(f'{scale:g}' for scale in adaptive)})"
        how = f"{protocol}, {shown}"
        figures |= {
            "checkpoint": str(scored),
            "resolution": datamodule.resolution,
            "adaptive_scales": adaptive,
            "protocol": protocol.as_record(),
        }
    print(scored)
    print(f"data      {recipe.data.name} {split}: {len(source)} images, labels {described(sizes)} at their own size")
    print(f"protocol  {how}")
    if taken and policy is not None:
        exits = exits_record(model, taken, policy, arguments.tile)
        figures["exits"] = exits
        print(f"exits     {described_exits(exits)}")
    elif not arguments.predictions and not arguments.exit and getattr(model, "num_exits", 1) > 1:
        print(f"exits     all go to the last; to stop early: python -m tools.calibrate {arguments.run} --budget 0.5")
    print(f"score     one confusion matrix over all pixels, void ignored; one run, seed {recipe.seed}")
    if writer:
        print(f"saved     {writer.folder}: {form}")
    if not matrix.any() and writer:
        print(f"the images of {split} have no labels here, so there is nothing to score")
        write_json(arguments.json, {**figures, "miou": None})
        return 0
    found_scores = scores(matrix)
    found_boundary = boundary.compute() if boundary else None
    found_consistency = consistency.compute() if consistency else None
    print_table(classes, found_scores, found_boundary, found_consistency)
    write_json(arguments.json, {**figures, **as_record(classes, found_scores, found_boundary, found_consistency)})
    return 0


def exit_policy(
    model: Any,
    record: dict[str, Any],
    arguments: argparse.Namespace,
    datamodule: "SegmentationDataModule",
    split: str,
    at: Path,
) -> "ExitPolicy | None":
    """By which exits a network stops: the one asked for, as calibrated, or None for the whole network."""
    from dance_seg.calibration import calibrated_policy, fixed_exit, refuse_overlap
    from dance_seg.early_exit.exits import ExitNetwork

    if not isinstance(model, ExitNetwork):
        if arguments.exit or arguments.tile:
            asked = f"--exit {arguments.exit}" if arguments.exit else "--tile"
            raise ValueError(f"{asked}: {at} holds a network with one exit")
        return None
    if arguments.exit == "last":
        if arguments.tile:
            raise ValueError("--tile lets tiles stop early, and with --exit last none does; leave one of them out")
        return None
    if arguments.exit:
        if not arguments.exit.isdigit():
            raise ValueError(f"--exit is {arguments.exit!r}; give a number from 1 to {model.num_exits}, or last")
        return fixed_exit(model.num_exits, int(arguments.exit) - 1)
    policy = calibrated_policy(record, model, at=str(at))
    if policy is None:
        return None
    if arguments.scales or arguments.window or arguments.flip:
        raise ValueError("--scales, --window and --flip do not go with calibrated exits; add --exit last")
    refuse_overlap(record, datamodule, split)
    seen = record["exits"].get("resolution", datamodule.resolution)
    if seen != datamodule.resolution:
        print(
            f"thresholds were chosen at {seen:g} times the images' size, and these are seen at "
            f"{datamodule.resolution:g} times theirs: the budget need not be met"
        )
    if arguments.tile:
        print("thresholds were chosen for whole images: by tiles the budget need not be met")
    return policy


def exits_record(model: Any, taken: Sequence[Left], policy: "ExitPolicy", tile: Sequence[int] | None) -> dict[str, Any]:
    """Where images or tiles left, and the MACs of an image on average.

    MACs are counted for the first image, or one tile, and taken to go with the padded pixels of the others.
    """
    from dance_seg.calibration import price
    from dance_seg.early_exit.paths import path_costs
    from dance_seg.early_exit.tiles import tile_size

    size = taken[0][0]
    whole = path_costs(model.cpu(), size)
    costs = path_costs(model, tile_size(size, (tile[0], tile[1]))) if tile else whole
    prices = [price(model, seen, size) for seen, _ in taken]
    spent = [
        sum(costs.total(exit, policy.asked) for exit in exits) * (1 if tile else one)
        for one, (_, exits) in zip(prices, taken, strict=True)
    ]
    left = [exit for _, exits in taken for exit in exits]
    return {
        "shares": [left.count(exit) / len(left) for exit in range(model.num_exits)],
        "gmacs": sum(spent) / len(spent) / 1e9,
        "macs_share": sum(spent) / (whole.full * sum(prices)),
        "tile": list(tile) if tile else None,
        "policy": policy.as_record(),
    }


def described_exits(exits: dict[str, Any]) -> str:
    """Where images left and what that costs, in words.

    >>> described_exits({"shares": [0.75, 0.25], "gmacs": 1.5, "macs_share": 0.5})
    '75 % left at exit 1, 25 % at exit 2; 1.50 GMACs on average, 0.500 of the whole network'
    """
    first, *rest = exits["shares"]
    leaving = [f"{first:.0%} left at exit 1".replace("%", " %")]
    leaving += [f"{share:.0%} at exit {exit}".replace("%", " %") for exit, share in enumerate(rest, start=2)]
    cost = f"{exits['gmacs']:.2f} GMACs on average, {exits['macs_share']:.3f} of the whole network"
    return f"{', '.join(leaving)}; {cost}"


def recipe_file(run_folder: Path) -> Path:
    """The recipe of a run folder, or the recipe itself where its file is given."""
    if run_folder.is_file():
        return run_folder
    if not (run_folder / "recipe.yaml").is_file():
        raise ValueError(f"{run_folder} is neither a run folder with a recipe.yaml nor a recipe")
    return run_folder / "recipe.yaml"


def described(sizes: set[tuple[int, int]]) -> str:
    """The sizes of labels in words.

    >>> described({(360, 480)}), described({(1, 2), (3, 4)})
    ('of 360 x 480', 'of 2 sizes')
    """
    return "of {} x {}".format(*next(iter(sizes))) if len(sizes) == 1 else f"of {len(sizes)} sizes"


def print_table(
    classes: tuple[str, ...],
    found: "Scores",
    boundary: "BoundaryScores | None",
    consistency: "ConsistencyScores | None",
) -> None:
    """One row per class, the means below; - where a class is nowhere."""
    columns: dict[str, tuple[float | None, ...]] = {"IoU": found.iou, "accuracy": found.accuracies}
    if boundary:
        columns["boundary IoU"] = boundary.iou
    if consistency:
        columns["consistency"] = consistency.iou
    width = max(len(name) for name in classes)
    print(f"  {'':{width}}" + "".join(f"  {title:>8}" for title in columns))
    for name, *values in zip(classes, *columns.values(), strict=True):
        cells = (
            f"  {'-' if value is None else f'{value:.1f}':>{max(8, len(title))}}"
            for title, value in zip(columns, values, strict=True)
        )
        print(f"  {name:{width}}" + "".join(cells))
    print(
        f"mIoU {found.miou:.2f}   pixel accuracy {found.pixel_accuracy:.2f}   class accuracy {found.class_accuracy:.2f}"
    )
    if boundary:
        print(f"boundary mIoU {boundary.miou:.2f} (bands of 2 % of the diagonal)")
    if consistency:
        print(
            f"temporal consistency {consistency.miou:.2f} (mIoU with the frame before, warped; DIS flow, "
            f"{consistency.frame_pairs} pairs of frames, {consistency.compared:.0f} % of their pixels seen in both)"
        )


def as_record(
    classes: tuple[str, ...],
    found: "Scores",
    boundary: "BoundaryScores | None",
    consistency: "ConsistencyScores | None",
) -> dict[str, Any]:
    """The figures as plain data."""
    record: dict[str, Any] = {
        "miou": found.miou,
        "pixel_accuracy": found.pixel_accuracy,
        "class_accuracy": found.class_accuracy,
        "iou": dict(zip(classes, found.iou, strict=True)),
        "accuracy": dict(zip(classes, found.accuracies, strict=True)),
    }
    if boundary:
        record |= {
            "boundary_miou": boundary.miou,
            "boundary_iou": dict(zip(classes, boundary.iou, strict=True)),
        }
    if consistency:
        record |= {
            "temporal_consistency": consistency.miou,
            "temporal_consistency_iou": dict(zip(classes, consistency.iou, strict=True)),
            "frame_pairs": consistency.frame_pairs,
            "pixels_compared": consistency.compared,
        }
    return record


if __name__ == "__main__":
    run(main)
