"""Predictions as files in each data set's official form, and files of predictions read back to be scored.

Cityscapes: labelIds, as its own evaluator and server take them. ADE20K: 1 to 150, 0 is never predicted. CamVid: the 11
indices. A folder of one's own: the ids of its masks. All are 8-bit PNG at the label's size, named after the image.

A figure from the wrong files looks like any other, so reading refuses what does not fit: an image without a prediction
or with two, files of no image of the split, other sizes, ids that are no class, and the labels themselves. Files that
were written here say inside which image they are of, so that a renamed one is found out; others' names are believed.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dance_seg.errors import DataError, first_line
from dance_seg.inference import Predicted
from dance_seg.sample import IGNORE, Sample
from datamodules.cityscapes import CITYSCAPES
from datamodules.image_files import PILLOW_ERRORS, read_label
from datamodules.label_table import LabelTable, count_ids
from datamodules.listing import list_files, some, what_is_there
from datamodules.sources import in_order, with_progress

NOTE = "dance_seg image"
"""The PNG text that names the image a prediction is of."""

_CITYSCAPES_FRAME = re.compile(r"[^_/]+_[0-9]+_[0-9]+")
_GRAY, _PALETTE = 0, 3


class OfficialForm(NamedTuple):
    """How a data set wants predictions: the ids in the files, and what follows the image's name in theirs."""

    data: str
    table: LabelTable
    ending: str = ""

    def path(self, name: str) -> Path:
        """Where the prediction of an image goes, relative to the folder.

        >>> official_form("ade20k", CITYSCAPES).path("ADE_val_00000001").as_posix()
        'ADE_val_00000001.png'
        """
        return Path(f"{name}{self.ending}.png")

    def name_of(self, stem: str) -> str | None:
        """The image that a file is of, by its path without suffix relative to the folder; None when it names none.

        Of Cityscapes files in any subfolder and with anything after the frame's number are taken, as by its evaluator.

        >>> form = official_form("cityscapes", CITYSCAPES)
        >>> form.name_of("val/bonn_000001_000019_leftImg8bit")
        'bonn_000001_000019'
        """
        if self.data == "cityscapes":
            found = _CITYSCAPES_FRAME.match(stem.rpartition("/")[2])
            return found.group() if found else None
        return stem.removesuffix(self.ending)

    def __str__(self) -> str:
        ids = self.table.raw_ids
        return f"8-bit PNG of the ids {some(ids, 4)} at the label's size, such as {self.path('IMAGE')}"


def official_form(data: str, table: LabelTable) -> OfficialForm:
    """The form of a data set (data.name of a recipe) whose labels are read with `table`.

    Cityscapes takes labelIds also where its labels are read from labelTrainIds.
    """
    if data == "cityscapes":
        return OfficialForm(data, CITYSCAPES, "_pred_labelIds")
    return OfficialForm(data, table)


# Writing ----------------------------------------------------------------------------------------------------------


class PredictionWriter:
    """Writes predictions into a new or empty folder.

    Raises DataError when the folder holds files already: old ones would be scored or handed in with the new.
    """

    def __init__(self, folder: Path, form: OfficialForm) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} is there and no empty folder; name a new one, or empty it first")
        self.folder, self.form = folder, form

    def write(self, name: str, prediction: np.ndarray) -> Path:
        """Write the prediction of one image, train ids uint8 (H, W); returns its file.

        Raises ValueError when an id is no class.
        """
        path = self.folder / self.form.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        note = PngInfo()
        note.add_itxt(NOTE, name)
        Image.fromarray(self.form.table.to_raw(prediction)).save(path, pnginfo=note)
        return path


# Reading ----------------------------------------------------------------------------------------------------------


class Labelled(Protocol):
    """Images with labels in a fixed order, such as SegmentationDataModule.source gives."""

    names: tuple[str, ...]

    def load(self, index: int) -> Sample:
        """The image and label of one index."""
        ...


class _Read(NamedTuple):
    """One prediction, and how it agrees with the label under two readings of its ids."""

    predicted: Predicted
    largest: int  # id in the file
    right: int
    right_as_train_ids: int


