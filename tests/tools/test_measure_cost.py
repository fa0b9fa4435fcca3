"""measure_cost on a network of one convolution: what is printed, kept and refused. No test looks at a time."""

import json
import sys

import pytest
import torch
from torch import nn

import dance_seg.build
import dance_seg.cost.roofline
import tools.measure_cost as tool
from dance_seg.cost.roofline import Peak
from dance_seg.machine import processor
from dance_seg.report.comparison import compare_runs
from dance_seg.report.run_page import report
from dance_seg.report.runs import read_run
from tests.run_folders import make_recipe, write_run

PEAK = Peak(gmacs_per_second=100, gigabytes_per_second=10, device="cpu", dtype="float32", threads=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A made-up run of a crop of 16x24, whose network is one convolution; the machine's peaks are made up too."""
    there = write_run(tmp_path / "run", circumstances={"processor": processor()}, data__args__crop=[16, 24])
    record = {"recipe": make_recipe("run", data__args__crop=[16, 24])}

    def load_run(folder, choice):
        return nn.Conv2d(3, 5, 1), record, folder / "checkpoints" / f"{choice}.ckpt"

    monkeypatch.setattr(dance_seg.build, "load_run", load_run)
    monkeypatch.setattr(dance_seg.cost.roofline, "measure_peak", lambda *given, **options: PEAK)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    yield there
    torch.set_num_threads(threads)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["measure_cost", *map(str, words), "--seconds", "0.01", "--threads", "1"])
    assert tool.main() == 0


def costs(folder):
    return json.loads((folder / "cost.json").read_text())


def test_every_batch_is_measured_and_kept_beside_what_was_there(folder, monkeypatch, capsys):
    before = costs(folder)["training"]
    call(monkeypatch, folder, "--batch", 1, 3)
    kept = costs(folder)
    inference = kept["inference"]
    assert kept["training"] == before
    assert inference["gmacs"] == 3 * 5 * 16 * 24 / 1e9
    assert (inference["parameters"], inference["input_size"], inference["uncounted"]) == (20, [16, 24], [])
    assert [one["batch"] for one in inference["batches"]] == [1, 3]
    # images and output of 16 x 24, four bytes a number
    assert [one["peak_memory"]["peak_bytes"] for one in inference["batches"]] == [n * 4 * 384 * 8 for n in (1, 3)]
    assert inference["latency_ms"]["batch"] == 1
    assert inference["latency_ms"]["p50_ms"] == inference["batches"][0]["p50_ms"]
    said = capsys.readouterr().out
    assert "best.ckpt at 16x24" in said
    assert "not counted: nothing" in said


def test_the_mean_over_the_sizes_that_a_run_infers_at_stays(folder, monkeypatch):
    mean = {"gmacs": 0.5, "sizes": [[8, 8, 0.25], [16, 24, 0.75]]}
    (folder / "cost.json").write_text(json.dumps({**costs(folder), "inference": mean}))
    call(monkeypatch, folder, "--batch", 1)
    inference = costs(folder)["inference"]
    assert (inference["gmacs"], inference["sizes"]) == (0.5, mean["sizes"])
    assert "milliseconds and memory are those of 16x24" in inference["notes"]


def test_what_reads_runs_reads_the_new_figures_too(folder, monkeypatch):
    call(monkeypatch, folder, "--roofline")
    found = read_run(folder)
    assert found.latency["batch"] == 1
    assert "inference/latency_p50_ms" in compare_runs([folder]).rows[0].figures
    report(found)
    assert "Roofline" in (folder / "roofline.html").read_text()


def test_an_estimate_is_no_measurement(folder, monkeypatch, capsys):
    monkeypatch.setattr("dance_seg.cost.energy.POWERCAP", folder / "no_meter")
    call(monkeypatch, folder, "--batch", 1)
    kept = costs(folder)
    moved = 4 * (3 * 384 + 15 + 5 + 5 * 384)
    estimate = kept["inference"]["estimated_energy"]
    assert kept["inference"]["joules_per_image"] is None
    assert estimate["joules_per_image"] == pytest.approx((4.6 * 15 * 384 + 160 * moved) * 1e-12)
    assert estimate["is_estimate"] is True
    assert kept["training_estimated_energy"]["is_estimate"] is True
    assert "NOT measured" in capsys.readouterr().out
    call(monkeypatch, folder, "--batch", 1, "--watts", 50)
    kept = costs(folder)
    assert "50 W as stated" in kept["inference"]["estimated_energy"]["model"]
    assert kept["training_estimated_energy"]["joules"] == 50 * kept["training"]["cost/train_seconds"]


