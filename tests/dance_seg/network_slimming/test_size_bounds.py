"""Bounds of MACs after a cut: by hand, around the counter's own figure, and without a say in what is cut."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dance_seg.cost.macs import count_macs
from dance_seg.models import MODELS
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.network_slimming.groups import find_groups
from dance_seg.network_slimming.size_bounds import MacsBounds
from dance_seg.network_slimming.surgery import cut

SIZE = (64, 64)


def test_depthwise_transposed_and_linear_layers_by_hand() -> None:
    """4 x 4 pixels: 3 to 6 channels, 3 x 3 depthwise, each pixel to 2 x 2 of 5, and those to 2: 6 are cut to 4."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ConvTranspose2d(6, 5, 2, stride=2),
        nn.Conv2d(5, 2, 1),
    )  # fmt: skip
    groups = find_groups(model, (4, 4))
    kept = [np.arange(4) if group.name == "0.weight" else np.arange(group.channels) for group in groups]
    by_hand = 16 * 3 * 4 + 16 * 9 * 4 + 16 * 4 * 4 * 5 + 64 * 5 * 2
    assert MacsBounds(model, (4, 4)).after(groups, kept) == (by_hand, by_hand)


@pytest.mark.parametrize(
    ("arch", "encoder"), [("fpn", "resnet18"), ("deeplabv3plus", "tu-efficientnet_lite0"), ("segformer", "mit_b0")]
)
def test_the_counter_lies_between_them(arch: str, encoder: str) -> None:
    model = MODELS["smp"](arch=arch, encoder_name=encoder, num_classes=4).eval()
    groups = find_groups(model, SIZE)
    bounds = MacsBounds(model, SIZE)
    for third in (1, 2):
        kept = [np.arange(max(8, group.channels * third // 3)) if group.channels > 8 else np.arange(group.channels)
                for group in groups]  # fmt: skip
        smaller = copy.deepcopy(model)
        cut(smaller, groups, kept)
        least, most = bounds.after(groups, kept)
        assert least <= count_macs(smaller, SIZE).macs <= most
        if arch != "segformer":  # which attends, for a tenth of its MACs
            assert most < 1.05 * least


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_the_same_channels_are_cut_without_them(keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MODELS["smp"](arch="fpn", encoder_name="resnet18", num_classes=4).eval()
    options = NetworkSlimming(keep=keep, importance="magnitude")
    _, kept = slim(copy.deepcopy(model), options, input_size=SIZE)
    counts = []
    monkeypatch.setattr(MacsBounds, "after", lambda *given: counts.append(given) or (0, 1 << 60))
    _, counted = slim(copy.deepcopy(model), options, input_size=SIZE)
    assert counts
    assert all(np.array_equal(one, two) for one, two in zip(kept, counted, strict=True))
