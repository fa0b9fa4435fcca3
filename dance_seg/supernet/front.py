"""The whole front of score against cost by NSGA-II, as Optuna has it, on the same storages as `search`.

The sampler is seeded anew for each candidate from (seed, generation, index) and sees the generations before, read
back from the storage, so that the front is the same whether the search was killed or shared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dance_seg.randomness import Stream, generator
from dance_seg.supernet.search import HOPELESS, Cost, Progress, Window, search
from dance_seg.supernet.space import SearchSpace, Subnet
from dance_seg.supernet.storage import Candidate, Proposal, Score, Store

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import NSGAIISampler
    from optuna.study import Study


@dataclass(frozen=True, kw_only=True)
class Front:
    """How many networks NSGA-II judges. Raises ValueError for figures that make no sense."""

    population: int = 24  # networks per generation
    generations: int = 12  # the first, which is drawn at random, included
    tries: int = 50  # draws for one candidate, until it is new

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, least in {"population": 2, "generations": 1, "tries": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class FoundFront(NamedTuple):
    """The outcome of a search for the front."""

    front: tuple[Candidate, ...]  # by cost, ascending; scores ascend too
    history: tuple[Candidate, ...]  # by generation and number
    missing: int  # candidates that were left out because nothing new was found


def front(
    space: SearchSpace,
    cost: Cost,
    score: Score,
    options: Front | None = None,
    *,
    seed: int = 0,
    storage: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> FoundFront:
    """The networks found to which no other is both cheaper and better (Deb et al., 2002). Arguments as `evolve`'s.

    Other than NSGA-II in general, no network is judged twice. Raises DataError for a storage of another search.
    """
    options = options or Front()
    identity = {
        "method": "front",
        "seed": seed,
        "options": {name: value for name, value in asdict(options).items() if name != "generations"},
        "about": dict(about or {}),
    }
    window = Window(space, cost, 0, float("inf"))

    def propose(generation: int, history: Sequence[Candidate]) -> list[Proposal]:
        return children(study, space, window, history, options, seed, generation)

    study = quiet_study()
    store = Store(storage, space, identity)
    history = search(store, propose, score, [options.population] * options.generations, progress)
    return FoundFront(pareto(history), tuple(history), options.population * options.generations - len(history))


def pareto(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in cost without losing in score, by cost; of equal ones the first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.cost, -one.score)):
        if not best or candidate.score > best[-1].score:
            best.append(candidate)
    return tuple(best)


def quiet_study() -> "Study":
    """The library's own view of the history, in memory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler())


def children(
    study: "Study",
    space: SearchSpace,
    window: Window,
    history: Sequence[Candidate],
    options: Front,
    seed: int,
    generation: int,
) -> list[Proposal]:
    """The networks that NSGA-II judges in a generation, after those of the generations before.

    `study` is shown what is new of the history.
    """
    import optuna

    distributions: dict[str, BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(values) for name, values in space.values.items()
    }
    shown = len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
    for one in history[shown:]:
        trial = optuna.trial.create_trial(
            values=[one.score, one.cost],
            params=one.subnet.as_record(),
            distributions=distributions,
            user_attrs={"generation": one.generation},
        )
        study.add_trial(trial)
    if generation and len(history) < 2:
        return []
    known = {one.subnet for one in history}
    found: list[Proposal] = []
    failures = 0
    for index in range(options.population):
        subnet = new_child(window, study, distributions, known, options, (seed, Stream.SEARCH, generation, index))
        failures = failures + 1 if subnet is None else 0
        if failures == HOPELESS:
            break
        if subnet is not None:
            known.add(subnet)
            found.append(Proposal(subnet, window.price(subnet)))
    return found


def new_child(
    window: Window,
    study: "Study",
    distributions: Mapping[str, "BaseDistribution"],
    known: set[Subnet],
    options: Front,
    place: tuple[int, int, int, int],
) -> Subnet | None:
    """A network by NSGA-II that is not known and has a cost; None when there was none in all tries."""
    from optuna.trial import TrialState

    for number in range(options.tries):
        seeds = generator(*place, number).integers(2**32, size=2)
        study.sampler = counted_sampler(options.population, place[2], distributions, int(seeds[0]), int(seeds[1]))
        trial = study.ask(dict(distributions))
        study.tell(trial, state=TrialState.FAIL)  # judged elsewhere, and then in the history
        subnet = window.space.subnet(trial.params)
        if subnet not in known and not window.distance(subnet):
            return subnet
    return None


def counted_sampler(
    population: int, generation: int, distributions: Mapping[str, "BaseDistribution"], seed: int, other_seed: int
) -> "NSGAIISampler":
    """Optuna's NSGA-II for one child of a generation, of trials that say of which generation they are."""
    import optuna

    class Counted(optuna.samplers.NSGAIISampler):
        """The library counts finished trials to know the generation, which a killed search would change."""

        def get_trial_generation(self, study: Any, trial: Any) -> int:
            return generation

        def get_population(self, study: Any, generation: int) -> list[Any]:
            states = [optuna.trial.TrialState.COMPLETE]
            trials = study.get_trials(deepcopy=False, states=states)
            return [trial for trial in trials if trial.user_attrs["generation"] == generation]

        def select_parent(self, study: Any, generation: int) -> list[Any]:
            # The library keeps them in the order of trials, but hands them out in another one the first time.
            return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, "BaseDistribution"]:
            return {name: one for name, one in distributions.items() if not one.single()}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return independent.sample_independent(study, trial, param_name, param_distribution)

    # What is mutated must not follow from the numbers that choose the parents, as with one seed for both.
    independent = optuna.samplers.RandomSampler(seed=other_seed)
    return Counted(population_size=population, seed=seed)
