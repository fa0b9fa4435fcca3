"""A space with a cost and a score that take no time, and can be had of all its networks at once."""

from itertools import pairwise

import numpy as np

from dance_seg.supernet.search import Budget, Evolution
from dance_seg.supernet.space import SearchSpace

SPACE = SearchSpace({f"place{place}": (1, 2, 3, 4) for place in range(9)})
WEIGHTS = (3, 5, 7, 11, 13, 17, 19, 23, 29)
BUDGET = Budget(300)  # of 127 to 508
SMALL = Evolution(initial=6, iterations=4, parents=4, mutation=2, crossover=2)


def cost(subnet):
    return sum(weight * value for weight, (_, value) in zip(WEIGHTS, subnet.choices, strict=True))


def score(subnet):
    """Large values help, each step less than the one before, and neighbours should not differ."""
    values = [value for _, value in subnet.choices]
    return sum(value**0.5 for value in values) - 0.3 * sum(abs(one - other) for one, other in pairwise(values))


def all_costs_and_scores():
    """Those of all 4^9 networks."""
    values = 1 + np.array(np.unravel_index(np.arange(4**9), (4,) * 9)).T
    return values @ WEIGHTS, np.sqrt(values).sum(axis=1) - 0.3 * np.abs(np.diff(values, axis=1)).sum(axis=1)


def places(history):
    """Where the candidates of a history stand, and what they are."""
    return [(one.generation, one.number, str(one.subnet), one.cost, one.score) for one in history]
