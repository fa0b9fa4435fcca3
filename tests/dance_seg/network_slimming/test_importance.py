"""Scores against arithmetic by hand and derivatives by differences; what is kept against counting."""

import numpy as np
import pytest
import torch
from torch import nn

from dance_seg.network_slimming.channels import Group, Member
from dance_seg.network_slimming.groups import find_groups
from dance_seg.network_slimming.importance import (
    absolute_sum,
    channels_to_keep,
    importance,
    norm_scales,
    per_mac,
    rounded_width,
    scales_of,
)
from tests.dance_seg.network_slimming.networks import NETWORKS, SIZE, Calls, block, conv, random_images, randomised


def rows(channels: int, each: int = 1) -> np.ndarray:
    """Channels that lie one after the other, each with so many positions."""
    return np.arange(channels * each).reshape(channels, each)


def group_of(channels: int, *, each: int = 1) -> Group:
    return Group("conv.weight", (Member("conv.weight", 0, rows(channels, each), False),))


def small() -> nn.Module:
    """Three channels, made by a convolution of two inputs, scaled by a norm, read by another convolution."""
    model = Calls(
        lambda net, x: net.last(net.norm(net.conv(x[:, :2]))), conv=conv(2, 3), norm=nn.BatchNorm2d(3), last=conv(3, 2)
    )
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.0, 0.0]])[..., None, None])
        model.conv.bias.copy_(torch.tensor([9.0, 9.0, 9.0]))
        model.norm.weight.copy_(torch.tensor([-0.5, 0.25, 2.0]))
    return model


def score(model: nn.Module, measure: str, number: int = 0, **options: int) -> np.ndarray:
    found = importance(model, find_groups(model, SIZE), measure, **options)[number]
    assert found is not None
    assert found.dtype == np.float64
    return found


# Measures ----------------------------------------------------------------------------------------------------------


def test_bn_scale_is_the_absolute_scale_of_the_norm():
    assert score(small(), "bn_scale").tolist() == [0.5, 0.25, 2.0]


def test_bn_scale_is_the_mean_over_all_norms_of_a_channel():
    model = Calls(
        lambda net, x: net.last(net.norm(net.conv(x)) + net.other(net.conv(x))),
        conv=conv(3, 2),
        norm=nn.BatchNorm2d(2),
        other=nn.BatchNorm2d(2),
        last=conv(2, 2),
    )
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -3.0]))
        model.other.weight.copy_(torch.tensor([5.0, 0.0]))
    assert score(model, "bn_scale").tolist() == [3.0, 1.5]


def test_bn_scale_is_the_mean_over_the_positions_of_a_channel():
    model = nn.Sequential(conv(3, 6), nn.GroupNorm(3, 6), conv(6, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -3.0, 0.5, 0.5, 0.0, 8.0]))
    assert score(model, "bn_scale").tolist() == [2.0, 0.5, 4.0]


def test_bn_scale_says_nothing_of_channels_without_a_norm():
    scores = importance(
        model := nn.Sequential(block(3, 4), conv(4, 6), conv(6, 2)), find_groups(model, SIZE), "bn_scale"
    )
    assert scores[0] is not None
    assert scores[1] is None


def test_magnitude_is_the_root_mean_square_of_what_makes_a_channel_over_that_of_its_group():
    # squares (1 + 4) / 2, (9 + 16) / 2 and 0, whose mean is 5; biases and norms do not count
    assert score(small(), "magnitude") == pytest.approx(np.sqrt([2.5 / 5, 12.5 / 5, 0.0]))


def test_magnitude_is_equal_for_layers_that_differ_only_in_scale():
    model, larger = small(), small()
    with torch.no_grad():
        larger.conv.weight.mul_(100)
    assert score(larger, "magnitude") == pytest.approx(score(model, "magnitude"))


