"""A cut network computes what the silenced one does, and everything that is kept beside its tensors fits them."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dance_seg.network_slimming.channels import Group, Member
from dance_seg.network_slimming.groups import find_groups
from dance_seg.network_slimming.surgery import cut, fit_attributes, forget, kept_positions, silence, take_positions
from tests.dance_seg.network_slimming.networks import (
    NETWORKS,
    SIZE,
    block,
    conv,
    random_images,
    random_kept,
    randomised,
)


def relative_difference(one: Tensor, two: Tensor) -> float:
    return ((one - two).abs().max() / two.abs().max()).item()


def assert_attributes_fit(model: nn.Module) -> None:
    """Every layer's account of its widths is that of its tensors."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            made, read = module.weight.shape[:2]
            assert (module.out_channels, module.in_channels) == (made, read * module.groups)
        elif isinstance(module, nn.ConvTranspose2d):
            read, made = module.weight.shape[:2]
            assert (module.out_channels, module.in_channels) == (made * module.groups, read)
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif isinstance(module, nn.BatchNorm2d):
            assert len(module.running_mean) == len(module.running_var) == len(module.bias) == module.num_features
            assert module.num_features == len(module.weight)
        elif isinstance(module, nn.GroupNorm) and module.affine:
            assert module.num_channels == len(module.weight)
            assert module.num_channels % module.num_groups == 0
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and bias is not None:
            assert len(bias) == module.out_channels


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_computes_what_the_silenced_one_does(name, seed):
    model = randomised(NETWORKS[name](), seed)
    groups = find_groups(model, SIZE)
    kept = random_kept(groups, seed)
    silenced, narrow = deepcopy(model), deepcopy(model)
    silence(silenced, groups, kept)
    cut(narrow, groups, kept)
    images = random_images(seed)
    expected = silenced(images)
    assert relative_difference(narrow(images), expected) <= 1e-5
    assert relative_difference(model(images), expected) > 1e-2  # there was something to lose
    assert_attributes_fit(narrow)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_learns_and_is_cut_again(name):
    model = randomised(NETWORKS[name]()).train()
    for seed in (3, 4):
        groups = find_groups(model, SIZE)
        kept = random_kept(groups, seed)
        before = sum(parameter.numel() for parameter in model.parameters())
        cut(model, groups, kept)
        assert sum(parameter.numel() for parameter in model.parameters()) < before
        assert_attributes_fit(model)
        model.zero_grad()
        model(random_images(seed)).square().mean().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["squeeze_excite", "concatenation", "grouped"])
def test_what_stays_is_a_part_of_what_was(name):
    """Against deleting by hand the positions of the channels that go."""
    model = randomised(NETWORKS[name]())
    groups = find_groups(model, SIZE)
    kept = random_kept(groups)
    gone: dict[tuple[str, int], list[int]] = {}
    for group, stay in zip(groups, kept, strict=True):
        for channel in set(range(group.channels)) - set(stay.tolist()):
            for member in group.members:
                gone.setdefault((member.tensor, member.dim), []).extend(member.positions[channel].tolist())
    expected = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    for (key, dim), places in gone.items():
        expected[key] = np.delete(expected[key], places, axis=dim)
    cut(model, groups, kept)
    for key, tensor in model.state_dict().items():
        assert np.array_equal(tensor.numpy(), expected[key]), key


def test_silencing_zeroes_what_makes_a_channel_and_leaves_what_reads_it():
    model = randomised(nn.Sequential(block(3, 4), conv(4, 2)))
    reader = model[1].weight.clone()
    silence(model, find_groups(model, SIZE), [np.array([0, 3])])
    first, norm, _ = model[0]
    for tensor in (first.weight, norm.weight, norm.bias):
        assert [bool(row.any()) for row in tensor] == [True, False, False, True]
    assert torch.equal(model[1].weight, reader)
    silent = model[0][:2](random_images())
    assert [bool(channel.any()) for channel in silent[0]] == [True, False, False, True]


