"""Whole sets in full batches: images that go on wait for those of later batches that do too.

What is left of a batch of eight behind an exit may be one image, and one image in a batch of its own takes more time
than an eighth of eight. So every part of the network has images waiting in front of it and runs when there are enough
for a batch, at the end for those that are left.

N, M images, K exits, H and W rows and columns.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dance_seg.early_exit.exits import ExitNetwork, State, changed, select
from dance_seg.early_exit.policy import Decided, ExitPolicy, leaving, refuse_training, rows
from dance_seg.evaluator import labels_of
from dance_seg.sample import CoarseLogits


@torch.no_grad()
def decide_in_batches(
    model: ExitNetwork, batches: Iterable[Tensor], size: tuple[int, int], policy: ExitPolicy, batch: int
) -> Iterator[tuple[np.ndarray, Decided]]:
    """What `decide` says of normalised images (N, 3, h, w), all of one size, with up to `batch` of them in every part.

    Gives the places int64 (M,) of images, counted from 0 over all batches, and what was decided of them, as they leave:
    each image once, simple ones before harder ones that came earlier. Up to `batch` - 1 images wait at each exit.

    Raises ValueError for a batch below 1 and for images of several sizes, and as `decide` does.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; give how many images run together, at least 1")
    policy.check_fits(model.num_exits)
    refuse_training(model)
    waiting = [_Waiting(batch) for _ in range(model.num_exits)]
    count, shown = 0, torch.Size()
    for images in batches:
        shown = shown or images.shape[-2:]
        if images.shape[-2:] != shown:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} came behind some of {tuple(shown)}; images that run together "
                "have one size, so decide for each size by itself"
            )
        waiting[0].add(np.arange(count, count + len(images)), model.begin(images))
        count += len(images)
        yield from _run(model, waiting, shown, size, policy, at_end=False)
    yield from _run(model, waiting, shown, size, policy, at_end=True)


def _run(
    model: ExitNetwork,
    waiting: "list[_Waiting]",
    shown: torch.Size,
    size: tuple[int, int],
    policy: ExitPolicy,
    *,
    at_end: bool,
) -> Iterator[tuple[np.ndarray, Decided]]:
    """Run every part for which enough images wait, at the end for any, first to last."""
    for exit, queue in enumerate(waiting):
        while (at_end and queue.count) or queue.count >= queue.batch:
            places, state = queue.take()
            seen, state = model.part(exit, state)
            coarse = None
            if policy.asked[exit]:
                coarse = CoarseLogits(model.head(exit, seen), model.padded_size(*shown), model.align_corners[exit])
            del seen  # what only the head needed should not wait in memory
            left, scores = leaving(policy, exit, coarse, len(places), shown)
            if left.any():
                assert coarse is not None
                labels = labels_of(rows(coarse, left), shown, size)
                exits = torch.full((len(labels),), exit)
                yield places[left], Decided(labels, exits, torch.from_numpy(scores[left]))
            if not left.all():
                kept = np.flatnonzero(~left)
                staying = torch.from_numpy(kept).to(coarse.logits.device) if coarse is not None else None
                waiting[exit + 1].add(places[kept], select(state, staying if left.any() else None))


class _Waiting:
    """Images in front of a part of the network: their places, and what the part is to be given."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.count = 0
        self._groups: list[tuple[np.ndarray, State]] = []

    def add(self, places: np.ndarray, state: State) -> None:
        self._groups.append((places, state))
        self.count += len(places)

    def take(self) -> tuple[np.ndarray, State]:
        """Up to a batch of them, those that came first; without a copy where they came as one group."""
        taken: list[tuple[np.ndarray, State]] = []
        room = self.batch
        while self._groups and room:
            places, state = self._groups.pop(0)
            if len(places) > room:
                self._groups.insert(0, (places[room:], _span(state, slice(room, None))))
                places, state = places[:room], _span(state, slice(room))
            taken.append((places, state))
            room -= len(places)
            self.count -= len(places)
        if len(taken) == 1:
            return taken[0]
        return np.concatenate([places for places, _ in taken]), together([state for _, state in taken])


def _span(state: State, span: slice) -> State:
    return changed(state, lambda tensor: tensor[span])


def together(states: list[Any]) -> Any:
    """One state of several: tensors (N, ...) of the same lists, tuples and dictionaries laid behind one another.

    >>> together([{"a": torch.tensor([1]), "b": None}, {"a": torch.tensor([2, 3]), "b": None}])
    {'a': tensor([1, 2, 3]), 'b': None}
    """
    first = states[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: together([state[name] for state in states]) for name in first}
    if not isinstance(first, list | tuple):
        return torch.cat(states)
    values = [together(list(own)) for own in zip(*states, strict=True)]
    return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
