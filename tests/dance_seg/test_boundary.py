"""Boundary IoU against eroding every class's mask by 3x3 again and again, in plain NumPy and in OpenCV."""

import cv2
import numpy as np
import pytest

from dance_seg.boundary import BoundaryIoU, band, band_width
from dance_seg.sample import IGNORE


def eroded_once(mask: np.ndarray) -> np.ndarray:
    """A mask without the pixels with one of their eight neighbours outside of it; beyond the image is outside."""
    framed = np.pad(mask, 1)
    height, width = mask.shape
    shifts = [framed[row : row + height, column : column + width] for row in range(3) for column in range(3)]
    return np.logical_and.reduce(shifts)


def band_by_erosion(mask: np.ndarray, width: int) -> np.ndarray:
    inside = mask
    for _ in range(width):
        inside = eroded_once(inside)
    return mask & ~inside


def band_by_opencv(mask: np.ndarray, width: int) -> np.ndarray:
    """The authors' way: a frame of one zero, and `width` erosions by 3 x 3."""
    framed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return mask & (cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1] == 0)


def scene(seed: int, size: tuple[int, int], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A label with regions and ignored pixels, and a prediction with other outlines; class 3 is absent."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, num_classes, (size[0] // 12 + 1, size[1] // 12 + 1), dtype=np.uint8)
    coarse[coarse == 3] = 0
    label = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)
    prediction = np.roll(label, (2, 3), (0, 1))
    prediction[random.random(size) < 0.01] = 1
    label[: size[0] // 5] = IGNORE
    label[random.random(size) < 0.002] = IGNORE
    return prediction, label


def reference(pairs, num_classes, dilation_ratio, find_band=band_by_erosion):
    intersections, unions = np.zeros(num_classes), np.zeros(num_classes)
    for prediction, label in pairs:
        width = max(1, round(dilation_ratio * np.sqrt(label.shape[0] ** 2 + label.shape[1] ** 2)))
        counted = label != IGNORE
        for index in range(num_classes):
            labelled = find_band((label == index) & counted, width)
            predicted = find_band((prediction == index) & counted, width)
            intersections[index] += (labelled & predicted).sum()
            unions[index] += (labelled | predicted).sum()
    return [100 * i / u if u else None for i, u in zip(intersections, unions, strict=True)]


@pytest.mark.parametrize("dilation_ratio", [0.005, 0.02, 0.06])
def test_equals_eroding_each_class_step_by_step_over_images_of_several_sizes(dilation_ratio):
    pairs = [scene(seed, size, 6) for seed, size in enumerate([(60, 80), (61, 95), (33, 120)])]
    metric = BoundaryIoU(6, dilation_ratio)
    for prediction, label in pairs:
        metric.update(prediction, label)
    found = metric.compute()
    expected = reference(pairs, 6, dilation_ratio)
    assert expected[3] is None
    assert found.iou == tuple(expected)
    assert found.iou == tuple(reference(pairs, 6, dilation_ratio, band_by_opencv))
    present = [value for value in expected if value is not None]
    assert found.miou == pytest.approx(sum(present) / 5)


@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_a_band_is_what_many_small_erosions_take_away(width):
    _, label = scene(0, (50, 70), 5)
    found = band(label, width)
    for index in range(5):
        assert np.array_equal(found & (label == index), band_by_opencv(label == index, width))


def test_a_square_by_hand():
    """Image 10 x 10, diagonal 14.1, ratio 0.02 rounds to 0 and is at least 1: bands are one pixel wide.

    Label: a square of 4 x 4 at row 3, column 3, band of 12 pixels. Prediction: the square one column to the right, its
    band too has 12; they share the upper and lower edges' 3 columns of overlap, 6 pixels; the left edge of the
    prediction (column 4) meets the label's inside, its right edge (column 7) is outside the label, the label's right
    edge (column 6) meets the prediction's inside. IoU 6 / (12 + 12 - 6) = 1/3.
    """
    label, prediction = np.zeros((2, 10, 10), np.uint8)
    label[3:7, 3:7] = 1
    prediction[3:7, 4:8] = 1
    metric = BoundaryIoU(2)
    metric.update(prediction, label)
    assert metric.intersections[1], metric.unions[1] == (6, 18)
    assert metric.compute().iou[1] == pytest.approx(100 * 6 / 18)


def test_the_inside_of_a_region_does_not_count():
    """A hole deep inside leaves the band alone, which is why boundary IoU is there."""
    label = np.ones((200, 200), np.uint8)
    prediction = label.copy()
    right = BoundaryIoU(2)
    right.update(prediction, label)
    assert right.compute().iou == (None, 100)
    width = band_width((200, 200))
    prediction[100, 100] = 0
    metric = BoundaryIoU(2)
    metric.update(prediction, label)
    framed = 200**2 - (200 - 2 * width) ** 2
    around = (2 * width + 1) ** 2 - 1
    assert metric.compute().iou == (0, pytest.approx(100 * framed / (framed + around)))


def test_what_is_predicted_where_the_label_is_ignored_changes_nothing():
    prediction, label = scene(1, (60, 80), 5)
    other = prediction.copy()
    other[label == IGNORE] = 254
    found = []
    for given in (prediction, other):
        metric = BoundaryIoU(5)
        metric.update(given, label)
        found.append(metric.compute())
    assert found[0] == found[1]


def test_a_perfect_prediction_beside_an_ignored_region_is_perfect():
    label = np.zeros((80, 80), np.uint8)
    label[30:] = IGNORE
    metric = BoundaryIoU(3)
    metric.update(np.zeros_like(label), label)
    assert metric.compute().iou == (100, None, None)


def test_values_outside_shapes_and_nothing_counted_are_errors():
    byte = np.zeros((40, 40), np.uint8)
    with pytest.raises(ValueError, match=r"predictions hold 7 \(1600 pixels\)"):
        BoundaryIoU(3).update(byte + 7, byte)
    with pytest.raises(ValueError, match=r"labels hold 7"):
        BoundaryIoU(3).update(byte, byte + 7)
    with pytest.raises(ValueError, match=r"predictions hold 255"):
        BoundaryIoU(3).update(byte + 255, byte)
    with pytest.raises(ValueError, match=r"\(40, 40\).*\(40, 41\)"):
        BoundaryIoU(3).update(byte, np.zeros((40, 41), np.uint8))
    with pytest.raises(ValueError, match="int64"):
        BoundaryIoU(3).update(byte.astype(np.int64), byte)
    with pytest.raises(ValueError, match="dilation_ratio"):
        BoundaryIoU(3, dilation_ratio=2)
    empty = BoundaryIoU(3)
    empty.update(byte, byte + 255)
    with pytest.raises(ValueError, match="no pixel"):
        empty.compute()
