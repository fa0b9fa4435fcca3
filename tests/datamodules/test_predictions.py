"""Predictions as files: equal to what the data sets' own evaluators read, and refused where a figure would be wrong."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dance_seg.boundary import BoundaryIoU
from dance_seg.errors import DataError
from dance_seg.metrics import confusion_matrix, scores
from dance_seg.sample import IGNORE, Sample
from datamodules.ade20k import ADE20K, ade20k_split
from datamodules.camvid import CAMVID, camvid_split
from datamodules.cityscapes import CITYSCAPES, CITYSCAPES_TRAIN_IDS, cityscapes_split
from datamodules.folder import folder_split
from datamodules.label_table import LabelTable, label_table
from datamodules.predictions import PredictionWriter, find_predictions, official_form, read_predictions
from datamodules.sources import FileSource
from tools.make_shapes import write_layout

READERS = {"cityscapes": cityscapes_split, "ade20k": ade20k_split, "camvid": camvid_split, "folder": folder_split}


def noisy(label: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """A prediction that is mostly the label, shifted, with every class somewhere; where the label is void, anything."""
    random = np.random.default_rng(seed)
    prediction = np.roll(label, 3, axis=1)
    anything = random.integers(0, num_classes, label.shape, dtype=np.uint8)
    wrong = (prediction == IGNORE) | (random.random(label.shape) < 0.1)
    return np.where(wrong, anything, prediction)


def written(root: Path, layout: str, split: str = "val", num: int = 8):
    """A drawn data set in root/data, noisy predictions in root/predictions: source, form, predictions by name."""
    write_layout(layout, root / "data", num, size=(96, 160))
    pairs, table = READERS[layout](root / "data", split)
    source, form = FileSource(pairs, table), official_form(layout, table)
    writer = PredictionWriter(root / "predictions", form)
    predictions = {}
    for index, name in enumerate(source.names):
        predictions[name] = noisy(source.load(index).label, table.num_classes, index)
        writer.write(name, predictions[name])
    return source, form, predictions


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    return root, *written(root, "cityscapes", num=12)


class Images:
    """Labels held in memory: what read_predictions needs of a source."""

    def __init__(self, labels: dict[str, np.ndarray]) -> None:
        self.names, self.labels = tuple(labels), list(labels.values())

    def load(self, index: int) -> Sample:
        label = self.labels[index]
        return Sample(np.zeros((*label.shape, 3), np.uint8), label)


def saved(folder: Path, **files: np.ndarray) -> Path:
    """Somebody else's predictions: arrays as PNG, named by keyword."""
    folder.mkdir(exist_ok=True)
    for name, ids in files.items():
        Image.fromarray(ids).save(folder / f"{name}.png")
    return folder


# The official evaluator -------------------------------------------------------------------------------------------


def official_result(root: Path, names):
    """cityscapesScripts' own evaluation of the files in `root`: its result, and the files it found."""
    evaluation = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    args = evaluation.args
    args.predictionPath, args.predictionWalk = str(root / "predictions"), None
    args.evalInstLevelScore = args.JSONOutput = args.colorized = False
    args.quiet = True
    labels = sorted((root / "data" / "gtFine" / "val").glob("*/*_gtFine_labelIds.png"))
    assert len(labels) == len(names)
    found = [evaluation.getPrediction(args, str(path)) for path in labels]
    return evaluation.evaluateImgLists(found, [str(path) for path in labels], args), found


def test_the_official_evaluator_of_cityscapes_finds_our_files_and_counts_every_pixel_as_we_do(cityscapes):
    """Not one count and not one bit of an IoU differs, read back from the files or not."""
    root, source, form, predictions = cityscapes
    official, files = official_result(root, source.names)
    assert [Path(path) for path in files] == find_predictions(root / "predictions", source.names, form)
    matrix = np.zeros((19, 19), np.int64)
    for name, prediction, label, *_ in read_predictions(root / "predictions", source, form, progress=False):
        assert np.array_equal(prediction, predictions[name])
        matrix += confusion_matrix(prediction, label, 19)
    ids = list(CITYSCAPES.raw_ids)
    assert np.array(official["confMatrix"])[np.ix_(ids, ids)].tolist() == matrix.tolist()
    ours = scores(matrix)
    theirs = [official["classScores"][name] for name in CITYSCAPES.classes]
    for name, iou, other, right in zip(CITYSCAPES.classes, ours.iou, theirs, matrix.diagonal(), strict=True):
        if iou is None:
            assert math.isnan(other), name
        else:
            union = int(matrix[:, CITYSCAPES.classes.index(name)].sum() + matrix[CITYSCAPES.classes.index(name)].sum())
            assert int(right) / (union - int(right)) == other, name  # the same quotient, to the last bit
            assert iou == pytest.approx(100 * other, rel=1e-15)
    assert ours.miou == pytest.approx(100 * official["averageScoreClasses"], rel=1e-14)


