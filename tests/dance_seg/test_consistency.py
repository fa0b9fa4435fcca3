"""Temporal consistency on pictures that move by whole pixels, where what fits and what does not is counted by hand."""

import cv2
import numpy as np
import pytest

from dance_seg.consistency import TemporalConsistency, optical_flow, visible, warp_labels
from dance_seg.sample import IGNORE

SIZE = (96, 128)


def texture(seed: int = 0) -> np.ndarray:
    """A picture in which every place looks different: 96 rows, twice 128 columns to cut frames from."""
    random = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(random.standard_normal((SIZE[0], 2 * SIZE[1], 3)).astype(np.float32), (0, 0), 2)
    return cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def panned(picture: np.ndarray, shift: int) -> np.ndarray:
    """A frame of the picture; a larger shift moves what it shows to the left."""
    return np.ascontiguousarray(picture[:, 40 + shift : 40 + shift + SIZE[1]])


def test_the_flow_of_a_pan_is_its_shift():
    picture = texture()
    flow = optical_flow(panned(picture, 0), panned(picture, 6))
    middle = flow[10:-10, 20:-20]
    assert np.abs(middle - (-6, 0)).max() < 0.3


def test_labels_are_taken_from_where_the_flow_points():
    """One row of columns 0 to 5, every pixel coming from two to the right: the last two come from outside."""
    labels = np.arange(6, dtype=np.uint8)[None]
    flow = np.full((1, 6, 2), (2, 0), np.float32)
    assert warp_labels(labels, flow).tolist() == [[2, 3, 4, 5, IGNORE, IGNORE]]
    down = np.zeros((3, 1, 2), np.float32)
    down[..., 1] = 1.4  # the nearest pixel is one below
    assert warp_labels(np.uint8([[7], [8], [9]]), down).ravel().tolist() == [8, 9, IGNORE]


def test_a_pixel_is_visible_when_the_flow_back_returns_to_it():
    """There 4 to the right, back 4 to the left: seen. Back 1 to the left: off by 3, 9 > 0.01 * (16 + 1) + 0.5.

    Off by half a pixel: 0.25 < 0.01 * (16 + 12.25) + 0.5. Pointing outside: not seen.
    """
    flow = np.zeros((1, 9, 2), np.float32)
    flow[..., 0] = 4
    back = np.zeros((1, 9, 2), np.float32)
    back[0, 4:, 0] = (-4, -1, -3.5, -4, -4)
    assert visible(flow, back).tolist() == [[True, False, True, True, True, False, False, False, False]]


def test_predictions_that_move_with_the_picture_are_consistent():
    picture = texture()
    regions = cv2.resize(np.random.default_rng(1).integers(0, 4, (8, 16), dtype=np.uint8), (256, 96), interpolation=0)
    metric = TemporalConsistency(4)
    for shift in (0, 5, 10, 14):
        metric.update(panned(picture, shift), panned(regions, shift))
    found = metric.compute()
    assert found.miou > 99
    assert found.frame_pairs == 3
    assert 85 < found.compared < 100  # 14 columns of 3 times 128 have left the picture, and a few are uncertain


def test_predictions_that_stay_where_they_were_while_the_picture_moves_are_not():
    """The outline stays at column 64 while the picture moves 8 to the left: the strip between 56 and 64 disagrees.

    Of 120 columns seen twice (the last 8 are new) class 0 has 56 of 64 in common and class 1 56 of 64: both 87.5.
    """
    picture, prediction = texture(), np.zeros(SIZE, np.uint8)
    prediction[:, 64:] = 1
    metric = TemporalConsistency(2)
    metric.update(panned(picture, 0), prediction)
    metric.update(panned(picture, 8), prediction)
    found = metric.compute()
    assert found.iou == pytest.approx((100 * 56 / 64, 100 * 56 / 64), abs=1.5)
    assert found.compared == pytest.approx(100 * 120 / 128, abs=2.5)


def test_what_is_covered_in_one_frame_is_left_out(monkeypatch):
    """Forward, columns 8 to 15 of 32 move on by 20, so they do not return: the disagreement there is not counted.

    24 of 32 columns are compared, all alike.
    """
    still, leaving = np.zeros((32, 32, 2), np.float32), np.zeros((32, 32, 2), np.float32)
    leaving[:, 8:16, 0] = 20
    flows = iter([still, leaving])  # backward, forward
    monkeypatch.setattr("dance_seg.consistency.optical_flow", lambda start, end: next(flows))
    frame, before = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    after = before.copy()
    after[:, 8:16] = 1
    metric = TemporalConsistency(2)
    metric.update(frame, before)
    metric.update(frame, after)
    assert metric.compute() == (100, (100, None), 1, 75)


def test_a_new_clip_is_not_compared_with_the_last():
    picture, prediction = texture(), np.zeros(SIZE, np.uint8)
    metric = TemporalConsistency(2)
    metric.update(panned(picture, 0), prediction)
    metric.start()
    metric.update(panned(texture(9), 0), prediction + 1)
    with pytest.raises(ValueError, match="0 pairs of frames"):
        metric.compute()


def test_sizes_that_differ_and_frames_too_small_are_errors():
    metric = TemporalConsistency(2)
    with pytest.raises(ValueError, match="prediction"):
        metric.update(np.zeros((40, 40, 3), np.uint8), np.zeros((40, 41), np.uint8))
    metric.update(np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8))
    with pytest.raises(ValueError, match="start"):
        metric.update(np.zeros((40, 48, 3), np.uint8), np.zeros((40, 48), np.uint8))
    with pytest.raises(ValueError, match="too small"):
        optical_flow(np.zeros((8, 90, 3), np.uint8), np.zeros((8, 90, 3), np.uint8))
