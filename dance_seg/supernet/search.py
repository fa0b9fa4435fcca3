"""The best network of a supernet within a budget: evolution with inherited weights, and random search beside it.

ViT-ResNAS's evolution (arXiv 2109.00642), which serves ENAS4D too: a first generation drawn at random, then children
of the best networks of all generations before, half by mutation and half by crossing two. Candidates cost between
`lowest` and 1 times the budget and none is judged twice.

Candidate i of generation g is drawn from (seed, g, i) and from the scores of the generations before. So a search that
was killed and started again on its storage finds what an undisturbed one finds, and so do several processes that
share a storage; they wait for one another at the end of a generation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dance_seg.early_exit.budget import ExitTable, How, Thresholds, at_thresholds, solve
from dance_seg.early_exit.paths import PathCosts
from dance_seg.randomness import Stream, generator
from dance_seg.supernet.space import SearchSpace, Subnet
from dance_seg.supernet.storage import Candidate, Proposal, Score, Scored, Store

__all__ = [
    "PAPER", "Budget", "Candidate", "Dynamic", "Evolution", "Found", "Progress", "Scored", "evolve", "judge_dynamic",
    "kendall_tau", "random_search", "reachable_cost",
]  # fmt: skip

HOPELESS = 5
"""After so many candidates in a row for which nothing new was found, a generation ends."""

STEPS = 10
"""For each try of rejection, so many steps into a window that was not met."""

Cost = Callable[[Subnet], float]


@dataclass(frozen=True)
class Budget:
    """What the network that is looked for may cost. Raises ValueError unless the limit is a positive number.

    >>> str(Budget(2e9)), str(Budget(12.5, "ms"))
    ('2e+09 MACs', '12.5 ms')
    """

    limit: float
    unit: str = "MACs"

    def __post_init__(self) -> None:
        """Refuse what is no limit."""
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"the budget is {self.limit} {self.unit}: give a positive number")

    def __str__(self) -> str:
        return f"{self.limit:.6g} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """How many networks are judged, and how children come about. The paper's figures are `PAPER`.

    Raises ValueError for figures that make no sense.

    >>> Evolution(initial=10, iterations=3, mutation=4, crossover=2).evaluations, PAPER.evaluations
    (22, 3350)
    """

    initial: int = 100  # networks of the first generation, drawn at random
    iterations: int = 10  # generations, the first included
    parents: int = 25  # the best of all generations before
    mutation: int = 25  # children by mutation, per generation
    crossover: int = 25  # children of two parents, per generation
    mutation_rate: float = 0.3  # of the choices of a child that are drawn anew
    lowest: float = 0.975  # of the budget: cheaper networks are not judged
    tries: int = 100  # draws for one candidate until it is new and within the budget, then ten times as many steps

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, least in {
            "initial": 1,
            "iterations": 1,
            "parents": 1,
            "mutation": 0,
            "crossover": 0,
            "tries": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.mutation_rate <= 1:
            raise ValueError(f"mutation_rate is {self.mutation_rate}: a probability above 0 and at most 1, say 0.3")
        if not 0 <= self.lowest <= 1:
            raise ValueError(f"lowest is {self.lowest}: the share of the budget that must be used, from 0 to 1")

    @property
    def evaluations(self) -> int:
        """How many networks are judged, unless the space holds too few."""
        return self.initial + (self.iterations - 1) * (self.mutation + self.crossover)


PAPER = Evolution(initial=500, iterations=20, parents=75, mutation=75, crossover=75)


class Progress(NamedTuple):
    """How far a search is."""

    done: int
    total: int
    best: Candidate | None


class Found(NamedTuple):
    """The outcome of a search."""

    best: Candidate
    history: tuple[Candidate, ...]  # by generation and number
    missing: int  # candidates that were left out because nothing new was found within the budget

    @property
    def best_so_far(self) -> list[float]:
        """The best score after each generation."""
        last = self.history[-1].generation
        return [max(one.score for one in self.history if one.generation <= end) for end in range(last + 1)]

    @property
    def note(self) -> str:
        """What to say of the candidates that are missing; empty when there are none."""
        judged = len(self.history)
        return f"{judged} networks were judged: {self.missing} fewer than asked for" if self.missing else ""


def evolve(
    space: SearchSpace,
    cost: Cost,
    score: Score,
    budget: Budget,
    options: Evolution | None = None,
    *,
    seed: int = 0,
    storage: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Found:
    """The network of the highest score that costs between `lowest` and 1 times the budget; of equals the cheaper.

    `cost` must depend on the network alone, and is asked once for each network drawn, judged or not; infinite, it
    leaves a network out. `score` takes the time: higher is better, details may come with it (`Scored`).

    With a `storage`, a file, everything judged is kept: a killed search goes on when started again, several processes
    and machines (on a shared folder) share the work, and more iterations may be asked for later. `about` is plain
    data on what the scores depend on beside the network, such as the checkpoint; it belongs to the storage.

    Raises ValueError, with the nearest costs, when no network was found within the budget, and DataError for a
    storage of another space, budget, seed, options or `about`.

    >>> space = SearchSpace({"width": (1, 2, 3, 4), "depth": (1, 2, 3, 4)})
    >>> area = lambda subnet: subnet["width"] * subnet["depth"]
    >>> found = evolve(space, area, lambda subnet: subnet["depth"], Budget(8), Evolution(initial=4, iterations=1))
    >>> str(found.best.subnet), found.note
    ('width=2 depth=4', '2 networks were judged: 2 fewer than asked for')
    """
    return within_budget("evolution", space, cost, score, budget, options, seed, storage, about, progress)


def random_search(
    space: SearchSpace,
    cost: Cost,
    score: Score,
    budget: Budget,
    options: Evolution | None = None,
    *,
    seed: int = 0,
    storage: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Found:
    """The control of `evolve`: as many networks, within the same budget, all drawn at random.

    The first of them are the first generation of `evolve` with the same seed. Everything else is as there.
    """
    options = options or Evolution()
    only = replace(options, initial=options.evaluations, iterations=1)
    return within_budget("random search", space, cost, score, budget, only, seed, storage, about, progress)


def within_budget(
    method: str,
    space: SearchSpace,
    cost: Cost,
    score: Score,
    budget: Budget,
    options: Evolution | None,
    seed: int,
    storage: str | Path | None,
    about: Mapping[str, Any] | None,
    progress: Callable[[Progress], None] | None,
) -> Found:
    """The search that `evolve` and `random_search` are."""
    options = options or Evolution()
    window = Window(space, cost, options.lowest * budget.limit, budget.limit)
    identity = {
        "method": method,
        "seed": seed,
        "budget": asdict(budget),
        # Nothing that is proposed depends on how many generations there will be.
        "options": {name: value for name, value in asdict(options).items() if name != "iterations"},
        "about": dict(about or {}),
    }

    def propose(generation: int, history: Sequence[Candidate]) -> list[Proposal]:
        if not generation:
            draws: list[Draw] = [space.sample] * options.initial
        else:
            parents = sorted(history, key=rank)[: options.parents]
            draws = [mutated(space, parents, options.mutation_rate)] * options.mutation
            draws += [crossed(space, parents)] * options.crossover
        known = {candidate.subnet for candidate in history}
        found = proposals(draws, known, window, options.tries, (seed, Stream.SEARCH, generation))
        if not generation and not found:
            raise window.nothing(budget)
        return found

    history = search(
        Store(storage, space, identity),
        propose,
        score,
        [options.initial] + [options.mutation + options.crossover] * (options.iterations - 1),
        progress,
    )
    return Found(min(history, key=rank), tuple(history), options.evaluations - len(history))


def rank(candidate: Candidate) -> tuple[float, float, int, int]:
    """Sorts the best first: the highest score, of equal ones the cheapest, of equals the earliest."""
    return -candidate.score, candidate.cost, candidate.generation, candidate.number


def search(
    store: Store,
    propose: Callable[[int, Sequence[Candidate]], list[Proposal]],
    score: Score,
    sizes: Sequence[int],
    progress: Callable[[Progress], None] | None,
) -> list[Candidate]:
    """Judge generation after generation; returns all candidates in order.

    `sizes` of the generations are those asked for. The first generation without any proposals is the last.
    """
    history: list[Candidate] = []

    def told() -> None:
        if progress:
            known = [candidate for place, candidate in store.finished.items() if place[0] < len(sizes)]
            progress(Progress(len(known), sum(sizes), min(known, key=rank, default=None)))

    for generation in range(len(sizes)):
        judged = store.judged(generation)
        if store.closed(generation) != len(judged):
            proposed = propose(generation, history)
            store.close(generation, len(proposed))
            judged = store.judge(generation, proposed, score, told)
        if not judged:
            break
        history += judged
    told()
    return history


# Drawing ------------------------------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator], Subnet]


class Window:
    """Which costs are allowed, from `low` to `high`; remembers the cost of each network that it was asked about."""

    def __init__(self, space: SearchSpace, cost: Cost, low: float, high: float) -> None:
        self.space, self.cost, self.low, self.high = space, cost, low, high
        self.costs: dict[Subnet, float] = {}

    def price(self, subnet: Subnet) -> float:
        """The cost of a network, infinite where it has none. Raises ValueError when it is no number."""
        if subnet not in self.costs:
            price = float(self.cost(subnet))
            if not price >= 0:  # NaN is refused as well
                raise ValueError(
                    f"the cost is {price} for {subnet}; a cost is a number, not negative, infinite to leave it out"
                )
            self.costs[subnet] = price
        return self.costs[subnet]

    def distance(self, subnet: Subnet) -> float:
        """How far a network's cost is outside; 0 within. What has none is never within."""
        price = self.price(subnet)
        if math.isinf(price):
            return math.inf
        return max(self.low - price, price - self.high, 0.0)

    def nothing(self, budget: Budget) -> ValueError:
        """The error to raise when no network was found within, with the nearest costs that there are."""
        smallest, largest = self.price(self.space.smallest), self.price(self.space.largest)
        priced = {subnet: price for subnet, price in self.costs.items() if math.isfinite(price)}
        if not priced:
            return ValueError(
                f"none of {len(self.costs)} networks has a cost in {budget.unit}: parts of each were not measured; "
                "move the latency table away, and one is measured anew"
            )
        below = max((price for price in priced.values() if price < self.low), default=None)
        above = min((price for price in priced.values() if price > self.high), default=None)
        nearest = " and ".join(f"{price:.6g}" for price in (below, above) if price is not None)
        closest = min(priced, key=self.distance)
        return ValueError(
            f"no network of this space was found that costs between {self.low:.6g} and {budget}; the nearest costs are "
            f"{nearest}, the smallest network's is {smallest:.6g} and the largest's {largest:.6g}: give a budget that "
            f"a network meets, or a smaller `lowest`; the nearest network costs {self.costs[closest]:.6g}: {closest}"
        )


