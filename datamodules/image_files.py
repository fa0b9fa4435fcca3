"""The one place that opens an image or a label, and refuses a bad one.

Images and labels are PNG or JPEG by content, whatever their names say. The header is read before anything is decoded,
so that a small file that claims a huge picture costs nothing. Nothing is rotated by EXIF orientation: the label would
not turn with it. torchvision is never used: its PNG decoder crashes the process on damaged files.

Every check here has a damaged file behind it. Pillow alone read 272 of 2000 labels with one flipped bit as wrong class
ids without a word, and fills missing rows with zeros; so the checksums of a PNG and the size of its pixel data are
verified here. A JPEG carries no checksum: a file that is cut off is refused, a flipped bit that still decodes is not.
"""

import io
import os
import stat
import struct
import threading
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image

from dance_seg.errors import DataError, first_line

MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused from their header."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LABEL_SUFFIXES = (".png",)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_GRAY, _PNG_RGB, _PNG_PALETTE, _PNG_GRAY_ALPHA, _PNG_RGBA = 0, 2, 3, 4, 6
_PNG_CHANNELS = {_PNG_GRAY: 1, _PNG_RGB: 3, _PNG_PALETTE: 1, _PNG_GRAY_ALPHA: 2, _PNG_RGBA: 4}
_PNG_DEPTHS = {
    _PNG_GRAY: (1, 2, 4, 8, 16), _PNG_RGB: (8, 16), _PNG_PALETTE: (1, 2, 4, 8), _PNG_GRAY_ALPHA: (8, 16),
    _PNG_RGBA: (8, 16),
}  # fmt: skip
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_MAX_SEGMENTS = 4096  # before the frame header; real files have a few dozen
_INTERLACE_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

_OTHER_FILES = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\x00", "a TIFF"),
    (b"MM\x00*", "a TIFF"),
    (b"RIFF", "a WebP or other RIFF file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"%PDF", "a PDF"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
    (b"<", "a web page or XML file, often what a failed download leaves"),
    (b"{", "a JSON file"),
)

PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises on files that are damaged: an IndexError, say, on a colour profile that is cut off."""

_decodes = 0
_decodes_lock = threading.Lock()


class Header(NamedTuple):
    """What a file says about its picture before anything is decoded."""

    format: str  # "PNG" or "JPEG"
    height: int
    width: int
    depth: int  # bits per channel
    color: int  # PNG: its colour type; JPEG: number of components
    interlaced: bool
    end: int  # where the header ends, in bytes


def decodes() -> int:
    """How many image and label files this process has decoded so far."""
    return _decodes


def image_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The size (H, W) of an image or a label, from its header alone.

    Raises DataError when the file is missing, empty, neither PNG nor JPEG, or larger than `max_pixels`.
    """
    with _open(path) as file:
        header = _header(file, path, max_pixels)
    return header.height, header.width


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image to RGB uint8 (H, W, 3).

    Gray is repeated over the channels, transparency is dropped, of 16 bits the upper 8 are kept, EXIF orientation is
    not applied. Raises DataError when the file is missing, empty, cut off, damaged, not a PNG or JPEG, in CMYK or
    larger than `max_pixels`.
    """
    header, data = _read(path, max_pixels)
    if header.format == "PNG":
        _check_png(data, path)
    else:
        _check_jpeg(data, header, path)
    _count_decode()
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise DataError(f"{path} cannot be decoded: {error.err or error}") from None
    if image is None or image.shape != (header.height, header.width, 3):
        raise DataError(f"{path} cannot be decoded although its header is a {header.format}'s: the file is damaged")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def read_label(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read the raw ids of a label as uint8 (H, W): the numbers in the file, before any table.

    Palette files give their indices, gray files of 1, 2 or 4 bits their numbers, 16-bit files are accepted while
    every id fits in 8 bits. Raises DataError for all that `read_image` refuses, and for colour masks and JPEGs.
    """
    header, data = _read(path, max_pixels)
    if header.format != "PNG":
        raise DataError(f"{path} is a JPEG, whose compression changes class ids; save labels as PNG")
    pixels = _check_png(data, path)
    _check_all_rows(pixels, header, path)
    _count_decode()
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            raw = np.array(picture)
    except PILLOW_ERRORS as error:
        raise DataError(f"{path} cannot be decoded: {first_line(error)}") from None
    if raw.ndim == 3:
        raise DataError(f"{path} {_describe_color_mask(raw)}")
    if header.color == _PNG_GRAY and raw.dtype == np.uint8:
        raw //= {2: 85, 4: 17}.get(header.depth, 1)  # Pillow stretches 2 and 4 bits to 0..255
    if raw.dtype not in (np.uint8, np.bool_) and raw.max() > 255:
        raise DataError(f"{path} {_describe_large_ids(raw)}")
    return raw.astype(np.uint8, copy=False)


