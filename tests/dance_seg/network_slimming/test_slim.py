"""A cut as a whole: how far it goes, what follows it, and what is refused before training."""

import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dance_seg.network_slimming.slim  # noqa: F401  # the package's `slim` is the function
from dance_seg.network_slimming import NetworkSlimming, find_groups, slim
from dance_seg.network_slimming.branches import Absent
from dance_seg.network_slimming.slim import Size, check_reachable, size_of, slimmable
from tests.dance_seg.network_slimming.networks import SIZE, block, conv, random_images, randomised

SLIM = sys.modules["dance_seg.network_slimming.slim"]


def make() -> nn.Module:
    """An encoder of three layers and a decoder of two."""
    encoder = nn.Sequential(block(3, 16), block(16, 32), block(32, 24))
    return randomised(nn.Sequential(encoder, nn.Sequential(block(24, 16), conv(16, 2))))


def options(**changed: object) -> NetworkSlimming:
    return NetworkSlimming(**{"min_channels": 1, "round_to": 1, **changed})


def macs(model: nn.Module) -> int:
    """By torch's own counter, which counts two operations for each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deepcopy(model).eval()(random_images()[:1])
    return counter.get_total_flops() // 2


def channels(model: nn.Module) -> int:
    return sum(group.channels for group in find_groups(model, SIZE))


def widths(model: nn.Module) -> list[int]:
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


# How far -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("measure", ["bn_scale", "magnitude", "random"])
@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_the_share_of_macs_is_reached_from_below_and_closely(keep, measure, scope):
    model = make()
    full = macs(model)
    slim(model, options(keep=keep, importance=measure, scope=scope), input_size=SIZE)
    assert keep - 0.04 < macs(model) / full <= keep


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_the_share_of_channels_is_reached_from_below_and_closely(keep, scope):
    model = make()
    slim(model, options(keep=keep, of="channels", scope=scope), input_size=SIZE)
    assert keep - 3 / 88 < channels(model) / 88 <= keep  # 16 + 32 + 24 + 16 = 88 channels


def test_the_share_of_a_latency_is_that_of_the_clock(monkeypatch):
    """A clock of ten milliseconds and one more for a thousand MACs, so half the time is less than half the MACs."""

    def clock(model: nn.Module, input_size: tuple[int, int], **_: object) -> SimpleNamespace:
        return SimpleNamespace(p50_ms=10 + macs(model) / 1000)

    monkeypatch.setattr(SLIM, "measure_latency", clock)
    model = make()
    wanted = options(keep=0.5, of="latency")
    full = size_of(model, wanted, SIZE)
    assert full.latency_ms == 10 + macs(model) / 1000
    slim(model, wanted, input_size=SIZE)
    assert 0.46 < (10 + macs(model) / 1000) / full.latency_ms <= 0.5
    check_reachable(make(), options(keep=0.01, of="latency"), SIZE)  # known only once it is measured


def test_widths_are_multiples_and_no_less_than_the_minimum():
    model = make()
    slim(model, NetworkSlimming(keep=0.3, min_channels=4, round_to=4), input_size=SIZE)
    assert all(width % 4 == 0 for width in widths(model)[:-1])
    narrow = make()
    slim(narrow, NetworkSlimming(keep=0.3, min_channels=13, round_to=1, scope="global"), input_size=SIZE)
    assert min(widths(narrow)[:-1]) >= 13


def test_a_share_given_counts_and_not_the_one_of_the_options():
    model = make()
    full = macs(model)
    slim(model, options(keep=0.2), input_size=SIZE, share=0.6)
    assert 0.56 < macs(model) / full <= 0.6


def test_shares_are_of_the_full_network_where_its_size_is_given():
    model = make()
    full = size_of(model, options(), SIZE)
    assert full == Size(channels=88, macs=macs(model), latency_ms=None)
    for share in (0.8, 0.5):
        slim(model, options(), input_size=SIZE, share=share, full=full)
        assert share - 0.04 < macs(model) / full.macs <= share
    slim(model, options(), input_size=SIZE, share=0.5)
    assert macs(model) / full.macs <= 0.25


def test_slimming_again_to_the_same_share_changes_nothing():
    model = make()
    wanted = NetworkSlimming(keep=0.5, min_channels=1, round_to=8)
    full = size_of(model, wanted, SIZE)
    slim(model, wanted, input_size=SIZE, full=full)
    before = list(model.parameters())
    groups, kept = slim(model, wanted, input_size=SIZE, full=full)
    assert [stay.tolist() for stay in kept] == [list(range(group.channels)) for group in groups]
    assert all(mine is its for mine, its in zip(before, model.parameters(), strict=True))


def test_nothing_is_cut_to_the_whole():
    model = make()
    slim(model, NetworkSlimming(keep=1.0, round_to=64), input_size=SIZE)
    assert widths(model) == [16, 32, 24, 16, 2]


# Which channels ----------------------------------------------------------------------------------------------------


def test_the_channels_with_the_largest_scales_stay():
    model = make()
    norm = model[0][1][1]
    strong = torch.arange(32) % 4 == 1
    for other in model.modules():
        if isinstance(other, nn.BatchNorm2d):
            nn.init.constant_(other.weight, 1.0)
    norm.weight.data = torch.where(strong, 1.0, 0.01)
    groups, kept = slim(model, options(keep=0.25, of="channels", scope="group"), input_size=SIZE)
    (stay,) = [stay for group, stay in zip(groups, kept, strict=True) if group.name == "0.1.0.weight"]
    assert stay.tolist() == np.flatnonzero(strong.numpy()).tolist()
    assert model[0][1][1].weight.tolist() == [1.0] * 8


def test_taylor_takes_the_gradients_that_are_there():
    model = make()
    with pytest.raises(ValueError, match="importance is taylor"):
        slim(model, options(importance="taylor"), input_size=SIZE)
    model(random_images()).square().mean().backward()
    slim(model, options(importance="taylor"), input_size=SIZE)
    assert widths(model) != [16, 32, 24, 16, 2]


def test_taylor_takes_one_pass_after_another_where_they_are_given():
    model, images, made = make().eval(), random_images(), []

    def passes():
        for image in images:
            model.zero_grad()
            model(image[None]).square().mean().backward()
            made.append(image)
            yield

    slim(model, options(importance="taylor"), input_size=SIZE, passes=passes)
    assert len(made) == len(images)
    assert widths(model) != [16, 32, 24, 16, 2]


def test_per_mac_cuts_what_is_dear_where_importance_alone_cuts_what_is_cheap():
    """The later half matters a little less and works at a sixteenth of the positions."""
    left = []
    for per_mac in (False, True):
        model = nn.Sequential(block(3, 16), block(16, 16), nn.AvgPool2d(4), block(16, 16), block(16, 16), conv(16, 2))
        for layer, scale in ((0, 1.0), (1, 1.0), (3, 0.9), (4, 0.9)):
            nn.init.constant_(model[layer][1].weight, scale)
        slim(model, options(keep=0.5, importance="bn_scale", per_mac=per_mac), input_size=SIZE)
        left.append(widths(model))
    assert left[0][2:4] == [1, 1]
    assert left[1][2:4] == [16, 16]
    assert sum(left[1]) > sum(left[0])


def test_a_ranking_within_groups_has_no_use_for_costs():
    with pytest.raises(ValueError, match=r"per_mac is true and network_slimming\.scope is group"):
        options(scope="group", per_mac=True)


def test_the_random_control_is_drawn_from_the_seed():
    def kept(seed: int, measure: str = "random") -> list[list[int]]:
        _, stay = slim(make(), options(importance=measure), input_size=SIZE, seed=seed)
        return [one.tolist() for one in stay]

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)
    assert kept(0, "magnitude") == kept(1, "magnitude")
    assert kept(0) != kept(0, "magnitude")


def test_only_limits_the_cuts_to_modules_with_that_in_their_name():
    model = make()
    groups, _ = slim(model, options(keep=0.9, only=("0.1.", "1.0.")), input_size=SIZE)
    assert [group.name for group in groups] == ["0.1.0.weight", "1.0.0.weight"]
    first, second, third, fourth, last = widths(model)
    assert (first, third, last) == (16, 24, 2)
    assert second + fourth < 32 + 16


def test_only_of_modules_that_make_nothing_that_can_be_cut_lists_those_that_do():
    with pytest.raises(
        ValueError, match=r"only \['aspp'\]: no channels .* made in: 0\.0\.0, 0\.1\.0, 0\.2\.0, 1\.0\.0$"
    ):
        slimmable(make(), options(only=("aspp",)), SIZE)
    many = nn.Sequential(*(conv(3 if number == 0 else 8, 8) for number in range(25)))
    with pytest.raises(ValueError, match=r"made in: 0, 1, 10, 11, .* \.\.\.$"):
        slimmable(many, options(only=("aspp",)), SIZE)


# What follows ------------------------------------------------------------------------------------------------------


def test_followers_lose_the_same_channels():
    model = make()
    average = deepcopy(model)
    for parameter in average.parameters():
        parameter.data.mul_(-3).add_(1)  # with other values, which would be ranked otherwise
        parameter.requires_grad_(False)
    whole = deepcopy(average)
    groups, kept = slim(model, options(keep=0.4), input_size=SIZE, followers=iter([average]))
    assert widths(average) == widths(model)
    for group, stay in zip(groups, kept, strict=True):
        norm = group.name.replace(".0.weight", ".1.weight")
        assert torch.equal(average.state_dict()[norm], whole.state_dict()[norm][stay])
    assert not any(parameter.requires_grad for parameter in average.parameters())
    average(random_images())


def test_optimisers_hold_the_parameters_of_the_model_and_step_on():
    model = make().train()
    average = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(random_images()).square().mean().backward()
    optimizer.step()
    slim(model, options(keep=0.4), input_size=SIZE, optimizers=[optimizer], followers=[average])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    model.zero_grad()
    model(random_images()).square().mean().backward()
    optimizer.step()


class Levels(nn.Module):
    """Three branches that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.levels = nn.ModuleList([block(16, 16, 1), block(16, 16, 3), block(16, 16, 5)])
        self.levels.multi_scale = True
        self.last = conv(48, 2)
        for level, scale in zip(self.levels, (1.0, 0.05, 0.9), strict=True):
            nn.init.constant_(level[1].weight, scale)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        return self.last(torch.cat([level(features) for level in self.levels], 1))


