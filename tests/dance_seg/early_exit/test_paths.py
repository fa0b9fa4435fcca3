"""What each way costs: against counts by hand and against the whole network's count."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from dance_seg.cost.macs import OperationCounter, count_macs
from dance_seg.early_exit.paths import PathCosts, Walked, path_costs
from dance_seg.early_exit.policy import ExitPolicy, at_every_exit, decide
from dance_seg.models.basisnet import BasisNet
from dance_seg.models.ranet import RANet
from tests.dance_seg.early_exit.toy import CLASSES, Toy

PIXELS = 8 * 12 // 4  # of the features, for images of 8 x 12
PARTS = (3 * 4 * 4 * PIXELS, 4 * 4 * PIXELS, 4 * 4 * PIXELS)
HEAD = 4 * CLASSES * PIXELS
RESIZE = 4 * CLASSES * 8 * 12


def test_costs_of_a_small_network_are_those_counted_by_hand():
    costs = path_costs(Toy(), (8, 12))

    assert costs.trunk == (PARTS[0] + RESIZE, sum(PARTS[:2]) + RESIZE, sum(PARTS) + RESIZE)
    assert costs.heads == (HEAD, HEAD, HEAD)


def test_the_full_way_costs_what_the_network_is_said_to_cost():
    for size in ((8, 12), (9, 11)):
        model = Toy(light=True)
        costs = path_costs(model, size)

        assert costs.full == costs.total(2, (False, False, True)) == count_macs(model, size).macs


def test_every_way_costs_what_runs_on_it():
    model = Toy(light=True)
    costs = path_costs(model, (10, 14))

    for exit in range(3):
        for before in ((False, False), (True, False), (False, True), (True, True)):
            asked = [*before[:exit], True, *([False] * (2 - exit))]
            # Heads of exits before this one run without resizing; Walked resizes the last logits alone.
            assert costs.total(exit, asked) == count_macs(Walked(model, exit, asked), (10, 14)).macs


def test_a_head_that_the_network_needs_counts_once_whether_asked_or_not():
    model = Toy(hand_over=True)
    costs = path_costs(model, (8, 12))
    second = 4 * (4 + CLASSES) * PIXELS

    assert costs.heads == (0, HEAD, HEAD)
    assert costs.cheapest == PARTS[0] + HEAD + RESIZE
    assert costs.total(1, (True, True, True)) == PARTS[0] + HEAD + second + HEAD + RESIZE
    assert costs.full == count_macs(model, (8, 12)).macs


def test_exits_that_are_not_asked_cost_nothing_and_the_last_always_counts():
    costs = PathCosts(trunk=(10, 30, 60), heads=(1, 2, 4))

    assert costs.total(0, (False, False, False)) == 11
    assert costs.total(1, (True, False, True)) == 33
    assert costs.total(2, (True, True, True)) == 67
    assert (costs.cheapest, costs.full) == (11, 64)


@pytest.mark.parametrize(
    "model",
    [
        partial(RANet, CLASSES, size="tiny"),
        partial(BasisNet, CLASSES, arch="fpn", encoder_name="resnet18", encoder_weights=None, bases=2),
    ],
    ids=["ranet", "basisnet"],
)
def test_a_batch_that_stops_early_executes_what_its_ways_are_said_to_cost(model):
    torch.manual_seed(0)
    network, images, size = model().eval(), torch.randn(4, 3, 64, 96), (64, 96)
    every = ExitPolicy(score="mean", thresholds=(0.0,) * (network.num_exits - 1))
    scores = at_every_exit(network, images, size).scores(every)
    policy = replace(every, thresholds=tuple(scores[:, :-1].median(dim=0).values.tolist()))
    costs = path_costs(network, size)

    with OperationCounter() as counter:
        decided = decide(network, images, size, policy)

    exits = decided.exits.tolist()
    assert len(set(exits)) > 1
    expected = sum(costs.total(exit, policy.asked) for exit in exits)
    # The logits may reach their full size outside the network, where nothing is counted.
    last = [count_macs(Walked(network, exit, policy.asked, to_full_size=False), size).macs for exit in exits]
    resized = sum(count_macs(Walked(network, exit, policy.asked), size).macs for exit in exits) - sum(last)
    assert expected - resized <= sum(counter.macs["forward"].values()) <= expected
    assert resized < 0.01 * expected


def test_counting_leaves_the_network_as_it_is():
    model = Toy(light=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    path_costs(model, (8, 12))

    assert model.training
    assert model.calls() == [0, 0, 0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
