"""Video files come out as they were written; damaged, short, turned and forged ones meet a policy or an error."""

import logging
import re
import socket
import struct
import sys
import wave
from fractions import Fraction

import numpy as np
import pytest

from dance_seg.errors import DataError
from datamodules.video_file import VideoFile

av = pytest.importorskip("av")

SIZE = (48, 64)
IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def moving(count: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """Smooth pictures, which codecs like, that differ from frame to frame."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return [
        np.stack([rows * 4 + 5 * number, columns * 3, 255 - rows * 2 - 7 * number], -1).clip(0, 255).astype(np.uint8)
        for number in range(count)
    ]


def write(path, images, codec: str = "ffv1", pixels: str = "bgr0", rate: int = 25, **options: str) -> str:
    with av.open(str(path), "w", container_options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = (*images[0].shape[:2], pixels)
        stream.codec_context.time_base = Fraction(1, rate)
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def damage(path, share: float, count: int = 40) -> None:
    content = bytearray(path.read_bytes())
    at = int(len(content) * share)
    content[at : at + count] = bytes(255 - value for value in content[at : at + count])
    path.write_bytes(content)


def test_a_lossless_video_comes_out_as_it_was_written(tmp_path) -> None:
    images = moving(7)
    source = VideoFile(write(tmp_path / "film.mkv", images))
    frames = list(source.frames())
    assert all((frame.image == image).all() for frame, image in zip(frames, images, strict=True))
    assert [frame.index for frame in frames] == list(range(7))
    assert [frame.seconds for frame in frames] == pytest.approx([index / 25 for index in range(7)], abs=2e-3)
    assert all(frame.label is None and frame.cut is None for frame in frames)
    assert (source.name, source.frames_per_second, source.classes, source.problems) == ("film", 25.0, (), {})


def test_a_lossy_video_comes_out_within_its_codecs_error(tmp_path) -> None:
    images = moving(10)
    source = VideoFile(write(tmp_path / "film.mp4", images, "mpeg4", "yuv420p", qmin="1", qmax="2"))
    frames = list(source.frames())
    assert (len(source), len(frames)) == (10, 10)
    assert max(np.abs(f.image.astype(int) - i).mean() for f, i in zip(frames, images, strict=True)) < 4


def test_frames_from_a_start_are_those_of_the_whole_video(tmp_path) -> None:
    source = VideoFile(write(tmp_path / "film.mp4", moving(12), "mpeg4", "yuv420p"))
    whole, rest = list(source.frames()), list(source.frames(7))
    assert [frame.index for frame in rest] == [7, 8, 9, 10, 11]
    assert all((one.image == other.image).all() for one, other in zip(whole[7:], rest, strict=True))
    assert [frame.seconds for frame in rest] == [frame.seconds for frame in whole[7:]]


@pytest.mark.parametrize(("rate", "taken"), [(5.0, [0, 5, 10]), (10.0, [0, 3, 5, 8, 10, 13]), (60.0, range(15))])
def test_fewer_frames_a_second_are_taken_by_their_times(tmp_path, rate, taken) -> None:
    """At 25 a second the frames 3, 5, 8 are the first at or after 0.1, 0.2, 0.3 seconds."""
    images = moving(15)
    source = VideoFile(write(tmp_path / "film.mkv", images), frames_per_second=rate)
    frames = list(source.frames())
    assert [int(np.argmin([np.abs(f.image.astype(int) - i).sum() for i in images])) for f in frames] == list(taken)
    assert [frame.index for frame in frames] == list(range(len(taken)))
    assert source.frames_per_second == min(rate, 25.0)
    assert [frame.index for frame in source.frames(2)] == list(range(2, len(taken)))


def test_of_a_film_without_times_fewer_frames_are_taken_by_its_own_rate(tmp_path) -> None:
    """Raw H.264: 15 frames at 25 a second are 0.6 seconds, of which six are taken at ten a second."""
    if "libx264" not in av.codecs_available:
        pytest.skip("this PyAV cannot write H.264")
    path = write(tmp_path / "film.h264", moving(15), "libx264", "yuv420p")
    with av.open(path) as container:
        assert next(container.decode(video=0)).time is None
    frames = list(VideoFile(path, frames_per_second=10.0).frames())
    assert [frame.seconds for frame in frames] == pytest.approx([0.0, 0.12, 0.2, 0.32, 0.4, 0.52])


def test_a_live_source_counts_on_and_one_that_ends_is_lost(tmp_path) -> None:
    """A film in the place of a camera, which has no end but `last`."""
    source = VideoFile(write(tmp_path / "film.mkv", moving(6)))
    source.is_live = True
    found = []
    with pytest.raises(DataError, match=r"film.mkv: lost after 6 frames"):
        found.extend(frame.index for frame in source.frames(40))
    assert found == list(range(40, 46))
    source.end = 5
    assert len(list(source.frames())) == 5


def test_first_and_last_are_both_included_and_count_the_files_frames(tmp_path) -> None:
    images = moving(9)
    source = VideoFile(write(tmp_path / "film.mp4", images, "mpeg4", "yuv420p"), first=3, last=5)
    frames = list(source.frames())
    whole = list(VideoFile(str(tmp_path / "film.mp4")).frames())
    assert [frame.index for frame in frames] == [0, 1, 2]
    assert all((one.image == other.image).all() for one, other in zip(frames, whole[3:6], strict=True))
    assert frames[0].seconds == 0
    assert source.num_frames == 3


def test_resolution_averages_areas(tmp_path) -> None:
    images = moving(2)
    frame = next(VideoFile(write(tmp_path / "film.mkv", images), resolution=0.5).frames())
    np.testing.assert_allclose(frame.image, images[0].reshape(24, 2, 32, 2, 3).mean((1, 3)), atol=0.51)


@pytest.mark.parametrize(("matrix", "quarters"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_frames_are_turned_as_the_files_header_says(tmp_path, matrix, quarters) -> None:
    """The matrix (a, b, c, d) of an MP4 takes a pixel (x, y) to (ax + cy, bx + dy): (0, 1, -1, 0) turns clockwise."""
    path = tmp_path / "film.mp4"
    write(path, moving(2), "mpeg4", "yuv420p")
    upright = next(VideoFile(str(path)).frames()).image
    content, (a, b, c, d) = path.read_bytes(), (value << 16 for value in matrix)
    at = content.index(IDENTITY, content.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:at] + turned + content[at + len(turned) :])
    image = next(VideoFile(str(path)).frames()).image
    assert (image == np.rot90(upright, quarters)).all()
    assert image.flags.c_contiguous


def test_empty_frames_are_left_out(tmp_path) -> None:
    images = moving(5)
    images[2] = np.zeros_like(images[2])
    source = VideoFile(write(tmp_path / "film.mkv", images))
    assert [frame.index for frame in source.frames()] == [0, 1, 3, 4]
    assert source.problems == {"empty": 1}


def test_a_damaged_frame_is_left_out_or_ends_the_stream(tmp_path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(8)]  # so that frames are most of the file
    path = tmp_path / "film.mov"
    write(path, images, "png", "rgb24")
    damage(path, 0.5)
    source = VideoFile(str(path))
    frames = list(source.frames())
    assert len(frames) == 7
    assert source.problems == {"unreadable": 1}
    assert all((frame.image == images[frame.index]).all() for frame in frames)
    missing = ({*range(8)} - {frame.index for frame in frames}).pop()
    assert [frame.index for frame in source.frames(missing)] == list(range(missing + 1, 8))
    with pytest.raises(DataError, match=rf"film.mov: frame {missing} cannot be decoded: .*bad_frames=skip"):
        list(VideoFile(str(path), bad_frames="stop").frames())


def test_a_video_that_ends_early_ends_there_and_says_so(tmp_path, caplog) -> None:
    path = tmp_path / "film.mp4"
    write(path, moving(30), "mpeg4", "yuv420p")
    content = path.read_bytes()
    start = content.index(b"mdat")
    path.write_bytes(content[: start + (len(content) - start) // 2])
    with caplog.at_level(logging.WARNING):
        frames = list(VideoFile(str(path)).frames())
    assert 5 < len(frames) < 30
    assert re.search(r"film.mp4: (ends after \d+ of the 30 frames it says|damaged after \d+ frames)", caplog.text)


def test_a_frame_of_another_size_is_resized_or_ends_the_stream(tmp_path, caplog) -> None:
    """JPEGs one behind the other, as a camera writes that is switched."""
    for name, size in (("one", SIZE), ("two", (96, 128))):
        write(tmp_path / f"{name}.mjpeg", moving(4, size), "mjpeg", "yuvj420p")
    path = tmp_path / "both.mjpeg"
    path.write_bytes((tmp_path / "one.mjpeg").read_bytes() + (tmp_path / "two.mjpeg").read_bytes())
    with caplog.at_level(logging.WARNING):
        source = VideoFile(str(path))
        frames = list(source.frames())
    assert {frame.image.shape for frame in frames} == {(*SIZE, 3)}
    assert (len(frames), source.problems) == (8, {"changed size": 4})
    assert "is 96x128 and the first was 48x64" in caplog.text
    with pytest.raises(DataError, match="is 96x128 and the first was 48x64"):
        list(VideoFile(str(path), changed_size="stop").frames())


def test_frames_larger_than_allowed_are_refused_from_the_header(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "film.mkv", moving(2))
    monkeypatch.setattr(VideoFile, "_pictures", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"film.mkv.* more than data.args.max_pixels 3071"):
        VideoFile(path, max_pixels=48 * 64 - 1)
    VideoFile(path, max_pixels=48 * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no video that can be read"),
        (b"<html>not found</html>" * 40, "is no video that can be read"),
        (bytes(range(256)) * 40, "is no video that can be read"),
    ],
)
def test_what_is_no_video_is_refused_in_words(tmp_path, content, message) -> None:
    (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(DataError, match=f"film.mp4 {message}"):
        VideoFile(str(tmp_path / "film.mp4"))


def test_a_video_cut_off_before_its_index_is_refused(tmp_path) -> None:
    write(tmp_path / "film.mp4", moving(20), "mpeg4", "yuv420p")
    content = (tmp_path / "film.mp4").read_bytes()
    (tmp_path / "film.mp4").write_bytes(content[: len(content) // 3])
    with pytest.raises(DataError, match=r"film.mp4 is no video that can be read"):
        VideoFile(str(tmp_path / "film.mp4"))


def test_a_list_that_names_other_files_opens_none_of_them(tmp_path) -> None:
    write(tmp_path / "film.mkv", moving(3))
    (tmp_path / "list.mkv").write_text("ffconcat version 1.0\nfile film.mkv\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfilm.mkv\n#EXT-X-ENDLIST\n")
    for name in ("list.mkv", "list.m3u8"):
        with pytest.raises(DataError, match=name):
            list(VideoFile(str(tmp_path / name)).frames())


def test_sound_without_picture_is_refused(tmp_path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    with pytest.raises(DataError, match=r"sound.wav holds no picture"):
        VideoFile(str(tmp_path / "sound.wav"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{root}/flim.mkv", "'.*flim.mkv' is missing; did you mean .*film.mkv"),
        ("{root}", "is a folder; for a folder of frames write data.name=video_folder"),
        ("http://example.org/film.mp4", "of addresses only rtsp:// and rtsps:// are opened"),
        ("film\0.mkv", "is missing"),
        (-1, "data.args.path is -1; cameras count from 0"),
        (True, "data.args.path is True; the path of a file"),
    ],
)
def test_a_path_that_cannot_be_opened_is_refused_in_words(tmp_path, path, message) -> None:
    write(tmp_path / "film.mkv", moving(1))
    with pytest.raises(ValueError, match=message):
        VideoFile(path.format(root=tmp_path) if isinstance(path, str) else path)


@pytest.mark.skipif(sys.platform != "linux", reason="cameras are files on Linux only")
def test_a_camera_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"/dev/video99 \(camera 99\) is missing; there are: "):
        VideoFile(99)


def test_an_address_that_refuses_or_says_nothing_is_given_up_in_time_and_its_password_is_not_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        silent = f"rtsp://me:secret@127.0.0.1:{port}/live"
        with pytest.raises(DataError, match=r"rtsp://127.0.0.1:\d+/live cannot be reached: .*waited 0.5 s") as caught:
            VideoFile(silent, timeout=0.5)
        assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be reached: Connection refused"):
        VideoFile(silent, timeout=5.0)
