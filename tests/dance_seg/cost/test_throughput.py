"""Which batches are tried and why no larger one is, with made-up milliseconds."""

import itertools

import pytest
import torch
from torch import nn

from dance_seg.cost import throughput
from dance_seg.cost.latency import Latency
from dance_seg.cost.throughput import measure_throughput

MODEL = nn.Conv2d(3, 4, 1)


def milliseconds(monkeypatch, ms_of_batch):
    """Let each batch take so many milliseconds."""

    def measured(model, size, *, batch, **options):
        ms = ms_of_batch(batch)
        return Latency(ms, ms, ms, 5, batch, "cpu", "float32", size, 1)

    monkeypatch.setattr(throughput, "measure_latency", measured)


def test_it_ends_after_two_doublings_without_gain_and_names_the_best(monkeypatch):
    """A millisecond and a half for each image, and 10 for any batch up to 4; larger ones take 2 ms an image."""
    milliseconds(monkeypatch, lambda batch: 10 + 1.5 * batch if batch <= 4 else 10 + 4 * batch)
    found = measure_throughput(MODEL, (4, 4))
    assert [batch for batch, _ in found.tried] == [1, 2, 4, 8, 16]
    assert (found.batch, found.images_per_second) == (4, 4000 / 16)
    assert found.ended_by == "two doublings brought no gain"


def test_a_gain_below_two_in_a_hundred_is_none(monkeypatch):
    milliseconds(monkeypatch, lambda batch: 10.0 * batch / (1.01 if batch > 1 else 1))
    found = measure_throughput(MODEL, (4, 4))
    assert [batch for batch, _ in found.tried] == [1, 2, 4]


def test_a_batch_that_would_go_beyond_the_time_is_not_tried(monkeypatch):
    """Seven runs, each twice as long as those of the batch before, at a clock that stands still."""
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: 0.0)
    milliseconds(monkeypatch, lambda batch: 1000.0 + batch)
    found = measure_throughput(MODEL, (4, 4), time_limit_s=10)
    assert [batch for batch, _ in found.tried] == [1]
    assert found.ended_by == "batch 2 would go beyond the time limit of 10 s"


def test_half_of_the_free_memory_is_left(monkeypatch):
    """One image: (3 + 4) x 16 numbers of 4 bytes are 448 bytes; of 4000 free bytes four fit into half, eight do not."""
    monkeypatch.setattr(throughput, "free_bytes", lambda device: 4000)
    milliseconds(monkeypatch, lambda batch: 1.0)
    found = measure_throughput(MODEL, (4, 4))
    assert [batch for batch, _ in found.tried] == [1, 2, 4]
    assert found.ended_by == "batch 8 would take over half of the free memory"


def test_a_batch_that_does_not_fit_ends_the_search_unless_it_is_the_first(monkeypatch):
    def refuse_from(smallest):
        def ms(batch):
            if batch >= smallest:
                raise torch.OutOfMemoryError("too much")
            return 1.0

        milliseconds(monkeypatch, ms)

    refuse_from(4)
    found = measure_throughput(MODEL, (4, 4))
    assert (found.batch, found.ended_by) == (2, "batch 4 does not fit into the memory")
    refuse_from(1)
    with pytest.raises(torch.OutOfMemoryError):
        measure_throughput(MODEL, (4, 4))


def test_there_is_a_largest_batch(monkeypatch):
    clock = itertools.repeat(0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(throughput, "MOST_BATCH", 8)
    milliseconds(monkeypatch, lambda batch: 1.0)
    assert [batch for batch, _ in measure_throughput(MODEL, (4, 4)).tried] == [1, 2, 4, 8]
