"""make_shapes writes each data set's layout: names, ids, void; its reader gets back what was drawn."""

import re

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from dance_seg.sample import IGNORE
from datamodules.ade20k import ADE20K, ade20k_split
from datamodules.camvid import camvid_split
from datamodules.cityscapes import CITYSCAPES, cityscapes_split
from datamodules.folder import folder_split
from datamodules.scenes import CLASSES, PALETTE, render_scene
from datamodules.sources import FileSource
from tools import make_shapes
from tools.cli import run
from tools.make_shapes import ADE20K_IDS, CITYSCAPES_LABEL_IDS, LAYOUTS, main, write_layout

SIZE = (32, 48)
READERS = {"camvid": camvid_split, "cityscapes": cityscapes_split, "ade20k": ade20k_split, "folder": folder_split}


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    roots = {layout: tmp_path_factory.mktemp(layout) / "data" for layout in LAYOUTS}
    for layout, root in roots.items():
        write_layout(layout, root, 8, seed=2, size=SIZE)
    return roots


def test_camvid_has_the_folders_lists_and_drives_of_the_segnet_copy(written):
    assert files(written["camvid"]) == [
        "test.txt",
        "test/0001TP_008550.png",
        "test/Seq05VD_f00030.png",
        "testannot/0001TP_008550.png",
        "testannot/Seq05VD_f00030.png",
        "train.txt",
        "train/0001TP_000390.png",
        "train/0006R0_f00420.png",
        "train/0016E5_00450.png",
        "train/0016E5_00480.png",
        "trainannot/0001TP_000390.png",
        "trainannot/0006R0_f00420.png",
        "trainannot/0016E5_00450.png",
        "trainannot/0016E5_00480.png",
        "val.txt",
        "val/0016E5_07959.png",
        "val/0016E5_07961.png",
        "valannot/0016E5_07959.png",
        "valannot/0016E5_07961.png",
    ]
    lines = (written["camvid"] / "train.txt").read_text().splitlines()
    assert lines[0] == "/SegNet/CamVid/train/0001TP_000390.png /SegNet/CamVid/trainannot/0001TP_000390.png"
    assert len(lines) == 4


def test_camvid_labels_are_eight_bit_indices_with_void_eleven(written):
    label = Image.open(written["camvid"] / "trainannot/0001TP_000390.png")
    drawn = render_scene(2, 0, SIZE).label
    assert label.mode == "L"
    assert (np.asarray(label) == np.where(drawn == IGNORE, 11, drawn)).all()


def test_cityscapes_files_are_named_by_city_sequence_and_frame(written):
    root = written["cityscapes"]
    for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        found = files(root / kind)
        assert len(found) == 8
        assert all(re.fullmatch(rf"(train|val)/([a-z]+)/\2_\d{{6}}_000019_{suffix}\.png", name) for name in found)
    assert sorted(path.name for path in (root / "leftImg8bit").iterdir()) == ["train", "val"]


def test_label_ids_are_those_of_the_data_sets():
    """The ids are looked up in the readers' tables, which were written from the data sets' own lists."""
    cityscapes = [CITYSCAPES.classes[CITYSCAPES.table[raw]] for raw in CITYSCAPES_LABEL_IDS]
    assert cityscapes == [
        "sky",
        "building",
        "pole",
        "road",
        "sidewalk",
        "vegetation",
        "traffic sign",
        "fence",
        "car",
        "person",
        "rider",
    ]
    ade20k = [ADE20K.classes[ADE20K.table[raw]] for raw in ADE20K_IDS]
    assert ade20k == [
        "sky", "building", "pole", "road", "sidewalk", "tree", "signboard", "fence", "car", "person", "bicycle",
    ]  # fmt: skip


def test_ade20k_is_jpeg_of_several_widths_with_numbers_from_one(written):
    root = written["ade20k"] / "ADEChallengeData2016"
    assert files(root / "images/training") == [f"ADE_train_{number:08d}.jpg" for number in range(1, 7)]
    assert files(root / "annotations/validation") == ["ADE_val_00000001.png", "ADE_val_00000002.png"]
    widths = [Image.open(root / f"images/training/ADE_train_0000000{number}.jpg").width for number in (1, 2, 3)]
    assert widths == [48, 60, 36]
    assert (root / "sceneCategories.txt").read_text().splitlines()[0] == "ADE_train_00000001 street"
    ids = {
        int(raw) for path in (root / "annotations").rglob("*.png") for raw in np.unique(np.asarray(Image.open(path)))
    }
    assert ids <= {0, *ADE20K_IDS}
    assert 0 in ids


