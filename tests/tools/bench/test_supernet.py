"""The benchmark of supernets: its networks, its ratios, and that it runs."""

import json
import sys

import pytest
import torch

from dance_seg.cost.macs import count_macs
from dance_seg.models.multi_stage import MultiStageSupernet
from tests.tools.test_search import write_run
from tools.bench import supernet
from tools.bench.supernet import SHORT, coarse_macs, evaluation_over_pass, judge_of, judging, load, loaded, spread_out


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    model, split = loaded(write_run(tmp_path_factory.mktemp("run"), "multi_stage_supernet", "data.args.num_val=2"))
    return judge_of(model, split, "static")


def test_networks_are_distinct_and_spread_over_the_macs(judge):
    networks = spread_out(judge.model, judge.split.size, 4, seed=0)
    costs = [judge.whole_cost(subnet) for subnet in networks]
    assert costs == sorted(costs)
    assert len(set(networks)) == 4
    assert costs[-1] > 1.5 * costs[0]


def test_judging_a_network_is_one_pass_of_its_own(judge):
    """Upsampling to the labels' size is the evaluator's own, which interpolates where a boundary runs alone."""
    subnet = judge.model.space.smallest
    assert 0.9 < evaluation_over_pass(judge, subnet) <= 1.0


@pytest.mark.slow
def test_candidates_are_judged_from_tables_without_the_network(judge, monkeypatch):
    dynamic = judge_of(judge.model, judge.split, "dynamic")
    networks = spread_out(judge.model, judge.split.size, 2, seed=0)
    passes = []
    forward = MultiStageSupernet.extract
    monkeypatch.setattr(
        MultiStageSupernet, "extract", lambda self, subnet: passes.append(subnet) or forward(self, subnet)
    )
    found = judging(dynamic, networks, SHORT)
    assert len(found["candidate_ms"]) == SHORT.candidates
    assert found["search_seconds/cached"] == [pytest.approx(sum(found["candidate_ms"]) / 1000)]
    assert len([subnet for subnet in passes if subnet in networks]) == 2


def test_macs_up_to_the_logits_leave_out_their_upsampling(judge):
    """Four per class and pixel of the image, for bilinear interpolation."""
    network = judge.network(judge.model.space.smallest)
    assert count_macs(network, (96, 64)).macs - coarse_macs(network, (96, 64)) == 4 * 11 * 96 * 64


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(supernet.Path(supernet.__file__).parents[2] / "recipes")
    small = ["data.args.size=[96,96]", "data.args.crop=[64,64]", "trainer.threads=1"]
    monkeypatch.setenv("PYTHONPATH", str(supernet.Path(supernet.__file__).parents[2]))
    monkeypatch.setattr(sys, "argv", ["supernet", "--quick", "--runs", str(tmp_path / "runs"), *small])
    assert supernet.main() == 0
    written = json.loads((tmp_path / "runs" / "bench" / "supernet_quick.json").read_text())
    assert {
        "multi_arch_step_over_largest",
        "memory_over_largest",
        "candidate_ms",
        "kendall_tau",
        "search_minus_random",
        "subnet_latency_over_macs/multi_stage",
        "subnet_latency_over_macs/vit_resnas",
        "miou_several_minus_single",
        "miou_with_minus_without_skip",
    } <= written["ratios"].keys()
    (network,) = list((tmp_path / "runs").glob("network_*"))[:1]
    assert count_macs(load(network), (96, 96)).macs > 0
    assert torch.isfinite(torch.tensor(written["ratios"]["candidate_ms"]["median"]))
