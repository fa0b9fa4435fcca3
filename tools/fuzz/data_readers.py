"""Readers of data: lists, classes, labels, images, predictions, videos, and what is kept beside them."""

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from PIL import Image

from dance_seg.sample import IGNORE, Sample
from datamodules.ade20k import ade20k_split
from datamodules.camvid import camvid_split
from datamodules.complexity_table import complexity_table
from datamodules.decoded_cache import open_cache
from datamodules.folder import folder_split, read_classes
from datamodules.image_files import image_size, read_image, read_label
from datamodules.label_table import label_table
from datamodules.predictions import OfficialForm, PredictionWriter, read_predictions
from datamodules.sources import Pair, hold_out, usable_pairs
from datamodules.video_file import VideoFile
from tools.fuzz.target import Target, Wrong

TABLE = label_table(("road", "car", "sky"), raw_to_train={0: 0, 1: 1, 2: 2})
SIGNATURE = b"\x89PNG\r\n\x1a\n"
OUTSIDE = (
    b"../../outside/secret.png", b"/etc/passwd", b"..\\..\\outside\\secret.png", b"train/link/secret.png",
    b"train/linked.png", b"a\0b.png", b"C:\\secret.png", b"train/../../outside/secret.png", b"//outside/secret.png",
)  # fmt: skip


# Lists ----------------------------------------------------------------------------------------------------------------


def listing(folder: Path) -> Target:
    """Lists of files, of each data set that has some: nothing outside the root is named, whatever they say."""
    root, outside = folder / "root", folder / "outside"
    outside.mkdir()
    (outside / "secret.png").touch()
    for name in ("train", "trainannot", "images", "masks"):
        (root / name).mkdir(parents=True)
        for stem in ("a_1", "b_2", "0016E5_3"):
            (root / name / f"{stem}.png").touch()
    for kind in ("images", "annotations"):
        for part in ("training", "validation"):
            (root / kind / part).mkdir(parents=True)
            (root / kind / part / "ADE_1.png").touch()
    (root / "train" / "link").symlink_to(outside)
    (root / "train" / "linked.png").symlink_to(outside / "secret.png")
    own = folder / "folder"
    for name in ("images", "masks"):
        shutil.copytree(root / "train", own / name, symlinks=True, ignore=lambda *_: ["link", "linked.png"])
    (own / "classes.yaml").write_text("classes: [road, car]")
    pairs = [Pair(path, path, path.stem, path.stem.split("_")[0]) for path in sorted((root / "images").glob("*.png"))]

    def check(data: bytes) -> None:
        kind, content = data[:1], data[1:]
        path = {b"c": root / "train.txt", b"f": own / "train.txt", b"s": root / "sceneCategories.txt"}.get(
            kind, folder / "held.txt"
        )
        path.write_bytes(content)
        if kind == b"c":
            found, _ = camvid_split(root, "train")
        elif kind == b"f":
            found, _ = folder_split(own, "train")
        elif kind == b"s":
            found, _ = ade20k_split(root, "train")
        else:
            try:
                found = [pair for part in hold_out(pairs, path) for pair in part]
            except ValueError as error:
                if not str(error).startswith("data.args.hold_out"):
                    raise
                return
        for pair in found:
            for file in (pair.image, pair.label):
                if "outside" in os.path.realpath(str(file)) or not Path(str(file)).is_file():
                    raise Wrong(f"{file} is named")

    camvid = "".join(f"/SegNet/CamVid/train/{n}.png /SegNet/CamVid/trainannot/{n}.png\n" for n in ("a_1", "b_2"))
    return Target(
        [
            b"c" + camvid.encode(),
            b"ctrain/a_1.png trainannot/a_1.png\n# note\n\ntrain\\b_2.png trainannot\\b_2.png\r\n",
            b"fa_1\nimages/b_2.png\n",
            b"fa_1.png masks/a_1.png\n",
            b"sADE_1 street\n",
            b"ha\n0016E5_3\n",
        ],
        check,
        (*OUTSIDE, b"\xef\xbb\xbf", b"\x85", b"\xe2\x80\xa8", b"\xff", b" ", b"\n", b"trainannot/", b"a_1", b"#"),
    )


def classes(folder: Path) -> Target:
    """classes.yaml: the table says what the file says, as another reader of YAML understands it."""
    path = folder / "classes.yaml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        table = read_classes(path, folder)
        content = yaml.safe_load(data.decode("utf-8-sig"))
        if [str(name) for name in content["classes"]] != list(table.classes):
            raise Wrong(f"classes {table.classes} of {content['classes']}")
        for raw, name in (content.get("labels") or dict(enumerate(table.classes))).items():
            expected = IGNORE if name == "ignore" else table.classes.index(str(name))
            if table.table[raw] != expected:
                raise Wrong(f"raw id {raw} is {table.table[raw]}, and the file says {name}")

    return Target(
        [
            b"classes: [road, car, sky]\n",
            b"classes: [road, 'on']\ncolors: [[0, 0, 0], [255, 10, 2]]\nignore: [255]\n",
            b"classes:\n  - road\n  - car\nlabels: {0: ignore, 7: road, 26: car}\nignore: [9]\n",
        ],
        check,
        YAML_WORDS,
    )