def test_a_folder_says_its_classes_and_what_is_ignored(written):
    content = yaml.safe_load((written["folder"] / "classes.yaml").read_text())
    assert content == {"classes": list(CLASSES), "colors": [list(colour) for colour in PALETTE], "ignore": [255]}
    assert files(written["folder"] / "images") == files(written["folder"] / "masks")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reader_gets_back_what_was_drawn(written, layout):
    drawn = 0
    for split in ("train", "val", "test") if layout == "camvid" else ("train", "val"):
        pairs, table = READERS[layout](written[layout], split)
        source = FileSource(pairs, table)
        samples = [source.load(number) for number in range(len(source))]
        to_train = np.full(256, IGNORE, np.uint8)
        raw = {"cityscapes": CITYSCAPES_LABEL_IDS, "ade20k": ADE20K_IDS}.get(layout, range(len(CLASSES)))
        to_train[: len(CLASSES)] = [table.table[one] for one in raw]
        for number in range(len(pairs)):
            size = (32, (48, 60, 36)[number % 3]) if layout == "ade20k" else SIZE
            scene = render_scene(2, drawn + number, size)
            wanted = to_train[scene.label]
            matches = [sample for sample in samples if np.array_equal(sample.label, wanted)]
            assert len(matches) == 1
            difference = np.abs(matches[0].image.astype(int) - scene.image).mean()
            assert difference == 0 if layout != "ade20k" else difference < 8  # JPEG
        drawn += len(pairs)
    assert drawn == 8


def test_what_cityscapes_ignores_at_the_bottom_is_the_ego_vehicle(tmp_path):
    write_layout("cityscapes", tmp_path / "data", 30, size=(64, 64))
    labels = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (tmp_path / "data/gtFine").rglob("*.png")]
    assert any((label[-1] == 1).any() for label in labels)
    assert all((label[:48] != 1).all() for label in labels)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--out .* exists and is not an empty folder; name a new one"):
        write_layout("folder", tmp_path, 4, size=SIZE)
    assert files(tmp_path) == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "data").mkdir()
    assert write_layout("folder", tmp_path / "data", 4, size=SIZE) == {"train": 3, "val": 1}
    assert len(files(tmp_path / "data")) == 9


def test_an_error_on_the_way_leaves_nothing_behind(tmp_path, monkeypatch):
    def failing(seed, index, size):
        if index == 2:
            raise OSError("no space left on device")
        return render_scene(seed, index, size)

    monkeypatch.setattr(make_shapes, "render_scene", failing)
    with pytest.raises(OSError, match="no space left"):
        write_layout("camvid", tmp_path / "data", 8, size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_run_writes_is_named(tmp_path):
    (tmp_path / ".data.partial").mkdir()
    with pytest.raises(ValueError, match=r"\.data\.partial is there"):
        write_layout("camvid", tmp_path / "data", 8, size=SIZE)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"layout": "voc"}, "--layout is 'voc'; choose one of camvid, cityscapes, ade20k, folder"),
        ({"num": 2}, "--num 2 with --val-fraction 0.25 leaves no scene for train"),
        ({"num": 0}, "--num 0"),
        ({"val_fraction": 1.0}, "--val-fraction is 1.0"),
        ({"val_fraction": float("nan")}, "--val-fraction is nan"),
        ({"size": (8, 64)}, "--height is 8"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, given, told):
    arguments = {"layout": "camvid", "num": 8, "size": SIZE, **given}
    with pytest.raises(ValueError, match=re.escape(told)):
        write_layout(arguments.pop("layout"), tmp_path / "data", arguments.pop("num"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_tool_writes_and_says_what_it_wrote(tmp_path, capsys):
    out = tmp_path / "data"
    main(["--layout", "camvid", "--out", str(out), "--num", "4", "--height", "32", "--width", "48"])
    told = capsys.readouterr()
    assert told.out.strip() == f"{out}: 4 scenes in the layout of camvid (train 2, val 1, test 1)"
    assert "4/4" in told.err  # the progress bar


def test_the_tool_ends_with_one_line_and_status_two_where_something_is_in_the_way(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(["--layout", "folder", "--out", str(tmp_path), "--num", "4"]))
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --out ")
    assert told.count("\n") == 1
