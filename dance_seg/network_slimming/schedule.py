"""When a network is slimmed during training, and how far: a function of progress, known before training starts."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

MASKS_COMPARED = 5  # Early-Bird tickets: the last five masks
MASK_DISTANCE = 0.1  # differ from the newest by less than a tenth (arXiv 1909.11957)


@dataclass(frozen=True, kw_only=True)
class NetworkSlimming:
    """Which channels and branches are worth keeping; a recipe without this section trains the full network.

    The cuts are physical, made between two epochs, and everything later in training is cheaper for them. The rule of
    the cubic schedule is that of gradual pruning (arXiv 1710.01878); DANCE's own times and shares could not be read,
    so every default is this project's.
    """

    keep: float = 0.5  # share that is left after the last cut
    of: Literal["macs", "channels", "latency"] = "macs"  # what `keep` is a share of
    importance: Literal["bn_scale", "magnitude", "taylor", "random"] = "bn_scale"
    scope: Literal["global", "group"] = "global"  # rank channels over the whole network, or in each group
    per_mac: bool = False  # rank by importance per MAC that a channel costs, instead of importance alone
    schedule: Literal["progressive", "mask_distance"] = "progressive"
    start: float = 0.1  # progress at the first cut
    end: float = 0.5  # progress at the last cut; by then mask_distance cuts in any case
    cuts: int = 4  # of a progressive schedule
    sparsity: float = 1e-4  # weight of the L1 penalty on normalisation scales, until the last cut
    branches: float = 0.0  # a multi-scale branch that scores below this share of its siblings goes; 0: none does
    min_channels: int = 8  # that a layer keeps
    round_to: int = 8  # widths are multiples of this; odd ones are slower
    only: tuple[str, ...] = ()  # cut only channels made in modules whose name holds one of these; empty: everywhere

    def __post_init__(self) -> None:
        """Refuse values that contradict one another."""
        at = "network_slimming."
        if not 0 < self.keep <= 1:
            raise ValueError(f"{at}keep is {self.keep}: a share above 0, which would empty the network, and at most 1")
        if not 0 <= self.start <= self.end < 1:
            raise ValueError(f"{at[:-1]} needs 0 <= start <= end < 1, got {self.start} and {self.end}")
        for key in ("cuts", "min_channels", "round_to"):
            if getattr(self, key) < 1:
                raise ValueError(f"{at}{key} is {getattr(self, key)}: at least 1")
        if not (math.isfinite(self.sparsity) and self.sparsity >= 0):
            raise ValueError(f"{at}sparsity is {self.sparsity}: zero or a small positive number, such as 0.0001")
        if self.per_mac and self.scope == "group":
            raise ValueError(
                f"{at}per_mac is true and {at}scope is group, in which all channels cost the same; choose scope global"
            )
        if not 0 <= self.branches < 1:
            raise ValueError(f"{at}branches is {self.branches}: a share in [0, 1); 0 keeps all branches")


class PlannedCut(NamedTuple):
    """A cut before the first batch of an epoch."""

    epoch: int
    share: float  # of what `of` names that is left after it


def planned_cuts(options: NetworkSlimming, epochs: int) -> tuple[PlannedCut, ...]:
    """The cuts of a progressive schedule over so many epochs; of several that fall on one epoch the last remains.

    The n-th of N comes at start + (n - 1) / (N - 1) x (end - start), and by then 1 - (1 - n / N)^3 of all that is to
    go is gone: most goes early, when it saves most and can still be made good.

    >>> options = NetworkSlimming(keep=0.5, start=0.1, end=0.4, cuts=2)
    >>> planned_cuts(options, epochs=20)
    (PlannedCut(epoch=2, share=0.5625), PlannedCut(epoch=8, share=0.5))
    """
    if options.schedule != "progressive":
        return ()
    planned: dict[int, float] = {}
    for number in range(1, options.cuts + 1):
        place = (number - 1) / (options.cuts - 1) if options.cuts > 1 else 0.0
        progress = options.start + place * (options.end - options.start)
        epoch = min(max(1, math.ceil(progress * epochs - 1e-9)), epochs - 1)
        planned[epoch] = 1 - (1 - options.keep) * (1 - (1 - number / options.cuts) ** 3)
    return tuple(PlannedCut(epoch, share) for epoch, share in sorted(planned.items()) if epoch > 0)


class MaskDistance:
    """Early-Bird's rule: the network may be cut once the masks of the last five epochs hardly differ.

    >>> rule = MaskDistance()
    >>> [rule.settled(np.array([True, True, False, False])) for _ in range(6)]
    [False, False, False, False, True, True]
    """

    def __init__(self, masks: Sequence[str] = ()) -> None:
        self.masks: deque[str] = deque(masks, maxlen=MASKS_COMPARED)  # as texts of 0 and 1, which a checkpoint can hold

    def settled(self, mask: np.ndarray) -> bool:
        """Take in the mask of an epoch; whether each of the four before it differs from it by less than a tenth."""
        self.masks.append("".join("1" if kept else "0" for kept in mask))
        if len(self.masks) < MASKS_COMPARED:
            return False
        bits = np.array([[letter == "1" for letter in text] for text in self.masks])
        return float((bits[:-1] != bits[-1]).mean(axis=1).max()) < MASK_DISTANCE
