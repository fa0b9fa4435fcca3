"""Cityscapes labelIds are mapped in memory, train ids are taken where all are there, mix-ups are named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.sample import IGNORE
from datamodules.cityscapes import CITYSCAPES, CITYSCAPES_TRAIN_IDS, cityscapes_split
from datamodules.scenes import CLASSES, render_scene
from datamodules.sources import FileSource
from tools.make_shapes import write_layout

TRAIN_OF_ID = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}  # fmt: skip


def make(
    root: Path, split: str = "train", cities: tuple[str, ...] = ("aachen", "bonn"), kind: str = "labelIds"
) -> Path:
    for city in cities:
        for frame in (1, 2):
            name = f"{city}_00000{frame}_000019"
            image = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
            label = root / "gtFine" / split / city / f"{name}_gtFine_{kind}.png"
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (17, 2)).save(image)
            ids = np.arange(34, dtype=np.uint8) if kind == "labelIds" else np.r_[np.arange(19), [255] * 15]
            Image.fromarray(ids.astype(np.uint8).reshape(2, 17)).save(label)
            label.with_name(f"{name}_gtFine_color.png").touch()
    return root


def test_label_ids_are_mapped_to_train_ids_in_memory(tmp_path: Path) -> None:
    """The map of cityscapesScripts' labels.py; -1, the license plate, is 255 in a file of 8 bits."""
    pairs, table = cityscapes_split(make(tmp_path), "train")
    label = FileSource(pairs, table).load(0).label.ravel().tolist()
    assert label == [TRAIN_OF_ID.get(raw, IGNORE) for raw in range(34)]
    assert table.table[255] == IGNORE
    assert (table.num_classes, table.classes[18], table.palette[13]) == (19, "bicycle", (0, 0, 142))


def test_pairs_come_in_order_of_city_and_frame_with_the_city_as_group(tmp_path: Path) -> None:
    pairs, _ = cityscapes_split(make(tmp_path), "train")
    assert [(pair.name, pair.group) for pair in pairs] == [
        ("aachen_000001_000019", "aachen"),
        ("aachen_000002_000019", "aachen"),
        ("bonn_000001_000019", "bonn"),
        ("bonn_000002_000019", "bonn"),
    ]


def test_train_ids_are_read_where_every_image_has_them(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, kind="labelTrainIds")
    pairs, table = cityscapes_split(tmp_path, "train")
    assert table == CITYSCAPES_TRAIN_IDS
    assert all(pair.label is not None and pair.label.name.endswith("_labelTrainIds.png") for pair in pairs)
    assert FileSource(pairs, table).load(0).label.ravel().tolist()[:20] == [*range(19), IGNORE]
    assert pairs[0].label is not None
    pairs[0].label.unlink()
    pairs, table = cityscapes_split(tmp_path, "train")
    assert table == CITYSCAPES
    assert all(pair.label is not None and pair.label.name.endswith("_labelIds.png") for pair in pairs)


