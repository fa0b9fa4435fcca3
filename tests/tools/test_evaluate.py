"""python -m tools.evaluate: the protocol beside the figures, predictions as files and back, and what it refuses."""

import json
import sys

import pytest
from PIL import Image

from dance_seg.build import train
from dance_seg.recipe import parse_recipe
from datamodules import build_datamodule
from tools.make_shapes import write_layout

RECIPE = """
seed: 3
data:
  name: camvid
  args: {crop: [64, 64], batch_size: 4, statistics_images: 4, cache_gb: 0.1}
model: {name: smp, args: {arch: fpn, encoder_name: resnet18}}
optimizer: {name: adamw, lr: 1.0e-3}
data_slimming: {scales: [0.5, 1.0], quantiles: [0.95], warm_up: 0.0, ramp_until: 0.2, inference: adaptive}
trainer: {max_epochs: 2, log_every: 1, accelerator: cpu, threads: 1}
tracking: {wandb: disabled}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs on drawn scenes in CamVid's layout; all but the most complex are shown at half size."""
    root = tmp_path_factory.mktemp("evaluate")
    write_layout("camvid", root / "data", 16, size=(72, 96))
    given = [f"data.args.root={root / 'data'}", f"data.args.cache_dir={root / 'cache'}"]
    recipe = parse_recipe(RECIPE, given, name="trained")
    return train(recipe, build_datamodule(recipe), root / "trained")


