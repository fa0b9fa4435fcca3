import math

import pytest
import torch

from dance_seg.early_exit.policy import ExitPolicy, decide
from dance_seg.early_exit.tiles import decide_tiles, spans, within
from tests.dance_seg.early_exit.toy import Toy, random_images

NEVER = ExitPolicy(thresholds=(math.inf, math.inf))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Toy().eval()


@pytest.mark.parametrize(("length", "tile", "margin"), [(10, 4, 1), (9, 3, 0), (12, 5, 9), (7, 8, 2), (100, 33, 8)])
def test_tiles_label_every_pixel_once_and_see_equally_much(length, tile, margin):
    found = spans(length, tile, margin)
    labelled = [pixel for span in found for pixel in range(length)[span.labelled]]
    assert labelled == list(range(length))
    assert len({span.seen.stop - span.seen.start for span in found}) == 1
    for span in found:
        assert 0 <= span.seen.start <= span.labelled.start < span.labelled.stop <= span.seen.stop <= length
        assert range(length)[span.seen][within(span)] == range(length)[span.labelled]


def test_one_tile_is_the_image(model):
    images, policy = random_images(4, (10, 12)), ExitPolicy(score="mean", thresholds=(0.8, 0.9))
    whole, tiles = decide(model, images, (10, 12), policy), decide_tiles(model, images, policy, (10, 12))
    assert torch.equal(tiles.labels, whole.labels)
    assert torch.equal(tiles.exits.flatten(), whole.exits)


def test_tiles_of_a_network_that_sees_pixel_by_pixel_are_the_image_stitched(model):
    # The toy works on squares of 2 pixels and resizes its logits, so that seams can only differ near a tile's border.
    images = random_images(2, (16, 24))
    whole = decide(model, images, (16, 24), NEVER).labels
    tiles = decide_tiles(model, images, NEVER, (8, 8), margin=4)
    assert torch.equal(tiles.labels, whole)
    assert tiles.exits.shape == (2, 2, 3)


def test_tiles_that_leave_are_not_seen_by_the_parts_behind(model):
    images = random_images(2, (16, 24))
    for threshold in torch.linspace(0, 1, 21).tolist():
        for part in model.parts:
            part.images.clear()
        found = decide_tiles(
            model, images, ExitPolicy(score="mean", thresholds=(threshold, math.inf)), (8, 8), margin=4
        )
        left = int((found.exits == 0).sum())
        assert model.calls() == [12, 12 - left, 12 - left]
        if 0 < left < 12:
            return
    raise AssertionError("no threshold divides the tiles")


@pytest.mark.parametrize(("tile", "margin"), [((0, 8), 4), ((8,), 4), ((8, 8), -1)])
def test_tiles_that_make_no_sense_are_refused(model, tile, margin):
    with pytest.raises(ValueError, match="give a height and a width in pixels"):
        decide_tiles(model, random_images(1), NEVER, tile, margin)
