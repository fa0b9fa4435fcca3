"""Which networks a supernet holds: choices by name, and networks as one value of each, plain and hashable.

Values of a choice are numbers in ascending order; the last one is the largest network's. Random draws take a NumPy
generator, so that what a step samples depends on (seed, step) alone (`dance_seg.randomness.generator`).
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

Value = int | float


@dataclass(frozen=True)
class Subnet:
    """One network of a space: a value for each choice, in the space's order.

    >>> subnet = Subnet((("width", 32), ("depth", 2)))
    >>> subnet["depth"], subnet == Subnet((("width", 32), ("depth", 2)))
    (2, True)
    """

    choices: tuple[tuple[str, Value], ...]

    def __getitem__(self, name: str) -> Value:
        """The value of a choice. Raises KeyError for one that does not exist."""
        return self.as_record()[name]

    def as_record(self) -> dict[str, Value]:
        """Plain data for checkpoints and JSON."""
        return dict(self.choices)

    def __str__(self) -> str:
        return " ".join(f"{name}={value:g}" for name, value in self.choices)


@dataclass(frozen=True)
class SearchSpace:
    """All networks of a supernet: the values that each choice may take, ascending.

    `normalise` maps a network onto the one that it really is, where several choices describe the same network (the
    width of a block that is left out). Sampling, mutation and crossing return normalised networks only, so that equal
    networks are equal. Raises ValueError for a choice without values or with values that do not ascend.

    >>> space = SearchSpace({"width": (16, 32), "depth": (1, 2, 3)})
    >>> space.count(), str(space.largest), str(space.smallest)
    (6, 'width=32 depth=3', 'width=16 depth=1')
    """

    values: Mapping[str, tuple[Value, ...]]
    normalise: Callable[[Mapping[str, Value]], Mapping[str, Value]] = field(default=dict, compare=False)

    def __post_init__(self) -> None:
        """Refuse choices that are none."""
        if not self.values:
            raise ValueError("a search space needs at least one choice")
        for name, values in self.values.items():
            if not values or any(not low < high for low, high in pairwise(values)):
                raise ValueError(f"the values of {name} are {list(values)}; give at least one, in ascending order")
        object.__setattr__(self, "values", {name: tuple(values) for name, values in self.values.items()})

    @property
    def largest(self) -> Subnet:
        """The network with the largest value of each choice."""
        return self.subnet({name: values[-1] for name, values in self.values.items()})

    @property
    def smallest(self) -> Subnet:
        """The network with the smallest value of each choice."""
        return self.subnet({name: values[0] for name, values in self.values.items()})

    def subnet(self, chosen: Mapping[str, Any]) -> Subnet:
        """The network of a mapping, such as a record from a file.

        Raises ValueError, naming the choice and its values, unless there is an allowed value for each choice.
        """
        for name in chosen:
            if name not in self.values:
                raise ValueError(f"{name!r} is no choice of this search space; it has {', '.join(self.values)}")
        for name, values in self.values.items():
            if name not in chosen:
                raise ValueError(f"{name} is missing; choose one of {', '.join(f'{value:g}' for value in values)}")
            given = chosen[name]
            if isinstance(given, bool) or not isinstance(given, int | float) or given not in values:
                raise ValueError(f"{name} is {given!r}; choose one of {', '.join(f'{value:g}' for value in values)}")
        normal = self.normalise(dict(chosen))
        return Subnet(tuple((name, normal[name]) for name in self.values))

    def __contains__(self, subnet: Subnet) -> bool:
        try:
            return self.subnet(subnet.as_record()) == subnet
        except ValueError:
            return False

    def sample(self, random: np.random.Generator) -> Subnet:
        """A network, each choice drawn evenly and apart from the others."""
        return self.subnet({name: values[int(random.integers(len(values)))] for name, values in self.values.items()})

    def mutate(self, subnet: Subnet, rate: float, random: np.random.Generator) -> Subnet:
        """The network with each choice drawn anew with probability `rate`."""
        given = subnet.as_record()
        return self.subnet(
            {
                name: values[int(random.integers(len(values)))] if random.random() < rate else given[name]
                for name, values in self.values.items()
            }
        )

    def cross(self, one: Subnet, other: Subnet, random: np.random.Generator) -> Subnet:
        """A network that takes each choice from one of two, evenly."""
        first, second = one.as_record(), other.as_record()
        return self.subnet({name: (first if random.random() < 0.5 else second)[name] for name in self.values})

    def neighbours(self, subnet: Subnet) -> Iterator[Subnet]:
        """Every other network that differs in one choice."""
        given = subnet.as_record()
        for name, values in self.values.items():
            for value in values:
                if value != given[name] and (near := self.subnet({**given, name: value})) != subnet:
                    yield near

    def count(self) -> int:
        """How many ways there are to choose; networks that several ways describe count as often."""
        return math.prod(len(values) for values in self.values.values())

    def restricted(self, values: Mapping[str, tuple[Value, ...]]) -> "SearchSpace":
        """The part of the space in which some choices have fewer values, for a phase of progressive shrinking.

        Raises ValueError for a choice or value that this space does not have.
        """
        for name, some in values.items():
            if name not in self.values or not set(some) <= set(self.values[name]):
                raise ValueError(f"{name} {list(some)} is not part of this search space: {self.as_record()}")
        return SearchSpace({**self.values, **values}, self.normalise)

    def as_record(self) -> dict[str, list[Value]]:
        """Plain data for checkpoints and JSON."""
        return {name: list(values) for name, values in self.values.items()}

    @property
    def fingerprint(self) -> str:
        """A name of the space that changes with its choices, for files that must belong to it."""
        return hashlib.sha256(json.dumps(self.as_record()).encode()).hexdigest()[:16]


def named_subnet(space: SearchSpace, given: object) -> Subnet:
    """The network that a recipe's `model.args.subnet` names; the largest where it names none.

    Raises ValueError for anything that is not a value for each choice of the space.

    >>> str(named_subnet(SearchSpace({"width": (16, 32)}), {"width": 16}))
    'width=16'
    """
    if given is None:
        return space.largest
    if not isinstance(given, Mapping):
        raise ValueError(f"model.args.subnet is {given!r}; give a value for each of {', '.join(space.values)}")
    try:
        return space.subnet(given)
    except ValueError as error:
        raise ValueError(f"model.args.subnet: {error}") from None
