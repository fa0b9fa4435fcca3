"""The fast evaluator against F.interpolate followed by argmax: not one pixel may differ."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dance_seg import evaluator
from dance_seg.evaluator import argmax, axis, boundary_cells, labels_from_logits, leaders, resized_argmax


def smooth_logits(seed: int, num_classes: int, size: tuple[int, int], noise: float = 0.2) -> torch.Tensor:
    """Logits as a network gives them: regions with soft boundaries, and a little noise."""
    generator = np.random.default_rng(seed)
    planes = [cv2.GaussianBlur(generator.standard_normal(size), (0, 0), 6) for _ in range(num_classes)]
    regions = np.stack(planes) / np.std(planes)
    return torch.from_numpy((5 * regions + noise * generator.standard_normal(regions.shape)).astype(np.float32))


def reference(logits: torch.Tensor, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    contiguous = logits.float().contiguous()[None]
    return F.interpolate(contiguous, size=size, mode="bilinear", align_corners=align_corners)[0].argmax(0).numpy()


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("num_classes", "given", "size"),
    [
        (11, (90, 120), (360, 480)),  # CamVid at a quarter
        (19, (64, 128), (256, 512)),
        (150, (40, 40), (160, 160)),
        (11, (45, 60), (360, 480)),  # at an eighth
        (11, (90, 120), (361, 479)),  # no whole ratio
        (5, (33, 47), (131, 190)),
        (5, (23, 300), (400, 301)),  # rows far enlarged, columns hardly
        (4, (1, 9), (64, 90)),  # a single row
        (4, (1, 1), (70, 80)),
        (1, (20, 20), (80, 80)),
        (3, (20, 30), (80, 120)),  # torch takes another kernel on one thread
        (6, (100, 120), (150, 180)),  # enlarged too little for the fast way
        (6, (100, 120), (50, 61)),  # smaller
        (6, (100, 20), (50, 400)),  # smaller one way, larger the other
        (19, (16, 16), (64, 64)),  # so small that torch takes another kernel
        (6, (60, 80), (60, 80)),  # as it is
    ],
)
def test_no_pixel_differs_from_interpolate_and_argmax(num_classes, given, size, align_corners):
    logits = smooth_logits(num_classes, num_classes, given)
    found = resized_argmax(logits, size, align_corners=align_corners)
    assert found.dtype == np.uint8
    assert np.array_equal(found, reference(logits, size, align_corners))


def one_unit_below(logits: torch.Tensor) -> torch.Tensor:
    """The same classes twice, the first copy the least bit lower, so that interpolation rounds them to ties."""
    return torch.cat([torch.nextafter(logits, torch.full_like(logits, -1e9)), logits])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        one_unit_below,
        lambda logits: one_unit_below(logits * 1e-41),  # below the smallest normal number
        lambda logits: one_unit_below(torch.full_like(logits, 1.6153851114812539)),
        torch.round,  # many exact ties
        torch.zeros_like,  # nothing but ties
        lambda logits: logits + 1e3,  # few bits left for the difference between classes
        lambda logits: logits + 1e5,
        lambda logits: logits * 1e-30,
        lambda logits: logits * 1e37,
        lambda logits: torch.cat([logits[:3], torch.full_like(logits[:1], -1e9), logits[3:]]),  # a masked class
        lambda logits: logits - 1e9 * (logits > 0),  # corners of one cell far apart
        lambda logits: logits.bfloat16(),
        lambda logits: logits.half(),
        lambda logits: logits.double(),
        lambda logits: logits.permute(1, 2, 0).contiguous().permute(2, 0, 1),  # channels last
    ],
)
@pytest.mark.parametrize("all_cells", [False, True])
@pytest.mark.parametrize("num_classes", [3, 6])
def test_no_pixel_differs_on_logits_made_to_be_hard(change, align_corners, all_cells, num_classes, monkeypatch):
    if all_cells:  # otherwise many boundary cells send the image down the slow path
        monkeypatch.setattr(evaluator, "LARGEST_BOUNDARY", 2.0)
    logits = change(smooth_logits(0, num_classes, (50, 66)))
    found = resized_argmax(logits, (200, 267), align_corners=align_corners)
    assert np.array_equal(found, reference(logits, (200, 267), align_corners))


@pytest.mark.parametrize("align_corners", [True, False])
def test_no_pixel_differs_on_small_outputs_made_to_be_hard(align_corners):
    """Here torch's kernel depends on the size of the output."""
    logits = one_unit_below(smooth_logits(0, 16, (16, 16)))
    found = resized_argmax(logits, (64, 64), align_corners=align_corners)
    assert np.array_equal(found, reference(logits, (64, 64), align_corners))


def test_a_lead_of_one_unit_in_the_last_place_is_lost_to_rounding_somewhere():
    """The reason for TIE: the second copy leads at every corner, and yet the first wins some pixels."""
    logits = one_unit_below(smooth_logits(0, 1, (50, 66)))
    assert (logits[1] > logits[0]).all()
    assert (reference(logits, (200, 267), True) == 0).any()


