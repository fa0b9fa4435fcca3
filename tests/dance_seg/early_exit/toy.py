"""A network with three exits whose costs can be counted by hand and whose parts say how often they ran."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.early_exit.exits import ExitNetwork, State
from dance_seg.early_exit.heads import ExitHead

CLASSES = 3


class Counted(nn.Module):
    """A module that counts the images it has seen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.images: list[int] = []  # per call

    def forward(self, features: Tensor) -> Tensor:
        self.images.append(len(features))
        return self.inner(features)


class Toy(ExitNetwork):
    """One part per exit, at half the images' size, which is padded to even numbers; a head per exit.

    With `hand_over` the first head's logits go into the second part, so that it is needed whether asked or not.
    """

    num_exits = 3
    stride = 2
    minimum_size = 1

    def __init__(self, *, light: bool = False, hand_over: bool = False, align_corners: bool = False) -> None:
        super().__init__()
        self.hand_over, self.align_corners = hand_over, (align_corners,) * 3
        second = 4 + (CLASSES if hand_over else 0)
        convolutions = (nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(second, 4, 1), nn.Conv2d(4, 4, 1))
        self.parts = nn.ModuleList(Counted(convolution) for convolution in convolutions)
        heads = (ExitHead(4, CLASSES, channels=8) if light else nn.Conv2d(4, CLASSES, 1) for _ in range(3))
        self.heads = nn.ModuleList(Counted(head) for head in heads)
        for parameter in self.parameters():  # so that logits of different images and exits differ clearly
            nn.init.normal_(parameter)

    def begin(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return F.pad(images, (0, width % 2, 0, height % 2), mode="replicate")

    def part(self, exit: int, state: State) -> tuple[State, State]:
        features = torch.relu(self.parts[exit](state))
        if not (self.hand_over and exit == 0):
            return features, features
        logits = self.heads[0](features)
        return logits, torch.cat([features, logits], dim=1)

    def head(self, exit: int, seen: Tensor) -> Tensor:
        return seen if self.hand_over and exit == 0 else self.heads[exit](seen)

    def calls(self) -> list[int]:
        """How many images each part has seen."""
        return [sum(part.images) for part in self.parts]

    def head_calls(self) -> list[int]:
        """How many images each head has seen."""
        return [sum(head.images) for head in self.heads]


def random_images(count: int = 6, size: tuple[int, int] = (9, 12)) -> Tensor:
    """Images (count, 3, H, W) from nearly flat to lively, so that exits are sure of some and not of others."""
    liveliness = torch.linspace(0.2, 2, count)[:, None, None, None]
    return torch.randn(count, 3, 1, 1) + liveliness * torch.randn(count, 3, *size)
