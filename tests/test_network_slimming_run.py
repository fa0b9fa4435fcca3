"""A whole run that slims its network: the cuts that were planned, what they cost and leave, and what a reader gets."""

import json

import pytest
import torch

from dance_seg.build import load_model, load_run, train
from dance_seg.checkpoint import load_checkpoint, save_checkpoint
from dance_seg.cost.macs import count_macs, count_training_macs
from dance_seg.errors import CheckpointError
from dance_seg.inference import evaluate
from dance_seg.losses import per_sample_loss
from dance_seg.module import SegmentationModule
from dance_seg.report.run_page import write_report
from dance_seg.tracking import read_metrics
from datamodules import build_datamodule
from tests.tiny import tiny

CUTS = (
    "trainer.max_epochs=5",
    "network_slimming.start=0.2",
    "network_slimming.end=0.6",
    "network_slimming.cuts=2",
    "network_slimming.sparsity=0.001",
)


@pytest.fixture(scope="module")
def slimmed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slimmed")
    recipe = tiny(*CUTS, slim=True, cache=folder / "cache")
    datamodule = build_datamodule(recipe)
    return recipe, datamodule, train(recipe, datamodule, folder / "run")


def cuts_of(folder):
    return json.loads((folder / "widths.json").read_text())["cuts"]


def test_the_cuts_are_those_planned_and_reach_the_share_from_below(slimmed):
    _, _, folder = slimmed
    first, second = cuts_of(folder)
    assert (first["epoch"], second["epoch"]) == (1, 3)
    assert 0.5 < first["macs"] <= 0.5625  # 1 - 0.5 x (1 - (1 - 1/2)^3)
    assert 0.45 < second["macs"] <= 0.5
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "slim/macs" in row]
    assert [(row["epoch"], row["slim/macs"]) for row in rows] == [
        (cut["epoch"], cut["macs"]) for cut in cuts_of(folder)
    ]


def test_the_checkpoint_holds_the_smaller_network_and_scores_as_logged(slimmed):
    _, datamodule, folder = slimmed
    model, _, _ = load_run(folder, "last")
    inference = json.loads((folder / "cost.json").read_text())["inference"]
    assert sum(parameter.numel() for parameter in model.parameters()) == cuts_of(folder)[-1]["parameters"]
    assert count_macs(model, datamodule.crop).macs / 1e9 == inference["gmacs"]
    logged = [row["val/miou"] for row in read_metrics(folder / "metrics.jsonl") if "val/miou" in row][-1]
    assert evaluate(model, datamodule, "val").miou == pytest.approx(logged, abs=1e-9)


def test_steps_after_a_cut_are_charged_at_the_width_they_had(slimmed):
    _, datamodule, folder = slimmed
    spent = json.loads((folder / "cost.json").read_text())["training"]
    final, _, _ = load_run(folder, "last")
    large = datamodule.batches.sizes[-1]
    # The last two epochs are those of the final network; all of them at its price would be too little.
    paid = sum(epoch.pixels for epoch in datamodule.schedule) / (large[0] * large[1])
    assert spent["cost/forward_gmacs"] > 1.1 * paid * count_training_macs(final, large).forward_macs / 1e9
    assert spent["cost/cuts_seconds"] > 0
    assert spent["cost/cuts_gmacs"] > 0


def test_the_penalty_ends_with_the_last_cut_and_is_no_part_of_the_logged_loss(tmp_path):
    """With a weight this large the penalty would be most of a loss that held it."""
    strong = tiny(*CUTS, "network_slimming.sparsity=10.0", cache=tmp_path / "cache")
    folder = train(strong, build_datamodule(strong), tmp_path / "run")
    losses = [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]
    assert max(losses) < 20


