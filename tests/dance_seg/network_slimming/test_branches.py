"""A branch that is replaced by zeros leaves the network computing what it would with that branch silenced."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dance_seg.cost.macs import count_macs
from dance_seg.models.smp import SmpModel
from dance_seg.network_slimming.branches import Absent, find_branches, put_absent, remove_branch, weak_branches
from dance_seg.network_slimming.groups import find_groups
from dance_seg.network_slimming.importance import importance
from tests.dance_seg.network_slimming.networks import block, conv, random_images, randomised

IMAGES = (64, 64)
OPTIONS: dict[str, dict[str, Any]] = {
    "deeplabv3": {"decoder_channels": 16},
    "deeplabv3plus": {"decoder_channels": 16},
    "pspnet": {"psp_out_channels": 32},
    "fpn": {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 64},
    "upernet": {"decoder_channels": 16},
}
REMOVED = {
    "deeplabv3": "network.decoder.aspp.convs.1",  # a rate
    "deeplabv3plus": "network.decoder.aspp.0.convs.4",  # the pooled image
    "pspnet": "network.decoder.psp.blocks.1",  # a bin
    "fpn": "network.decoder.seg_blocks.1",  # a level, added to the others
    "upernet": "network.decoder.fpn_conv_blocks.2",  # the finest level, joined to the others
}


@pytest.fixture(scope="module")
def smp_models() -> dict[str, nn.Module]:
    return {
        arch: randomised(SmpModel(arch=arch, encoder_name="resnet18", num_classes=3, **options))
        for arch, options in OPTIONS.items()
    }


class Pyramid(nn.Module):
    """A user's own module: three branches, joined or added; one more convolution feeds the last of them alone."""

    def __init__(self, joined: bool, multi_scale: bool = True) -> None:
        super().__init__()
        self.joined = joined
        self.stem, self.before = block(3, 8), block(8, 8, 1)
        self.levels = nn.ModuleList([block(8, 16, 1), block(8, 16, 3), block(8, 16, 5)])
        if multi_scale:
            self.levels.multi_scale = True
        self.idle = conv(8, 2)  # runs only in training
        self.last = conv(48 if joined else 16, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        one, two, three = self.levels
        parts = [one(features), two(features), three(self.before(features))]
        made = self.last(torch.cat(parts, 1) if self.joined else parts[0] + parts[1] + parts[2])
        return made + self.idle(features) if self.training else made


@pytest.fixture(scope="module")
def smp_models_cut(smp_models) -> dict[str, nn.Module]:
    return {arch: without(model, REMOVED[arch]) for arch, model in smp_models.items()}


def silenced(model: nn.Module, path: str) -> nn.Module:
    """A copy in which the branch gives zeros."""
    copied = deepcopy(model)
    copied.get_submodule(path).register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    return copied


def without(model: nn.Module, path: str, **options: Any) -> nn.Module:
    copied = deepcopy(model)
    remove_branch(copied, path, find_groups(copied, IMAGES), IMAGES, **options)
    return copied


def assert_equal_output(one: nn.Module, two: nn.Module, size: tuple[int, int]) -> None:
    images = random_images(1, size)
    with torch.no_grad():
        first, second = one(images), two(images)
    assert ((first - second).abs().max() / second.abs().max()).item() <= 1e-5


# Finding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "modules", "branches"),
    [("deeplabv3", 1, 5), ("deeplabv3plus", 1, 5), ("pspnet", 1, 4), ("fpn", 1, 4), ("upernet", 2, 7)],
)
def test_the_branches_of_multi_scale_modules_are_found(smp_models, arch, modules, branches):
    found = find_branches(smp_models[arch])
    assert len(found) == modules
    assert sum(map(len, found)) == branches
    assert any(REMOVED[arch] in siblings for siblings in found)


def test_a_users_own_module_says_which_of_its_lists_holds_branches():
    assert find_branches(Pyramid(joined=True)) == [["levels.0", "levels.1", "levels.2"]]
    assert find_branches(nn.Sequential(Pyramid(joined=True))) == [["0.levels.0", "0.levels.1", "0.levels.2"]]
    assert find_branches(Pyramid(joined=True, multi_scale=False)) == []


# Removing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", REMOVED)
def test_a_removed_branch_of_an_smp_model_is_worth_zeros_and_costs_nothing(smp_models, smp_models_cut, arch):
    model, cut, path = smp_models[arch], smp_models_cut[arch], REMOVED[arch]
    expected = silenced(model, path)
    assert_equal_output(cut, expected, IMAGES)
    assert_equal_output(cut, expected, (128, 96))  # zeros have the size of the images at hand
    assert isinstance(cut.get_submodule(path), Absent)
    assert not list(cut.get_submodule(path).parameters())
    assert count_macs(cut, IMAGES).macs < count_macs(model, IMAGES).macs
    with torch.no_grad():
        assert not torch.allclose(model(random_images(1, IMAGES)), cut(random_images(1, IMAGES)), rtol=1e-3)


