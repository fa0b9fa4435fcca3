"""Scenarios 16 and 17: NaN and infinity are found within the step, passed over by all ranks, and never saved."""

import json

import pytest
import torch
from pytorch_lightning import Callback

import dance_seg.build as build
from dance_seg.build import train
from dance_seg.callbacks import FiniteSteps
from dance_seg.checkpoint import load_checkpoint, newest_valid
from dance_seg.errors import NotFiniteError
from dance_seg.metrics_file import read_metrics
from dance_seg.sample import IGNORE
from datamodules import build_datamodule
from datamodules.base import SegmentationDataModule
from tests.distributed.test_two_processes import on_ranks
from tests.durability.small import METHODS, small

BAD = float("nan")


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "cache"


class Fault(Callback):
    """Spoils one place at some steps, as a broken file, layer or device would."""

    def __init__(self, where, steps=(2,)):
        self.where, self.steps = where, steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step not in self.steps:
            return
        if self.where == "image":
            batch.images[0, 0, 0, 0] = float("inf")
        if self.where == "weight":
            next(iter(pl_module.model.parameters())).data.fill_(BAD)

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step in self.steps and self.where == "logits":
            pl_module.last_losses[0] = BAD

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.steps and self.where == "gradient":
            next(p.grad for p in pl_module.parameters() if p.grad is not None).fill_(BAD)


def run(recipe, folder, monkeypatch, *callbacks, guarded=True):
    """A run with callbacks ahead of its own; without the guard nothing looks at gradients and weights."""
    made = build.build_trainer

    def build_trainer(*arguments):
        trainer = made(*arguments)
        trainer.callbacks[:0] = callbacks
        return trainer

    monkeypatch.setattr(build, "build_trainer", build_trainer)
    if not guarded:
        monkeypatch.setattr(FiniteSteps, "on_before_optimizer_step", lambda *_: None)
        monkeypatch.setattr("dance_seg.callbacks.checkpoints.bad_ones", lambda _: [])
        monkeypatch.setattr("dance_seg.evaluator.refuse_not_finite", lambda _: None)
    return train(recipe, build_datamodule(recipe), folder)


def newest(folder):
    return newest_valid(folder / "checkpoints", "step-*.ckpt")[1]


