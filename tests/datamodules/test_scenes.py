"""Street scenes: what they depend on, what they show, and that what is painted and what it is called agree."""

import random
from itertools import pairwise

import cv2
import numpy as np
import pytest

from dance_seg.sample import IGNORE
from datamodules.camvid import CAMVID
from datamodules.scenery.figures import cyclist, vehicles, walker
from datamodules.scenery.painter import CAR, PEDESTRIAN, ROAD, SKY, Camera, Light, Painter
from datamodules.scenery.street import Scene, Street, how_many, spaced
from datamodules.scenery.traffic import is_free
from datamodules.scenes import CLASSES, PALETTE, render_scene

CLEAR = Light((0, 0, 0), (0, 0, 0), (1, 1, 1), (100, 100, 100), 1e9, (0, 0), 0.5, False)  # no haze
CAMERA = Camera(height=1.5, focal=1.0, horizon=0.5, shift=0.0)


def label_counts(label):
    return np.bincount(label.ravel(), minlength=256)


def edges(image):
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(np.hypot(cv2.Sobel(gray, -1, 1, 0), cv2.Sobel(gray, -1, 0, 1)).mean())


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(0, index, (96, 128)) for index in range(80)]


def test_classes_and_colours_are_camvids_in_camvids_order():
    assert CAMVID.classes == CLASSES
    assert CAMVID.palette == PALETTE


def test_a_scene_depends_on_seed_index_and_size_alone():
    first = render_scene(3, 8, (64, 80))
    render_scene(3, 9, (64, 80))
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    again = render_scene(3, 8, (64, 80))
    assert (first.image == again.image).all()
    assert (first.label == again.label).all()
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


@pytest.mark.parametrize(("seed", "index"), [(3, 9), (4, 8)])
def test_another_seed_or_index_is_another_scene(seed, index):
    here, there = render_scene(3, 8, (64, 80)), render_scene(seed, index, (64, 80))
    assert (here.label != there.label).mean() > 0.05


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (97, 131), (240, 64), (64, 512), (1024, 2048)])
def test_every_size_is_drawn(size):
    image, label = render_scene(0, 1, size)
    assert image.shape == (*size, 3)
    assert label.shape == size
    assert image.dtype == label.dtype == np.uint8
    assert image.flags.c_contiguous
    assert label.flags.c_contiguous


@pytest.mark.parametrize(
    ("seed", "index", "size"), [(0, 0, (15, 64)), (0, 0, (64, 0)), (-1, 0, (64, 64)), (0, -1, (64, 64))]
)
def test_a_size_too_small_or_a_negative_number_is_refused(seed, index, size):
    with pytest.raises(ValueError, match=r"size is|seed is"):
        render_scene(seed, index, size)


def test_labels_are_classes_or_ignored_and_little_is_ignored(scenes):
    counts = sum(label_counts(scene.label) for scene in scenes)
    assert counts[len(CLASSES) : IGNORE].sum() == 0  # smoothing a picture never mixes classes
    assert 0 < counts[IGNORE] / counts.sum() < 0.05


def test_every_class_is_in_many_scenes_and_small_things_take_few_pixels(scenes):
    counts = np.stack([label_counts(scene.label)[: len(CLASSES)] for scene in scenes])
    found = dict(zip(CLASSES, (counts > 0).mean(0), strict=True))
    share = dict(zip(CLASSES, counts.sum(0) / counts.sum(), strict=True))
    assert min(found.values()) == found["Bicyclist"] > 0.15
    assert all(found[name] > 0.5 for name in CLASSES if name != "Bicyclist")
    assert share["Road"] > 0.15
    assert all(share[name] < 0.04 for name in ("Pole", "SignSymbol", "Fence", "Pedestrian", "Bicyclist"))


def test_sky_is_above_and_road_below(scenes):
    labels = np.stack([scene.label for scene in scenes])
    assert (labels[:, :32] != ROAD).all()  # the horizon is never in the upper third
    assert (labels[:, 64:] != SKY).all()  # nor in the lower one
    assert (labels[:, 80] == ROAD).mean() > 0.4


def test_complexity_varies_widely(scenes):
    """CamVid's own ratio, at 192 x 256, is 2.5."""
    low, high = np.percentile([edges(scene.image) for scene in scenes], [5, 95])
    assert high / low > 2


def test_another_size_shows_the_same_scene():
    for index in range(6):
        small, large = render_scene(1, index, (96, 128)).label, render_scene(1, index, (192, 256)).label
        assert (small == large[1::2, 1::2]).mean() > 0.92


def test_a_wider_picture_shows_the_same_and_more():
    for index in range(6):
        narrow, wide = render_scene(1, index, (96, 128)).label, render_scene(1, index, (96, 256)).label[:, 64:-64]
        counted = (narrow != IGNORE) & (wide != IGNORE)  # the bonnet is as wide as the picture
        assert (narrow == wide)[counted].mean() > 0.999  # lines that end outside are cut elsewhere


