"""Every recipe loads, builds and takes two steps, on scenes written in its data set's own layout."""

from pathlib import Path

import pytest

from dance_seg.build import train
from dance_seg.checkpoint import newest_valid
from dance_seg.recipe import load_recipe, recipe_differences
from datamodules import build_datamodule
from tools.make_shapes import write_layout

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
PAIRS = sorted({path.stem.removesuffix("_dense") for path in RECIPES if path.stem.endswith("_dense")})

SHORT = (
    "data.args.batch_size=2",
    "data.args.workers=0",
    "data.args.crop=[64,64]",
    "data.args.cache_gb=0.1",
    "data.args.statistics_images=2",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.log_every=1",
    "trainer.validate_every=1",
    "tracking.wandb=disabled",
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps(path, tmp_path):
    recipe = load_recipe(path)
    changes = [*SHORT, f"data.args.cache_dir={tmp_path / 'cache'}"]
    if recipe.data.name == "shapes":
        changes += ["data.args.num_train=4", "data.args.num_val=2", "data.args.size=[64,64]"]
    else:
        write_layout(recipe.data.name, tmp_path / "data", 12, size=(64, 96))
        changes.append(f"data.args.root={tmp_path / 'data'}")
    recipe = load_recipe(path, changes)
    train(recipe, build_datamodule(recipe), tmp_path / "run")
    _, checkpoint = newest_valid(tmp_path / "run" / "checkpoints", "step-*.ckpt")
    assert checkpoint["global_step"] >= 2


@pytest.mark.parametrize("name", PAIRS)
def test_a_dense_recipe_and_its_slimmed_twin_differ_only_in_data_slimming(name):
    dense, slim = (load_recipe(path) for path in RECIPES[0].parent.glob(f"{name}_d*.yaml") if path.stem != "x")
    if dense.data_slimming is not None:
        dense, slim = slim, dense
    assert dense.data_slimming is None
    assert slim.data_slimming is not None
    keys = {line.split(":")[0].split(".")[0] for line in recipe_differences(dense, slim)}
    assert keys == {"name", "data_slimming"}