@pytest.mark.parametrize("importance", [pytest.param("bn_scale", marks=pytest.mark.slow), "taylor"])
def test_masks_that_settle_or_the_end_of_the_window_cut_once(importance, tmp_path, monkeypatch):
    passed = []
    passes = SegmentationModule._backward_passes
    monkeypatch.setattr(
        SegmentationModule, "_backward_passes", lambda self, labelled: passes(self, counted(passed, labelled))
    )
    recipe = tiny(
        *CUTS, "network_slimming.schedule=mask_distance", "trainer.validate_every=5",
        f"network_slimming.importance={importance}", cache=tmp_path / "cache",
    )  # fmt: skip
    folder = train(recipe, build_datamodule(recipe), tmp_path / "run")
    (cut,) = cuts_of(folder)
    assert cut["epoch"] == 3  # five masks cannot settle before the window ends at 0.6 of 5 epochs
    assert 0.45 < cut["macs"] <= 0.5
    checkpoint = load_checkpoint(next((folder / "checkpoints").glob("step-*.ckpt")))
    assert len(checkpoint["callbacks"]["NetworkCuts"]["masks"]) == 3  # of the epochs in the window before the cut
    assert len(passed) == (4 * 4 if importance == "taylor" else 0)  # four images for each mask, and for the cut


def counted(seen, batches):
    """The same batches, each put on a list."""
    for batch in batches:
        seen.append(batch)
        yield batch


@pytest.mark.slow
def test_taylor_scores_on_labelled_images_and_charges_them(tmp_path):
    recipe = tiny(*CUTS, "network_slimming.importance=taylor", "trainer.validate_every=5", cache=tmp_path / "cache")
    folder = train(recipe, build_datamodule(recipe), tmp_path / "run")
    assert len(cuts_of(folder)) == 2
    plain = tiny(*CUTS, "network_slimming.importance=magnitude", "trainer.validate_every=5", cache=tmp_path / "cache")
    other = train(plain, build_datamodule(plain), tmp_path / "other")
    charged = [json.loads((f / "cost.json").read_text())["training"]["cost/cuts_gmacs"] for f in (folder, other)]
    assert charged[0] > 2 * charged[1]  # backward passes beside the images for statistics


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_taylor_takes_its_gradients_as_training_does(precision, tmp_path, monkeypatch):
    of_gradients = []

    def seen(logits, labels, options):
        if len(logits) == 1:  # training has two images a step
            of_gradients.append(logits.dtype)
        return per_sample_loss(logits, labels, options)

    monkeypatch.setattr("dance_seg.module.per_sample_loss", seen)
    recipe = tiny(
        *CUTS, "network_slimming.importance=taylor", "network_slimming.end=0.3", "network_slimming.cuts=1",
        "trainer.max_epochs=2", f"trainer.precision={precision}", cache=tmp_path / "cache",
    )  # fmt: skip
    train(recipe, build_datamodule(recipe), tmp_path / "run")
    assert set(of_gradients) == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}


def test_the_report_shows_the_cuts_and_what_each_layer_kept(slimmed):
    _, _, folder = slimmed
    page = write_report(folder).read_text()
    for said in ("Network slimming", "Channels of each layer", "cut before", "What was kept where", "epoch 3"):
        assert said in page


def test_a_share_that_cannot_be_reached_is_refused_before_training(tmp_path):
    recipe = tiny(*CUTS, "network_slimming.keep=0.001", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"network_slimming.keep is 0.001 of macs: this network can be cut to 0\.\d+"):
        train(recipe, build_datamodule(recipe), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


def test_a_record_that_does_not_fit_its_tensors_is_refused_with_the_layer(slimmed, tmp_path):
    _, _, folder = slimmed
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    name = "network.encoder.layer1.0.conv1.weight"
    checkpoint["structure"]["shapes"][name][0] -= 8
    save_checkpoint(checkpoint, tmp_path / "narrow.ckpt")
    with pytest.raises(CheckpointError, match="do not fit its recipe"):
        load_model(tmp_path / "narrow.ckpt")
    checkpoint["structure"]["shapes"][name][0] = 10_000
    save_checkpoint(checkpoint, tmp_path / "wide.ckpt")
    with pytest.raises(CheckpointError, match=name):
        load_model(tmp_path / "wide.ckpt")
