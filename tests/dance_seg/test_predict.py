"""Labels come back at the image's own size as evaluation would have them, whatever file holds the network."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dance_seg.errors import CheckpointError, DataError
from dance_seg.export import export_onnx, export_safetensors
from dance_seg.inference import predict_labels
from dance_seg.normalise import downsampled, normalise
from dance_seg.predict import (
    Predictor,
    figure,
    label_video,
    legend,
    load_predictor,
    overlay,
    palette_picture,
    stacked,
)
from dance_seg.recipe import adaptive_of, parse_recipe, recipe_record
from dance_seg.sample import Sample
from datamodules.scenes import CLASSES, PALETTE, render_scene
from datamodules.transforms import EvaluationImages
from tests.exported import small_network, small_record, write_small_run
from tests.tiny import SLIM, TINY

SIZE = (90, 130)
HALF = "data.args.resolution=0.5"


def image_and_label(index: int = 0, size: tuple[int, int] = SIZE) -> Sample:
    return render_scene(3, index, size)


class OneScene:
    """A source of one drawn scene."""

    names = ("scene",)

    def __len__(self) -> int:
        return 1

    def load(self, index: int) -> Sample:
        return image_and_label(index)


def constant(label: int, num_classes: int = 3) -> Predictor:
    """A predictor that sees one class everywhere."""
    names = tuple(f"class {number}" for number in range(num_classes))
    colors = tuple((number, 100, 200) for number in range(num_classes))
    return Predictor(Path("none"), names, colors, 1.0, "nothing", lambda image, size: np.full(size, label, np.uint8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("runs") / "small", HALF, half=True)


def test_a_run_labels_an_image_as_its_evaluation_does(run: Path) -> None:
    batch = EvaluationImages(OneScene(), 0.5)[0]
    assert tuple(batch.images.shape[-2:]) == (45, 65)
    expected = predict_labels(small_network(half=True), normalise(batch.images), SIZE)[0].numpy()
    predictor = load_predictor(run)
    labels = predictor(image_and_label().image)
    assert (labels == expected).all()
    assert len(np.unique(labels)) > 2
    assert (predictor.classes, predictor.palette, predictor.resolution) == (CLASSES, PALETTE, 0.5)
    assert predictor.path == run / "checkpoints" / "best.ckpt"


def test_the_resolution_can_be_chosen(run: Path) -> None:
    image = image_and_label().image
    expected = predict_labels(small_network(half=True), normalise(torch.from_numpy(image).permute(2, 0, 1)[None]), SIZE)
    assert (load_predictor(run, resolution=1.0)(image) == expected[0].numpy()).all()
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"resolution is {wrong}"):
            load_predictor(run, resolution=wrong)
    with pytest.raises(ValueError, match="has one exit, so no answer before its end"):
        load_predictor(run, deadline_ms=5)


def test_checkpoint_safetensors_and_onnx_give_the_same_labels(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, record, image = small_network(half=True), small_record(HALF), image_and_label().image
    expected = load_predictor(run)(image)
    weights = export_safetensors(model, tmp_path / "net.safetensors", record=record)
    export_onnx(model, tmp_path / "net.onnx", input_size=(64, 64), record=record)
    assert (load_predictor(run / "checkpoints" / "best.ckpt")(image) == expected).all()
    assert (load_predictor(weights)(image) == expected).all()
    by_onnx = load_predictor(tmp_path / "net.onnx")
    assert by_onnx.runs_on.startswith("onnxruntime")
    assert (by_onnx(image) == expected).mean() >= 0.9999
    assert (by_onnx.classes, by_onnx.palette, by_onnx.resolution) == (CLASSES, PALETTE, 0.5)


def test_what_holds_no_network_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such run"):
        load_predictor(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere\.onnx: no such file"):
        load_predictor(tmp_path / "nowhere.onnx")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes\.txt: holds no network; give a run folder or a file ending in \.ckpt"):
        load_predictor(tmp_path / "notes.txt")
    (tmp_path / "broken.ckpt").write_text("")
    with pytest.raises(CheckpointError, match=r"broken\.ckpt: is no checkpoint"):
        load_predictor(tmp_path / "broken.ckpt")


def test_only_rgb_pixels_are_taken() -> None:
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="an image is RGB uint8"):
            constant(0)(wrong)


def test_an_image_is_made_smaller_by_averaging_areas() -> None:
    image = np.repeat(np.array([[0, 100], [20, 40]], np.uint8)[..., None], 3, axis=2)
    assert downsampled(image, 0.5).tolist() == [[[40, 40, 40]]]  # (0 + 100 + 20 + 40) / 4
    assert downsampled(image, 1) is image


def test_a_label_picture_keeps_train_ids_and_shows_colours(tmp_path: Path) -> None:
    labels = np.array([[0, 1], [1, 255]], np.uint8)
    palette_picture(labels, [(128, 64, 0), (0, 0, 250)]).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        assert np.array(picture).tolist() == labels.tolist()
        assert np.array(picture.convert("RGB")).tolist() == [[[128, 64, 0], [0, 0, 250]], [[0, 0, 250], [0, 0, 0]]]


def test_an_overlay_mixes_by_its_opacity() -> None:
    image, labels = np.full((1, 2, 3), 40, np.uint8), np.array([[0, 255]], np.uint8)
    colors = [(80, 0, 240)]
    assert overlay(image, labels, colors, 0.25).tolist() == [[[50, 30, 90], [30, 30, 30]]]
    assert (overlay(image, labels, colors, 0.0) == image).all()
    assert overlay(image, labels, colors, 1.0)[0, 0].tolist() == [80, 0, 240]


def test_a_legend_shows_each_colour_and_wraps() -> None:
    colors = [(10 * number, 0, 200) for number in range(6)]
    names = [f"a class named {number}" for number in range(6)]
    narrow, wide = legend(names, colors, 150), legend(names, colors, 2000)
    assert wide.shape[1] == 2000
    assert narrow.shape[0] > 5 * wide.shape[0] - 40
    for strip in (narrow, wide):
        for color in colors:
            assert (strip == color).all(axis=2).sum() > 100
    assert legend(["a name longer than the picture is wide"], [(1, 2, 3)], 20).shape[1] > 100


def test_a_figure_names_only_what_was_found() -> None:
    image, _ = image_and_label()
    made = figure(image, np.full(SIZE, 2, np.uint8), constant(2))
    assert (made[:90, :130] == image).all()
    below = made[90:]
    assert (below == (2, 100, 200)).all(axis=2).any()
    assert not (below == (1, 100, 200)).all(axis=2).any()


def test_frames_become_even_pictures_with_all_names() -> None:
    frames = [image_and_label(index, (33, 401)).image for index in range(2)]
    made = list(label_video(frames, constant(1)))
    assert len(made) == 2
    for labels, shown in made:
        assert labels.shape == (33, 401)
        assert (shown.shape[0] % 2, shown.shape[1]) == (0, 402)
        assert (shown[33:] == (2, 100, 200)).all(axis=2).any()
    ((_, bare),) = label_video(frames[:1], constant(1, num_classes=150))
    assert bare.shape == (34, 402, 3)


def test_the_narrower_picture_is_continued_in_white() -> None:
    made = stacked(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 2, 3), np.uint8))
    assert made[:, :, 0].tolist() == [[0, 255], [0, 0]]
    assert cv2.countNonZero(made[:, :, 0]) == 1


def test_stages_see_images_at_the_one_size_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stage_1.onnx").write_bytes(b"")
    recipe = parse_recipe(TINY + SLIM, ["data_slimming.inference=adaptive"], name="tiny")
    labels = {"classes": ["a", "b"], "palette": [[0, 0, 0], [1, 1, 1]]}
    record = {"recipe": recipe_record(recipe), "labels": labels, "complexity": [0.0, 1000.0]}
    assert adaptive_of(record) is not None
    seen = []

    def stage_labels(image: np.ndarray, size: tuple[int, int]) -> SimpleNamespace:
        seen.append(image.shape[:2])
        return SimpleNamespace(labels=torch.zeros(1, *size, dtype=torch.uint8))

    stages = SimpleNamespace(record=record, provider="CPU", num_exits=1, labels=stage_labels)
    monkeypatch.setattr("dance_seg.export_exits.StagesOnnx", lambda folder: stages)
    load_predictor(tmp_path)(np.zeros((64, 96, 3), np.uint8))
    assert seen == [(64, 96)]
