"""Checkpoints are whole or not there, a changed byte is noticed, and nothing in them runs."""

import ast
import errno
import hashlib
import os
import pickle
import random
import resource
import signal
import socket
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from dance_seg import checkpoint
from dance_seg.checkpoint import (
    check_writable,
    clean_temporary,
    forget_older,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
)
from dance_seg.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def record_at(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": OrderedDict(weight=torch.full((100,), float(step)))}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint of step 1, alone in its folder."""
    save_checkpoint(record_at(1), tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def assert_untouched(path: Path) -> None:
    """The old checkpoint is there and whole, and nothing beside it."""
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    assert same(load_checkpoint(path), record_at(1))


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = {
        "global_step": 12,
        "nested": {"list": [1, 2.5, None, True, "text", b"bytes", 1j], 3: (torch.Size([2, 3]), torch.float16)},
        "device": torch.device("cpu"),
        "tensors": [torch.arange(5), torch.randn(3, 4).half(), torch.tensor(True), nn.Parameter(torch.ones(2))],
        "empty": {},
    }
    save_checkpoint(record, tmp_path / "new" / "folder" / "a.ckpt")
    assert same(load_checkpoint(tmp_path / "new" / "folder" / "a.ckpt"), record)


def test_torch_alone_reads_it_too(path: Path) -> None:
    assert same(torch.load(path, weights_only=True), record_at(1))
    assert same(torch.load(path, weights_only=True, mmap=True), record_at(1))


def test_state_of_models_and_optimisers_is_plain_data(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    record = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    save_checkpoint(record, tmp_path / "a.ckpt")
    optimizer.load_state_dict(load_checkpoint(tmp_path / "a.ckpt")["optimizer"])


class Pair(NamedTuple):
    first: int
    second: int


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Path("x"), "Path"),
        (Pair(1, 2), "Pair"),
        (nn.Linear(1, 1), "Linear"),
        (print, "builtin_function_or_method"),
    ],
)
def test_what_is_no_plain_data_is_refused_by_the_name_of_its_key(value: object, name: str, path: Path) -> None:
    record = {"global_step": 2, "callbacks": {"X": {"y": [1, value]}}}
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: not saved: callbacks\.X\.y\[1\] is a .*{name}"):
        save_checkpoint(record, path)
    assert_untouched(path)


def test_a_key_that_is_no_plain_data_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"options, the key .*, is a .*Path"):
        save_checkpoint({"options": {Path("x"): 1}}, path)
    assert_untouched(path)


def test_saving_holds_no_second_copy_of_the_tensors(tmp_path: Path) -> None:
    record = {"weight": torch.zeros(8 << 20, dtype=torch.uint8)}
    tracemalloc.start()
    save_checkpoint(record, tmp_path / "a.ckpt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


# -- damage ------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    """torch itself loads a file with a flipped bit in a tensor without a word."""
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole)), 60) + list(range(len(whole) - 130, len(whole)))
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"a\.ckpt: (is damaged|has no digest|is no checkpoint)"):
            load_checkpoint(path)
    path.write_bytes(whole)
    load_checkpoint(path)


def test_a_file_cut_short_or_continued_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for length in (0, 1, 3, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.ckpt: (has no digest|is no checkpoint)"):
            load_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="has no digest"):
        load_checkpoint(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"b\.ckpt: no such checkpoint"):
        load_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint("http://example.org/a.ckpt")  # nothing is fetched


def test_files_of_other_programs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_text("epoch,loss\n" * 100)
    with pytest.raises(CheckpointError, match=r"is no checkpoint \(1100 bytes\)"):
        load_checkpoint(path)
    torch.save(record_at(1), path)
    with pytest.raises(CheckpointError, match="has no digest at its end: it is cut short, or another program wrote it"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)