def test_what_fed_only_a_removed_level_goes_with_it(smp_models_cut):
    cut = smp_models_cut["upernet"]
    absent = {path for path, module in cut.named_modules() if isinstance(module, Absent)}
    # the finest level has a lateral block and a norm of the encoder's features of its own
    decoder = "network.decoder."
    assert f"{decoder}fpn_lateral_blocks.2" in absent
    coarser = {f"{decoder}fpn_lateral_blocks.{level}" for level in (0, 1)}
    assert not coarser & absent
    assert not any(name.startswith(f"{decoder}fpn_lateral_blocks.2.") for name in cut.state_dict())


def test_a_level_that_feeds_the_next_one_leaves_what_it_was_made_of(smp_models):
    cut = without(smp_models["upernet"], "network.decoder.fpn_conv_blocks.0")
    assert {path for path, module in cut.named_modules() if isinstance(module, Absent)} == {
        "network.decoder.fpn_conv_blocks.0"
    }


@pytest.mark.parametrize("joined", [True, False])
def test_a_users_own_branch_goes_with_what_fed_it_and_nothing_else(joined):
    model = randomised(Pyramid(joined))
    cut = without(model, "levels.2")
    assert_equal_output(cut, silenced(model, "levels.2"), IMAGES)
    assert_equal_output(cut, silenced(model, "levels.2"), (24, 40))
    assert {path for path, module in cut.named_modules() if isinstance(module, Absent)} == {"levels.2", "before"}
    assert cut.idle.out_channels == 2  # it does not run here, and stays


def test_what_reads_a_branch_keeps_the_minimum_of_its_channels_where_branches_are_joined():
    model = randomised(Pyramid(joined=True))
    assert without(model, "levels.1").last.in_channels == 16 + 8 + 16
    cut = without(model, "levels.1", minimum=3)
    assert cut.last.in_channels == 16 + 3 + 16
    assert cut.levels[1].channels == 3
    assert torch.equal(cut.last.weight[:, :16], model.last.weight[:, :16])
    assert torch.equal(cut.last.weight[:, 19:], model.last.weight[:, 32:])
    assert without(model, "levels.1", minimum=99).last.in_channels == 48
    assert without(randomised(Pyramid(joined=False)), "levels.1", minimum=3).last.in_channels == 16


def test_a_branch_that_pools_to_a_fixed_size_does_so_for_images_of_any_size():
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(4), block(3, 8, 1)) for _ in range(2)])
            self.levels.multi_scale = True
            self.last = conv(16, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(torch.cat([level(images) for level in self.levels], 1))

    model = randomised(Pools())
    cut = without(model, "levels.0")
    assert cut.levels[0].record() == [8, None, [4, 4]]
    assert_equal_output(cut, silenced(model, "levels.0"), (24, 40))


def test_several_branches_go_one_after_another_but_not_the_last():
    model = randomised(Pyramid(joined=True))
    expected = silenced(silenced(model, "levels.0"), "levels.2")
    cut = without(without(model, "levels.0"), "levels.2")
    assert_equal_output(cut, expected, IMAGES)
    with pytest.raises(ValueError, match=r"levels\.1 is the last of its siblings and must stay"):
        without(cut, "levels.1")
    assert not isinstance(cut.levels[1], Absent)


def test_a_path_that_is_no_branch_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"stem is no branch; there are: levels\.0, levels\.1, levels\.2"):
        without(Pyramid(joined=True), "stem")
    with pytest.raises(ValueError, match="levels is no branch; there are: none"):
        without(Pyramid(joined=True, multi_scale=False), "levels")


