import json
from types import SimpleNamespace

import pytest
import torch

from dance_seg.build import train
from dance_seg.callbacks import CostLedger, TrainingEnergy, energy
from datamodules import build_datamodule
from tests.tiny import tiny


class Meter:
    """One joule for each second of the test's clock."""

    def __init__(self, clock, opened, gpus, processors):
        self.clock, self.gpus, self.processors, self.samples = clock, gpus, processors, 0
        self.source = "test"
        opened.append(self)

    def __enter__(self):
        self.began = self.clock[0]
        return self

    def __exit__(self, *error):
        self.joules = self.clock[0] - self.began

    def sample(self):
        self.samples += 1


@pytest.fixture
def machine(monkeypatch):
    """The clock, in a list, and the meters that were opened."""
    clock, opened = [0.0], []
    monkeypatch.setattr(energy, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(energy, "EnergyMeter", lambda gpus=(), processors=True: Meter(clock, opened, gpus, processors))
    return clock, opened


def trainer(device="cpu", local_rank=0):
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), local_rank=local_rank)


def test_training_is_charged_and_validation_is_not(machine):
    clock, _ = machine
    ledger = CostLedger(None)
    callback = TrainingEnergy(ledger)
    callback.on_train_start(trainer(), None)
    clock[0] += 10
    callback.on_validation_start(trainer(), None)
    clock[0] += 100
    callback.on_validation_end(trainer(), None)
    clock[0] += 5
    callback.on_train_epoch_end(trainer(), None)
    clock[0] += 3
    callback.state_dict()
    assert ledger.ledger.joules == 18
    assert ledger.ledger.energy_source == "test"


def test_a_stretch_too_short_for_the_counters_goes_on(machine):
    clock, opened = machine
    ledger = CostLedger(None)
    callback = TrainingEnergy(ledger)
    callback.on_train_start(trainer(), None)
    clock[0] += 0.1
    callback.state_dict()
    assert ledger.ledger.joules is None
    assert ledger.ledger.energy_source == ""
    clock[0] += 0.4
    callback.state_dict()
    assert ledger.ledger.joules == pytest.approx(0.5)
    assert len(opened) == 2


def test_counters_are_read_before_they_begin_again(machine):
    clock, opened = machine
    callback = TrainingEnergy(CostLedger(None))
    callback.on_train_start(trainer(), None)
    for _ in range(100):
        clock[0] += 1
        callback.on_train_batch_end()
    assert opened[0].samples == 3


@pytest.mark.parametrize(
    ("device", "local_rank", "metered"),
    [("cpu", 0, ((), True)), ("cpu", 1, None), ("cuda:1", 0, ((1,), True)), ("cuda:1", 1, ((1,), False))],
)
def test_each_rank_meters_its_gpu_and_one_of_a_machine_the_processors(machine, device, local_rank, metered):
    TrainingEnergy(CostLedger(None)).on_train_start(trainer(device, local_rank), None)
    assert [(meter.gpus, meter.processors) for meter in machine[1]] == ([metered] if metered else [])


def test_the_joules_of_a_run_stand_in_its_ledger(tmp_path, machine):
    clock, _ = machine
    seconds = iter(range(1, 10**6))
    energy.time.monotonic = lambda: clock.__setitem__(0, float(next(seconds))) or clock[0]  # each look takes a second
    recipe = tiny("trainer.max_epochs=1", cache=tmp_path / "cache")
    folder = train(recipe, build_datamodule(recipe), tmp_path / "run")
    assert json.loads((folder / "cost.json").read_text())["training"]["cost/train_joules"] > 0
