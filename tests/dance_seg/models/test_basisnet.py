"""BasisNet previews, answers or builds a specialist, and does no work for images that are answered."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dance_seg.build import build_model, model_of_record
from dance_seg.cost.macs import count_macs, count_training_macs
from dance_seg.early_exit.exits import Outputs, full_size
from dance_seg.models.basis_layers import BasisConv2d
from dance_seg.models.basisnet import BasisNet, Mixer, shrunk, variation
from dance_seg.models.smp import SmpModel
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.network_slimming.groups import find_groups
from dance_seg.network_slimming.structure import restructure, structure_record
from dance_seg.network_slimming.surgery import cut, silence
from dance_seg.part import Part
from dance_seg.recipe import load_recipe, recipe_record
from tests.contracts import check_cost_is_counted, check_logits_have_the_size_of_the_images, check_state_can_be_kept
from tools.bench.slimming import enliven

LIGHT = "timm-mobilenetv3_small_minimal_100"


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small(**options: Any) -> BasisNet:
    given: dict[str, Any] = {"encoder_name": LIGHT, "preview_encoder": LIGHT, "bases": 3, "basis_stages": 1}
    return BasisNet(4, **{**given, **options})


def opinionated(**options: Any) -> BasisNet:
    """A fresh mixer says nearly the same of all images; this one does not."""
    model = small(**options)
    enliven(model, torch.randn(4, 3, 96, 64))
    nn.init.normal_(model.mixer.mixing.weight, std=0.5)
    return model.eval()


def counted_calls(model: BasisNet) -> dict[str, list[int]]:
    """The number of images of each call of a part, by its name, while the model runs."""
    parts: dict[str, nn.Module] = {
        "preview": model.preview.encoder,
        "head": model.preview.head,
        "mixer": model.mixer.hidden,
        "specialist": model.specialist.network,
    }
    calls: dict[str, list[int]] = {name: [] for name in parts}

    def counting(name: str) -> Callable[..., None]:
        return lambda module, inputs: calls[name].append(len(inputs[0]))

    for name, part in parts.items():
        part.register_forward_pre_hook(counting(name))
    return calls


# A network like any other ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"hand_over": False, "coefficients": "sigmoid"}, {"arch": "unet"}])
def test_it_meets_the_contract_in_evaluation(options: dict[str, Any]) -> None:
    model = small(**options)
    check_logits_have_the_size_of_the_images(model, 4, ((45, 67), (96, 128), (1, 1), (33, 200)))
    check_state_can_be_kept(lambda: small(**options), model, (45, 67))
    check_cost_is_counted(model, (96, 128))


def test_weights_in_a_file_are_loaded_into_both_encoders_and_not_asked_for_again(tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp
    from safetensors.torch import save_file

    path = tmp_path / "encoder.safetensors"
    values = smp.encoders.get_encoder("resnet18", weights=None).state_dict()
    save_file({name: torch.full_like(value, 0.5) for name, value in values.items()}, path)
    encoders = {"encoder_name": "resnet18", "preview_encoder": "resnet18", "bases": 2}
    files = {"encoder_weights": str(path), "preview_weights": str(path)}
    recipe = replace(load_recipe("recipes/shapes_basisnet.yaml"), model=Part("basisnet", {**encoders, **files}))
    model: Any = build_model(recipe, 3)
    assert all((weight == 0.5).all() for weight in model.preview.encoder.parameters())
    early = model.specialist.network.encoder.layer1  # the later ones are mixed of bases
    assert all((weight == 0.5).all() for weight in early.parameters())
    path.unlink()
    record = {"recipe": recipe_record(recipe), "labels": {"classes": ["a", "b", "c"]}}
    again = model_of_record(record, None, model.state_dict(), at="here")
    own = again.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"hand_over": False}, {"coefficients": "sigmoid"}, {"preview_scale": 0.3}])
def test_every_weight_learns_from_both_exits(options: dict[str, Any]) -> None:
    model = small(**options).train()
    outputs = model(torch.randn(2, 3, 70, 90))
    assert isinstance(outputs, Outputs)
    assert [tuple(logits.shape) for logits in outputs.logits] == [(2, 4, 70, 90)] * 2
    sum(logits.square().mean() for logits in outputs.logits).backward()  # type: ignore[union-attr]
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not without
    assert count_training_macs(model, (64, 64)).uncounted == ()


def test_with_one_basis_and_no_preview_it_is_the_plain_network_bit_for_bit() -> None:
    torch.manual_seed(3)
    plain = SmpModel(arch="fpn", encoder_name="resnet18", num_classes=4)
    torch.manual_seed(3)
    model = BasisNet(4, preview_encoder=LIGHT, bases=1, hand_over=False)
    assert len(model.layers) == 8
    images = torch.randn(3, 3, 70, 90)
    assert torch.equal(model.eval()(images), plain.eval()(images))
    outputs = model.train()(images)
    plain.train()
    torch.manual_seed(3)  # FPN has a dropout
    expected = plain(images)
    torch.manual_seed(3)
    trained = full_size(model._specialise(model._padded(images), torch.ones(3, 8, 1), None), (70, 90))
    assert torch.equal(trained, expected)
    assert outputs.logits[1].shape == expected.shape


def test_it_runs_in_bf16_and_channels_last() -> None:
    # An opinionated mixer would amplify how bfloat16 rounds: 0.03 to 0.09 by its draw.
    model = small().eval().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        training = model.train()(images)
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()
    sum(own.float().square().mean() for own in training.logits).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


# Lazy -----------------------------------------------------------------------------------------------------------------


def test_the_specialist_does_not_run_for_images_that_are_answered() -> None:
    model = opinionated()
    calls = counted_calls(model)
    walk = model.exits(torch.randn(4, 3, 64, 64))
    next(walk)
    assert calls == {"preview": [4], "head": [4], "mixer": [], "specialist": []}
    walk.close()
    assert calls["specialist"] == []


def test_survivors_get_what_they_would_get_alone() -> None:
    model = opinionated()
    images = torch.randn(4, 3, 64, 96)
    calls = counted_calls(model)
    walk = model.exits(images)
    first = next(walk)
    second = walk.send(torch.tensor([3, 1]))
    assert calls == {"preview": [4], "head": [4], "mixer": [2], "specialist": [2]}
    assert first is not None
    assert second is not None
    assert tuple(first.logits.shape) == (4, 4, 8, 12)  # 1/8 of the image
    torch.testing.assert_close(full_size(second, (64, 96)), model(images[[3, 1]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("hand_over", "heads"), [(True, [2]), (False, [])])
def test_an_unwanted_preview_is_only_computed_to_be_handed_over(hand_over: bool, heads: list[int]) -> None:
    model = opinionated(hand_over=hand_over)
    calls = counted_calls(model)
    walk = model.exits(torch.randn(2, 3, 64, 64), (False, True))
    assert next(walk) is None
    assert next(walk) is not None
    assert calls == {"preview": [2], "head": heads, "mixer": [2], "specialist": [2]}


def test_an_unwanted_specialist_does_not_run() -> None:
    model = opinionated()
    calls = counted_calls(model)
    assert [exit is None for exit in model.exits(torch.randn(2, 3, 64, 64), (True, False))] == [False, True]
    assert calls["specialist"] == calls["mixer"] == []


def test_evaluation_is_the_last_exit_and_training_gives_both() -> None:
    model = opinionated(basis_dropout=0.0)
    images = torch.randn(2, 3, 45, 67)
    first, second = (full_size(exit, (45, 67)) for exit in model.exits(images) if exit is not None)
    assert torch.equal(model(images), second)
    for module in model.modules():  # as in training but for the norms and FPN's dropout
        module.training = module in (model, model.mixer)
    outputs = model(images)
    torch.testing.assert_close(outputs.logits, (first, second), atol=1e-5, rtol=1e-5)


# Kernels of their own -------------------------------------------------------------------------------------------------


def test_two_images_get_two_kernels() -> None:
    model = opinionated()
    one, two = model.coefficients(torch.stack([torch.zeros(3, 64, 64), torch.randn(3, 64, 64)]))
    assert (one - two).abs().max() > 0.01
    weight = model.layers[0].weight
    assert not torch.allclose(one[0] @ weight.flatten(1), two[0] @ weight.flatten(1))


@pytest.mark.parametrize("way", ["auto", "grouped", "one_by_one", "loop"])
def test_changing_one_image_leaves_the_others(way: Any) -> None:
    model = opinionated(synthesis=way)
    images = torch.randn(3, 3, 64, 64)
    before = model(images)
    images[1] = 3 * torch.randn(3, 64, 64)
    after = model(images)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], atol=1e-6, rtol=0)
    assert (after[1] - before[1]).abs().max() > 0.01


@pytest.mark.parametrize("way", ["grouped", "one_by_one", "loop"])
def test_a_batch_gives_what_its_images_give(way: Any) -> None:
    model = opinionated(basis_stages=2).double()  # rounding grows from layer to layer
    images = torch.randn(3, 3, 64, 64).double()
    alone = torch.cat([model(image[None]) for image in images])
    model.set_synthesis(way)
    torch.testing.assert_close(model(images), alone, atol=1e-9, rtol=0)


def test_gradients_reach_the_preview_through_the_coefficients_alone() -> None:
    model = small(hand_over=False, load_balance=0.0).train()
    outputs = model(torch.randn(2, 3, 64, 64))
    outputs.logits[1].square().mean().backward()
    gradients = [weight.grad for weight in model.preview.encoder.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients if gradient is not None) > 0
    assert all(weight.grad is None for weight in model.preview.head.parameters())


def test_the_previews_logits_are_added_with_beta() -> None:
    model = opinionated()
    images = torch.randn(2, 3, 64, 64)
    first, second = model.exits(images)
    assert first is not None
    assert second is not None
    assert model.beta is not None
    model.beta.data.zero_()
    alone = model.coarse_logits(images).logits
    beside = F.interpolate(first.logits, size=alone.shape[-2:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(second.logits, alone + 0.5 * beside)


def test_mixing_costs_a_mac_per_basis_and_weight() -> None:
    """The second basis doubles the mixing and changes nothing else but the mixer's last layer."""
    two, three = (small(bases=bases) for bases in (2, 3))
    weights = sum(layer.weight[0].numel() for layer in two.layers)
    biases = sum(layer.bias[0].numel() for layer in two.layers if layer.bias is not None)
    more = count_macs(three, (64, 96)).macs - count_macs(two, (64, 96)).macs
    assert more == weights + biases + 64 * len(two.layers)


