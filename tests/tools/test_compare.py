"""python -m tools.compare and tools.report: what they print, write and refuse."""

import json
import subprocess
import sys

import pytest

from tests.run_folders import write_run


def call(monkeypatch, capsys, tool: str, *arguments: str) -> tuple[int, str, str]:
    """Run a tool's main as `python -m tools.NAME` does; returns status, stdout, stderr."""
    import importlib

    from tools.cli import run

    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run(importlib.import_module(f"tools.{tool}").main)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs in runs/ of the working folder."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "dense", gmacs_per_epoch=100)
    write_run(tmp_path / "runs" / "slimmed", gmacs_per_epoch=40, slimming=True)
    return tmp_path / "runs"


def test_compare_prints_the_table_and_writes_it_three_times(runs, monkeypatch, capsys):
    status, out, err = call(monkeypatch, capsys, "compare", "runs/dense", "runs/slimmed")
    assert (status, err) == (0, "")
    assert "0.40x" in out
    assert "written to runs/compare/compare.md, runs/compare/compare.json and runs/compare/compare.html" in out
    record = json.loads((runs / "compare" / "compare.json").read_text())
    assert record["rows"][1]["figures"]["cost/train_gmacs"]["ratio"] == 0.4
    assert "(0.40x)" in (runs / "compare" / "compare.md").read_text()
    assert (runs / "compare" / "compare.html").read_text().startswith("<!doctype html>")


def test_compare_reads_offline_runs_beside_run_folders(runs, tmp_path, monkeypatch, capsys):
    from tests.dance_seg.report.test_offline_run import items, run_record, write_file

    rows = [items(2, **{"trainer__global_step": e, "val__miou": 50.0 + e, "epoch": e}) for e in range(2)]
    folder = tmp_path / "there" / "offline-run-20260101_000000-abc"
    write_file(folder, run_record("abc"), items(5, name="far", trainer={"max_epochs": 2}), *rows)
    status, out, err = call(monkeypatch, capsys, "compare", "runs/dense", folder)
    assert (status, err) == (0, "")
    assert "far (unfinished: epoch 2 of 2)" in out or "51.00" in out
    assert "51.00" in out


def test_compare_refuses_a_tracking_file_that_it_cannot_read(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "run-abc.wandb").write_bytes(b"another format")
    status, _, err = call(monkeypatch, capsys, "compare", "runs/dense", "run-abc.wandb")
    assert status == 2
    assert "run-abc.wandb: no .wandb file of the known format" in err


def test_compare_writes_where_it_is_told(runs, tmp_path, monkeypatch, capsys):
    arguments = ("--baseline", "runs/slimmed", "--out", "a", "--json", "b/c.json", "--markdown", "d/e.md")
    status, _, _ = call(monkeypatch, capsys, "compare", "runs/dense", "runs/slimmed", *arguments)
    assert status == 0
    assert json.loads((tmp_path / "b" / "c.json").read_text())["baseline"] == "slimmed"
    assert (tmp_path / "d" / "e.md").is_file()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["compare.html"]
    assert not (runs / "compare").exists()


def test_compare_refuses_a_folder_that_holds_no_run_in_one_line(runs, monkeypatch, capsys):
    status, out, err = call(monkeypatch, capsys, "compare", "runs/dense", "runs/slimed")
    assert (status, out) == (2, "")
    assert err == "error: runs/slimed: no such run; there are: runs/dense, runs/slimmed\n"


def test_compare_refuses_a_damaged_run_by_its_file(runs, monkeypatch, capsys):
    (runs / "dense" / "metrics.jsonl").write_text("{}\n")
    status, _, err = call(monkeypatch, capsys, "compare", "runs/dense")
    assert status == 2
    assert "runs/dense/metrics.jsonl:1: not a line of metrics" in err


def test_report_writes_the_page_of_each_run_again(runs, monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "report", "runs/dense", "runs/slimmed")
    assert status == 0
    assert out == "runs/dense/report.html\nruns/slimmed/report.html\n"
    assert (runs / "slimmed" / "report.html").is_file()


def test_report_refuses_a_folder_that_holds_no_run(runs, monkeypatch, capsys):
    status, _, err = call(monkeypatch, capsys, "report", "runs")
    assert status == 2
    assert "holds no run" in err


@pytest.mark.parametrize("tool", ["compare", "report"])
def test_help_needs_no_library(tool):
    code = (
        f"import sys, tools.{tool}; print(sorted({{'torch', 'numpy', 'jinja2', 'PIL', 'yaml'}} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
