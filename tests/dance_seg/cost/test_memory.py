"""Peak memory against sums by hand: float32 has four bytes, and tensors live as long as something needs them."""

import pytest
import torch
from torch import Tensor, nn

from dance_seg.cost.memory import LiveTensors, free_bytes, held_bytes, measure_memory

PIXELS = 10 * 20


def peak(model, *, batch=1, dtype="float32"):
    return measure_memory(model, (10, 20), batch=batch, dtype=dtype).peak_bytes


def test_two_convolutions_hold_the_images_and_what_is_between_them_and_the_output():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    assert peak(model) == 4 * PIXELS * (3 + 8 + 4)
    assert peak(model, batch=5) == 5 * peak(model)


def test_what_nothing_needs_any_more_is_gone():
    """16 channels are there together with the 8 before or the 2 after; the images stay with the caller."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 2, 1), nn.Conv2d(2, 20, 1))
    assert peak(model) == 4 * PIXELS * (3 + 8 + 16)


def test_a_skip_connection_keeps_its_input():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, images: Tensor) -> Tensor:
            kept = self.first(images)
            return kept + self.third(self.second(kept))

    assert peak(Skip()) == 4 * PIXELS * (3 + 8 + 8 + 8)


def test_what_is_done_in_place_and_views_take_nothing():
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2))
    assert peak(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Flatten(2))) == peak(plain)
    assert peak(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())) == peak(plain) + 4 * PIXELS * 8


def test_parameters_and_buffers_are_given_apart_and_shared_ones_count_once():
    """Weight 8 x 8, bias 8; BatchNorm: weight, bias, mean, variance of 8, and the count of batches in 8 bytes."""
    layer = nn.Conv2d(8, 8, 1)
    found = measure_memory(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), layer, layer, nn.BatchNorm2d(8)), (4, 4))
    assert found.parameter_bytes == 4 * (24 + 64 + 8 + 4 * 8) + 8
    assert found.total_bytes == found.peak_bytes + found.parameter_bytes
    assert (found.counted_by, found.device, found.dtype, found.batch) == ("live tensors", "cpu", "float32", 1)


def test_a_constant_of_the_network_was_there_before():
    class AddsConstant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = torch.ones(1, 3, 10, 20)  # no buffer

        def forward(self, images: Tensor) -> Tensor:
            return images + self.constant.view(3, 10, 20)

    assert peak(AddsConstant()) == 4 * PIXELS * (3 + 3)


def test_half_precision_holds_casts_and_halves_results():
    """Images in float32, their cast, the weight's and the bias's casts, and a result of two bytes a number."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    assert peak(model, dtype="bfloat16") == 4 * PIXELS * 3 + 2 * (PIXELS * 3 + 24 + 8) + 2 * PIXELS * 8


def test_the_network_is_left_in_its_mode_and_sees_no_gradient():
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            self.saw = (self.training, torch.is_grad_enabled(), tuple(images.shape))
            return self.layer(images)

    model = Recorder()
    measure_memory(model, (8, 6), batch=3)
    assert model.saw == (False, False, (3, 3, 8, 6))
    assert model.training


def test_memory_that_grows_in_place_is_followed():
    with LiveTensors() as live:
        grown = torch.zeros(10)
        grown.resize_(1000)
    assert live.peak_bytes == 4000


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="batch is 0"):
        measure_memory(nn.Conv2d(3, 1, 1), (4, 4), batch=0)
    with pytest.raises(ValueError, match="input_size"):
        measure_memory(nn.Conv2d(3, 1, 1), (4, 0))
    with pytest.raises(ValueError, match="dtype"):
        measure_memory(nn.Conv2d(3, 1, 1), (4, 4), dtype="int8")


def test_the_memory_that_is_free_is_known_on_linux_and_nowhere_made_up():
    found = free_bytes(torch.device("cpu"))
    assert found is None or found > 1 << 20
    assert free_bytes(torch.device("meta")) is None
    assert held_bytes([]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_on_an_accelerator_the_allocator_counts():
    """The allocator rounds to 512 bytes; workspaces come on top."""
    found = measure_memory(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).cuda(), (100, 200))
    assert found.counted_by == "allocator"
    assert found.peak_bytes >= 4 * 100 * 200 * (3 + 8 + 4)