# Coefficients ---------------------------------------------------------------------------------------------------------


def mixer(squash: Any = "softmax", dropout: float = 0.0, bases: int = 4) -> Mixer:
    made = Mixer(8, 16, 5, bases, squash, dropout)
    nn.init.normal_(made.mixing.weight)
    return made


def test_coefficients_of_a_layer_sum_to_one() -> None:
    coefficients = mixer()(torch.randn(6, 8, 2, 3))
    assert tuple(coefficients.shape) == (6, 5, 4)
    torch.testing.assert_close(coefficients.sum(-1), torch.ones(6, 5))


def test_sigmoid_coefficients_are_independent() -> None:
    coefficients = mixer("sigmoid")(torch.randn(6, 8, 2, 3))
    assert ((coefficients > 0) & (coefficients < 1)).all()
    assert (coefficients.sum(-1) - 1).abs().max() > 0.1


@pytest.mark.parametrize("squash", ["softmax", "sigmoid"])
def test_dropout_leaves_out_bases_but_never_all_and_makes_up_for_it(squash: Any) -> None:
    dropping = mixer(squash, dropout=0.5, bases=3)
    mixing = torch.zeros(4000, 1, 3)
    drawn = dropping.drawn(mixing)
    kept = drawn > 0
    assert kept.any(-1).all()
    torch.testing.assert_close(drawn.sum(-1), dropping.squashed(mixing).sum(-1))
    # Each is left out half the time, but for one draw in eight, in which all would be and none is.
    assert (~kept).float().mean().item() == pytest.approx(0.5 - 1 / 8, abs=0.02)


