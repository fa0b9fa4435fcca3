"""CamVid's list files, prefix and all, name the right pairs; what is missing is said in words."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.sample import IGNORE
from datamodules.camvid import CAMVID, camvid_split
from datamodules.scenes import render_scene
from datamodules.sources import FileSource, hold_out
from tools.make_shapes import write_layout

real = pytest.mark.skipif("DANCE_SEG_CAMVID" not in os.environ, reason="DANCE_SEG_CAMVID is not set")


def make(root: Path, prefix: str = "/SegNet/CamVid/", suffix: str = ".png") -> Path:
    for part, names in (("train", ("0001TP_1", "0006R0_2")), ("val", ("0016E5_3",))):
        lines = []
        for folder in (root / part, root / f"{part}annot"):
            folder.mkdir(parents=True)
        for name in names:
            Image.new("RGB", (6, 4), (1, 2, 3)).save(root / part / f"{name}{suffix}")
            Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) % 12).save(
                root / f"{part}annot" / f"{name}.png"
            )
            lines.append(f"{prefix}{part}/{name}.png {prefix}{part}annot/{name}.png")
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_void_is_ignored_and_the_eleven_classes_keep_their_ids(tmp_path: Path) -> None:
    pairs, table = camvid_split(make(tmp_path), "train")
    label = FileSource(pairs, table).load(0).label.ravel()
    assert label[:12].tolist() == [*range(11), IGNORE]
    assert table.num_classes == 11
    assert (table.classes[3], table.palette[3]) == ("Road", (128, 64, 128))


@pytest.mark.parametrize("prefix", ["/SegNet/CamVid/", "", "C:\\data\\CamVid\\", "../../CamVid-up/".replace("../", "")])
def test_any_prefix_of_the_list_is_replaced_by_the_root(tmp_path: Path, prefix: str) -> None:
    pairs, _ = camvid_split(make(tmp_path, prefix), "train")
    assert [pair.image for pair in pairs] == [tmp_path / "train" / f"{name}.png" for name in ("0001TP_1", "0006R0_2")]
    assert [pair.label for pair in pairs] == [
        tmp_path / "trainannot" / f"{name}.png" for name in ("0001TP_1", "0006R0_2")
    ]
    assert [pair.group for pair in pairs] == ["0001TP", "0006R0"]


def test_trainval_is_train_and_then_val(tmp_path: Path) -> None:
    make(tmp_path)
    both = camvid_split(tmp_path, "trainval")[0]
    assert both == camvid_split(tmp_path, "train")[0] + camvid_split(tmp_path, "val")[0]


def test_images_that_were_saved_with_another_suffix_are_found(tmp_path: Path) -> None:
    pairs, _ = camvid_split(make(tmp_path, suffix=".jpg"), "val")
    assert pairs[0].image == tmp_path / "val" / "0016E5_3.jpg"
    assert pairs[0].name == "0016E5_3"


@pytest.mark.parametrize(
    "line",
    [
        "../../etc/passwd ../../etc/passwd",
        "/a/train/../x.png /a/trainannot/x.png",
        "train/x\0.png trainannot/x.png",
        "x.png y.png",
    ],
)
def test_a_line_that_leads_out_of_the_root_is_refused(tmp_path: Path, line: str) -> None:
    (make(tmp_path) / "train.txt").write_text(line + "\n")
    with pytest.raises(DataError, match="leads out of"):
        camvid_split(tmp_path, "train")


def test_an_absolute_line_is_looked_for_inside_the_root_only(tmp_path: Path) -> None:
    (make(tmp_path) / "train.txt").write_text("/etc/passwd /etc/passwd\n")
    with pytest.raises(DataError, match=f"{tmp_path}/etc/passwd is missing"):
        camvid_split(tmp_path, "train")


def test_a_listed_file_that_links_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "root")
    (tmp_path / "secret.png").touch()
    (root / "train" / "0001TP_1.png").unlink()
    (root / "train" / "0001TP_1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="link that leads out of"):
        camvid_split(root, "train")


def test_a_missing_split_names_the_folder_what_is_there_and_the_layout(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}/test is missing \(there are train, val\).*trainannot"):
        camvid_split(tmp_path, "test")


def test_a_root_one_folder_too_high_or_of_the_original_set_is_recognised(tmp_path: Path) -> None:
    make(tmp_path / "up" / "CamVid")
    with pytest.raises(DataError, match=r"make that data\.args\.root"):
        camvid_split(tmp_path / "up", "train")
    (tmp_path / "raw" / "701_StillsRaw_full").mkdir(parents=True)
    with pytest.raises(DataError, match="32 classes"):
        camvid_split(tmp_path / "raw", "train")


def test_lists_with_faults_are_errors(tmp_path: Path) -> None:
    path = make(tmp_path) / "train.txt"
    first, second = path.read_text().splitlines()
    for text, reason in (
        ("", "lists no images"),
        (f"{first}\n{first}\n", "1 images twice"),
        (f"{first}\nonly/one.png\n", "line 2: expected 'image label'"),
        (f"{first}\n{second.replace('2.png', '9.png')}\n", "0006R0_9.png is missing"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            camvid_split(tmp_path, "train")
    path.unlink()
    with pytest.raises(DataError, match="the list of pairs"):
        camvid_split(tmp_path, "train")


def test_an_unknown_split_names_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'training'; choose one of train, val, trainval, test"):
        camvid_split(tmp_path, "training")


def test_a_label_with_another_id_is_an_error(tmp_path: Path) -> None:
    make(tmp_path)
    Image.new("L", (6, 4), 12).save(tmp_path / "valannot" / "0016E5_3.png")
    with pytest.raises(DataError, match=r"0016E5_3\.png: raw id 12 \(24 pixels\).*knows 0 to 11"):
        FileSource(*camvid_split(tmp_path, "val")).load(0)


@pytest.mark.data
@real
def test_the_real_lists_hold_three_drives_and_one_clip() -> None:
    root = os.environ["DANCE_SEG_CAMVID"]
    train, table = camvid_split(root, "train")
    assert table == CAMVID
    for drive, count in (("0001TP", 62), ("0006R0", 101), ("0016E5", 204)):
        assert len(hold_out(train, drive)[1]) == count
    assert {pair.group for pair in camvid_split(root, "val")[0]} == {"0016E5"}
    assert (len(train), len(camvid_split(root, "trainval")[0])) == (367, 468)
    if not (Path(root) / "test").is_dir():
        with pytest.raises(DataError, match="test is missing"):
            camvid_split(root, "test")


def test_scenes_written_in_this_layout_come_back_as_drawn(tmp_path: Path) -> None:
    write_layout("camvid", tmp_path / "data", 8, seed=3, size=(32, 48))
    drawn = [render_scene(3, index, (32, 48)) for index in range(8)]
    read = [
        source.load(index)
        for split in ("train", "val", "test")
        for source in [FileSource(*camvid_split(tmp_path / "data", split))]
        for index in range(len(source))
    ]
    assert len(read) == 8
    assert {sample.image.tobytes() for sample in read} == {sample.image.tobytes() for sample in drawn}
    assert {sample.label.tobytes() for sample in read} == {sample.label.tobytes() for sample in drawn}
