"""ADEChallengeData2016 is read with 0 ignored; the other archives are recognised."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.sample import IGNORE
from datamodules.ade20k import ADE20K, ade20k_split
from datamodules.scenes import CLASSES, render_scene
from datamodules.sources import FileSource, hold_out
from tools.make_shapes import write_layout


def make(root: Path, folder: str = "training", count: int = 2) -> Path:
    kind = "train" if folder == "training" else "val"
    for number in range(count):
        name = f"ADE_{kind}_0000000{number}"
        image = root / "images" / folder / f"{name}.jpg"
        label = root / "annotations" / folder / f"{name}.png"
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (151, 1)).save(image)
        Image.fromarray(np.arange(151, dtype=np.uint8)[None]).save(label)
    return root


def test_the_classes_are_one_less_than_the_raw_ids_and_zero_is_ignored(tmp_path: Path) -> None:
    pairs, table = ade20k_split(make(tmp_path), "train")
    assert FileSource(pairs, table).load(0).label.tolist() == [[IGNORE, *range(150)]]
    assert [pair.name for pair in pairs] == ["ADE_train_00000000", "ADE_train_00000001"]


def test_the_150_classes_have_their_standard_names_and_colours() -> None:
    """Some of objectInfo150.txt, by raw id, and of the palette that everybody uses."""
    known = {
        1: "wall",
        3: "sky",
        13: "person",
        21: "car",
        45: "chest of drawers",
        84: "truck",
        137: "traffic light",
        150: "flag",
    }
    assert {raw: ADE20K.classes[ADE20K.table[raw]] for raw in known} == known
    assert (ADE20K.num_classes, ADE20K.allowed) == (150, tuple(range(151)))
    assert (ADE20K.palette[0], ADE20K.palette[12], ADE20K.palette[149]) == ((120, 120, 120), (150, 5, 61), (92, 0, 255))


def test_the_root_may_be_the_folder_or_the_one_that_holds_it(tmp_path: Path) -> None:
    make(tmp_path / "ADEChallengeData2016")
    assert ade20k_split(tmp_path, "train") == ade20k_split(tmp_path / "ADEChallengeData2016", "train")


def test_scenes_are_the_groups_where_their_list_is_there(tmp_path: Path) -> None:
    make(tmp_path)
    assert [pair.group for pair in ade20k_split(tmp_path, "train")[0]] == ["", ""]
    (tmp_path / "sceneCategories.txt").write_text("ADE_train_00000000 bathroom\nADE_train_00000001 street\n")
    pairs, _ = ade20k_split(tmp_path, "train")
    assert [pair.name for pair in hold_out(pairs, "street")[1]] == ["ADE_train_00000001"]


def test_trainval_takes_both_folders_and_test_does_not_exist(tmp_path: Path) -> None:
    make(make(tmp_path), "validation", 1)
    assert len(ade20k_split(tmp_path, "trainval")[0]) == 3
    assert len(ade20k_split(tmp_path, "val")[0]) == 1
    with pytest.raises(ValueError, match="'test'; choose one of train, val, trainval"):
        ade20k_split(tmp_path, "test")


def test_the_other_archives_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "a" / "ADE20K_2021_17_01" / "images").mkdir(parents=True)
    (tmp_path / "b" / "images" / "ADE" / "training").mkdir(parents=True)
    (tmp_path / "ADE20K_2016_07_26" / "images" / "training" / "a").mkdir(parents=True)
    for root, name in (("a", "this is ADE20K_2021_17_01"), ("b", "full ADE20K archive"), ("ADE20K_2016_07_26",) * 2):
        with pytest.raises(DataError, match=rf"{name}.*take ADEChallengeData2016\.zip"):
            ade20k_split(tmp_path / root, "train")


def test_missing_empty_and_unpaired_folders_are_errors(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=r"annotations/validation is missing \(there: 2 folders\)"):
        ade20k_split(tmp_path, "val")
    (tmp_path / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    with pytest.raises(DataError, match="1 files have no label: ADE_train_00000001"):
        ade20k_split(tmp_path, "train")
    (tmp_path / "images" / "training" / "ADE_train_00000001.jpg").unlink()
    assert len(ade20k_split(tmp_path, "train")[0]) == 1
    (tmp_path / "images" / "training" / "ADE_train_00000000.jpg").unlink()
    with pytest.raises(DataError, match="holds no images but nothing"):
        ade20k_split(tmp_path, "train")


def test_an_id_above_150_is_an_error(tmp_path: Path) -> None:
    make(tmp_path)
    Image.new("L", (151, 1), 151).save(tmp_path / "annotations" / "training" / "ADE_train_00000000.png")
    with pytest.raises(DataError, match=r"raw id 151 .*knows 0 to 150"):
        FileSource(*ade20k_split(tmp_path, "train")).load(0)


def test_scenes_written_in_this_layout_come_back_as_drawn(tmp_path: Path) -> None:
    write_layout("ade20k", tmp_path / "data", 8, seed=3, size=(32, 48))
    called = ["sky", "building", "pole", "road", "sidewalk", "tree", "signboard", "fence", "car", "person", "bicycle"]
    train_ids = [ADE20K.classes.index(name) for name in called] + [IGNORE] * (256 - len(CLASSES))
    sources = [FileSource(*ade20k_split(tmp_path / "data", split)) for split in ("train", "val")]
    read = [source.load(index) for source in sources for index in range(len(source))]
    assert len({sample.label.shape for sample in read}) == 3
    for index, sample in enumerate(read):
        drawn = render_scene(3, index, (sample.label.shape[0], sample.label.shape[1]))
        np.testing.assert_array_equal(sample.label, np.array(train_ids, np.uint8)[drawn.label])
        assert abs(sample.image.astype(int) - drawn.image).mean() < 10  # JPEG
