"""What BasisNet owes to its training: python -m tools.bench.basisnet [key=value ...].

Its paper (arXiv 2105.03014) says that the training recipe decides. So BasisNet and its plain twin, the specialist with
one kernel a layer, are trained by the whole recipe (a teacher's soft labels, averaged weights, changed colours and
sizes, a learning rate that falls), and with one of these taken away at a time. All begin with EfficientNet-Lite0's
ImageNet weights, as in `make bench-adaptive`: from random ones the recipe's few steps are too few. Each score is that
of the last exit after the last epoch, on drawn scenes that nothing was chosen on. Runs that are there already are not
trained again. Overrides apply to every run.
"""

from collections.abc import Sequence
from pathlib import Path

from tools.bench.adaptive import ON_SHAPES, loaded, pretrained, write_twin
from tools.bench.common import spread, write_result
from tools.bench.four_rows import trained
from tools.cli import parser, run

RECIPE = "recipes/shapes_basisnet.yaml"
# Four times the scenes, and twice the steps.
TEACHER = ("data.args.num_train=480", "trainer.max_epochs=10", "trainer.validate_every=10", "trainer.ema=0.99")
WHOLE = ("trainer.ema=0.99", "data.args.color=0.4")
WITHOUT = {
    "nothing": (),
    "augmentation": ("data.args.color=0", "data.args.flip=0", "data.args.random_scale=[1.0,1.0]"),
    "distillation": ("soft_labels=null",),
    "averaged_weights": ("trainer.ema=null",),
    "schedule": ("optimizer.schedule=constant",),
}
MODELS = ("basisnet", "twin")
SCORED_ON = ("data.args.num_test=160",)


def main() -> int:
    """Train what is not there yet, and write runs/bench/basisnet.json with the table."""
    arguments_parser = parser(__doc__ or "")
    arguments_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments_parser.add_argument("--runs", type=Path, default=Path("runs/adaptive"), help="where runs are kept")
    arguments_parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    arguments = arguments_parser.parse_intermixed_args()
    given = [*ON_SHAPES, *arguments.overrides]
    found: dict[tuple[str, str], list[float]] = {}
    for seed in arguments.seeds:  # seed by seed, so that an early stop leaves whole comparisons
        for place, miou in mious(seed, given, arguments.runs).items():
            found.setdefault(place, []).append(miou)
    ratios = {
        f"miou_without_{part}/{model}": spread(
            [less - whole for less, whole in zip(found[model, part], found[model, "nothing"], strict=True)]
        )
        for model in MODELS
        for part in list(WITHOUT)[1:]
    } | {
        f"miou_minus_twin/without_{part}": spread(
            [mixed - plain for mixed, plain in zip(found["basisnet", part], found["twin", part], strict=True)]
        )
        for part in WITHOUT
    }
    lines = {f"{model} without {part}": [round(miou, 2) for miou in found[model, part]] for model, part in found}
    write_result("basisnet", len(arguments.seeds), ratios, lines)
    return 0


def mious(seed: int, given: Sequence[str], runs: Path) -> dict[tuple[str, str], float]:
    """The mIoU in points of each model, by what its recipe lacks."""
    from dance_seg.inference import evaluate
    from dance_seg.recipe import load_recipe, recipe_record

    of_models = [o for o in given if o.startswith("model.")]
    begun = [*pretrained(of_models), *of_models]
    given = [o for o in given if o not in of_models]
    twin = write_twin(recipe_record(load_recipe(RECIPE, [*given, *begun])), runs / "recipes" / "basisnet_twin.yaml")
    teacher = trained("basisnet_teacher", str(twin), seed, [*TEACHER, *given], runs).folder
    whole = [*WHOLE, f"soft_labels.teacher={teacher}", *given]
    scored = {}
    for model, path, own in zip(MODELS, (RECIPE, str(twin)), (begun, ()), strict=True):
        for part, without in WITHOUT.items():
            folder = trained(f"{model}_without_{part}", path, seed, [*whole, *own, *without], runs).folder
            network, data = loaded(folder, SCORED_ON)
            scored[model, part] = evaluate(network, data, "test").miou
    return scored


if __name__ == "__main__":
    run(main)
