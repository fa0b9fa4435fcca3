"""Exits on SMP networks: later stages wait, the last exit is the plain network, and whoever leaves is gone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dance_seg.early_exit.exits import Outputs
from dance_seg.models.smp import SmpModel
from dance_seg.models.smp_exits import ContextHead, SmpWithExits, with_exits
from dance_seg.network_slimming.schedule import NetworkSlimming
from dance_seg.network_slimming.slim import slim
from tests.contracts import check_cost_is_counted, check_logits_have_the_size_of_the_images, check_state_can_be_kept

SIZES = ((45, 67), (64, 96))


def make(arch: str = "fpn", encoder_name: str = "resnet18", **given: object) -> SmpWithExits:
    return SmpWithExits(arch=arch, encoder_name=encoder_name, num_classes=5, **given)  # type: ignore[arg-type]


def make_plain(arch: str = "fpn", encoder_name: str = "resnet18", **given: object) -> SmpModel:
    return SmpModel(arch=arch, encoder_name=encoder_name, num_classes=5, **given)  # type: ignore[arg-type]


# What every architecture and encoder must satisfy ---------------------------------------------------------------------


def check_exits(make_model: Callable[[], SmpWithExits]) -> None:
    torch.manual_seed(0)
    model = make_model()
    check_logits_have_the_size_of_the_images(model, 5, SIZES)
    check_every_exit_trains_every_weight(model)
    check_state_can_be_kept(make_model, model, SIZES[0])
    check_cost_is_counted(model, SIZES[-1])
    check_the_last_exit_is_the_plain_network(model)
    check_later_stages_wait(model)
    check_survivors_are_as_alone(model)


def check_every_exit_trains_every_weight(model: SmpWithExits) -> None:
    outputs = model.train()(torch.randn(2, 3, *SIZES[0]))
    assert isinstance(outputs, Outputs)
    assert [tuple(logits.shape) for logits in outputs.logits] == [(2, 5, *SIZES[0])] * model.num_exits
    sum(logits.square().mean() for logits in outputs.logits).backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not without
    model.zero_grad()


def check_the_last_exit_is_the_plain_network(model: SmpWithExits) -> None:
    model.eval()
    with torch.no_grad():
        for size in SIZES:
            images = torch.randn(2, 3, *size)
            plain = model.model.coarse_logits(images)
            assert torch.equal(model(images), model.model(images))
            for wanted in (None, [False] * (model.num_exits - 1) + [True]):
                *early, last = model.exits(images, wanted)
                assert all((exit is None) == (wanted is not None) for exit in early)
                assert last is not None
                assert torch.equal(last.logits, plain.logits)
                assert last[1:] == plain[1:]


def check_later_stages_wait(model: SmpWithExits) -> None:
    """Autograd says which weights each stage is made of; at its exit no layer with others has run."""
    model.eval()
    images = torch.randn(2, 3, *model.padded_size(*SIZES[-1]))
    made_of = []
    for stride, head in zip(model.at, model.heads, strict=True):
        model.zero_grad()
        model.model.network.encoder(images)[stride.bit_length() - 1].sum().backward()
        seen = {weight for weight in model.parameters() if weight.grad is not None}
        made_of.append(seen | set(head.parameters()) | (made_of[-1] if made_of else set()))
    model.zero_grad()
    ran: set[nn.Parameter] = set()
    hooks = [
        module.register_forward_hook(
            lambda module, *_: ran.update(weight for weight in module.parameters(recurse=False) if weight.requires_grad)
        )
        for module in model.modules()
    ]
    walk = model.exits(images)
    for expected in made_of:
        next(walk)
        assert ran == expected
    next(walk)
    assert ran == {weight for weight in model.parameters() if weight.requires_grad}
    for hook in hooks:
        hook.remove()


def check_survivors_are_as_alone(model: SmpWithExits) -> None:
    """Of three images the last and the first, in this order, pass the first exit; the first alone passes the others."""
    model.eval()
    images = torch.randn(3, 3, *SIZES[0])
    with torch.no_grad():
        walk = model.exits(images)
        found, left = [next(walk)], [[0, 1, 2]]
        for number in range(1, model.num_exits):
            found.append(walk.send(torch.tensor([2, 0] if number == 1 else [len(left[-1]) - 1])))
            left.append([2, 0] if number == 1 else [0])
        alone = [list(model.exits(image[None])) for image in images]
    for number, (exit, names) in enumerate(zip(found, left, strict=True)):
        assert exit is not None
        assert len(exit.logits) == len(names)
        for logits, name in zip(exit.logits, names, strict=True):
            expected = alone[name][number].logits
            assert (logits - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())  # random weights may explode


@pytest.mark.parametrize(
    ("arch", "encoder_name", "at"),
    [
        ("fpn", "resnet18", [8, 16]),
        ("deeplabv3plus", "resnet18", [8, 16, 32]),
        ("unet", "mobilenet_v2", [4, 8, 16]),
        ("fpn", "efficientnet-b0", [8]),
        ("segformer", "mit_b0", [4, 16]),
        ("fpn", "tu-convnext_atto", [8, 16]),
    ],
)
def test_exits_on_every_family_meet_the_contract(arch: str, encoder_name: str, at: list[int]) -> None:
    check_exits(lambda: make(arch, encoder_name, at=at))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "encoder_name"),
    [
        *(("fpn", name) for name in ("dpn68", "vgg11_bn", "se_resnet50", "densenet121", "inceptionresnetv2")),
        *(("fpn", name) for name in ("inceptionv4", "xception", "timm-efficientnet-b0", "timm-tf_efficientnet_lite0")),
        *(("fpn", name) for name in ("timm-skresnet18", "mobileone_s0", "tu-resnet18", "tu-mobilenetv3_small_100")),
        *(("fpn", name) for name in ("tu-vgg11", "tu-hrnet_w18_small", "tu-swin_tiny_patch4_window7_224")),
        *((name, "resnet18") for name in ("unet", "unetplusplus", "manet", "linknet", "deeplabv3", "pan", "upernet")),
        ("deeplabv3plus", "mobilenet_v2"),
        ("upernet", "tu-pvt_v2_b0"),
    ],
)
def test_other_encoders_meet_the_contract_or_are_refused(arch: str, encoder_name: str) -> None:
    if encoder_name == "tu-hrnet_w18_small":
        with pytest.raises(ValueError, match="tu-hrnet_w18_small cannot be stopped between its stages"):
            make(arch, encoder_name)
    else:
        check_exits(lambda: make(arch, encoder_name))


# What the arguments mean ----------------------------------------------------------------------------------------------


def test_stages_are_named_by_the_stride_they_had_without_dilation() -> None:
    """DeepLabV3+ keeps the last stage of ResNet at stride 16."""
    model = make("deeplabv3plus", at=[8, 16, 32]).eval()
    with torch.no_grad():
        exits = [exit for exit in model.exits(torch.zeros(1, 3, 60, 90)) if exit is not None]
    assert [tuple(exit.logits.shape[-2:]) for exit in exits] == [(8, 12), (4, 6), (4, 6), (16, 24)]
    assert [exit.align_corners for exit in exits] == [False, False, False, True]
    assert {tuple(exit.padded_size) for exit in exits} == {(64, 96)}


def test_what_does_not_ask_for_an_early_exit_runs_none() -> None:
    model = make().eval()
    calls: list[nn.Module] = []
    for head in model.heads:
        head.register_forward_hook(lambda module, *_: calls.append(module))
    images = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        model(images)
        list(model.exits(images, [False, False, True]))
        assert calls == []
        assert [exit is None for exit in model.exits(images, [False, True, False])] == [True, False, True]
        assert calls == [model.heads[1]]


def test_the_plain_network_is_taken_as_it_is() -> None:
    plain = make_plain().eval()
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    model = with_exits(plain, at=[8])
    assert model.model is plain
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert (model.stride, model.minimum_size) == (plain.stride, plain.minimum_size)
    assert model.padded_size(33, 65) == plain.padded_size(33, 65) == (64, 96)
    assert all(module.training for module in with_exits(plain.train(), at=[8]).modules())


def test_layers_that_are_replaced_later_are_the_ones_that_run() -> None:
    model = make().eval()
    encoder = model.model.network.encoder
    encoder.conv1 = nn.Conv2d(3, 64, 5, stride=2, padding=2)
    encoder.layer3 = nn.Sequential(encoder.layer3[0])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(list(model.exits(images))[-1].logits, model.model.coarse_logits(images).logits)


class EveryExit(nn.Module):
    """Gives the logits of every exit, in evaluation too."""

    def __init__(self, model: SmpWithExits) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        return [exit.logits for exit in self.model.exits(images) if exit is not None]


def test_network_slimming_cuts_it_through_every_exit() -> None:
    model = make()
    slim(EveryExit(model), NetworkSlimming(keep=0.5, importance="magnitude", round_to=4), input_size=(64, 64))
    assert model.heads[0].head.reduce.in_channels == model.model.network.encoder.layer2[1].conv2.out_channels < 128
    check_the_last_exit_is_the_plain_network(model)
    check_every_exit_trains_every_weight(model)


def test_a_head_adds_what_it_makes_of_the_mean() -> None:
    torch.manual_seed(0)
    head = ContextHead(8, num_classes=3, channels=4).eval()
    features = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(head(features), head.head(features))  # nothing, to begin with
        nn.init.normal_(head.context[-1].weight)
        mean = features.mean((2, 3))
        hidden = (mean @ head.context[1].weight[..., 0, 0].T + head.context[1].bias).clamp(min=0)
        added = hidden @ head.context[-1].weight[..., 0, 0].T
        torch.testing.assert_close(head(features), head.head(features + added[..., None, None]))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"at": []}, r"model.args.at is \[\]; give the strides"),
        ({"at": 8}, "model.args.at is 8; give the strides"),
        ({"at": "8"}, "model.args.at is '8'; give the strides"),
        ({"at": [16, 8]}, r"model.args.at is \[16, 8\]; .* rising"),
        ({"at": [8, 8]}, r"model.args.at is \[8, 8\]; .* rising"),
        ({"at": [8.0]}, r"model.args.at is \[8.0\]"),
        ({"at": [True]}, r"model.args.at is \[True\]"),
        ({"at": [8, 12]}, "fpn with encoder resnet18 has no stage of stride 12; choose of 2, 4, 8, 16, 32"),
        ({"at": [64]}, "no stage of stride 64"),
        ({"at": [1]}, "no stage of stride 1;"),  # that is the image
        ({"arch": "pspnet"}, "pspnet with encoder resnet18 has no stage of stride 16; choose of 2, 4, 8"),
        ({"arch": "segformer", "encoder_name": "mit_b0", "at": [2]}, "no stage of stride 2; choose of 4, 8, 16, 32"),
        ({"channels": 0}, "model.args.channels is 0"),
        ({"channels": 6.5}, "model.args.channels is 6.5"),
        ({"arch": "unett"}, "did you mean unet"),
        ({"decoder_chanels": 3}, "fpn takes no 'decoder_chanels'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make(**given)  # type: ignore[arg-type]


def test_a_transformer_of_one_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="dpt with encoder tu-vit_tiny_patch16_224 has one stride throughout"):
        make("dpt", "tu-vit_tiny_patch16_224", decoder_fusion_channels=32)


class Stages(nn.Module):
    """An encoder of two stages, of strides 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        shallow = self.first(images)
        return [images, shallow, self.second(shallow)]


