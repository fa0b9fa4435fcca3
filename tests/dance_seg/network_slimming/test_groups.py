"""Groups that the trace found are tried on the network, and those it cannot lose channels of are named."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dance_seg.network_slimming.groups import find_groups
from dance_seg.network_slimming.trace import trace_groups
from tests.dance_seg.network_slimming.networks import NETWORKS, SIZE, Calls, block, conv, made_in, randomised, weights


class Remembers(nn.Module):
    """A network that needs the width of its middle, in a way that a test gives; its rest can be cut."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.middle, self.last = block(3, 4), conv(4, 6), conv(6, 2)
        self.function, self.channels = function, 6

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.function(self, self.middle(self.first(images))))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda net, x: x.view(len(x), net.channels, *SIZE), r"shape '\[2, 6, 8, 8\]' is invalid"),
        (lambda net, x: x.reshape(len(x), net.channels, -1).unflatten(2, (8, -1)), "reads|expected|mismatch|invalid"),
        (lambda net, x: x / x.shape[1], "it computes with the width as a number"),
        (lambda net, x: x * x.shape[1] ** -0.5, "it computes with the width as a number"),
    ],
)
def test_channels_whose_width_the_network_remembers_stay_and_the_others_can_be_cut(function, reason):
    model = Remembers(function)
    assert made_in(trace_groups(model, SIZE)) >= {"first.0", "middle"}  # the trace does not see it
    groups = find_groups(model, SIZE)
    assert made_in(groups) == {"first.0", "first.1"}
    (line,) = [line for line in groups.frozen if "remembers the width" in line]
    assert line.startswith("middle.weight: its network remembers the width: ")
    assert re.search(reason, line), line


def test_queries_and_keys_stay_where_attention_scales_by_their_width_and_values_can_be_cut():
    def forward(net: Any, images: Tensor) -> Tensor:
        heads = (part(images).flatten(2).transpose(1, 2) for part in (net.query, net.key, net.value))
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return net.head(mixed.transpose(1, 2).unflatten(2, SIZE))

    groups = find_groups(Calls(forward, query=conv(3, 8), key=conv(3, 8), value=conv(3, 6), head=conv(6, 2)), SIZE)
    assert made_in(groups) == {"value"}


def test_channels_on_which_the_size_of_the_output_depends_stay():
    def forward(net: Any, images: Tensor) -> Tensor:
        middle = net.middle(images)
        return nn.functional.interpolate(net.last(middle), size=(middle.shape[1], 8))

    groups = find_groups(Calls(forward, middle=nn.Sequential(conv(3, 4), conv(4, 6)), last=conv(6, 2)), SIZE)
    assert made_in(groups) == {"middle.0"}
    assert "middle.1.weight: its network remembers the width: its output becomes" in groups.frozen[-1]


def test_what_an_error_says_on_several_lines_is_told_in_one():
    def forward(net: Any, images: Tensor) -> Tensor:
        middle = net.middle(images)
        if middle.shape[1] != 4:
            raise RuntimeError("expected 4 channels\nhere\nand there")
        return net.last(middle)

    with pytest.raises(ValueError, match=r"remembers the width: expected 4 channels$"):
        find_groups(Calls(forward, middle=conv(3, 4), last=conv(4, 2)), SIZE)


def test_an_error_without_words_is_told_by_its_name():
    def forward(net: Any, images: Tensor) -> Tensor:
        middle = net.middle(images)
        if middle.shape[1] != 4:
            raise KeyError
        return net.last(middle)

    with pytest.raises(ValueError, match="remembers the width: KeyError"):
        find_groups(Calls(forward, middle=conv(3, 4), last=conv(4, 2)), SIZE)


def test_the_trace_is_all_there_is_where_no_width_is_remembered():
    for name, make in NETWORKS.items():
        model = make()
        traced, found = trace_groups(model, SIZE), find_groups(model, SIZE)
        assert [group.name for group in traced] == [group.name for group in found], name
        assert traced.frozen == found.frozen


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(conv(3, 2)), "the network's output keeps its classes"),
        (lambda: nn.Sequential(nn.ReLU()), "it has no convolution"),
        (lambda: nn.Sequential(conv(3, 4), nn.Sigmoid(), conv(4, 2)), "not zero when they are cut"),
        (lambda: Calls(lambda net, x: x * net.scale, scale=weights(3, 1, 1)), "keeps its classes|fixed size"),
    ],
)
def test_a_network_of_which_nothing_can_be_cut_is_refused_with_the_reasons(make, reason):
    with pytest.raises(ValueError, match=f"no channel of this network can be cut: .*({reason})"):
        find_groups(make(), SIZE)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = randomised(Remembers(lambda net, x: x.view(len(x), net.channels, *SIZE))).train(training)
    model(torch.randn(2, 3, *SIZE)).sum().backward()
    before = {name: (parameter, parameter.clone(), parameter.grad) for name, parameter in model.named_parameters()}
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    find_groups(model, SIZE)
    for name, parameter in model.named_parameters():
        same, values, gradient = before[name]
        assert parameter is same
        assert torch.equal(parameter, values)
        assert parameter.grad is gradient
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert model.training is training
    assert model.middle.out_channels == 6
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_group_knows_how_many_channels_it_has_and_how_many_positions_each_takes():
    groups = find_groups(nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), conv(8, 6), conv(6, 2)), SIZE)
    assert [(group.channels, group.unit) for group in groups] == [(4, 2), (6, 1)]
    assert len(groups) == 2
    assert all(isinstance(member.positions, np.ndarray) for group in groups for member in group.members)