def test_our_table_is_the_official_one():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    evaluated = {label.trainId: label for label in labels if not label.ignoreInEval}
    assert CITYSCAPES.raw_ids == tuple(evaluated[train].id for train in range(19))
    assert CITYSCAPES.classes == tuple(evaluated[train].name for train in range(19))
    assert CITYSCAPES.palette == tuple(evaluated[train].color for train in range(19))
    ignored = {label.id & 255 for label in labels if label.ignoreInEval}
    assert ignored == {raw for raw, train in enumerate(CITYSCAPES.table) if train == IGNORE}


# Forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["cityscapes", "ade20k", "camvid", "folder"])
def test_what_is_written_is_read_back_with_its_label_in_the_splits_order(layout, tmp_path):
    source, form, predictions = written(tmp_path, layout)
    found = list(read_predictions(tmp_path / "predictions", source, form, progress=False))
    assert tuple(one.name for one in found) == source.names
    for index, (name, prediction, label, *_) in enumerate(found):
        assert np.array_equal(prediction, predictions[name])
        assert np.array_equal(label, source.load(index).label)


@pytest.mark.parametrize(
    ("data", "table", "name", "file", "ids"),
    [
        ("cityscapes", CITYSCAPES, "bonn_000001_000019", "bonn_000001_000019_pred_labelIds.png", [7, 8, 33]),
        ("cityscapes", CITYSCAPES_TRAIN_IDS, "bonn_000001_000019", "bonn_000001_000019_pred_labelIds.png", [7, 8, 33]),
        ("ade20k", ADE20K, "ADE_val_00000001", "ADE_val_00000001.png", [1, 2, 19]),
        ("camvid", CAMVID, "0016E5_07959", "0016E5_07959.png", None),
        (
            "folder",
            label_table(("a", "b"), raw_to_train={40: 0, 9: 0, 12: 1}, ignore=[255]),
            "in/scene",
            "in/scene.png",
            None,
        ),
    ],
)
def test_the_official_names_and_ids_of_each_data_set(data, table, name, file, ids, tmp_path):
    train = np.uint8([[0, 1, min(18, table.num_classes - 1)]])
    path = PredictionWriter(tmp_path / "new", official_form(data, table)).write(name, train)
    assert path == tmp_path / "new" / file
    with Image.open(path) as picture:
        assert picture.mode == "L"
        expected = ids or {"camvid": [0, 1, 10], "folder": [9, 12, 12]}[data]
        assert np.array(picture).tolist() == [expected]


def test_a_cityscapes_file_may_lie_in_a_subfolder_and_end_as_its_author_likes(tmp_path):
    (tmp_path / "val").mkdir()
    path = saved(tmp_path / "val" / "bonn", bonn_000001_000019_leftImg8bit=np.full((4, 4), 26, np.uint8))
    form = official_form("cityscapes", CITYSCAPES)
    assert find_predictions(tmp_path, ["bonn_000001_000019"], form) == [path / "bonn_000001_000019_leftImg8bit.png"]


def test_a_class_without_an_id_and_a_pixel_without_a_class_cannot_be_written():
    unreached = LabelTable(("a", "b"), ((0, 0, 0), (1, 1, 1)), (0, *[-1] * 255))
    with pytest.raises(ValueError, match="class 'b'"):
        unreached.to_raw(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="up to 255"):
        CAMVID.to_raw(np.full((2, 2), IGNORE, np.uint8))


def test_the_way_back_from_ids_is_the_way_there():
    for table in (CITYSCAPES, CITYSCAPES_TRAIN_IDS, ADE20K, CAMVID):
        train = np.arange(table.num_classes, dtype=np.uint8)[None]
        assert np.array_equal(table.apply(table.to_raw(train), Path("a.png")), train)