YAML_WORDS = (
    b"&a ", b"*a", b"!!python/object/apply:os.system ['id']", b"!!str ", b"${oc.env:FUZZ_SECRET_KEY}", b"<<: ", b"? ",
    b"on", b"no", b"~", b"010", b"1:30", b".nan", b"-.inf", b"1e-3", b"'", b'"', b"\\0", b"- ", b": ", b"{", b"}", b"[",
    b"]", b"|\n", b"# ", b"\t", b"---\n", b"%YAML 1.1\n", b"_target_: os.system", b"???", b"\xff", b"\xc2\x85",
    b"\xef\xbb\xbf", b"[" * 200,
)  # fmt: skip


# Pictures -------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    """A block of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each block of a PNG, as far as they are whole."""
    found, at = [], len(SIGNATURE)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            break
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def with_checksums(data: bytes) -> bytes:
    """A PNG whose blocks have right checksums, and an end."""
    if not data.startswith(SIGNATURE):
        return data
    blocks = chunks(data)
    end = [] if any(kind == b"IEND" for kind, _ in blocks) else [(b"IEND", b"")]
    return SIGNATURE + b"".join(chunk(kind, content) for kind, content in [*blocks, *end])


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def png(ids: np.ndarray, depth: int, color: int, interlace: bool = False) -> bytes:
    """Ids as a PNG of few bits, in gray (0) or with a palette (3)."""
    height, width = ids.shape
    rows = b""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    for left, top, x, y in passes if interlace else ((0, 0, 1, 1),):
        for row in ids[top::y, left::x]:
            bits = "".join(format(value, f"0{depth}b") for value in row)
            bits += "0" * (-len(bits) % 8)
            if bits:
                rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    palette = chunk(b"PLTE", bytes(index // 3 for index in range(3 * 2**depth))) if color == 3 else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))
    return SIGNATURE + header + palette + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def ids_by_libpng(data: bytes) -> np.ndarray | None:
    """The ids of a gray or palette PNG as libpng reads them: the palette is taken out, so that it gives the indices."""
    blocks = chunks(data)
    width, height, depth, color = struct.unpack(">IIBB", blocks[0][1][:10])
    if color not in (0, 3):
        return None
    header = struct.pack(">IIBB", width, height, depth, 0) + blocks[0][1][10:]
    kept = [(b"IHDR", header), *((kind, content) for kind, content in blocks[1:] if kind in (b"IDAT", b"IEND"))]
    plain = SIGNATURE + b"".join(chunk(kind, content) for kind, content in kept)
    found = cv2.imdecode(np.frombuffer(plain, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.ndim != 2:
        return None
    return found // {1: 255, 2: 85, 4: 17}.get(depth, 1)


PNG_WORDS = (
    b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"gAMA", b"sBIT", b"eXIf", b"zTXt",
    SIGNATURE, struct.pack(">IIBB", 40000, 40000, 8, 0), struct.pack(">II", 0x7FFFFFFF, 0x7FFFFFFF),
    chunk(b"tRNS", b"\0\1\0\2\0\3"), chunk(b"gAMA", struct.pack(">I", 20000)), chunk(b"tRNS", bytes(8)),
    chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    chunk(b"sBIT", b"\1\1\1"), chunk(b"cICP", b"\x09\x10\0\1"), chunk(b"PLTE", bytes(30)),
)  # fmt: skip


JPEG_WORDS = (
    b"\xff\xd8", b"\xff\xc0\0\x11\x08\xff\xff\xff\xff\3", b"\xff\xd9", b"\xff\xda", b"\xff\xc4", b"\xff\xdd\0\4",
)  # fmt: skip


def _ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (9, 13), np.uint8)


def label(folder: Path) -> Target:
    """Labels: the ids that libpng reads from the same pixels, at the size of the header."""
    path = folder / "label.png"
    wide = cv2.imencode(".png", _ids().astype(np.uint16))[1].tobytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        ids = read_label(path)
        if ids.dtype != np.uint8 or ids.shape != image_size(path):
            raise Wrong(f"ids {ids.dtype} {ids.shape}")
        expected = ids_by_libpng(data)
        if expected is None:
            raise Wrong("ids where libpng reads none")
        if not np.array_equal(ids, expected):
            raise Wrong(f"ids {np.unique(ids)[:9]} where libpng reads {np.unique(expected)[:9]}")

    few = [png(_ids() % min(2**depth, 255), depth, color) for depth in (1, 2, 4, 8) for color in (0, 3)]
    return Target([*few, png(_ids(), 8, 0, True), wide], check, PNG_WORDS, with_checksums)


def image(folder: Path) -> Target:
    """Images: of a PNG what Pillow reads from it too, of a JPEG a picture of the size that its header says."""
    path = folder / "image"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    rgb = Image.fromarray(pixels)
    smooth = Image.fromarray(cv2.resize(pixels, (24, 16), interpolation=cv2.INTER_CUBIC))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = read_image(path)
        if found.dtype != np.uint8 or found.shape != (*image_size(path), 3):
            raise Wrong(f"an image {found.dtype} {found.shape}")
        if data.startswith(SIGNATURE):
            try:
                with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
                    depth = data[24]
                    if picture.mode.startswith("I"):
                        expected = np.repeat((np.array(picture) >> 8).astype(np.uint8)[..., None], 3, 2)
                    else:
                        expected = np.array(picture.convert("RGB"))
            except (OSError, SyntaxError, ValueError):
                return
            difference = int(abs(found.astype(int) - expected).max())
            if difference:
                raise Wrong(f"pixels differ by {difference} from Pillow's ({depth} bits, colour type {data[25]})")

    return Target(
        [
            *(encoded(rgb.convert(mode)) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
            cv2.imencode(".png", pixels.astype(np.uint16) * 257)[1].tobytes(),
            png(_ids(), 8, 0, True),
            *(encoded(smooth.convert(mode), "JPEG", quality=90) for mode in ("RGB", "L")),
            encoded(smooth, "JPEG", progressive=True),
            *(encoded(smooth, form) for form in ("TIFF", "WEBP", "BMP", "GIF")),
        ],
        check,
        (
            *PNG_WORDS,
            b"\xff\xd8",
            b"\xff\xc0\0\x11\x08\xff\xff\xff\xff\3",
            b"\xff\xd9",
            b"\xff\xda",
            b"\xff\xc4",
            b"\xff\xdd\0\4",
        ),
        with_checksums,
    )


class Drawn:
    """Three pictures with labels."""

    names: tuple[str, ...] = ("a", "b", "c")
    groups: tuple[str, ...] = ("g", "g", "g")
    fingerprint = "drawn"

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Sample:
        """The picture of one index."""
        drawn = np.random.default_rng(index)
        height, width = 8 + index, 12
        return Sample(
            drawn.integers(0, 256, (height, width, 3), np.uint8), drawn.integers(0, 3, (height, width), np.uint8)
        )


def predictions(folder: Path) -> Target:
    """A folder of predictions in which one file was changed: the ids that libpng reads, at the label's size."""
    form, source, good = OfficialForm("camvid", TABLE), Drawn(), folder / "good"
    writer = PredictionWriter(good, form)
    for index, name in enumerate(source.names):
        writer.write(name, source.load(index).label)
    path = good / "b.png"
    label_ids = source.load(1).label

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = list(read_predictions(good, source, form, progress=False))
        if [one.name for one in found] != list(source.names):
            raise Wrong("predictions of other images")
        expected = ids_by_libpng(data)
        if expected is not None and not np.array_equal(found[1].prediction, np.where(expected == 255, 255, expected)):
            raise Wrong("a prediction is not what is in its file")

    other = encoded(Image.fromarray(label_ids % 2))
    return Target(
        [path.read_bytes(), other, png(label_ids, 8, 3), png(label_ids, 2, 0)], check, PNG_WORDS, with_checksums
    )


# What is kept beside the data -----------------------------------------------------------------------------------------


def complexity(folder: Path) -> Target:
    """Tables of complexity: of the right images, finite, with classes that can be; scored again where not."""
    source, kept = Drawn(), folder / "tables"
    scored = complexity_table(source, "spatial_information", folder=kept, progress=False)
    (path,) = kept.iterdir()

    def repair(data: bytes) -> bytes:
        import hashlib

        try:
            content = json.loads(data)
            content.pop("sha256", None)
            content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            return json.dumps(content).encode()
        except (ValueError, AttributeError, TypeError, RecursionError):
            return data

    def check(data: bytes) -> None:
        path.write_bytes(data)
        table = complexity_table(source, "spatial_information", folder=kept, progress=False)
        shapes_fit = table.values.shape == (3,) and table.classes_present.shape[0] == 3
        if table.names != source.names or not shapes_fit or table.classes_present.shape[1] > 255:
            raise Wrong(f"a table of {table.names}, {table.values.shape}, {table.classes_present.shape}")
        if not np.isfinite(table.values).all():
            raise Wrong(f"complexity {table.values}")
        if not table.from_cache and not np.array_equal(table.values, scored.values):
            raise Wrong("other values than were scored before")

    return Target([path.read_bytes()], check, JSON_WORDS, repair)


JSON_WORDS = (
    b"null", b"NaN", b"Infinity", b"true", b'"', b"{}", b"[]", b",", b":", b"-1", b"1e999", b"\\ud800", b"\\u0000",
    b"\xff",
    b"[" * 3000, b'"../../x"', b'"/etc/passwd"', b'{"a":1}', b"0", b"1000000000000", b'"<script>alert(1)</script>"',
)  # fmt: skip


def audit(folder: Path) -> Target:
    """The kept list of bad files: what is left out was in the data."""
    files = []
    for index, name in enumerate(Drawn.names):
        sample = Drawn().load(index)
        for kind, pixels in (("image", sample.image), ("label", sample.label)):
            Image.fromarray(pixels).save(folder / f"{name}_{kind}.png")
        files.append(Pair(folder / f"{name}_image.png", folder / f"{name}_label.png", name, "g"))
    files[1].image.write_bytes(b"damaged")
    usable_pairs(files, TABLE, "quarantine", 0.5, folder=folder, progress=False)
    (path,) = (folder / "audits").iterdir()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        left = usable_pairs(files, TABLE, "quarantine", 0.5, folder=folder, progress=False)
        if not set(left) <= set(files):
            raise Wrong("pairs that are not in the data")

    return Target([path.read_bytes(), b'{"version": 1, "bad": []}'], check, JSON_WORDS)


def decoded(folder: Path) -> Target:
    """Stores of decoded images: the pixels of the source, whatever the store holds."""
    source, place = Drawn(), folder / "cache"
    open_cache(source, folder=place, progress=False)
    (store,) = (path for path in (place / "decoded").iterdir() if path.is_dir())
    names = ("store.json", "index.npy", "samples.bin")
    good = {name: (store / name).read_bytes() for name in names}

    def put(data: bytes) -> dict[str, bytes]:
        return {**good, names[data[0] % 3 if data else 0]: data[1:]}

    def repair(data: bytes) -> bytes:
        return data[:1] + b"\0repaired" + data[1:] if data else data

    def check(data: bytes) -> None:
        repaired = data[1:10] == b"\0repaired"
        files = put(data[:1] + data[10:] if repaired else data)
        if repaired:
            try:
                header = json.loads(files["store.json"])
                header["index_crc32"] = zlib.crc32(files["index.npy"])
                header["bytes"] = len(files["samples.bin"])
                files["store.json"] = json.dumps(header).encode()
            except (ValueError, TypeError, RecursionError):
                pass
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir()
        for name, content in files.items():
            (store / name).write_bytes(content)
        cached = open_cache(source, folder=place, progress=False)
        for index in range(len(source)):
            for mine, theirs in zip(cached.load(index), source.load(index), strict=True):
                if not np.array_equal(mine, theirs):
                    raise Wrong(f"sample {index} is not the source's")

    seeds = [bytes([number]) + good[name] for number, name in enumerate(names)]
    words = (*JSON_WORDS, b"'shape': (9999999999, 4)", b"'descr': '|O'", b"'fortran_order': True", b"__import__('os')")
    return Target(seeds, check, words, repair)


# Videos ---------------------------------------------------------------------------------------------------------------


def video(folder: Path) -> Target:
    """Video files: frames of one size, no more than there can be."""
    import av

    path = folder / "film"
    rows, columns = np.mgrid[:32, :48]
    pictures = [
        np.stack([rows * 4 + 9 * n, columns * 3, 255 - rows * 2], -1).clip(0, 255).astype(np.uint8) for n in range(4)
    ]
    seeds = []
    for suffix, codec, pixels in (("mkv", "ffv1", "bgr0"), ("mp4", "mpeg4", "yuv420p"), ("avi", "mjpeg", "yuvj420p")):
        file = folder / f"seed.{suffix}"
        with av.open(str(file), "w") as container:
            stream: Any = container.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = 32, 48, pixels
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        seeds.append(file.read_bytes())

    def check(data: bytes) -> None:
        path.write_bytes(data)
        size = None
        for number, frame in enumerate(VideoFile(str(path), max_pixels=1 << 20).frames()):
            size = size or frame.image.shape
            if frame.image.dtype != np.uint8 or frame.image.shape != size or number > 10_000:
                raise Wrong(f"frame {number} is {frame.image.shape}")

    return Target(
        seeds, check, (b"moov", b"mdat", b"stsd", b"tkhd", b"concat", b"file:///etc/passwd", b"#EXTM3U\n", b"LIST")
    )
