"""Scenarios 18, 21, 24, 25 and 26: what their own tests leave out, and their controls."""

import multiprocessing
import os
import signal
import socket
from urllib.request import urlopen

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from dance_seg.build import train
from dance_seg.metrics_file import read_metrics
from dance_seg.models.smp import SmpModel
from dance_seg.stream import follow_stream
from dance_seg.teachers import build_teacher
from dance_seg.tracking import GuardedWandbLogger
from datamodules import build_datamodule
from datamodules.decoded_cache import open_cache
from datamodules.shapes import ShapesDataModule
from datamodules.video import build_source
from tests.durability.small import small
from tests.streams import rows_of, tiny_stream
from tools.chaos import LOADED, train_to_its_end


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


# 18: validation -------------------------------------------------------------------------------------------------------


@pytest.mark.ddp
@pytest.mark.slow
def test_a_rank_without_any_validation_image_changes_no_score_and_hangs_nothing(cache, tmp_path):
    """The same weights on one rank and on two, since no step is taken: one image is scored by rank 0 alone."""
    scores = []
    for ranks in (1, 2):
        changes = ("data.args.num_val=1", "trainer.max_epochs=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0")
        recipe = small("dense", *changes, f"trainer.devices={ranks}", "name=run", cache=cache)
        train_to_its_end(recipe, tmp_path / str(ranks))
        rows = read_metrics(tmp_path / str(ranks) / "run" / "metrics.jsonl")
        scores.append(next(row for row in rows if "val/miou" in row)["val/miou"])
    assert scores[0] == scores[1]


def test_a_sampler_that_pads_would_count_an_image_twice():
    shares = [list(DistributedSampler(range(101), num_replicas=2, rank=rank, shuffle=False)) for rank in (0, 1)]
    assert sum(map(len, shares)) == 102


# 21: caches -----------------------------------------------------------------------------------------------------------


def test_without_its_checksum_a_damaged_store_would_serve_wrong_pixels(tmp_path):
    data = ShapesDataModule(num_train=4, num_val=2, size=[64, 64], crop=[64, 64], batch_size=2, cache_dir=str(tmp_path))
    raw = data.raw_source("train")
    folder = open_cache(raw, folder=tmp_path, progress=False).folder
    damaged = bytearray((folder / "samples.bin").read_bytes())
    damaged[100] ^= 64
    (folder / "samples.bin").write_bytes(damaged)
    guarded, trusting = (open_cache(raw, folder=tmp_path, progress=False) for _ in range(2))
    trusting._checked[0] = 1  # as if it had been verified
    assert np.array_equal(guarded.load(0).image, raw.load(0).image)
    assert not np.array_equal(trusting.load(0).image, raw.load(0).image)


# 24: the tracker ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_the_guard_a_tracker_that_fails_would_stop_the_run(cache, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def fail(*_, **__):
        raise RuntimeError("no tracker today")

    monkeypatch.setattr("wandb.init", fail)
    monkeypatch.setattr(GuardedWandbLogger, "_guard", lambda self, what, act: act(self._start()))
    recipe = small("dense", "tracking.wandb=offline", cache=cache)
    with pytest.raises(RuntimeError, match="no tracker today"):
        train(recipe, build_datamodule(recipe), tmp_path / "run")


# 26: streams ----------------------------------------------------------------------------------------------------------


def follow(folder, dies_at=None):
    """A stream in its own process; `dies_at` is the frame at which its teacher is killed with it."""
    recipe = tiny_stream()
    source = build_source(recipe)
    oracle = build_teacher(recipe, source)
    call = type(oracle).__call__

    def dying(self, frame):
        if frame.index == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, frame)

    type(oracle).__call__ = dying
    # A checkpoint at every frame: what is lost is the frame at hand.
    import dance_seg.stream as stream

    take = stream.StreamRunFiles.take

    def take_and_save(self, *arguments):
        take(self, *arguments)
        self.save()

    stream.StreamRunFiles.take = take_and_save
    follow_stream(recipe, source, folder, oracle, progress=False, say=lambda _: None)


def test_a_stream_that_is_killed_goes_on_with_the_same_strides_and_scores(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)

    def run(*arguments):
        process = context.Process(target=follow, args=arguments)
        process.start()
        process.join(120)
        return process.exitcode

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "killed", 17) == -signal.SIGKILL
    assert len(rows_of(tmp_path / "killed")) == 17
    assert run(tmp_path / "killed") == 0
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


# Downloads ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_server():
    """Takes a connection and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/weights"


def test_weights_of_a_server_that_falls_silent_are_given_up_in_time(silent_server, monkeypatch):
    def fetch(*_, **__):
        with urlopen(silent_server) as answer:  # without a limit of its own, as torch.hub does
            return answer.read()

    monkeypatch.setattr("dance_seg.models.smp.SILENCE_SECONDS", 0.3)
    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", fetch)
    with pytest.raises(ValueError, match=r"the weights of resnet18 could not be fetched .*timed out"):
        SmpModel(arch="fpn", encoder_name="resnet18", num_classes=3, encoder_weights="imagenet")
    assert socket.getdefaulttimeout() is None  # which is the control: nobody else's wait has an end