def test_the_roofline_holds_the_network_and_the_training_that_ran_here(folder, monkeypatch, capsys):
    call(monkeypatch, folder, "--roofline")
    roofline, spent = costs(folder)["roofline"], costs(folder)["training"]
    assert roofline["total"]["gmacs"] == 15 * 384 / 1e9
    steps = spent["cost/forward_gmacs"] + spent["cost/backward_gmacs"]
    assert roofline["training"]["gmacs_per_second"] == pytest.approx(steps / spent["cost/step_seconds"])
    assert "% of the roof" in capsys.readouterr().out


def test_a_training_on_another_machine_has_no_share_of_this_one(folder, monkeypatch):
    (folder / "run.json").write_text(json.dumps({"processor": "An Abacus"}))
    call(monkeypatch, folder, "--roofline")
    roofline = costs(folder)["roofline"]
    assert roofline["training"] is None
    assert "training ran on An Abacus" in roofline["notes"][0]


def test_several_sizes_types_and_the_search_for_throughput(folder, monkeypatch, tmp_path):
    call(
        monkeypatch, folder, "--batch", 2, "--size", 8, 8, "--size", 4, 12, "--precision", "bfloat16",
        "--channels-last", "--throughput", "--json", tmp_path / "out" / "figures.json",
    )  # fmt: skip
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures == {**costs(folder)["inference"]}
    assert figures["input_size"] == [8, 8]
    assert figures["other_sizes"][0]["input_size"] == [4, 12]
    assert figures["latency_ms"]["dtype"] == "bfloat16"
    assert figures["throughput"]["tried"][0][0] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "0", "5"], "--size 0 5"),
        (["--batch", "0"], "--batch 0"),
        (["--batch", "1", "-2"], "--batch -2"),
        (["--watts", "nan"], "--watts nan"),
        (["--watts", "-3"], "--watts"),
    ],
    ids=" ".join,
)
def test_nonsense_is_refused(folder, monkeypatch, words, said):
    with pytest.raises(ValueError, match=said):
        call(monkeypatch, folder, *words)


def test_a_size_that_the_network_refuses_is_named_and_nothing_is_written(folder, monkeypatch):
    before = costs(folder)
    monkeypatch.setattr(dance_seg.build, "load_run", lambda *given: (nn.Conv2d(3, 5, 9), make_record(), folder / "c"))
    with pytest.raises(ValueError, match=r"at 4x4.*[Kk]ernel size"):
        call(monkeypatch, folder, "--size", 4, 4)
    assert costs(folder) == before


def make_record():
    return {"recipe": make_recipe("run")}


def test_a_damaged_cost_file_is_named_before_anything_is_measured(folder, monkeypatch):
    (folder / "cost.json").write_text("{half")
    with pytest.raises(ValueError, match=r"cost\.json: not valid JSON"):
        call(monkeypatch, folder)
    (folder / "cost.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"cost\.json: holds list"):
        call(monkeypatch, folder)


def test_disturbed_milliseconds_are_noted():
    steady, shaken = {"batch": 1, "p50_ms": 10, "p90_ms": 11}, {"batch": 8, "p50_ms": 10, "p90_ms": 20}
    assert tool.notes([steady], noisy=False) == []
    assert len(tool.notes([steady], noisy=True)) == 1
    assert tool.notes([steady, shaken], noisy=False) == ["batch 8: p90 is 2.0 times p50; something disturbed it"]


def test_an_onnx_file_is_measured(tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["images"], ["logits"])], "network",
        [value("images", 1, ["n", 3, "h", "w"])], [value("logits", 1, ["n", 3, "h", "w"])],
    )  # fmt: skip
    path = tmp_path / "network.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    call(monkeypatch, path, "--size", 8, 8, "--batch", 1, 2, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [one["batch"] for one in figures["batches"]] == [1, 2]
    assert "onnxruntime" in capsys.readouterr().out
    for words, said in (
        ([path], "--size 360 480"),
        ([path, "--roofline"], "--roofline needs a run"),
        ([tmp_path / "b.onnx"], "no such"),
    ):
        with pytest.raises(ValueError, match=said):
            call(monkeypatch, *words)
