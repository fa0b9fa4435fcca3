"""Images, folders and films are labelled; what cannot be used is named, and the exit status says so."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dance_seg.predict import load_predictor
from datamodules.scenes import CLASSES, PALETTE, render_scene
from tests.exported import small_network, small_record, write_small_run
from tools.predict import find_work, main

SIZE = (72, 104)


def predict(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, words)])
    return main()


def scene(index: int) -> np.ndarray:
    return render_scene(5, index, SIZE).image


def write_film(path: Path, frames: int = 3) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (SIZE[1], SIZE[0]))
    assert writer.isOpened()
    for index in range(frames):
        writer.write(cv2.cvtColor(scene(index), cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def frames_in(path: Path) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        there, frame = capture.read()
        if not there:
            return frames
        frames.append(frame)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("runs") / "small", half=True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "drive").mkdir(parents=True)
    Image.fromarray(scene(0)).save(folder / "a.png")
    Image.fromarray(scene(1)).save(folder / "drive" / "b.jpg", quality=95)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_a_folder_becomes_labels_and_figures_in_the_same_places(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(monkeypatch, run, pictures, "--out", out) == 0
    names = ["a_labels.png", "a_overlay.png", "drive/b_labels.png", "drive/b_overlay.png", "legend.png"]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == names
    with Image.open(out / "a_labels.png") as picture:
        labels = np.array(picture)
        assert picture.getpalette()[: 3 * len(PALETTE)] == [value for color in PALETTE for value in color]
    assert (labels == load_predictor(run)(scene(0))).all()
    with Image.open(out / "a_overlay.png") as picture:
        assert picture.size[0] >= 2 * SIZE[1]
        assert (np.array(picture)[: SIZE[0], : SIZE[1]] == scene(0)).all()
    printed = capsys.readouterr().out
    assert f"{len(CLASSES)} classes, resolution 1, torch on" in printed
    assert "2 of 2 labelled" in printed


def test_a_damaged_image_is_named_and_the_rest_is_labelled(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = pictures / "damaged.png"
    damaged.write_bytes((pictures / "a.png").read_bytes()[:300])
    assert predict(monkeypatch, run, pictures, "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert f"error: {damaged} is cut off or damaged" in said.err
    assert "1 of 3 could not be used" in said.err
    assert "2 of 3 labelled" in said.out
    assert (tmp_path / "out" / "drive" / "b_labels.png").is_file()
    assert not (tmp_path / "out" / "damaged_labels.png").exists()


def test_a_film_becomes_a_film_and_its_masks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film, out = write_film(tmp_path / "street.mp4"), tmp_path / "out"
    assert predict(monkeypatch, run, film, "--out", out, "--masks", "--overlay", 0.3) == 0
    made = frames_in(out / "street_overlay.mp4")
    assert len(made) == 3
    assert made[0].shape[0] > SIZE[0]  # the names stand below
    read = frames_in(film)
    expected = load_predictor(run)(cv2.cvtColor(read[2], cv2.COLOR_BGR2RGB))
    with Image.open(out / "street_labels" / "000002.png") as picture:
        assert (np.array(picture) == expected).all()
    assert not list(out.glob(".*"))


def test_a_film_that_is_none_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake.mp4").write_text("no film")
    assert predict(monkeypatch, run, tmp_path / "fake.mp4", "--out", tmp_path / "out") == 1
    assert f"{tmp_path / 'fake.mp4'} is no video that can be read" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["legend.png"]


def test_a_film_that_names_other_files_opens_none_of_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_film(tmp_path / "other.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    assert predict(monkeypatch, run, tmp_path / "list.mp4", "--out", tmp_path / "out") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["legend.png"]


def test_an_onnx_file_labels_too_and_others_are_refused(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from dance_seg.export import export_onnx

    net, out = tmp_path / "net.onnx", tmp_path / "out"
    export_onnx(small_network(half=True), net, input_size=(64, 64), record=small_record(), any_size=False)
    assert predict(monkeypatch, net, pictures / "a.png", "--out", out) == 1  # 72x104 is not 64x64
    assert not (out / "a_labels.png").exists()
    Image.fromarray(scene(0)[:64, :64]).save(pictures / "small.png")
    assert predict(monkeypatch, net, pictures / "small.png", "--out", out) == 0
    assert (out / "small_labels.png").is_file()
    foreign = onnx.load(str(net))
    del foreign.metadata_props[:]
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    with pytest.raises(ValueError, match=r"foreign\.onnx: exported by something else"):
        predict(monkeypatch, tmp_path / "foreign.onnx", pictures, "--out", out)


def test_what_cannot_be_done_is_said_before_anything_is_loaded(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images or films found; files ending in \.png"):
        find_work([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        find_work([tmp_path / "nowhere"], tmp_path / "out")
    Image.fromarray(scene(0)).save(pictures / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.png would both be written to .*a_labels\.png"):
        find_work([pictures], tmp_path / "out")


def test_what_was_written_into_the_folder_is_not_labelled_again(pictures: Path) -> None:
    out = pictures / "labelled"
    out.mkdir()
    Image.fromarray(scene(0)).save(out / "a_overlay.png")
    assert [work.target.relative_to(out).as_posix() for work in find_work([pictures], out)] == ["a", "drive/b"]


def test_a_folder_that_cannot_be_written_is_named(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: cannot be written"):
        predict(monkeypatch, run, pictures, "--out", tmp_path / "file")
    with pytest.raises(ValueError, match="--overlay is 2"):
        predict(monkeypatch, run, pictures, "--out", tmp_path / "out", "--overlay", 2)
