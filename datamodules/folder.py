"""A user's own images, with no code: images/, masks/ and classes.yaml in one folder.

    images/train/a.jpg  masks/train/a.png  images/val/b.jpg  masks/val/b.png       split by folder
    images/a.jpg        masks/a.png        train.txt, val.txt with names           split by list
    images/a.jpg        masks/a.png                                                split by the hash of the name

    # classes.yaml
    classes: [road, car, sky]
    colors: [[128, 64, 128], [0, 0, 142], [70, 130, 180]]   # optional
    labels: {1: road, 2: car, 3: sky, 0: ignore}            # optional; without it raw id i is class i
    ignore: [255]                                           # optional; this is the default

Folders below are searched too, and are the images' groups for `hold_out`.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dance_seg.errors import DataError, short
from dance_seg.plain_data import parse_yaml
from datamodules.image_files import IMAGE_SUFFIXES, LABEL_SUFFIXES
from datamodules.label_table import MAX_CLASSES, LabelTable, label_table
from datamodules.listing import data_root, list_files, read_lines, refuse_outside, some, what_is_there
from datamodules.sources import Pair, hold_out

SPLITS = ("train", "val", "trainval", "test")
LAYOUT = "images/, masks/ and classes.yaml (images and masks with subfolders train and val, or without)"
KEYS = ("classes", "colors", "labels", "ignore")
_MAX_YAML_BYTES = 1_000_000


def folder_split(root: str | Path, split: str, *, val_fraction: float = 0.2) -> tuple[list[Pair], LabelTable]:
    """The pairs of a split (train, val, trainval or test) in order of name, and the table that classes.yaml gives.

    Where images/ has no subfolder named after a split, train.txt, val.txt and test.txt say which names belong to it;
    where there are none of these either, `val_fraction` of the images, by the hash of their names, is val. Raises
    DataError, saying what is expected where, for anything missing, unpaired or malformed.
    """
    if split not in SPLITS:
        raise ValueError(f"folder has no split {split!r}; choose one of {', '.join(SPLITS)}")
    path = data_root(root, LAYOUT)
    for name in ("images", "masks"):
        if not (path / name).is_dir():
            raise DataError(f"{path / name} is missing (there: {what_is_there(path)}); expected in {path}: {LAYOUT}")
    table = read_classes(path / "classes.yaml", path)
    parts = ("train", "val") if split == "trainval" else (split,)
    if any((path / "images" / part).is_dir() for part in SPLITS):
        beside = list_files(path / "images", path, IMAGE_SUFFIXES)
        if beside:
            raise DataError(
                f"{path / 'images'} holds folders of splits and {len(beside)} images beside them: {some(beside)}"
            )
        return [pair for part in parts for pair in _paired(path, part)], table
    pairs = _paired(path, "")
    if any((path / f"{part}.txt").is_file() for part in SPLITS):
        return [pair for part in parts for pair in _listed(path, part, pairs)], table
    if split == "test":
        raise DataError(f"{path} has no split test: no images/test, and no test.txt")
    if split == "trainval":
        return pairs, table
    try:
        train, val = hold_out(pairs, val_fraction)
    except ValueError as error:
        raise ValueError(f"data.args.val_fraction is {val_fraction!r} of {len(pairs)} images: {error}") from None
    return (train if split == "train" else val), table


def _paired(root: Path, part: str) -> list[Pair]:
    images_folder, masks_folder = root / "images" / part, root / "masks" / part
    for folder in (images_folder, masks_folder):
        if not folder.is_dir():
            raise DataError(
                f"{folder} is missing (there: {what_is_there(folder.parent)}); expected in {root}: {LAYOUT}"
            )
    images = list_files(images_folder, root, IMAGE_SUFFIXES, recurse=True)
    masks = list_files(masks_folder, root, LABEL_SUFFIXES, recurse=True)
    for folder, found, suffixes in ((images_folder, images, IMAGE_SUFFIXES), (masks_folder, masks, LABEL_SUFFIXES)):
        if not found:
            raise DataError(f"{folder} holds no {' or '.join(suffixes)} but {what_is_there(folder)}")
    without_mask = [name for name in images if name not in masks]
    without_image = [name for name in masks if name not in images]
    if without_mask or without_image:
        told = [f"{len(without_mask)} images have no mask: {some(without_mask)}"] if without_mask else []
        told += [f"{len(without_image)} masks have no image: {some(without_image)}"] if without_image else []
        raise DataError(f"{masks_folder}: {'; '.join(told)}; image and mask share their name up to the suffix")
    return [Pair(image, masks[name], name, _group(name)) for name, image in images.items()]


def _group(name: str) -> str:
    return name.rpartition("/")[0]


def _listed(root: Path, part: str, pairs: list[Pair]) -> list[Pair]:
    path = root / f"{part}.txt"
    if not path.is_file():
        raise DataError(f"{path} is missing; there are lists of other splits")
    by_name = {pair.name: pair for pair in pairs}
    listed: dict[str, Pair] = {}
    for number, line in read_lines(refuse_outside(path, root)):
        name = line.replace("\\", "/").removeprefix("images/")
        first = name.split()[0] if name.split() else name  # lines may go on with the mask
        tried = (name, name.rpartition(".")[0], first, first.rpartition(".")[0])
        pair = next((by_name[attempt] for attempt in tried if attempt in by_name), None)
        if pair is None:
            close = get_close_matches(name, by_name, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(f"{path}, line {number}: images/ has no {short(name)}{hint}")
        listed[pair.name] = pair
    if not listed:
        raise DataError(f"{path} lists no images")
    return list(listed.values())


# classes.yaml -----------------------------------------------------------------------------------------------------


def read_classes(path: Path, root: Path) -> LabelTable:
    """The label table of a classes.yaml.

    Raises DataError, naming the key, the value and what is allowed, when the file is missing or malformed.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; it names the classes, such as 'classes: [road, car, sky]'")
    if refuse_outside(path, root).stat().st_size > _MAX_YAML_BYTES:
        raise DataError(f"{path} is larger than {_MAX_YAML_BYTES:,} bytes")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds {_short(content)}; expected keys, first of all 'classes: [road, car, sky]'")
    for key in content:
        if key not in KEYS:
            close = get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(f"{path}: there is no key {_short(key)}; {hint}Keys: {', '.join(KEYS)}")
    try:
        classes = _classes(content.get("classes"))
        return label_table(classes, palette=_colors(content.get("colors"), classes), **_labels(content, classes))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _classes(value: Any) -> list[str]:
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_CLASSES:
        raise ValueError(
            f"classes is {_short(value)}; expected a list of 2 to {MAX_CLASSES} names, background among them"
        )
    for number, name in enumerate(value):
        if not isinstance(name, str) or not name.strip() or name == "ignore":
            quoted = "" if isinstance(name, str) else "; put it in quotes"
            raise ValueError(f"classes[{number}] is {_short(name)}; expected a name other than 'ignore'{quoted}")
        if name in value[:number]:
            raise ValueError(f"classes[{number}] names {name!r} a second time")
    return value


