"""The confusion matrix against hand arithmetic, a brute-force loop and torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

from dance_seg.metrics import ConfusionMatrix, confusion_matrix, scores
from dance_seg.sample import IGNORE


def random_pair(seed: int, shape: tuple[int, ...], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels with a share of IGNORE; the labels agree with the predictions half of the time."""
    generator = np.random.default_rng(seed)
    predictions = generator.integers(0, num_classes, shape, dtype=np.uint8)
    other = generator.integers(0, num_classes, shape, dtype=np.uint8)
    labels = np.where(generator.random(shape) < 0.5, predictions, other)
    labels[generator.random(shape) < 0.1] = IGNORE
    return predictions, labels


def counted_one_by_one(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> list[list[int]]:
    matrix = [[0] * num_classes for _ in range(num_classes)]
    for prediction, label in zip(predictions.ravel().tolist(), labels.ravel().tolist(), strict=True):
        if label != 255:
            matrix[label][prediction] += 1
    return matrix


def test_rows_are_labels_columns_are_predictions_and_ignored_pixels_are_left_out():
    predictions = np.uint8([[0, 1, 2], [2, 2, 0]])
    labels = np.uint8([[0, 0, 2], [1, 2, 255]])
    assert confusion_matrix(predictions, labels, 3).tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 2]]


def test_scores_by_hand():
    """Matrix [[1, 1, 0], [0, 0, 1], [0, 0, 2]]: right 1, 0, 2; labelled 2, 1, 2; predicted 1, 1, 3.

    IoU 1/2, 0/2, 2/3; pixel accuracy 3/5; accuracy per class 1/2, 0, 1, so 1/2 on average.
    """
    found = scores(np.array([[1, 1, 0], [0, 0, 1], [0, 0, 2]]))
    assert found.iou == pytest.approx((50, 0, 200 / 3))
    assert found.miou == pytest.approx((50 + 0 + 200 / 3) / 3)
    assert found.pixel_accuracy == pytest.approx(60)
    assert found.class_accuracy == pytest.approx(50)
    assert found.accuracies == (50, 0, 100)


def test_a_class_in_neither_labels_nor_predictions_is_none_and_not_in_the_mean():
    found = scores(np.array([[4, 0, 0], [0, 0, 0], [0, 0, 2]]))
    assert found.iou == (100, None, 100)
    assert found.miou == 100
    assert found.class_accuracy == 100


def test_a_class_only_predicted_lowers_the_miou_but_not_the_class_accuracy():
    found = scores(np.array([[3, 1], [0, 0]]))
    assert found.iou == (75, 0)
    assert found.accuracies == (75, None)
    assert found.miou == 37.5
    assert found.class_accuracy == 75


@pytest.mark.parametrize("num_classes", [1, 2, 11, 19, 150, 255])
def test_equals_counting_one_by_one(num_classes):
    predictions, labels = random_pair(num_classes, (37, 53), num_classes)
    assert confusion_matrix(predictions, labels, num_classes).tolist() == counted_one_by_one(
        predictions, labels, num_classes
    )


@pytest.mark.parametrize("form", ["uint8 tensor", "int64 tensor", "int32 array", "not contiguous"])
def test_every_form_of_integers_counts_the_same(form):
    predictions, labels = random_pair(3, (2, 31, 17), 5)
    expected = confusion_matrix(predictions, labels, 5)
    convert = {
        "uint8 tensor": torch.from_numpy,
        "int64 tensor": lambda values: torch.from_numpy(values).long(),
        "int32 array": lambda values: values.astype(np.int32),
        "not contiguous": lambda values: values.transpose(2, 1, 0),
    }[form]
    assert np.array_equal(confusion_matrix(convert(predictions), convert(labels), 5), expected)


@pytest.mark.parametrize("seed", range(5))
def test_miou_equals_torchmetrics_macro_jaccard_also_with_absent_classes(seed):
    predictions, labels = random_pair(seed, (4, 40, 60), 7)  # classes 7, 8 and 9 are absent
    reference = MulticlassJaccardIndex(num_classes=10, ignore_index=IGNORE, average="macro")
    reference.update(torch.from_numpy(predictions).long(), torch.from_numpy(labels).long())
    assert scores(confusion_matrix(predictions, labels, 10)).miou == pytest.approx(
        100 * reference.compute().item(), rel=1e-6
    )


