import numpy as np
import pytest
from optuna.trial import TrialState

from dance_seg.supernet.front import Front, children, counted_sampler, front, pareto, quiet_study
from dance_seg.supernet.search import Window
from dance_seg.supernet.space import SearchSpace
from tests.dance_seg.supernet.toy_space import SPACE, cost, places, score

OPTIONS = Front(population=12, generations=5)


def area(candidates):
    """What the front covers above a score of 0 and up to a cost of 508."""
    points = [(one.cost, one.score) for one in pareto(candidates)]
    ends = [price for price, _ in points[1:]] + [508]
    return sum((end - price) * value for (price, value), end in zip(points, ends, strict=True))


def test_no_network_of_the_front_is_beaten_and_every_other_one_is():
    found = front(SPACE, cost, score, OPTIONS)

    def beats(one, other):
        return (
            one.cost <= other.cost and one.score >= other.score and (one.cost, one.score) != (other.cost, other.score)
        )

    assert len(found.front) > 5
    assert not any(beats(one, other) for one in found.history for other in found.front)
    left = [one for one in found.history if one not in found.front]
    assert all(any(beats(one, other) for one in found.front) for other in left)
    assert [one.cost for one in found.front] == sorted(one.cost for one in found.front)


def test_a_network_without_a_cost_is_left_out():
    found = front(SPACE, lambda subnet: np.inf if subnet["place0"] == 1 else cost(subnet), score, OPTIONS)
    assert found.history
    assert all(np.isfinite(one.cost) and one.subnet["place0"] != 1 for one in found.history)


def test_no_network_is_judged_twice_and_the_seed_alone_decides():
    one, same, other = (front(SPACE, cost, score, OPTIONS, seed=seed) for seed in (0, 0, 1))
    assert len({candidate.subnet for candidate in one.history}) == len(one.history) == 60
    assert all(candidate.cost == cost(candidate.subnet) for candidate in one.history)
    assert places(one.history) == places(same.history) != places(other.history)


def test_the_front_covers_more_than_that_of_as_many_random_networks():
    seeds, more = range(3), Front(population=20, generations=12)
    evolved = [area(front(SPACE, cost, score, more, seed=seed).history) for seed in seeds]
    at_random = [front(SPACE, cost, score, Front(population=240, generations=1), seed=seed).history for seed in seeds]
    assert np.mean(evolved) > 1.03 * np.mean([area(history) for history in at_random])


def test_parents_come_in_one_order_however_often_they_are_asked_for():
    # The library hands them out in another order the first time, which a search that was killed may have had.
    study, options = quiet_study(), Front(population=6)
    history = [
        one._replace(generation=one.number // 6) for one in front(SPACE, cost, score, Front(population=12)).history[:12]
    ]
    children(study, SPACE, Window(SPACE, cost, 0, 1e9), history, options, 0, 2)
    sampler = counted_sampler(6, 2, study.get_trials()[0].distributions, 0, 0)
    fresh = quiet_study()
    for trial in study.get_trials(states=[TrialState.COMPLETE]):
        fresh.add_trial(trial)
    first, again = ([trial.number for trial in sampler.get_parent_population(fresh, 2)] for _ in range(2))
    assert first == again


def test_a_small_space_is_judged_as_a_whole():
    space = SearchSpace({"width": (1, 2, 3), "depth": (2,)})
    found = front(space, lambda one: one["width"], lambda one: min(one["width"], 2), OPTIONS)
    assert {str(one.subnet) for one in found.history} == {f"width={width} depth=2" for width in (1, 2, 3)}
    assert [one.subnet["width"] for one in found.front] == [1, 2]
    assert found.missing == 57


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="population is 1; it must be at least 2"):
        Front(population=1)
