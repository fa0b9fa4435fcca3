"""How sure a ratio is, and which rows are worth their cost.

Two rows that were trained with the same seeds are compared seed by seed: what a seed does to both (the initial weights,
the order of the images) then cancels, and every pair is one independent measurement. The interval is Student's t of
those pairs, since there are few of them: of costs in their logarithms, so that twice and half are equally far from one
and no bound is negative; of scores in their differences. It takes two pairs at least; with two it is honest and wide.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95

# The 97.5 % quantile of Student's t with 1, 2, 3, ... degrees of freedom; beyond them the normal distribution's.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
               2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
               2.045, 2.042)  # fmt: skip
NORMAL_QUANTILE = 1.960


class Interval(NamedTuple):
    """Where the true mean lies, with a confidence of 95 %; `pairs` are the seeds it comes from."""

    low: float
    high: float
    pairs: int


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[tuple[float, float]]:
    """The values of two rows by seed; none unless both have the same seeds.

    >>> paired({"0": 1.0, "1": 2.0}, {"1": 4.0, "0": 3.0})
    [(1.0, 3.0), (2.0, 4.0)]
    >>> paired({"0": 1.0, "1": 2.0}, {"0": 3.0, "2": 4.0})
    []
    """
    if ours.keys() != theirs.keys():
        return []
    return [(value, theirs[seed]) for seed, value in ours.items()]


def difference_interval(pairs: Sequence[tuple[float, float]]) -> Interval | None:
    """The interval of the mean difference; None with fewer than two pairs.

    >>> difference_interval([(61.0, 60.0)]) is None
    True
    >>> difference_interval([(61.0, 60.0), (62.0, 61.0)])
    Interval(low=1.0, high=1.0, pairs=2)
    """
    if len(pairs) < 2:
        return None
    found = [mine - other for mine, other in pairs]
    mean, half = statistics.fmean(found), half_width(found)
    return Interval(mean - half, mean + half, len(pairs))


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> Interval | None:
    """The interval of the mean ratio; None with fewer than two pairs, or a figure that is not positive.

    >>> ratio_interval([(1.0, 2.0), (2.0, 4.0)])
    Interval(low=0.5, high=0.5, pairs=2)
    """
    if len(pairs) < 2 or any(value <= 0 for pair in pairs for value in pair):
        return None
    found = [math.log(mine / other) for mine, other in pairs]
    mean, half = statistics.fmean(found), half_width(found)
    return Interval(math.exp(mean - half), math.exp(mean + half), len(pairs))


def half_width(values: Sequence[float]) -> float:
    """Half of the interval of a mean: t times the standard error."""
    freedom = len(values) - 1
    quantile = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else NORMAL_QUANTILE
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def dominators(points: Mapping[str, tuple[float, float]]) -> dict[str, list[str]]:
    """For each (cost, score) by name, who costs no more and scores no less, and is better in one of both.

    Those with none are the Pareto front.

    >>> dominators({"cheap": (1.0, 50.0), "good": (3.0, 60.0), "neither": (4.0, 55.0)})
    {'cheap': [], 'good': [], 'neither': ['good']}
    """
    return {
        name: [
            other
            for other, (its_cost, its_score) in points.items()
            if its_cost <= cost and its_score >= score and (its_cost < cost or its_score > score)
        ]
        for name, (cost, score) in points.items()
    }
