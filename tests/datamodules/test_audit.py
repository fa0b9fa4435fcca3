"""The audit counts what is there, names what is bad, and notices what training would not."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.audit import check_pairs, errors_found, find_twins, warnings_found
from datamodules.camvid import CAMVID
from datamodules.cityscapes import CITYSCAPES, CITYSCAPES_IDS
from datamodules.label_table import LabelTable, label_table
from datamodules.sources import Pair

TABLE = label_table(("road", "car", "sky"), raw_to_train={7: 0, 8: 0, 26: 1, 23: 2}, ignore=[0, 255])


def make_pair(folder: Path, name: str, ids: list[list[int]], color: int) -> Pair:
    folder.mkdir(exist_ok=True)
    image, label = folder / f"{name}.png", folder / f"{name}_label.png"
    raw = np.array(ids, np.uint8)
    Image.fromarray(np.full((*raw.shape, 3), color, np.uint8)).save(image)
    Image.fromarray(raw).save(label)
    return Pair(image, label, name, "")


def warnings_of(folder: Path, ids: list[list[int]], table: LabelTable) -> str:
    return " ".join(warnings_found({"train": check_pairs([make_pair(folder, "a", ids, 0)], table, progress=False)}))


def test_pixels_and_images_of_each_class_are_counted(tmp_path: Path) -> None:
    """Road: ids 7 and 8, two pixels in a and one in b; car: three pixels of a; void: id 0, one pixel of b."""
    pairs = [make_pair(tmp_path, "a", [[7, 8, 26, 26, 26]], 0), make_pair(tmp_path, "b", [[7, 0]], 1)]
    report = check_pairs(pairs, TABLE, progress=False)
    assert report.class_pixels == (3, 3, 0)
    assert report.class_images == (2, 1, 0)
    assert report.ignored_pixels == 1
    assert report.raw_pixels == {0: 1, 7: 2, 8: 1, 26: 3}
    assert report.sizes == {(1, 5): 1, (1, 2): 1}
    assert (report.num_pairs, report.num_unlabelled, report.bad, report.all_ignored) == (2, 0, (), ())
    assert errors_found({"train": report}) == []
    assert json.loads(json.dumps(report.as_record()))["classes"]["car"] == {"pixels": 3, "images": 1}


def test_bad_files_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    pairs = [make_pair(tmp_path, name, [[7, 26]], number) for number, name in enumerate("abcde")]
    labels = [Path(str(pair.label)) for pair in pairs]
    pairs[0].image.write_bytes(b"")
    labels[1].unlink()
    Image.new("RGB", (2, 1), (0, 0, 142)).save(labels[2])
    Image.new("L", (3, 1), 7).save(labels[3])
    report = check_pairs(pairs, TABLE, progress=False)
    assert [file.path for file in report.bad] == [pairs[0].image, labels[1], labels[2], labels[3]]
    for file, reason in zip(report.bad, ("is empty", "is missing", "colour mask", "1 x 3 pixels"), strict=True):
        assert reason in file.reason
    assert report.class_images == (1, 1, 0)
    assert errors_found({"val": report}) == ["val: 4 of 5 pairs cannot be used"]


def test_ids_outside_the_table_get_one_diagnosis_over_all_files(tmp_path: Path) -> None:
    pairs = [make_pair(tmp_path, "a", [[7, 8]], 0), make_pair(tmp_path, "b", [[11, 26, 23, 21]], 1)]
    report = check_pairs(pairs, CAMVID, progress=False)
    assert report.ids_outside == {21: 1, 23: 1, 26: 1}
    (bad, found) = errors_found({"train": report})
    assert bad == "train: 1 of 2 pairs cannot be used"
    assert "ids 7, 8, 11: these are Cityscapes labelIds" in found


def test_labels_ignored_everywhere_are_named(tmp_path: Path) -> None:
    pairs = [make_pair(tmp_path, "a", [[0, 255]], 0), make_pair(tmp_path, "b", [[7, 0]], 1)]
    report = check_pairs(pairs, TABLE, progress=False)
    assert report.all_ignored == (pairs[0].label,)
    assert "1 labels are ignored everywhere" in " ".join(warnings_found({"train": report}))


def test_a_split_without_labels_is_checked_for_its_images(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "a", [[7]], 0)._replace(label=None)
    report = check_pairs([pair], TABLE, progress=False)
    assert (report.num_unlabelled, report.bad, report.class_images) == (1, (), (0, 0, 0))
    assert warnings_found({"test": report}) == []


def test_the_same_pixels_in_two_files_are_found_across_splits_however_they_are_saved(tmp_path: Path) -> None:
    train = [
        make_pair(tmp_path / "train", name, [[7, 23, 26]], color) for name, color in (("a", 5), ("b", 6), ("c", 5))
    ]
    val = [make_pair(tmp_path / "val", name, [[7, 23, 26]], color) for name, color in (("d", 6), ("e", 9))]
    Image.open(val[0].image).save(val[0].image, compress_level=0)
    reports = {"train": check_pairs(train, TABLE, progress=False), "val": check_pairs(val, TABLE, progress=False)}
    assert [(twin.split, twin.path.stem, twin.other_split, twin.other_path.stem) for twin in find_twins(reports)] == [
        ("train", "a", "train", "c"),
        ("train", "b", "val", "d"),
    ]
    assert warnings_found(reports) == [
        "1 images occur in two splits: train b.png = val d.png",
        "1 images occur twice in one split: train a.png = train c.png",
    ]


@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (4, 4)])
def test_pictures_of_one_colour_but_different_shape_are_not_the_same(tmp_path: Path, shape: tuple[int, int]) -> None:
    pairs = [make_pair(tmp_path, "a", [[7] * 16], 3), make_pair(tmp_path, "b", np.full(shape, 7).tolist(), 3)]
    assert find_twins({"train": check_pairs(pairs, TABLE, progress=False)}) == []


def test_a_two_valued_mask_whose_white_is_ignored_is_noticed(tmp_path: Path) -> None:
    things = label_table(("background", "thing"), raw_to_train={0: 0, 1: 1})
    assert "255 for white" in warnings_of(tmp_path, [[0, 255]], things)
    assert "255 for white" not in warnings_of(tmp_path, [[0, 1, 255]], things)


def test_train_ids_in_files_named_label_ids_are_noticed(tmp_path: Path) -> None:
    assert "labelTrainIds in files named labelIds" in warnings_of(tmp_path, [[0, 1, 18, 255]], CITYSCAPES)
    assert "labelTrainIds" not in warnings_of(tmp_path, [list(CITYSCAPES_IDS)], CITYSCAPES)


def test_classes_that_never_occur_are_named(tmp_path: Path) -> None:
    assert "2 classes occur in no image: car, sky" in warnings_of(tmp_path, [[7, 0]], TABLE)
