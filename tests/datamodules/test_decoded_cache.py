"""The store gives exactly the source's pixels, whatever happens to it, and costs memory for none of them."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.sample import Sample
from datamodules import decoded_cache, image_files
from datamodules.decoded_cache import CachedSource, open_cache
from datamodules.label_table import label_table
from datamodules.sources import FileSource, Pair

TABLE = label_table(("road", "car"), raw_to_train={7: 0, 26: 1}, ignore=[0])
ROOT = Path(__file__).resolve().parents[2]


class Drawn:
    """A source of random pictures of different sizes, which counts what it is asked for."""

    def __init__(
        self, count: int, size: tuple[int, int] = (10, 14), fingerprint: str = "drawn", wait: float = 0
    ) -> None:
        self.names = tuple(f"d{i}" for i in range(count))
        self.groups = self.names
        self.size, self.fingerprint, self.wait = size, fingerprint, wait
        self.loads = 0
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Sample:
        with self.lock:
            self.loads += 1
        time.sleep(self.wait)
        rng = np.random.default_rng(index)
        height, width = self.size[0] + index % 3, self.size[1]
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        return Sample(image, rng.integers(0, 5, (height, width), np.uint8))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, lock=threading.Lock())


def files(folder: Path, count: int) -> FileSource:
    folder.mkdir()
    pairs = []
    rng = np.random.default_rng(0)
    for i in range(count):
        image, label = folder / f"{i}.png", folder / f"{i}_label.png"
        Image.fromarray(rng.integers(0, 256, (9, 12 + i, 3), np.uint8)).save(image)
        Image.fromarray(rng.choice(np.array([0, 7, 26], np.uint8), (9, 12 + i))).save(label)
        pairs.append(Pair(image, label, str(i), "g"))
    return FileSource(pairs, TABLE)


def assert_same(cached: CachedSource, source: FileSource | Drawn) -> None:
    assert (len(cached), cached.names, cached.groups) == (len(source), source.names, source.groups)
    assert cached.fingerprint == source.fingerprint
    for index in range(len(source)):
        for mine, theirs in zip(cached.load(index), source.load(index), strict=True):
            assert mine.dtype == np.uint8
            np.testing.assert_array_equal(mine, theirs)


def opened(source: FileSource | Drawn, folder: Path, budget_gb: float = 1.0) -> CachedSource:
    return open_cache(source, folder=folder, budget_gb=budget_gb, progress=False)


def store_of(folder: Path) -> Path:
    (store,) = (path for path in (folder / "decoded").iterdir() if path.is_dir())
    return store


# What it gives ----------------------------------------------------------------------------------------------------


def test_the_store_gives_the_files_own_pixels_and_decodes_them_once(tmp_path: Path) -> None:
    source = files(tmp_path / "data", 7)
    before = image_files.decodes()
    first = opened(source, tmp_path / "cache")
    assert image_files.decodes() - before == 14
    assert first.num_stored == 7
    second = opened(source, tmp_path / "cache")
    for index in range(7):
        first.load(index)
        second.load(index)
    assert image_files.decodes() - before == 14
    assert_same(second, source)


def test_the_data_folder_may_be_read_only_and_is_left_alone(tmp_path: Path) -> None:
    source = files(tmp_path / "data", 2)
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    opened(source, tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before


def test_samples_are_views_that_cannot_be_written(tmp_path: Path) -> None:
    sample = opened(Drawn(2), tmp_path).load(1)
    for array in sample:
        assert not array.flags.owndata
        assert array.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_any_source_can_be_stored(tmp_path: Path) -> None:
    source = Drawn(11)
    cached = opened(source, tmp_path)
    assert source.loads == 11
    assert_same(cached, Drawn(11))
    assert source.loads == 11


def test_without_a_folder_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANCE_SEG_CACHE", str(tmp_path / "here"))
    open_cache(Drawn(2), progress=False)
    assert store_of(tmp_path / "here").is_dir()


def test_pickling_carries_the_path_and_not_the_pixels(tmp_path: Path) -> None:
    source = Drawn(4, size=(200, 300))
    cached = opened(source, tmp_path)
    carried = pickle.dumps(cached)
    assert len(carried) < 2000 < 4 * 200 * 300
    copy = pickle.loads(carried)
    assert_same(copy, Drawn(4, size=(200, 300)))
    assert copy.source.loads == 4  # those that built the store


def test_a_source_of_no_images_or_no_budget_has_no_store(tmp_path: Path) -> None:
    assert len(opened(Drawn(0), tmp_path)) == 0
    assert opened(Drawn(3), tmp_path, budget_gb=0).num_stored == 0
    assert not (tmp_path / "decoded").exists()
    for budget in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"data\.args\.cache_gb"):
            opened(Drawn(3), tmp_path, budget_gb=budget)


# Budget and fingerprint -------------------------------------------------------------------------------------------


def test_images_are_stored_in_order_until_the_budget_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Samples take 560, 616, 672, 560, ... bytes, begun at multiples of 64: 560, 1192, 1888, 2480 after four."""
    small = opened(Drawn(6), tmp_path, budget_gb=2479e-9)
    assert small.num_stored == 3
    assert "3 of 6 images fit" in caplog.text
    assert_same(small, Drawn(6))
    assert (store_of(tmp_path) / "samples.bin").stat().st_size <= 2479
    assert opened(Drawn(6, fingerprint="other"), tmp_path / "b", budget_gb=2480e-9).num_stored == 4