def test_a_weak_branch_goes_from_the_model_its_followers_and_the_optimiser():
    model = Levels()
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    model(random_images()).sum().backward()
    optimizer.step()
    full = macs(model)
    slim(model, options(keep=0.2, branches=0.5), input_size=SIZE, optimizers=[optimizer], followers=[average])
    assert 0.15 < macs(model) / full <= 0.2  # the branch is gone, and then channels of the others
    assert model.last.in_channels < 16 + 1 + 16
    for network in (model, average):
        assert [isinstance(level, Absent) for level in network.levels] == [False, True, False]
    assert list(model.state_dict()) == list(average.state_dict())
    assert [tensor.shape for tensor in model.state_dict().values()] == [t.shape for t in average.state_dict().values()]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert len(optimizer.state) == len(list(model.parameters()))
    kept = Levels()
    slim(kept, options(keep=0.2), input_size=SIZE)
    assert not any(isinstance(level, Absent) for level in kept.levels)


def test_branches_of_a_network_without_any_are_no_error():
    slim(make(), options(branches=0.5), input_size=SIZE)


def test_ranks_that_would_differ_stop_the_run(monkeypatch):
    def gather(value: object) -> list[object]:
        return [value, "another structure"] if isinstance(value, str) else [value, value]

    monkeypatch.setattr(SLIM, "gather", gather)
    with pytest.raises(RuntimeError, match=r"the ranks have cut different channels: \[.*'another structure'\]"):
        slim(make(), options(), input_size=SIZE)


