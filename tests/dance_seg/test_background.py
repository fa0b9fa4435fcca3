"""Saving in the background: what is written is what was, in order, whole, and never failed in silence."""

import os
import threading
import time
from collections import OrderedDict

import pytest
import torch

import dance_seg.background as background
from dance_seg.background import BackgroundWriter, Copy
from dance_seg.checkpoint import load_checkpoint, save_checkpoint
from dance_seg.errors import CheckpointError


class Gate:
    """Holds every write until it is opened."""

    def __init__(self, monkeypatch, error=None):
        self.opened, self.began = threading.Event(), []

        def write(record, path):
            self.began.append(path.name)
            assert self.opened.wait(30)
            if error is not None and path.name == "bad.ckpt":
                raise error
            save_checkpoint(record, path)

        monkeypatch.setattr(background, "save_checkpoint", write)


def test_what_is_written_is_what_was_when_it_was_saved(tmp_path, monkeypatch):
    gate, writer = Gate(monkeypatch), BackgroundWriter()
    weight, history = torch.zeros(3), [1]
    writer.save({"global_step": 1, "weight": weight, "history": history}, tmp_path / "a.ckpt")
    weight.fill_(9)
    history.append(2)
    gate.opened.set()
    writer.finish()
    record = load_checkpoint(tmp_path / "a.ckpt")
    assert record["weight"].tolist() == [0, 0, 0]
    assert record["history"] == [1]


def test_a_second_save_is_copied_while_the_first_is_written_and_a_third_waits(tmp_path, monkeypatch):
    gate, writer = Gate(monkeypatch), BackgroundWriter(patience_seconds=0.2)
    weight = torch.zeros(2)
    for number in range(2):
        writer.save({"weight": weight + number}, tmp_path / f"{number}.ckpt")
    with pytest.raises(CheckpointError, match=r"0\.ckpt: is still not written after 0\.2 s"):
        writer.save({"weight": weight}, tmp_path / "2.ckpt")
    assert not list(tmp_path.iterdir())
    gate.opened.set()
    writer.finish()
    assert gate.began == ["0.ckpt", "1.ckpt"]
    assert [load_checkpoint(tmp_path / f"{n}.ckpt")["weight"].tolist() for n in range(2)] == [[0, 0], [1, 1]]


@pytest.mark.parametrize("ask", ["check", "save", "finish"])
def test_a_failed_save_is_raised_by_whatever_is_called_next_and_once(ask, tmp_path, monkeypatch):
    gate, writer = Gate(monkeypatch, CheckpointError("bad.ckpt: could not be written: disk full")), BackgroundWriter()
    writer.save({}, tmp_path / "bad.ckpt")
    gate.opened.set()
    while not writer._jobs[0][0].done():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="disk full"):
        writer.save({}, tmp_path / "next.ckpt") if ask == "save" else getattr(writer, ask)()
    writer.check()
    writer.save({"global_step": 3}, tmp_path / "good.ckpt")
    writer.finish()
    assert load_checkpoint(tmp_path / "good.ckpt")["global_step"] == 3


def test_what_is_no_plain_data_is_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.ckpt: not saved: options\.path is a .*Path"):
        BackgroundWriter().save({"options": {"path": tmp_path}}, tmp_path / "a.ckpt")


def test_what_comes_after_is_called_when_the_file_is_there(tmp_path):
    seen = []
    writer = BackgroundWriter(after=lambda: seen.append([path.name for path in tmp_path.glob("*.ckpt")]))
    writer.save({}, tmp_path / "a.ckpt")
    writer.finish()
    assert seen == [["a.ckpt"]]


def test_memory_is_used_again_for_tensors_that_kept_their_shape():
    copy, weight = Copy(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    first = copy.take({"weight": weight, "other": torch.zeros(3)})
    again = copy.take({"weight": weight + 1, "other": torch.zeros(2)})
    assert again["weight"].data_ptr() == first["weight"].data_ptr()
    assert torch.equal(again["weight"], weight + 1)
    assert again["weight"].is_contiguous(memory_format=torch.channels_last)
    assert again["other"].shape == (2,)


def test_closing_lets_go_of_thread_and_memory_and_a_later_save_begins_anew(tmp_path):
    writer = BackgroundWriter()
    for name in ("a", "b"):
        writer.save({"weight": torch.zeros(3)}, tmp_path / f"{name}.ckpt")
        (thread,) = writer._thread._threads
        writer.close()
        assert not thread.is_alive()
        assert not any(copy._memory for copy in writer._copies)
    assert len(list(tmp_path.iterdir())) == 2


def test_containers_and_parameters_keep_their_kind():
    record = {
        "ordered": OrderedDict(a=torch.ones(1)), "pair": (torch.zeros(1), "x"), "set": {1, 2}, "none": None,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    copied = Copy().take(record)
    assert {key: type(value) for key, value in copied.items()} == {key: type(value) for key, value in record.items()}
    assert copied["parameter"].data_ptr() != record["parameter"].data_ptr()


def test_a_process_that_ends_by_itself_brings_its_last_checkpoint_to_the_disk(tmp_path):
    child = os.fork()
    if child == 0:  # pragma: no cover
        torch.set_num_threads(1)
        try:
            writer = BackgroundWriter()
            writer.save({"global_step": 5, "weight": torch.zeros(1000)}, tmp_path / "a.ckpt")
            threading._shutdown()  # what the interpreter does at its end
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 5
