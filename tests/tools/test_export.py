"""The tool writes files that agree with the run, says how well, and refuses what it cannot export."""

import json
import sys
from pathlib import Path

import pytest

from dance_seg.export import OnnxFile, load_safetensors
from tests.exported import write_small_run
from tools.export import main

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library)


def export(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    return main()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("runs") / "small", half=True)


def test_a_run_becomes_both_files_that_are_compared_on_its_validation_images(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    assert export(monkeypatch, run, "--to", "both", "--out", out, "--images", 2, "--json", figures) == 0
    printed = capsys.readouterr().out
    assert f"written to {out / 'small.safetensors'}" in printed
    assert f"written to {out / 'small.onnx'}" in printed
    assert "compared on 2 images of shapes val at resolution 1" in printed
    assert sorted(path.name for path in out.iterdir()) == ["small.onnx", "small.safetensors"]
    found = json.loads(figures.read_text())
    assert found["argmax"] >= 0.9999
    assert found["pixels"] == 2 * 64 * 64
    assert abs(found["miou_network"] - found["miou_file"]) < 0.1
    assert found["onnxruntime_vs_eager_ms"] > 0
    assert OnnxFile(out / "small.onnx").sizes.multiple_of == 8
    load_safetensors(out / "small.safetensors")

    capsys.readouterr()
    assert export(monkeypatch, run, "--check", out / "small.onnx", "--images", 1) == 0
    assert f"compared with {out / 'small.onnx'}" in capsys.readouterr().out
    other = write_small_run(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"small\.onnx holds another network than the one it is checked against"):
        export(monkeypatch, other, "--check", out / "small.onnx")


def test_without_the_data_drawn_pictures_are_compared_and_it_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dance_seg.build import load_run
    from tools.export import shown_images

    _, record, _ = load_run(run)
    gone = {"name": "camvid", "args": {"root": "/nowhere", "crop": [64, 64]}}
    shown = shown_images({**record, "recipe": {**record["recipe"], "data": gone}}, [], 3, (64, 64))
    assert shown.origin.startswith("3 drawn pictures, since the data is not there (")
    assert [image.shape for image in shown.images] == [(64, 64, 3)] * 3
    assert shown.labels == []
    with pytest.raises(ValueError, match="/nowhere"):
        shown_images({**record, "recipe": {**record["recipe"], "data": gone}}, ["data.args.batch_size=2"], 3, (64, 64))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/no_such_run"], "no such run"),
        (["FILE"], "is a file; give the run folder"),
        (["RUN", "--size", "0", "64"], "--size"),
        (["RUN", "--images", "0"], "--images"),
        (["RUN", "--check", "FILE"], "no ONNX file that can be run"),
        (["RUN", "--out", "FILE", "--to", "safetensors"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_said(
    words: list[str], said: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.onnx").write_text("no network")
    given = {"RUN": str(run), "FILE": str(tmp_path / "file.onnx")}
    with pytest.raises(ValueError, match=said):
        export(monkeypatch, *(given.get(word, word) for word in words))
