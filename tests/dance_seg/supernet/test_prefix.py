"""Layers of which every image keeps its own first channels, and the same layers at one smaller size."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from dance_seg.supernet.elastic import activated
from dance_seg.supernet.prefix import (
    ChannelDrop,
    DropPath,
    PrefixConv2d,
    PrefixDropPath,
    PrefixLinear,
    PrefixNorm,
    make_plain,
    masked,
    masked_layer_norm,
    place_masks,
    prefix_mask,
    remove_masks,
    several_at_once,
)
from dance_seg.supernet.space import SearchSpace, Subnet

CPU = torch.device("cpu")


def lively_norm(channels: int) -> PrefixNorm:
    layer = PrefixNorm(channels)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


# Masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_of_heads_and_dimensions_keeps_the_first_of_each() -> None:
    mask = prefix_mask([[2, 1], [1, 2], [3, 2]], sizes=[3, 2])
    assert mask.tolist() == [[1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]


def test_images_of_one_group_follow_one_another() -> None:
    features = torch.ones(6, 2, 2, 3)
    kept = masked(features, prefix_mask([[1], [2], [3]], [3]))
    assert kept.sum((1, 2, 3)).tolist() == [4, 4, 8, 8, 12, 12]


def test_a_mask_that_keeps_everything_is_not_set() -> None:
    layer, other = ChannelDrop(3), ChannelDrop(2)
    place_masks([(layer, prefix_mask([[3], [3]], [3])), (other, prefix_mask([[1], [2]], [2]))], CPU)
    assert layer.mask is None
    assert other.mask is not None
    assert other.mask.tolist() == [[1, 0], [1, 1]]
    remove_masks(nn.ModuleList([layer, other]))
    assert other.mask is None


def test_masks_are_no_part_of_the_state() -> None:
    layer = PrefixNorm(3)
    place_masks([(layer, prefix_mask([[1]], [3]))], CPU)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not list(layer.buffers())


# Masked LayerNorm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (4, 3)], ids=["tokens", "map"])
@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["around zero", "around three"])
def test_masked_layer_norm_is_layer_norm_of_the_sliced_tensor(shape: tuple[int, ...], offset: float) -> None:
    """Forward and backward, for images, weight and bias."""
    torch.manual_seed(0)
    kept = [3, 7, 16]
    layer = lively_norm(16)
    mask = prefix_mask([[count] for count in kept], [16])
    features = (masked(torch.randn(6, *shape, 16) + offset, mask)).requires_grad_()
    wanted = torch.randn(6, *shape, 16)

    found = masked_layer_norm(features, layer.weight, layer.bias, mask)
    (found * wanted).sum().backward()
    of_features, of_weight, of_bias = (
        tensor.grad.clone()  # type: ignore[union-attr]
        for tensor in (features, layer.weight, layer.bias)
    )
    for tensor in (features, layer.weight, layer.bias):
        tensor.grad = None

    for image in range(6):
        count = kept[image // 2]
        sliced = nn.LayerNorm(count)
        sliced.weight = nn.Parameter(layer.weight[:count].detach().clone())
        sliced.bias = nn.Parameter(layer.bias[:count].detach().clone())
        given = features[image, ..., :count].detach().clone().requires_grad_()
        expected = sliced(given)
        torch.testing.assert_close(found[image, ..., :count], expected, rtol=1e-5, atol=1e-5)
        assert not found[image, ..., count:].any()
        (expected * wanted[image, ..., :count]).sum().backward()
        torch.testing.assert_close(of_features[image, ..., :count], given.grad, rtol=1e-5, atol=1e-5)
        assert not of_features[image, ..., count:].any()
        assert sliced.weight.grad is not None
        assert sliced.bias.grad is not None
        of_weight[:count] -= sliced.weight.grad
        of_bias[:count] -= sliced.bias.grad
    torch.testing.assert_close(of_weight, torch.zeros(16), rtol=0, atol=1e-5)  # nothing is left of their sums
    torch.testing.assert_close(of_bias, torch.zeros(16), rtol=0, atol=1e-5)


def test_masked_layer_norm_has_the_gradients_of_finite_differences() -> None:
    torch.manual_seed(0)
    mask = prefix_mask([[2], [4]], [4]).double()
    features = masked(torch.randn(2, 3, 4, dtype=torch.float64), mask).requires_grad_()
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def normalised(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_layer_norm(masked(features, mask), weight, bias, mask)

    assert torch.autograd.gradcheck(normalised, (features, weight, bias))


def test_masked_layer_norm_keeps_as_much_for_backward_as_layer_norm() -> None:
    """One tensor of the features' size: the features."""

    def large_saved(mask: Tensor | None) -> int:
        layer = PrefixNorm(64)
        layer.mask = mask
        features = masked(torch.randn(4, 50, 64), prefix_mask([[32], [64]], [64])).requires_grad_()
        seen: set[int] = set()

        def keep(tensor: Tensor) -> Tensor:
            if tensor.numel() == features.numel():
                seen.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(features)
        return len(seen)

    assert large_saved(prefix_mask([[32], [64]], [64])) == large_saved(None) == 1


# Layers at one size ----------------------------------------------------------------------------------------------


