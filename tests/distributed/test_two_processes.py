"""Two processes are one: gradients, metrics and batches do not depend on how many ranks share the work (gloo, CPU)."""

import copy
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.callbacks import ReestimatedStatistics
from dance_seg.checkpoint import newest_valid
from dance_seg.cost.macs import count_training_macs
from dance_seg.distributed import sum_over_ranks
from dance_seg.early_exit.exits import Outputs
from dance_seg.losses import per_sample_cross_entropy, weighted_mean
from dance_seg.metrics import ConfusionMatrix
from dance_seg.models.basisnet import variation
from dance_seg.models.multi_stage import MultiStageSupernet
from dance_seg.models.vit_resnas import VitResNas
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.network_slimming.structure import structure_hash
from dance_seg.recipe import save_recipe
from dance_seg.supernet.learning import losses_of_subnets
from dance_seg.supernet.sampling import Sampling, subnets_of_step
from tests.tiny import tiny
from tools.chaos import LOADED

pytestmark = pytest.mark.ddp
ROOT = Path(__file__).parent.parent.parent


def on_ranks(function, ranks, folder, *arguments):
    """Run function(rank, ranks, folder, ...) in `ranks` processes joined by gloo; a hang ends after a minute.

    They are forked from a process that has torch loaded, which costs a second where a new one costs ten.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    store = folder / f"store-{function.__name__}-{ranks}"
    processes = [
        context.Process(target=_enter, args=(function, rank, ranks, folder, store, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=90)
        if process.is_alive():
            process.kill()
            pytest.fail("a rank hung")
    assert [process.exitcode for process in processes] == [0] * ranks


def _enter(function, rank, ranks, folder, store, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    function(rank, ranks, folder, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def joined_batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 4, (6, 16, 16), generator=generator)
    labels[1] = 255  # an image with nothing to learn
    labels[4, :8] = 255
    weights = torch.tensor([0.5, 1.5, 2.0, 0.25, 1.0, 0.75])
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))  # no batch statistics
    return model, images, labels, weights


def gradient(model, images, labels, weights):
    weighted_mean(per_sample_cross_entropy(model(images), labels), weights).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def _gradient_of_a_rank(rank, ranks, folder):
    model, images, labels, weights = joined_batch()
    mine = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    found = gradient(DistributedDataParallel(model), images[mine], labels[mine], weights[mine])
    torch.save(found, folder / f"gradient-{rank}.pt")


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_gradient_of_several_ranks_is_that_of_the_joined_batch_with_unequal_weights(ranks, tmp_path):
    on_ranks(_gradient_of_a_rank, ranks, tmp_path)
    expected = gradient(*joined_batch())
    for rank in range(ranks):
        for mine, whole in zip(torch.load(tmp_path / f"gradient-{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-7)


def predictions_and_labels():
    generator = np.random.default_rng(0)
    return (
        generator.integers(0, 5, (101, 8, 8)).astype(np.uint8),
        generator.choice([0, 1, 2, 3, 4, 255], (101, 8, 8)).astype(np.uint8),
    )


def _score_a_share(rank, ranks, folder):
    predictions, labels = predictions_and_labels()
    metric = ConfusionMatrix(5)
    mine = range(rank, 101, ranks)  # as evaluation_loader shares the images
    for index in mine:
        metric.update(torch.as_tensor(predictions[index]), torch.as_tensor(labels[index]))
    scores = metric.compute()
    torch.save((len(mine), scores.miou, list(scores.iou)), folder / f"scores-{ranks}-{rank}.pt")


@pytest.mark.parametrize("ranks", [2, 3])
def test_101_images_are_counted_once_on_any_number_of_ranks(ranks, tmp_path):
    on_ranks(_score_a_share, ranks, tmp_path)
    predictions, labels = predictions_and_labels()
    alone = ConfusionMatrix(5)
    alone.update(torch.as_tensor(predictions), torch.as_tensor(labels))
    expected = alone.compute()
    found = [torch.load(tmp_path / f"scores-{ranks}-{rank}.pt") for rank in range(ranks)]
    assert sum(count for count, _, _ in found) == 101
    for _, miou, iou in found:
        assert miou == expected.miou
        assert iou == list(expected.iou)


def test_a_run_on_two_ranks_drops_images_validates_unevenly_and_takes_the_planned_steps(tmp_path):
    """3 validation images on 2 ranks: one rank has two, the other one; an image more or less must not hang it."""
    recipe = tiny("trainer.devices=2", "data_slimming.drop_rate=1.0", slim=True, cache=tmp_path / "cache")
    save_recipe(recipe, tmp_path / "two.yaml")
    save_recipe(tiny("data_slimming.drop_rate=1.0", slim=True, cache=tmp_path / "cache"), tmp_path / "one.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("one", "two"):
        command = [sys.executable, "-m", "tools.train", str(tmp_path / f"{name}.yaml"), f"name={name}"]
        done = subprocess.run(
            [*command, "--runs", str(tmp_path)], env=environment, cwd=ROOT, timeout=240, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    ends = {name: newest_valid(tmp_path / name / "checkpoints", "step-*.ckpt")[1] for name in ("one", "two")}
    assert ends["one"]["global_step"] == ends["two"]["global_step"]
    ledgers = {name: end["callbacks"]["CostLedger"] for name, end in ends.items()}
    assert ledgers["one"]["images_dropped"] > 0
    for key in ("images_dropped", "images_offered"):
        assert ledgers["one"][key] == ledgers["two"][key]


class StepOfSubnets(nn.Module):
    """A training step of a supernet as DDP sees it: several networks in one forward."""

    def __init__(self, model, options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, images, labels, step):
        subnets = subnets_of_step(self.model.space, self.options, 0, step, 1.0)

        def losses_of(output):
            exits = output.logits if isinstance(output, Outputs) else (output,)
            return torch.stack([per_sample_cross_entropy(logits, labels) for logits in exits]).sum(0)

        losses, ran = losses_of_subnets(self.model, images, labels, subnets, self.options, losses_of)
        assert len(ran) > 1
        return losses.mean()


SUPERNETS = {
    "sandwich": (MultiStageSupernet, Sampling(drawn=1, distillation=1.0, phases=())),
    "multi_architectural": (VitResNas, Sampling(method="multi_architectural", drawn=1, smallest=False, phases=())),
}


def _supernet_step_of_a_rank(rank, ranks, folder, method):
    kind, options = SUPERNETS[method]
    torch.manual_seed(0)
    alone = StepOfSubnets(kind(3, "tiny"), options)
    joined = DistributedDataParallel(copy.deepcopy(alone))
    generator = torch.Generator().manual_seed(rank)
    images, labels = torch.rand(2, 3, 64, 64, generator=generator), torch.zeros(2, 64, 64, dtype=torch.long)
    found = []
    for module in (alone, joined):
        for step in range(2):  # a step that waits for a gradient hangs at the next one
            torch.manual_seed(step)  # drop path
            module.zero_grad()
            module(images, labels, step).backward()
        found.append([parameter.grad for parameter in module.parameters()])
    torch.save(found, folder / f"supernet-{method}-{rank}.pt")


@pytest.mark.parametrize("method", ["sandwich", pytest.param("multi_architectural", marks=pytest.mark.slow)])
def test_ranks_train_the_same_networks_and_every_weight_has_their_mean_gradient(method, tmp_path):
    on_ranks(_supernet_step_of_a_rank, 2, tmp_path, method)
    (one, joined), (other, joined_too) = (torch.load(tmp_path / f"supernet-{method}-{rank}.pt") for rank in range(2))
    for own, others, mean, mean_too in zip(one, other, joined, joined_too, strict=True):
        torch.testing.assert_close(mean, (own + others) / 2, rtol=1e-4, atol=1e-6)
        assert torch.equal(mean, mean_too)


def _slim_on_a_rank(rank, ranks, folder):
    """Importance by Taylor needs gradients, and every rank has others: they are summed before the cut."""
    model = joined_batch()[0]
    images, labels = joined_batch()[1:3]
    mine = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    per_sample_cross_entropy(model(images[mine]), labels[mine]).sum().backward()
    options = NetworkSlimming(importance="taylor", of="channels", min_channels=1, round_to=1)
    _, kept = slim(model, options, input_size=(16, 16))
    torch.save((structure_hash(model), [stay.tolist() for stay in kept]), folder / f"slimmed-{ranks}-{rank}.pt")


def test_ranks_with_different_gradients_cut_the_channels_that_one_process_would(tmp_path):
    _slim_on_a_rank(0, 1, tmp_path)
    on_ranks(_slim_on_a_rank, 2, tmp_path)
    alone = torch.load(tmp_path / "slimmed-1-0.pt")
    assert len(alone[1][0]) == 4
    for rank in range(2):
        assert torch.load(tmp_path / f"slimmed-2-{rank}.pt") == alone


def _slim_by_passes_on_a_rank(rank, ranks, folder):
    """Five images, of which one rank has three and the other two: a pass each."""
    model = joined_batch()[0]
    images, labels = joined_batch()[1:3]

    def passes():
        for number in range(rank, 5, ranks):
            model.zero_grad()
            per_sample_cross_entropy(model(images[number][None]), labels[number][None]).sum().backward()
            yield

    options = NetworkSlimming(importance="taylor", of="channels", min_channels=1, round_to=1)
    _, kept = slim(model, options, input_size=(16, 16), passes=passes)
    torch.save((structure_hash(model), [stay.tolist() for stay in kept]), folder / f"passes-{ranks}-{rank}.pt")


def test_ranks_with_other_numbers_of_passes_cut_the_channels_that_one_process_would(tmp_path):
    _slim_by_passes_on_a_rank(0, 1, tmp_path)
    on_ranks(_slim_by_passes_on_a_rank, 2, tmp_path)
    alone = torch.load(tmp_path / "passes-1-0.pt")
    for rank in range(2):
        assert torch.load(tmp_path / f"passes-2-{rank}.pt") == alone


@pytest.mark.slow  # killed runs, ranks and cuts each have their quick tests
def test_a_run_on_two_ranks_killed_after_a_cut_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    cuts = ("network_slimming.start=0.2", "network_slimming.end=0.6", "network_slimming.cuts=2")
    often = ("trainer.devices=2", "trainer.save_every_minutes=0", "trainer.max_epochs=4")
    save_recipe(tiny(*often, *cuts, slim=True, cache=tmp_path / "cache"), tmp_path / "two.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(name):
        return [
            *(sys.executable, "-m", "tools.train", str(tmp_path / "two.yaml"), f"name={name}"),
            *("--runs", str(tmp_path)),
        ]

    def train(name):
        done = subprocess.run(
            command(name),
            env=environment,
            cwd=ROOT,
            timeout=240,
            capture_output=True,
            text=True,
            start_new_session=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return newest_valid(tmp_path / name / "checkpoints", "step-*.ckpt")[1]

    undisturbed = train("undisturbed")
    process = subprocess.Popen(
        command("killed"), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    cut_at = undisturbed["callbacks"]["NetworkCuts"]["cut_in"][0]
    while time.monotonic() < deadline:
        found = newest_valid(tmp_path / "killed" / "checkpoints", "step-*.ckpt")
        place = found[1]["callbacks"]["ExactResume"] if found else {"epoch": 0, "batch": 0}
        if (place["epoch"], place["batch"]) > (cut_at, 0):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    resumed = train("killed")
    assert undisturbed["structure"] == resumed["structure"]
    assert undisturbed["callbacks"]["NetworkCuts"]["cut_in"] == [1, 3]
    for name, tensor in undisturbed["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def _counts_and_statistics_of_a_rank(rank, ranks, folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    batches = [torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(10 * rank + k)) for k in range(2 - rank)]
    found = []
    for each in (model, synchronised):
        reestimate_batch_norm(each, batches)
        found.append((count_training_macs(each, (4, 4)).macs, each[1].running_mean, each[1].running_var))
    assert type(synchronised[1]) is nn.SyncBatchNorm
    torch.save((found, batches), folder / f"statistics-{rank}.pt")


def test_synchronised_norms_are_counted_and_re_estimated_with_unequal_numbers_of_batches(tmp_path):
    """In training mode a SyncBatchNorm waits for all ranks at every batch, and refuses what is not on a GPU."""
    on_ranks(_counts_and_statistics_of_a_rank, 2, tmp_path)
    (first, batches), (second, others) = (torch.load(tmp_path / f"statistics-{rank}.pt") for rank in range(2))
    assert (len(batches), len(others)) == (2, 1)
    for (macs, mean, variance), (macs_too, mean_too, variance_too) in zip(first, second, strict=True):
        assert macs == macs_too == first[0][0] > 0
        torch.testing.assert_close(mean, first[0][1])
        torch.testing.assert_close(variance, first[0][2])
        assert torch.equal(mean, mean_too)
        assert torch.equal(variance, variance_too)


def _validates_on_a_rank(rank, ranks, folder):
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.train()(torch.full((1, 3, 2, 2), float(rank)) + torch.rand(1, 3, 2, 2))
    module = SimpleNamespace(model=model, evaluated_model=model)
    trainer = SimpleNamespace(sanity_checking=False, training=True, current_epoch=0)
    ReestimatedStatistics(lambda: pytest.fail("not due"), lambda epoch: False, None).on_validation_start(
        trainer, module
    )
    torch.save(dict(model.named_buffers()), folder / f"buffers-{rank}.pt")


def test_all_ranks_validate_with_the_statistics_of_the_first_which_are_those_that_are_saved(tmp_path):
    on_ranks(_validates_on_a_rank, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"buffers-{rank}.pt") for rank in range(2))
    assert 0 < first["0.running_mean"].max() <= 0.1  # a tenth of images from 0 to 1, not of those from 1 to 2
    for name, buffer in first.items():
        assert torch.equal(buffer, second[name])


def _load_balance_of_a_rank(rank, ranks, folder):
    mixing = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    mine = mixing[: 3 - rank] if ranks == 1 else (mixing[:2] if rank == 0 else mixing[2:])
    value = variation(mine)
    value.backward()
    gradient = sum_over_ranks(mixing.grad) / ranks  # DDP's mean
    torch.save((value.detach(), gradient), folder / f"balance-{ranks}-{rank}.pt")


def test_bases_are_balanced_over_the_images_of_all_ranks(tmp_path):
    for ranks in (1, 2):
        on_ranks(_load_balance_of_a_rank, ranks, tmp_path)
    value, gradient = torch.load(tmp_path / "balance-1-0.pt")
    assert value > 0
    for rank in range(2):
        found, mean_gradient = torch.load(tmp_path / f"balance-2-{rank}.pt")
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(mean_gradient, gradient)
