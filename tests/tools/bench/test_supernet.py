"""The benchmark of supernets: its networks, its ratios, and that it runs."""

import json
import sys

import numpy as np
import pytest
import torch

from dance_seg.cost.macs import count_macs
from dance_seg.early_exit.budget import ExitTable
from dance_seg.early_exit.paths import PathCosts
from dance_seg.models.multi_stage import MultiStageSupernet
from dance_seg.subnet_scores import SubnetScores
from dance_seg.supernet.search import Budget
from tests.tools.test_search import write_run
from tools.bench import supernet
from tools.bench.supernet import (
    SHORT,
    cached_search,
    coarse_macs,
    evaluation_over_pass,
    judge_of,
    judging,
    load,
    loaded,
    spread_out,
)


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


@pytest.mark.parametrize(("performance", "most"), [("static", 1.0), ("dynamic", 1.5)])
def test_all_that_judging_a_network_runs_is_counted(judge, monkeypatch, performance, most):
    """Upsampling to the labels' size is the evaluator's own, which interpolates where a boundary runs alone."""
    fresh = judge_of(judge.model, judge.split, performance)
    subnet = fresh.model.space.smallest
    found = evaluation_over_pass(fresh, [subnet])
    (evaluation,), (recalibration,) = found.values()
    assert 0.9 < evaluation <= most
    # Statistics take a pass over their own images, all heads asked.
    images = sum(len(batch) for batch in fresh.split.statistics)
    assert recalibration == pytest.approx(images / len(fresh.split.names), rel=0.5)
    if performance == "static":  # what a score runs beyond one pass is found
        monkeypatch.setattr(SubnetScores, "score", lambda self, one: [self.split.miou(self.network(one)) for _ in "ab"])
        (twice,), _ = evaluation_over_pass(fresh, [subnet]).values()
        assert twice == pytest.approx(2 * evaluation + recalibration)


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
    assert len(found["solve_ms"]) == len(networks)
    assert found["search_candidates/cached"] == [SHORT.candidates]
    assert found["search_seconds/cached"][0] > 0
    assert len([subnet for subnet in passes if subnet in networks]) == 2


def test_a_search_on_cached_tables_judges_as_many_candidates_as_asked_for_within_the_budget():
    """Every candidate is one network of the set with thresholds of its own, whose average cost fits."""
    random = np.random.default_rng(0)
    costs = PathCosts((1.0, 2.0, 4.0), (0.5, 0.5, 0.5))
    tables = [
        ExitTable(random.random((6, 3), np.float32), random.integers(1, 9, (6, 1, 2, 2)).repeat(3, axis=1), costs)
        for _ in range(2)
    ]
    assert cached_search(tables, Budget(3.0), 60) == 60
    with pytest.raises(ValueError, match="no network of this space was found"):
        cached_search(tables, Budget(1.0), 60)


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
        "search_minus_random/multi_stage",
        "search_minus_random/vit_resnas",
        "dynamic_minus_static/multi_stage",
        "latency_table_error/multi_stage",
        "latency_table_error/vit_resnas",
        "evaluation_over_pass/static",
        "recalibration_over_pass/dynamic",
        "subnet_latency_over_macs/multi_stage",
        "subnet_latency_over_macs/vit_resnas",
        "miou_several_minus_single",
        "miou_with_minus_without_skip",
    } <= written["ratios"].keys()
    assert written["notes"]["vit_resnas, seed 0"]["steps_passed_over_with_skip"] == 0
    (network,) = list((tmp_path / "runs").glob("network_*"))[:1]
    assert count_macs(load(network), (96, 96)).macs > 0
    assert torch.isfinite(torch.tensor(written["ratios"]["candidate_ms"]["median"]))