def test_miou_weighs_pixels_over_the_whole_set_not_per_image():
    """Class 1: 100 pixels right in image A, 1 missed in image B: 100 / 101, not (1 + 0) / 2.

    torchmetrics' MeanIoU averages over images, which is another figure than the benchmarks'.
    """
    right_A = np.ones((1, 10, 10), np.uint8)
    labels_B = np.zeros((1, 10, 10), np.uint8)
    labels_B[0, 0, 0] = 1
    missed_B = np.zeros((1, 10, 10), np.uint8)
    metric = ConfusionMatrix(num_classes=2)
    metric.update(right_A, right_A)
    metric.update(missed_B, labels_B)
    per_image = MeanIoU(num_classes=2, per_class=True, input_format="index")
    per_image.update(torch.from_numpy(right_A).long(), torch.from_numpy(right_A).long())
    per_image.update(torch.from_numpy(missed_B).long(), torch.from_numpy(labels_B).long())
    assert metric.compute().iou[1] == pytest.approx(100 * 100 / 101)
    assert per_image.compute()[1].item() == pytest.approx(0.5)


def test_counts_stay_exact_past_two_to_the_31():
    metric = ConfusionMatrix(num_classes=2)
    metric.matrix += torch.tensor([[2**40, 0], [0, 2**31 - 1]])
    metric.update(torch.tensor([1, 1]), torch.tensor([1, 0]))
    assert metric.matrix.tolist() == [[2**40, 1], [0, 2**31]]
    assert metric.compute().iou[1] == 100 * 2**31 / (2**31 + 1)


def test_counts_stay_exact_past_two_to_the_24_pixels_in_one_call():
    """float32 cannot hold 2**24 + 1, and cv2.calcHist returns float32."""
    pixels = np.zeros((1, 2**24 + 3), np.uint8)
    assert confusion_matrix(pixels, pixels, 1).tolist() == [[2**24 + 3]]


@pytest.mark.parametrize("form", [np.uint8, np.int64])
def test_a_prediction_outside_the_classes_on_a_counted_pixel_is_an_error(form):
    predictions, labels = np.array([[0, 3, 3, 1]], form), np.array([[0, 1, 0, 1]], form)
    with pytest.raises(ValueError, match=r"predictions hold 3 \(2 pixels\).*0 to 2"):
        confusion_matrix(predictions, labels, 3)


@pytest.mark.parametrize("value", [-1, 300, 2**40])
def test_a_prediction_that_is_no_byte_is_an_error_and_never_wraps_around(value):
    with pytest.raises(ValueError, match=rf"predictions hold {value} \(1 pixels\)"):
        confusion_matrix(np.array([[0, value]]), np.array([[0, 0]]), 3)


@pytest.mark.parametrize("value", [3, 254, 255, -1, 300])
def test_a_prediction_on_an_ignored_pixel_may_be_anything(value):
    assert confusion_matrix(np.array([[0, value]]), np.array([[0, IGNORE]]), 3).sum() == 1


@pytest.mark.parametrize(
    ("value", "form"), [(3, np.uint8), (254, np.uint8), (3, np.int64), (-1, np.int64), (256, np.int64)]
)
def test_a_label_that_is_neither_class_nor_ignore_is_an_error(value, form):
    with pytest.raises(ValueError, match=rf"labels hold {value} \(1 pixels\)"):
        confusion_matrix(np.array([[0, 0]], form), np.array([[0, value]], form), 3)


def test_different_shapes_logits_and_impossible_class_counts_are_errors():
    byte = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        confusion_matrix(byte, np.zeros((2, 3), np.uint8), 3)
    with pytest.raises(ValueError, match="float32"):
        confusion_matrix(byte.astype(np.float32), byte, 3)
    with pytest.raises(ValueError, match="num_classes is 256"):
        confusion_matrix(byte, byte, 256)


def test_nothing_counted_is_an_error_and_never_a_figure():
    metric = ConfusionMatrix(num_classes=2)
    metric.update(np.zeros((2, 2), np.uint8), np.full((2, 2), IGNORE, np.uint8))
    with pytest.raises(ValueError, match="no pixel was counted"):
        metric.compute()


def test_merged_shards_equal_one_pass_bit_by_bit():
    pairs = [random_pair(seed, (20 + seed, 30), 6) for seed in range(7)]
    whole = ConfusionMatrix(num_classes=6)
    shards = [ConfusionMatrix(num_classes=6) for _ in range(3)]
    for index, (predictions, labels) in enumerate(pairs):
        whole.update(predictions, labels)
        shards[index % 3].update(predictions, labels)
    merged = sum(shard.matrix for shard in shards)
    assert torch.equal(merged, whole.matrix)
    assert scores(merged) == whole.compute()


def test_the_state_is_summed_over_ranks_and_cleared_by_reset():
    metric = ConfusionMatrix(num_classes=2)
    assert metric._reductions["matrix"](torch.ones(3, 2, 2, dtype=torch.int64)).tolist() == [[3, 3], [3, 3]]
    metric.update(torch.tensor([1]), torch.tensor([1]))
    metric.reset()
    assert metric.matrix.tolist() == [[0, 0], [0, 0]]
    assert metric.matrix.dtype == torch.int64