def test_a_larger_budget_fills_the_store_up_and_a_smaller_one_keeps_it(tmp_path: Path) -> None:
    opened(Drawn(6), tmp_path, budget_gb=2000e-9)
    again = Drawn(6)
    assert opened(again, tmp_path, budget_gb=2000e-9).num_stored == 3
    assert again.loads == 0
    assert opened(again, tmp_path, budget_gb=1).num_stored == 6
    loads = again.loads
    assert opened(again, tmp_path, budget_gb=2000e-9).num_stored == 6
    assert again.loads == loads
    assert_same(opened(again, tmp_path), Drawn(6))


def test_a_budget_too_small_for_one_image_stores_none(tmp_path: Path) -> None:
    cached = opened(Drawn(2), tmp_path, budget_gb=1e-9)
    assert cached.num_stored == 0
    assert_same(cached, Drawn(2))


def test_a_changed_file_is_never_served_from_the_store(tmp_path: Path) -> None:
    source = files(tmp_path / "data", 3)
    opened(source, tmp_path / "cache")
    image = Image.fromarray(np.full((9, 13, 3), 200, np.uint8))
    image.save(source.pairs[1].image)
    changed = FileSource(source.pairs, TABLE)
    cached = opened(changed, tmp_path / "cache")
    assert (cached.load(1).image == 200).all()
    assert_same(cached, changed)
    stores = [path for path in (tmp_path / "cache" / "decoded").iterdir() if path.is_dir()]
    assert len(stores) == 2  # the old one is left alone


# Damage -----------------------------------------------------------------------------------------------------------


def cut(store: Path) -> None:
    os.truncate(store / "samples.bin", 100)


def lengthen(store: Path) -> None:
    with open(store / "samples.bin", "ab") as file:
        file.write(b"more")


def flip_in_index(store: Path) -> None:
    data = bytearray((store / "index.npy").read_bytes())
    data[140] ^= 1
    (store / "index.npy").write_bytes(bytes(data))


def break_header(store: Path) -> None:
    (store / "store.json").write_text('{"version": 1')


def other_fingerprint(store: Path) -> None:
    header = json.loads((store / "store.json").read_text()) | {"fingerprint": "of others"}
    (store / "store.json").write_text(json.dumps(header))


def other_version(store: Path) -> None:
    header = json.loads((store / "store.json").read_text()) | {"version": 0}
    (store / "store.json").write_text(json.dumps(header))


def lose_samples(store: Path) -> None:
    (store / "samples.bin").unlink()


def empty_folder(store: Path) -> None:
    shutil.rmtree(store)
    store.mkdir()


@pytest.mark.parametrize(
    "damage",
    [cut, lengthen, flip_in_index, break_header, other_fingerprint, other_version, lose_samples, empty_folder],
)
def test_a_damaged_store_is_built_anew_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    opened(Drawn(5), tmp_path)
    damage(store_of(tmp_path))
    source = Drawn(5)
    cached = opened(source, tmp_path)
    assert caplog.text.count("damaged and is built anew") == 1
    assert source.loads == 5
    assert cached.num_stored == 5
    assert_same(cached, Drawn(5))


def test_a_flipped_bit_in_a_sample_never_reaches_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(Drawn(5), tmp_path)
    path = store_of(tmp_path) / "samples.bin"
    data = bytearray(path.read_bytes())
    data[700] ^= 4  # in the second sample, which begins at 576
    path.write_bytes(bytes(data))
    source = Drawn(5)
    cached = opened(source, tmp_path)
    assert_same(cached, Drawn(5))
    assert_same(cached, Drawn(5))
    assert source.loads == 2  # once for each time it was asked for
    assert caplog.text.count("d1 is damaged in the store") == 1
    caplog.clear()
    again = Drawn(5)
    assert_same(opened(again, tmp_path), Drawn(5))
    assert "built anew" in caplog.text
    assert again.loads == 5


# A disk that is full, or may not be written ----------------------------------------------------------------------


def test_a_full_disk_means_decoding_each_time_and_a_warning_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, written = os.write, []

    def full(descriptor: int, data: memoryview) -> int:
        written.append(len(data))
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    cached = opened(Drawn(5), tmp_path)
    monkeypatch.undo()
    assert f"{tmp_path / 'decoded'}: decoded images cannot be kept there (No space left" in caplog.text
    assert cached.num_stored == 0
    assert_same(cached, Drawn(5))
    assert [path.suffix for path in (tmp_path / "decoded").iterdir()] == [".lock"]  # nothing half done is left