def test_dropout_does_not_break_where_one_basis_has_all_the_weight() -> None:
    drawn = mixer(dropout=0.5).drawn(torch.tensor([200.0, 0.0, 0.0, 0.0]).expand(500, 1, 4))
    assert torch.isfinite(drawn).all()
    torch.testing.assert_close(drawn.sum(-1), torch.ones(500, 1))


def test_evaluation_draws_nothing() -> None:
    model = opinionated(basis_dropout=0.5)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), model(images))
    model.mixer.train()
    assert not torch.equal(model.mixer.drawn(torch.zeros(9, 5, 3)), model.mixer.drawn(torch.zeros(9, 5, 3)))


def test_the_temperature_falls_linearly_and_stays() -> None:
    model = small(temperature=(30.0, 1.0), anneal_until=0.1)
    assert model.mixer.temperature == 1  # told nothing
    found = []
    for progress in (0.0, 0.05, 0.1, 1.0, 0.05):
        model.set_progress(progress)
        found.append(model.mixer.temperature.item())
    assert found == pytest.approx([30.0, 15.5, 1.0, 1.0, 15.5])
    at_once = small(anneal_until=0.0)
    at_once.set_progress(0.0)
    assert at_once.mixer.temperature == 1


def test_a_high_temperature_makes_coefficients_alike_and_is_kept_in_the_state() -> None:
    model = opinionated()
    images = torch.randn(2, 3, 64, 64)
    final = model.coefficients(images)
    model.set_progress(0.0)
    early = model.coefficients(images)
    assert (early - 1 / 3).abs().max() < (final - 1 / 3).abs().max() / 5
    loaded = small().eval()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(images), model(images))


