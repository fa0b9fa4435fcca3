"""Every file that is opened decodes to what an independent decoder says, or is refused with its path and a reason."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from datamodules import image_files
from datamodules.image_files import image_size, read_image, read_label

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def picture(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int, color: int, rows: bytes, *, extra: bytes = b"", interlace: int = 0
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return SIGNATURE + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def packed(ids: np.ndarray, depth: int) -> bytes:
    """Rows of a PNG whose ids take `depth` bits each, without filters."""
    rows = b""
    for row in ids:
        bits = "".join(format(value, f"0{depth}b") for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    return rows


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# What is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1"])
def test_a_png_of_every_kind_becomes_the_rgb_that_pillow_gives(tmp_path: Path, mode: str) -> None:
    data = encoded(Image.fromarray(picture()).convert(mode))
    image = read_image(written(tmp_path / "a.png", data))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_becomes_the_rgb_that_pillow_gives_up_to_rounding(tmp_path: Path, mode: str) -> None:
    smooth = cv2.resize(picture(), (64, 48), interpolation=cv2.INTER_CUBIC)
    data = encoded(Image.fromarray(smooth).convert(mode), "JPEG", quality=95)
    image = read_image(written(tmp_path / "a.jpg", data))
    difference = image.astype(int) - np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert abs(difference).max() <= 3


def test_the_upper_eight_of_sixteen_bits_are_kept(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = read_image(written(tmp_path / "a.png", cv2.imencode(".png", values)[1].tobytes()))
    np.testing.assert_array_equal(image[..., 1], values >> 8)


def test_content_counts_and_not_the_name(tmp_path: Path) -> None:
    path = written(tmp_path / "Größe 図.png", encoded(Image.fromarray(picture()), "JPEG"))
    assert read_image(path).shape == (24, 32, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_exif_orientation_is_not_applied_because_the_label_would_not_turn(tmp_path: Path, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = written(tmp_path / "a", encoded(Image.fromarray(picture()), format, exif=exif))
    assert read_image(path).shape == (24, 32, 3)
    assert image_size(path) == (24, 32)
    assert image_files.exif_orientation(path) == 6


def test_an_image_of_one_pixel_is_an_image(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", encoded(Image.new("RGB", (1, 1), (1, 2, 3))))
    assert read_image(path).tolist() == [[[1, 2, 3]]]


def test_the_size_is_read_from_the_header_even_if_the_rest_is_missing(tmp_path: Path) -> None:
    before = image_files.decodes()
    assert image_size(written(tmp_path / "a.png", encoded(Image.fromarray(picture()))[:33])) == (24, 32)
    exif = Image.Exif()
    exif[0x010E] = "a description before the frame header " * 100
    data = encoded(Image.fromarray(picture()), "JPEG", exif=exif)
    assert image_size(written(tmp_path / "a.jpg", data[: len(data) // 2 + 2000])) == (24, 32)
    assert image_files.decodes() == before


def test_every_decoded_file_is_counted(tmp_path: Path) -> None:
    image = written(tmp_path / "a.png", encoded(Image.fromarray(picture())))
    label = written(tmp_path / "b.png", encoded(Image.new("L", (4, 4))))
    before = image_files.decodes()
    read_image(image)
    read_label(label)
    assert image_files.decodes() - before == 2


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_image, read_label, image_size])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"GIF89a" + b"\0" * 40, "a GIF"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n\0\0", "cut off"),
        (b"\xff\xd8\xff", "cut off"),
        (b"\xff\xd8\xff\xd9\xff\xd9\xff\xd9", "no JPEG frame header"),
        (b"nonsense", "neither PNG nor JPEG"),
    ],
)
def test_what_is_no_picture_is_refused_with_path_and_reason(
    tmp_path: Path, read: Callable[[Path], object], data: bytes, reason: str
) -> None:
    path = written(tmp_path / "a.png", data)
    with pytest.raises(DataError, match=reason) as raised:
        read(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("read", [read_image, read_label, image_size])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("missing.png", "is missing"), (".", "a folder"), ("pipe.png", "not a regular file")):
        with pytest.raises(DataError, match=reason):
            read(tmp_path / name)
    with pytest.raises(DataError, match="not a file name"):
        read(Path(f"{tmp_path}/a\0b.png"))


@pytest.mark.parametrize("read", [read_image, read_label])
def test_a_png_cut_off_anywhere_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    data = encoded(Image.new("L", (16, 16), 3))
    for length in range(len(data)):
        with pytest.raises(DataError):
            read(written(tmp_path / "a.png", data[:length]))


@pytest.mark.parametrize("read", [read_image, read_label])
def test_a_png_with_any_one_bit_flipped_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Pillow alone reads many of these labels as other ids, without a word."""
    ids = np.repeat(np.arange(12, dtype=np.uint8), 4)[None].repeat(12, 0)
    data = encoded(Image.fromarray(ids))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DataError):
            read(written(tmp_path / "a.png", bytes(flipped)))


