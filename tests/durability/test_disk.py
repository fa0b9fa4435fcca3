"""Scenarios 2, 7, 8, 9: a disk that is full, read-only or stuck, a kill while writing, damaged checkpoints."""

import errno
import os
import random
import shutil
import signal
import time

import pytest
import torch

import dance_seg.checkpoint as checkpoint
from dance_seg.background import BackgroundWriter
from dance_seg.build import train
from dance_seg.checkpoint import load_checkpoint, newest_valid, save_checkpoint
from dance_seg.errors import CheckpointError
from datamodules import build_datamodule
from tests.durability.small import small
from tools.chaos import differing, end_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    recipe = small("ema", cache=cache)
    folder = tmp_path_factory.mktemp("undisturbed")
    return recipe, train(recipe, build_datamodule(recipe), folder / "run")


def full_after(monkeypatch, writes):
    """The disk takes so many checkpoints and is full then."""
    left = [writes]
    fsync = os.fsync

    def sometimes(descriptor):
        if ".ckpt." in os.readlink(f"/proc/self/fd/{descriptor}"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sometimes)


def test_a_disk_that_fills_up_ends_the_run_with_the_reason_and_what_was_saved_goes_on(
    undisturbed, tmp_path, monkeypatch
):
    recipe, whole = undisturbed
    full_after(monkeypatch, 3)
    with pytest.raises(CheckpointError, match=r"step-0+\d\.ckpt: could not be written: .*No space left on device"):
        train(recipe, build_datamodule(recipe), tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # nothing half-written beside them
    assert newest_valid(tmp_path / "run" / "checkpoints")[1]["global_step"] <= 4
    monkeypatch.undo()
    train(recipe, build_datamodule(recipe), tmp_path / "run")
    assert not differing(end_of(whole), end_of(tmp_path / "run"))


def test_without_the_check_a_run_on_a_full_disk_ends_as_if_it_were_saved(undisturbed, tmp_path, monkeypatch):
    recipe, _ = undisturbed
    full_after(monkeypatch, 3)

    def forget(self):
        self._jobs = [job for job in self._jobs if not job[0].done()]

    monkeypatch.setattr(BackgroundWriter, "check", forget)
    monkeypatch.setattr(BackgroundWriter, "_await_first", lambda self: (time.sleep(0.05), forget(self)))
    train(recipe, build_datamodule(recipe), tmp_path / "run")
    assert newest_valid(tmp_path / "run" / "checkpoints")[1]["global_step"] <= 4


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(cache, tmp_path, monkeypatch):
    recipe = small(cache=cache)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file is in the way")
    with pytest.raises((CheckpointError, OSError)):
        train(recipe, build_datamodule(recipe), tmp_path / "run")

    opened = open

    def refusing(path, mode="r", *arguments, **keywords):
        if "w" in mode and str(path).startswith(str(tmp_path / "other")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, mode, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", refusing)
    built = []
    monkeypatch.setattr("dance_seg.build.build_model", lambda *_: built.append(1))
    with pytest.raises(CheckpointError, match=r"other: cannot be written: .*Permission denied.*choose another folder"):
        train(recipe, build_datamodule(recipe), tmp_path / "other")
    assert not built


def test_without_the_probe_it_would_be_noticed_only_after_the_model_was_built(cache, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("dance_seg.run_folder.check_writable", lambda _: None)
    monkeypatch.setattr("dance_seg.run_folder.save_recipe", lambda *_: None)

    def build(*_):
        raise ZeroDivisionError("it got as far as the model")

    monkeypatch.setattr("dance_seg.build.build_model", build)
    with pytest.raises(ZeroDivisionError):
        train(small(cache=cache), build_datamodule(small(cache=cache)), tmp_path / "run")


def test_a_disk_that_does_not_answer_ends_the_run_when_patience_ends(cache, tmp_path, monkeypatch):
    recipe = small(cache=cache)
    monkeypatch.setattr("dance_seg.background.PATIENCE_SECONDS", 0.5)
    monkeypatch.setitem(BackgroundWriter.__init__.__kwdefaults__, "patience_seconds", 0.5)
    monkeypatch.setattr("dance_seg.background.save_checkpoint", lambda *_: time.sleep(6))
    with pytest.raises(CheckpointError, match=r"is still not written after 0\.5 s; the disk .* does not answer"):
        train(recipe, build_datamodule(recipe), tmp_path / "run")


@pytest.mark.parametrize("places", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_flipped_bit_or_a_cut_anywhere_falls_back_to_the_checkpoint_before(undisturbed, places, tmp_path):
    """One checkpoint of a whole run, damaged at random offsets; the one before it is kept and found."""
    _, folder = undisturbed
    newest = max((folder / "checkpoints").glob("step-*.ckpt"))
    whole = newest.read_bytes()
    good, bad = tmp_path / "step-00000001.ckpt", tmp_path / newest.name
    save_checkpoint({"global_step": 1}, good)
    for offset in random.Random(0).sample(range(len(whole)), places):
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << offset % 8
        for damaged in (bytes(flipped), whole[:offset]):
            bad.write_bytes(damaged)
            with pytest.warns(UserWarning, match=f"skipped a damaged checkpoint: .*{newest.name}"):
                path, _ = newest_valid(tmp_path)
            assert path == good
            assert bad.read_bytes() == damaged


def test_without_the_hash_torch_loads_a_flipped_bit_without_a_word(tmp_path):
    path = tmp_path / "a.ckpt"
    save_checkpoint({"weight": torch.zeros(1000)}, path)
    flipped = bytearray(path.read_bytes())
    flipped[flipped.index(b"\0" * 3000) + 2000] ^= 1
    path.write_bytes(flipped)
    assert not torch.load(path, weights_only=True)["weight"].eq(0).all()
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_a_run_killed_while_it_writes_keeps_the_checkpoint_before_and_clears_up(undisturbed, tmp_path):
    """The writer is stopped after the last byte and before the rename: the file is there, under no name that counts."""
    recipe, whole = undisturbed
    from dataclasses import replace

    from tools.chaos import start, train_to_its_end, wait

    recipe = replace(recipe, name="run")
    assert wait(start(recipe, tmp_path, killed_before_the_third_rename)) == [-signal.SIGKILL]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert [name.split(".")[0] for name in names if not name.startswith(".")] == ["step-00000001", "step-00000002"]
    assert [name for name in names if name.startswith(".")]  # what it was writing
    train_to_its_end(recipe, tmp_path)
    assert not differing(end_of(whole), end_of(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def killed_before_the_third_rename():
    replaced, times = os.replace, [0]

    def replace(old, new):
        if str(new).endswith(".ckpt"):
            times[0] += 1
            if times[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        replaced(old, new)

    os.replace = replace


def test_without_the_rename_a_kill_while_writing_leaves_what_cannot_be_read(tmp_path, monkeypatch):
    """Plain torch.save, as a killed process leaves it: half of the bytes, under the name that counts."""
    path = tmp_path / "a.ckpt"
    torch.save({"weight": torch.zeros(100_000)}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Exception, match=r"."):
        torch.load(path, weights_only=True)
    shutil.rmtree(tmp_path)
    assert checkpoint.newest_valid(tmp_path) is None
