"""Records of what can be cut: the channels of a network, in groups that shrink the same tensors."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Member:
    """Where the channels of a group lie in one tensor: channel c at `positions[c]` along `dim`."""

    tensor: str  # its name in the model's state dict
    dim: int
    positions: np.ndarray  # (channels, positions of each), int64
    reads: bool  # whether the tensor reads these channels; else it makes or scales them


@dataclass(frozen=True)
class Group:
    """Channels that lie in the same tensors, so that cutting one shrinks each of these tensors."""

    name: str  # of the tensor that makes them
    members: tuple[Member, ...]

    @property
    def channels(self) -> int:
        """How many channels the group has."""
        return len(self.members[0].positions)

    @property
    def unit(self) -> int:
        """How many positions one channel takes where it is made; more than one where channels are tied in blocks."""
        return min(member.positions.shape[1] for member in self.members if not member.reads)


@dataclass(frozen=True)
class Groups:
    """All channels of a network that can be cut, and why others cannot."""

    groups: tuple[Group, ...]
    frozen: tuple[str, ...]  # "module: reason", each once, in the order met

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)