class WritesAFile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_checkpoint_does_not_run_even_where_its_digest_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.ckpt"
    monkeypatch.setattr(
        checkpoint, "_foreign", lambda record, most_bytes=None: iter(())
    )  # as an attacker's own program would
    save_checkpoint({"state_dict": WritesAFile(marker)}, path)
    with pytest.raises(CheckpointError, match=r"is refused: it holds .*system, which could run code"):
        load_checkpoint(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(WritesAFile(marker)))
    assert marker.exists()  # the payload would have worked


def forged(path: Path, record: dict[str, Any], *, packed: bool = False, sizes: int | None = None) -> Path:
    """A checkpoint as somebody else would write it: torch's archive, its parts changed, and a right digest."""
    torch.save(record, path.with_suffix(".torch"))
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path.with_suffix(".torch")) as there, zipfile.ZipFile(path, "w", kind) as made:
        for name in there.namelist():
            made.writestr(name, bytes(sizes) if sizes and name.endswith("data/0") else there.read(name))
    data = path.read_bytes()
    with open(path, "r+b") as file:
        checkpoint._close_with_comment(file, hashlib.sha256(data), 0)
    return path


def test_a_bomb_is_refused_before_it_is_unpacked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has 0.1 MB, and 100 MB unpacked."""
    bomb = forged(path, {"a": torch.zeros(25_000_000)}, packed=True)
    assert bomb.stat().st_size < 200_000
    with pytest.raises(CheckpointError, match="its parts are packed"):
        load_checkpoint(bomb)
    monkeypatch.setattr(checkpoint, "_refuse_packed", lambda *_: None)
    monkeypatch.setattr(checkpoint, "_foreign", lambda record, most_bytes=None: iter(()))
    assert len(load_checkpoint(bomb)["a"]) == 25_000_000  # the guard was what stood in the way


def test_parts_that_lie_on_one_another_are_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"record size|packed"):
        load_checkpoint(forged(path, {"a": torch.zeros(1000)}, sizes=100))


def test_a_tensor_that_says_it_is_larger_than_the_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stride of 0 repeats one value for ever; whoever copies it fills the memory."""
    huge = forged(path, {"state": {"a": torch.zeros(1).expand(10**12)}})
    with pytest.raises(CheckpointError, match=r"state\.a is a tensor \(1000000000000,\), larger than the file"):
        load_checkpoint(huge)
    monkeypatch.setattr(checkpoint, "_foreign", lambda record, most_bytes=None: iter(()))
    assert load_checkpoint(huge)["state"]["a"].shape == (10**12,)


def test_a_record_that_says_more_than_fits_any_memory_is_refused_or_read_at_once(path: Path) -> None:
    """Sixty lists of twice the one before: a few hundred bytes, and 2**60 values when written out."""
    doubled: list[Any] = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    assert load_checkpoint(forged(path, {"a": doubled}))["a"][0] is not None
    deep: list[Any] = []
    for _ in range(120):
        deep = [deep]
    for strange in (deep, torch.zeros(2, 2).to_sparse(), torch.empty(10**12, device="meta"), 1 << 5000):
        with pytest.raises(CheckpointError, match=r"is refused: "):
            load_checkpoint(forged(path, {"a": strange}))