@pytest.fixture
def evaluate(trained, monkeypatch, capsys, tmp_path):
    """Call the tool's main as `python -m tools.evaluate RUN ...` does; returns status, stdout, stderr, figures."""

    def call(*arguments, run_folder=trained):
        from tools.cli import run
        from tools.evaluate import main

        file = tmp_path / "figures.json"
        file.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["evaluate", str(run_folder), *map(str, arguments), "--json", str(file)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        said = capsys.readouterr()
        figures = json.loads(file.read_text()) if file.exists() else None
        return int(ended.value.code or 0), said.out, said.err, figures

    return call


def test_every_figure_has_its_protocol(evaluate, trained):
    status, out, _, figures = evaluate()
    assert status == 0
    assert "camvid val: 4 images, labels of 72 x 96 at their own size" in out
    assert "whole image, scale 1, no flip, images at 1 times their size, simple ones smaller (adaptive, 0.5 1)" in out
    assert "void ignored; one run, seed 3" in out
    assert figures["protocol"] == {"scales": [1.0], "flip": False, "window": None, "stride": None}
    assert (figures["data"], figures["split"], figures["images"], figures["seed"]) == ("camvid", "val", 4, 3)
    assert figures["label_sizes"] == [[72, 96]]
    assert figures["checkpoint"].endswith("best.ckpt")
    assert 0 <= figures["miou"] <= 100
    assert len(figures["iou"]) == len(figures["accuracy"]) == 11
    assert f"mIoU {figures['miou']:.2f}" in out


def test_the_whole_image_scores_what_validation_logged(evaluate, trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    logged = [row["val/miou"] for row in rows if "val/miou" in row]
    assert evaluate()[3]["miou"] == pytest.approx(max(logged), abs=1e-9)


def test_a_run_of_adaptive_resolution_can_be_scored_at_full_resolution(evaluate):
    status, out, _, figures = evaluate("data_slimming.inference=full")
    assert status == 0
    assert "images at 1 times their size\n" in out
    assert figures["adaptive_scales"] is None
    assert figures["pixel_accuracy"] != evaluate()[3]["pixel_accuracy"]


def test_windows_scales_and_flips_are_said_and_change_the_score(evaluate):
    status, out, _, figures = evaluate("--window", 48, 64, "--stride", 36, 48, "--scales", 0.75, 1, "--flip")
    assert status == 0
    assert "windows of 48 x 64 every 36 x 48 pixels, mean of scales 0.75 and 1, mean with horizontal flip" in out
    assert figures["protocol"]["window"] == [48, 64]
    assert figures["pixel_accuracy"] != evaluate()[3]["pixel_accuracy"]


def test_predictions_that_are_saved_and_read_back_have_the_same_scores(evaluate, trained, tmp_path):
    folder = tmp_path / "predictions"
    status, out, _, direct = evaluate("--split", "test", "--boundary", "--save", folder)
    assert status == 0
    assert str(folder) in out
    assert len(list(folder.glob("*.png"))) == direct["images"] == 4
    status, out, _, read_back = evaluate("--split", "test", "--boundary", "--predictions", folder)
    assert status == 0
    assert "predictions from files" in out
    for key in ("miou", "iou", "accuracy", "pixel_accuracy", "boundary_miou", "boundary_iou"):
        assert read_back[key] == direct[key]
    assert read_back["scored"] == str(folder)
    assert "checkpoint" not in read_back
    from_recipe = evaluate("--split", "test", "--predictions", folder, run_folder=trained / "recipe.yaml")[3]
    assert from_recipe["miou"] == direct["miou"]


def test_boundary_iou_and_temporal_consistency_are_printed_when_asked_for(evaluate):
    status, out, _, figures = evaluate("--boundary", "--consistency")
    assert status == 0
    assert "boundary mIoU" in out
    assert "temporal consistency" in out
    assert figures["frame_pairs"] == 3
    assert 0 <= figures["temporal_consistency"] <= 100
    assert set(figures["boundary_iou"]) == set(figures["iou"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scales", "0"], "scales holds 0"),
        (["--stride", "8", "8"], "no window"),
        (["--window", "8", "8", "--stride", "9", "9"], "left out between"),
        (["--split", "vall"], "choose one of train, held_out, val, test"),
        (["--predictions", "x", "--flip"], "as they are"),
        (["--predictions", "x", "--exit", "1"], "as they are"),
        (["--predictions", "x", "--tile", "8", "8"], "as they are"),
        (["--tile", "8", "8"], "--tile: "),
        (["--predictions", "nowhere"], "nowhere is missing"),
        (["data.args.root=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_no_figure(evaluate, arguments, said):
    status, out, err, figures = evaluate(*arguments)
    assert status == 2
    assert said in err
    assert err.strip().count("\n") == 0
    assert figures is None
    assert "mIoU" not in out


def test_predictions_of_another_split_give_no_figure(evaluate, tmp_path):
    folder = tmp_path / "predictions"
    evaluate("--split", "test", "--save", folder)
    status, out, err, figures = evaluate("--split", "val", "--predictions", folder)
    assert (status, figures) == (2, None)
    assert "is of no image of the split" in err
    assert "mIoU" not in out
    status, _, err, _ = evaluate("--split", "test", "--save", folder)
    assert status == 2
    assert "no empty folder" in err


def test_a_split_without_labels_is_predicted_and_saved_and_has_no_figure(evaluate, tmp_path):
    """As the test splits of Cityscapes are: everything is void."""
    write_layout("camvid", tmp_path / "data", 8, size=(72, 96))
    for path in (tmp_path / "data" / "testannot").glob("*.png"):
        Image.new("L", (96, 72), 11).save(path)
    given = ["--split", "test", f"data.args.root={tmp_path / 'data'}"]
    status, out, _, figures = evaluate(*given, "--save", tmp_path / "predictions")
    assert (status, figures["miou"]) == (0, None)
    assert "nothing to score" in out
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 2
    status, _, err, figures = evaluate(*given)
    assert (status, figures) == (2, None)
    assert "no pixel was counted" in err


def test_single_images_have_no_temporal_consistency(evaluate, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("camvid", "shapes"))
    status, _, err, _ = evaluate("--consistency", "--predictions", tmp_path, run_folder=recipe)
    assert status == 2
    assert "holds single images" in err