def exif_orientation(path: Path) -> int:
    """The EXIF orientation tag of an image: 1 is upright, 5 to 8 swap height and width.

    >>> exif_orientation(Path("missing.jpg"))
    1
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            return int(picture.getexif().get(0x0112, 1))
    except PILLOW_ERRORS:
        return 1


def _count_decode() -> None:
    global _decodes
    with _decodes_lock:
        _decodes += 1


def _open(path: Path) -> BinaryIO:
    """Open a regular file; a pipe or a device would make us wait for ever."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}")
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:  # NUL in the name, or DataError from above
        if "\0" in str(path):
            raise DataError(f"{str(path)!r} is not a file name") from None
        raise


def _read(path: Path, max_pixels: int) -> tuple[Header, bytes]:
    with _open(path) as file:
        header = _header(file, path, max_pixels)
        num_bytes = os.fstat(file.fileno()).st_size
        # 16-bit RGBA without compression takes 8 bytes a pixel; what is far larger is not a picture of this size.
        if num_bytes > 9 * header.height * header.width + 2**26:
            raise DataError(f"{path} has {num_bytes:,} bytes, far too many for {header.height} x {header.width} pixels")
        try:
            file.seek(0)
            return header, file.read()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _header(file: BinaryIO, path: Path, max_pixels: int) -> Header:
    try:
        start = file.read(33)
        if not start:
            raise DataError(f"{path} is empty (0 bytes)")
        if start.startswith(_PNG_SIGNATURE):
            header = _png_header(start, path)
        elif start.startswith(b"\xff\xd8"):
            header = _jpeg_header(file, path)
        else:
            other = next((what for begin, what in _OTHER_FILES if start.startswith(begin)), "something else")
            raise DataError(f"{path} is neither PNG nor JPEG but {other}; convert it to PNG")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if header.height < 1 or header.width < 1:
        raise DataError(f"{path} is damaged: its header says {header.height} x {header.width} pixels")
    if header.height * header.width > max_pixels:
        raise DataError(
            f"{path} claims {header.height} x {header.width} = {header.height * header.width / 1e6:.1f} million "
            f"pixels; at most {max_pixels / 1e6:g} million are read; make it smaller or cut it into tiles"
        )
    return header


def _png_header(start: bytes, path: Path) -> Header:
    if len(start) < 33:
        raise DataError(f"{path} is cut off inside its header ({len(start)} bytes)")
    if start[8:16] != b"\x00\x00\x00\rIHDR" or zlib.crc32(start[12:29]) != int.from_bytes(start[29:33], "big"):
        raise DataError(f"{path} is damaged: the PNG header's checksum is wrong")
    width, height, depth, color, packing, filtering, interlace = struct.unpack(">IIBBBBB", start[16:29])
    if color not in _PNG_CHANNELS:
        raise DataError(f"{path} is damaged: PNG has no colour type {color}")
    if depth not in _PNG_DEPTHS[color] or packing or filtering or interlace > 1:  # Pillow does not look at all of them
        raise DataError(
            f"{path} is damaged: no PNG has {depth} bits in colour type {color}, packed by {packing}, "
            f"filtered by {filtering} and interlaced by {interlace}"
        )
    return Header("PNG", height, width, depth, color, interlace != 0, 33)