def test_magnitude_joins_all_layers_that_make_a_channel():
    model = Calls(lambda net, x: net.last(net.one(x) + net.two(x)), one=conv(3, 2), two=conv(3, 2), last=conv(2, 2))
    with torch.no_grad():
        model.one.weight.copy_(torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 3, 1, 1))
        model.two.weight.copy_(torch.tensor([3.0, 0.0])[:, None, None, None].expand(2, 3, 1, 1))
    # mean squares (1 + 9) / 2 and (4 + 0) / 2, over 3.5
    assert score(model, "magnitude") == pytest.approx(np.sqrt([5 / 3.5, 2 / 3.5]))


def test_magnitude_of_weights_that_are_all_zero_is_zero():
    model = nn.Sequential(conv(3, 4), conv(4, 2))
    nn.init.zeros_(model[0].weight)
    assert score(model, "magnitude").tolist() == [0.0] * 4


def test_taylor_is_the_absolute_sum_of_weight_times_gradient_over_what_makes_a_channel():
    model = small()
    gradients = {
        "conv.weight": [[2.0, 1.0], [1.0, 1.0], [5.0, 5.0]],  # 2 + 2, 3 - 4, 0
        "conv.bias": [1.0, 0.0, -1.0],  # 9, 0, -9
        "norm.weight": [2.0, 4.0, 1.0],  # -1, 1, 2
        "norm.bias": [7.0, 7.0, 7.0],  # the bias is zero
    }
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 100.0)  # of what only reads, which does not count
        if name in gradients:
            parameter.grad = torch.tensor(gradients[name]).reshape(parameter.shape)
    assert score(model, "taylor").tolist() == [abs(4 + 9 - 1), abs(-1 + 0 + 1), abs(0 - 9 + 2)]


def test_taylor_over_passes_is_their_root_mean_square_where_a_sum_would_cancel():
    model = small()
    groups = find_groups(model, SIZE)

    def passes():
        for gradient in ([2.0, 1.0, 0.0], [-2.0, 1.0, 0.0]):  # times -0.5, 0.25 and 2
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            model.norm.weight.grad = torch.tensor(gradient)
            yield

    (scores,) = importance(model, groups, "taylor", passes=passes())
    assert scores.tolist() == [1.0, 0.25, 0.0]
    model.norm.weight.grad = torch.tensor([0.0, 2.0, 0.0])  # the sum of both
    assert score(model, "taylor").tolist() == [0.0, 0.5, 0.0]


def test_taylor_without_any_pass_says_nothing():
    with pytest.raises(ValueError, match="importance is taylor"):
        importance(model := small(), find_groups(model, SIZE), "taylor", passes=[])


def test_per_mac_divides_by_what_one_channel_costs():
    """At SIZE each number of the first two weights is used on all positions, of the last two on a quarter of them."""
    model = nn.Sequential(conv(3, 8), conv(8, 4), nn.AvgPool2d(2), conv(4, 16), conv(16, 2))
    groups = find_groups(model, SIZE)
    assert [group.channels for group in groups] == [8, 4, 16]
    pixels, kernel = SIZE[0] * SIZE[1], model[0].kernel_size[0] ** 2
    ones = [np.ones(8), None, np.full(16, 6.0)]
    first, second, third = per_mac(model, groups, ones, SIZE)
    assert second is None
    assert first == pytest.approx(np.full(8, 1 / (pixels * kernel * (3 + 4))))
    assert third == pytest.approx(np.full(16, 6 / (pixels / 4 * kernel * (4 + 2))))


