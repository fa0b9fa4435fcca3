"""Folders of frames and CamVid's clip are read in order of time; a recipe names its video."""

import inspect
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.part import Part
from dance_seg.sample import IGNORE
from datamodules.camvid import CAMVID
from datamodules.video import build_source, natural, video_camvid, video_folder


def picture(seed: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_frames(folder, count: int) -> list[np.ndarray]:
    folder.mkdir()
    images = [picture(index) for index in range(count)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"frame_{index + 8}.png")  # 8, 9, 10, 11
    return images


def write_labels(root, numbers, size: tuple[int, int] = (12, 16)) -> None:
    (root / "labels").mkdir()
    (root / "classes.yaml").write_text("classes: [road, car]\n")
    for number in numbers:
        label = np.full(size, number % 2, np.uint8)
        label[0] = 255
        Image.fromarray(label).save(root / "labels" / f"frame_{number}.png")


def test_a_folder_is_read_in_the_natural_order_of_its_names(tmp_path) -> None:
    images = write_frames(tmp_path / "clip", 4)
    source = video_folder(str(tmp_path / "clip"), frames_per_second=10.0)
    frames = list(source.frames())
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    assert [frame.seconds for frame in frames] == [0.0, 0.1, 0.2, 0.3]
    assert all((frame.image == image).all() for frame, image in zip(frames, images, strict=True))
    assert all(frame.label is None and frame.cut is None for frame in frames)
    assert (source.name, len(source), source.num_frames, source.classes) == ("clip", 4, 4, ())


def test_labels_belong_to_the_frames_of_their_name_and_may_be_few(tmp_path) -> None:
    write_frames(tmp_path / "clip", 4)
    write_labels(tmp_path, (9, 10))
    source = video_folder(str(tmp_path / "clip"), labels=str(tmp_path / "labels"))
    assert source.classes == ("road", "car")
    assert len(source.palette) == 2
    assert [None if frame.label is None else int(frame.label[1, 0]) for frame in source.frames()] == [None, 1, 0, None]
    assert (list(source.frames())[1].label[0] == IGNORE).all()


def test_frames_from_a_start_are_those_of_the_whole_video(tmp_path) -> None:
    images = write_frames(tmp_path / "clip", 4)
    source = video_folder(str(tmp_path / "clip"))
    assert [(frame.index, (frame.image == images[frame.index]).all()) for frame in source.frames(2)] == [
        (2, True),
        (3, True),
    ]
    assert list(source.frames(4)) == []


def test_a_start_opens_no_frame_that_it_does_not_need(tmp_path, monkeypatch) -> None:
    write_frames(tmp_path / "clip", 9)
    opened = []
    monkeypatch.setattr(
        "datamodules.video.read_image", lambda path, most: opened.append(path.stem) or picture(len(opened))
    )
    assert len(list(video_folder(str(tmp_path / "clip")).frames(7))) == 2
    assert opened == ["frame_8", "frame_14", "frame_15", "frame_16"]  # the first for its size, one before the start


def test_first_and_last_are_both_included_and_count_from_nought(tmp_path) -> None:
    images = write_frames(tmp_path / "clip", 4)
    source = video_folder(str(tmp_path / "clip"), first=1, last=2)
    assert [(frame.index, bool((frame.image == images[1 + frame.index]).all())) for frame in source.frames()] == [
        (0, True),
        (1, True),
    ]


def test_resolution_averages_images_and_picks_labels(tmp_path) -> None:
    images = write_frames(tmp_path / "clip", 1)
    write_labels(tmp_path, (8,))
    frame = next(video_folder(str(tmp_path / "clip"), labels=str(tmp_path / "labels"), resolution=0.5).frames())
    np.testing.assert_allclose(frame.image, images[0].reshape(6, 2, 8, 2, 3).mean((1, 3)), atol=0.51)
    assert frame.label.shape == (6, 8)
    assert set(np.unique(frame.label)) <= {0, IGNORE}


def test_a_damaged_frame_is_left_out_or_ends_the_stream(tmp_path) -> None:
    write_frames(tmp_path / "clip", 4)
    (tmp_path / "clip" / "frame_9.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    source = video_folder(str(tmp_path / "clip"))
    assert [frame.index for frame in source.frames()] == [0, 2, 3]
    assert source.problems == {"unreadable": 1}
    with pytest.raises(DataError, match=r"frame_9.png is cut off .*; data.args.bad_frames=skip"):
        list(video_folder(str(tmp_path / "clip"), bad_frames="stop").frames())


def test_a_label_of_another_size_is_a_bad_frame(tmp_path) -> None:
    write_frames(tmp_path / "clip", 2)
    write_labels(tmp_path, (9,), size=(12, 15))
    source = video_folder(str(tmp_path / "clip"), labels=str(tmp_path / "labels"), bad_frames="stop")
    with pytest.raises(DataError, match=r"frame_9.png is \(12, 15\) and its image \(12, 16\)"):
        list(source.frames())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": "{root}/none"}, "is missing; .*the frames, PNG or JPEG"),
        ({"images": "{root}/labels"}, "labels holds no frame .* but nothing"),
        ({"labels": "{root}/labels"}, "labels holds no label"),
        ({"labels": "{root}/clip", "classes": "{root}/none.yaml"}, "none.yaml is missing; it names the classes"),
        ({"first": 4}, "has 4 frames; none is left from data.args.first=4"),
        ({"first": 2, "last": 1}, "data.args.last is 1 and first is 2"),
        ({"first": -1}, "data.args.first is -1; a whole number of at least 0"),
        ({"frames_per_second": 0}, "data.args.frames_per_second is 0; a number above 0"),
        ({"resolution": 2}, "data.args.resolution is 2; a number above 0 and at most 1"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(tmp_path, given, message) -> None:
    write_frames(tmp_path / "clip", 4)
    (tmp_path / "labels").mkdir()
    arguments = {"images": "{root}/clip", **given}
    arguments = {
        name: value.format(root=tmp_path) if isinstance(value, str) else value for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        video_folder(**arguments)


def test_labels_of_no_frame_are_refused(tmp_path) -> None:
    write_frames(tmp_path / "clip", 2)
    write_labels(tmp_path, (9, 77))
    with pytest.raises(DataError, match=r"1 labels of no frame in .*clip: frame_77"):
        video_folder(str(tmp_path / "clip"), labels=str(tmp_path / "labels"))


def test_numbers_in_names_are_sorted_by_value() -> None:
    assert sorted(["b2", "a10", "a9", "a09x", "10", "9"], key=natural) == ["9", "10", "a9", "a09x", "a10", "b2"]


def make_camvid(root) -> None:
    (root / "val").mkdir()
    (root / "valannot").mkdir()
    lines = []
    for number in (7961, 7959, 7963):
        Image.fromarray(picture(number)).save(root / "val" / f"0016E5_{number:05d}.png")
        Image.fromarray(np.full((12, 16), 11, np.uint8)).save(root / "valannot" / f"0016E5_{number:05d}.png")
        lines.append(f"val/0016E5_{number:05d}.png valannot/0016E5_{number:05d}.png")
    (root / "val.txt").write_text("\n".join(lines))


def test_camvids_clip_is_in_order_of_time_at_15_frames_per_second(tmp_path) -> None:
    make_camvid(tmp_path)
    source = video_camvid(str(tmp_path))
    frames = list(source.frames())
    assert [(frame.image == picture(number)).all() for frame, number in zip(frames, (7959, 7961, 7963), strict=True)]
    assert frames[2].seconds == 2 / 15
    assert all((frame.label == IGNORE).all() and frame.cut is False for frame in frames)
    assert (source.classes, source.palette, source.name) == (CAMVID.classes, CAMVID.palette, "camvid_val")


def test_camvid_is_looked_for_where_recipes_say(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'data/camvid' is missing"):
        video_camvid()


@pytest.mark.data
def test_the_real_clip_is_whole() -> None:
    source = video_camvid(os.environ["DANCE_SEG_CAMVID"])
    frames = list(source.frames(start=98))
    assert (len(source), [frame.index for frame in frames]) == (101, [98, 99, 100])
    assert all(frame.image.shape == (360, 480, 3) and frame.label.shape == (360, 480) for frame in frames)


def test_a_recipe_or_its_part_names_the_video(tmp_path) -> None:
    write_frames(tmp_path / "clip", 2)
    part = Part("video_folder", {"images": str(tmp_path / "clip")})
    assert build_source(part).name == build_source(SimpleNamespace(data=part)).name == "clip"
    assert build_source(Part("video_shapes", {"num_frames": 5})).num_frames == 5


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            Part("video_shape"),
            "data.name is 'video_shape'; choose one of video_camvid, video_file, video_folder, video_shapes",
        ),
        (Part("video_shapes", {"frame": 3}), "data.args.frame: video_shapes takes no 'frame'"),
        (Part("video_file"), "data.args.path is missing: video_file needs it"),
        (Part("video_file", {"path": "none.mp4"}), "'none.mp4' is missing"),
    ],
)
def test_a_recipe_that_names_no_video_is_refused_in_words(part, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_source(part)


def test_every_source_is_what_a_stream_needs(tmp_path) -> None:
    write_frames(tmp_path / "clip", 2)
    for source in (build_source(Part("video_shapes")), video_folder(str(tmp_path / "clip"))):
        for name in ("name", "label_table", "frames_per_second", "num_frames", "problems", "classes", "palette"):
            assert hasattr(source, name)
        assert list(inspect.signature(source.frames).parameters) == ["start"]