def test_old_predictions_are_not_mixed_with_new_ones(tmp_path):
    form = official_form("camvid", CAMVID)
    PredictionWriter(tmp_path, form).write("a", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="no empty folder"):
        PredictionWriter(tmp_path, form)


# Files that would give a wrong figure -----------------------------------------------------------------------------

CAMVID_FORM = official_form("camvid", CAMVID)
STREETS = official_form("cityscapes", CITYSCAPES)


def read(folder: Path, labels: dict[str, np.ndarray], form=CAMVID_FORM, **options):
    return list(read_predictions(folder, Images(labels), form, progress=False, **options))


def label(value: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.full(size, value, np.uint8)


def test_a_missing_prediction_is_named(tmp_path):
    folder = saved(tmp_path / "p", a=label(0))
    with pytest.raises(DataError, match=r"no prediction for 1 of 2 images: b; .*b\.png"):
        read(folder, {"a": label(0), "b": label(0)})


def test_no_folder_and_no_predictions_in_it_are_errors(tmp_path):
    with pytest.raises(DataError, match="missing"):
        read(tmp_path / "nowhere", {"a": label(0)})
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=r"1 \.jpg"):
        read(tmp_path, {"a": label(0)})


def test_two_files_for_one_image_are_both_named(tmp_path):
    folder = saved(tmp_path / "p", bonn_000001_000019_color=label(7), bonn_000001_000019_labelIds=label(7))
    with pytest.raises(
        DataError, match=r"_labelIds\.png is a second prediction of bonn_000001_000019, beside .*_color"
    ):
        read(folder, {"bonn_000001_000019": label(0)}, STREETS)
    twice = saved(tmp_path / "q", a=label(0))
    (twice / "a.PNG").write_bytes((twice / "a.png").read_bytes())
    with pytest.raises(DataError, match="keep one"):
        read(twice, {"a": label(0)})


@pytest.mark.parametrize(
    ("form", "name", "other"), [(CAMVID_FORM, "a", "b"), (STREETS, "bonn_000001_000019", "ulm_000001_000019")]
)
def test_a_file_of_another_split_is_named(form, name, other, tmp_path):
    folder = saved(tmp_path / "p", **{name: label(7), other: label(7)})
    with pytest.raises(DataError, match=rf"{other}\.png is of no image of the split"):
        read(folder, {name: label(0)}, form)


def test_a_renamed_prediction_of_ours_is_found_out(tmp_path):
    """Swapped files of equal size are invisible in their pixels; ours say whose they are."""
    writer = PredictionWriter(tmp_path / "p", CAMVID_FORM)
    first, second = writer.write("a", label(0)), writer.write("b", label(1))
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    with pytest.raises(DataError, match=r"a\.png is the prediction of b, written as such and renamed"):
        read(tmp_path / "p", {"a": label(0), "b": label(1)})


@pytest.mark.parametrize("size", [(8, 9), (4, 4), (16, 16)])
def test_another_size_than_the_labels_is_an_error(size, tmp_path):
    folder = saved(tmp_path / "p", a=label(0, size))
    with pytest.raises(DataError, match=rf"a\.png has {size[0]} x {size[1]} pixels .*8 x 8"):
        read(folder, {"a": label(0)})


def test_swapped_image_sizes_are_an_error(tmp_path):
    folder = saved(tmp_path / "p", a=label(0, (8, 16)))
    with pytest.raises(DataError, match="8 x 16 pixels"):
        read(folder, {"a": label(0, (16, 8))})


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.zeros((8, 8, 3), np.uint8), "colour|RGB"),
        (np.zeros((8, 8, 4), np.uint8), "colour|RGB"),
        (np.zeros((8, 8), np.uint16), "16 bits"),
        (np.full((8, 8), 26001, np.uint16), "26001"),
        (np.zeros((8, 8), bool), "1 bits"),
    ],
)
def test_what_is_not_one_channel_of_8_bits_is_an_error(ids, said, tmp_path):
    folder = saved(tmp_path / "p", a=ids)
    with pytest.raises(DataError, match=rf"a\.png.*({said})"):
        read(folder, {"a": label(0)})


def test_a_jpeg_by_content_is_an_error(tmp_path):
    Image.fromarray(label(0)).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(DataError, match="JPEG"):
        read(tmp_path, {"a": label(0)})


def test_a_damaged_file_is_an_error(tmp_path):
    folder = saved(tmp_path / "p", a=label(0, (64, 64)))
    data = bytearray((folder / "a.png").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "a.png").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.png"):
        read(folder, {"a": label(0, (64, 64))})


