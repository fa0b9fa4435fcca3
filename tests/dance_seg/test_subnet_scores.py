"""Scores and costs of a supernet's networks without images: milliseconds of their ways, and what they are known by."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dance_seg import subnet_scores
from dance_seg.calibration import ExitsOfSplit
from dance_seg.early_exit.policy import ExitPolicy
from dance_seg.errors import DataError
from dance_seg.models.multi_stage import MultiStageSupernet
from dance_seg.subnet_scores import SubnetScores, latency_table
from dance_seg.supernet.latency_table import Checked, UnmeasuredError, save_table
from dance_seg.supernet.search import Budget
from dance_seg.supernet.space import SearchSpace

SIZE = (64, 64)


class Split:
    """Four images of which nothing is known but what exits say of them."""

    def __init__(self, statistics=2):
        self.split, self.size, self.device = "val", SIZE, torch.device("cpu")
        self.names, self.statistics, self.runs = list("abcd"), [torch.zeros(statistics, 3, *SIZE)], 0

    def exits(self, network, policy):
        self.runs += 1
        matrices = np.tile(np.eye(2, dtype=np.int32), (4, 3, 1, 1))
        matrices[:2, :2] = [[0, 1], [0, 1]]  # the first two images need the last exit
        scores = np.repeat(np.float32([[0.1], [0.2], [0.8], [0.9]]), 3, axis=1)
        return ExitsOfSplit(tuple(self.names), scores, matrices, self.size, policy)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MultiStageSupernet(2, "tiny").eval()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """A table of the largest and the smallest network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subnet_scores, "CHECKED", 2)
        patch.setattr(subnet_scores, "PATIENCE", 1)
        patch.setattr(SearchSpace, "sample", lambda space, random: space.largest)
        patch.setattr(subnet_scores, "MOST_ERROR", math.inf)
        path = tmp_path_factory.mktemp("table") / "latency.json"
        latency_table(model, SIZE, path, lambda said: None, time_limit_s=0.0)
    return path


@pytest.fixture(scope="module")
def table(model, path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subnet_scores, "MOST_ERROR", math.inf)
        return latency_table(model, SIZE, path, print)


@pytest.fixture(autouse=True)
def without_passes(monkeypatch):
    monkeypatch.setattr(SubnetScores, "network", lambda self, subnet: self.model.extract(subnet))


def test_milliseconds_of_early_exits_are_known_and_images_leave_there(model, table):
    costs = SubnetScores(model, Split(), Budget(1.0, "ms"), "dynamic", table=table).path_costs(model.space.largest)
    budget = Budget((costs.cheapest + costs.full) / 2, "ms")
    judge = SubnetScores(model, Split(), budget, "dynamic", table=table)
    assert 0 < costs.cheapest < budget.limit < costs.full < math.inf
    assert all(0 < head < costs.full for head in costs.heads[:-1])
    assert judge.cost(model.space.largest) == budget.limit
    found = judge.score(model.space.largest)
    assert None not in found.details["thresholds"][:1]
    assert costs.cheapest < found.details["average_cost"] <= budget.limit


def test_a_network_with_a_part_that_was_not_measured_has_no_cost(model, table):
    few = replace(table, parts=dict(list(table.parts.items())[1:]))
    for performance in ("static", "dynamic"):
        judge = SubnetScores(model, Split(), Budget(1.0, "ms"), performance, table=few)
        assert judge.cost(model.space.largest) == math.inf
        assert judge.left_out == {model.space.largest}
        with pytest.raises(UnmeasuredError, match="1 parts were not measured"):
            judge.whole_cost(model.space.largest)


def test_a_network_that_is_named_must_be_in_the_table(model, table, tmp_path):
    few = replace(table, parts=dict(list(table.parts.items())[1:]), errors=())
    path = save_table(few, tmp_path / "latency.json")
    latency_table(model, SIZE, path, print)
    with pytest.raises(DataError, match=r"latency\.json: the times of some parts of .* are missing; move it away"):
        latency_table(model, SIZE, path, print, named=[model.space.largest])


def test_errors_of_a_table_are_kept_and_large_ones_warned_of(model, table, tmp_path):
    assert len(table.errors) == 1
    path = save_table(replace(table, errors=(0.1, -0.3, 0.16)), tmp_path / "latency.json")
    with pytest.warns(UserWarning, match=r"latency\.json: sums .* are off by 16% .* more than 15%; move it away"):
        assert latency_table(model, SIZE, path, print).errors == (0.1, -0.3, 0.16)


def test_scores_are_known_by_the_table_and_the_images_of_statistics(model, table):
    def about(statistics=2, **given):
        return SubnetScores(model, Split(statistics), Budget(1.0), "static", **given).about()

    assert about() == about()
    assert about() != about(statistics=3)
    assert about() != about(policy=ExitPolicy(score="entropy"))
    assert about(table=table) != about(table=replace(table, factor=2 * table.factor))


def test_a_score_that_is_fitted_to_one_network_is_refused(model):
    with pytest.raises(ValueError, match="the score gain is fitted to one network, and a search judges many"):
        SubnetScores(model, Split(), Budget(1.0), "dynamic", policy=ExitPolicy(score="gain"))


def test_another_budget_does_not_run_a_network_again(model):
    split = Split()
    judge = SubnetScores(model, split, Budget(1e12), "dynamic")
    largest = model.space.largest
    costs = judge.path_costs(largest)
    all_through = judge.score(largest).details["average_cost"]
    half = judge.within(Budget((costs.cheapest + costs.full) / 2)).score(largest).details["average_cost"]
    assert half < all_through == costs.full
    assert split.runs == 1


def test_all_is_timed_on_the_device_that_judges(model, table, tmp_path, monkeypatch):
    seen = []

    def device_of(network):
        seen.append(next(network.parameters()).device.type)

    def measured(space, networks, size, **given):
        device_of(next(iter(networks)))
        return replace(table, conditions=replace(table.conditions, device="meta"))

    def checked(table, networks, **given):
        device_of(networks[0])
        return [Checked(1.0, 1.0)]

    monkeypatch.setattr(subnet_scores, "measure_table", measured)
    monkeypatch.setattr(subnet_scores, "check", checked)
    monkeypatch.setattr(
        subnet_scores, "measure_latency", lambda network, size: device_of(network) or SimpleNamespace(p50_ms=1.0)
    )
    split = Split()
    split.device = torch.device("meta")
    here = latency_table(model, SIZE, tmp_path / "latency.json", print, device=split.device)
    judge = SubnetScores(model, split, Budget(1.0, "ms"), "static", table=here)
    judge.cost_of_other(model.extract(model.space.smallest))
    assert seen == ["meta"] * 4
    assert next(model.parameters()).device.type == "cpu"
