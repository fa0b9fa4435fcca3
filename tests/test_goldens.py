"""Goldens: the losses of the first steps, the final mIoU and the exact MACs of two short runs on drawn scenes, CPU.

A refactor leaves them as they are; a change of computation shows what it changed. `make goldens` writes them anew.
"""

import json
from pathlib import Path

import pytest

from dance_seg.build import train
from dance_seg.recipe import load_recipe
from dance_seg.tracking import read_metrics
from datamodules import build_datamodule

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "goldens"
SHORT = (
    "data.args.num_train=32",
    "data.args.num_val=6",
    "data.args.size=[96,128]",
    "data.args.crop=[96,128]",
    "data.args.batch_size=4",
    "data.args.statistics_images=8",
    "trainer.max_epochs=4",
    "trainer.log_every=1",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
    "trainer.validate_every=4",
    "tracking.wandb=disabled",
)


@pytest.mark.parametrize("name", ["shapes_dense", "shapes_data_slimming"])
def test_a_short_run_gives_the_golden_figures(name, tmp_path, request):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [*SHORT, f"data.args.cache_dir={tmp_path / 'cache'}"])
    folder = train(recipe, build_datamodule(recipe), tmp_path / "run")
    rows = read_metrics(folder / "metrics.jsonl")
    spent = json.loads((folder / "cost.json").read_text())
    found = {
        "losses": [row["train/loss"] for row in rows if "train/loss" in row][:20],
        "miou": [row["val/miou"] for row in rows if "val/miou" in row][-1],
        "train_gmacs": spent["training"]["cost/train_gmacs"],
        "pixels": spent["training"]["cost/pixels"],
        "images_dropped": spent["training"]["cost/images_dropped"],
        "inference_gmacs": spent["inference"]["gmacs"],
    }
    path = FOLDER / f"{name}.json"
    if request.config.getoption("--rewrite-goldens"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
        return
    golden = json.loads(path.read_text())
    assert len(found["losses"]) == len(golden["losses"]) == 20
    # Processors round differently, and training magnifies it: another one's losses were 1e-7 apart at the third step,
    # 4e-3 at the ninth and 9e-3 at the last; with data slimming a third one's were 2e-3 apart at the fourth and 7e-3 at
    # the eighth. A change of what is computed shows in the first steps.
    assert found["losses"][:3] == pytest.approx(golden["losses"][:3], rel=1e-3)
    assert found["losses"][3:8] == pytest.approx(golden["losses"][3:8], rel=2e-2)
    assert found["losses"][8:] == pytest.approx(golden["losses"][8:], rel=5e-2)
    assert found["miou"] == pytest.approx(golden["miou"], abs=2.0)  # of six small images
    for key in ("train_gmacs", "pixels", "images_dropped", "inference_gmacs"):
        assert found[key] == golden[key], key
