"""Raw ids become train ids by one table, and ids outside it are explained."""

import json
from pathlib import Path

import numpy as np
import pytest

from dance_seg.errors import DataError
from datamodules.ade20k import ADE20K
from datamodules.camvid import CAMVID
from datamodules.cityscapes import CITYSCAPES, CITYSCAPES_TRAIN_IDS
from datamodules.label_table import LabelTable, count_ids, default_palette, diagnose, label_table

TWO = label_table(("road", "car"), raw_to_train={0: 0, 1: 1})


def test_every_allowed_id_is_mapped_as_the_table_says() -> None:
    for table in (TWO, CAMVID, CITYSCAPES, CITYSCAPES_TRAIN_IDS, ADE20K):
        raw = np.array([table.allowed], np.uint8)
        assert table.apply(raw, Path("a.png")).tolist() == [[table.table[value] for value in table.allowed]]


def test_an_id_outside_the_table_is_an_error_with_path_ids_and_pixel_counts() -> None:
    raw = np.full((10, 10), 1, np.uint8)
    raw[0, :7], raw[1, 0] = 200, 9
    with pytest.raises(DataError) as raised:
        TWO.apply(raw, Path("masks/a.png"))
    assert str(raised.value).startswith(
        "masks/a.png: raw ids 9 (1 pixel), 200 (7 pixels) are not in the label table, which knows 0 to 1 and 255"
    )


def test_each_single_id_is_allowed_or_refused_as_the_table_says() -> None:
    for raw in range(256):
        if CAMVID.table[raw] == -1:
            with pytest.raises(DataError):
                CAMVID.apply(np.array([[0, raw]], np.uint8), Path("a.png"))
        else:
            CAMVID.apply(np.array([[0, raw]], np.uint8), Path("a.png"))
    assert CAMVID.allowed == tuple(range(12))


def test_wider_integers_are_mapped_too_and_never_wrap() -> None:
    assert TWO.apply(np.array([[0, 255]], np.int64), Path("a.png")).tolist() == [[0, 255]]
    with pytest.raises(DataError, match="256 "):
        TWO.apply(np.array([[0, 256]], np.int64), Path("a.png"))
    with pytest.raises(DataError, match="negative ids"):
        TWO.apply(np.array([[0, -1]], np.int16), Path("a.png"))


def test_a_view_that_is_not_contiguous_is_mapped_right() -> None:
    raw = np.array([[0, 1, 0], [1, 1, 0]], np.uint8)
    np.testing.assert_array_equal(TWO.apply(raw.T, Path("a.png")), raw.T)


def test_a_record_survives_json_and_gives_the_same_table() -> None:
    assert LabelTable.from_record(json.loads(json.dumps(CITYSCAPES.as_record()))) == CITYSCAPES


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"classes": []}, "needs 1 to 254 classes"),
        ({"classes": ["road", "road"]}, "named twice"),
        ({"palette": [[0, 0, 0]]}, "as many colours"),
        ({"palette": [[0, 0, 0], [0, 0, 256]]}, "0 to 255"),
        ({"table": [0] * 255}, "256 raw ids"),
        ({"table": [2] * 256}, "mapped to 2"),
        ({"table": None}, "not the record"),
    ],
)
def test_a_record_that_is_no_table_is_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LabelTable.from_record(TWO.as_record() | change)


def test_a_table_needs_an_id_for_each_class_and_one_meaning_for_each_id() -> None:
    with pytest.raises(ValueError, match="no raw id is mapped to the class 'car'"):
        label_table(("road", "car"), raw_to_train={0: 0})
    with pytest.raises(ValueError, match="raw id 0 is both"):
        label_table(("road",), raw_to_train={0: 0}, ignore=[0])
    with pytest.raises(ValueError, match="raw id 256"):
        label_table(("road",), raw_to_train={256: 0})


def test_default_colours_differ_from_one_another_and_from_black() -> None:
    colors = default_palette(254)
    assert len({*colors, (0, 0, 0)}) == 255


@pytest.mark.parametrize(
    ("ids", "table", "diagnosis"),
    [
        ([7, 8, 11], TWO, "ids 7, 8, 11: these are Cityscapes labelIds"),
        ([0, 3, 7, 11, 21, 23, 26], CAMVID, "Cityscapes labelIds"),
        ([1, 4, 7, 8, 11, 23, 26, 33], CITYSCAPES_TRAIN_IDS, "Cityscapes labelIds"),
        ([0, 255], CAMVID, "two-valued mask"),
        ([3, 255], CAMVID, "two-valued mask"),
        ([1, 2], TWO, "count from 1"),
        ([0, 85, 170, 255], TWO, "multiples of 85"),
        (list(range(200)), TWO, "200 different values"),
        ([-1, 0], TWO, "negative ids"),
        ([0, 5], TWO, ""),
        ([0, 1], TWO, ""),
    ],
)
def test_likely_reasons_are_named(ids: list[int], table: LabelTable, diagnosis: str) -> None:
    found = diagnose(dict.fromkeys(ids, 10), table)
    assert (diagnosis in found) if diagnosis else found == ""


def test_a_few_pixels_in_between_look_like_interpolation() -> None:
    assert "interpolation" in diagnose({0: 5000, 1: 5000, 3: 20, 4: 30}, TWO)


def test_counting_agrees_with_unique_for_every_kind_of_array() -> None:
    raw = np.random.default_rng(0).integers(0, 9, (50, 60))
    ids, counts = np.unique(raw, return_counts=True)
    expected = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    assert count_ids(raw.astype(np.uint8)) == count_ids(raw - 0) == expected
