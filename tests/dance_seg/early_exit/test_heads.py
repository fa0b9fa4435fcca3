"""Exit heads: right in shape, and cheap."""

import pytest
import torch
from torch import nn

from dance_seg.cost.macs import count_macs
from dance_seg.early_exit.heads import ExitHead


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_logits_have_the_size_of_the_features(size):
    assert ExitHead(10, num_classes=4, channels=8).eval()(torch.randn(2, 10, *size)).shape == (2, 4, *size)


def test_macs_are_those_of_three_convolutions():
    per_pixel = 256 * 64 + 9 * 64 + 64 * 11

    assert count_macs(ExitHead(256, num_classes=11), (6, 8), in_channels=256).macs == per_pixel * 6 * 8


def test_it_costs_less_than_a_tenth_of_the_usual_head():
    usual = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.Conv2d(256, 19, 1))
    macs = [count_macs(head, (8, 8), in_channels=256).macs for head in (ExitHead(256, 19), usual)]

    assert macs[0] < 0.1 * macs[1]


def test_every_weight_learns():
    head = ExitHead(6, num_classes=3, channels=4)

    head(torch.randn(2, 6, 5, 5)).square().mean().backward()

    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in head.parameters())


def test_a_pixel_sees_its_neighbours_and_no_further():
    head = ExitHead(2, num_classes=1, channels=4).eval()
    features = torch.zeros(1, 2, 7, 7)
    changed = features.clone()
    changed[..., 3, 3] = torch.tensor([5.0, -5.0])

    differs = (head(changed) != head(features))[0, 0]

    assert not differs[[0, 1, 5, 6]].any()
    assert not differs[:, [0, 1, 5, 6]].any()
