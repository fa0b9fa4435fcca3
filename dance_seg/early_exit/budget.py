"""Thresholds that meet a budget, from what every exit says of the images of a calibration split.

The network runs once over the split; the scores, confusion matrices and costs of its exits are the table from which
any thresholds are judged without it. The table must not come from the images that are scored in the end.

n images, K exits, C classes, M sets of thresholds that are judged together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Literal, NamedTuple, get_args

import numpy as np

from dance_seg.early_exit.paths import PathCosts

How = Literal["direct", "geometric"]
Thresholds = tuple[float, ...]
"""One per exit but the last; infinity where an exit is not asked."""

QUANTILES = tuple(step / 20 for step in range(21))
"""The grid of direct optimisation: quantiles of an exit's scores, of which equal ones count once."""

LARGEST_LOG_Q = 40.0
"""The geometric form sends all images to the first exit at q = e^-40 and all to the last at e^40."""

HALVINGS = 60
CLOSE = 0.97
"""Share of the budget from which on the geometric form has spent it."""

RANDOM_DRAWS = 20
"""Random policies whose mean is the control."""

ROUNDING = 1e-9
"""Relative; a mean of costs that equals the budget may come out above it by less."""


@dataclass(frozen=True, eq=False)
class ExitTable:
    """What each exit says of each image of a split, and what the exits cost.

    `prices` are how many times the costs each image costs, where images differ in size; by default once. Raises
    ValueError for shapes that do not fit, scores outside [0, 1], prices that are not positive, and matrices that count
    nothing or whose labels differ from exit to exit.
    """

    scores: np.ndarray  # float32 (n, K); those of the last exit are not read
    matrices: np.ndarray  # integers (n, K, C, C), rows labels and columns predictions
    costs: PathCosts  # of K exits, in MACs or milliseconds
    prices: Sequence[float] | np.ndarray = ()  # (n,)
    weights: np.ndarray = field(init=False, repr=False)  # float64 (n,): the prices
    pixels: np.ndarray = field(init=False, repr=False)  # float64 (n, K, 2 C): right, and right or wrong, per class

    def __post_init__(self) -> None:
        """Refuse what does not fit; keep what every judgement needs."""
        shape = self.scores.shape
        if self.scores.ndim != 2 or 0 in shape:
            raise ValueError(f"scores are {shape}; give (n, K), at least one image and one exit")
        if self.matrices.ndim != 4 or self.matrices.shape[:2] != shape or len(set(self.matrices.shape[2:])) != 1:
            raise ValueError(f"matrices are {self.matrices.shape}; with scores {shape} give {(*shape, 'C', 'C')}")
        if self.matrices.dtype.kind not in "iu":
            raise ValueError(f"matrices are {self.matrices.dtype}; give counts of pixels as integers")
        for name, costs in (("trunk", self.costs.trunk), ("heads", self.costs.heads)):
            if len(costs) != shape[1] or not all(math.isfinite(cost) for cost in costs):
                raise ValueError(f"costs.{name} is {costs}; give {shape[1]} finite numbers, one per exit of the scores")
        weights = np.asarray(self.prices, np.float64) if len(self.prices) else np.ones(shape[0])
        if weights.shape != shape[:1] or not (np.isfinite(weights) & (weights > 0)).all():
            raise ValueError(f"prices are {self.prices}; give {shape[0]} positive numbers, one per image of the scores")
        object.__setattr__(self, "weights", weights)
        asked = self.scores[:, :-1]
        if not ((asked >= 0) & (asked <= 1)).all():
            raise ValueError("scores hold NaN or values outside [0, 1]; a policy's scores lie there")
        labelled = self.matrices.sum(axis=3, dtype=np.int64)  # (n, K, C)
        if not labelled.any():
            raise ValueError("matrices count no pixel: every label of the split is ignored, or there are no labels")
        if (labelled != labelled[:, :1]).any():
            raise ValueError("matrices of one image differ in their labels from exit to exit; score one split at once")
        right = np.diagonal(self.matrices, axis1=2, axis2=3).astype(np.int64)
        union = labelled + self.matrices.sum(axis=2, dtype=np.int64) - right
        # A product with float64 is exact up to 2^53 pixels, and faster than one of integers.
        object.__setattr__(self, "scores", np.asarray(self.scores, np.float32))
        object.__setattr__(self, "pixels", np.concatenate([right, union], axis=2).astype(np.float64))

    @property
    def num_exits(self) -> int:
        """K."""
        return self.scores.shape[1]

    @property
    def mean_price(self) -> float:
        """By what the costs are multiplied for an image on average: 1 where all have one size."""
        return float(self.weights.mean())


