"""Score a run or a checkpoint on a split: python -m tools.evaluate RUN [--split S] [--json FILE] [key=value ...]."""

from pathlib import Path

from tools.cli import parser, run, write_json


def main() -> int:
    """Print mIoU, accuracies and the IoU of each class, with the protocol they were taken by."""
    arguments_parser = parser(__doc__, figures=True)
    arguments_parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/camvid_dense")
    arguments_parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as data.args.root=DIR")
    arguments_parser.add_argument("--split", help="train, held_out, val or test; default: what the run validated on")
    arguments_parser.add_argument("--checkpoint", default="best", help="best, last or a path; default: best")
    arguments = arguments_parser.parse_intermixed_args()
    from dance_seg.build import evaluate, load_run
    from dance_seg.recipe import recipe_from_record
    from datamodules import build_datamodule

    model, record, path = load_run(arguments.run, arguments.checkpoint)
    recipe = recipe_from_record(record["recipe"], overrides=arguments.overrides)
    datamodule = build_datamodule(recipe)
    split = arguments.split or datamodule.validate_on
    if split not in ("train", "held_out", "val", "test"):
        raise ValueError(f"--split is {split!r}; choose train, held_out, val or test")
    if list(datamodule.classes) != record["labels"]["classes"]:
        raise ValueError(
            f"{path} was trained on the classes {', '.join(record['labels']['classes'])}; the data has "
            f"{', '.join(datamodule.classes)}"
        )
    scores = evaluate(model, datamodule, split)
    print(f"{path}")
    print(
        f"{recipe.data.name} {split}: {len(datamodule.source(split))} images, whole images at resolution "
        f"{datamodule.resolution:g}, labels at their own size, one confusion matrix, void ignored"
    )
    width = max(len(name) for name in datamodule.classes)
    for name, iou in zip(datamodule.classes, scores.iou, strict=True):
        print(f"  {name:{width}}  {'  -  ' if iou is None else f'{iou:5.1f}'}")
    accuracies = f"pixel accuracy {scores.pixel_accuracy:.2f}   class accuracy {scores.class_accuracy:.2f}"
    print(f"mIoU {scores.miou:.2f}   {accuracies}")
    write_json(
        arguments.json,
        {
            "checkpoint": str(path),
            "data": recipe.data.name,
            "split": split,
            "images": len(datamodule.source(split)),
            "resolution": datamodule.resolution,
            "miou": scores.miou,
            "pixel_accuracy": scores.pixel_accuracy,
            "class_accuracy": scores.class_accuracy,
            "iou": dict(zip(datamodule.classes, scores.iou, strict=True)),
        },
    )
    return 0


if __name__ == "__main__":
    run(main)
