"""The tool checks what a recipe names, prints it, and says by its exit status whether training can begin."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.audit import check_pairs
from datamodules.camvid import camvid_split
from tools.check_data import describe, main
from tools.make_shapes import write_layout

RECIPE = """
data: {name: camvid, args: {root: ROOT, crop: [32, 32], batch_size: 2}}
model: {name: smp, args: {arch: fpn, encoder_name: resnet18}}
trainer: {max_epochs: 1}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_layout("camvid", tmp_path / "data", 12, size=(32, 48))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("ROOT", str(tmp_path / "data")))
    return tmp_path / "data"


def checked(monkeypatch: pytest.MonkeyPatch, data: Path, *more: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check_data", str(data.parent / "recipe.yaml"), *more])
    return main()


def test_good_data_is_counted_and_the_status_is_zero(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = data.parent / "figures.json"
    assert checked(monkeypatch, data, "--json", str(figures)) == 0
    printed = capsys.readouterr().out
    assert "train: 6 pairs, 0 bad; 32x48 (6)" in printed
    assert "test: 3 pairs, 0 bad; 32x48 (3)" in printed
    found = json.loads(figures.read_text())
    labels = [np.array(Image.open(path)) for path in sorted((data / "trainannot").iterdir())]
    road = found["splits"]["train"]["classes"]["Road"]
    assert road == {
        "pixels": sum((label == 3).sum() for label in labels),
        "images": sum((label == 3).any() for label in labels),
    }
    assert found["errors"] == []


def test_bad_data_is_named_with_a_diagnosis_and_the_status_is_one(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label = min((data / "valannot").iterdir())
    Image.fromarray(np.tile(np.array([7, 8, 11, 26], np.uint8), (32, 12))).save(label)
    image = min((data / "train").iterdir())
    image.write_bytes(image.read_bytes()[:500])
    assert checked(monkeypatch, data) == 1
    printed = capsys.readouterr().out
    assert f"{image} is cut off" in printed
    assert f"{label}: raw id 26 (384 pixels) is not in the label table" in printed
    assert "these are Cityscapes labelIds" in printed
    assert "error: train: 1 of 6 pairs cannot be used" in printed


def test_what_training_would_refuse_of_good_files_is_said(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(monkeypatch, data, "data.args.hold_out=nowhere") == 1
    assert "error: data.args.hold_out names 'nowhere'" in capsys.readouterr().out
    assert checked(monkeypatch, data, "data.args.batch_size=8") == 0
    assert "warning: data.args.batch_size is 8, and there are 6 training images" in capsys.readouterr().out


def test_a_test_split_that_is_not_there_is_no_fault(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "test.txt").unlink()
    assert checked(monkeypatch, data) == 0


def test_a_missing_root_is_an_error_that_says_what_belongs_there(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"is missing; data\.args\.root is the folder that holds train\.txt"):
        checked(monkeypatch, data, f"data.args.root={data.parent}/nowhere")


def test_the_table_shows_the_share_of_each_class(data: Path) -> None:
    pairs, table = camvid_split(data, "train")
    for pair in pairs:
        label = np.zeros((32, 48), np.uint8)
        label[:8] = 3
        label[8:16] = 11
        Image.fromarray(label).save(str(pair.label))
    lines = describe({"train": check_pairs(pairs, table, progress=False)}).splitlines()
    figures = {line.split()[0]: line.split()[1:] for line in lines if "%" in line}
    assert figures["Sky"] == ["50.000", "%", "6"]
    assert figures["Road"] == ["25.000", "%", "6"]
    assert figures["(ignored)"] == ["25.000", "%"]
    assert figures["Car"] == ["0.000", "%", "0"]