class AtThresholds(NamedTuple):
    """What a split would cost and score with some thresholds."""

    exits: np.ndarray  # int64 (n,): where each image leaves, from 0
    average_cost: float  # per image, in the table's unit
    miou: float  # points, from the accumulated confusion matrix
    shares: np.ndarray  # float64 (K,): of the images that leave at each exit
    cost_deviation: float  # standard deviation of the average cost over such splits, from one to the next


class Judged(NamedTuple):
    """The figures of M sets of thresholds."""

    average_costs: np.ndarray  # float64 (M,): per image
    mious: np.ndarray  # float64 (M,)
    leaving: np.ndarray  # float64 (M, K): how many images leave at each exit


class CurvePoint(NamedTuple):
    """One budget's adaptive result, and beside it the random policy with the same share of images at each exit.

    The random policy asks no exit and pays no head on the way, so it is the cheaper of the two.
    """

    average_cost: float
    miou: float
    thresholds: Thresholds
    random_cost: float
    random_miou: float


# Judging ----------------------------------------------------------------------------------------------------------


def at_thresholds(table: ExitTable, thresholds: Sequence[float]) -> AtThresholds:
    """Where the images leave with these thresholds, what that costs on average and how it scores.

    Thresholds that spend a budget on one split spend more or less on another: each has a standard error of its own, so
    `cost_deviation` is the root of two standard errors of the mean cost squared. That of the thresholds is in it, since
    a threshold is a quantile of the scores that it was chosen on.

    Raises ValueError when there is not one threshold per exit but the last.
    """
    sets = as_sets(table, [thresholds])
    exits = exits_at(table, sets)
    costs = costs_at(table, sets)
    found = judge_exits(table, exits, costs)
    images = len(table.scores)
    deviation = np.std(table.weights * costs[0, exits[0]]) * math.sqrt(2 / max(1, images - 1))
    shares = found.leaving[0] / images
    return AtThresholds(exits[0], float(found.average_costs[0]), float(found.mious[0]), shares, float(deviation))


def scored(table: ExitTable, exits: np.ndarray) -> float:
    """The mIoU, in points, when each image leaves at the exit given (n,)."""
    return float(mean_iou(table.pixels[np.arange(len(exits)), exits].sum(axis=0)))


def judge(table: ExitTable, sets: np.ndarray) -> Judged:
    """The average cost and mIoU of many sets of thresholds (M, K - 1)."""
    return judge_exits(table, exits_at(table, sets), costs_at(table, sets))


def judge_exits(table: ExitTable, exits: np.ndarray, costs: np.ndarray) -> Judged:
    """The figures of M ways (M, n) to let the images leave at costs (M, K)."""
    leaving, paid = np.zeros((2, len(exits), table.num_exits))
    pixels = np.zeros((len(exits), table.pixels.shape[2]))
    for exit in range(table.num_exits):
        leaves = (exits == exit).astype(np.float64)  # (M, n)
        leaving[:, exit] = leaves.sum(axis=1)
        paid[:, exit] = leaves @ table.weights
        pixels += leaves @ table.pixels[:, exit]
    return Judged((paid * costs).sum(axis=1) / exits.shape[1], mean_iou(pixels), leaving)


def exits_at(table: ExitTable, sets: np.ndarray) -> np.ndarray:
    """Where each image leaves with thresholds (M, K - 1): the first exit that is sure enough, int64 (M, n)."""
    exits = np.full((len(sets), len(table.scores)), table.num_exits - 1)
    for exit in reversed(range(table.num_exits - 1)):
        exits[table.scores[:, exit] >= sets[:, exit, None]] = exit
    return exits