@pytest.mark.parametrize("read", [read_image, read_label])
def test_a_png_with_missing_rows_and_right_checksums_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Pillow fills the missing rows with zeros, which would be class 0."""
    data = png(8, 8, 8, 0, (b"\0" + b"\7" * 8) * 5)
    assert (np.array(Image.open(io.BytesIO(png(8, 8, 8, 0, (b"\0" + b"\7" * 8) * 8)))) == 7).all()
    with pytest.raises(DataError, match=r"a\.png"):
        read(written(tmp_path / "a.png", data))


def test_a_jpeg_cut_off_in_its_pixels_is_refused_though_its_thumbnail_ends(tmp_path: Path) -> None:
    exif = b"Exif\0\0" + encoded(Image.new("RGB", (8, 8)), "JPEG")  # holds an end marker
    data = encoded(Image.fromarray(picture(64, 64)), "JPEG", exif=exif)
    assert read_image(written(tmp_path / "a.jpg", data)).shape == (64, 64, 3)
    for length in (len(data) - 2, len(data) // 2 + 300):
        with pytest.raises(DataError, match="cut off"):
            read_image(written(tmp_path / "a.jpg", data[:length]))


def test_cmyk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="CMYK"):
        read_image(written(tmp_path / "a.jpg", encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG")))


def test_bombs_are_refused_from_their_header(tmp_path: Path) -> None:
    """20000 x 20050 pixels would be 1.2 GB decoded; the files have a few hundred bytes."""
    before = image_files.decodes()
    bomb = png(20000, 20050, 8, 2, b"\0" * 100)
    jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    for path in (written(tmp_path / "a.png", bomb), written(tmp_path / "a.jpg", bytes(jpeg))):
        for read in (read_image, read_label, image_size):
            with pytest.raises(DataError, match="million pixels"):
                read(path)
    assert image_files.decodes() == before
    with pytest.raises(DataError, match=r"at most 0\.0005 million"):
        read_image(written(tmp_path / "b.png", encoded(Image.fromarray(picture()))), max_pixels=500)


def test_a_file_far_larger_than_its_picture_is_not_read_into_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", encoded(Image.new("L", (1, 1))))
    os.truncate(path, 2**36)  # sparse
    with pytest.raises(DataError, match="far too many"):
        read_image(path)


# Labels -----------------------------------------------------------------------------------------------------------


def test_a_palette_label_gives_its_indices_not_its_colours(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 2], [2, 11, 255]], np.uint8)
    image = Image.fromarray(ids, "P")
    image.putpalette(bytes(np.random.default_rng(1).integers(0, 256, 768, np.uint8)))
    np.testing.assert_array_equal(read_label(written(tmp_path / "a.png", encoded(image))), ids)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("color", [0, 3])
def test_labels_of_few_bits_give_the_numbers_in_the_file(tmp_path: Path, depth: int, color: int) -> None:
    """Pillow stretches gray of 2 and 4 bits: 1 becomes 85 or 17."""
    ids = np.arange(2**depth, dtype=np.uint8)[None].repeat(2, 0)
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if color == 3 else b""
    data = png(ids.shape[1], 2, depth, color, packed(ids, depth), extra=palette[: 12 + 768])
    raw = read_label(written(tmp_path / "a.png", data))
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(raw, ids)


@pytest.mark.parametrize("size", [(8, 8), (5, 3), (1, 1), (17, 9)])
def test_an_interlaced_label_is_read_whole(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    ids = np.random.default_rng(2).integers(0, 12, (height, width), np.uint8)
    rows = b"".join(
        b"\0" + ids[y, left::across].tobytes()
        for left, top, across, down in PASSES
        for y in range(top, height, down)
        if left < width
    )
    path = written(tmp_path / "a.png", png(width, height, 8, 0, rows, interlace=1))
    np.testing.assert_array_equal(read_label(path), ids)
    with pytest.raises(DataError, match="pixel data ends"):
        read_label(written(tmp_path / "b.png", png(width, height, 8, 0, rows[:-1], interlace=1)))


def test_sixteen_bit_ids_are_read_where_they_fit_in_eight(tmp_path: Path) -> None:
    ids = np.array([[0, 255], [7, 3]], np.uint16)
    raw = read_label(written(tmp_path / "a.png", encoded(Image.fromarray(ids))))
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(raw, ids)
    with pytest.raises(DataError, match=r"up to 26001.*instance ids"):
        read_label(written(tmp_path / "b.png", encoded(Image.fromarray(ids + 26001 - 255))))


def test_a_colour_mask_is_refused_and_its_commonest_colours_are_named(tmp_path: Path) -> None:
    colors = np.zeros((4, 4, 3), np.uint8)
    colors[1:] = (128, 64, 128)
    for mode in ("RGB", "RGBA"):
        path = written(tmp_path / f"{mode}.png", encoded(Image.fromarray(colors).convert(mode)))
        with pytest.raises(DataError, match=r"colour mask.*2 colours, most often \(128, 64, 128\), \(0, 0, 0\)"):
            read_label(path)


def test_ids_saved_as_three_equal_channels_are_refused_with_what_to_do(tmp_path: Path) -> None:
    ids = np.array([[[3], [5]]], np.uint8).repeat(3, 2)
    with pytest.raises(DataError, match=r"all equal \(values 3, 5\).*keep one channel"):
        read_label(written(tmp_path / "a.png", encoded(Image.fromarray(ids))))


def test_a_jpeg_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="compression changes class ids"):
        read_label(written(tmp_path / "a.png", encoded(Image.new("L", (8, 8), 3), "JPEG")))


def test_a_label_with_transparency_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="transparency"):
        read_label(written(tmp_path / "a.png", encoded(Image.new("LA", (8, 8)))))
