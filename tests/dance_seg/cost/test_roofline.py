"""Rooflines with made-up clocks, and counts by hand."""

import pytest
import torch
from torch import nn

from dance_seg.cost import roofline as roofline_file
from dance_seg.cost.macs import EVERYTHING_ELSE
from dance_seg.cost.roofline import Peak, Usage, measure_peak, roofline, time_operations, training_usage

PEAK = Peak(gmacs_per_second=100, gigabytes_per_second=10, device="cpu", dtype="float32", threads=1)
MODEL = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"))


def test_the_memory_is_the_bound_below_the_ridge_and_the_products_are_above():
    """100 GMAC/s and 10 GB/s meet at 10 MACs per byte."""
    assert PEAK.ridge == 10
    slow, fast = Usage("slow", macs=8, bytes=1, seconds=1), Usage("fast", macs=12, bytes=1, seconds=1)
    assert (slow.bound(PEAK), fast.bound(PEAK)) == ("memory", "compute")
    assert (PEAK.roof(8), PEAK.roof(12)) == (80, 100)


def test_the_share_is_what_was_attained_of_what_the_roof_allows():
    bound_by_memory = Usage("a", macs=2 * 10**9, bytes=10**9, seconds=0.2)  # 10 GMAC/s of 2 x 10
    assert bound_by_memory.share(PEAK) == bound_by_memory.gmacs_per_second / PEAK.roof(2) == 0.5
    without_products = Usage("b", macs=0, bytes=10**9, seconds=0.4)  # 2.5 of 10 GB/s
    assert without_products.share(PEAK) == 0.25
    assert Usage("c", macs=1, bytes=1, seconds=0).share(PEAK) == 0


def test_operations_are_counted_and_timed_by_kind(monkeypatch):
    """Each look at the clock takes a second, so each operation does: two or more for what is no product."""
    clock = iter(range(100_000))
    monkeypatch.setattr(roofline_file.time, "perf_counter", lambda: float(next(clock)))
    found = {usage.name: usage for usage in time_operations(MODEL, (10, 20), batch=2, time_limit_s=0)}
    assert found.keys() == {"convolution", "interpolation", EVERYTHING_ELSE}
    assert found["convolution"].macs == 2 * 3 * 8 * 200
    assert found["convolution"].bytes == 4 * (2 * 3 * 200 + 24 + 8 + 2 * 8 * 200)
    assert found["interpolation"].macs == 2 * 4 * 8 * 800
    assert found["interpolation"].bytes == 4 * 2 * 8 * (200 + 800)
    assert (found[EVERYTHING_ELSE].macs, found[EVERYTHING_ELSE].bytes) == (0, 4 * 2 * 2 * 8 * 200)
    assert all(usage.seconds == 1 for usage in found.values())


def test_a_network_is_the_sum_of_its_operations_at_the_speed_it_runs():
    operations = (Usage("a", 10, 4, 2.0), Usage("b", 0, 6, 1.0))
    assert roofline(operations, PEAK).total == Usage("whole network", 10, 10, 3.0)
    assert roofline(operations, PEAK, seconds=2.5).total.seconds == 2.5


def test_a_training_has_the_macs_per_byte_of_one_of_its_steps():
    """A convolution 3 -> 8 over 64 pixels forward, and backward its weight's gradient: as many MACs again."""
    one = training_usage(nn.Conv2d(3, 8, 1, bias=False), (8, 8), 2, gmacs=3.0, seconds=1.5)
    images, weight, results = 2 * 3 * 64, 24, 2 * 8 * 64
    forward = images + weight + results
    # The gradient of the outputs is filled with ones, and read with images and weight for that of the weight.
    backward = 2 * results + (results + images + weight + weight)
    assert one is not None
    assert (one.macs, one.seconds, one.gmacs_per_second) == (3_000_000_000, 1.5, 2.0)
    assert one.macs_per_byte == pytest.approx(2 * 2 * 24 * 64 / (4 * (forward + backward)), rel=1e-6)


def test_nothing_trained_is_no_usage():
    for gmacs, seconds in ((0.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)):
        assert training_usage(nn.Conv2d(3, 8, 1), (8, 8), 2, gmacs=gmacs, seconds=seconds) is None
    assert training_usage(nn.ReLU(), (8, 8), 2, gmacs=1.0, seconds=1.0) is None


def test_the_peaks_are_the_fastest_product_and_the_fastest_copy(monkeypatch):
    """256^3 MACs in 1 ms, 512^3 in 4 ms; then the next would be too slow. 1000 bytes there and back in 2 ms."""
    asked = []

    def times(call, **options):
        call()
        asked.append(call)
        return {1: [1.5], 2: [1.0, 2.0], 3: [4.0], 4: [4.0, 5.0], 5: [2.0, 3.0]}[len(asked)]

    monkeypatch.setattr(roofline_file, "measure", times)
    monkeypatch.setattr(roofline_file, "SLOWEST_MS", 31.0)
    monkeypatch.setattr(roofline_file, "COPIED_BYTES", {"cpu": 1000})
    found = measure_peak("cpu", "float32")
    assert found.gmacs_per_second == pytest.approx(512**3 / 4e-3 / 1e9)
    assert found.gigabytes_per_second == pytest.approx(2 * 1000 / 2e-3 / 1e9)
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", torch.get_num_threads())


def test_a_type_without_instructions_for_it_is_tried_once_and_no_further(monkeypatch):
    """A product of the smallest matrices that takes a minute is the only one."""
    calls = []

    def times(call, **options):
        calls.append(options)
        return [60_000.0]

    monkeypatch.setattr(roofline_file, "measure", times)
    monkeypatch.setattr(roofline_file, "COPIED_BYTES", {"cpu": 1000})
    measure_peak("cpu", "float16")
    assert len(calls) == 2  # one product, one copy


def test_a_type_that_does_not_exist_is_an_error_and_the_precision_of_products_is_left(monkeypatch):
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        measure_peak("cpu", "int8")
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(roofline_file, "measure", lambda call, **options: [1000.0])
    monkeypatch.setattr(roofline_file, "COPIED_BYTES", {"cpu": 1000})
    measure_peak()
    assert torch.get_float32_matmul_precision() == before