def costs_at(table: ExitTable, sets: np.ndarray) -> np.ndarray:
    """What leaving at each exit costs with thresholds (M, K - 1), the heads asked before it included: (M, K)."""
    trunk, heads = np.array(table.costs.trunk, np.float64), np.array(table.costs.heads, np.float64)
    before = np.cumsum(np.isfinite(sets) * heads[:-1], axis=1)
    return trunk + heads + np.pad(before, ((0, 0), (1, 0)))


def mean_iou(pixels: np.ndarray) -> np.ndarray:
    """mIoU in points of counts (..., 2 C), over the classes that are in the labels or in the predictions.

    >>> float(mean_iou(np.array([3.0, 0.0, 0.0, 4.0, 2.0, 0.0])))
    37.5
    """
    right, union = np.split(pixels, 2, axis=-1)
    return 100 * (right / np.maximum(union, 1)).sum(axis=-1) / np.count_nonzero(union, axis=-1)


def as_sets(table: ExitTable, thresholds: Sequence[Sequence[float]]) -> np.ndarray:
    """Sets of thresholds as float64 (M, K - 1); ValueError when there is not one per exit but the last."""
    for one in thresholds:
        if len(one) != table.num_exits - 1:
            raise ValueError(
                f"there are {len(one)} thresholds for {table.num_exits} exits, which take {table.num_exits - 1}, "
                "one per exit but the last"
            )
    return np.array(thresholds, np.float64).reshape(len(thresholds), table.num_exits - 1)


# Choosing ---------------------------------------------------------------------------------------------------------


def solve(table: ExitTable, budget: float, how: How = "direct", *, spend: float = 0.0) -> Thresholds:
    """Thresholds whose average cost per image on the table is at most `budget`, in the table's unit.

    `direct` looks for the best mIoU, `geometric` spends the budget without looking at mIoU; `spend` as in `direct`.
    Each threshold lies half-way between two scores of the table, so that neither rounding nor another batch size
    changes what these images do. Raises ValueError when the budget is below the cost of the first exit or above that
    of the last.
    """
    if how not in get_args(How):
        raise ValueError(f"how is {how!r}; choose one of {', '.join(get_args(How))}")
    thresholds = geometric_for(table, budget) if how == "geometric" else direct(table, budget, spend=spend)
    return between_scores(table, thresholds)


def check_budget(table: ExitTable, budget: float) -> None:
    """Raise ValueError unless the budget lies between the cost of the first exit and that of the last."""
    cheapest, full = table.mean_price * table.costs.cheapest, table.mean_price * table.costs.full
    unit = table.costs.unit
    if not cheapest * (1 - ROUNDING) <= budget <= full * (1 + ROUNDING):  # NaN is refused as well
        raise ValueError(
            f"the budget is {budget:,.6g} {unit} per image; leaving at the first exit costs {cheapest:,.6g} {unit} and "
            f"going to the last {full:,.6g} {unit}: give a budget between them"
        )


def geometric(table: ExitTable, q: float) -> Thresholds:
    """Thresholds by which a share proportional to q^k of the images leaves at exit k = 1..K (MSDNet, RANet).

    Exit by exit, of the images still there the floor(n q_k) surest leave; where that is none the exit is not asked.
    Images with equal scores leave together. Raises ValueError unless q is a positive number.

    >>> scores, matrices = np.float32([[0.25, 0], [0.75, 0], [0.5, 0]]), np.ones((3, 2, 1, 1), int)
    >>> geometric(ExitTable(scores, matrices, PathCosts((1, 2), (0, 0))), q=0.5)  # 2/3 and 1/3 of the images
    (0.5,)
    """
    if not (q > 0 and math.isfinite(q)):
        raise ValueError(f"q is {q}: a positive number; below 1 most images leave early, above 1 late")
    powers = np.arange(table.num_exits) * math.log(q)
    shares = np.exp(powers - powers.max())
    shares /= shares.sum()
    there = np.ones(len(table.scores), bool)
    thresholds = []
    for exit in range(table.num_exits - 1):
        scores = table.scores[:, exit]
        leaving = min(math.floor(len(scores) * shares[exit] + ROUNDING), np.count_nonzero(there))
        threshold = float(np.sort(scores[there])[-leaving]) if leaving else math.inf
        there &= scores < threshold
        thresholds.append(threshold)
    return tuple(thresholds)


