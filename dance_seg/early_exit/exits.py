"""What a network with several exits looks like: they come one after another, and what is not asked is not computed.

N images, C classes, H and W rows and columns, K exits from shallow to deep. Published code of this kind runs every exit
and simulates stopping; here the parts behind an exit have not run when it speaks, and images that leave are taken out
of the batch, so that stopping saves time in batches too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.evaluator import full_size, labels_of
from dance_seg.normalise import padded_size
from dance_seg.sample import CoarseLogits

Walk = Generator[CoarseLogits | None, Tensor | None, None]
"""The exits of a batch, one after another; `send` the indices of the images that go on."""

State = Any
"""Tensors (N, ...) in lists, tuples and dictionaries of them, and None: what a part of a network hands on."""


class Outputs(NamedTuple):
    """What a network with exits returns while it trains."""

    logits: tuple[Tensor, ...]  # of every exit, shallow to deep, (N, C, H, W) each
    penalty: Tensor | None = None  # a scalar that the network itself adds to the loss


class ExitNetwork(nn.Module, ABC):
    """A network whose exits each give a full mask: images (N, 3, H, W), normalised -> logits (N, C, H, W), any H and W.

    A network says what it `begin`s with, what its `part`s run between one exit and the next, and what each `head` makes
    of that. These three look at nothing but what they are given, so that they can also be run, counted and exported
    one by one; `exits` strings them together. The first exit is 0.

    While it trains, `forward` returns the `Outputs` of all exits, so that every weight has its gradient on every rank;
    in evaluation the logits of the last exit, with no other head computed.
    """

    num_exits: int
    stride: int
    minimum_size: int
    align_corners: Sequence[bool]  # of each exit: how its logits are to be resized

    @abstractmethod
    def begin(self, images: Tensor) -> State:
        """What the first part is given: of images (N, 3, H, W), padded to `padded_size`."""

    @abstractmethod
    def part(self, exit: int, state: State) -> tuple[State, State]:
        """Run what lies between the exit before and this one: what this exit's head sees, and what the next part needs.

        Nothing else waits while the exit is judged, and only what the next part needs is selected.
        """

    @abstractmethod
    def head(self, exit: int, seen: State) -> Tensor:
        """The coarse logits (N, C, h, w) of an exit."""

    def exits(self, images: Tensor, wanted: Sequence[bool] | None = None) -> Walk:
        """The logits of each exit, shallow to deep, for the images that are still there.

        An exit that is not `wanted` (by default all are) gives None, and its head does not run. Advance with
        `send(kept)`, the indices (M,) of the images that go on among those still there, or with `next`, and all do.
        What lies behind an exit runs only when the generator is advanced past it. Raises ValueError unless there is
        one wish per exit.
        """
        wanted = (True,) * self.num_exits if wanted is None else tuple(wanted)
        if len(wanted) != self.num_exits:
            raise ValueError(f"wanted has {len(wanted)} values; the network has {self.num_exits} exits, give one each")
        return self._walk(images, wanted)

    def _walk(self, images: Tensor, wanted: Sequence[bool]) -> Walk:
        size = self.padded_size(*images.shape[-2:])
        state = self.begin(images)
        for exit in range(self.num_exits):
            seen, state = self.part(exit, state)
            coarse = CoarseLogits(self.head(exit, seen), size, self.align_corners[exit]) if wanted[exit] else None
            del seen  # what only the head needed should not wait in memory
            kept = yield coarse
            del coarse
            state = select(state, kept)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) at which the network runs on an image of height x width."""
        return padded_size((height, width), self.stride, self.minimum_size)

    def forward(self, images: Tensor) -> Outputs | Tensor:
        """All exits while training, the last one's logits (N, C, H, W) in evaluation."""
        if not self.training:
            return full_size(self.coarse_logits(images), images.shape[-2:])
        return logits_of_every_exit(self, images)

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


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the BatchNorm statistics of a network, of all its exits, by those of the given images, in place.

    Raises ValueError as `reestimate_batch_norm` does.
    """
    reestimate_batch_norm(_EveryOutput(model), batches)


class _EveryOutput(nn.Module):
    """A network whose exits all speak, so that statistics reach every head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """All that the network says of the images."""
        return outputs_of(self.model, images)


def logits_of_every_exit(model: nn.Module, images: Tensor) -> "Outputs | Tensor":
    """What training makes of images, in evaluation mode: `forward` comes by the last head alone there."""
    if not isinstance(model, ExitNetwork):
        return model(images)  # type: ignore[no-any-return]
    found = [full_size(coarse, images.shape[-2:]) for coarse in model.exits(images) if coarse is not None]
    return Outputs(tuple(found))


def select(features: Any, kept: Tensor | None) -> Any:
    """What of the features goes on: rows `kept` of every tensor (N, ...) in lists, tuples and dictionaries of them.

    None keeps all, without a copy; what is None stays None.

    >>> import torch
    >>> select({"a": torch.arange(3), "b": [None]}, torch.tensor([2, 0]))
    {'a': tensor([2, 0]), 'b': [None]}
    """
    return features if kept is None else changed(features, lambda tensor: tensor.index_select(0, kept))


def changed(features: Any, change: Callable[[Any], Any]) -> Any:
    """The same lists, tuples and dictionaries with everything in them changed, in order; what is None stays None.

    >>> changed({"a": 1, "b": [None, (2,)]}, lambda number: 10 * number)
    {'a': 10, 'b': [None, (20,)]}
    """
    if features is None:
        return None
    if isinstance(features, dict):
        return {name: changed(value, change) for name, value in features.items()}
    if not isinstance(features, list | tuple):
        return change(features)
    values = [changed(value, change) for value in features]
    return type(features)(*values) if hasattr(features, "_fields") else type(features)(values)  # a NamedTuple or not
