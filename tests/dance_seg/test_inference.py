"""Windows, scales and mirroring against plain loops over whole arrays, and the protocol that names them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dance_seg.inference import (
    WHOLE,
    Protocol,
    evaluate,
    mean_probabilities,
    predict,
    predict_labels,
    predictions,
    slide,
)
from dance_seg.models.smp import SmpModel
from datamodules import build_datamodule
from tests.tiny import tiny


@pytest.fixture
def model():
    """A network whose output depends on where a window ends, since it pads with zeros."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 5, padding=2), nn.Tanh(), nn.Conv2d(6, 4, 3, padding=1))


class Offset(nn.Module):
    """A network that says how many windows it has seen: what averaging does can then be computed by hand."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return torch.full((len(images), 2, *images.shape[-2:]), float(self.calls))


def whole_logits(model, images, size):
    return F.interpolate(model(images), size=size, mode="bilinear", align_corners=False)


# predict_labels ---------------------------------------------------------------------------------------------------


def test_labels_are_predicted_at_the_labels_size_by_bilinear_logits():
    model = nn.Conv2d(3, 5, 1)
    images = torch.randn(2, 3, 20, 30)
    for size in ((20, 30), (41, 63)):
        assert torch.equal(predict_labels(model, images, size).long(), whole_logits(model, images, size).argmax(1))


def test_the_whole_image_once_is_predict_labels(model):
    images = torch.randn(2, 3, 40, 50)
    smp = SmpModel(arch="fpn", encoder_name="resnet18", num_classes=5).eval()
    for network in (model, smp):
        for size in ((40, 50), (80, 100)):
            expected = predict_labels(network, images, size)
            assert torch.equal(predict(network, images, size), expected)
            assert torch.equal(predict(network, images, size, Protocol(window=(64, 64))), expected)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "protocol",
    [WHOLE, Protocol(window=(4, 4)), Protocol(flip=True), Protocol(scales=(0.5,)), Protocol(window=(4, 4), flip=True)],
    ids=str,
)
def test_logits_that_are_not_finite_are_an_error_and_no_label(protocol, value):
    """Minus infinity too, of which a softmax would make a plain zero."""

    class Diverged(nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), 3, *images.shape[-2:])
            logits[:, 1, 0, 0] = float(value)
            return logits

    with pytest.raises(ValueError, match="NaN or infinite"):
        predict(Diverged(), torch.randn(1, 3, 8, 8), (8, 8), protocol)


# Windows ----------------------------------------------------------------------------------------------------------


def test_overlapping_windows_are_averaged_and_the_last_ends_at_the_border():
    """Width 7, window 4, stride 2: windows at 0, 2 and, shifted by one, 3; they give 1, 2 and 3.

    Columns 0, 1 are seen by the first; 2 by the first and second; 3 by all; 4, 5 by the second and third; 6 by the
    third: 1, 1, 3/2, 2, 5/2, 5/2, 3.
    """
    logits = slide(Offset(), torch.zeros(1, 3, 4, 7), Protocol(window=(4, 4), stride=(4, 2)))
    assert logits[0, 0, 0].tolist() == [1, 1, 1.5, 2, 2.5, 2.5, 3]


def mmsegmentation_starts(length, window, stride):
    """The corners that MMSegmentation's slide_inference visits."""
    starts = []
    for index in range(max(length - window + stride - 1, 0) // stride + 1):
        end = min(index * stride + window, length)
        starts.append((max(end - window, 0), end))
    return starts


@pytest.mark.parametrize(("size", "window", "stride"), [((30, 41), (12, 16), (8, 11)), ((9, 40), (12, 16), (12, 16))])
def test_windows_are_those_of_mmsegmentation_and_their_mean_a_plain_loops(model, size, window, stride):
    images, protocol = torch.randn(2, 3, *size), Protocol(window=window, stride=stride)
    rows, columns = (mmsegmentation_starts(*given) for given in zip(size, window, stride, strict=True))
    assert protocol.windows(*size) == [(slice(*row), slice(*column)) for row in rows for column in columns]
    total, count = torch.zeros(2, 4, *size), torch.zeros(size)
    for top, bottom in rows:
        for left, right in columns:
            total[..., top:bottom, left:right] += model(images[..., top:bottom, left:right])
            count[top:bottom, left:right] += 1
    expected = total / count
    assert torch.allclose(slide(model, images, protocol), expected, atol=1e-6)
    larger = (2 * size[0], 2 * size[1])
    found = predict(model, images, larger, protocol)
    resized = F.interpolate(slide(model, images, protocol), size=larger, mode="bilinear", align_corners=False)
    assert torch.equal(found.long(), resized.argmax(1))


def test_the_default_stride_is_two_thirds_of_the_window():
    assert Protocol(window=(769, 512)).stride == (513, 341)


# Scales and mirroring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, (16, 20)])
def test_probabilities_of_scales_and_mirrored_images_are_averaged_at_the_labels_size(model, window):
    images, size = torch.randn(2, 3, 24, 32), (36, 48)
    protocol = Protocol(scales=(0.5, 1, 1.25), flip=True, window=window)
    expected = torch.zeros(2, 4, *size)
    for given in ((12, 16), (24, 32), (30, 40)):
        smaller = given[0] < 24
        scaled = F.interpolate(images, size=given, mode="bilinear", align_corners=False, antialias=smaller)
        for mirrored in (False, True):
            view = scaled.flip(-1) if mirrored else scaled
            logits = slide(model, view, protocol) if window else model(view)
            resized = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            probabilities = resized.softmax(1)
            expected += probabilities.flip(-1) if mirrored else probabilities
    expected /= 6
    found = mean_probabilities(model, images, size, protocol)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(2, *size), atol=1e-5)
    labels = predict(model, images, size, protocol)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), found.argmax(1))


