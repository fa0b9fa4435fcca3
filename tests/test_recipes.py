"""Every recipe loads, builds and takes two steps, on scenes written in its data set's own layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dance_seg.build import train
from dance_seg.checkpoint import newest_valid
from dance_seg.distillation.teacher import NetworkTeacher
from dance_seg.metrics_file import read_metrics
from dance_seg.recipe import load_recipe, recipe_differences
from dance_seg.stream import follow_stream
from dance_seg.teachers import teacher_recipe
from datamodules import build_datamodule
from datamodules.video import build_source
from tests.streams import write_film
from tools.make_shapes import write_layout

EVERY = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
VIDEOS = [path for path in EVERY if path.stem.startswith("video_")]
RECIPES = [path for path in EVERY if path not in VIDEOS]
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
    "camvid_ranet",
    "shapes_basisnet",
    "shapes_multi_stage",
    "camvid_dance_segformer",
}


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in REPRESENTATIVES else pytest.mark.slow, id=p.stem) for p in RECIPES],
)
def test_a_recipe_takes_two_steps(path, tmp_path):
    recipe = load_recipe(path)
    changes = [*SHORT, f"data.args.cache_dir={tmp_path / 'cache'}"]
    if recipe.supernet is not None:
        changes.append("supernet.drawn=0")  # the largest and the smallest network share a batch of two
    if recipe.data.name == "shapes":
        changes += ["data.args.num_train=4", "data.args.num_val=2", "data.args.size=[64,64]"]
    else:
        write_layout(recipe.data.name, tmp_path / "data", 12, size=(64, 96))
        changes.append(f"data.args.root={tmp_path / 'data'}")
    recipe = load_recipe(path, changes)
    train(recipe, build_datamodule(recipe), tmp_path / "run")
    _, checkpoint = newest_valid(tmp_path / "run" / "checkpoints", "step-*.ckpt")
    assert checkpoint["global_step"] >= 2


@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.stem)
def test_a_recipe_of_a_video_follows_a_few_frames(path, tmp_path):
    """Its own student, options and kind of source; its teacher of one convolution stands for the one it names."""
    recipe = load_recipe(path)
    student = replace(
        recipe.model, args={**recipe.model.args, **({"width": 0.125} if "width" in recipe.model.args else {})}
    )
    changes = ["trainer.accelerator=cpu", "trainer.threads=1", "tracking.wandb=disabled"]
    if recipe.data.name == "video_shapes":
        changes += ["data.args.num_frames=3", "data.args.size=[64,64]"]
    elif recipe.data.name == "video_camvid":
        write_layout("camvid", tmp_path / "data", 12, size=(64, 96))
        changes.append(f"data.args.root={tmp_path / 'data'}")
    else:
        write_film(tmp_path / "film.mp4", frames=3)
        changes.append(f"data.args.path={tmp_path / 'film.mp4'}")
    recipe = replace(load_recipe(path, changes), model=student)
    source = build_source(recipe)
    classes = source.classes or ("road", "car")
    teacher = NetworkTeacher(torch.nn.Conv2d(3, len(classes), 1), classes, device="cpu")
    folder = follow_stream(recipe, source, tmp_path / "run", teacher, stop_after=3, progress=False)
    assert len(read_metrics(folder / "metrics.jsonl")) == 3


@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.stem)
def test_the_teacher_that_a_recipe_of_a_video_trains_has_a_recipe(path):
    recipe = load_recipe(path)
    if recipe.teacher.name != "train":
        assert recipe.teacher.args["run"].startswith("runs/")
        return
    given = recipe.teacher.args
    made = teacher_recipe(str(path.parent.parent / given["recipe"]), given["overrides"], recipe)
    assert recipe.data.name == f"video_{made.data.name}"
    if recipe.data.name == "video_camvid":  # the clip was cut out of this drive
        assert (made.data.args["hold_out"], made.data.args["root"]) == ("0016E5", "data/camvid")


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
