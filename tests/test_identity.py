"""At its limits data slimming is the dense run, step by step; and what it drops is never decoded."""

import torch

from dance_seg.build import train
from dance_seg.checkpoint import newest_valid
from datamodules import build_datamodule
from datamodules.image_files import decodes
from datamodules.transforms import make_batch
from tests.tiny import SLIM, TINY, tiny
from tools.make_shapes import write_layout

LIMIT = "data_slimming: {scales: [1.0], quantiles: [], drop_rate: 0.0, min_weight: 1.0}"


def weights(recipe, folder):
    train(recipe, build_datamodule(recipe), folder)
    return newest_valid(folder / "checkpoints", "step-*.ckpt")[1]["state_dict"]


def test_slimming_at_its_limits_ends_with_the_weights_of_the_dense_run_bit_for_bit(tmp_path):
    from dance_seg.recipe import parse_recipe

    changes = [f"data.args.cache_dir={tmp_path / 'cache'}", "trainer.max_epochs=2"]
    dense = weights(parse_recipe(TINY, changes), tmp_path / "dense")
    limit = weights(parse_recipe(TINY + LIMIT, changes), tmp_path / "limit")
    slimmed = weights(parse_recipe(TINY + SLIM, changes), tmp_path / "slimmed")
    assert all(torch.equal(dense[key], limit[key]) for key in dense)
    assert not all(torch.equal(dense[key], slimmed[key]) for key in dense)


def test_a_dropped_image_is_never_decoded(tmp_path):
    write_layout("camvid", tmp_path / "camvid", 24, size=(64, 96))
    recipe = tiny("data.name=camvid", "data_slimming.drop_rate=1.0", "data_slimming.drop_below=0.6", slim=True)
    arguments = {"root": str(tmp_path / "camvid"), "crop": [64, 64], "batch_size": 4, "cache_gb": 0}
    from dataclasses import replace

    from dance_seg.part import Part

    recipe = replace(recipe, data=Part("camvid", {**arguments, "cache_dir": str(tmp_path / "cache")}))
    datamodule = build_datamodule(recipe)
    datamodule.fit_to(stride=32, epochs=10, seed=0, data_slimming=recipe.data_slimming)
    datamodule.prepare_data()  # scoring looks at every image, once
    datamodule.batches.set_position(4)
    summary = datamodule.schedule[4]
    assert summary.images_dropped > 0
    before = decodes()
    counted = 0
    for draws in datamodule.batches:
        batch = make_batch(datamodule.source("train"), draws, (64, 64), datamodule.augmentation, 0)
        counted += batch.decodes
    assert counted == decodes() - before == 2 * summary.images_paid  # an image and a label each
