"""SMP networks take any size, cost what they say, and refuse what they cannot do in words."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dance_seg.models import MODELS
from dance_seg.models.smp import SmpModel, pad_to
from tests.contracts import check_model

ARCHITECTURES = (
    *("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet"),
    *("deeplabv3", "deeplabv3plus", "pan", "upernet", "segformer"),
)
ENCODERS = ("resnet18", "mobilenet_v2", "efficientnet-b0", "mit_b0")
REFUSED = {("unetplusplus", "mit_b0"), ("linknet", "mit_b0")}


def make(arch: str = "fpn", encoder_name: str = "resnet18", **options: object) -> SmpModel:
    return SmpModel(arch=arch, encoder_name=encoder_name, num_classes=5, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_meets_the_contract(arch: str) -> None:
    check_model(lambda: make(arch), num_classes=5)


def test_dpt_meets_the_contract() -> None:
    """Its cost is looked at where the transformer was made for; elsewhere its position embedding is resampled."""
    sizes = ((45, 67), (224, 224))
    check_model(lambda: make("dpt", "tu-vit_tiny_patch16_224", decoder_fusion_channels=32), num_classes=5, sizes=sizes)


@pytest.mark.slow
@pytest.mark.parametrize("encoder_name", ENCODERS[1:])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_pair_that_smp_takes_meets_the_contract(arch: str, encoder_name: str) -> None:
    if (arch, encoder_name) in REFUSED:
        with pytest.raises(ValueError, match=f"{arch} with encoder {encoder_name} is refused"):
            make(arch, encoder_name)
    else:
        check_model(lambda: make(arch, encoder_name), num_classes=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "encoder_name", "options"),
    [
        ("pan", "resnet18", {"encoder_output_stride": 32}),
        ("pspnet", "resnet18", {"encoder_depth": 5}),  # its own upsampling by 8 would end at a quarter of the size
        ("fpn", "resnet18", {"encoder_depth": 3}),
        ("upernet", "tu-swin_tiny_patch4_window7_224", {}),
        ("upernet", "tu-maxvit_tiny_tf_224", {}),
        ("unet", "tu-convnext_atto", {}),
        ("unet", "vgg11", {}),
    ],
)
def test_options_and_other_encoders_meet_the_contract(arch: str, encoder_name: str, options: dict[str, object]) -> None:
    check_model(lambda: make(arch, encoder_name, **options), num_classes=5)


@pytest.mark.parametrize("arch", ["unet", "fpn", "pspnet", "pan"])
def test_the_same_logits_as_smp_where_no_padding_is_needed(arch: str) -> None:
    import segmentation_models_pytorch as smp

    ours = make(arch).eval()
    theirs = smp.create_model(arch, "resnet18", encoder_weights=None, classes=5).eval()
    missing, unexpected = theirs.load_state_dict(ours.network.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("encoder.layer") for name in missing)  # stages that are never run
    images = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("size", [(1, 1), (45, 67), (64, 96)])
@pytest.mark.parametrize("arch", ["unet", "fpn"])
def test_coarse_logits_brought_to_the_padded_size_and_cropped_are_the_logits(arch: str, size: tuple[int, int]) -> None:
    model = make(arch).eval()
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        coarse = model.coarse_logits(images)
        full = F.interpolate(coarse.logits, coarse.padded_size, mode="bilinear", align_corners=coarse.align_corners)
        assert torch.equal(full[..., : size[0], : size[1]], model(images))
    if arch == "fpn":
        assert [4 * side for side in coarse.logits.shape[-2:]] == list(coarse.padded_size)


def test_sizes_that_are_multiples_of_the_stride_are_not_padded() -> None:
    model = make("pan")
    assert (model.stride, model.minimum_size) == (16, 128)
    assert model.padded_size(128, 144) == (128, 144)
    assert model.padded_size(129, 144) == (144, 144)
    assert model.padded_size(16, 16) == (128, 128)


def test_padding_reflects_where_the_image_is_large_enough_and_repeats_its_edge_otherwise() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert pad_to(image, (3, 3))[0, 0].tolist() == [[1, 2, 1], [3, 4, 3], [1, 2, 1]]
    assert pad_to(image, (2, 5))[0, 0].tolist() == [[1, 2, 2, 2, 2], [3, 4, 4, 4, 4]]
    assert pad_to(image, (2, 2)) is image


def test_stages_that_no_image_passes_are_not_part_of_the_network() -> None:
    """PSPNet uses ResNet-18 up to its second stage; layers 3 and 4 hold 2 099 712 and 8 393 728 weights."""
    import segmentation_models_pytorch as smp

    theirs = smp.create_model("pspnet", "resnet18", encoder_weights=None, classes=5)
    ours = make("pspnet")
    assert count(theirs) - count(ours) == 2_099_712 + 8_393_728
    assert all(weight.requires_grad for weight in ours.parameters())


def count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_building_leaves_no_gradient_and_the_mode_alone() -> None:
    model = make()
    assert model.training
    assert model.network.encoder.training
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("arch", ["deeplabv3plus", "pan", "upernet"])
def test_training_on_a_batch_of_one_image_says_what_to_do(arch: str) -> None:
    model = make(arch).train()
    with pytest.raises(ValueError, match="at least two images per batch"):
        model(torch.randn(1, 3, 64, 64))
    model(torch.randn(2, 3, 64, 64))  # two are enough
    model.eval()(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arch": "unett"}, "did you mean unet.* choose one of unet, unetplusplus"),
        ({"encoder_name": "resnet81"}, "did you mean resnet18 .*get_encoder_names"),
        ({"encoder_name": "tu-resnt18"}, "did you mean tu-resnet18 .*timm.list_models"),
        ({"encoder_name": "tu-resnet18.no_such_tag"}, "no_such_tag"),
        ({"arch": "linknet", "encoder_name": "mit_b0"}, "linknet with encoder mit_b0 is refused: .*not supported"),
        ({"arch": "deeplabv3", "encoder_name": "vgg11"}, "is refused: .*dilated"),
        ({"arch": "dpt", "encoder_name": "tu-vit_small_patch14_dinov2"}, "patches of 14 pixels"),
        ({"decoder_chanels": (1, 2)}, "model.args.decoder_chanels: fpn takes no .*it takes: encoder_depth"),
        ({"encoder_name": "tu-resnet18", "decodr": 1}, "unexpected keyword argument 'decodr'"),
        ({"activation": "softmax"}, "model.args.activation cannot be set: losses and scores take logits"),
        ({"encoder_depth": 9}, "is refused: .*depth should be in range"),
        ({"encoder_weights": "imagnet"}, "is refused: Wrong pretrained weights `imagnet`"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoder_name", ["resnet18", "tu-resnet18"])
def test_weights_that_cannot_be_fetched_say_what_to_do(encoder_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **keywords: object) -> str:
        raise LocalEntryNotFoundError("Cannot reach the hub. And more")

    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", offline)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"(?s)could not be fetched.*Cannot reach the hub.*encoder_weights=null"):
        make(encoder_name=encoder_name, encoder_weights="imagenet")


def test_weights_of_the_hub_are_loaded_into_the_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A hub that holds one file of known weights stands in for the real one."""
    import segmentation_models_pytorch as smp
    from safetensors.torch import save_file

    encoder = smp.encoders.get_encoder("resnet18", weights=None)
    weights = {name: torch.full_like(value, 0.5) for name, value in encoder.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "segmentation_models_pytorch.encoders.hf_hub_download",
        lambda repo, filename, revision: str(tmp_path / filename),
    )
    model = make(encoder_weights="imagenet")
    assert all((weight == 0.5).all() for weight in model.network.encoder.parameters())
    assert not all((weight == 0.5).all() for weight in model.network.decoder.parameters())


