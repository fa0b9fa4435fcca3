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
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.log_every=1",
    "trainer.validate_every=1",
    "tracking.wandb=disabled",
)


# One of each data set and each row in `make test`; the others in `make test-all`.
REPRESENTATIVES = {
    "shapes_dense",
    "camvid_dance",
    "cityscapes_data_slimming",
    "ade20k_network_slimming",
    "folder_dense",
    "camvid_dance_segformer",
}


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in REPRESENTATIVES else pytest.mark.slow, id=p.stem) for p in RECIPES],
)
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
def test_the_rows_of_a_comparison_differ_only_in_the_sections_they_are_about(name):
    folder = RECIPES[0].parent
    rows = {path.stem.removeprefix(f"{name}_"): load_recipe(path) for path in sorted(folder.glob(f"{name}_*.yaml"))}
    dense = rows["dense"]
    about = {
        "dense": set(),
        "data_slimming": {"data_slimming"},
        "network_slimming": {"network_slimming"},
        "dance": {"data_slimming", "network_slimming"},
    }
    for row, sections in about.items():
        if row not in rows:  # a folder of one's own has no network half
            assert name == "folder"
            continue
        for section in ("data_slimming", "network_slimming"):
            assert (getattr(rows[row], section) is not None) == (section in sections)
        keys = {line.split(":")[0].split(".")[0] for line in recipe_differences(dense, rows[row])}
        assert keys == {"name", *sections} - (set() if sections else {"name"})
    if "dance" in rows:
        assert rows["dance"].data_slimming == rows["data_slimming"].data_slimming
        assert rows["dance"].network_slimming == rows["network_slimming"].network_slimming