def test_a_linear_layer_takes_the_first_heads_and_dimensions() -> None:
    layer = PrefixLinear((2,), (2, 3))
    with torch.no_grad():
        layer.weight.copy_(torch.arange(12.0).view(6, 2))
        layer.bias.copy_(torch.arange(6.0))
    layer.keep((1,), (2, 2))
    # Rows 0, 1 of the first head, 3, 4 of the second; of each the first column.
    assert layer(torch.ones(1, 1)).tolist() == [[0 + 0, 2 + 1, 6 + 3, 8 + 4]]
    plain = layer.plain()
    assert type(plain) is nn.Linear
    assert plain.weight.tolist() == [[0], [2], [6], [8]]
    assert plain.bias.tolist() == [0, 1, 3, 4]


def small_layers() -> Sequence[tuple[nn.Module, tuple[object, ...], Tensor, type[nn.Module]]]:
    return [
        (PrefixLinear((6,), (4,)), ((3,), (2,)), torch.randn(2, 5, 3), nn.Linear),
        (PrefixLinear((2, 3), (4,)), ((2, 2), (3,)), torch.randn(2, 5, 4), nn.Linear),
        (PrefixConv2d(6, 4, 3, 2, padding=1), (3, 2), torch.randn(2, 3, 8, 8), nn.Conv2d),
        (lively_norm(6), (4,), torch.randn(2, 5, 4), nn.LayerNorm),
    ]


@pytest.mark.parametrize("number", range(4))
def test_the_plain_layer_gives_what_the_corner_gives_and_learns_by_itself(number: int) -> None:
    torch.manual_seed(0)
    layer, sizes, features, kind = small_layers()[number]
    layer.keep(*sizes)  # type: ignore[operator]
    plain = layer.plain()  # type: ignore[operator]
    assert type(plain) is kind
    torch.testing.assert_close(plain(features), layer(features), rtol=0, atol=0)
    before = layer(features).detach()
    with torch.no_grad():
        for weight in plain.parameters():
            weight.zero_()
    assert torch.equal(layer(features), before)
    assert all(weight.requires_grad for weight in plain.parameters())


def test_only_the_corner_that_is_kept_gets_a_gradient() -> None:
    layer = PrefixLinear((6,), (4,))
    layer.keep((3,), (2,))
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.nonzero().amax(0).tolist() == [1, 2]


def test_a_plain_copy_of_a_network_has_no_layer_of_this_kind() -> None:
    network = nn.Sequential(PrefixLinear((4,), (4,)), nn.Sequential(ChannelDrop(4), PrefixNorm(4)), PrefixDropPath(4))
    assert [type(layer) for layer in make_plain(network).modules()] == [
        nn.Sequential, nn.Linear, nn.Sequential, nn.Identity, nn.LayerNorm, DropPath,
    ]  # fmt: skip


# Drop path -------------------------------------------------------------------------------------------------------


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25)
    added = layer(torch.zeros(4000, 1, 2), torch.ones(4000, 1, 2))
    assert set(added.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(added[..., 0], added[..., 1])
    assert added.mean().item() == pytest.approx(1, abs=0.05)
    assert layer.eval()(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)).item() == 1


def test_a_branch_adds_nothing_to_channels_and_blocks_that_a_subnet_does_not_have() -> None:
    layer = PrefixDropPath(2)
    layer.mask = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert layer(torch.full((3, 2), 5.0), torch.ones(3, 2)).tolist() == [[6, 5], [5, 5], [6, 6]]


def test_drop_path_and_masks_go_together() -> None:
    torch.manual_seed(0)
    layer = PrefixDropPath(2)
    layer.rate, layer.mask = 0.5, torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    added = layer(torch.zeros(400, 1, 2), torch.ones(400, 1, 2))[:, 0]
    assert set(map(tuple, added[:200].tolist())) == {(0.0, 0.0), (2.0, 0.0)}
    assert set(map(tuple, added[200:].tolist())) == {(0.0, 0.0), (2.0, 2.0)}


# Several at once -------------------------------------------------------------------------------------------------


class Recorder:
    """A supernet as `several_at_once` needs it."""

    def __init__(self, active: Subnet) -> None:
        self.active = active
        self.masked: tuple[Subnet, ...] = ()

    def activate(self, subnet: Subnet | None) -> None:
        assert subnet is not None
        self.active, self.masked = subnet, ()

    def set_masks(self, subnets: Sequence[Subnet]) -> None:
        self.active, self.masked = SPACE.largest, tuple(subnets)


SPACE = SearchSpace({"width": (1, 2)})


def test_the_model_is_as_before_afterwards() -> None:
    model = Recorder(SPACE.smallest)
    with several_at_once(model, [SPACE.largest]):
        with several_at_once(model, [SPACE.largest, SPACE.smallest]):
            assert model.masked == (SPACE.largest, SPACE.smallest)
        assert model.masked == (SPACE.largest,)
    assert model.masked == ()
    assert model.active == SPACE.smallest


def test_the_model_is_as_before_after_an_error() -> None:
    model = Recorder(SPACE.smallest)

    def fail() -> None:
        with several_at_once(model, [SPACE.largest]):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.masked == ()
    assert model.active == SPACE.smallest


def test_a_network_that_runs_alone_in_between_leaves_the_masks_as_they_were() -> None:
    model = Recorder(SPACE.smallest)
    with several_at_once(model, [SPACE.largest, SPACE.smallest]):
        with activated(model, SPACE.smallest):
            assert model.masked == ()
        assert model.masked == (SPACE.largest, SPACE.smallest)
    assert model.masked == ()
    assert model.active == SPACE.smallest
