"""Networks of a supernet beside others: what is searched, where points stand, and the plot."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from dance_seg.build import train
from dance_seg.early_exit.paths import path_costs
from dance_seg.early_exit.policy import ExitPolicy
from dance_seg.part import Part
from dance_seg.supernet.sampling import Sampling
from datamodules import build_datamodule
from tests.dance_seg.early_exit.toy import CLASSES, Toy
from tests.tiny import tiny
from tests.tools.bench.test_adaptive import SIZE, FewImages
from tools.bench import front
from tools.bench.front import Network, Point


def test_a_network_that_stops_early_stands_where_its_images_leave(monkeypatch):
    monkeypatch.setattr("dance_seg.calibration.path_milliseconds", lambda model, size, policy: path_costs(model, size))
    torch.manual_seed(0)
    toy, data = Toy(light=True).eval(), FewImages(count=4)
    first = ExitPolicy(score="mean", thresholds=(0.0, 0.0))
    whole, stopped = front.placed([Network("whole", toy), Network("stopped", toy, first)], data, rounds=3)
    costs = path_costs(toy, SIZE)
    assert whole.gmacs * 1e9 == costs.full
    assert stopped.gmacs * 1e9 == pytest.approx(costs.cheapest)
    assert stopped.milliseconds > 0
    assert len(data.classes) == CLASSES
    assert (toy.calls()[2], toy.calls()[0]) != (0, 0)


def test_the_stairs_are_what_none_beats(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    points = [Point("FPN, dense", 40, 10, 1), Point("multi-stage within 0.5", 42, 5, 0.5), Point("slow", 41, 12, 1)]
    assert front.front_of(points) == [(5, 42)]
    assert front.front_of([*points, Point("fast", 30, 2, 0.1)]) == [(2, 30), (5, 42)]
    front.report(points, {"supernet": "run"})
    written = json.loads((tmp_path / "runs/bench/front.json").read_text())
    assert written["ratios"]["ms_over_dense/multi-stage within 0.5"]["median"] == 0.5
    assert written["ratios"]["miou_minus_dense/slow"]["median"] == 1
    texts = [element.text for element in ElementTree.parse(tmp_path / "runs/bench/front.svg").iter()]
    assert all(front.short(point.name) in texts for point in points)


@pytest.mark.slow
def test_a_supernet_is_searched_for_each_budget_and_networks_come_with_thresholds(tmp_path, monkeypatch):
    recipe = tiny("trainer.max_epochs=1", cache=tmp_path / "cache")
    recipe = replace(recipe, model=Part("multi_stage_supernet", {"size": "tiny"}), supernet=Sampling(phases=()))
    folder = train(recipe, build_datamodule(recipe), tmp_path / "run")
    few = {"initial": 3, "iterations": 1, "parents": 1, "mutation": 1, "crossover": 1}
    networks, data = front.found_networks(folder, 0, budgets=(0.3, 0.6), search=few)
    assert [network.policy is None for network in networks] == [True, False, False]
    full = path_costs(networks[0].model, (64, 64)).full
    monkeypatch.setattr(front, "SCORED", "val")  # what was searched on, so that the budget holds
    for share, network in zip((0.3, 0.6), networks[1:], strict=True):
        _, macs_share, time_share = front.scored(network, data, (64, 64))
        assert macs_share * path_costs(network.model, (64, 64)).full <= share * full * (1 + 1e-6)
        assert 0 < time_share <= 1.5