def geometric_for(table: ExitTable, budget: float) -> Thresholds:
    """Thresholds of the geometric form that spend as much of the budget as they can without exceeding it.

    q by bisection; scores tie and images are few, so single thresholds are then moved to other scores of their exit
    as long as that brings the average cost closer to the budget, and two at a time where it is then more than 3 %
    below it still. Where many images have the same score no thresholds may come closer.
    """
    check_budget(table, budget)
    low, high = -LARGEST_LOG_Q, LARGEST_LOG_Q
    tried = [geometric(table, math.exp(low)), geometric(table, math.exp(high))]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried.append(geometric(table, math.exp(middle)))
        within = at_thresholds(table, tried[-1]).average_cost <= budget
        low, high = (middle, high) if within else (low, middle)

    def closeness(judged: Judged) -> np.ndarray:
        return judged.average_costs

    start, _ = best(table, budget, as_sets(table, tried), closeness)
    found = climbed(table, budget, start, moves_of_one(every_score(table)), closeness)
    if at_thresholds(table, found).average_cost >= CLOSE * budget:
        return found
    return climbed(table, budget, np.array(found), moves_of_two(grid(table)), closeness)


def direct(table: ExitTable, budget: float, *, spend: float = 0.0) -> Thresholds:
    """The thresholds of best mIoU that were found at an average cost of at most the budget, and at least `spend` of it.

    Coordinate descent with the budget as a constraint. (Maximising mIoU - lambda cost instead can only find points on
    the convex hull of the curve.) Along a constraint one threshold cannot move alone, so two at a time take all pairs
    of values of the grid, quantiles of their exit's scores and "not asked"; then single ones take all scores. Starts
    from the geometric thresholds, so is never worse than they are, and from each exit alone. With `spend` 0 the result
    may cost less than the budget where more did not score more; where no thresholds spend enough, the geometric ones.
    """
    check_budget(table, budget)
    if not 0 <= spend <= 1:
        raise ValueError(f"spend is {spend}: the share of the budget that must be used, from 0 to 1")

    def miou(judged: Judged) -> np.ndarray:
        return np.where(judged.average_costs >= spend * budget, judged.mious, -np.inf)

    last = table.num_exits - 1
    spent = geometric_for(table, budget)
    alone = np.where(np.eye(last, dtype=bool), 0.0, np.inf)  # all images leave at one exit
    start, value = best(table, budget, np.concatenate([as_sets(table, [spent]), alone]), miou)
    if value == -np.inf:  # the geometric ones come closest to the budget from below
        return spent
    found = climbed(table, budget, start, [*moves_of_one(grid(table)), *moves_of_two(grid(table))], miou)
    return climbed(table, budget, np.array(found), moves_of_one(every_score(table)), miou)


def between_scores(table: ExitTable, thresholds: Sequence[float]) -> Thresholds:
    """The same decisions on the table by thresholds half-way down to the next lower score of their exit.

    Where there is none, every image of the table is sure enough, and by a threshold of 0 every other is.
    """
    moved = []
    for exit, threshold in enumerate(thresholds):
        scores = table.scores[:, exit]
        above, below = scores[scores >= threshold], scores[scores < threshold]
        if len(above) and len(below):
            middle = np.float32((float(above.min()) + float(below.max())) / 2)
            threshold = float(middle if middle > below.max() else above.min())
        moved.append(float(threshold) if len(below) else 0.0)
    return tuple(moved)


Value = Callable[[Judged], np.ndarray]
"""What is maximised: figures of M sets -> (M,)."""


class Moves(NamedTuple):
    """Other thresholds for some exits."""

    exits: tuple[int, ...]
    values: np.ndarray  # float64 (M, exits)


