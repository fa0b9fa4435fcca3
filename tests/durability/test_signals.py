"""Scenarios 3 and 4: a signal is noted, the step is finished, the state saved, and the status says what happened."""

import os
import signal
import time
from contextlib import suppress

import pytest

from dance_seg.callbacks.stop import requeue
from dance_seg.checkpoint import newest_valid
from tests.durability.faults import AtStep, Send, Several, Sleep, own_group, without_agreement, without_signals
from tests.durability.small import small
from tools.chaos import differing, end_of, said, start, train_to_its_end, wait

RARELY = "trainer.save_every_minutes=60"  # so that what is saved within an epoch was saved because of the signal
NO_VALIDATION = "trainer.validate_every=9"  # nor after a validation


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    train_to_its_end(small("data_slimming", RARELY, NO_VALIDATION, "name=run", cache=cache), place)
    return end_of(place / "run")


def recipe_of(cache, *overrides):
    return small("data_slimming", RARELY, NO_VALIDATION, "name=run", *overrides, cache=cache)


def saved_step(place):
    found = newest_valid(place / "run" / "checkpoints", "step-*.ckpt")
    return None if found is None else found[1]["global_step"]


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_the_middle_of_a_step_ends_the_run_after_it_and_loses_nothing(
    number, status, cache, undisturbed, tmp_path
):
    recipe = recipe_of(cache)
    assert wait(start(recipe, tmp_path, AtStep(4, Send(number)))) == [status]
    assert f"{number.name}: stopped after step 5, which is saved" in said(tmp_path)
    assert saved_step(tmp_path) == 5
    train_to_its_end(recipe, tmp_path)
    assert not differing(undisturbed, end_of(tmp_path / "run"))


def test_without_the_flag_a_signal_ends_the_run_with_its_work_lost(cache, tmp_path):
    wait(start(recipe_of(cache), tmp_path, Several((without_signals, AtStep(4, Send(signal.SIGTERM))))))
    assert saved_step(tmp_path) is None


def test_a_second_signal_ends_it_at_once(cache, tmp_path):
    fault = AtStep(4, twice_and_sleep)  # for longer than is waited for here
    assert wait(start(recipe_of(cache), tmp_path, fault)) == [143]
    assert saved_step(tmp_path) is None


def twice_and_sleep(module):
    Send(signal.SIGTERM)(module)
    Send(signal.SIGTERM)(module)
    time.sleep(1000)


def test_in_the_last_step_of_an_epoch_its_validation_is_finished_first(cache, tmp_path):
    recipe = recipe_of(cache, "trainer.validate_every=1")
    # The first epoch has three steps.
    assert wait(start(recipe, tmp_path, AtStep(2, Send(signal.SIGINT)))) == [130]
    found = newest_valid(tmp_path / "run" / "checkpoints", "step-*.ckpt")[1]
    place = found["callbacks"]["ExactResume"]
    assert place["batch"] == 0
    assert found["global_step"] == 3
    assert '"val/miou"' in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_terminal_spares_the_workers_or_replaces_them(
    number, cache, undisturbed, tmp_path
):
    recipe = recipe_of(cache, "data.args.workers=2")
    fault = Several((own_group, AtStep(4, Send(number, everywhere=True))))
    assert wait(start(recipe, tmp_path, fault)) == [{2: 130, 15: 143}[number]]
    assert saved_step(tmp_path) == 5
    train_to_its_end(recipe_of(cache), tmp_path)
    assert not differing(undisturbed, end_of(tmp_path / "run"))


@pytest.mark.ddp
def test_a_signal_to_one_rank_stops_both_after_the_same_step(cache, tmp_path):
    recipe = recipe_of(cache, "trainer.devices=2")
    late = AtStep(4, Sleep(0.5), ranks=(0,))
    assert wait(start(recipe, tmp_path, Several((late, AtStep(4, Send(signal.SIGTERM), ranks=(1,)))))) == [143, 0]
    assert saved_step(tmp_path) == 5
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    train_to_its_end(recipe, tmp_path)
    undisturbed = tmp_path / "undisturbed"
    train_to_its_end(recipe, undisturbed)
    assert not differing(end_of(undisturbed / "run"), end_of(tmp_path / "run"))


@pytest.mark.ddp
@pytest.mark.slow
def test_without_the_agreement_the_other_rank_is_left_behind(cache, tmp_path):
    recipe = recipe_of(cache, "trainer.devices=2")
    fault = Several((without_agreement, AtStep(4, Send(signal.SIGTERM), ranks=(1,))))
    with suppress(TimeoutError):
        assert wait(start(recipe, tmp_path, fault), seconds=60) != [143, 0]


@pytest.mark.parametrize(("fails", "done"), [(0, True), (1, False)])
def test_a_job_of_slurm_is_put_back_into_its_queue(fails, done, tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit {fails}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert requeue() is done
    assert (tmp_path / "asked").read_text() == "requeue 42\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    requeue()
    assert (tmp_path / "asked").read_text() == "requeue 40_7\n"