def test_a_mean_of_probabilities_is_not_the_mean_of_logits():
    """Two views say class 0 by 3.5, softmax 0.97 against 0.03; one says class 1 by 100, softmax 1.

    Probabilities add up to 1.94 against 1.06, logits to 7 against 100.
    """

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.said = iter([(3.5, 0.0), (3.5, 0.0), (0.0, 100.0)])

        def forward(self, images):
            return torch.tensor(next(self.said)).view(1, 2, 1, 1).expand(1, 2, *images.shape[-2:])

    labels = predict(Views(), torch.zeros(1, 3, 8, 8), (8, 8), Protocol(scales=(0.5, 1, 2)))
    assert (labels == 0).all()


def test_extreme_logits_give_probabilities_and_no_overflow():
    class Extreme(nn.Module):
        def forward(self, images):
            return torch.tensor([1e30, -1e30, 0.0]).view(1, 3, 1, 1).expand(1, 3, *images.shape[-2:])

    found = mean_probabilities(Extreme(), torch.zeros(1, 3, 4, 4), (4, 4), Protocol(flip=True))
    assert found[0, :, 0, 0].tolist() == [1, 0, 0]


def test_a_network_that_leaves_the_last_resize_to_others_gives_the_same_probabilities():
    smp = SmpModel(arch="fpn", encoder_name="resnet18", num_classes=5).eval()
    images, protocol = torch.randn(1, 3, 45, 67), Protocol(scales=(1, 1.5), flip=True)
    plain = nn.Sequential(smp)  # hides coarse_logits
    with torch.no_grad():
        found = mean_probabilities(smp, images, (60, 90), protocol)
        assert torch.allclose(found, mean_probabilities(plain, images, (60, 90), protocol), atol=1e-5)


def test_a_mirrored_network_sees_the_same_after_flipping(model):
    """The mean over an image and its mirror image is mirrored when the image is."""
    images, protocol = torch.randn(1, 3, 16, 24), Protocol(flip=True)
    found = mean_probabilities(model, images, (16, 24), protocol)
    mirrored = mean_probabilities(model, images.flip(-1), (16, 24), protocol)
    assert torch.allclose(found, mirrored.flip(-1), atol=1e-6)


def test_memory_is_one_array_per_class_and_not_one_per_view(model, monkeypatch):
    """Only `mean_probabilities` makes an array of all classes at the labels' size, and one."""
    made = []
    zeros = torch.zeros

    def counted(*size, **how):
        made.append(size)
        return zeros(*size, **how)

    monkeypatch.setattr(torch, "zeros", counted)
    predict(model, torch.randn(1, 3, 16, 16), (32, 32), Protocol(scales=(0.5, 1, 2), flip=True))
    assert made == [(1, 4, 32, 32)]


# The protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (0,)}, "scales holds 0"),
        ({"scales": (float("nan"),)}, "scales holds nan"),
        ({"scales": (9.0,)}, "from 0.1 to 4"),
        ({"scales": (1, 1.0)}, "each once"),
        ({"scales": 1.0}, "scales is 1.0"),
        ({"flip": "yes"}, "flip is 'yes'"),
        ({"window": (0, 5)}, "window"),
        ({"window": (5,)}, "window"),
        ({"window": (5.0, 5)}, "window"),
        ({"stride": (5, 5)}, "no window"),
        ({"window": (8, 8), "stride": (9, 8)}, "left out"),
        ({"window": (8, 8), "stride": (0, 8)}, "stride"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Protocol(**given)


def test_a_protocol_says_what_it_is_and_can_be_kept_as_json():
    protocol = Protocol(scales=[0.75, 1, 1.25], flip=True, window=[512, 1024])
    assert str(protocol) == (
        "windows of 512 x 1024 every 341 x 683 pixels, mean of scales 0.75, 1 and 1.25, mean with horizontal flip"
    )
    assert protocol.as_record() == {
        "scales": [0.75, 1.0, 1.25],
        "flip": True,
        "window": [512, 1024],
        "stride": [341, 683],
    }
    assert Protocol(**protocol.as_record()) == protocol


# A split ----------------------------------------------------------------------------------------------------------


def test_a_split_is_predicted_in_its_order_and_scored_as_its_predictions_are(tmp_path):
    datamodule = build_datamodule(tiny(cache=tmp_path))
    model = SmpModel(arch="fpn", encoder_name="resnet18", num_classes=len(datamodule.classes)).eval()
    source = datamodule.source("val")
    found = list(predictions(model, datamodule, "val", Protocol(flip=True)))
    assert tuple(one.name for one in found) == source.names
    assert all(np.array_equal(one.label, source.load(index).label) for index, one in enumerate(found))
    right = sum(int(((one.prediction == one.label) & (one.label != 255)).sum()) for one in found)
    counted = sum(int((one.label != 255).sum()) for one in found)
    scored = evaluate(model, datamodule, "val", Protocol(flip=True))
    assert scored.pixel_accuracy == pytest.approx(100 * right / counted)
