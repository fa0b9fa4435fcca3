"""A file is written whole or not at all, and no more threads compute than there are cores for."""

import os
import subprocess
import sys

import pytest
import torch
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed

from dance_seg.machine import _container_limit, cores, has_bfloat16, threads, use_threads, write_text


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    write_text(path, "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_names_that_are_no_text_can_be_written(tmp_path):
    assert write_text(tmp_path / "a.html", "caf\udce9").read_bytes() == b"caf?"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 vaes\n", True),
        ("flags\t\t: avx512f amx_bf16\n", True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\nbugs\t\t: bf16\n", False),
        ("model name\t: bf16\n", None),
    ],
)
def test_bfloat16_is_read_off_the_flags_of_the_processor(said, expected, tmp_path):
    (tmp_path / "cpuinfo").write_text(said)
    assert has_bfloat16(tmp_path / "cpuinfo") is expected
    assert has_bfloat16(tmp_path / "nowhere") is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_threads_are_as_many_as_the_process_may_use_cores():
    said = "import os; os.sched_setaffinity(0, {0}); from dance_seg.machine import cores; print(cores())"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_threads_are_those_asked_for_then_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert (threads(3), threads(0)) == (3, 5)
    for nothing in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert threads(0) == cores()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads(0) == cores()


def test_lightning_leaves_the_threads_that_were_asked_for(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that what is set here is taken back
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        use_threads(3)
        _set_num_threads_if_needed(num_processes=2)  # as its launcher does before it starts the other ranks
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (3, "3")
    finally:
        torch.set_num_threads(before)


def test_a_container_is_not_counted_on_for_more_than_it_is_granted(tmp_path, monkeypatch):
    assert _container_limit(tmp_path) is None
    for content, limit in (("150000 100000\n", 1.5), ("max 100000\n", None), ("damaged", None)):
        (tmp_path / "cpu.max").write_text(content)
        assert _container_limit(tmp_path) == limit
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for content, limit in (("400000\n", 4.0), ("-1\n", None)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(content)
        assert _container_limit(tmp_path) == limit
    monkeypatch.setattr("dance_seg.machine.os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    for limit, found in ((0.5, 1), (2.0, 2), (None, 64)):
        monkeypatch.setattr("dance_seg.machine._container_limit", lambda _, limit=limit: limit)
        assert cores() == found