def test_a_palette_file_gives_its_indices(tmp_path):
    picture = Image.frombytes("P", (8, 8), label(3).tobytes())
    picture.putpalette([value for i in range(256) for value in (i, 0, 0)])
    picture.save(tmp_path / "a.png")
    (found,) = read(tmp_path, {"a": label(3)})
    assert (found.prediction == 3).all()


# Train ids where labelIds are expected, and the other way round ----------------------------------------------------


def test_train_ids_of_cityscapes_are_found_out_by_ids_that_are_no_class(tmp_path):
    """Train ids 0 to 18 hold 0, 1, 2, ..., which as labelIds are void."""
    ids = np.arange(64, dtype=np.uint8).reshape(8, 8) % 19
    folder = saved(tmp_path / "p", bonn_000001_000019=ids)
    with pytest.raises(DataError, match=r"no class, where the label is one.*Train ids \(0 to 18\)"):
        read(folder, {"bonn_000001_000019": ids}, STREETS)


@pytest.mark.parametrize("train", [7, 8, 11, 12, 13, 17])
def test_train_ids_that_happen_to_be_label_ids_are_found_out_by_the_labels(train, tmp_path):
    """A crop of nothing but vegetation, train id 8, would be scored as nothing but sidewalk, labelId 8."""
    folder = saved(tmp_path / "p", bonn_000001_000019=label(train))
    with pytest.raises(DataError, match=r"p seems to hold train ids"):
        read(folder, {"bonn_000001_000019": label(train)}, STREETS)


def test_a_network_that_predicts_only_road_is_scored(tmp_path):
    """labelId 7 is road; as train id it would be traffic sign, which these labels hold less of."""
    folder = saved(tmp_path / "p", bonn_000001_000019=label(7))
    truth = label(0)
    truth[0, 0] = 7
    (found,) = read(folder, {"bonn_000001_000019": truth}, STREETS)
    assert (found.prediction == 0).all()


def test_label_ids_where_train_ids_are_expected_are_named_as_such(tmp_path):
    classes = [f"class {index}" for index in range(19)]
    form = official_form("folder", label_table(classes, raw_to_train={index: index for index in range(19)}))
    folder = saved(tmp_path / "p", a=np.uint8([[7, 8], [26, 23]]))
    with pytest.raises(DataError, match="Cityscapes labelIds"):
        read(folder, {"a": label(0, (2, 2))}, form)


def test_ade20k_counted_from_zero_is_an_error(tmp_path):
    form = official_form("ade20k", ADE20K)
    with pytest.raises(DataError, match=r"predicts 0 \(64 pixels\)"):
        read(saved(tmp_path / "p", a=label(0)), {"a": label(0)}, form)
    with pytest.raises(DataError, match="seems to hold train ids"):  # sky, 2 from zero, is floor from one
        read(saved(tmp_path / "q", a=label(2)), {"a": label(2)}, form)


def test_void_may_be_predicted_where_the_label_is_void_and_nowhere_else(tmp_path):
    folder = saved(tmp_path / "p", a=label(11))
    (found,) = read(folder, {"a": label(IGNORE)})
    assert confusion_matrix(found.prediction, found.label, 11).sum() == 0
    with pytest.raises(DataError, match=r"predicts 11 \(64 pixels\)"):
        read(folder, {"a": label(3)})


def test_the_labels_themselves_are_refused_as_predictions(tmp_path):
    """They would score 100."""
    write_layout("camvid", tmp_path / "data", 6, size=(64, 64))
    pairs, table = camvid_split(tmp_path / "data", "val")
    source = FileSource(pairs, table)
    files = [pair.label for pair in pairs]
    with pytest.raises(DataError, match="is the label itself"):
        list(read_predictions(tmp_path / "data" / "valannot", source, CAMVID_FORM, label_files=files, progress=False))


def test_boundary_iou_is_that_of_the_predictions_before_they_were_written(cityscapes):
    root, source, form, predictions = cityscapes
    direct, read_back = BoundaryIoU(19), BoundaryIoU(19)
    for index, name in enumerate(source.names):
        direct.update(predictions[name], source.load(index).label)
    for _, prediction, truth, *_ in read_predictions(root / "predictions", source, form, progress=False):
        read_back.update(prediction, truth)
    assert direct.compute() == read_back.compute()