def find_predictions(folder: Path, names: Sequence[str], form: OfficialForm) -> list[Path]:
    """The file of each name's prediction, in the order of the names.

    Raises DataError when a name has no file or two, when a file is of no name, or there are no PNG files at all.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is {'no folder' if folder.exists() else 'missing'}; expected predictions: {form}")
    known = set(names)
    found: dict[str, Path] = {}
    unknown = []
    for stem, path in list_files(folder, folder, (".png",), recurse=True).items():
        name = form.name_of(stem)
        if name is None or name not in known:
            unknown.append(path)
        elif name in found:
            raise DataError(f"{path} is a second prediction of {name}, beside {found[name]}; keep one file per image")
        else:
            found[name] = path
    if not found and not unknown:
        raise DataError(f"{folder} holds no predictions but {what_is_there(folder)}; expected {form}")
    if unknown:
        raise DataError(
            f"{unknown[0]} is of no image of the split, as are {len(unknown) - 1} other files; its images are named "
            f"{some(names, 2)}: give the predictions of this split alone, or another --split"
        )
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"{folder} has no prediction for {len(missing)} of {len(names)} images: {some(missing)}; "
            f"expected files such as {form.path(missing[0])}"
        )
    return [found[name] for name in names]


def read_predictions(
    folder: Path,
    source: Labelled,
    form: OfficialForm,
    *,
    label_files: Sequence[Path | None] = (),
    progress: bool = True,
) -> Iterator[Predicted]:
    """The prediction of each image of a split, read from files, with its label, in the split's order.

    `label_files` are the files the labels come from, which are refused as predictions of themselves. Raises DataError
    as find_predictions does, before the first; for a file that is damaged, no 8-bit PNG of one channel, of another size
    or image than its label, or holds ids that are no class; and after the last when the files hold train ids that
    happen to be ids of the form as well. So there is no figure until the iteration has ended.
    """
    paths = find_predictions(folder, source.names, form)
    for path, label_file in zip(paths, label_files or [None] * len(paths), strict=True):
        if label_file is not None and path.samefile(label_file):
            raise DataError(f"{path} is the label itself; give the folder that holds the predictions")

    def read(index: int) -> _Read:
        return _read(paths[index], source.names[index], source.load(index).label, form)

    largest = right = right_as_train_ids = 0
    for one in with_progress(in_order(read, len(paths)), len(paths), "reading predictions", progress):
        largest = max(largest, one.largest)
        right, right_as_train_ids = right + one.right, right_as_train_ids + one.right_as_train_ids
        yield one.predicted
    if largest < form.table.num_classes and right_as_train_ids > right:
        raise DataError(
            f"{folder} seems to hold train ids (0 to {form.table.num_classes - 1}): read as such more pixels are right "
            f"than as ids of {form.data}; write the ids that its labels have: {form}"
        )


def _read(path: Path, name: str, label: np.ndarray, form: OfficialForm) -> _Read:
    raw = read_label(path)
    _refuse_other_kinds(path)
    if raw.shape != label.shape:
        raise DataError(
            f"{path} has {raw.shape[0]} x {raw.shape[1]} pixels but the label of {name} has {label.shape[0]} x "
            f"{label.shape[1]}; predict at the label's size: resize the logits, not the labels"
        )
    said = _note_in(path)
    if said not in (None, name):
        raise DataError(f"{path} is the prediction of {said}, written as such and renamed; give each image its own")
    train = form.table.apply(raw, path)
    counted = label != IGNORE
    no_class = counted & (train == IGNORE)
    if no_class.any():
        raise DataError(f"{path}: {_describe_no_class(raw, no_class, form)}")
    return _Read(
        Predicted(name, train, label),
        int(raw.max()),
        int(np.count_nonzero(counted & (train == label))),
        int(np.count_nonzero(counted & (raw == label))),
    )


def _describe_no_class(raw: np.ndarray, where: np.ndarray, form: OfficialForm) -> str:
    counts = count_ids(raw[where])
    shown = some([f"{one} ({number:,} pixels)" for one, number in counts.items()])
    message = (
        f"predicts {shown}, which are no class, where the label is one; classes are {some(form.table.raw_ids, 20)}"
    )
    if all(one < form.table.num_classes or one == IGNORE for one in count_ids(raw)):
        message += f". Train ids (0 to {form.table.num_classes - 1})? Write the ids that the labels of {form.data} have"
    return message


def _refuse_other_kinds(path: Path) -> None:
    """Raise DataError unless a whole PNG, as read_label has found it to be, is 8-bit gray or palette."""
    with path.open("rb") as file:
        depth, color = file.read(26)[24:26]
    if depth != 8 or color not in (_GRAY, _PALETTE):
        raise DataError(f"{path} has {depth} bits per pixel; predictions are PNG of one channel of 8 bits")


def _note_in(path: Path) -> str | None:
    """The image that a prediction written here is of."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get(NOTE)
    except PILLOW_ERRORS as error:
        raise DataError(f"{path} cannot be decoded: {first_line(error)}") from None