def test_label_ids_in_files_named_train_ids_are_diagnosed(tmp_path: Path) -> None:
    make(tmp_path)
    for path in (tmp_path / "gtFine").rglob("*_labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(DataError, match="these are Cityscapes labelIds"):
        FileSource(*cityscapes_split(tmp_path, "train")).load(0)


def test_a_test_split_without_labels_has_images_alone(tmp_path: Path) -> None:
    make(tmp_path, "test", ("berlin",))
    for path in (tmp_path / "gtFine").rglob("*.png"):
        path.unlink()
    (tmp_path / "gtFine" / "test" / "berlin").rmdir()
    (tmp_path / "gtFine" / "test").rmdir()
    pairs, table = cityscapes_split(tmp_path, "test")
    assert [pair.label for pair in pairs] == [None, None]
    assert (FileSource(pairs, table).load(0).label == IGNORE).all()


def test_trainval_takes_cities_of_both(tmp_path: Path) -> None:
    make(make(tmp_path), "val", ("ulm",))
    assert {pair.group for pair in cityscapes_split(tmp_path, "trainval")[0]} == {"aachen", "bonn", "ulm"}


def test_missing_archives_and_folders_are_named_with_the_expected_tree(tmp_path: Path) -> None:
    (make(tmp_path) / "gtFine").rename(tmp_path / "gtCoarse")
    with pytest.raises(DataError, match=r"gtFine/train is missing \(gtCoarse is there.*gtFine_trainvaltest\.zip"):
        cityscapes_split(tmp_path, "train")
    with pytest.raises(DataError, match=r"leftImg8bit/val is missing.*there: 1 folders"):
        cityscapes_split(tmp_path, "val")
    with pytest.raises(DataError, match=r"is missing; data\.args\.root is the folder that holds leftImg8bit"):
        cityscapes_split(tmp_path / "nowhere", "train")


def test_swapped_archives_are_recognised(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "gtFine").rename(tmp_path / "other")
    (tmp_path / "leftImg8bit").rename(tmp_path / "gtFine")
    (tmp_path / "other").rename(tmp_path / "leftImg8bit")
    with pytest.raises(DataError, match="the two archives are swapped"):
        cityscapes_split(tmp_path, "train")


def test_an_empty_city_and_no_cities_are_errors(tmp_path: Path) -> None:
    (make(tmp_path) / "leftImg8bit" / "train" / "cologne").mkdir()
    with pytest.raises(DataError, match=r"cologne holds no \*_leftImg8bit\.png but nothing"):
        cityscapes_split(tmp_path, "train")
    (tmp_path / "leftImg8bit" / "val").mkdir()
    (tmp_path / "gtFine" / "val").mkdir()
    with pytest.raises(DataError, match="holds no city folders"):
        cityscapes_split(tmp_path, "val")


def test_an_image_without_label_and_a_label_without_image_are_errors(tmp_path: Path) -> None:
    make(tmp_path)
    label = tmp_path / "gtFine" / "train" / "bonn" / "bonn_000001_000019_gtFine_labelIds.png"
    label.rename(tmp_path / "kept.png")
    with pytest.raises(DataError, match="for 1 of 4 images: bonn_000001_000019"):
        cityscapes_split(tmp_path, "train")
    (tmp_path / "kept.png").rename(label)
    (tmp_path / "leftImg8bit" / "train" / "bonn" / "bonn_000001_000019_leftImg8bit.png").unlink()
    with pytest.raises(DataError, match="no image for 1 of 4 labels: bonn_000001_000019"):
        cityscapes_split(tmp_path, "train")


def test_labels_of_two_kinds_that_cover_only_together_are_an_error(tmp_path: Path) -> None:
    make(tmp_path)
    label = tmp_path / "gtFine" / "train" / "bonn" / "bonn_000001_000019_gtFine_labelIds.png"
    label.rename(label.with_name("bonn_000001_000019_gtFine_labelTrainIds.png"))
    with pytest.raises(DataError, match="1 lack the latter: bonn_000001_000019"):
        cityscapes_split(tmp_path, "train")


def test_a_folder_that_links_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "root")
    (root / "leftImg8bit").rename(tmp_path / "elsewhere")
    (root / "leftImg8bit").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="link that leads out of"):
        cityscapes_split(root, "train")


def test_scenes_written_in_this_layout_come_back_as_drawn(tmp_path: Path) -> None:
    write_layout("cityscapes", tmp_path / "data", 8, seed=3, size=(32, 48))
    called = (
        "sky", "building", "pole", "road", "sidewalk", "vegetation", "traffic sign", "fence", "car", "person", "rider",
    )  # fmt: skip
    train_ids = [CITYSCAPES.classes.index(name) for name in called] + [IGNORE] * (256 - len(CLASSES))
    drawn = [render_scene(3, index, (32, 48)) for index in range(8)]
    sources = [FileSource(*cityscapes_split(tmp_path / "data", split)) for split in ("train", "val")]
    read = [source.load(index) for source in sources for index in range(len(source))]
    assert len(read) == 8
    assert {sample.image.tobytes() for sample in read} == {sample.image.tobytes() for sample in drawn}
    expected = {np.array(train_ids, np.uint8)[sample.label].tobytes() for sample in drawn}
    assert {sample.label.tobytes() for sample in read} == expected
