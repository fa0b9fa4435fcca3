"""Scenario 19: a worker that crashes, hangs or raises is named with its file and replaced, and leaves no zombie."""

import multiprocessing
import os
import signal
import time
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

import datamodules.workers as workers
from dance_seg.errors import DataError
from datamodules.shapes import ShapesDataModule
from datamodules.transforms import worker_init

SMALL = {"num_train": 12, "num_val": 5, "size": [64, 64], "crop": [64, 64], "batch_size": 4, "worker_timeout": 5.0}


class Faulty:
    """A source whose workers come to harm at one image: once, or each time."""

    def __init__(self, source, index, harm, marker=None):
        self.source, self.index, self.harm, self.marker = source, index, harm, marker
        self.names, self.groups, self.fingerprint = source.names, source.groups, source.fingerprint

    def __len__(self):
        return len(self.source)

    def load(self, index):
        if index == self.index and get_worker_info() is not None and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            self.harm()
        return self.source.load(index)


def crash(number):
    os.kill(os.getpid(), number)
    time.sleep(10)


def hang():
    time.sleep(1000)


def fail():
    raise RuntimeError("a decoder's bug")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Makes a data module whose training images come to harm."""
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.3)

    def made(harm=None, *, split="train", count=2, once=True):
        module = ShapesDataModule(**SMALL, workers=count, cache_dir=str(tmp_path / "cache"))
        module.fit_to(stride=32, epochs=2, seed=0, data_slimming=None)
        if harm is not None:
            marker = tmp_path / "harmed" if once else None
            module._sources[split] = Faulty(module.source(split), 3, harm, marker)
        return module

    yield made
    assert not [child for child in multiprocessing.active_children() if not child.is_alive()]


def batches(loader):
    return [(batch.names, batch.images.clone(), batch.labels.clone()) for batch in loader]


def same(one, other):
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (partial(crash, signal.SIGSEGV), "ended with SIGSEGV"),
        pytest.param(partial(crash, signal.SIGBUS), "ended with SIGBUS", marks=pytest.mark.slow),  # /dev/shm is full
        pytest.param(partial(crash, signal.SIGKILL), "ended with SIGKILL", marks=pytest.mark.slow),  # out of memory
        (hang, "gave nothing for"),
    ],
    ids=["segfault", "bus error", "killed", "hang"],
)
@pytest.mark.parametrize("split", ["train", pytest.param("val", marks=pytest.mark.slow)])
def test_workers_that_fail_once_are_replaced_and_the_batches_are_the_same(harm, said, split, data):
    loader = {"train": "train_dataloader", "val": "val_dataloader"}[split]
    expected = batches(getattr(data(count=0), loader)())
    module = data(harm, split=split)
    name = module.source(split).names[3]
    with pytest.warns(
        UserWarning, match=rf"worker \d \(process \d+\) {said}.* at {name}, for batch \d.*restart 1 of 3"
    ):
        found = batches(getattr(module, loader)())
    assert same(found, expected)


def test_a_loader_of_torch_before_it_does_not_raise_where_the_program_is(data, monkeypatch):
    """The handler that torch's first loader with workers installs raises in whatever runs when one is killed."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    list(DataLoader(torch.zeros(4), num_workers=1))
    assert signal.getsignal(signal.SIGCHLD) not in (signal.SIG_DFL, None)
    with pytest.warns(UserWarning, match="gave nothing for"):
        assert len(batches(data(hang).train_dataloader())) == 3


def test_a_file_that_fails_each_time_ends_the_run_with_its_name(data):
    before = set(multiprocessing.active_children())  # of other tests: workers that wait for their loader's collection
    module = data(partial(crash, signal.SIGSEGV), once=False)
    name = module.source("train").names[3]
    with (
        pytest.warns(UserWarning, match="restart 3 of 3"),
        pytest.raises(DataError, match=rf"^{name}: worker .*SIGSEGV"),
    ):
        batches(module.train_dataloader())
    assert not set(multiprocessing.active_children()) - before


@pytest.mark.parametrize("count", [0, 2])
def test_whatever_a_source_raises_names_the_file(count, data, monkeypatch):
    module = data(fail, once=False, count=count)
    if not count:
        monkeypatch.setattr("tests.durability.test_workers.get_worker_info", lambda: "here")
    name = module.source("train").names[3]
    with pytest.raises(DataError, match=rf"^{name}: cannot be loaded \(RuntimeError: a decoder's bug\)$"):
        batches(module.train_dataloader())


def test_workers_that_died_between_two_epochs_are_replaced(data):
    module, plain = data(), data(count=0)
    first = batches(module.train_dataloader())
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    for one in (module, plain):
        one.batches.set_position(1)
    with pytest.warns(UserWarning, match="ended with SIGKILL"):
        second = batches(module.train_dataloader())
    assert same(second, batches(plain.train_dataloader()))
    assert not same(first, second)


def test_without_it_a_crash_names_no_file_and_a_hang_has_no_end(data):
    """What torch's own loader does; a hang is shown by its deadline, which is none unless somebody sets one."""
    module = data(partial(crash, signal.SIGSEGV), once=False)
    loader = module.train_dataloader().loader
    bare = DataLoader(loader.dataset, batch_sampler=module.batches, num_workers=1, collate_fn=loader.collate_fn)
    with pytest.raises(RuntimeError) as error:
        list(bare)
    assert module.source("train").names[3] not in str(error.value)
    assert bare.timeout == 0


def test_a_worker_leaves_signals_of_the_terminal_to_the_main_process():
    def kept():
        worker_init(0)
        os._exit(int(any(signal.getsignal(number) != signal.SIG_IGN for number in (signal.SIGINT, signal.SIGUSR1))))

    child = multiprocessing.get_context("fork").Process(target=kept)
    child.start()
    child.join(20)
    assert child.exitcode == 0


@pytest.mark.slow
def test_the_number_of_workers_changes_no_sample_and_no_weight(tmp_path):
    from dance_seg.build import train
    from datamodules import build_datamodule
    from tests.durability.small import small
    from tools.chaos import differing, end_of

    ends = []
    for count in (0, 1, 2):
        recipe = small("dance", f"data.args.workers={count}", cache=tmp_path / "cache")
        ends.append(end_of(train(recipe, build_datamodule(recipe), tmp_path / str(count))))
    assert not differing(ends[0], ends[1])
    assert not differing(ends[0], ends[2])
    other = small("dance", "seed=1", cache=tmp_path / "cache")
    assert "state_dict" in differing(ends[0], end_of(train(other, build_datamodule(other), tmp_path / "other")))