def proposals(
    draws: Sequence[Draw], known: set[Subnet], window: Window, tries: int, place: tuple[int, int, int]
) -> list[Proposal]:
    """A new network within the window for each draw, as far as any is found; draw i is of the random place (*, i)."""
    known = set(known)
    found: list[Proposal] = []
    failures = 0
    for index, draw in enumerate(draws):
        subnet = new_subnet(draw, known, window, tries, generator(*place, index))
        failures = failures + 1 if subnet is None else 0
        if failures == HOPELESS:
            break
        if subnet is not None:
            known.add(subnet)
            found.append(Proposal(subnet, window.price(subnet)))
    return found


def new_subnet(
    draw: Draw, known: set[Subnet], window: Window, tries: int, random: np.random.Generator
) -> Subnet | None:
    """A network within the window that is not known, by rejection; None when there was none in all tries.

    Where a window is narrow few draws lie in it. So when all were rejected the last of them walks there: one or two
    choices at a time are drawn anew, and what takes the cost farther away is undone.
    """
    for _ in range(tries):
        subnet = draw(random)
        if subnet not in known and not window.distance(subnet):
            return subnet
    values = list(window.space.values.items())
    for _ in range(STEPS * tries):
        changed = random.choice(len(values), min(int(random.integers(1, 3)), len(values)), replace=False)
        drawn = {values[place][0]: values[place][1][int(random.integers(len(values[place][1])))] for place in changed}
        moved = window.space.subnet({**subnet.as_record(), **drawn})
        if window.distance(moved) <= window.distance(subnet):
            subnet = moved
        if subnet not in known and not window.distance(subnet):
            return subnet
    return None