def test_the_penalty_is_the_squared_variation_of_the_batchs_mean() -> None:
    """Layer 1: (0.75, 0.25), so (0.25 / 0.5) ** 2; layer 2: balanced over the batch, though not in an image."""
    coefficients = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])
    assert variation(coefficients).item() == pytest.approx((0.25 + 0) / 2)
    model = small(load_balance=0.5, basis_dropout=0.0).train()
    model.mixer.mixing.weight.data.zero_()
    model.mixer.mixing.bias.data.copy_(torch.tensor([math.log(2.0), 0.0, 0.0]).repeat(len(model.layers)))
    penalty = model(torch.randn(2, 3, 64, 64)).penalty
    assert penalty.item() == pytest.approx(0.5 * (2 / 144) / (1 / 9))  # (1/2, 1/4, 1/4)
    assert small(load_balance=0.0).train()(torch.randn(2, 3, 64, 64)).penalty is None


def test_the_preview_sees_means_of_pixels() -> None:
    images = torch.randn(1, 3, 6, 9)
    by_three = shrunk(images, (2, 3))
    assert by_three[0, 0, 0, 0].item() == pytest.approx(images[0, 0, :3, :3].mean().item(), abs=1e-6)
    assert shrunk(images, (6, 9)) is images
    torch.testing.assert_close(shrunk(images, (4, 5)), F.adaptive_avg_pool2d(images, (4, 5)))


# Network slimming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [LIGHT, pytest.param("resnet18", marks=pytest.mark.slow)])
def test_a_cut_network_equals_the_one_with_those_channels_zeroed(encoder: str) -> None:
    """Basis layers lose channels as plain ones do, however they compute."""
    model = small(encoder_name=encoder, bases=2)
    images = torch.randn(2, 3, 64, 64)
    enliven(model, images)
    groups = find_groups(model.eval(), (64, 64))
    model, images = model.double(), images.double()
    assert {f"specialist.network.encoder.{name}.weight" for name, _ in basis_layers(model)} <= {
        member.tensor for group in groups for member in group.members
    }
    kept = [torch.arange(0, group.channels, 2).numpy() for group in groups]
    silenced, thin = deepcopy(model), deepcopy(model)
    silence(silenced, groups, kept)
    cut(thin, groups, kept)
    assert all(new.weight.numel() < old.weight.numel() for new, old in zip(thin.layers, model.layers, strict=True))
    expected = silenced(images)
    rounding = 1e-13 * expected.abs().max().item()  # these logits reach 2e5, of which 1e-9 is less than doubles hold
    torch.testing.assert_close(thin(images), expected, atol=rounding, rtol=0)
    again = small(encoder_name=encoder, bases=2).double()
    restructure(again, structure_record(thin))
    again.load_state_dict(thin.state_dict())
    assert torch.equal(again.eval()(images), thin(images))


def basis_layers(model: BasisNet) -> list[tuple[str, BasisConv2d]]:
    encoder: Any = model.specialist.network.encoder
    return [(name, module) for name, module in encoder.named_modules() if isinstance(module, BasisConv2d)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "loop"])
def test_slimming_cuts_it_and_it_trains_on(way: Any) -> None:
    model = small(synthesis=way)
    before = sum(weight.numel() for weight in model.parameters())
    slim(model, NetworkSlimming(keep=0.5, importance="magnitude", round_to=4), input_size=(64, 64))
    assert sum(weight.numel() for weight in model.parameters()) < before
    outputs = model.train()(torch.randn(2, 3, 70, 90))
    sum(logits.square().mean() for logits in outputs.logits).backward()
    assert tuple(model.eval()(torch.randn(1, 3, 70, 90)).shape) == (1, 4, 70, 90)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bases", 0),
        ("bases", True),
        ("basis_stages", 0),
        ("preview_channels", 2.5),
        ("hidden", 0),
        ("preview_scale", 0),
        ("preview_scale", 1.5),
        ("anneal_until", -0.1),
        ("basis_dropout", 1.0),
        ("load_balance", -1),
        ("load_balance", math.inf),
        ("temperature", 30),
        ("temperature", (30.0, 0.0)),
        ("coefficients", "relu"),
        ("synthesis", "fast"),
        ("hand_over", 1),
        ("preview_encoder", "mobilenet_v9"),
        ("encoder_name", "resnet19"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.args\.{option}"):
        small(**{option: value})


def test_a_preview_for_one_size_of_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.args\.preview_encoder"):
        small(preview_encoder="tu-resnet19")


def test_one_image_per_batch_that_cannot_train_is_explained() -> None:
    with pytest.raises(ValueError, match=r"model\.args\.preview"):
        small().train()(torch.randn(1, 3, 32, 32))
