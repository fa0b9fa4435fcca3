"""A basis layer convolves each image with its own mixed kernel, whichever way it is computed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.cost.macs import count_macs
from dance_seg.models import basis_layers
from dance_seg.models.basis_layers import BasisConv2d, basis_kernels, handed, of_last_stages, to_basis_layers
from dance_seg.models.smp import build_network

SHAPES = {
    "plain 3x3": {"kernel_size": 3, "padding": 1},
    "1x1 without bias": {"kernel_size": 1, "bias": False},
    "stride and dilation": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (2, 4), "dilation": 2},
    "two groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 5, "groups": 8, "padding": 2, "stride": 2},
    "same": {"kernel_size": 3, "padding": "same", "bias": False},
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def shares(images: int, bases: int) -> Tensor:
    return torch.randn(images, bases).softmax(-1)


def run(layer: BasisConv2d, features: Tensor, coefficients: Tensor) -> Tensor:
    with handed([layer], coefficients[:, None]):
        return layer(features)


def with_biases(layer: BasisConv2d) -> BasisConv2d:
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def by_hand(layer: BasisConv2d, convolution: nn.Conv2d, features: Tensor, coefficients: Tensor) -> Tensor:
    """sum_n alpha_n (W_n * x + b_n), written out for each image."""
    outputs = []
    for image, alpha in zip(features, coefficients, strict=True):
        kernel = sum(a * w[..., 0] for a, w in zip(alpha, layer.weight, strict=True))
        bias = sum(a * b for a, b in zip(alpha, layer.bias, strict=True)) if layer.bias is not None else None
        shape: Any = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        outputs.append(F.conv2d(image[None], kernel, bias, *shape))
    return torch.cat(outputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("way", ["auto", "grouped", "one_by_one", "loop"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_way_is_the_sum_of_the_bases(shape: dict, way: str, layout: torch.memory_format) -> None:
    convolution = nn.Conv2d(8, 16, **shape)
    layer = with_biases(BasisConv2d(convolution, bases=4, synthesis=way)).to(memory_format=layout)  # type: ignore
    features = torch.randn(3, 8, 9, 12).contiguous(memory_format=layout)
    coefficients = shares(3, 4)
    expected = by_hand(layer, convolution, features, coefficients)
    for images in (3, 1):
        made = run(layer, features[:images], coefficients[:images])
        torch.testing.assert_close(made, expected[:images], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("way", ["grouped", "one_by_one"])
def test_large_kernels_are_mixed_and_used_for_some_channels_at_a_time(
    way: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis_layers, "KERNELS_AT_ONCE", 3 * 40 * 8 * 9 * 4)  # of three images, 40 channels
    mixed: list[int] = []
    mix = basis_layers.mixed_kernels
    monkeypatch.setattr(
        basis_layers,
        "mixed_kernels",
        lambda alpha, weight, bias: mixed.append(weight.shape[1]) or mix(alpha, weight, bias),
    )
    convolution = nn.Conv2d(8, 80, 3, padding=1)
    layer = with_biases(BasisConv2d(convolution, bases=4, synthesis=way)).to(memory_format=layout)  # type: ignore
    features = torch.randn(3, 8, 9, 12).contiguous(memory_format=layout)
    coefficients = shares(3, 4)

    with torch.no_grad():
        made = run(layer, features, coefficients)

    assert mixed == [64, 16]  # 40 at a time, in steps of 32
    assert made.is_contiguous(memory_format=layout)
    torch.testing.assert_close(made, by_hand(layer, convolution, features, coefficients), atol=1e-5, rtol=1e-5)
    mixed.clear()
    run(layer, features, coefficients)  # what is kept for gradients would not fit the cache anyway
    assert mixed == [80]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_way_has_the_same_gradients(shape: dict) -> None:
    layer = with_biases(BasisConv2d(nn.Conv2d(8, 16, **shape), bases=3))
    features, coefficients = torch.randn(2, 8, 9, 12), shares(2, 3)
    found = []
    for way in ("grouped", "one_by_one", "loop"):
        layer.synthesis = way  # type: ignore[assignment]
        inputs = features.clone().requires_grad_(), coefficients.clone().requires_grad_()
        wanted = [*inputs, *layer.parameters()]
        found.append(torch.autograd.grad(run(layer, *inputs).square().mean(), wanted))
    for other in found[1:]:
        for gradient, reference in zip(other, found[0], strict=True):
            torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["auto", "grouped", "one_by_one", "loop"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_basis_is_the_plain_convolution_bit_for_bit(shape: dict, way: str) -> None:
    convolution = nn.Conv2d(8, 16, **shape)
    features = torch.randn(3, 8, 9, 12)
    layer = BasisConv2d(convolution, bases=1, synthesis=way)  # type: ignore[arg-type]
    assert torch.equal(run(layer, features, torch.ones(3, 1)), convolution(features))


def test_the_first_basis_is_the_convolution_and_the_others_are_as_large() -> None:
    kernel = 0.05 * torch.randn(64, 64, 3, 3)
    kernels = basis_kernels(kernel, 4, around=None)
    assert torch.equal(kernels[0], kernel)
    assert kernels.std((1, 2, 3, 4)).allclose(torch.tensor(0.05), rtol=0.02)
    assert torch.corrcoef(kernels.flatten(1)).triu(1).abs().max() < 0.02  # draws of their own


def test_around_pretrained_weights_bases_stay_near_them() -> None:
    kernel = torch.randn(64, 64, 3, 3)
    kernels = basis_kernels(kernel, 3, around=0.3)
    assert torch.equal(kernels[0], kernel)
    assert (kernels[1:] - kernel).std((1, 2, 3, 4)).allclose(torch.tensor(0.3), rtol=0.02)


def test_coefficients_are_gone_after_an_error_too() -> None:
    layer = BasisConv2d(nn.Conv2d(4, 4, 3), 2)
    with pytest.raises(RuntimeError, match="Expected"), handed([layer], shares(2, 2)[:, None]):
        layer(torch.zeros(2, 4, 1, 1, 1))
    assert layer.coefficients is None
    with pytest.raises(RuntimeError, match="no coefficients"):
        layer(torch.zeros(2, 4, 8, 8))


def test_coefficients_of_another_batch_are_refused() -> None:
    layer = BasisConv2d(nn.Conv2d(4, 4, 3), 2)
    with pytest.raises(RuntimeError, match=r"\(3, 2\) for 2 images"):
        run(layer, torch.zeros(2, 4, 8, 8), shares(3, 2))
    with pytest.raises(ValueError, match=r"\(B, 1, N\)"), handed([layer], torch.ones(2, 2, 2)):
        pass


def test_coefficients_are_no_part_of_the_state() -> None:
    layer = BasisConv2d(nn.Conv2d(4, 4, 3), 2)
    with handed([layer], shares(1, 2)[:, None]):
        assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("way", ["grouped", "one_by_one"])
def test_mixing_kernels_counts_a_mac_per_weight_and_basis(way: str) -> None:
    """4 -> 6 channels of 3x3 at 10 x 12: 5 bases mixed, 216 weights and 6 biases each, then one convolution."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BasisConv2d(nn.Conv2d(4, 6, 3, padding=1), 5, way)  # type: ignore[arg-type]

        def forward(self, images: Tensor) -> Tensor:
            return run(self.layer, images, torch.ones(len(images), 5, device=images.device))

    for batch in (1, 3):
        cost = count_macs(Mixed(), (10, 12), in_channels=4, batch=batch)
        assert cost.macs == 5 * (216 + 6) + 216 * 10 * 12
        assert cost.uncounted == ()