def test_a_cut_of_nothing_leaves_the_very_same_tensors():
    model = randomised(NETWORKS["residual"]())
    before = dict(model.named_parameters())
    groups = find_groups(model, SIZE)
    cut(model, groups, [np.arange(group.channels) for group in groups])
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_names_order_kind_and_whether_they_learn_stay():
    model = randomised(NETWORKS["squeeze_excite"]())
    model.stem[0].weight.requires_grad_(False)
    before = [(name, parameter.requires_grad, type(parameter)) for name, parameter in model.named_parameters()]
    names, modules = list(model.state_dict()), list(model.modules())
    groups = find_groups(model, SIZE)
    cut(model, groups, random_kept(groups))
    assert [(name, p.requires_grad, type(p)) for name, p in model.named_parameters()] == before
    assert list(model.state_dict()) == names
    assert all(mine is its for mine, its in zip(modules, model.modules(), strict=True))


def test_weights_that_two_layers_share_stay_shared():
    model = randomised(NETWORKS["tied_weights"]())
    groups = find_groups(model, SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cut(model, groups, random_kept(groups), [optimizer])
    assert model.one.weight is model.two.weight
    assert model.one.weight.shape == (3, 3, 3, 3)
    assert {id(parameter) for parameter in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_a_depthwise_convolution_keeps_its_multiplier_and_a_grouped_one_its_groups():
    model = nn.Sequential(conv(3, 8), conv(8, 16, 3, groups=8), conv(16, 6, 3, groups=2), conv(6, 2))
    groups = find_groups(model, SIZE)
    assert [group.channels for group in groups] == [4, 3]  # the halves of the grouped one go together
    cut(model, groups, [np.array([0, 1, 3]), np.array([0, 2])])
    depthwise, in_groups = model[1], model[2]
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (6, 12, 6)
    assert (in_groups.in_channels, in_groups.out_channels, in_groups.groups) == (12, 4, 2)


def test_a_group_norm_keeps_the_width_of_its_groups():
    model = nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), conv(12, 2), nn.GroupNorm(1, 2, affine=False))
    cut(model, find_groups(model, SIZE), [np.array([0, 2, 3])])
    assert (model[1].num_groups, model[1].num_channels) == (3, 9)
    assert (model[3].num_groups, model[3].num_channels) == (1, 2)


def test_attributes_follow_tensors_in_every_kind_of_layer():
    layers: list[tuple[nn.Module, dict[str, Any]]] = [
        (nn.Conv1d(4, 6, 1), {"in_channels": 4, "out_channels": 3}),
        (nn.ConvTranspose2d(6, 4, 1), {"in_channels": 3, "out_channels": 4}),
        (nn.ConvTranspose2d(6, 6, 1, groups=6), {"in_channels": 3, "out_channels": 3, "groups": 3}),
        (nn.Linear(4, 6), {"in_features": 4, "out_features": 3}),
        (nn.BatchNorm2d(6, affine=False), {"num_features": 3}),
        (nn.InstanceNorm2d(6, affine=True), {"num_features": 3}),
        (nn.GroupNorm(3, 6), {"num_channels": 4, "num_groups": 2}),
    ]
    for layer, expected in layers:
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.ndim:
                narrow = tensor.detach()[: 4 if isinstance(layer, nn.GroupNorm) else 3]
                store = layer._parameters if name in layer._parameters else layer._buffers
                store[name] = nn.Parameter(narrow) if name in layer._parameters else narrow
        fit_attributes(layer)
        assert {key: getattr(layer, key) for key in expected} == expected, layer


# What is kept beside the weights -----------------------------------------------------------------------------------


