"""The loss of each image is kept at no cost to a step, on any number of ranks, through a broken epoch."""

import json
from types import SimpleNamespace

import pytest
import torch

import dance_seg.callbacks.image_losses as module
from dance_seg.build import train
from dance_seg.callbacks import ImageLosses
from dance_seg.report.runs import read_run
from dance_seg.sample import Batch
from datamodules import build_datamodule
from tests.distributed.test_two_processes import on_ranks
from tests.tiny import tiny


def step(callback: ImageLosses, epoch: int, **losses: float) -> None:
    """A training step in which each named image had a loss."""
    trainer = SimpleNamespace(current_epoch=epoch, is_global_zero=True)
    callback.on_train_epoch_start(trainer, None)
    names = tuple(name.split("__")[0] for name in losses)
    batch = Batch(torch.zeros(len(names), 3, 2, 2), torch.zeros(len(names), 2, 2), torch.ones(len(names)), names)
    pl_module = SimpleNamespace(last_losses=torch.tensor(list(losses.values())))
    callback.on_train_batch_end(trainer, pl_module, None, batch, 0)


def written(callback: ImageLosses, epoch: int) -> dict:
    callback.on_train_epoch_end(SimpleNamespace(current_epoch=epoch, is_global_zero=True), None)
    return json.loads((callback.folder / "image_losses.json").read_text())


def test_the_mean_of_each_image_over_the_epoch_is_written(tmp_path):
    callback = ImageLosses(tmp_path)
    step(callback, 0, b=1.0, a=3.0)
    step(callback, 0, c=0.5, b=2.0)  # b comes twice: carried over from the epoch before
    assert written(callback, 0) == {"epoch": 0, "names": ["a", "b", "c"], "losses": [3.0, 1.5, 0.5]}


def test_an_epoch_forgets_the_one_before(tmp_path):
    callback = ImageLosses(tmp_path)
    step(callback, 0, a=1.0, b=1.0)
    written(callback, 0)
    step(callback, 1, a=5.0)  # b was dropped
    assert written(callback, 1) == {"epoch": 1, "names": ["a"], "losses": [5.0]}


def test_a_loss_that_is_not_finite_counts_for_nothing(tmp_path):
    callback = ImageLosses(tmp_path)
    step(callback, 0, a=float("nan"), b=2.0)
    step(callback, 0, a=1.0, c=float("inf"))
    assert written(callback, 0) == {"epoch": 0, "names": ["a", "b"], "losses": [1.0, 2.0]}


def test_a_broken_epoch_goes_on_where_it_was(tmp_path):
    callback = ImageLosses(tmp_path)
    step(callback, 2, a=1.0, b=1.0)
    state = json.loads(json.dumps(callback.state_dict()))
    resumed = ImageLosses(tmp_path)
    resumed.load_state_dict(state)
    step(resumed, 2, a=3.0, c=4.0)
    assert written(resumed, 2) == {"epoch": 2, "names": ["a", "b", "c"], "losses": [2.0, 1.0, 4.0]}


def test_asking_for_the_state_changes_nothing(tmp_path):
    callback = ImageLosses(tmp_path)
    step(callback, 0, a=1.0)
    assert callback.state_dict() == callback.state_dict()
    step(callback, 0, b=2.0)
    assert written(callback, 0)["losses"] == [1.0, 2.0]


def test_the_losses_of_all_ranks_are_written_once(tmp_path, monkeypatch):
    ranks = [ImageLosses(tmp_path), ImageLosses(tmp_path)]
    step(ranks[0], 0, a=1.0, b=2.0)
    step(ranks[1], 0, c=3.0, b=4.0)
    for one in ranks:
        one._collect()
    monkeypatch.setattr(module, "gather", lambda value: [one._sums for one in ranks])
    assert written(ranks[0], 0) == {"epoch": 0, "names": ["a", "b", "c"], "losses": [1.0, 3.0, 3.0]}
    state = ranks[0].state_dict()
    # Resumed, rank 0 goes on with all of it and the other begins with nothing.
    for rank, one in enumerate(ranks):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        one.load_state_dict(state)
    assert [one._sums for one in ranks] == [{"a": (1.0, 1), "b": (6.0, 2), "c": (3.0, 1)}, {}]


def test_another_rank_writes_nothing(tmp_path):
    callback = ImageLosses(tmp_path)
    step(callback, 0, a=1.0)
    callback.on_train_epoch_end(SimpleNamespace(current_epoch=0, is_global_zero=False), None)
    assert not list(tmp_path.iterdir())


def test_a_module_without_losses_of_images_has_none(tmp_path):
    callback = ImageLosses(tmp_path)
    trainer = SimpleNamespace(current_epoch=0, is_global_zero=True)
    callback.on_train_batch_end(trainer, SimpleNamespace(), None, None, 0)
    callback.on_train_epoch_end(trainer, None)
    assert not list(tmp_path.iterdir())


def test_a_whole_run_knows_the_loss_of_its_images_by_the_names_that_were_scored(tmp_path):
    recipe = tiny("trainer.max_epochs=1", "data_slimming.drop_rate=0.0", slim=True, cache=tmp_path / "cache")
    datamodule = build_datamodule(recipe)
    run = read_run(train(recipe, datamodule, tmp_path / "run"))
    assert run.image_losses is not None
    assert run.image_losses.epoch == 1
    assert run.image_losses.by_name.keys() <= set(run.plan.names) == set(datamodule.source("train").names)
    (epoch,) = datamodule.schedule
    assert len(run.image_losses.by_name) == epoch.images_paid == 12  # of 14 images in batches of 4, 2 are carried out
    # What was logged is the mean of each batch over images that weigh differently: of the same order, not the same.
    logged = [row["train/loss"] for row in run.rows if "train/loss" in row]
    losses = run.image_losses.by_name.values()
    assert min(losses) < sum(logged) / len(logged) < max(losses)


def _keep_on_a_rank(rank, ranks, folder):
    callback = ImageLosses(folder)
    step(callback, 0, **{f"mine{rank}": 1.0 + rank, "both": float(rank)})
    resumed = ImageLosses(folder)
    resumed.load_state_dict(callback.state_dict())
    step(resumed, 0, **{f"later{rank}": 5.0})
    resumed.on_train_epoch_end(SimpleNamespace(current_epoch=0, is_global_zero=rank == 0), None)


@pytest.mark.ddp
def test_two_processes_write_what_both_have_seen_before_and_after_they_were_resumed(tmp_path):
    on_ranks(_keep_on_a_rank, 2, tmp_path)
    assert json.loads((tmp_path / "image_losses.json").read_text()) == {
        "epoch": 0,
        "names": ["both", "later0", "later1", "mine0", "mine1"],
        "losses": [0.5, 5.0, 5.0, 1.0, 2.0],
    }