def mutated(space: SearchSpace, parents: Sequence[Candidate], rate: float) -> Draw:
    """Draws children of one parent."""

    def draw(random: np.random.Generator) -> Subnet:
        return space.mutate(parents[int(random.integers(len(parents)))].subnet, rate, random)

    return draw


def crossed(space: SearchSpace, parents: Sequence[Candidate]) -> Draw:
    """Draws children of two parents; of one where there is only one, which is then known already."""

    def draw(random: np.random.Generator) -> Subnet:
        one, other = random.choice(len(parents), 2, replace=len(parents) < 2)
        return space.cross(parents[int(one)].subnet, parents[int(other)].subnet, random)

    return draw


# Networks with exits ------------------------------------------------------------------------------------------------


class Dynamic(NamedTuple):
    """What a network with exits scores and costs per image when images leave early."""

    miou: float  # points
    average_cost: float  # in the table's unit
    thresholds: Thresholds

    def as_scored(self) -> Scored:
        """For `evolve`; infinite thresholds, which JSON does not have, as None."""
        written = [None if math.isinf(threshold) else threshold for threshold in self.thresholds]
        return Scored(self.miou, {"thresholds": written, "average_cost": self.average_cost})


def judge_dynamic(
    table: ExitTable, budget: Budget | None = None, *, thresholds: Sequence[float] | None = None, how: How = "direct"
) -> Dynamic:
    """The dynamic performance of a candidate from its table, which the network ran once for.

    Either with the thresholds given, or with those that are best within a budget per image. Thresholds are solved for
    and are not choices of the space: with the table at hand every set of them costs no more than a sum, while a space
    with thresholds in it would hold each network many times and run it anew for each.

    Raises ValueError unless one of the two is given, for a budget of another unit, and for one below the first exit.
    """
    if (budget is None) == (thresholds is None):
        raise ValueError("give either a budget or thresholds")
    if thresholds is None:
        assert budget is not None
        if budget.unit != table.costs.unit:
            raise ValueError(f"the budget is in {budget.unit}, and the costs of the exits in {table.costs.unit}")
        if budget.limit >= table.costs.full:
            thresholds = (math.inf,) * (table.num_exits - 1)
        else:
            thresholds = solve(table, budget.limit, how)
    found = at_thresholds(table, thresholds)
    return Dynamic(found.miou, found.average_cost, tuple(thresholds))