def is_finite(checkpoint):
    tensors = [*checkpoint["state_dict"].values(), *checkpoint.get("average", {}).get("state_dict", {}).values()]
    return all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("where", ["image", "logits", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_training_goes_on(where, cache, tmp_path, monkeypatch):
    recipe = small("ema", "trainer.accumulate=1", cache=cache)
    with pytest.warns(UserWarning, match=r"step 2: NaN or infinity in .*the step is passed over \(1 in a row"):
        folder = run(recipe, tmp_path / "run", monkeypatch, Fault(where))
    assert is_finite(newest(folder))
    assert newest(folder)["callbacks"]["FiniteSteps"] == {"in_a_row": 0, "passed_over": 1}
    assert load_checkpoint(folder / "checkpoints" / "best.ckpt")["callbacks"]["Checkpoints"]["best_miou"] > 0
    assert all(row["val/miou"] is not None for row in read_metrics(folder / "metrics.jsonl") if "val/miou" in row)


@pytest.mark.parametrize("where", ["image", "gradient"])
def test_without_the_guard_the_same_fault_spoils_the_weights(where, cache, tmp_path, monkeypatch):
    recipe = small("ema", "trainer.accumulate=1", cache=cache)
    folder = run(recipe, tmp_path / "run", monkeypatch, Fault(where), guarded=False)
    assert not is_finite(newest(folder))


def test_the_weights_after_a_bad_step_are_those_before_it(cache, tmp_path, monkeypatch):
    kept = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            tensors = {
                **pl_module.state_dict(),
                **{f"average.{k}": v for k, v in pl_module.average.model.state_dict().items()},
            }
            kept[trainer.global_step] = {name: tensor.clone() for name, tensor in tensors.items()}

    with pytest.warns(UserWarning, match="passed over"):
        run(small("ema", "trainer.accumulate=1", cache=cache), tmp_path / "run", monkeypatch, Fault("image"), Keep())
    differ = [{n for n in kept[2] if not torch.equal(kept[a][n], kept[b][n])} for a, b in ((2, 3), (3, 4))]
    assert not differ[0]  # the statistics of normalisation included
    assert differ[1]


def test_too_many_in_a_row_stop_training_with_a_dump_and_a_restart_goes_on(cache, tmp_path, monkeypatch):
    recipe = small("dense", "trainer.bad_steps=2", cache=cache)
    with pytest.warns(UserWarning, match="at most 2"), pytest.raises(NotFiniteError, match=r"\(3 steps in a row\)"):
        run(recipe, tmp_path / "run", monkeypatch, Fault("image", steps=range(4, 99)))
    seen = json.loads((tmp_path / "run" / "not_finite" / "rank-0.json").read_text())
    assert (seen["epoch"], seen["step"], seen["rank"]) == (1, 6, 0)
    assert seen["not_finite"]["images"] == seen["images"][:1]
    batch = load_checkpoint(tmp_path / "run" / "not_finite" / "rank-0.ckpt")
    assert not batch["images"][0].isfinite().all()
    assert is_finite(newest(tmp_path / "run"))
    monkeypatch.undo()
    train(recipe, build_datamodule(recipe), tmp_path / "run")
    assert newest(tmp_path / "run")["callbacks"]["ExactResume"]["epoch"] == 3


def test_a_weight_that_is_not_finite_stops_training_at_once_and_is_never_saved(cache, tmp_path, monkeypatch):
    recipe = small("dense", "trainer.save_every_minutes=60", cache=cache)
    with pytest.raises(NotFiniteError, match=r"epoch 0, step 2: .*weights \(model.*no step heals"):
        run(recipe, tmp_path / "run", monkeypatch, Fault("weight"))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    recipe = small("dense", cache=cache)

    class AfterTheStep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            next(iter(pl_module.model.parameters())).data.fill_(BAD)

    monkeypatch.undo()
    with pytest.raises(NotFiniteError, match=r"checkpoints: not saved: model\..* holds NaN or infinity after step 1"):
        run(recipe, tmp_path / "other", monkeypatch, AfterTheStep())
    assert not list((tmp_path / "other" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "dance" else pytest.mark.slow) for m in METHODS if m != "ema"]
)
def test_every_method_passes_over_a_bad_step(method, cache, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="passed over"):
        folder = run(small(method, cache=cache), tmp_path / "run", monkeypatch, Fault("image", steps=(3,)))
    assert is_finite(newest(folder))
    assert newest(folder)["callbacks"]["FiniteSteps"]["passed_over"] == 1


class IgnoreAll(Callback):
    """Batches in which nothing is labelled."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps:
            batch.labels.fill_(IGNORE)


def test_a_batch_without_a_labelled_pixel_has_loss_zero_and_moves_nothing(cache, tmp_path, monkeypatch):
    kept = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            kept[trainer.global_step] = [p.detach().clone() for p in pl_module.parameters()]

    folder = run(small(cache=cache), tmp_path / "run", monkeypatch, IgnoreAll((2,)), Keep())
    rows = {row["step"]: row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row}
    assert rows[2] == 0.0
    assert all(map(torch.equal, kept[2], kept[3]))  # momentum alone would move them
    assert newest(folder)["callbacks"]["FiniteSteps"]["passed_over"] == 0


def test_without_the_guard_momentum_moves_weights_on_a_batch_without_labels(cache, tmp_path, monkeypatch):
    kept = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            kept[trainer.global_step] = [p.detach().clone() for p in pl_module.parameters()]

    run(small(cache=cache), tmp_path / "run", monkeypatch, IgnoreAll((2,)), Keep(), guarded=False)
    assert not all(map(torch.equal, kept[2], kept[3]))


def _one_bad_rank(rank, ranks, folder):
    """Rank 1's own gradient is NaN, not averaged as by DDP: only an agreement tells rank 0 of it."""
    from types import SimpleNamespace

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    guard, trainer = FiniteSteps(at_most=1), SimpleNamespace(current_epoch=0, global_step=7, global_rank=rank)
    module = SimpleNamespace(
        parameters=model.parameters, buffers=model.buffers, named_parameters=model.named_parameters,
        zero_grad=model.zero_grad, last_losses=torch.ones(2),
    )  # fmt: skip
    for number in range(2):
        guard.on_train_batch_start(trainer, module, None, number)
        loss = model(torch.ones(2, 3)).mean()
        optimizer.zero_grad()
        loss.backward()
        if rank == 1:
            model.weight.grad.fill_(BAD)
        guard.on_before_backward(trainer, module, loss)
        try:
            guard.on_before_optimizer_step(trainer, module, optimizer)
        except NotFiniteError as error:
            (folder / f"said-{rank}").write_text(str(error))
        optimizer.step()
    torch.save(model.state_dict(), folder / f"weights-{rank}.pt")


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:epoch 0, step 7")
def test_a_rank_that_is_bad_makes_all_ranks_pass_over_and_stop_together(tmp_path):
    on_ranks(_one_bad_rank, 2, tmp_path)
    torch.manual_seed(0)
    untouched = torch.nn.Linear(3, 1).state_dict()
    for rank in range(2):
        weights = torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True)
        assert all(torch.equal(weights[name], untouched[name]) for name in untouched)
        assert "on rank 1, gradients (weight)" in (tmp_path / f"said-{rank}").read_text()


def test_the_guard_leaves_a_good_run_as_it_was(cache, tmp_path, monkeypatch):
    guarded = run(small("ema", cache=cache), tmp_path / "guarded", monkeypatch)
    bare = run(small("ema", cache=cache), tmp_path / "bare", monkeypatch, guarded=False)
    one, two = newest(guarded)["state_dict"], newest(bare)["state_dict"]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_evaluation_mode_is_told_of_nan_logits():
    from dance_seg.evaluator import refuse_not_finite

    with pytest.raises(ValueError, match="1 of 4 logits are NaN"):
        refuse_not_finite(torch.tensor([1.0, BAD, 2.0, 3.0]))


def test_the_data_module_normalises_bytes_so_no_file_makes_a_bad_image():
    images = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    from dance_seg.sample import Batch

    data = SegmentationDataModule(crop=(32, 32))
    batch = data.on_after_batch_transfer(
        Batch(images, torch.zeros(1, 4, 4, dtype=torch.uint8), torch.ones(1), ("a",)), 0
    )
    assert batch.images.isfinite().all()