def _colors(value: Any, classes: list[str]) -> list[tuple[int, int, int]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != len(classes):
        raise ValueError(f"colors is {_short(value)}; expected {len(classes)} of them, one for each class")
    for number, color in enumerate(value):
        if not isinstance(color, list) or len(color) != 3 or not all(_is_byte(part) for part in color):
            raise ValueError(f"colors[{number}] is {_short(color)}; expected [red, green, blue] from 0 to 255")
    return [(color[0], color[1], color[2]) for color in value]


def _labels(content: Mapping[Any, Any], classes: list[str]) -> dict[str, Any]:
    """The arguments of `label_table` that say what each raw id means."""
    labels, ignore = content.get("labels"), content.get("ignore")
    if ignore is not None and (not isinstance(ignore, list) or not all(_is_byte(raw) for raw in ignore)):
        raise ValueError(f"ignore is {_short(ignore)}; expected a list of raw ids from 0 to 255, such as [255]")
    if labels is None:
        raw_to_train = {raw: raw for raw in range(len(classes))}
        return {"raw_to_train": raw_to_train, "ignore": [255] if ignore is None else dict.fromkeys(ignore)}
    if not isinstance(labels, Mapping):
        raise ValueError(
            f"labels is {_short(labels)}; expected raw ids and what they mean, such as {{0: ignore, 1: road}}"
        )
    for raw, name in labels.items():
        if not _is_byte(raw):
            raise ValueError(f"labels has the key {_short(raw)}; expected a raw id from 0 to 255")
        if name not in (*classes, "ignore"):
            close = get_close_matches(str(name), classes, n=1) if isinstance(name, str) else []
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"labels[{raw}] is {_short(name)}; {hint}Choose a class or 'ignore': {some(classes, 12)}")
    ignored = dict.fromkeys([raw for raw, name in labels.items() if name == "ignore"] + (ignore or []))
    if ignore is None and 255 not in labels:
        ignored[255] = None
    raw_to_train = {raw: classes.index(name) for raw, name in labels.items() if name != "ignore"}
    return {"raw_to_train": raw_to_train, "ignore": ignored}


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _short(value: Any) -> str:
    return short(value) if value is not None else "missing"
