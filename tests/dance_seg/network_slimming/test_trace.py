"""Which channels are one and the same: the positions of small networks by hand, and what must stay."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dance_seg.network_slimming.channels import Group, Groups
from dance_seg.network_slimming.trace import trace_groups
from tests.dance_seg.network_slimming.networks import (
    SIZE,
    Attention,
    Calls,
    block,
    conv,
    made_in,
    positions,
    randomised,
    squeeze_excite,
    weights,
)


def trace(model: nn.Module) -> Groups:
    return trace_groups(model, SIZE)


def through(function: Any, **parts: nn.Module | Tensor) -> Groups:
    """The groups of a convolution to 8 channels, what a function makes of them, and a convolution that reads it."""
    return trace(
        Calls(lambda net, x: net.last(function(net, net.first(x))), first=conv(3, 8), last=conv(8, 2), **parts)
    )


def only(groups: Groups) -> Group:
    (group,) = groups
    return group


def each(*places: int) -> list[list[int]]:
    """One position of each channel."""
    return [[place] for place in places]


# What is tied ------------------------------------------------------------------------------------------------------


def test_a_layer_its_norm_and_what_reads_it_are_one_group():
    group = only(trace(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2))))
    assert group.name == "0.weight"
    assert group.channels == 4
    assert group.unit == 1
    norm = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
    assert positions(group, reads=False) == {(name, 0): each(0, 1, 2, 3) for name in ("0.weight", "0.bias", *norm)}
    assert positions(group, reads=True) == {("3.weight", 1): each(0, 1, 2, 3)}


def test_a_residual_sum_ties_all_layers_that_make_it():
    def forward(net: Any, images: Tensor) -> Tensor:
        first = net.stem(images)
        second = first + net.one(first)
        return net.head(second + net.two(second))

    group = only(trace(Calls(forward, stem=conv(3, 4), one=conv(4, 4), two=conv(4, 4), head=conv(4, 2))))
    made = [
        ("stem.weight", 0),
        ("stem.bias", 0),
        ("one.weight", 0),
        ("one.bias", 0),
        ("two.weight", 0),
        ("two.bias", 0),
    ]
    assert positions(group, reads=False) == {place: each(0, 1, 2, 3) for place in made}
    read = [("one.weight", 1), ("two.weight", 1), ("head.weight", 1)]
    assert positions(group, reads=True) == {place: each(0, 1, 2, 3) for place in read}


def test_the_parts_of_a_concatenation_stay_apart_and_the_reader_knows_each_at_its_place():
    model = Calls(
        lambda net, x: net.head(torch.cat([net.left(x), x, net.right(x)], 1)),
        left=conv(3, 4),
        right=conv(3, 2),
        head=conv(9, 2),
    )
    left, right = trace(model)
    assert positions(left, reads=True) == {("head.weight", 1): each(0, 1, 2, 3)}
    assert positions(right, reads=True) == {("head.weight", 1): each(7, 8)}  # behind the image's three
    assert set(positions(left, reads=False)) == {("left.weight", 0), ("left.bias", 0)}


def test_a_part_that_is_joined_twice_is_read_at_both_places():
    def forward(net: Any, images: Tensor) -> Tensor:
        part = net.part(images)
        return net.head(torch.cat([part, net.other(part), part], 1))

    part, other = trace(Calls(forward, part=conv(3, 2), other=conv(2, 3), head=conv(7, 2)))
    assert positions(part, reads=True) == {("other.weight", 1): each(0, 1), ("head.weight", 1): [[0, 5], [1, 6]]}
    assert positions(other, reads=True) == {("head.weight", 1): each(2, 3, 4)}


def test_a_sum_of_concatenations_ties_place_by_place():
    def forward(net: Any, images: Tensor) -> Tensor:
        return net.head(torch.cat([net.a(images), net.b(images)], 1) + torch.cat([net.c(images), net.d(images)], 1))

    groups = trace(Calls(forward, a=conv(3, 2), b=conv(3, 4), c=conv(3, 5), d=conv(3, 1), head=conv(6, 2)))
    # a and b have 2 and 4 channels, c and d 5 and 1: the last of b is d's, and d's only channel makes no dimension.
    assert [(group.name, group.channels) for group in groups] == [("a.weight", 2), ("b.weight", 3)]
    assert positions(groups.groups[0], reads=False)["c.weight", 0] == each(0, 1)
    assert positions(groups.groups[1], reads=False)["c.weight", 0] == each(2, 3, 4)
    assert positions(groups.groups[1], reads=True) == {("head.weight", 1): each(2, 3, 4)}


def test_a_depthwise_convolution_makes_and_does_not_read():
    group = only(trace(nn.Sequential(conv(3, 4), conv(4, 4, 3, groups=4), conv(4, 2))))
    assert positions(group, reads=False) == {
        (name, 0): each(0, 1, 2, 3) for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    }
    assert positions(group, reads=True) == {("2.weight", 1): each(0, 1, 2, 3)}


def test_a_depthwise_convolution_with_a_multiplier_gives_each_channel_a_row_of_its_own():
    group = only(trace(nn.Sequential(conv(3, 2), conv(2, 6, 3, groups=2), conv(6, 2))))
    assert positions(group, reads=False)["0.weight", 0] == each(0, 1)
    assert positions(group, reads=False)["1.weight", 0] == [[0, 1, 2], [3, 4, 5]]
    assert positions(group, reads=True) == {("2.weight", 1): [[0, 1, 2], [3, 4, 5]]}


def test_a_convolution_in_groups_loses_the_same_place_in_each():
    given, made = trace(nn.Sequential(conv(3, 6), conv(6, 4, 3, groups=2), conv(4, 2)))
    assert given.unit == 2
    assert positions(given, reads=False)["0.weight", 0] == [[0, 3], [1, 4], [2, 5]]
    assert positions(given, reads=True) == {("1.weight", 1): each(0, 1, 2)}
    assert positions(made, reads=False)["1.weight", 0] == [[0, 2], [1, 3]]
    assert positions(made, reads=True) == {("2.weight", 1): [[0, 2], [1, 3]]}


def test_a_gate_is_tied_to_what_it_gates():
    groups = trace(squeeze_excite())
    wide = next(group for group in groups if group.name == "expand.0.weight")
    made = {tensor for tensor, _ in positions(wide, reads=False)}
    assert {"expand.0.weight", "depthwise.0.weight", "excite.weight", "excite.bias"} <= made
    assert positions(wide, reads=True) == {(name, 1): each(*range(16)) for name in ("squeeze.weight", "project.weight")}
    assert made_in(groups) >= {"squeeze", "stem.0", "project"}


def test_a_group_of_a_group_norm_goes_as_a_whole():
    group = only(trace(nn.Sequential(conv(3, 6), nn.GroupNorm(3, 6), conv(6, 2))))
    pairs = [[0, 1], [2, 3], [4, 5]]
    assert group.unit == 2
    assert positions(group, reads=False) == {(name, 0): pairs for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert positions(group, reads=True) == {("2.weight", 1): pairs}


def test_a_transposed_convolution_makes_in_its_second_dimension_and_reads_in_its_first():
    given, made = trace(nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 5, 2, stride=2), conv(5, 2)))
    assert positions(given, reads=True) == {("1.weight", 0): each(0, 1, 2, 3)}
    assert positions(made, reads=False) == {("1.weight", 1): each(*range(5)), ("1.bias", 0): each(*range(5))}


@pytest.mark.parametrize("bias", [True, False])
def test_a_depthwise_transposed_convolution_makes_in_its_first(bias):
    middle = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4, bias=bias)
    group = only(trace(nn.Sequential(conv(3, 4), middle, conv(4, 2))))
    made = {"0.weight", "0.bias", "1.weight"} | ({"1.bias"} if bias else set())
    assert positions(group, reads=False) == {(name, 0): each(0, 1, 2, 3) for name in made}


@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_in_groups_stays_as_it_is(bias):
    middle = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2, bias=bias)
    groups = trace(nn.Sequential(conv(3, 4), middle, conv(4, 6), conv(6, 2)))
    assert made_in(groups) == {"2"}
    assert "1: a transposed convolution in groups" in groups.frozen


def test_after_a_flatten_each_channel_takes_several_positions_of_a_linear_layer():
    model = Calls(
        lambda net, x: net.last(net.first(F.adaptive_avg_pool2d(net.stem(x), 2).flatten(1))),
        stem=conv(3, 3),
        first=nn.Linear(12, 5),
        last=nn.Linear(5, 2),
    )
    stem, hidden = trace(model)
    assert positions(stem, reads=True) == {("first.weight", 1): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]}
    assert positions(hidden, reads=False) == {(name, 0): each(*range(5)) for name in ("first.weight", "first.bias")}
    assert positions(hidden, reads=True) == {("last.weight", 1): each(*range(5))}


def test_channels_that_come_last_are_followed_through_a_transposition():
    model = Calls(
        lambda net, x: net.last(net.first(x).permute(0, 2, 3, 1)).movedim(-1, 1), first=conv(3, 4), last=nn.Linear(4, 2)
    )
    assert positions(only(trace(model)), reads=True) == {("last.weight", 1): each(0, 1, 2, 3)}


def test_weights_that_are_used_twice_tie_what_both_uses_read():
    model = Calls(
        lambda net, x: net.head(net.one(x)) + net.head(net.two(x)), one=conv(3, 4), two=conv(3, 4), head=conv(4, 2)
    )
    group = only(trace(model))
    assert made_in(Groups((group,), ())) == {"one", "two"}
    assert positions(group, reads=True) == {("head.weight", 1): each(0, 1, 2, 3)}


def test_a_weight_that_makes_channels_in_one_place_and_reads_them_in_another_counts_as_making_them():
    model = Calls(
        lambda net, x: net.head(F.conv_transpose2d(F.relu(F.conv2d(x, net.code)), net.code)),
        code=weights(4, 3, 1, 1),
        head=conv(3, 2),
    )
    assert positions(only(trace(model)), reads=False) == {("code", 0): each(0, 1, 2, 3)}


def test_a_parameter_that_scales_channels_belongs_to_them():
    groups = through(lambda net, x: net.scale * x, scale=weights(8, 1, 1))
    assert ("scale", 0) in positions(only(groups), reads=False)


def test_parameters_are_named_as_in_the_state_dict_and_come_in_its_order():
    model = nn.Sequential(block(3, 4), block(4, 6), conv(6, 2))
    groups = trace(model)
    names = list(model.state_dict())
    assert {member.tensor for group in groups for member in group.members} <= set(names)
    assert [group.name for group in groups] == sorted((group.name for group in groups), key=names.index)


# What stays --------------------------------------------------------------------------------------------------------


def test_images_and_outputs_keep_their_channels():
    groups = trace(nn.Sequential(conv(3, 4), conv(4, 2)))
    held = {(member.tensor, member.dim) for group in groups for member in group.members}
    assert held == {("0.weight", 0), ("0.bias", 0), ("1.weight", 1)}
    assert groups.frozen == (
        "0: reads channels that are not the network's own",
        "the network: the network's output keeps its classes",
    )


def test_every_output_keeps_its_channels_wherever_it_is_returned():
    model = Calls(
        lambda net, x: {"out": net.last(net.first(x)), "more": [net.aside(x), (net.first(x) * 2,)]},
        first=conv(3, 4),
        last=conv(4, 2),
        aside=conv(3, 5),
    )
    assert len(trace(model)) == 0


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("a sigmoid", lambda net, x: torch.sigmoid(x)),
        ("a softplus", lambda net, x: F.softplus(x)),
        ("a number added", lambda net, x: x + 1),
        ("a number added in place", lambda net, x: (x * 1).add_(1)),
        ("an exponential", lambda net, x: x.exp()),
        ("a sum with a sigmoid", lambda net, x: x + torch.sigmoid(x)),
        ("a division by itself", lambda net, x: torch.sigmoid(x) / x),
        ("padding with a number", lambda net, x: F.pad(x, (1, 1, 1, 1), value=1.0)),
        ("a norm that does not learn", lambda net, x: F.batch_norm(x, net.mean, net.var)),
        ("a norm with another scale", lambda net, x: F.batch_norm(x, net.mean, net.var, 1 + net.scale, net.scale)),
        ("a softmax over places", lambda net, x: x.flatten(2).softmax(-1).unflatten(2, SIZE)),
        ("a sigmoid joined", lambda net, x: torch.cat([torch.sigmoid(x), x], 3)),
        ("a weight that is a sigmoid", lambda net, x: F.conv2d(x, torch.sigmoid(net.kernel))),
        ("a bias that is a sigmoid", lambda net, x: F.conv2d(x, net.kernel, torch.sigmoid(net.scale))),
        ("a shift by place", lambda net, x: x + net.place),
        ("a power of itself", lambda net, x: x**x),
        ("a comparison", lambda net, x: (x >= x.abs()).float()),
        ("a sigmoid mixed over places", lambda net, x: (torch.sigmoid(x).flatten(2) @ net.square).unflatten(2, SIZE)),
        ("a layer over places", lambda net, x: net.places(x.flatten(2)).unflatten(2, SIZE)),
    ],
)
def test_channels_that_are_not_zero_when_they_are_cut_stay_where_a_convolution_reads_them(name, function):
    groups = through(
        function,
        mean=torch.zeros(8),
        var=torch.ones(8),
        scale=weights(8),
        kernel=weights(8, 8, 1, 1),
        place=weights(1, 1, *SIZE),
        square=weights(64, 64),
        places=nn.Linear(64, 64),
    )
    assert not any(("last.weight", 1) in positions(group, reads=True) for group in groups)
    assert "last: reads channels that are not zero when they are cut" in groups.frozen


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: F.hardswish(F.leaky_relu(F.gelu(x))),
        lambda net, x: x * torch.sigmoid(x),
        lambda net, x: torch.sigmoid(x) * x / (1 + torch.exp(x)),
        lambda net, x: F.relu(x, inplace=True).clamp(min=-1) * 3 / 2,
        lambda net, x: F.interpolate(F.pad(F.max_pool2d(x, 2), (0, 1, 0, 1)), size=SIZE, mode="bilinear"),
        lambda net, x: F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1)).permute(0, 3, 1, 2),
        lambda net, x: F.dropout(x, 0.5, training=net.training) - x.mean((2, 3), keepdim=True),
        lambda net, x: x * torch.sigmoid(x.sum(1, keepdim=True)),
        lambda net, x: torch.stack([x, x * 2]).sum(0),
        lambda net, x: x.contiguous(memory_format=torch.channels_last).clone(),
        lambda net, x: x.unsqueeze(2).squeeze(2).flatten(1).unflatten(1, (8, *SIZE)),
        lambda net, x: torch.cat([x[:, :, :4], x[:, :, 4:]], 2),
        lambda net, x: (x[:, :, :2].relu_(), x)[1],
    ],
)
def test_channels_that_stay_zero_can_be_cut(function):
    groups = through(function)
    assert positions(only(groups), reads=True)["last.weight", 1] == each(*range(8))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda net, x: x - x.mean(1, keepdim=True), "mean over its channels"),
        (lambda net, x: x - x.mean(), "mean over its channels"),
        (lambda net, x: x * x.amax(1, keepdim=True), "amax over its channels"),
        (lambda net, x: x.softmax(1), "softmax over its channels"),
        (lambda net, x: x - torch.sigmoid(x).sum(1, keepdim=True), "sum over its channels"),
        (
            lambda net, x: x * (torch.sigmoid(x).flatten(2).mT @ torch.sigmoid(x).flatten(2)).mean(),
            "sums over channels",
        ),
        (lambda net, x: net.each(F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1)), "normalised over its channels"),
        (lambda net, x: x.cumsum(1), "cumsum is not known here"),
        (lambda net, x: x.roll(1, 1), "roll is not known here"),
        (lambda net, x: (x[:, :, :2].sigmoid_(), x)[1], "written to through a view"),
        (lambda net, x: (x * 1).transpose_(2, 3), "transpose_ is not known here"),
        (lambda net, x: x[:, [7, 6, 5, 4, 3, 2, 1, 0]], "index is not known here"),
        (lambda net, x: F.pad(x, (0, 0, 0, 0, 1, -1)), "constant_pad_nd over its channels"),
        (lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1), "its channels are taken apart"),
        (lambda net, x: torch.cat([x[:, :4], x[:, 4:]], 1), "its channels are taken apart"),
        (lambda net, x: x.reshape(2, 2, 4, *SIZE).transpose(1, 2).reshape(2, 8, *SIZE), "its channels are divided"),
        (lambda net, x: x + net.constant, "add with a tensor of fixed size"),
        (lambda net, x: F.group_norm(x, 4, net.scale, net.scale), "a group norm whose number of groups could not"),
        (lambda net, x: nn.GroupNorm(4, 8, affine=False)(x), "a group norm whose number of groups could not"),
        (lambda net, x: x * net.unsaved, "mul with a tensor of fixed size"),
        (lambda net, x: net.one(x.reshape(16, 1, *SIZE)).reshape(2, 8, *SIZE), "slides over channels"),
    ],
)
def test_channels_stay_where_an_operation_needs_all_of_them_or_is_not_known(function, reason):
    model = Calls(
        lambda net, x: net.last(function(net, net.first(x))), first=conv(3, 8), last=conv(8, 2), one=conv(1, 1)
    )
    model.each = conv(8, 8, groups=8)
    model.scale, model.constant = weights(8), torch.zeros(1, 8, 1, 1, device="meta")
    model.register_buffer("unsaved", torch.ones(8, 1, 1), persistent=False)
    groups = trace(model)
    assert len(groups) == 0
    assert any(reason in line for line in groups.frozen), groups.frozen


def test_a_layer_norm_keeps_its_channels_and_is_named():
    def forward(net: Any, images: Tensor) -> Tensor:
        return net.head(net.norm(net.stem(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    groups = trace(Calls(forward, stem=conv(3, 4), norm=nn.LayerNorm(4), head=nn.Sequential(conv(4, 6), conv(6, 2))))
    assert made_in(groups) == {"head.0"}
    assert "norm: normalised over its channels" in groups.frozen


def tokens_of(attention: nn.Module) -> nn.Module:
    def forward(net: Any, images: Tensor) -> Tensor:
        tokens = net.attention(net.stem(images).flatten(2).transpose(1, 2))
        return net.head(tokens.transpose(1, 2).unflatten(2, SIZE))

    return Calls(forward, stem=conv(3, 8), attention=attention, head=conv(8, 2))


def test_attention_keeps_its_heads_and_loses_the_hidden_channels_of_its_mlp():
    groups = trace(tokens_of(Attention(8, 20)))
    hidden = only(groups)
    assert set(positions(hidden, reads=False)) == {("attention.fc1.weight", 0), ("attention.fc1.bias", 0)}
    assert positions(hidden, reads=True) == {("attention.fc2.weight", 1): each(*range(20))}
    assert "attention: its channels are divided among heads or groups" in groups.frozen


def test_torchs_own_transformer_layer_is_cut_in_its_mlp():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
    groups = trace(tokens_of(layer))
    assert made_in(groups) == {"attention.linear1"}
    assert "attention.norm1: normalised over its channels" in groups.frozen


def test_the_queries_and_keys_that_a_product_compares_are_tied_and_can_be_cut():
    def forward(net: Any, images: Tensor) -> Tensor:
        query, key = net.query(images).flatten(2), net.key(images).flatten(2)
        return net.head((query.transpose(1, 2) @ key).softmax(-1).unflatten(1, SIZE).movedim(-1, 1))

    groups = trace(Calls(forward, query=conv(3, 4), key=conv(3, 4), head=conv(64, 2)))
    assert set(positions(only(groups), reads=False)) == {
        (f"{part}.{name}", 0) for part in ("query", "key") for name in ("weight", "bias")
    }


def test_the_queries_and_keys_of_fused_attention_stay_since_it_scales_by_their_width():
    """Which kernel torch takes depends on its version; on a device without values it mostly takes single steps."""

    def forward(net: Any, images: Tensor) -> Tensor:
        heads = (part(images).flatten(2).transpose(1, 2)[:, None] for part in (net.query, net.key, net.value))
        mixed = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)[0]
        return net.head(mixed[:, 0].transpose(1, 2).unflatten(2, SIZE))

    groups = trace(Calls(forward, query=conv(3, 8), key=conv(3, 8), value=conv(3, 8), head=conv(8, 2)))
    assert made_in(groups) == {"value"}
    assert "the network: attention compares them" in groups.frozen


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_weight_that_a_norm_over_all_of_it_computes_stays(wrap):
    groups = trace(nn.Sequential(wrap(conv(3, 4)), conv(4, 6), conv(6, 2)))
    assert made_in(groups) == {"1"}


def test_the_kernel_of_a_computed_weight_is_no_channel():
    groups = trace(
        Calls(lambda net, x: net.last(F.conv2d(x, net.kernel * 2)), kernel=weights(4, 3, 3, 3), last=conv(4, 2))
    )
    assert set(positions(only(groups), reads=False)) == {("kernel", 0)}


def test_the_model_is_left_as_it_was():
    model = randomised(nn.Sequential(block(3, 4), conv(4, 2))).train()
    model(torch.randn(2, 3, *SIZE)).sum().backward()
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model)
    assert all(mine is its for mine, its in zip(parameters, model.parameters(), strict=True))
    assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, gradients, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_the_model_raises_is_not_hidden():
    def forward(net: Any, images: Tensor) -> Tensor:
        raise ValueError(f"images of {tuple(images.shape[-2:])} are too small")

    with pytest.raises(ValueError, match=r"images of \(8, 8\) are too small"):
        trace(Calls(forward))


def test_images_may_have_another_number_of_channels():
    model = nn.Sequential(conv(5, 4), conv(4, 2))
    assert [group.channels for group in trace_groups(model, SIZE, in_channels=5)] == [4]