# Before training ---------------------------------------------------------------------------------------------------


# Widths of 8 instead of 16, 32, 24 and 16: what is left of 9 x (3 x 16 + 16 x 32 + 32 x 24 + 24 x 16) + 16 x 2 MACs.
LEAST = {"macs": (9 * (3 * 8 + 3 * 8 * 8) + 8 * 2) / (9 * (48 + 512 + 768 + 384) + 32), "channels": 32 / 88}


@pytest.mark.parametrize("of", LEAST)
def test_a_share_that_cannot_be_reached_is_refused_with_what_stays(of):
    def wanted(keep: float) -> NetworkSlimming:
        return NetworkSlimming(keep=keep, of=of, min_channels=8, round_to=8)

    model = make()
    check_reachable(model, wanted(LEAST[of] + 1e-6), SIZE)
    for keep in (0.05, LEAST[of] - 1e-6):
        with pytest.raises(ValueError, match=f"network_slimming.keep is {keep} of {of}: this network can") as caught:
            check_reachable(model, wanted(keep), SIZE)
    least = f"can be cut to {LEAST[of]:.2f} and no further with min_channels 8 and round_to 8"
    for part in (least, "0.0.0: reads channels", "Raise keep, lower min_channels, or choose another model"):
        assert part in str(caught.value)
    assert widths(model) == [16, 32, 24, 16, 2]


def test_a_network_without_norms_is_refused_before_training_where_their_scales_are_to_be_ranked():
    model = nn.Sequential(conv(3, 16), conv(16, 2))
    with pytest.raises(ValueError, match="importance is bn_scale"):
        check_reachable(model, options(), SIZE)
    for measure in ("magnitude", "taylor", "random"):
        check_reachable(model, options(importance=measure), SIZE)


def test_a_network_of_which_nothing_can_be_cut_is_refused():
    model = nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 2))
    for function in (check_reachable, size_of, slimmable):
        with pytest.raises(ValueError, match="no channel of this network can be cut"):
            function(model, options(), SIZE)
    with pytest.raises(ValueError, match="no channel of this network can be cut"):
        slim(model, options(), input_size=SIZE)