@pytest.mark.parametrize("name", ["residual", "squeeze_excite", "grouped", "depthwise_multiplier"])
def test_taylor_is_how_fast_the_loss_changes_when_all_that_makes_a_channel_is_scaled(name):
    model = randomised(NETWORKS[name]()).double()
    images = random_images().double()
    groups = find_groups(model.float(), SIZE)
    model.double()

    def loss() -> torch.Tensor:
        return model(images).tanh().mean()

    loss().backward()
    scores = importance(model, groups, "taylor")
    parameters = dict(model.named_parameters())
    step = 1e-5
    for group, found in zip(groups, scores, strict=True):
        for channel in range(min(3, group.channels)):
            values = []
            for factor in (1 + step, (1 - step) / (1 + step), 1 / (1 - step)):
                with torch.no_grad():
                    for member in group.members:
                        if not member.reads and member.tensor in parameters:
                            index = (slice(None),) * member.dim + (member.positions[channel],)
                            parameters[member.tensor][index] *= factor
                    values.append(loss().item())
            assert found[channel] == pytest.approx(abs(values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)


def test_random_scores_come_from_the_seed_and_the_place_of_the_group():
    model = nn.Sequential(conv(3, 16), conv(16, 16), conv(16, 2))
    groups = find_groups(model, SIZE)
    one, again, other = (importance(model, groups, "random", seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not np.array_equal(one[0], one[1])
    nn.init.zeros_(model[0].weight)
    assert np.array_equal(importance(model, groups, "random", seed=0)[0], one[0])


def test_bn_scale_without_any_norm_is_refused_with_the_next_step():
    model = nn.Sequential(conv(3, 8), conv(8, 2))
    with pytest.raises(
        ValueError, match="importance is bn_scale: no group has a batch or group norm; choose magnitude"
    ):
        importance(model, find_groups(model, SIZE), "bn_scale")


def test_taylor_without_gradients_is_refused_with_the_next_step():
    model = small()
    with pytest.raises(
        ValueError, match="importance is taylor: no parameter has a gradient; run a backward pass first"
    ):
        importance(model, find_groups(model, SIZE), "taylor")


def test_channels_that_only_buffers_make_are_not_scored():
    fixed = Calls(
        lambda net, x: net.last(nn.functional.conv2d(x, net.kernel)), kernel=torch.ones(8, 3, 1, 1), last=conv(8, 2)
    )
    for measure in ("magnitude", "taylor", "bn_scale"):
        with pytest.raises(ValueError, match=f"importance is {measure}"):
            importance(fixed, find_groups(fixed, SIZE), measure)


# Scales ------------------------------------------------------------------------------------------------------------


def test_the_scales_of_all_norms_that_learn_are_found():
    model = nn.ModuleDict(
        {
            "batch": nn.BatchNorm2d(4),
            "group": nn.GroupNorm(2, 4),
            "fixed": nn.BatchNorm2d(4, affine=False),
            "layer": nn.LayerNorm(4),
        }
    )
    assert norm_scales(model) == {"batch.weight", "group.weight"}
    assert norm_scales(nn.BatchNorm2d(4)) == {"weight"}


def test_a_penalty_acts_on_the_scales_of_channels_that_can_be_cut_and_no_others():
    model = nn.Sequential(block(3, 8), block(8, 6), conv(6, 2), nn.BatchNorm2d(2))
    groups = find_groups(model, SIZE)
    found = scales_of(model, groups)
    assert {id(scale) for scale in found} == {id(model[0][1].weight), id(model[1][1].weight)}
    assert scales_of(model, groups.groups[:1])[0] is model[0][1].weight


def test_the_penalty_is_the_sum_of_absolute_scales_and_pulls_each_at_the_same_rate():
    scales = [nn.Parameter(torch.tensor([1.5, -2.0])), nn.Parameter(torch.tensor([0.0, 0.25]))]
    penalty = absolute_sum(scales)
    assert penalty.item() == 3.75
    penalty.backward()
    assert scales[0].grad.tolist() == [1.0, -1.0]
    assert scales[1].grad.tolist() == [0.0, 1.0]
    assert absolute_sum([]) == 0.0


# What is kept ------------------------------------------------------------------------------------------------------

WEAK, STRONG = np.array([0.3, 0.1, 0.4, 0.2]), np.array([0.5, 0.8, 0.6, 0.7])


def keep(scores: list, fraction: float, *, each: int = 1, **options: object) -> list[list[int]]:
    groups = [group_of(len(one) if one is not None else 4, each=each) for one in scores]
    given = {"minimum": 1, "round_to": 1, **options}
    return [stay.tolist() for stay in channels_to_keep(groups, scores, fraction, **given)]


def test_one_ranking_over_the_network_lets_weak_groups_lose_more():
    assert keep([WEAK, STRONG], 0.5) == [[2], [0, 1, 2, 3]]  # the weak one keeps its best, by the minimum
    assert keep([WEAK, STRONG], 0.75) == [[0, 2], [0, 1, 2, 3]]


def test_a_ranking_in_each_group_takes_the_same_fraction_of_each():
    assert keep([WEAK, STRONG], 0.5, scope="group") == [[0, 2], [1, 3]]
    assert keep([WEAK, STRONG], 0.25, scope="group") == [[2], [1]]


@pytest.mark.parametrize("scope", ["global", "group"])
def test_all_is_kept_at_one_and_the_minimum_at_zero(scope):
    assert keep([WEAK, STRONG], 1.0, scope=scope) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert keep([WEAK, STRONG], 0.0, scope=scope, minimum=2) == [[0, 2], [1, 3]]
    assert keep([WEAK, STRONG], 0.0, scope=scope, minimum=9) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_of_equal_scores_the_first_are_kept():
    assert keep([np.ones(100)], 0.5, scope="group") == [list(range(50))]
    assert keep([np.arange(100) % 2], 0.25, scope="group") == [list(range(1, 50, 2))]


def test_of_equal_scores_in_several_groups_each_gives_up_the_same_share():
    halves = keep([np.ones(4), np.ones(8)], 0.5)
    assert halves == [[0, 1], [0, 1, 2, 3]]
    assert [len(stay) for stay in keep([np.ones(4), np.ones(8)], 0.25)] == [1, 2]
    # those above and below the equal ones are taken first and last, whatever their place
    assert keep([np.array([1.0, 1.0, 2.0, 1.0]), np.array([1.0, 0.0, 1.0, 1.0])], 0.5) == [[0, 2], [0, 2]]


def test_groups_without_a_score_stay_whole_and_do_not_count():
    assert keep([None, WEAK], 0.5) == [[0, 1, 2, 3], [0, 2]]
    assert keep([None, WEAK], 0.5, scope="group") == [[0, 1, 2, 3], [0, 2]]
    assert keep([None], 0.5) == [[0, 1, 2, 3]]


def test_widths_are_multiples_in_positions_and_never_below_the_minimum():
    scores = np.arange(32.0)
    assert len(keep([scores], 0.4, round_to=8)[0]) == 16  # 13 of 32 are nearer to 16 than to 8
    assert len(keep([scores], 0.36, round_to=8)[0]) == 16
    assert len(keep([scores], 0.34, round_to=8)[0]) == 8
    assert len(keep([scores], 0.0, round_to=8, minimum=12)[0]) == 12
    # channels of four positions: two make eight, and eight positions are at least two
    assert len(keep([np.arange(8.0)], 0.5, each=4, round_to=8, scope="group")[0]) == 4
    assert len(keep([np.arange(8.0)], 0.375, each=4, round_to=8, scope="group")[0]) == 4
    assert len(keep([np.arange(8.0)], 0.0, each=4, round_to=8, minimum=8)[0]) == 2


def test_rounded_widths_are_the_nearest_multiples_within_what_is_allowed():
    for channels in (5, 24, 63):
        for unit in (1, 3, 4, 16):
            for round_to in (1, 8, 16):
                for wanted in np.linspace(0, channels, 23):
                    count = rounded_width(float(wanted), channels, unit, minimum=8, round_to=round_to)
                    least = -(-8 // unit)
                    multiples = [n for n in range(channels + round_to + 1) if n * unit % round_to == 0]
                    nearest = min(multiples, key=lambda n, wanted=wanted: (abs(n - wanted), -n))
                    assert count == min(channels, max(nearest, least))
