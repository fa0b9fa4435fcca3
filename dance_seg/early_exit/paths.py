"""What each way through a network with exits costs, in MACs of one image."""

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from torch import Tensor, nn

from dance_seg.cost.macs import count_macs
from dance_seg.early_exit.exits import ExitNetwork
from dance_seg.evaluator import full_size


class PathCosts(NamedTuple):
    """The price of each exit of a network, per image, in any unit.

    `trunk` is what it costs to come to an exit and leave there with a mask of the images' size, without heads, except
    those that the network needs to go on; `heads` what asking an exit adds for an image, whether it leaves or not.
    """

    trunk: tuple[float, ...]
    heads: tuple[float, ...]
    unit: str = "MACs"

    def total(self, exit: int, asked: Sequence[bool]) -> float:
        """The price of an image that leaves at `exit`, having gone by the exits before it, some of them asked.

        >>> PathCosts(trunk=(10, 30, 60), heads=(1, 2, 3)).total(2, asked=(True, False, True))
        64
        """
        return self.trunk[exit] + self.heads[exit] + sum(self.heads[place] for place in range(exit) if asked[place])

    def average(self, exits: Sequence[int], asked: Sequence[bool]) -> float:
        """The mean price of images that left at `exits`.

        >>> PathCosts(trunk=(10, 30), heads=(1, 3)).average([0, 1], asked=(True, True))
        22.5
        """
        return sum(self.total(exit, asked) for exit in exits) / len(exits)

    @property
    def cheapest(self) -> float:
        """The price when every image leaves at the first exit."""
        return self.total(0, ())

    @property
    def full(self) -> float:
        """The price of the plain network: every image goes to the last exit and no other is asked."""
        return self.total(len(self.trunk) - 1, (False,) * len(self.trunk))


class Walked(nn.Module):
    """The way to one exit of a network, with some of the heads, as a network of its own."""

    def __init__(self, model: ExitNetwork, exit: int, wanted: Sequence[bool], *, to_full_size: bool = True) -> None:
        super().__init__()
        self.model, self.exit, self.wanted, self.to_full_size = model, exit, tuple(wanted), to_full_size

    def forward(self, images: Tensor) -> list[Tensor]:
        """The logits at the end of the way, where that exit is wanted."""
        with closing(self.model.exits(images, self.wanted)) as walk:
            coarse = [next(walk) for _ in range(self.exit + 1)][-1]
        if coarse is None:
            return []
        return [full_size(coarse, images.shape[-2:]) if self.to_full_size else coarse.logits]


def path_costs(model: ExitNetwork, size: tuple[int, int]) -> PathCosts:
    """The MACs of one image of `size` (H, W) on each way through the network, counted from what runs.

    A head is worth what asking it adds for an image that goes on, so one that the network needs later anyway counts
    to the trunk, and the sums are right for every way. Logits are resized where an image leaves and nowhere else,
    which counts to the trunk too: the full way costs what `count_macs` says of the network. The network is left as
    it is; raises whatever it raises for a size it cannot take.
    """
    last = model.num_exits - 1

    def macs(exit: int, *asked: int, to_full_size: bool = True) -> int:
        wanted = [place in asked for place in range(model.num_exits)]
        return count_macs(Walked(model, exit, wanted, to_full_size=to_full_size), size).macs

    full = macs(last, last)
    heads = [macs(last, exit, last) - full for exit in range(last)]
    heads.append(macs(last, last, to_full_size=False) - macs(last))
    ends = [macs(exit, exit) for exit in range(last + 1)]
    return PathCosts(tuple(end - head for end, head in zip(ends, heads, strict=True)), tuple(heads))