def test_a_disk_that_will_not_do_is_noticed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    source = Drawn(500)
    assert opened(source, tmp_path).num_stored == 0
    assert "0.00 GB are free" in caplog.text
    assert source.loads < 100


def test_a_folder_that_cannot_be_made_means_decoding_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cached = opened(Drawn(2), tmp_path / "file")
    assert "cannot be kept there" in caplog.text
    assert_same(cached, Drawn(2))


def test_a_bad_file_is_an_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = files(tmp_path / "data", 4)
    source.pairs[2].image.write_bytes(b"no picture at all")
    with pytest.raises(DataError, match=r"2\.png is neither PNG nor JPEG"):
        opened(source, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "decoded").iterdir()] == [".lock"]


# Several processes ------------------------------------------------------------------------------------------------


def test_who_comes_second_waits_for_the_builder_and_decodes_nothing(tmp_path: Path) -> None:
    sources = [Drawn(30, wait=0.02), Drawn(30, wait=0.02)]
    cached: list[CachedSource] = []
    threads = [threading.Thread(target=lambda s=source: cached.append(opened(s, tmp_path))) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(source.loads for source in sources) == [0, 30]
    for one in cached:
        assert_same(one, Drawn(30))


def test_a_builder_without_a_sign_of_life_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(Drawn(3), tmp_path)
    shutil.rmtree(store_of(tmp_path))
    (lock,) = (tmp_path / "decoded").glob("*.lock")
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a stopped process would
        cached = open_cache(Drawn(3), folder=tmp_path, progress=False, patience_seconds=0.3)
    assert "no sign of life" in caplog.text
    assert cached.num_stored == 3
    assert_same(cached, Drawn(3))


def test_two_builders_without_a_lock_both_end_with_a_good_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_cache, "fcntl", None)
    sources = [Drawn(20, wait=0.01), Drawn(20, wait=0.01)]
    cached: list[CachedSource] = []
    threads = [threading.Thread(target=lambda s=source: cached.append(opened(s, tmp_path))) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [one.num_stored for one in cached] == [20, 20]
    for one in cached:
        assert_same(one, Drawn(20))
    assert len([path for path in (tmp_path / "decoded").iterdir() if path.is_dir()]) == 1


BUILD = """
import sys, time
from pathlib import Path
import numpy as np
from dance_seg.sample import Sample
from datamodules.decoded_cache import open_cache

class Slow:
    names = groups = tuple(str(i) for i in range(40))
    fingerprint = "slow"
    def __len__(self):
        return 40
    def load(self, index):
        time.sleep(float(sys.argv[2]))
        return Sample(np.full((20, 30, 3), index, np.uint8), np.full((20, 30), index, np.uint8))

cached = open_cache(Slow(), folder=Path(sys.argv[1]), progress=False)
assert all((cached.load(i).image == i).all() and (cached.load(i).label == i).all() for i in range(40))
print(cached.num_stored)
"""


def start_building(folder: Path, wait: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder), str(wait)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_a_killed_builder_blocks_nobody_and_two_processes_build_at_once(tmp_path: Path) -> None:
    killed = start_building(tmp_path, 0.5)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("decoded/*.partial/samples.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    both = [start_building(tmp_path, 0.01) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == ["40", "40"]
    assert [process.returncode for process in both] == [0, 0]


def test_what_a_killed_builder_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    opened(Drawn(2), tmp_path)
    store = store_of(tmp_path)
    name = store.name
    shutil.rmtree(store)
    for age, suffix in ((7200, "old"), (10, "new")):
        left = tmp_path / "decoded" / f"{name}.1-{suffix}.partial"
        left.mkdir()
        for path in (left / "samples.bin", left):
            path.touch()
            os.utime(path, (time.time() - age,) * 2)
    opened(Drawn(2), tmp_path)
    assert [path.name for path in (tmp_path / "decoded").glob("*.partial")] == [f"{name}.1-new.partial"]


def test_forked_workers_share_what_has_been_checked(tmp_path: Path) -> None:
    cached = opened(Drawn(2), tmp_path)
    child = os.fork()
    if child == 0:
        cached.load(1)
        os._exit(0)
    os.waitpid(child, 0)
    assert list(cached._checked[:2]) == [0, 1]


# Memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(count: int, folder: Path) -> int:
    """The peak of allocated memory while a store of `count` images of 480,000 bytes is built and read twice."""
    tracemalloc.start()
    cached = opened(Drawn(count, size=(300, 400), fingerprint=f"{count}"), folder)
    for index in [*range(count)] * 2:
        cached.load(index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    few, many = peak_bytes(40, tmp_path), peak_bytes(200, tmp_path)
    assert many - few < 2 * 480_000 < 160 * 480_000
