"""Scenarios 1 and 20: ten kills at random moments, dense and DANCE, in one process and in two; not one bit moves."""

import json
import multiprocessing
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tools.chaos
from tests.durability.faults import AtStep, kill, kill_once_saved
from tests.durability.small import METHODS, small
from tools.chaos import (
    KILLS_A_RUN,
    chaos,
    differing,
    disturbed,
    end_of,
    killed,
    start,
    tiny_recipe,
    train_to_its_end,
    wait,
)

CASES = [
    ("dense", 1, 4),
    ("dance", 1, 3),
    pytest.param("dense", 2, 2, marks=[pytest.mark.ddp, pytest.mark.slow]),
    pytest.param("dance", 2, 1, marks=pytest.mark.ddp),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("name", "ranks", "kills"), CASES)
def test_every_killed_run_ends_as_the_undisturbed_one(name, ranks, kills, cache, tmp_path):
    short = ["trainer.max_epochs=3", *(["network_slimming.cuts=1"] if name == "dance" else [])]
    recipe = tiny_recipe(f"recipes/shapes_{name}.yaml", [f"trainer.devices={ranks}", *short], cache=cache)
    outcome = chaos(recipe, tmp_path, kills, seed=ranks)
    assert (outcome.kills, outcome.identical, outcome.differences) == (kills, kills, [])


def test_a_training_that_ends_just_before_its_kill_was_not_killed(monkeypatch, tmp_path):
    """A process that is gone, which nobody has been told of yet."""
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    os.waitpid(ended.pid, 0)
    assert ended.exitcode is None
    monkeypatch.setattr(tools.chaos, "start", lambda *_: [ended])
    monkeypatch.setattr(tools.chaos, "wait", lambda ranks: [0])
    assert not killed(None, tmp_path, 0.0, random.Random(0), None)


def from_the_start_of_the_epoch():
    """Without the place in the epoch: what Lightning alone would do."""
    import datamodules.base as base

    base._position = lambda trainer: (trainer.current_epoch, 0)


def test_without_the_place_in_the_epoch_a_killed_run_ends_otherwise(cache, tmp_path):
    recipe = replace(tiny_recipe("recipes/shapes_dense.yaml", [], cache=cache), name="run")
    train_to_its_end(recipe, tmp_path / "whole")
    assert wait(start(recipe, tmp_path / "killed", AtStep(2, kill_once_saved))) == [-signal.SIGKILL]
    train_to_its_end(recipe, tmp_path / "killed", from_the_start_of_the_epoch)
    assert "state_dict" in differing(end_of(tmp_path / "whole/run"), end_of(tmp_path / "killed/run"))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_is_killed_in_a_step_ends_as_the_undisturbed_one(method, step, cache, tmp_path):
    """The network is cut twice where it is cut: once before step 4, once before step 8."""
    recipe = small(method, "name=run", cache=cache)
    train_to_its_end(recipe, tmp_path / "whole")
    assert wait(start(recipe, tmp_path / "killed", AtStep(step, kill))) in ([-signal.SIGKILL], [0])  # ema has few steps
    train_to_its_end(recipe, tmp_path / "killed")
    assert not differing(end_of(tmp_path / "whole/run"), end_of(tmp_path / "killed/run"))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 8])
def test_a_student_of_soft_labels_that_is_killed_ends_as_the_undisturbed_one(step, cache, tmp_path):
    train_to_its_end(small("dense", "name=run", cache=cache), tmp_path / "teacher")
    recipe = small("dense", f"soft_labels.teacher={tmp_path / 'teacher/run'}", "name=run", cache=cache)
    train_to_its_end(recipe, tmp_path / "whole")
    assert wait(start(recipe, tmp_path / "killed", AtStep(step, kill))) == [-signal.SIGKILL]
    train_to_its_end(recipe, tmp_path / "killed")
    assert not differing(end_of(tmp_path / "whole/run"), end_of(tmp_path / "killed/run"))


@pytest.mark.slow
def test_the_tool_counts_kills_and_writes_its_result(tmp_path, monkeypatch):
    from tools import chaos as module

    root = Path(__file__).parent.parent.parent
    monkeypatch.chdir(tmp_path)
    kills = KILLS_A_RUN + 1
    monkeypatch.setattr(sys, "argv", ["chaos", str(root / "recipes/shapes_dense.yaml"), "--kills", str(kills)])
    assert module.main() == 0
    ratios = json.loads((tmp_path / "runs/bench/chaos.json").read_text())["ratios"]
    assert ratios["identical"]["median"] == ratios["kills"]["median"] == kills


def test_a_run_that_does_not_end_is_a_difference_and_others_go_on(tmp_path, monkeypatch):
    def hangs(*_):
        raise TimeoutError("rank 0 had not ended")

    monkeypatch.setattr("tools.chaos.killed", hangs)
    recipe = tiny_recipe("recipes/shapes_dense.yaml", [], cache=tmp_path / "cache")
    outcome = disturbed(recipe, tmp_path / "killed-0", 5, 1.0, 0, None, {})
    assert (outcome.kills, outcome.identical, outcome.differences) == (1, 0, ["rank 0 had not ended"])
