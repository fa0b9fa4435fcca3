"""JITNet is the published network, takes any size, and normalises each frame by what it was told to."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dance_seg.batch_norm import reestimate_batch_norm, set_bn_online
from dance_seg.build import build_model
from dance_seg.cost.macs import count_macs
from dance_seg.models import MODELS
from dance_seg.models.jitnet import Block, JITNet
from dance_seg.models.smp import SmpModel
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.network_slimming.structure import restructure, structure_record
from dance_seg.network_slimming.surgery import silence
from tests.contracts import check_model
from tests.tiny import tiny
from tools.bench.slimming import enliven, fault_after_cut


def small(bn_online: str = "frame", **options: object) -> JITNet:
    return JITNet(5, width=0.25, bn_online=bn_online, **options)  # type: ignore[arg-type]


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def differ(before: dict[str, Tensor], model: nn.Module) -> list[bool]:
    return [not torch.equal(before[name], buffer) for name, buffer in model.named_buffers() if "running" in name]


@pytest.mark.parametrize("bn_online", ["frame", "running", "frozen"])
def test_it_meets_the_contract(bn_online: str) -> None:
    check_model(lambda: small(bn_online), num_classes=5, sizes=((45, 67), (96, 128), (1, 1)))


def test_the_published_widths_make_three_million_parameters() -> None:
    """Convolutions by hand, without norms and biases: stem, encoder, decoder on [encoder, decoder], head, logits."""
    stem = 9 * (3 * 16 + 16 * 64)
    encoder = (9 * 64 + 6 * 128 + 64) * 128 + (9 * 128 + 6 * 128) * 128 + (9 * 128 + 6 * 256 + 128) * 256
    decoder = (9 + 6) * 256**2 + (9 * 384 + 6 * 128 + 384) * 128 + (9 * 256 + 6 * 64 + 256) * 64
    head = 9 * (64 * 64 + 64 * 16) + 16 * 11
    model = JITNet(11)
    assert sum(weight.numel() for weight in model.parameters() if weight.ndim == 4) == stem + encoder + decoder + head
    assert sum(weight.numel() for weight in model.parameters()) == 2_971_243


def test_macs_of_a_block_counted_by_hand() -> None:
    """8 -> 16 channels, stride 2, at 10 x 12: 30 outputs a channel of 3x3, 1x3, 3x1 and the 1x1 shortcut."""
    cost = count_macs(Block(8, 16, stride=2), (10, 12), in_channels=8)
    assert cost.macs == 5 * 6 * 16 * (9 * 8 + 3 * 16 + 3 * 16 + 8)
    assert cost.uncounted == ()


def test_macs_of_the_network_counted_by_hand() -> None:
    """One 64x64 image at the published widths; interpolation mixes 4 values of each upsampled one."""
    blocks = (9 * 64 + 6 * 128 + 64) * 128 * 8**2 + (9 * 128 + 6 * 128) * 128 * 4**2
    blocks += (9 * 128 + 6 * 256 + 128) * 256 * 2**2
    blocks += 15 * 256**2 * 2**2 + (9 * 384 + 6 * 128 + 384) * 128 * 4**2 + (9 * 256 + 6 * 64 + 256) * 64 * 8**2
    convolutions = 27 * 16 * 32**2 + 9 * 16 * 64 * 16**2 + blocks + (9 * (64 * 64 + 64 * 16) + 16 * 11) * 32**2
    mixed = 4 * (256 * 4**2 + 128 * 8**2 + 64 * 16**2 + 64 * 32**2 + 11 * 64**2)
    assert count_macs(JITNet(11), (64, 64)).macs == convolutions + mixed


def test_width_scales_every_layer_in_eights_and_keeps_the_decoders_least() -> None:
    widths = [module.out_channels for module in JITNet(19, width=0.3).modules() if isinstance(module, nn.Conv2d)]
    assert {widths[0], widths[1]} == {8, 16}  # 4.8 and 19.2
    assert 40 in widths  # 38.4
    assert widths[-2:] == [32, 19]  # the head's 4.8 is too little for 19 classes
    assert all(width % 8 == 0 for width in widths[:-1])


def test_a_block_keeps_every_other_pixel_where_the_widths_are_equal() -> None:
    block = Block(8, 8, stride=2)
    nn.init.zeros_(block.down.weight)
    nn.init.zeros_(block.down.bias)
    images = torch.randn(2, 8, 6, 8)
    assert block.shortcut is None
    torch.testing.assert_close(block(images), images[:, :, ::2, ::2])


@pytest.mark.parametrize(("head_stride", "size"), [(2, (32, 48)), (4, (16, 24))])
def test_coarse_logits_brought_to_the_padded_size_and_cropped_are_the_logits(
    head_stride: int, size: tuple[int, int]
) -> None:
    model = small(head_stride=head_stride).eval()
    images = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        coarse = model.coarse_logits(images)
        full = F.interpolate(coarse.logits, coarse.padded_size, mode="bilinear", align_corners=coarse.align_corners)
        assert torch.equal(full[..., :50, :70], model(images))
    assert (coarse.padded_size, tuple(coarse.logits.shape[-2:])) == ((64, 96), size)


def test_logits_before_the_last_upsampling_are_the_published_order() -> None:
    """Weights of an interpolation sum to one, so 1x1 convolution and interpolation may change places."""
    model = small().eval()
    features = torch.randn(1, model.logits.in_channels, 5, 7)

    def larger(maps: Tensor) -> Tensor:
        return F.interpolate(maps, (10, 14), mode="bilinear", align_corners=True)

    with torch.no_grad():
        torch.testing.assert_close(larger(model.logits(features)), model.logits(larger(features)))


# What BatchNorm normalises by -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_frame_is_torchs_batch_norm_of_that_frame(training: bool) -> None:
    layer = nn.BatchNorm2d(3).train(training)
    layer.running_mean.fill_(40.0)
    nn.init.uniform_(layer.weight)
    set_bn_online(layer, "frame")
    frame = torch.randn(1, 3, 6, 5) * 3 + 2
    torch.testing.assert_close(layer(frame), F.batch_norm(frame, None, None, layer.weight, layer.bias, training=True))
    assert layer.training is training


def test_frame_leaves_the_running_statistics_in_evaluation_and_keeps_them_in_training() -> None:
    model = small("frame").eval()
    before = statistics(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
        assert not any(differ(before, model))
        model.train()(torch.randn(1, 3, 64, 64))
    assert all(differ(before, model))


def test_in_frame_a_frames_brightness_and_contrast_do_not_matter_behind_the_first_norm() -> None:
    model, running = small("frame").eval(), small("running").eval()
    model.stem[0][0].padding_mode = running.stem[0][0].padding_mode = "reflect"  # zeros would be another colour
    model.stem[0][0]._reversed_padding_repeated_twice = running.stem[0][0]._reversed_padding_repeated_twice = [1] * 4
    frame = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(3 * frame + 5), model(frame), atol=2e-3, rtol=1e-3)
        assert (running(3 * frame + 5) - running(frame)).abs().max() > 0.1


def test_frozen_leaves_the_statistics_unchanged_while_the_weights_learn() -> None:
    model = small("frozen").train()
    before, weights = statistics(model), [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert not any(differ(before, model))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert (
        sum(not torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True)) > len(weights) / 2
    )
    assert all(layer.training for layer in norms(model))


def test_running_is_the_same_network_as_one_that_was_never_told() -> None:
    model = small("running")
    plain = deepcopy(model)
    for layer in norms(plain):
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()
    images = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        with torch.no_grad():
            assert torch.equal(model.train(mode)(images), plain.train(mode)(images))
    assert not any(differ(statistics(plain), model))


def test_the_mode_can_be_chosen_anew_and_hooks_do_not_pile_up() -> None:
    model = small("frame").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        by_frame = model(images)
        set_bn_online(model, "running")
        assert not torch.allclose(model(images), by_frame)
        set_bn_online(model, "frame")
        assert torch.equal(model(images), by_frame)
    assert {len(layer._forward_hooks) for layer in norms(model)} == {1}


def test_a_checkpoint_of_one_mode_fits_the_others() -> None:
    frame, running = small("frame"), small("running")
    running.load_state_dict(frame.state_dict())
    assert list(frame.state_dict()) == list(running.state_dict())


def test_the_mode_comes_back_after_an_error_inside_a_layer() -> None:
    layer = nn.BatchNorm2d(3).eval()
    set_bn_online(layer, "frame")
    with pytest.raises(RuntimeError):
        layer(torch.randn(1, 4, 5, 5))
    assert (layer.training, layer.track_running_stats) == (False, True)


def test_any_model_of_the_platform_takes_the_modes() -> None:
    """DeepLabV3+ pools one image to a single value per channel, which has no statistics of its own."""
    model = SmpModel(arch="deeplabv3plus", encoder_name="tu-mobilenetv3_small_100", num_classes=3)  # timm's own norms
    images = torch.randn(1, 3, 64, 96)
    set_bn_online(model, "frame")
    before = statistics(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model(images))
        assert not any(differ(before, model))
        first = model(5 * images)
        set_bn_online(model, "running")
        assert not torch.allclose(model(5 * images), first)
    set_bn_online(model, "frame")
    model.train()(images).mean().backward()  # a batch of one frame can be learnt from


def test_statistics_are_reestimated_whatever_the_mode() -> None:
    images = [torch.randn(3, 3, 64, 64) + 1 for _ in range(2)]
    usual = small("running")
    frozen = deepcopy(usual)
    set_bn_online(frozen, "frozen")
    for model in (usual, frozen):
        reestimate_batch_norm(model, images)
    assert not any(differ(statistics(usual), frozen))
    assert {layer.bn_online for layer in norms(frozen)} == {"frozen"}


# With the rest of the platform ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bn_online", "measure"), [("frame", "bn_scale"), ("running", "magnitude")])
def test_slimmed_to_half_it_is_the_silenced_network(bn_online: str, measure: str) -> None:
    dense = JITNet(3, width=0.5, bn_online=bn_online)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 64, 96)
    enliven(dense, images)
    model, silenced = deepcopy(dense), deepcopy(dense)
    options = NetworkSlimming(keep=0.5, of="macs", importance=measure)  # type: ignore[arg-type]
    groups, kept = slim(model, options, input_size=(64, 96))
    silence(silenced, groups, kept)
    with torch.no_grad():
        made, expected, full = (each.eval()(images) for each in (model, silenced, dense))
    torch.testing.assert_close(made, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert (made - full).abs().max() > 1e-3 * full.abs().max()
    before, after = count_macs(dense, (64, 96)), count_macs(model, (64, 96))
    assert 0.4 < after.macs / before.macs <= 0.5
    assert fault_after_cut(model, images, full.shape, before.parameters) is None
    assert all(len(layer.running_mean) == len(layer.weight) for layer in norms(model))

    again = JITNet(3, width=0.5, bn_online=bn_online)  # type: ignore[arg-type]
    restructure(again, structure_record(model))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.eval()(images))


def test_a_recipe_names_it() -> None:
    recipe = tiny("model.name=jitnet", "model.args={width: 0.25, bn_online: running}")
    recipe.model.args.pop("arch", None)
    recipe.model.args.pop("encoder_name", None)
    model = build_model(recipe, 4)
    assert isinstance(model, JITNet)
    assert MODELS["jitnet"] is JITNet
    assert {layer.bn_online for layer in norms(model)} == {"running"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 0}, "model.args.width is 0; a factor above 0"),
        ({"width": "wide"}, "model.args.width is 'wide'"),
        ({"head_stride": 3}, "model.args.head_stride is 3; choose 2"),
        ({"bn_online": "freeze"}, "bn_online is 'freeze'; choose one of frame, running, frozen"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JITNet(3, **given)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("bn_online", ["frame", "running"])
def test_it_computes_the_same_in_onnx_at_other_sizes(bn_online: str, tmp_path) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    from dance_seg.export import export_onnx

    model = small(bn_online)
    enliven(model, torch.randn(2, 3, 64, 64))
    labels = {"classes": list("abcde"), "palette": [[0, 0, 0]] * 5, "table": [-1] * 256}
    record = {"recipe": {"name": "x", "data": {"name": "shapes"}, "model": {"name": "jitnet"}}, "labels": labels}
    agreement = export_onnx(model.eval(), tmp_path / "jitnet.onnx", input_size=(96, 128), record=record)
    assert agreement.argmax > 0.9999
