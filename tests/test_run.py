"""A whole run: what it leaves behind, that its figures agree, and that a failing part harms nothing."""

import json
import signal
import warnings

import numpy as np
import pytest
import torch

from dance_seg.build import build_trainer, load_model, load_run, train
from dance_seg.checkpoint import load_checkpoint
from dance_seg.cost.macs import count_macs, count_training_macs
from dance_seg.data_slimming.complexity import quantiles
from dance_seg.errors import CheckpointError
from dance_seg.heartbeat import Heartbeat
from dance_seg.inference import evaluate
from dance_seg.tracking import read_metrics
from datamodules import build_datamodule
from tests.tiny import tiny


@pytest.fixture(scope="module")
def slimmed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slimmed")
    recipe = tiny("trainer.max_epochs=5", "data_slimming.drop_rate=0.9", slim=True, cache=folder / "cache")
    datamodule = build_datamodule(recipe)
    return recipe, datamodule, train(recipe, datamodule, folder / "run")


def test_the_run_folder_holds_what_readers_expect(slimmed):
    _, _, folder = slimmed
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "cost.json", "plan.json", "checkpoints/best.ckpt"):
        assert (folder / name).is_file(), name
    assert "finished" in json.loads((folder / "run.json").read_text())
    assert len(list((folder / "pictures").glob("*_prediction.png"))) == 3


@pytest.mark.parametrize(
    ("precision", "known", "warned"),
    [("bf16-mixed", False, True), ("bf16-mixed", True, False), ("bf16-mixed", None, False), ("32-true", False, False)],
)
def test_bfloat16_on_a_processor_that_lacks_it_is_said_to_be_slow(precision, known, warned, tmp_path, monkeypatch):
    monkeypatch.setattr("dance_seg.build.has_bfloat16", lambda: known)
    recipe = tiny(f"trainer.precision={precision}", cache=tmp_path / "cache")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_trainer(recipe, build_datamodule(recipe), tmp_path, Heartbeat(tmp_path, ranks=1, patience_seconds=60))
    said = [str(one.message) for one in caught if "bfloat16" in str(one.message)]
    assert len(said) == warned
    assert all("trainer.precision=32-true" in one for one in said)


def test_a_signal_does_after_training_what_it_did_before(slimmed):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_ledger_is_what_the_plan_said(slimmed):
    _, datamodule, folder = slimmed
    spent = json.loads((folder / "cost.json").read_text())["training"]
    schedule = datamodule.schedule
    assert spent["cost/pixels"] == sum(epoch.pixels for epoch in schedule)
    assert spent["cost/images_paid"] == sum(epoch.images_paid for epoch in schedule)
    assert spent["cost/images_dropped"] == sum(epoch.images_dropped for epoch in schedule) > 0
    assert spent["cost/images_offered"] == 14 * 5
    assert spent["cost/steps"] == sum(epoch.steps for epoch in schedule)


def test_macs_are_charged_at_the_size_each_batch_had(slimmed):
    _, datamodule, folder = slimmed
    model, _, _ = load_run(folder)
    each = [count_training_macs(model, size) for size in datamodule.batches.sizes]
    paid = np.array([epoch.images_per_scale for epoch in datamodule.schedule]).sum(axis=0)
    spent = json.loads((folder / "cost.json").read_text())["training"]
    forward = sum(int(count) * cost.forward_macs for count, cost in zip(paid, each, strict=True))
    backward = sum(int(count) * cost.backward_macs for count, cost in zip(paid, each, strict=True))
    assert spent["cost/forward_gmacs"] * 1e9 == pytest.approx(forward)
    assert spent["cost/backward_gmacs"] * 1e9 == pytest.approx(backward)


def test_the_best_checkpoint_is_chosen_in_the_tail_and_scores_as_logged(slimmed):
    _, datamodule, folder = slimmed
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "val/miou" in row]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    may = [row["val/miou"] for row in rows if row["epoch"] + 1 >= 0.8 * 5]
    checkpoint = load_checkpoint(folder / "checkpoints" / "best.ckpt")
    assert checkpoint["callbacks"]["Checkpoints"]["best_miou"] == pytest.approx(max(may), abs=1e-5)
    model, _, path = load_run(folder, "best")
    assert path.name == "best.ckpt"
    assert evaluate(model, datamodule, "val").miou == pytest.approx(max(may), abs=1e-9)


def test_the_checkpoint_holds_recipe_labels_and_quantile_table(slimmed):
    recipe, datamodule, folder = slimmed
    record = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["dance_seg"]
    assert record["recipe"]["data"]["name"] == recipe.data.name
    assert record["labels"]["classes"] == list(datamodule.classes)
    table = np.array(record["complexity"])
    assert (np.diff(table) >= 0).all()
    assert np.allclose(np.sort(quantiles(datamodule.table.values)), quantiles(table))


def test_the_log_says_what_each_epoch_planned(slimmed):
    _, datamodule, folder = slimmed
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "plan/images_dropped" in row]
    assert [row["plan/images_dropped"] for row in rows] == [epoch.images_dropped for epoch in datamodule.schedule]


def test_two_runs_of_one_seed_are_alike_and_the_loss_falls(slimmed, tmp_path):
    recipe, _, folder = slimmed
    again = train(recipe, build_datamodule(recipe), tmp_path / "again")
    losses = [
        [row["train/loss"] for row in read_metrics(f / "metrics.jsonl") if "train/loss" in row] for f in (folder, again)
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_a_checkpoint_of_something_else_is_refused(slimmed, tmp_path):
    from dance_seg.checkpoint import save_checkpoint

    save_checkpoint({"global_step": 1, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="no dance_seg record"):
        load_model(tmp_path / "a.ckpt")
    good = load_checkpoint(slimmed[2] / "checkpoints" / "best.ckpt")
    del good["state_dict"][next(key for key in good["state_dict"] if key.endswith("weight"))]
    save_checkpoint(good, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="do not fit its recipe"):
        load_model(tmp_path / "b.ckpt")


def test_a_run_whose_tracker_fails_at_every_call_ends_well(tmp_path, monkeypatch):
    import dance_seg.tracking as tracking

    monkeypatch.delenv("WANDB_MODE", raising=False)

    def fail(*args, **kwargs):
        raise RuntimeError("no tracker today")

    monkeypatch.setattr("wandb.init", fail)
    recipe = tiny("trainer.max_epochs=1", "tracking.wandb=offline", cache=tmp_path / "cache")
    with pytest.warns(UserWarning, match="no tracker today"):
        folder = train(recipe, build_datamodule(recipe), tmp_path / "run")
    assert [row for row in tracking.read_metrics(folder / "metrics.jsonl") if "val/miou" in row]


def test_a_run_at_adaptive_resolution_charges_inference_by_the_sizes_that_images_have(tmp_path):
    recipe = tiny("data_slimming.inference=adaptive", "trainer.max_epochs=2", slim=True, cache=tmp_path / "cache")
    data = build_datamodule(recipe)
    folder = train(recipe, data, tmp_path / "run")
    inference = json.loads((folder / "cost.json").read_text())["inference"]
    model = load_run(folder, "last")[0]
    shares = data.inference_sizes("val")
    assert len(shares) == 2
    expected = sum(share * count_macs(model, size).macs for size, share in shares.items()) / 1e9
    assert inference["gmacs"] == pytest.approx(expected)
    assert inference["input_size"] == [64, 64]
    assert inference["sizes"] == [[*size, share] for size, share in shares.items()]