def test_optimisers_follow_the_reader_and_forget_the_branch():
    model = randomised(Pyramid(joined=True)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(random_images(0, IMAGES)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model.last.weight]["momentum_buffer"].clone()
    remove_branch(model, "levels.2", find_groups(model, IMAGES), IMAGES, minimum=4, optimizers=iter([optimizer]))
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert held == [id(parameter) for parameter in model.parameters()]
    assert len(optimizer.state) == len(held)
    assert torch.equal(optimizer.state[model.last.weight]["momentum_buffer"], momentum[:, :36])
    model(random_images(0, IMAGES)).sum().backward()
    optimizer.step()


def test_a_model_whose_weights_do_not_learn_loses_the_same():
    """As an average of weights does, which follows the model it is the average of."""
    model = randomised(Pyramid(joined=True))
    cut = without(model, "levels.2")
    still = without(model.requires_grad_(False), "levels.2")
    assert list(still.state_dict()) == list(cut.state_dict())
    assert not any(parameter.requires_grad for parameter in still.parameters())


def test_a_network_without_a_branch_can_be_cut_and_has_fewer_channels_to_lose():
    model = without(randomised(Pyramid(joined=True)), "levels.2")
    groups = find_groups(model, IMAGES)
    assert [group.channels for group in groups] == [8, 16, 16]


# Zeros -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("absent", "given", "made"),
    [
        (Absent(5, None, (1, 1)), (2, 3, 8, 12), (2, 5, 1, 1)),
        (Absent(5, (1.0, 1.0), None), (2, 3, 8, 12), (2, 5, 8, 12)),
        (Absent(5, (2.0, 4.0), None), (1, 3, 8, 12), (1, 5, 16, 48)),
        (Absent(5, (1 / 3, 0.5), None), (1, 3, 9, 12), (1, 5, 3, 6)),
    ],
)
def test_zeros_have_a_fixed_size_or_a_multiple_of_what_they_are_given(absent, given, made):
    for module in (absent, Absent(*absent.record())):
        zeros = module(torch.ones(given, dtype=torch.bfloat16), "whatever else a branch is given")
        assert tuple(zeros.shape) == made
        assert zeros.dtype == torch.bfloat16
        assert not zeros.any()


def test_zeros_can_stand_at_any_path():
    model = nn.Sequential(nn.Sequential(conv(3, 4)), conv(4, 2))
    put_absent(model, "0.0", Absent(4, (1.0, 1.0), None))
    put_absent(model, "1", Absent(2, (1.0, 1.0), None))
    assert [type(module) for module in (model[0][0], model[1])] == [Absent, Absent]


# Weak branches -----------------------------------------------------------------------------------------------------


def weak(model: nn.Module, below: float, measure: Any = "bn_scale") -> list[str]:
    groups = find_groups(model, IMAGES)
    return weak_branches(model, groups, importance(model, groups, measure), below)


def with_scales(model: Pyramid, *scales: float) -> Pyramid:
    for level, scale in zip(model.levels, scales, strict=True):
        nn.init.constant_(level[1].weight, scale)
    return model


@pytest.mark.parametrize("joined", [True, False])
def test_a_branch_is_weak_below_a_share_of_the_mean_of_its_siblings(joined):
    model = with_scales(Pyramid(joined), 1.0, 0.2, 0.6)  # the others of the second have a mean of 0.8
    assert weak(model, 0.24) == []
    assert weak(model, 0.26) == ["levels.1"]
    assert weak(model, 0.99) == ["levels.1"]  # 0.6 is the mean of the others of the third


@pytest.mark.parametrize("joined", [True, False])
def test_one_of_all_branches_always_stays(joined):
    model = with_scales(Pyramid(joined), 0.01, 1.0, 0.0001)
    assert weak(model, 0.99) == ["levels.2", "levels.0"]
    assert weak(with_scales(Pyramid(joined), 0.0, 0.0, 0.0), 0.99) == []
    assert len(weak(with_scales(Pyramid(joined), 1.0, 1.0, 1.0), 2.0)) == 2


def test_branches_that_are_gone_are_not_compared():
    model = with_scales(Pyramid(joined=True), 1.0, 0.5, 0.2)
    model = without(model, "levels.0")
    assert weak(model, 0.5) == ["levels.2"]
    assert weak(without(model, "levels.2"), 0.99) == []


def test_added_branches_without_norms_are_compared_by_their_weights():
    model = Pyramid(joined=False)
    for place, size in enumerate((1.0, 0.1, 1.0)):
        model.levels[place] = conv(8, 16)
        nn.init.constant_(model.levels[place].weight, size)
        nn.init.constant_(model.levels[place].bias, 1 / size)
    assert weak(model, 0.5, "magnitude") == ["levels.1"]


def test_a_branch_without_a_score_is_not_weak():
    model = with_scales(Pyramid(joined=True), 1.0, 1.0, 1.0)
    model.levels[1] = conv(8, 16)  # no norm, so no scale
    assert weak(model, 0.99) == []


@pytest.mark.parametrize("arch", REMOVED)
def test_the_branch_of_an_smp_model_whose_scales_are_small_is_found(smp_models, arch):
    model, path = deepcopy(smp_models[arch]), REMOVED[arch]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.weight is not None:
            nn.init.constant_(module.weight, 1.0)
    for module in model.get_submodule(path).modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.constant_(module.weight, 0.1)
    assert weak(model, 0.5) == [path]
