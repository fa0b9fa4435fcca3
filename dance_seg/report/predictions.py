"""Validation images beside their labels, predictions and errors, as a page shows them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dance_seg.errors import DataError
from dance_seg.report.page import Key, Legend, Panel, Panels, Section, listed
from dance_seg.report.pictures import (
    IGNORED,
    WRONG,
    Indices,
    embedded_image,
    embedded_indices,
    fitted,
    marked_errors,
    points_right,
    read_image,
    read_indices,
)
from dance_seg.report.runs import Picture, Run

MOST_PICTURES = 8
PICTURE_BYTES = 2_600_000  # of validation pictures in a page


def predictions(run: Run) -> Section:
    """Image, label, prediction and errors of a few validation images."""
    title = "Predictions beside labels"
    shown, problems = read_pictures(run.pictures[:MOST_PICTURES])
    if not shown:
        return Section(title, note=problems or "No pictures yet: they are kept at each validation.")
    rows = fitted(lambda width: [_panels(one, width) for one in shown], PICTURE_BYTES, panels_bytes)
    note = "Validation images as the newest validation saw them. Wrong pixels are red; dark ones are not scored."
    return Section(title, (*rows, Legend(class_keys(run, shown))), f"{note} {problems}".strip())


class Shown(NamedTuple):
    """A validation picture, read."""

    picture: Picture
    image: np.ndarray  # (H, W, 3)
    label: Indices
    prediction: Indices


def read_pictures(pictures: Sequence[Picture]) -> tuple[list[Shown], str]:
    """The pictures with image, label and prediction read, and a line about those that cannot be."""
    shown, problems = [], []
    for picture in pictures:
        try:
            label, prediction = read_indices(picture.label), read_indices(picture.prediction)
            if label.ids.shape != prediction.ids.shape:
                raise DataError(f"{picture.label}: label and prediction differ in size")
            shown.append(Shown(picture, read_image(picture.image), label, prediction))
        except DataError as error:
            problems.append(str(error))
    return shown, f"Left out: {listed(problems, 2)}." if problems else ""


def _panels(shown: Shown, width: int) -> Panels:
    picture, image, label, prediction = shown
    right = points_right(label.ids, prediction.ids)
    errors = marked_errors(image, label.ids, prediction.ids)
    return Panels(
        (
            Panel(embedded_image(image, width), "image"),
            Panel(embedded_indices(label, width), "label"),
            Panel(embedded_indices(prediction, width), "prediction"),
            Panel(embedded_image(errors, width), "errors"),
        ),
        title=picture.name,
        note="" if right is None else f"{right:.1f} % of the scored pixels are right",
    )


def panels_bytes(rows: Iterable[Panels]) -> int:
    """How large the pictures of rows are."""
    return sum(len(panel.uri) for row in rows for panel in row.panels)


def class_keys(run: Run, shown: Sequence[Shown]) -> tuple[Key, ...]:
    """The colours of the classes in the pictures; only of errors where the run does not name its classes."""
    present = sorted({int(i) for one in shown for ids in (one.label.ids, one.prediction.ids) for i in np.unique(ids)})
    palette = shown[0].label.palette
    named = [(run.classes[i], palette[i]) for i in present if i < len(run.classes)]
    named += [("wrong", np.array(WRONG)), ("not scored", np.array(IGNORED))]
    return tuple(Key(name, color="rgb({}, {}, {})".format(*(int(value) for value in color))) for name, color in named)