def test_where_the_arithmetic_is_not_torchs_every_pixel_is_interpolated_by_torch(monkeypatch):
    monkeypatch.setattr(evaluator, "axis", lambda *lengths: None)
    monkeypatch.setattr(evaluator, "fill_boundary", lambda *parts: pytest.fail("the fast way was taken"))
    logits = smooth_logits(1, 5, (40, 50))
    assert np.array_equal(resized_argmax(logits, (160, 200), align_corners=True), reference(logits, (160, 200), True))


def test_the_fast_way_is_taken_for_a_networks_logits(monkeypatch):
    """Otherwise the tests above would prove nothing about it, and the evaluator would be slow."""
    monkeypatch.setattr(evaluator, "argmax_of_every_pixel", lambda *parts: pytest.fail("the slow way was taken"))
    if axis(90, 360, True) is None:
        pytest.skip("torch's arithmetic on this machine is not one of the two known; the slow way is exact")
    resized_argmax(smooth_logits(0, 11, (90, 120)), (360, 480), align_corners=True)


def test_boundary_cells_by_hand():
    labels = np.uint8([[0, 0, 1], [0, 0, 1], [0, 0, 0]])
    close = np.zeros((3, 3), np.uint8)
    assert boundary_cells(labels, close).tolist() == [[False, True, False], [False, True, True], [False, False, False]]
    close[2, 0] = 255
    assert boundary_cells(labels, close)[1:, 0].tolist() == [True, True]


def test_leaders_marks_pixels_where_another_class_is_as_good_as_equal():
    logits = np.float32([[[1, 2, 3]], [[0, 2, 3 + 2**-21]], [[-1, 1, 0]]])
    labels, close = leaders(logits)
    assert labels[0, 0] == 0
    assert (close > 0).tolist() == [[False, True, True]]


@pytest.mark.parametrize("num_pixels", [1, 1000, 2 * evaluator.TILE_PIXELS + 1])
def test_argmax_takes_the_lowest_class_on_ties_across_tiles(num_pixels):
    logits = np.random.default_rng(0).integers(-3, 3, (255, 1, num_pixels)).astype(np.float32)
    assert np.array_equal(argmax(logits), logits.argmax(axis=0))


def test_a_batch_gives_each_image_its_size():
    logits = torch.stack([smooth_logits(seed, 4, (40, 50)) for seed in range(2)])
    both = labels_from_logits(logits, [(160, 200), (120, 150)], align_corners=True)
    assert [labels.shape for labels in both] == [(160, 200), (120, 150)]
    assert np.array_equal(both[1], reference(logits[1], (120, 150), True))
    same = labels_from_logits(logits, (160, 200), align_corners=False)
    assert np.array_equal(same[0], reference(logits[0], (160, 200), False))
    with pytest.raises(ValueError, match="2 images and 3 sizes"):
        labels_from_logits(logits, [(8, 8)] * 3, align_corners=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [(40, 50), (160, 200), (20, 25)])
def test_logits_that_are_not_finite_are_an_error_that_says_how_many(bad, size):
    logits = smooth_logits(0, 4, (40, 50))
    logits[2, 10:12, 20] = bad
    with pytest.raises(ValueError, match="2 of 8000 logits are NaN or infinite"):
        resized_argmax(logits, size, align_corners=True)


def test_large_finite_logits_are_no_error():
    logits = torch.full((2, 4, 4), 3e38)
    assert resized_argmax(logits, (4, 4), align_corners=True).max() == 0


def test_wrong_shapes_and_types_are_errors():
    with pytest.raises(ValueError, match=r"\(C, h, w\).*\(1, 3, 4, 4\)"):
        resized_argmax(torch.zeros(1, 3, 4, 4), (8, 8), align_corners=True)
    with pytest.raises(ValueError, match="1 to 255 classes"):
        resized_argmax(torch.zeros(256, 4, 4), (8, 8), align_corners=True)
    with pytest.raises(ValueError, match="int64"):
        resized_argmax(torch.zeros(3, 4, 4, dtype=torch.int64), (8, 8), align_corners=True)
    with pytest.raises(ValueError, match="size is"):
        resized_argmax(torch.zeros(3, 4, 4), (0, 8), align_corners=True)
    with pytest.raises(ValueError, match=r"\(N, C, h, w\)"):
        labels_from_logits(torch.zeros(3, 4, 4), (8, 8), align_corners=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_on_an_accelerator_torch_interpolates():
    logits = smooth_logits(0, 5, (40, 50)).cuda()
    expected = F.interpolate(logits[None], size=(160, 200), mode="bilinear", align_corners=True)[0].argmax(0)
    assert np.array_equal(resized_argmax(logits, (160, 200), align_corners=True), expected.cpu().numpy())