def _jpeg_header(file: BinaryIO, path: Path) -> Header:
    file.seek(2)
    for _ in range(_JPEG_MAX_SEGMENTS):
        marker = file.read(4)
        if len(marker) < 4:
            raise DataError(f"{path} is cut off inside its header")
        start, code, length = struct.unpack(">BBH", marker)
        if start == 0xFF and code == 0xFF:  # a fill byte
            file.seek(-3, os.SEEK_CUR)
            continue
        if start != 0xFF or code in (0xD9, 0xDA) or length < 2:
            break
        if code not in _JPEG_FRAMES:
            file.seek(length - 2, os.SEEK_CUR)
            continue
        frame = file.read(6)
        if len(frame) < 6:
            raise DataError(f"{path} is cut off inside its header")
        depth, height, width, components = struct.unpack(">BHHB", frame)
        if depth != 8:
            raise DataError(f"{path} is a JPEG of {depth} bits per channel; only 8 are read; convert it to PNG")
        if components not in (1, 3):
            raise DataError(f"{path} is a JPEG with {components} channels (CMYK?); convert it to RGB")
        return Header("JPEG", height, width, depth, components, False, file.tell())
    raise DataError(f"{path} is damaged: no JPEG frame header")


def _check_png(data: bytes, path: Path) -> bytes:
    """Walk the chunks, compare every checksum, and return the compressed pixel data."""
    view = memoryview(data)
    pixels = []
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        kind = bytes(view[at + 4 : at + 8])
        if end > len(data):
            break
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise DataError(f"{path} is damaged: the checksum of its {kind!r} block at byte {at} is wrong")
        if kind == b"IDAT":
            pixels.append(view[at + 8 : end - 4])
        if kind == b"IEND":
            return b"".join(pixels)
        at = end
    raise DataError(f"{path} is cut off or damaged: {len(data)} bytes and no end block")


def _check_all_rows(pixels: bytes, header: Header, path: Path) -> None:
    """Inflate the pixel data and compare its size with the header's: Pillow shows missing rows as class 0."""
    bits = header.depth * _PNG_CHANNELS[header.color]
    passes = _INTERLACE_PASSES if header.interlaced else ((0, 0, 1, 1),)
    expected = 0
    for left, top, step_x, step_y in passes:
        columns = max(0, -(-(header.width - left) // step_x))
        rows = max(0, -(-(header.height - top) // step_y))
        expected += rows * (1 + -(-columns * bits // 8)) if columns else 0
    inflate = zlib.decompressobj()
    try:
        found = len(inflate.decompress(pixels, expected + 1))
    except zlib.error as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if found < expected:
        raise DataError(f"{path} is damaged: its pixel data ends after {found} of {expected} bytes")
    if found > expected or not inflate.eof:
        raise DataError(f"{path} is damaged: its pixel data does not end after the {expected} bytes of its rows")


def _check_jpeg(data: bytes, header: Header, path: Path) -> None:
    # Some decoders paint what is missing gray. The header's end keeps a thumbnail's end marker from counting.
    if data.rfind(b"\xff\xd9") < header.end:
        raise DataError(f"{path} is cut off: {len(data)} bytes and no JPEG end marker")


def _describe_color_mask(raw: np.ndarray) -> str:
    if raw.shape[2] < 3:
        return "is a gray picture with transparency, not class ids; save it as 8-bit gray or palette PNG"
    channels = f"{raw.shape[2]} channels"
    color = raw[..., :3].astype(np.int64) @ (65536, 256, 1)
    codes, counts = np.unique(color, return_counts=True)
    if (raw[..., 0] == raw[..., 1]).all() and (raw[..., 1] == raw[..., 2]).all():
        ids = ", ".join(str(code & 255) for code in codes[:8].tolist())
        return (
            f"has {channels}, all equal (values {ids}{', ...' if len(codes) > 8 else ''}): ids saved as RGB; "
            "keep one channel and save it as 8-bit gray PNG"
        )
    common = codes[np.argsort(-counts, kind="stable")[:3]].tolist()
    shown = ", ".join(str((code >> 16, code >> 8 & 255, code & 255)) for code in common)
    return (
        f"is a colour mask ({channels}, {len(codes)} colours, most often {shown}), not class ids; "
        "replace each colour by its class id and save as 8-bit gray or palette PNG"
    )


def _describe_large_ids(raw: np.ndarray) -> str:
    message = f"holds ids up to {raw.max()}; at most 255 fit"
    if raw.max() >= 1000:
        message += "; these look like instance ids (class x 1000 + instance), so take the file of class ids instead"
    return message
