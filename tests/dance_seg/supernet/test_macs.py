"""The MACs of networks by formula are those that counting what runs gives."""

import numpy as np
import pytest
import torch
from torch import nn

from dance_seg.cost.macs import OperationCounter, count_macs, forward_and_backward, usual_kernels, without_values
from dance_seg.early_exit.paths import path_costs
from dance_seg.models.multi_stage import MultiStageSupernet
from dance_seg.models.vit_resnas import VitResNas
from dance_seg.supernet.elastic import activated
from dance_seg.supernet.macs import SubnetMacs

MODELS = {
    "multi_stage": lambda: MultiStageSupernet(5, "tiny"),
    "vit_resnas": lambda: VitResNas(5, "tiny"),
    "vit_resnas by windows": lambda: VitResNas(5, "tiny", attention="window"),
    "vit_resnas, stride 4": lambda: VitResNas(5, "tiny", stride=4),
}


def drawn(model, count):
    random = np.random.default_rng(0)
    return [model.space.smallest, *(model.space.sample(random) for _ in range(count))]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=() if name in ("multi_stage", "vit_resnas") else pytest.mark.slow)
        for name, make in MODELS.items()
    ],
)
def test_a_network_on_its_own_costs_what_counting_says(make):
    model = make()
    macs = SubnetMacs(model)
    for subnet in drawn(model, 2):
        assert macs.inference(subnet, (90, 128)) == count_macs(model.extract(subnet), (90, 128)).macs


@pytest.mark.slow  # what a search says of a network that stops early is held to the counter in tests of tools.search
def test_the_ways_through_a_network_cost_what_counting_says():
    model = MultiStageSupernet(5, "tiny")
    macs = SubnetMacs(model)
    for subnet in drawn(model, 1):
        assert macs.paths(subnet, (64, 128)) == path_costs(model.extract(subnet), (64, 128))
    with pytest.raises(ValueError, match="has one exit"):
        SubnetMacs(VitResNas(5)).paths(VitResNas(5).space.largest, (64, 64))


def counted_step(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    counter = OperationCounter()
    with usual_kernels():  # whatever a test before this one asked of torch
        forward_and_backward(without_values(model), torch.empty(shape, device="meta"), counter)
    return counter.macs["forward"].total(), counter.macs["backward"].total()


@pytest.mark.parametrize("name", ["multi_stage", "vit_resnas"])
def test_a_step_of_a_network_costs_what_counting_says(name):
    """Smaller kernels are made once for all images, so a batch of 3 tells them from what each image costs."""
    model = MODELS[name]()
    macs = SubnetMacs(model)
    for subnet in drawn(model, 2):
        found = macs.training(subnet, (64, 64), images=3)
        with activated(model, subnet):
            assert found == counted_step(model, (3, 3, 64, 64))