def best(table: ExitTable, budget: float, sets: np.ndarray, value: Value) -> tuple[np.ndarray, float]:
    """The set of thresholds of the largest value within the budget, the cheaper of equals; and that value.

    Where no image leaves its head is paid for nothing, which must not pass for coming closer to the budget.
    """
    judged = judge(table, sets)
    wasted = (np.isfinite(sets) & (judged.leaving[:, :-1] == 0)).any(axis=1)
    allowed = (judged.average_costs <= budget * (1 + ROUNDING)) & ~wasted
    values = np.where(allowed, value(judged), -np.inf)
    first = np.lexsort((judged.average_costs, -values))[0]
    return sets[first], float(values[first])


def climbed(table: ExitTable, budget: float, start: np.ndarray, moves: Sequence[Moves], value: Value) -> Thresholds:
    """Make the best of each kind of moves in turn until none of them gains."""
    found, reached = best(table, budget, start[None], value)
    gained = True
    while gained:
        gained = False
        for exits, values in moves:
            sets = np.repeat(found[None], len(values), axis=0)
            sets[:, exits] = values
            candidate, candidate_value = best(table, budget, sets, value)
            if candidate_value > reached:
                found, reached, gained = candidate, candidate_value, True
    return tuple(float(threshold) for threshold in found)


def moves_of_one(values: Sequence[np.ndarray]) -> list[Moves]:
    """For each exit: its threshold at every value, and infinite."""
    return [Moves((exit,), np.append(given, np.inf)[:, None]) for exit, given in enumerate(values)]


def moves_of_two(values: Sequence[np.ndarray]) -> list[Moves]:
    """For each pair of exits: their thresholds at every pair of values, and infinite."""
    choices = [np.append(given, np.inf) for given in values]
    return [
        Moves((first, second), np.array(list(product(choices[first], choices[second]))))
        for first, second in combinations(range(len(values)), 2)
    ]


def every_score(table: ExitTable) -> list[np.ndarray]:
    """The scores that are there at each exit but the last, ascending."""
    return [np.unique(table.scores[:, exit]) for exit in range(table.num_exits - 1)]


def grid(table: ExitTable) -> list[np.ndarray]:
    """The quantiles of the scores at each exit but the last, ascending."""
    return [np.unique(np.quantile(scores, QUANTILES, method="nearest")) for scores in every_score(table)]


# Controls ---------------------------------------------------------------------------------------------------------


def random_exits(table: ExitTable, shares: Sequence[float] | np.ndarray, seed: int) -> np.ndarray:
    """The random control: the same share of images leaves at each exit, drawn without looking at them; int64 (n,).

    Raises ValueError unless there is one share per exit, none negative, with sum 1.
    """
    wanted = np.asarray(shares, np.float64)
    if wanted.shape != (table.num_exits,) or (wanted < 0).any() or not math.isclose(wanted.sum(), 1, abs_tol=1e-6):
        raise ValueError(f"shares are {shares}; give {table.num_exits}, one per exit, none negative, with sum 1")
    # Where the shares are not whole numbers of images, those that lack most get the images that are left.
    exact = wanted * len(table.scores)
    counts = np.floor(exact + ROUNDING).astype(np.int64)
    missing = len(table.scores) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    exits = np.repeat(np.arange(table.num_exits), counts)
    return np.random.default_rng(seed).permutation(exits)


def curve(table: ExitTable, how: How = "direct", points: int = 19) -> list[CurvePoint]:
    """What thresholds for budgets from the first exit's cost to the last's give on the table, evenly spaced.

    Drawn on the split on which thresholds are chosen, the curve flatters; judge its thresholds on another table.
    """
    found = []
    for budget in table.mean_price * np.linspace(table.costs.cheapest, table.costs.full, points):
        thresholds = solve(table, float(budget), how)
        adaptive = at_thresholds(table, thresholds)
        draws = [scored(table, random_exits(table, adaptive.shares, seed)) for seed in range(RANDOM_DRAWS)]
        random_cost = table.mean_price * float(adaptive.shares @ np.add(table.costs.trunk, table.costs.heads))
        found.append(CurvePoint(adaptive.average_cost, adaptive.miou, thresholds, random_cost, float(np.mean(draws))))
    return found
