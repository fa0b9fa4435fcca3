"""A full network becomes as narrow as a record says, and a record that does not fit changes nothing."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dance_seg.errors import CheckpointError
from dance_seg.models.smp import SmpModel
from dance_seg.network_slimming.branches import Absent, remove_branch
from dance_seg.network_slimming.groups import find_groups
from dance_seg.network_slimming.structure import restructure, structure_hash, structure_record
from dance_seg.network_slimming.surgery import cut
from tests.dance_seg.network_slimming.networks import (
    NETWORKS,
    SIZE,
    Calls,
    block,
    conv,
    random_images,
    random_kept,
    randomised,
)


class Levels(nn.Module):
    """Two branches that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8)
        self.levels = nn.ModuleList([block(8, 16, 1), block(8, 16, 3)])
        self.levels.multi_scale = True
        self.last = conv(32, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.stem(images)
        return self.last(torch.cat([level(features) for level in self.levels], 1))


def cut_once(model: nn.Module, seed: int = 0) -> nn.Module:
    groups = find_groups(model, SIZE)
    cut(model, groups, random_kept(groups, seed))
    return model


def narrow_levels() -> nn.Module:
    model = randomised(Levels())
    remove_branch(model, "levels.1", find_groups(model, SIZE), SIZE)
    return cut_once(model)


def rebuilt(make: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    """A fresh network that is made as narrow and given the same values, and computes the very same."""
    fresh = make().eval()
    restructure(fresh, structure_record(model))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(random_images()), model(random_images()))
    assert str(fresh) == str(model)  # every layer says the same of itself
    assert structure_hash(fresh) == structure_hash(model)
    return fresh


# Building again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_takes_the_tensors_of_a_cut_one_and_computes_the_same(name):
    rebuilt(NETWORKS[name], cut_once(randomised(NETWORKS[name]())))


@pytest.mark.parametrize("name", ["residual", "squeeze_excite", "group_norm", "transposed"])
def test_the_same_after_a_second_cut(name):
    rebuilt(NETWORKS[name], cut_once(cut_once(randomised(NETWORKS[name]())), seed=1))


@pytest.mark.parametrize(("cuts", "groups"), [(1, 4), (2, 2), (3, 1)])
def test_a_convolution_in_groups_that_became_depthwise_keeps_the_groups_it_has_left(cuts, groups):
    """Four groups of two channels; then four of one; from then on they go one by one."""

    def make() -> nn.Module:
        return nn.Sequential(conv(3, 8), conv(8, 16, 3, groups=4), conv(16, 2))

    model = randomised(make())
    for _ in range(cuts):
        cut(model, found := find_groups(model, SIZE), [np.arange((group.channels + 1) // 2) for group in found])
    assert model[1].groups == groups
    fresh = rebuilt(make, model)
    assert fresh[1].in_channels == fresh[1].groups == groups


def test_an_absent_branch_is_absent_again():
    fresh = rebuilt(Levels, narrow_levels())
    assert isinstance(fresh.levels[1], Absent)
    assert fresh.last.in_channels < 32


def test_an_smp_model_with_an_absent_branch_is_built_again():
    def make() -> nn.Module:
        return SmpModel(arch="pspnet", encoder_name="resnet18", num_classes=3, psp_out_channels=32)

    model = randomised(make())
    size = (64, 64)
    remove_branch(model, "network.decoder.psp.blocks.2", find_groups(model, size), size)
    groups = find_groups(model, size)
    cut(model, groups, random_kept(groups))
    rebuilt(make, model)


def test_weights_that_two_layers_share_are_shared_again():
    model = cut_once(randomised(NETWORKS["tied_weights"]()))
    fresh = rebuilt(NETWORKS["tied_weights"], model)
    assert fresh.one.weight is fresh.two.weight
    assert len(list(fresh.parameters())) == len(list(model.parameters()))


def test_a_rebuilt_network_learns_what_the_full_one_would():
    fresh = Levels()
    fresh.stem[0].weight.requires_grad_(False)
    model = narrow_levels()
    restructure(fresh, structure_record(model))
    fresh.train()(random_images()).sum().backward()
    assert [parameter.requires_grad for parameter in fresh.parameters()] == [False] + [True] * (
        len(list(model.parameters())) - 1
    )
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in fresh.parameters())


def test_the_record_of_a_full_network_changes_nothing():
    model = randomised(Levels())
    before = dict(model.named_parameters())
    restructure(model, structure_record(model))
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_the_record_is_plain_data_that_survives_torch_and_json(tmp_path: Path):
    record = structure_record(narrow_levels())
    assert record["absent"]
    torch.save(record, tmp_path / "record.pt")
    assert torch.load(tmp_path / "record.pt", weights_only=True) == record
    again = json.loads(json.dumps(record))
    assert again == record
    fresh = Levels()
    restructure(fresh, again)
    assert structure_record(fresh) == record


def test_a_record_without_groups_of_convolutions_is_taken_at_its_shapes():
    model = cut_once(randomised(NETWORKS["depthwise_multiplier"]()))
    record = structure_record(model)
    del record["groups"]
    fresh = NETWORKS["depthwise_multiplier"]()
    restructure(fresh, record)
    assert str(fresh) == str(model.train())


# Refusing ----------------------------------------------------------------------------------------------------------


def change(record: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    """A copy with one entry changed, or taken out where it is to be None."""
    changed = inner = deepcopy(record)
    for key in path[:-1]:
        inner = inner[key]
    if to is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return changed


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("shapes", "other.weight"), [4, 4], "other.weight is no tensor of this network; the checkpoint is of another"),
        (("shapes", "stem.0.weight"), [9, 3, 3, 3], r"stem\.0\.weight of shape \[9, 3, 3, 3\] is no part of"),
        (("shapes", "stem.0.weight"), [4, 3, 3, 5], r"stem\.0\.weight of shape .* is no part of .*\[8, 3, 3, 3\]"),
        (("shapes", "stem.0.weight"), [4, 3, 3], r"stem\.0\.weight of shape \[4, 3, 3\] is no part of"),
        (("shapes", "stem.0.weight"), [4, 0, 3, 3], r"stem\.0\.weight of shape \[4, 0, 3, 3\] is no part of"),
        (("shapes", "stem.0.weight"), [-4, 3, 3, 3], r"stem\.0\.weight of shape \[-4, 3, 3, 3\] is no part of"),
        (("shapes", "stem.0.weight"), [4.0, 3, 3, 3], r"stem\.0\.weight of shape \[4\.0, 3, 3, 3\] is no part of"),
        (("shapes", "stem.0.weight"), "4333", r"stem\.0\.weight of shape 4333 is no part of"),
        (("shapes", "stem.0.weight"), None, r"names other tensors than this network has: stem\.0\.weight"),
        (("shapes", "levels.1.0.weight"), [16, 8, 3, 3], r"names other tensors than .*: levels\.1\.0\.weight"),
        (("absent", "levels.7"), [16, [1.0, 1.0], None], r"the branch levels\.7 is absent in it and unknown"),
        (("absent", ""), [16, [1.0, 1.0], None], "the branch  is absent in it and unknown"),
        (("absent", "levels.1"), None, r"names other tensors than this network has: levels\.1\.0\.weight"),
        (("absent", "levels.1"), "wide", r"absent\.levels\.1: 'wide' describes no absent branch"),
        (("absent", "levels.1"), [16], r"absent\.levels\.1: \[16\] describes no absent branch"),
        (("absent", "levels.1"), [16, None, None], "describes no absent branch"),
        (("absent", "levels.1"), [0, [1.0, 1.0], None], "describes no absent branch"),
        (("absent", "levels.1"), [16, [-1.0, 1.0], None], "describes no absent branch"),
        (("absent", "levels.1"), [16, [1.0], None], "describes no absent branch"),
        (("absent", "levels.1"), [16, None, [0, 8]], "describes no absent branch"),
        (("groups", "last"), 2, "last in 2 groups is no part of this network, where it has 1"),
        (("groups", "nowhere"), 2, "nowhere in 2 groups is no part of this network"),
        (("groups", "last"), 0, "last in 0 groups is no part of this network"),
        (("shapes",), None, "is no record of a structure: it needs 'shapes' and 'absent'"),
        (("absent",), None, "is no record of a structure"),
        (("shapes",), [1, 2], "is no record of a structure"),
        (("groups",), [1, 2], "is no record of a structure"),
    ],
)
def test_a_record_that_does_not_fit_names_the_tensor_and_leaves_the_network_as_it_was(path, to, message):
    record = change(structure_record(narrow_levels()), *path, to=to)
    model = randomised(Levels())
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    said = str(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        restructure(model, record, at="run/step-7.ckpt: structure")
    assert str(caught.value).startswith("run/step-7.ckpt: structure: ") or "structure: absent." in str(caught.value)
    assert str(model) == said
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())


# Hash --------------------------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_structure_and_not_of_the_values():
    one, two = randomised(Levels(), 0), randomised(Levels(), 1)
    assert structure_hash(one) == structure_hash(two)
    assert len(structure_hash(one)) == 64


def test_cuts_that_differ_have_different_hashes():
    def hash_after(*widths: int) -> str:
        model = nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 2))
        cut(model, find_groups(model, SIZE), [np.arange(width) for width in widths])
        return structure_hash(model)

    hashes = [
        hash_after(4, 4),
        hash_after(4, 5),
        hash_after(5, 4),
        structure_hash(Levels()),
        structure_hash(narrow_levels()),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_after(4, 4) == hashes[0]


def test_the_hash_tells_absent_branches_of_different_size_apart():
    def hash_of(absent: Absent) -> str:
        model = Calls(lambda net, x: x)
        model.branch = absent
        return structure_hash(model)

    absent = [
        Absent(8, (1.0, 1.0), None),
        Absent(8, (2.0, 2.0), None),
        Absent(8, None, (1, 1)),
        Absent(9, None, (1, 1)),
    ]
    assert len({hash_of(one) for one in absent}) == 4
