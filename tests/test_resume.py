"""Resuming is exact: k + k steps equal 2k steps bit for bit, wherever the run was broken off."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dance_seg.build import train
from dance_seg.checkpoint import load_checkpoint, newest_valid
from dance_seg.recipe import load_recipe, save_recipe
from dance_seg.run_folder import open_folder, written_by_this_process
from datamodules import build_datamodule
from tests.tiny import tiny

# DeepLabV3+ has dropout (ASPP) and BatchNorm after global pooling; EMA and data slimming are on; epochs differ.
HARD = (
    "model.args.arch=deeplabv3plus",
    "trainer.ema=0.9",
    "trainer.save_every_minutes=0",
    "data_slimming.drop_below=0.9",
    "data_slimming.drop_rate=0.6",
    "data.args.num_train=22",
)
# The network is cut before epochs 1 and 2 of 4, first by half, so resuming meets a cut just before, at and after it.
CUT = (
    *HARD,
    "trainer.max_epochs=4",
    "network_slimming.keep=0.5",
    "network_slimming.start=0.2",
    "network_slimming.end=0.5",
    "network_slimming.cuts=2",
    "network_slimming.sparsity=0.001",
    "network_slimming.branches=0.9",
)


def run(recipe, folder):
    return train(recipe, build_datamodule(recipe), folder)


def tensors(checkpoint):
    found = {}

    def walk(value, key):
        if isinstance(value, torch.Tensor):
            found[key] = value
        elif isinstance(value, dict):
            for name, item in value.items():
                walk(item, f"{key}.{name}")
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                walk(item, f"{key}[{number}]")

    for part in ("state_dict", "optimizer_states", "average"):
        walk(checkpoint.get(part, {}), part)
    return found


def assert_same(one, two):
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different, different[:5]


def final(folder):
    found = newest_valid(folder / "checkpoints", "step-*.ckpt")
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of data slimming that keeps a copy of every checkpoint it writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return keeping_checkpoints(tiny(*HARD, slim=True, cache=folder / "cache"), folder)


@pytest.fixture(scope="module")
def undisturbed_cut(tmp_path_factory):
    """The same with a network that is cut twice."""
    folder = tmp_path_factory.mktemp("undisturbed_cut")
    return keeping_checkpoints(tiny(*CUT, slim=True, cache=folder / "cache"), folder)


def keeping_checkpoints(recipe, folder):
    kept = folder / "kept"
    kept.mkdir()
    from dance_seg.callbacks import Checkpoints

    save = Checkpoints.save

    def save_and_copy(self, trainer):
        save(self, trainer)
        self.writer.finish()
        newest = max((folder / "run/checkpoints").glob("step-*.ckpt"))
        shutil.copy(newest, kept / newest.name)

    Checkpoints.save = save_and_copy
    try:
        run(recipe, folder / "run")
    finally:
        Checkpoints.save = save
    return recipe, folder / "run", sorted(kept.iterdir())


def test_epochs_of_the_run_differ_in_length(undisturbed):
    recipe, _, _ = undisturbed
    datamodule = build_datamodule(recipe)
    datamodule.fit_to(stride=32, epochs=3, seed=0, data_slimming=recipe.data_slimming)
    datamodule.prepare_data()
    steps = [summary.steps for summary in datamodule.schedule]
    assert len(set(steps)) > 1
    assert min(steps) >= 2


def places_of(kept):
    places = {}
    for path in kept:
        place = load_checkpoint(path)["callbacks"]["ExactResume"]
        places[place["epoch"], place["batch"]] = path
    return places


def assert_resuming_ends_the_same(recipe, folder, checkpoint, again):
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, again / "checkpoints")
    save_recipe(recipe, again / "recipe.yaml")
    run(recipe, again)
    assert_same(final(folder), final(again))
    mine, theirs = (dict(final(f)["callbacks"]["CostLedger"]) for f in (again, folder))
    counted = [key for key in mine if "second" not in key and "decode" not in key]
    assert {key: mine[key] for key in counted} == {key: theirs[key] for key in counted}


def test_resuming_at_the_first_a_middle_and_the_last_batch_ends_with_the_same_weights(undisturbed, tmp_path):
    recipe, folder, kept = undisturbed
    places = places_of(kept)
    broken = [place for place in places if place[1] > 0]
    chosen = {min(broken), broken[len(broken) // 2], max(broken), max(p for p in places if p[1] == 0 and p[0] < 3)}
    assert len(chosen) >= 3
    for place in sorted(chosen):
        assert_resuming_ends_the_same(recipe, folder, places[place], tmp_path / f"{place[0]}-{place[1]}")


def test_resuming_right_before_at_and_after_a_cut_ends_with_the_same_smaller_weights(undisturbed_cut, tmp_path):
    recipe, folder, kept = undisturbed_cut
    places = places_of(kept)
    full, cut = (load_checkpoint(path)["structure"]["shapes"] for path in (min(kept), max(kept)))
    assert any(cut[name] != full[name] for name in cut)
    last_before, at, first_after = max(p for p in places if p < (1, 0)), (1, 0), min(p for p in places if p > (1, 0))
    assert load_checkpoint(places[at])["structure"]["shapes"] == full  # the cut opens the epoch
    assert load_checkpoint(places[first_after])["structure"]["shapes"] != full
    second = (2, 0)  # the network has been cut once and is about to be cut again
    for place in (last_before, at, first_after, second):
        assert_resuming_ends_the_same(recipe, folder, places[place], tmp_path / f"{place[0]}-{place[1]}")


def test_another_seed_ends_elsewhere(undisturbed, tmp_path):
    _, folder, _ = undisturbed
    recipe = tiny(*HARD, "seed=1", slim=True, cache=tmp_path / "cache")
    run(recipe, tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same(final(folder), final(tmp_path / "run"))


def test_a_finished_run_is_not_trained_again_and_another_recipe_is_refused(undisturbed):
    recipe, folder, _ = undisturbed
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (folder / "checkpoints").iterdir())
    run(recipe, folder)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (folder / "checkpoints").iterdir()) == before
    other = tiny(*HARD, "optimizer.lr=0.5", slim=True, cache=folder.parent / "cache")
    with pytest.raises(ValueError, match=r"optimizer.lr: 0\.001 / 0\.5"):
        run(other, folder)


def test_a_folder_in_which_nothing_was_trained_is_nobodys(undisturbed, tmp_path):
    """A command with a mistake must not claim the name for the one that is right."""
    recipe, _, _ = undisturbed
    (tmp_path / "checkpoints").mkdir()
    wrong = replace(recipe, model=replace(recipe.model, args={**recipe.model.args, "arch": "fpnn"}))
    with pytest.raises(ValueError, match="did you mean fpn"):
        run(wrong, tmp_path)
    open_folder(recipe, tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml").model == recipe.model
    (tmp_path / "checkpoints" / "step-00000001.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds a run of another recipe .*start_from={tmp_path}"):
        open_folder(wrong, tmp_path)


def test_devices_that_are_not_there_are_refused_before_the_folder_is_taken(undisturbed, tmp_path, monkeypatch):
    recipe, _, _ = undisturbed
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"trainer\.accelerator is gpu and torch .* finds none here; set it to cpu"):
        run(replace(recipe, trainer=replace(recipe.trainer, accelerator="gpu")), tmp_path / "run")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"trainer\.devices is 4 and torch finds 2 GPUs here"):
        run(replace(recipe, trainer=replace(recipe.trainer, accelerator="auto", devices=4)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(undisturbed, tmp_path):
    recipe, folder, kept = undisturbed
    (tmp_path / "checkpoints").mkdir()
    for path in kept[1:3]:
        shutil.copy(path, tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / kept[2].name
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    with pytest.warns(UserWarning, match=kept[2].name):
        run(recipe, tmp_path)
    assert_same(final(folder), final(tmp_path))


@pytest.mark.slow  # tests/durability kills more, and forks where this starts anew
def test_a_run_killed_at_a_random_moment_and_started_again_ends_with_the_same_weights(undisturbed, tmp_path):
    recipe, folder, _ = undisturbed
    save_recipe(recipe, tmp_path / "tiny.yaml")
    command = [sys.executable, "-m", "tools.train", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs")]
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1 + 0.4 * (os.getpid() % 7) / 7)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    subprocess.run(command, env=environment, check=True, timeout=240, capture_output=True)
    assert_same(final(folder), final(tmp_path / "runs" / "tiny"))


def test_a_run_does_not_go_on_with_other_images(undisturbed, tmp_path, monkeypatch):
    recipe, _, kept = undisturbed
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(kept[1], tmp_path / "checkpoints")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    changed = build_datamodule(recipe)
    monkeypatch.setitem(changed.__dict__, "table", replace(changed.table, values=changed.table.values + 1.0))
    with pytest.raises(ValueError, match="the same names and another complexity"):
        train(recipe, changed, tmp_path)
    datamodule = build_datamodule(recipe)
    source = datamodule.source("train")
    monkeypatch.setattr(source, "names", tuple(f"other {name}" for name in source.names))
    with pytest.raises(ValueError, match="began with other training images: 22 then, 22 now, with other names"):
        train(recipe, datamodule, tmp_path)


def _writes(folder, started, go_on):
    with written_by_this_process(folder):
        started.set()
        go_on.wait(60)


def test_two_processes_do_not_write_into_one_run(undisturbed, tmp_path, monkeypatch):
    """The second would throw away what the first is writing."""
    recipe, _, _ = undisturbed
    monkeypatch.setattr("dance_seg.run_folder.LOCK_SECONDS", 0.1)
    context = multiprocessing.get_context("fork")
    started, go_on = context.Event(), context.Event()
    other = context.Process(target=_writes, args=(tmp_path, started, go_on))
    other.start()
    try:
        assert started.wait(60)
        with pytest.raises(ValueError, match=rf"written by another process \(process {other.pid} on .*name="):
            run(recipe, tmp_path)
        assert not (tmp_path / "checkpoints").exists()
    finally:
        other.kill()
        other.join(60)
    with written_by_this_process(tmp_path):  # a process that was killed holds nothing
        pass
