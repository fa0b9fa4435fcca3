"""What the networks of a supernet cost in MACs, of which a search asks for thousands and training for several a step.

Counting one takes a forward pass without values, up to 0.2 s. But networks differ in little: the model says what its
choices cost, by a formula, and all else is counted once, on the largest network (`like_largest`). The sum is what
counting gives, which the tests hold the formulas to.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import nn

from dance_seg.cost.macs import count_macs, counted, forward_and_backward, without_values
from dance_seg.early_exit.exits import ExitNetwork
from dance_seg.early_exit.paths import PathCosts, path_costs
from dance_seg.supernet.elastic import Supernet, activated
from dance_seg.supernet.space import Subnet

Size = tuple[int, int]


@runtime_checkable
class CountedSupernet(Supernet, Protocol):
    """A supernet that knows what its choices cost."""

    def like_largest(self, subnet: Subnet) -> Subnet:
        """The largest network that is like this one in what `choice_macs` leaves out, such as the resolution."""

    def choice_macs(self, subnet: Subnet, size: Size) -> list[int]:
        """The MACs of one image (H, W) in layers that choices change, for the way from each exit to the next."""

    def step_choice_macs(self, subnet: Subnet, size: Size, images: int) -> tuple[int, int]:
        """Those of a training step of so many images, forward and backward, with what is done once for all of them."""


class StepMacs(NamedTuple):
    """The price of a training step of a batch."""

    forward: int
    backward: int


class SubnetMacs:
    """The MACs of a supernet's networks, by formula and counts kept for each size."""

    def __init__(self, model: nn.Module) -> None:
        self.model = without_values(model)
        assert isinstance(self.model, CountedSupernet)
        self._supernet: CountedSupernet = self.model
        self._inference: dict[tuple[Subnet, Size], int] = {}
        self._training: dict[tuple[Subnet, Size, int], StepMacs] = {}
        self._paths: dict[tuple[Subnet, Size], PathCosts] = {}

    def inference(self, subnet: Subnet, size: Size) -> int:
        """As `count_macs` of the network on its own."""
        like = self._supernet.like_largest(subnet)
        if (like, size) not in self._inference:
            self._inference[like, size] = count_macs(self._supernet.extract(like), size).macs
        return self._inference[like, size] + sum(self._more(subnet, like, size))

    def training(self, subnet: Subnet, size: Size, images: int) -> StepMacs:
        """Forward and backward of a batch of images through the supernet while the network is active."""
        like = self._supernet.like_largest(subnet)
        if (like, size, images) not in self._training:
            with activated(self._supernet, like):
                macs = counted(self.model, forward_and_backward, (images, 3, *size)).macs
            self._training[like, size, images] = StepMacs(macs["forward"].total(), macs["backward"].total())
        whole = self._training[like, size, images]
        own, largest = (self._supernet.step_choice_macs(one, size, images) for one in (subnet, like))
        return StepMacs(whole.forward + own[0] - largest[0], whole.backward + own[1] - largest[1])

    def paths(self, subnet: Subnet, size: Size) -> PathCosts:
        """As `path_costs` of the network on its own. Raises ValueError for a supernet without exits."""
        if not isinstance(self.model, ExitNetwork):
            raise ValueError("this supernet has one exit, and so one way through it")
        like = self._supernet.like_largest(subnet)
        if (like, size) not in self._paths:
            network = self._supernet.extract(like)
            assert isinstance(network, ExitNetwork)
            self._paths[like, size] = path_costs(network, size)
        whole, more = self._paths[like, size], self._more(subnet, like, size)
        trunk = tuple(macs + sum(more[: exit + 1]) for exit, macs in enumerate(whole.trunk))
        return PathCosts(trunk, whole.heads)

    def _more(self, subnet: Subnet, like: Subnet, size: Size) -> list[int]:
        """What a network's choices cost beyond those of another; negative."""
        return [
            own - largest
            for own, largest in zip(
                self._supernet.choice_macs(subnet, size), self._supernet.choice_macs(like, size), strict=True
            )
        ]
