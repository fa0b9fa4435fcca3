"""The benchmark of BasisNet's recipe: each run lacks what its name says and nothing else, and it runs."""

import json
import sys
from pathlib import Path

from dance_seg.recipe import load_recipe, recipe_record
from tests.tools.test_search import write_run
from tools.bench import basisnet
from tools.bench.four_rows import Row

PARTS = {
    "nothing": set(),
    "augmentation": {"data.args.color", "data.args.flip", "data.args.random_scale"},
    "distillation": {"soft_labels"},
    "averaged_weights": {"trainer.ema"},
    "schedule": {"optimizer.schedule"},
}


def differing(one, other, at=""):
    """The keys whose values differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return set() if one == other else {at.rstrip(".")}
    return {
        key for name in one.keys() | other.keys() for key in differing(one.get(name), other.get(name), f"{at}{name}.")
    }


def test_every_run_lacks_what_its_name_says_and_nothing_else(tmp_path, monkeypatch):
    asked = {}
    run = write_run(tmp_path, "multi_stage_supernet")

    def trained(name, path, seed, overrides, runs):
        """Every run is the same small network; what it was to be is kept."""
        asked[name] = recipe_record(load_recipe(path, [*overrides, f"seed={seed}", "name=run"]))
        return Row(run, 0.0, 0.0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(basisnet, "trained", trained)
    begun = {"encoder_name": "resnet34", "preview_encoder": "resnet18"}  # as it would be with weights that are fetched
    monkeypatch.setattr(basisnet, "pretrained", lambda given: [f"model.args.{key}={begun[key]}" for key in begun])
    monkeypatch.setattr(basisnet, "SCORED_ON", ("data.args.num_test=1",))
    (tmp_path / "recipes").symlink_to(Path(basisnet.__file__).parents[2] / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["basisnet", "--seeds", "3", "--runs", str(tmp_path / "runs")])
    assert basisnet.main() == 0

    for model in basisnet.MODELS:
        whole = asked[f"{model}_without_nothing"]
        for part, keys in PARTS.items():
            assert differing(whole, asked[f"{model}_without_{part}"]) == keys
    for part in PARTS:
        mixed, plain = (asked[f"{model}_without_{part}"] for model in basisnet.MODELS)
        assert differing(mixed, plain) == {"model.name", "model.args.bases", "model.args.preview_encoder", "early_exit"}
        assert mixed["model"]["args"]["encoder_name"] == "resnet34"
    assert asked["basisnet_without_nothing"]["soft_labels"]["teacher"]
    assert all(recipe["seed"] == 3 for recipe in asked.values())

    written = json.loads(Path("runs/bench/basisnet.json").read_text())["ratios"]
    assert len(written) == 2 * 4 + 5
    assert all(value == {"median": 0.0, "min": 0.0, "max": 0.0} for value in written.values())  # of one network
