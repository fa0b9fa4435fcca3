"""Scenarios 5, 6 and 12: a rank that ends or stalls is named within its deadline, and fewer or more ranks go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dance_seg.callbacks import ExactResume
from dance_seg.checkpoint import newest_valid
from dance_seg.errors import CheckpointError
from dance_seg.heartbeat import Heartbeat, Sign
from dance_seg.metrics_file import read_metrics
from dance_seg.recipe import save_recipe
from tests.durability.faults import AtStep, Send, Several, Sleep, kill
from tests.durability.small import small
from tools.chaos import said, start, train_to_its_end, wait

ROOT = Path(__file__).parent.parent.parent
LOST = 69


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def two(cache, *overrides):
    return small("dense", "trainer.devices=2", "name=run", *overrides, cache=cache)


@pytest.mark.ddp
def test_a_rank_that_was_killed_is_named_by_the_other_and_the_run_goes_on_afterwards(cache, tmp_path):
    recipe = two(cache)
    assert wait(start(recipe, tmp_path, AtStep(4, kill, ranks=(1,)))) == [LOST, -signal.SIGKILL]
    told = (tmp_path / "rank-0.log").read_text()
    assert "error: rank 1 (" in told
    assert "has ended; its last sign was of step" in told
    assert "Traceback" not in told.split("error: rank 1")[1]
    train_to_its_end(recipe, tmp_path)
    assert not (tmp_path / "run" / "ranks").exists()


@pytest.mark.ddp
@pytest.mark.slow
def test_the_death_of_rank_0_is_told_by_the_others(cache, tmp_path):
    assert wait(start(two(cache), tmp_path, AtStep(4, kill, ranks=(0,)))) == [-signal.SIGKILL, LOST]
    assert "error: rank 0 (" in (tmp_path / "rank-1.log").read_text()


@pytest.mark.ddp
def test_a_rank_that_stalls_is_named_when_patience_ends(cache, tmp_path):
    recipe = two(cache, "trainer.patience_minutes=0.2")
    assert wait(start(recipe, tmp_path, AtStep(4, Sleep(600), ranks=(1,)))) == [LOST, LOST]
    assert "has stood still for" in (tmp_path / "rank-0.log").read_text()
    stalled = (tmp_path / "rank-1.log").read_text()
    assert "error: rank 1 has stood still for" in stalled
    assert "step 4 (training)" in stalled
    assert "faults.py" in stalled  # the stack says where it stands


@pytest.mark.ddp
@pytest.mark.slow
def test_without_the_heartbeat_the_message_names_nobody(cache, tmp_path):
    wait(start(two(cache), tmp_path, Several((without_names, AtStep(4, kill, ranks=(1,))))))
    assert "rank 1 (" not in (tmp_path / "rank-0.log").read_text()


def without_names():
    Heartbeat.explain = lambda *_: None


@pytest.mark.ddp
@pytest.mark.slow
def test_a_rank_that_the_launcher_started_and_lost_is_named_too(cache, tmp_path):
    """`python -m tools.train` with two devices starts the second rank itself."""
    save_recipe(small("dense", "trainer.devices=2", "trainer.max_epochs=40", cache=cache), tmp_path / "run.yaml")
    command = [sys.executable, "-m", "tools.train", str(tmp_path / "run.yaml"), "--runs", str(tmp_path)]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    sign, end = tmp_path / "tiny" / "ranks" / "1.json", time.monotonic() + 200
    try:
        while not (sign.is_file() and json.loads(sign.read_text())["step"] > 2):
            assert time.monotonic() < end
            time.sleep(0.1)
        os.kill(json.loads(sign.read_text())["process"], signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    finally:
        process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == LOST
    assert "error: rank 1 (" in told


def test_a_heartbeat_tells_dead_from_still_from_never_there(tmp_path, monkeypatch):
    monkeypatch.setattr("dance_seg.heartbeat.BEAT_SECONDS", 0.1)
    mine = Heartbeat(tmp_path, ranks=3, patience_seconds=100)
    other = Heartbeat(tmp_path, ranks=3, patience_seconds=100, rank=1)
    with other:
        other.moved("training", 7)
        time.sleep(0.3)
        assert mine.missing().startswith("rank 2 gave no sign")
        sign = Sign(2, "node", 1234, beat=5, step=3, doing="validating", still_for=0.0)
        (tmp_path / "ranks" / "2.json").write_text(json.dumps(vars(sign)))
        assert mine.missing() == "rank 2 (node, process 1234) has ended; its last sign was of step 3 (validating)"
        with Heartbeat(tmp_path, ranks=3, patience_seconds=100, rank=2) as third:
            time.sleep(0.3)
            assert mine.missing() == ""
            other._still_for += 50
            time.sleep(0.3)
            assert "has stood still for 5" in mine.missing()
            assert "at step 7 (training)" in mine.missing()
            third.moved("training", 8)
    assert not (tmp_path / "ranks").exists()


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:43125", True),
        ("Timed out waiting 5000ms for recv operation to complete", True),
        ("Timed out after 61 seconds waiting for clients. 1/2 clients joined.", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_only_errors_of_waiting_for_ranks_are_explained(text, is_lost, tmp_path, monkeypatch):
    monkeypatch.setattr(Heartbeat, "missing", lambda self: "rank 1 has ended")
    assert (Heartbeat(tmp_path, ranks=2, patience_seconds=1).explain(RuntimeError(text)) is not None) is is_lost
    assert Heartbeat(tmp_path, ranks=1, patience_seconds=1).explain(RuntimeError(text)) is None


def test_ranks_that_found_different_checkpoints_do_not_train(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import dance_seg.callbacks.resume as resume

    callback = ExactResume(seed=0)
    trainer = SimpleNamespace(default_root_dir=tmp_path)
    callback.on_train_start(trainer, None)
    monkeypatch.setattr(resume, "gather", lambda place: [place, (1, 4)])
    with pytest.raises(CheckpointError, match=r"rank 0: epoch 0, batch 0; rank 1: epoch 1, batch 4"):
        callback.on_train_start(trainer, None)


# Another number of ranks ----------------------------------------------------------------------------------------------


def note_images():
    """Writes the names of every batch to the log, by step and rank."""
    before = ExactResume.on_train_batch_start

    def noting(self, trainer, pl_module, batch, batch_idx):
        before(self, trainer, pl_module, batch, batch_idx)
        print("images", json.dumps([trainer.global_step, trainer.global_rank, batch.names]), flush=True)

    ExactResume.on_train_batch_start = noting


def images_of(place):
    """The images of each step in the order of the ranks; what was done again counts once."""
    found = {}
    for log in sorted(place.glob("*.log")):
        for line in log.read_text().splitlines():
            if "images [" in line:
                step, rank, names = json.loads(line[line.index("images [") + 7 :])
                found[step, rank] = names
    steps = sorted({step for step, _ in found})
    return [[name for (at, _), names in sorted(found.items()) if at == step for name in names] for step in steps]


@pytest.mark.ddp
@pytest.mark.parametrize("ranks", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(ranks, cache, tmp_path):
    def recipe(count):
        return small("data_slimming", f"trainer.devices={count}", "name=run", cache=cache)

    stop = AtStep(4, Send(signal.SIGTERM))
    before, after = ranks
    wait(start(recipe(before), tmp_path / "first", Several((note_images, stop))))
    assert newest_valid(tmp_path / "first/run/checkpoints", "step-*.ckpt")[1]["global_step"] == 5
    (tmp_path / "second").mkdir()
    (tmp_path / "first/run").rename(tmp_path / "second/run")
    train_to_its_end(recipe(after), tmp_path / "second", note_images)
    train_to_its_end(recipe(1), tmp_path / "alone", note_images)
    order = images_of(tmp_path / "first")[:5] + images_of(tmp_path / "second")
    assert order == images_of(tmp_path / "alone")
    losses = [
        {row["step"]: row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row}
        for folder in (tmp_path / "second/run", tmp_path / "alone/run")
    ]
    assert losses[0].keys() == losses[1].keys()
    # Statistics of BatchNorm are those of a rank's own share, and rank 0 logs the loss of its own.
    assert all(abs(losses[0][step] - losses[1][step]) < 1.0 for step in losses[0])
    assert said(tmp_path / "second")
