"""The drawn stream: the same for a seed, smooth between cuts, labelled as it is painted, flat in memory."""

import resource
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest

from dance_seg.sample import IGNORE
from datamodules.scenes import CLASSES, PALETTE
from datamodules.video_shapes import VideoShapes


def small(**options) -> VideoShapes:
    return VideoShapes(**{"num_frames": 60, "size": (60, 80), "scene_frames": 20, **options})


def changed(source: VideoShapes, index: int, other: int) -> float:
    return float((source.frame(index).label != source.frame(other).label).mean())


def brightness(source: VideoShapes) -> np.ndarray:
    return np.array([source.frame(index).image.mean() for index in range(0, source.num_frames, 20)])


def test_frames_have_the_size_asked_for_and_labels_of_the_classes() -> None:
    source = small()
    frames = list(source.frames())
    assert [frame.index for frame in frames] == list(range(60))
    assert frames[5].seconds == 0.2
    for frame in frames:
        assert (frame.image.shape, frame.image.dtype) == ((60, 80, 3), np.uint8)
        assert (frame.label.shape, frame.label.dtype) == ((60, 80), np.uint8)
    present = np.unique([np.unique(frame.label).tolist() for frame in frames[:1]])
    assert set(present) <= {*range(len(CLASSES)), IGNORE}
    counts = sum(np.bincount(frame.label.ravel(), minlength=256) for frame in frames)
    assert counts[len(CLASSES) : IGNORE].sum() == 0
    assert counts[IGNORE] / counts.sum() < 0.05
    assert (source.classes, source.palette) == (CLASSES, PALETTE)


def test_a_frame_depends_on_seed_and_number_alone() -> None:
    source = small()
    whole = list(source.frames())
    again = small()
    for index in (57, 3, 20, 19):  # out of order, so scenes are drawn anew
        frame = again.frame(index)
        assert (frame.image == whole[index].image).all()
        assert (frame.label == whole[index].label).all()
    assert [frame.index for frame in again.frames(start=58)] == [58, 59]
    assert (small(scene_seed=1).frame(0).label != whole[0].label).mean() > 0.1


def test_scenes_change_at_the_cuts_and_nowhere_else() -> None:
    source = small(motion=0.5)
    assert source.cuts == (20, 40)
    assert [frame.index for frame in source.frames() if frame.cut] == [20, 40]
    inside = [changed(source, index - 1, index) for index in range(1, 60) if index not in source.cuts]
    assert max(inside) < 0.1
    assert min(changed(source, cut - 1, cut) for cut in source.cuts) > 2 * max(inside)


def test_cuts_can_be_listed() -> None:
    source = small(cuts=[7, 31])
    assert [frame.index for frame in source.frames() if frame.cut] == [7, 31]


def test_camera_and_things_move_and_light_drifts() -> None:
    source = small(num_frames=500, scene_frames=500)
    assert changed(source, 0, 100) > 0.1
    assert np.ptp(brightness(source)) > 10
    dull = small(num_frames=500, scene_frames=500, motion=0, lighting=0)
    assert changed(dull, 0, 499) == 0
    assert np.ptp(brightness(dull)) < 1


def test_things_move_on_their_own() -> None:
    """With the panorama in place of the camera's swings, what differs is what moves along the street."""
    source = small(num_frames=200, scene_frames=200)
    source._view = lambda scene, seconds: VideoShapes._view(source, scene, 0.0)
    first, later = source.frame(0), source.frame(100)
    moved = first.label != later.label
    assert 0 < moved.mean() < 0.3
    assert set(np.unique(first.label[moved])) & {8, 9, 10} or set(np.unique(later.label[moved])) & {8, 9, 10}


def test_a_stationary_stream_has_no_cuts_and_hardly_changes() -> None:
    still, moving = small(num_frames=300, stationary=True), small(num_frames=300, scene_frames=300)
    assert still.cuts == ()
    assert not any(frame.cut for frame in still.frames())
    assert changed(still, 0, 299) < 0.5 * changed(moving, 0, 299)
    assert np.ptp(brightness(still)) < 0.4 * np.ptp(brightness(moving))


def test_noise_differs_from_frame_to_frame() -> None:
    source = small(motion=0, lighting=0)
    difference = source.frame(1).image.astype(int) - source.frame(2).image
    assert 0 < np.abs(difference).mean() < 5


def test_image_and_label_move_together() -> None:
    """A panorama and actors that are coloured by their labels make frames that are: but at edges, which are mixed."""
    source = small(num_frames=100, scene_frames=100, lighting=0)
    source._noise = np.full_like(source._noise, 127)
    colors = np.random.default_rng(0).integers(40, 200, (256, 3), dtype=np.uint8)
    scene = source._scene(0)
    actors = tuple(replace(actor, image=colors[actor.label]) for actor in scene.actors)
    source._scenes[0] = replace(scene, image=colors[scene.label], actors=actors)
    met = set()
    for index in range(0, 100, 5):
        frame = source.frame(index)
        inside = cv2.erode(frame.label, np.ones((5, 5))) == cv2.dilate(frame.label, np.ones((5, 5)))
        assert inside.mean() > 0.3
        difference = np.abs(frame.image.astype(int) - colors[frame.label])[inside]
        assert (difference <= 2).mean() > 0.99  # sprites are made smaller, so thin ones are mixed inside too
        met |= set(np.unique(frame.label[inside]))
    assert {1, 3, 8} <= met  # buildings and road of the panorama, cars that stand and drive


@pytest.mark.parametrize("size", [(16, 16), (61, 33), (48, 200)])
def test_every_size_is_drawn(size) -> None:
    frame = small(size=size).frame(25)
    assert frame.image.shape == (*size, 3)
    assert frame.label.shape == size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": (8, 80)}, "data.args.size is 8; a whole number of at least 16"),
        ({"size": (80,)}, r"data.args.size is \[80\]; two numbers"),
        ({"num_frames": 0}, "data.args.num_frames is 0"),
        ({"cuts": [5, 5]}, r"data.args.cuts is \[5, 5\]; frame numbers from 1 on, each above"),
        ({"cuts": [0]}, "data.args.cuts is 0; a whole number of at least 1"),
        ({"cuts": [5], "stationary": True}, "stationary: true has no cuts"),
        ({"motion": -1}, "data.args.motion is -1; from 0"),
        ({"scene_seed": -1}, "data.args.scene_seed is -1"),
    ],
)
def test_values_out_of_range_are_refused_in_words(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        small(**given)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_stays_flat_over_two_thousand_frames() -> None:
    source = VideoShapes(num_frames=2200, size=(180, 240), scene_frames=50)
    frames = source.frames()
    for _ in range(200):
        next(frames)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in frames) == 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # 2000 frames would be 260 MB
