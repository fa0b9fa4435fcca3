"""Both controllers, against strides worked out by hand."""

import pytest

from dance_seg.distillation.stride import geometric, linear


def run(controller, stride, accuracies, threshold=0.8):
    strides = []
    for accuracy in accuracies:
        stride = controller(stride, accuracy, threshold, 8, 64)
        strides.append(stride)
    return strides


def test_failing_accuracies_take_the_stride_from_64_to_8_in_three_key_frames_and_back():
    assert run(geometric, 64, [0.5, 0.5, 0.5, 0.5]) == [32, 16, 8, 8]
    assert run(geometric, 8, [0.9, 0.9, 0.9, 0.9]) == [16, 32, 64, 64]


def test_an_accuracy_equal_to_the_threshold_halves_the_stride():
    assert geometric(32, 0.8, 0.8, 8, 64) == 16
    assert geometric(32, 0.8 + 1e-9, 0.8, 8, 64) == 64


@pytest.mark.parametrize("controller", [geometric, linear])
@pytest.mark.parametrize("accuracy", [0.0, 0.37, 0.8, 0.83, 1.0])
@pytest.mark.parametrize("stride", [8, 9, 23, 64])
def test_strides_stay_whole_and_within_the_limits(controller, accuracy, stride):
    found = controller(stride, accuracy, 0.8, 8, 64)
    assert type(found) is int
    assert 8 <= found <= 64


def test_the_linear_controller_multiplies_by_rho_on_two_lines():
    """tau 0.8: rho 0.5 at 0.4, 1 at 0.8, 1.5 at 0.9, 2 at 1; times 20, rounded down, at least 8."""
    assert [linear(20, a, 0.8, 8, 64) for a in (0.1, 0.4, 0.8, 0.9, 1.0)] == [8, 10, 20, 30, 40]
    assert linear(21, 0.9, 0.8, 8, 64) == 31  # 31.5
    assert linear(64, 0.79, 0.8, 8, 64) == 63  # 63.2: slower than halving


def test_both_controllers_ask_more_often_the_higher_the_threshold():
    for controller in (geometric, linear):
        strides = [controller(32, 0.85, threshold, 8, 64) for threshold in (0.7, 0.8, 0.84, 0.86, 0.95)]
        assert strides == sorted(strides, reverse=True)
        assert strides[0] > strides[-1]