def trained(make_optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = randomised(NETWORKS["squeeze_excite"]()).train()
    optimizer = make_optimizer(model)
    for seed in range(3):
        optimizer.zero_grad()
        model(random_images(seed)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def narrowed(tensor: Tensor, positions: dict[int, Tensor]) -> Tensor:
    """By plain indexing, one dimension after the other."""
    for dim, index in positions.items():
        tensor = tensor[(slice(None),) * dim + (index,)]
    return tensor


def of_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of parameters with their own settings, as for weights that decay and others."""
    wide = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": wide, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


OPTIMIZERS = {
    "sgd": (lambda model: torch.optim.SGD(of_groups(model), lr=0.01, momentum=0.9), ("momentum_buffer",)),
    "adamw": (
        lambda model: torch.optim.AdamW(of_groups(model), lr=0.01, amsgrad=True),
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_and_moments_follow_by_the_same_indices_and_steps_go_on(name):
    make, moments = OPTIMIZERS[name]
    model, optimizer = trained(make)
    groups = find_groups(model, SIZE)
    kept = random_kept(groups)
    left = kept_positions(model, groups, kept)
    names = [[n for p in g["params"] for n, q in model.named_parameters() if q is p] for g in optimizer.param_groups]
    expected = {}
    for key, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert set(moments) <= set(state)
        tensors = {"value": parameter.detach(), "gradient": parameter.grad, **{m: state[m] for m in moments}}
        expected[key] = {what: narrowed(tensor, left.get(key, {})).clone() for what, tensor in tensors.items()}
        expected[key]["step"] = state.get("step")

    cut(model, groups, kept, [optimizer])

    assert len(optimizer.state) == len(expected)
    for key, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert torch.equal(parameter, expected[key]["value"])
        assert torch.equal(parameter.grad, expected[key]["gradient"])
        for moment in moments:
            assert torch.equal(state[moment], expected[key][moment]), (key, moment)
        assert state.get("step") == expected[key]["step"]
    assert [
        [n for p in g["params"] for n, q in model.named_parameters() if q is p] for g in optimizer.param_groups
    ] == names
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]

    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    model(random_images(9)).square().mean().backward()
    optimizer.step()
    learning = [(old, new) for old, new in zip(before, model.parameters(), strict=True) if new.grad.any()]
    assert len(learning) > len(before) / 2
    assert not any(torch.equal(old, new) for old, new in learning)
    if name == "adamw":
        assert {int(state["step"]) for state in optimizer.state.values()} == {4}


def test_a_step_after_the_cut_is_the_step_of_the_silenced_network():
    """With SGD, and channels whose momentum is zero too: nothing of the optimiser is lost or mixed up."""
    model, optimizer = trained(OPTIMIZERS["sgd"][0])
    groups = find_groups(model, SIZE)
    kept = random_kept(groups)
    left = kept_positions(model, groups, kept)
    wide = deepcopy(model)
    silence(wide, groups, kept)
    other = torch.optim.SGD(of_groups(wide), lr=0.01, momentum=0.9)
    for mine, its in zip(model.parameters(), wide.parameters(), strict=True):
        other.state[its]["momentum_buffer"] = optimizer.state[mine]["momentum_buffer"].clone()
    cut(model, groups, kept, [optimizer])
    for network, steps in ((model, optimizer), (wide, other)):
        network.eval()
        network.zero_grad()
        network(random_images(5)).square().mean().backward()
        steps.step()
    for (name, mine), its in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert torch.allclose(mine, narrowed(its, left.get(name, {})), rtol=1e-4, atol=1e-6), name


def test_an_optimiser_that_has_not_stepped_yet_and_several_of_them_follow():
    model = randomised(NETWORKS["plain"]()).train()
    fresh = torch.optim.AdamW([model[0][0].weight], lr=0.1)
    other = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter is not model[0][0].weight], lr=1.0
    )
    groups = find_groups(model, SIZE)
    cut(model, groups, random_kept(groups), iter([fresh, other]))
    assert fresh.param_groups[0]["params"][0] is model[0][0].weight
    held = {id(parameter) for group in other.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()} - {id(model[0][0].weight)}
    assert not fresh.state


def test_a_parameter_without_a_gradient_has_none_afterwards():
    model = NETWORKS["plain"]()
    groups = find_groups(model, SIZE)
    cut(model, groups, random_kept(groups))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_and_momenta_in_channels_last_stay_so():
    model = randomised(NETWORKS["residual"]()).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(random_images().to(memory_format=torch.channels_last)).sum().backward()
    optimizer.step()
    groups = find_groups(model, SIZE)
    cut(model, groups, random_kept(groups), [optimizer])
    weight = model.one[0].weight
    assert weight.shape == (4, 4, 3, 3)
    for tensor in (weight, weight.grad, optimizer.state[weight]["momentum_buffer"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_numbers_stays(dtype):
    model = NETWORKS["plain"]().to(dtype)
    groups = find_groups(nn.Sequential(*deepcopy(model).float()), SIZE)
    cut(model, groups, random_kept(groups))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("emptied", [0, 1])
def test_a_group_that_would_be_emptied_is_named_and_nothing_is_cut(emptied):
    model = NETWORKS["plain"]()
    groups = find_groups(model, SIZE)
    kept = [np.arange(4), np.arange(4)]
    kept[emptied] = np.array([], int)
    name, channels = groups.groups[emptied].name, groups.groups[emptied].channels
    shapes = [parameter.shape for parameter in model.parameters()]
    with pytest.raises(ValueError, match=f"{name}: all its {channels} channels would be cut; keep at least one"):
        cut(model, groups, kept)
    assert [parameter.shape for parameter in model.parameters()] == shapes


def test_one_array_of_channels_is_needed_for_each_group():
    model = NETWORKS["plain"]()
    groups = find_groups(model, SIZE)
    for function in (cut, silence, kept_positions):
        with pytest.raises(ValueError, match="zip"):
            function(model, groups, [np.arange(4)])


def test_kept_positions_of_two_groups_in_one_dimension_are_joined():
    model = nn.Sequential(nn.Conv2d(6, 2, 1))
    groups = (
        Group("a", (Member("0.weight", 1, np.array([[0], [1], [2]]), True),)),
        Group("b", (Member("0.weight", 1, np.array([[3, 4]]), True), Member("0.bias", 0, np.array([[0]]), False))),
        Group("c", (Member("0.weight", 1, np.array([[5]]), True),)),
    )
    left = kept_positions(model, groups, [np.array([0, 2]), np.array([0]), np.array([0])])
    assert {name: {dim: index.tolist() for dim, index in dims.items()} for name, dims in left.items()} == {
        "0.weight": {1: [0, 2, 3, 4, 5]}
    }


def test_positions_are_taken_along_several_dimensions():
    values = torch.arange(24.0).reshape(2, 3, 4)
    taken = take_positions(values, {0: torch.tensor([1]), 2: torch.tensor([0, 3])})
    assert taken.tolist() == [[[12.0, 15.0], [16.0, 19.0], [20.0, 23.0]]]
    assert taken.is_contiguous()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (8, 6, 1, 1), (8, 1, 3, 3), (1, 6, 1, 1)])
def test_strides_are_those_of_a_fresh_tensor_of_the_same_format(shape, form):
    """Of kernels of 1 x 1, which have several that mean the same, and whose layout the next layer's follows from."""
    values = torch.randn(shape).contiguous(memory_format=form)
    wide = torch.empty(shape, memory_format=form).copy_(values)
    taken = take_positions(wide, {0: torch.arange(max(1, shape[0] // 2)), 1: torch.arange(max(1, shape[1] // 2))})
    fresh = torch.empty(taken.shape, memory_format=form)
    assert taken.stride() == fresh.stride()
    assert torch.equal(taken, values[: taken.shape[0], : taken.shape[1]])


def test_optimisers_forget_parameters_that_the_model_no_longer_has():
    model, optimizer = trained(OPTIMIZERS["sgd"][0])
    gone, stays = list(model.squeeze.parameters()), model.stem[0].weight
    model.squeeze = nn.Identity()
    forget([optimizer], model)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert all(parameter not in optimizer.state for parameter in gone)
    assert "momentum_buffer" in optimizer.state[stays]
    assert len(optimizer.state) == len(held)