def reachable_cost(costs: PathCosts, budget: Budget) -> float:
    """The cost per image nearest to the budget that thresholds can make a network with exits spend: `cost` of a search.

    A network is then within the budget when leaving at the first exit is, and spends it when all exits together do.

    >>> costs = PathCosts(trunk=(10, 30, 60), heads=(1, 2, 3))
    >>> [reachable_cost(costs, Budget(limit)) for limit in (5, 40, 100)]
    [11, 40, 63]
    """
    return min(max(budget.limit, costs.cheapest), costs.full)


# Do scores rank as they should? -------------------------------------------------------------------------------------


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's rank correlation, tau-b, from -1 to 1: of supernet scores with those of trained networks, say.

    Pairs in equal order less those in opposite order, over the geometric mean of the pairs not tied in each. NaN
    where all values of one are equal. Raises ValueError for fewer than two pairs or numbers that are not finite.

    >>> kendall_tau([1, 2, 3, 4], [1, 2, 4, 3])
    0.6666666666666666
    """
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(f"give two lists of equal length, at least 2; they have {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a rank correlation needs finite numbers")
    pairs = np.triu_indices(len(first), 1)
    signs = [np.sign(values[:, None] - values[None, :])[pairs] for values in (first, second)]
    untied = [np.count_nonzero(sign) for sign in signs]
    return float((signs[0] * signs[1]).sum() / math.sqrt(untied[0] * untied[1])) if all(untied) else math.nan