# Choosing -------------------------------------------------------------------------------------------------------------


def encoder(name: str, **options: object) -> nn.Module:
    return build_network("fpn", name, 3, None, options)[0].encoder  # type: ignore[return-value]


def test_the_last_two_stages_of_a_resnet_are_its_layers_3_and_4() -> None:
    expected = [f"layer{stage}.{block}.conv{n}" for stage in (3, 4) for block in (0, 1) for n in (1, 2)]
    assert of_last_stages(encoder("resnet18")) == expected
    assert of_last_stages(encoder("resnet18"), stages=1) == expected[4:]


def test_dilation_counts_as_the_stride_that_it_replaces() -> None:
    dilated = build_network("deeplabv3plus", "resnet18", 3, None, {"encoder_output_stride": 16})[0].encoder
    assert of_last_stages(dilated) == of_last_stages(encoder("resnet18"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm-mobilenetv3_small_minimal_100", "tu-resnet10t", "mit_b0"])
def test_other_encoders_have_basis_layers_too(name: str) -> None:
    network = encoder(name)
    layers = to_basis_layers(network, 2)
    assert layers == [module for module in network.modules() if isinstance(module, BasisConv2d)]
    assert all(max(layer.weight.shape[3:5]) > 1 for layer in layers)
    with handed(layers, torch.full((2, len(layers), 2), 0.5)):
        assert network.eval()(torch.randn(2, 3, 64, 96))[-1].shape[2:] == (2, 3)


def test_looking_for_stages_leaves_modes_and_statistics() -> None:
    network = encoder("resnet18")
    network.layer1.eval()  # type: ignore[union-attr]
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    of_last_stages(network)
    assert [network.training, network.layer1.training, network.layer2.training] == [True, False, True]  # type: ignore
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


def test_layers_are_chosen_by_path_or_predicate() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 8, 3))

    by_path, by_predicate = network(), network()
    assert len(to_basis_layers(by_path, 2, at=["2", "1.0"])) == 2
    assert [type(layer) is BasisConv2d for layer in (by_path[0], *by_path[1].children(), by_path[2])] == [
        False,
        True,
        True,
    ]
    to_basis_layers(by_predicate, 2, at=lambda name, layer: layer.in_channels == 3)
    assert [type(layer) is BasisConv2d for layer in by_predicate] == [True, False, False]


class OwnConvolution(nn.Conv2d):
    """Does something of its own."""


def test_what_cannot_be_a_basis_layer_is_named() -> None:
    with pytest.raises(ValueError, match="'5' is no convolution"):
        to_basis_layers(nn.Sequential(nn.Conv2d(3, 8, 3)), 2, at=["5"])
    with pytest.raises(ValueError, match="chooses none of the 1"):
        to_basis_layers(nn.Sequential(nn.Conv2d(3, 8, 3)), 2, at=lambda name, layer: False)
    with pytest.raises(ValueError, match="0 cannot become a basis layer: a OwnConvolution"):
        to_basis_layers(nn.Sequential(OwnConvolution(3, 8, 3)), 2, at=["0"])
    with pytest.raises(ValueError, match="padding_mode is 'reflect'"):
        BasisConv2d(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), 2)
    with pytest.raises(ValueError, match="encoder_name: Sequential has no plain"):
        of_last_stages(nn.Sequential(OwnConvolution(3, 8, 3)))
    with pytest.raises(ValueError, match=r"model\.args\.bases is 0"):
        BasisConv2d(nn.Conv2d(3, 8, 3), 0)
    with pytest.raises(ValueError, match="synthesis is 'fast'; choose one of auto, grouped"):
        BasisConv2d(nn.Conv2d(3, 8, 3), 2, "fast")  # type: ignore[arg-type]
