"""Tiny streams and students for the tests of online distillation: coloured squares that move, one colour a class."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from dance_seg.distillation.options import OnlineDistillation
from dance_seg.distillation.teacher import OracleTeacher
from dance_seg.sample import Frame

CLASSES = ("background", "red", "blue")
SIZE = (32, 48)
PALETTES = (((60, 60, 60), (220, 40, 40), (40, 60, 220)), ((200, 200, 120), (30, 120, 30), (120, 20, 120)))


def frame_at(index: int, cuts: tuple[int, ...] = (), still: bool = False, size: tuple[int, int] = SIZE) -> Frame:
    """A red and a blue square on a background; with each cut the colours change."""
    scene = sum(index >= cut for cut in cuts) % len(PALETTES)
    label = np.zeros(size, np.uint8)
    shift = 0 if still else index
    label[4:16, 4 + shift % 12 : 16 + shift % 12] = 1
    label[14:28, 26 - shift % 9 : 40 - shift % 9] = 2
    noise = np.random.default_rng(0 if still else index).integers(-12, 13, (*size, 3))
    image = (np.array(PALETTES[scene])[label] + noise).clip(0, 255).astype(np.uint8)
    return Frame(index, index / 15, image, label, cut=index in cuts)


def stream(num: int, cuts: tuple[int, ...] = (), still: bool = False, start: int = 0) -> Iterator[Frame]:
    """The frames from `start` to `num`."""
    return (frame_at(index, cuts, still) for index in range(start, num))


def student(seed: int = 0, width: int = 12, classes: int = len(CLASSES)) -> nn.Module:
    """Two convolutions, the first one called encoder."""
    torch.manual_seed(seed)
    network = nn.Sequential()
    network.add_module("encoder", nn.Conv2d(3, width, 3, padding=1))
    network.add_module("active", nn.ReLU())
    network.add_module("head", nn.Conv2d(width, classes, 3, padding=1))
    return network


def teacher(**options) -> OracleTeacher:
    """The ground truth; a hundred times dearer than the student."""
    return OracleTeacher(CLASSES, **{"macs": 500_000_000, **options})


def options(**changes) -> OnlineDistillation:
    """Options with a learning rate that suits the tiny student."""
    return OnlineDistillation(**{"learning_rate": 0.002, "threshold": 0.8, **changes})


def weights_of(network: nn.Module) -> bytes:
    """The exact weights, to compare."""
    return b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in network.state_dict().values())
