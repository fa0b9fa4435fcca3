"""What a network with several exits looks like: they come one after another, and what is not asked is not computed.

N images, C classes, H and W rows and columns, K exits from shallow to deep. Published code of this kind runs every exit
and simulates stopping; here the parts behind an exit have not run when it speaks, and images that leave are taken out
of the batch, so that stopping saves time in batches too.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dance_seg.evaluator import full_size, labels_of
from dance_seg.sample import CoarseLogits

Walk = Generator[CoarseLogits | None, Tensor | None, None]
"""The exits of a batch, one after another; `send` the indices of the images that go on."""


class Outputs(NamedTuple):
    """What a network with exits returns while it trains."""

    logits: tuple[Tensor, ...]  # of every exit, shallow to deep, (N, C, H, W) each
    penalty: Tensor | None = None  # a scalar that the network itself adds to the loss


class ExitNetwork(nn.Module, ABC):
    """A network whose exits each give a full mask: images (N, 3, H, W), normalised -> logits (N, C, H, W), any H and W.

    While it trains, `forward` returns the `Outputs` of all exits, so that every weight has its gradient on every rank;
    in evaluation the logits of the last exit, with no other head computed.
    """

    num_exits: int
    stride: int
    minimum_size: int

    @abstractmethod
    def exits(self, images: Tensor, wanted: Sequence[bool] | None = None) -> Walk:
        """The logits of each exit, shallow to deep, for the images that are still there.

        An exit that is not `wanted` (by default all are) gives None, and its head does not run. Advance with
        `send(kept)`, the indices (M,) of the images that go on among those still there, or with `next`, and all do.
        What lies behind an exit runs only when the generator is advanced past it.
        """

    def forward(self, images: Tensor) -> Outputs | Tensor:
        """All exits while training, the last one's logits (N, C, H, W) in evaluation."""
        if not self.training:
            return full_size(self.coarse_logits(images), images.shape[-2:])
        found = [exit for exit in self.exits(images) if exit is not None]
        return Outputs(tuple(full_size(logits, images.shape[-2:]) for logits in found))

    def coarse_logits(self, images: Tensor) -> CoarseLogits:
        """The last exit's logits as the network makes them; no other head runs."""
        only_last = [False] * (self.num_exits - 1) + [True]
        *_, last = self.exits(images, only_last)
        assert last is not None
        return last


@torch.no_grad()
def every_exit(model: ExitNetwork, images: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Class indices uint8 (N, H, W) on the CPU of each exit at `size`, from normalised images (N, 3, h, w).

    Raises ValueError when logits are not finite.
    """
    return [labels_of(coarse, images.shape[-2:], size) for coarse in model.exits(images) if coarse is not None]


def outputs_of(model: nn.Module, images: Tensor) -> Any:
    """All that a network says of images: the coarse logits of every exit where it has several, else its output.

    What walks through a network in evaluation must come by every part of it, and `forward` comes by one head.
    """
    return list(model.exits(images)) if isinstance(model, ExitNetwork) else model(images)


def select(features: Any, kept: Tensor | None) -> Any:
    """What of the features goes on: rows `kept` of every tensor (N, ...) in lists, tuples and dictionaries of them.

    None keeps all, without a copy; what is None stays None.

    >>> import torch
    >>> select({"a": torch.arange(3), "b": [None]}, torch.tensor([2, 0]))
    {'a': tensor([2, 0]), 'b': [None]}
    """
    if kept is None or features is None:
        return features
    if isinstance(features, Tensor):
        return features.index_select(0, kept)
    if isinstance(features, dict):
        return {name: select(value, kept) for name, value in features.items()}
    values = [select(value, kept) for value in features]
    return type(features)(*values) if hasattr(features, "_fields") else type(features)(values)  # a NamedTuple or not
