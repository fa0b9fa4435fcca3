"""Cityscapes, fine annotations: 2975 / 500 / 1525 images of 1024 x 2048, 19 classes.

The download holds labelIds; they are mapped to train ids in memory, so that no conversion has to be run first. Where
labelTrainIds have been made for every image of a split, those are read.
"""

from pathlib import Path

from dance_seg.errors import DataError
from dance_seg.sample import IGNORE
from datamodules.label_table import CITYSCAPES_IDS, LabelTable, label_table
from datamodules.listing import data_root, list_files, list_folders, some, what_is_there
from datamodules.sources import Pair

SPLITS = ("train", "val", "trainval", "test")
LAYOUT = (
    "leftImg8bit/<split>/<city>/*_leftImg8bit.png (leftImg8bit_trainvaltest.zip) and "
    "gtFine/<split>/<city>/*_gtFine_labelIds.png (gtFine_trainvaltest.zip)"
)
IMAGE, LABEL_IDS, LABEL_TRAIN_IDS = "_leftImg8bit", "_gtFine_labelIds", "_gtFine_labelTrainIds"

_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
_PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip

CITYSCAPES: LabelTable = label_table(
    _CLASSES,
    raw_to_train={raw: train for train, raw in enumerate(CITYSCAPES_IDS)},
    ignore=[*(raw for raw in range(34) if raw not in CITYSCAPES_IDS), IGNORE],  # 255: license plate, -1 in 8 bits
    palette=_PALETTE,
)
"""For files of labelIds."""

CITYSCAPES_TRAIN_IDS: LabelTable = label_table(
    _CLASSES, raw_to_train={train: train for train in range(19)}, ignore=[IGNORE], palette=_PALETTE
)
"""For files of labelTrainIds."""


def cityscapes_split(root: str | Path, split: str) -> tuple[list[Pair], LabelTable]:
    """The pairs of a split (train, val, trainval or test) in order of name, and the table of their label files.

    The group of an image is its city. A test split without gtFine has no labels. Raises DataError, saying what is
    expected where, when a folder is missing or empty, or an image has no label or a label no image.
    """
    if split not in SPLITS:
        raise ValueError(f"cityscapes has no split {split!r}; choose one of {', '.join(SPLITS)}")
    path = data_root(root, LAYOUT)
    parts = ("train", "val") if split == "trainval" else (split,)
    images = {name: image for part in parts for name, image in _images(path, part).items()}
    if split == "test" and not (path / "gtFine" / "test").is_dir():
        return [Pair(image, None, name, image.parent.name) for name, image in images.items()], CITYSCAPES
    labels = {name: found for part in parts for name, found in _labels(path, part).items()}
    _refuse_unpaired(path, images, labels)
    kind, table = LABEL_IDS, CITYSCAPES
    if all(LABEL_TRAIN_IDS in found for found in labels.values()):
        kind, table = LABEL_TRAIN_IDS, CITYSCAPES_TRAIN_IDS
    lacking = [name for name, found in labels.items() if kind not in found]
    if lacking:
        raise DataError(
            f"{path / 'gtFine'} has *{LABEL_TRAIN_IDS}.png for some images and *{LABEL_IDS}.png for others; "
            f"{len(lacking)} lack the latter: {some(lacking)}"
        )
    return [Pair(image, labels[name][kind], name, image.parent.name) for name, image in images.items()], table


def _images(root: Path, part: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for city in _cities(root, "leftImg8bit", part):
        here = {name: path for name, path in list_files(city, root, (".png",)).items() if name.endswith(IMAGE)}
        if not here:
            labels = any("_gtFine_" in name for name in list_files(city, root, (".png",)))
            why = "labels: the two archives are swapped" if labels else what_is_there(city)
            raise DataError(f"{city} holds no *{IMAGE}.png but {why}; expected in {root}: {LAYOUT}")
        found |= {name.removesuffix(IMAGE): path for name, path in here.items()}
    return found


def _labels(root: Path, part: str) -> dict[str, dict[str, Path]]:
    """For each image's name the label files of each kind."""
    found: dict[str, dict[str, Path]] = {}
    for city in _cities(root, "gtFine", part):
        here = list_files(city, root, (".png",))
        for name, path in here.items():
            for kind in (LABEL_IDS, LABEL_TRAIN_IDS):
                if name.endswith(kind):
                    found.setdefault(name.removesuffix(kind), {})[kind] = path
        if here and all(name.endswith(IMAGE) for name in here):
            raise DataError(f"{city} holds images: the two archives are swapped; expected in {root}: {LAYOUT}")
    return found


def _cities(root: Path, kind: str, part: str) -> list[Path]:
    folder = root / kind / part
    if not folder.is_dir():
        coarse = " (gtCoarse is there, but only fine labels are read)" if (root / "gtCoarse").is_dir() else ""
        why = f"{coarse}; there: {what_is_there(root / kind)}" if (root / kind).is_dir() else coarse
        raise DataError(f"{folder} is missing{why}; expected in {root}: {LAYOUT}")
    cities = list_folders(folder, root)
    if not cities:
        raise DataError(f"{folder} holds no city folders but {what_is_there(folder)}; expected in {root}: {LAYOUT}")
    return cities


def _refuse_unpaired(root: Path, images: dict[str, Path], labels: dict[str, dict[str, Path]]) -> None:
    unlabelled = [name for name in images if name not in labels]
    if unlabelled:
        raise DataError(
            f"{root / 'gtFine'} has no *{LABEL_IDS}.png for {len(unlabelled)} of {len(images)} images: "
            f"{some(unlabelled)}; unpack gtFine_trainvaltest.zip there"
        )
    pictureless = [name for name in labels if name not in images]
    if pictureless:
        raise DataError(
            f"{root / 'leftImg8bit'} has no image for {len(pictureless)} of {len(labels)} labels: "
            f"{some(pictureless)}; unpack leftImg8bit_trainvaltest.zip there"
        )