def test_weights_in_a_file_are_loaded_into_the_encoder(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "encoder.safetensors"
    own = make().network.encoder.state_dict()
    save_file({name: torch.full_like(value, 0.5) for name, value in own.items()}, path)
    model = make(encoder_weights=str(path))
    assert all((weight == 0.5).all() for weight in model.network.encoder.parameters())
    assert not all((weight == 0.5).all() for weight in model.network.decoder.parameters())
    with pytest.raises(ValueError, match=r"does not hold resnet34: layer1.2.conv1.weight is .*the file lacks it"):
        make(encoder_name="resnet34", encoder_weights=str(path))
    with pytest.raises(ValueError, match=r"does not hold resnet50: layer1.0.conv1.weight is .*has \(64, 64, 3, 3\)"):
        make(encoder_name="resnet50", encoder_weights=str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        make(encoder_weights=str(path))
    with pytest.raises(ValueError, match=r"does not exist; python -m tools\.fetch_weights"):
        make(encoder_weights=str(tmp_path / "none.safetensors"))


def test_the_table_names_it_and_its_arguments_are_its_keywords() -> None:
    assert MODELS["smp"] is SmpModel
    keywords = inspect.signature(SmpModel).parameters
    assert list(keywords) == ["arch", "encoder_name", "num_classes", "encoder_weights", "options"]


def test_importing_the_table_does_not_import_smp() -> None:
    code = (
        "import dance_seg.models, sys; sys.exit('segmentation_models_pytorch' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_it_compiles_into_one_graph_with_sizes_left_open() -> None:
    model = make("deeplabv3plus").eval()
    compiled = torch.compile(model, dynamic=True, backend="eager", fullgraph=True)
    with torch.no_grad():
        for size in ((64, 96), (45, 67), (96, 128)):
            images = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("given", [{"arch": None}, {"encoder_name": None}, {"arch": 3}])
def test_names_that_are_no_text_are_refused_by_their_key(given: dict[str, object]) -> None:
    (key,) = given
    with pytest.raises(ValueError, match=rf"model\.args\.{key} is {given[key]}; give a name"):
        SmpModel(**{"num_classes": 2, "arch": "fpn", "encoder_name": "resnet18", **given})