class InOneStep(nn.Module):
    """Hides its stages in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = Stages()

    def forward(self, images: Tensor) -> list[Tensor]:
        found = self.stages(images)
        return [found[0], found[1], found[2]]


class OtherwiseInTraining(Stages):
    def forward(self, images: Tensor) -> list[Tensor]:
        shallow = self.first(images)
        return [images, shallow, self.second(shallow * 2 if self.training else shallow)]


class LooksAtValues(Stages):
    def forward(self, images: Tensor) -> list[Tensor]:
        shallow = self.first(images)
        return [images, shallow, self.second(shallow if shallow.mean() > 0 else -shallow)]


class MixesImages(Stages):
    def forward(self, images: Tensor) -> list[Tensor]:
        shallow = self.first(images)
        return [images, shallow, self.second(shallow - shallow.mean(0, keepdim=True))]


class RemembersTheNumberOfImages(Stages):
    """As transformers do: the number of images is read at the beginning and used at the end."""

    def forward(self, images: Tensor) -> list[Tensor]:
        count, _, height, width = images.shape
        ones = torch.ones([count, 4, height // 2, width // 2], device=images.device)
        shallow = self.first(images) + ones
        deep = self.second(shallow + ones)
        return [images, shallow, deep.reshape(count, 4, height // 4, width // 4)]


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (InOneStep, "several stages in one step"),
        (OtherwiseInTraining, "other steps while it trains"),
        (LooksAtValues, "control flow"),
        (MixesImages, "its steps do not repeat it"),
    ],
)
def test_an_encoder_that_cannot_be_stopped_is_refused(encoder: Callable[[], nn.Module], reason: str) -> None:
    plain = make_plain()
    plain.network.encoder = encoder()
    with pytest.raises(ValueError, match=f"model.args.encoder_name: resnet18 cannot be stopped .*{reason}"):
        with_exits(plain, at=[2])
    assert all(module.training for module in plain.modules())


def test_the_number_of_images_is_read_again_behind_every_exit() -> None:
    plain = make_plain()
    plain.network.encoder = RemembersTheNumberOfImages()
    plain.network.decoder, plain.network.segmentation_head = nn.Sequential(), nn.Identity()
    plain.network.decoder.forward = lambda features: features[-1]
    model = with_exits(plain.eval(), at=[2]).eval()
    check_survivors_are_as_alone(model)


def test_training_on_one_image_says_what_to_do() -> None:
    model = make(at=[32]).train()
    with pytest.raises(ValueError, match="at least two images per batch"):
        model(torch.randn(1, 3, 32, 32))  # the head at stride 32 normalises one value
    with pytest.raises(ValueError, match="at least two images per batch"):
        make("deeplabv3plus", at=[8]).train()(torch.randn(1, 3, 64, 64))  # the decoder pools the image