def test_an_address_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning loads what an address holds without the guard of weights_only; here nothing is asked."""
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("asked the network"))
    for address in ("http://127.0.0.1:9/a.ckpt", "https://example.invalid/a.ckpt", "s3://bucket/a.ckpt"):
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            load_checkpoint(address)


def test_no_line_of_the_project_asks_torch_to_run_code() -> None:
    for path in [path for folder in ("dance_seg", "datamodules", "tools") for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1].startswith(("load", "_load")):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") != "False", f"{path}:{node.lineno}"
                assert ast.unparse(node.func) != "torch.load" or keywords.get("weights_only") == "True", path


# -- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 1000, 40_000, 81_000])
def test_a_disk_that_is_full_leaves_the_old_checkpoint_and_nothing_else(size: int, path: Path) -> None:
    large = {"global_step": 2, "weight": torch.zeros(20_000)}
    with no_file_larger_than(size), pytest.raises(CheckpointError, match=r"a\.ckpt: could not be written: .*too large"):
        save_checkpoint(large, path)
    assert_untouched(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_after_the_last_byte_leaves_the_old_checkpoint_too(
    call: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match=r"a\.ckpt: could not be written: .*No space left on device"):
        save_checkpoint(record_at(2), path)
    assert_untouched(path)


def test_an_interrupt_leaves_the_old_checkpoint_and_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(record_at(2), path)
    assert_untouched(path)


def test_a_folder_that_cannot_be_written_is_an_error_not_a_silence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(record_at(1), tmp_path / "file" / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*choose another folder"):
        check_writable(tmp_path / "file")


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_the_file_reaches_the_disk_before_its_name_and_its_name_before_the_return(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to tell files apart")
    save_checkpoint(record_at(2), path)
    assert done == [f".a.ckpt.{os.getpid()}.partial", "replace", path.parent.name]


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that uses torch")
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    weight = torch.zeros(500_000)
    save_checkpoint({"global_step": 0, "weight": weight}, path)
    moments = random.Random(0)
    interrupted = 0
    for _ in range(100):  # until some writes were cut
        writer = os.fork()
        if writer == 0:
            torch.set_num_threads(1)  # the parent's threads do not live on in a fork
            step = 0
            while True:
                step += 1
                save_checkpoint({"global_step": step, "weight": weight + step}, path)
        until = time.monotonic() + 10
        while not list(tmp_path.glob(".*")) and time.monotonic() < until:  # of a save that is under way
            pass
        time.sleep(moments.uniform(0, 0.003))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        record = load_checkpoint(path)
        assert (record["weight"] == record["global_step"]).all()
        interrupted += len(clean_temporary(tmp_path))
        assert [other.name for other in tmp_path.iterdir()] == ["a.ckpt"]
        if interrupted >= 5:
            break
    assert interrupted >= 5  # else no write was cut, and nothing was shown


# -- the newest --------------------------------------------------------------------------------------------------------


def test_the_newest_is_the_one_furthest_in_training(tmp_path: Path) -> None:
    for step, name in [(3, "b"), (20, "a"), (10, "c")]:
        save_checkpoint(record_at(step), tmp_path / f"{name}.ckpt")
    found = newest_valid(tmp_path)
    assert found is not None
    assert (found[0].name, found[1]["global_step"]) == ("a.ckpt", 20)
    assert newest_valid(tmp_path, "b*.ckpt")[0].name == "b.ckpt"  # type: ignore[index]


def test_of_two_equally_far_the_one_written_later_is_taken(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "a", "c")):
        save_checkpoint(record_at(5), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (1000 - number, 1000 - number))
    assert newest_valid(tmp_path)[0].name == "b.ckpt"  # type: ignore[index]


def test_damaged_ones_are_skipped_named_and_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(record_at(step), tmp_path / f"step-{step}.ckpt")
    whole = (tmp_path / "step-3.ckpt").read_bytes()
    (tmp_path / "step-3.ckpt").write_bytes(whole[:500] + b"?" + whole[501:])
    (tmp_path / "step-2.ckpt").write_bytes(whole[:500])
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint") as warned:
        found = newest_valid(tmp_path)
    assert found is not None
    assert found[0].name == "step-1.ckpt"
    assert sorted(str(w.message).split("/")[-1].split(":")[0] for w in warned) == ["step-2.ckpt", "step-3.ckpt"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_without_a_whole_checkpoint_has_no_newest(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "missing") is None
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.warns(UserWarning, match=r"a\.ckpt: has no digest"):
        assert newest_valid(tmp_path) is None


def test_the_two_that_were_written_last_are_kept_whatever_their_steps(tmp_path: Path) -> None:
    """Training that began anew, since those of most steps were damaged, must not lose what it writes."""
    for order, step in enumerate((900, 1000, 50, 100)):
        path = tmp_path / f"step-{step:08d}.ckpt"
        path.write_bytes(b"")
        os.utime(path, ns=(order, order))
    forget_older(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000050.ckpt", "step-00000100.ckpt"]