def test_things_twice_as_far_are_half_as_high():
    """1.75 m at 10 m: 35 rows of a picture of 200 rows with a focal length of 200 rows."""
    heights = []
    for depth in (10.0, 20.0):
        painter = Painter(CAMERA, CLEAR, (200, 200))
        painter.figure(
            walker(0),
            dict.fromkeys(walker(0).roles, (9, 9, 9)),
            PEDESTRIAN,
            (0.0, depth),
        )
        rows = np.flatnonzero((painter.finish()[1] == PEDESTRIAN).any(1))
        heights.append(rows[-1] - rows[0] + 1)
    assert heights[0] == pytest.approx(35, abs=2)
    assert heights[1] == pytest.approx(17.5, abs=2)


def test_later_strokes_cover_earlier_ones_in_picture_and_label_alike():
    painter = Painter(CAMERA, CLEAR, (40, 40))
    for left, colour, class_id in ((-9.0, (200, 0, 0), 4), (0.0, (0, 0, 200), 7)):
        square = [(left, -9.0, 4.0), (9.0, -9.0, 4.0), (9.0, 9.0, 4.0), (left, 9.0, 4.0)]
        painter.polygon(square, colour, class_id, depth=4.0)
    image, label = painter.finish()
    assert label[20, 5] == 4
    assert image[20, 5].tolist() == [200, 0, 0]
    assert label[20, 35] == 7
    assert image[20, 35].tolist() == [0, 0, 200]


def test_a_shadow_darkens_the_ground_and_keeps_its_class():
    painter = Painter(CAMERA, CLEAR, (40, 40))
    ground = np.array([[(-9.0, 0.0, 2.0), (9.0, 0.0, 2.0), (9.0, 0.0, 50.0), (-9.0, 0.0, 50.0)]])
    painter.stretch(ground, (100, 100, 100), ROAD)
    painter.darken([ground[0] * (0.5, 1, 1) + (4.5, 0, 0)], strength=0.5)  # the right half
    image, label = painter.finish()
    assert label[39].tolist() == [ROAD] * 40
    assert image[39, 5].tolist() == [100, 100, 100]
    assert image[39, 35].tolist() == [50, 50, 54]


def test_haze_takes_all_but_one_part_in_e_at_its_depth():
    painter = Painter(CAMERA, CLEAR._replace(haze_depth=50.0), (40, 40))
    mixed = painter.mix(np.array([(200.0, 0.0, 50.0, 3.0, 1.0, 50.0)]))[0]
    share = np.exp(-1)
    assert mixed == pytest.approx(
        [200 * share + 100 * (1 - share), 100 * (1 - share), 50 * share + 100 * (1 - share), 3]
    )


def test_a_vehicle_shows_the_faces_turned_to_the_camera():
    def roles(turn, camera):
        return {role for spans, _ in vehicles()[1].faces_seen(turn, np.array(camera)) for role, *_ in spans}

    ahead, turned = np.eye(3), np.diag((-1.0, 1.0, -1.0))
    behind_it = (0.0, 1.5, -12.0)
    assert "rear_lamp" in roles(ahead, behind_it)
    assert "front_lamp" not in roles(ahead, behind_it)
    assert "front_lamp" in roles(turned, behind_it)
    assert "hub" not in roles(ahead, behind_it)  # wheels are seen from the side
    assert "hub" in roles(ahead, (-12.0, 1.5, 0.0))


def test_a_cyclist_is_seen_from_behind_and_from_the_side():
    """Everything flat is there twice: 0.65 m with the arms, 1.7 m over the wheels."""
    for yaw, width in ((0.0, 0.65), (np.pi / 2, 1.7)):
        painter = Painter(CAMERA, CLEAR, (200, 200))
        colours = dict.fromkeys(cyclist(2).roles, (9, 9, 9))
        painter.figure(cyclist(2), colours, CAR, (0.0, 10.0), yaw)
        columns = np.flatnonzero((painter.finish()[1] == CAR).any(0))
        assert columns[-1] - columns[0] + 1 == pytest.approx(20 * width, rel=0.15)


def test_nobody_stands_inside_a_vehicle():
    street = Street(half=3.0, pavements=(2.0, 2.0), offset=0.0, slope=0.0, bend=0.0)
    scene = Scene(random.Random(0), street, CLEAR, 0.5, taken=[(1.0, 20.0, 0.9, 2.0)])
    assert not is_free(scene, 1.0, 21.0, 0.4, 0.5)
    assert is_free(scene, 1.0, 23.0, 0.4, 0.5)  # 3.0 m behind its middle: more than 2.0 + 0.5
    assert is_free(scene, -1.0, 20.0, 0.4, 0.5)  # 2.0 m beside it: more than 0.9 + 0.4


def test_numbers_of_things_have_the_mean_asked_for():
    draw = random.Random(0)
    assert np.mean([how_many(draw, 2.5) for _ in range(4000)]) == pytest.approx(2.5, abs=0.1)  # four standard errors
    assert how_many(draw, 0.0) == 0
    positions = list(spaced(draw, 5.0, 100.0, 10.0))
    assert positions[0] == 5.0
    assert all(6 <= after - before <= 14 for before, after in pairwise(positions))
    assert positions[-1] < 100
