import math

import numpy as np
import pytest

from dance_seg.early_exit.budget import ExitTable, at_thresholds
from dance_seg.early_exit.paths import PathCosts
from dance_seg.supernet.search import (
    PAPER,
    Budget,
    Evolution,
    Scored,
    evolve,
    judge_dynamic,
    kendall_tau,
    random_search,
    reachable_cost,
)
from dance_seg.supernet.space import SearchSpace
from tests.dance_seg.supernet.toy_space import BUDGET, SMALL, SPACE, all_costs_and_scores, cost, places, score

LONGER = Evolution(initial=40, iterations=6, parents=10, mutation=10, crossover=10)
SEEDS = range(5)


def test_evolution_comes_near_the_optimum_and_nearer_than_as_many_random_networks():
    costs, scores = all_costs_and_scores()
    within = scores[(costs >= 0.975 * 300) & (costs <= 300)]
    assert len(within) == 13781
    above = {}  # of all networks within the budget, how many score higher than the one found, on average over the seeds
    for search in (evolve, random_search):
        founds = [search(SPACE, cost, score, BUDGET, LONGER, seed=seed) for seed in SEEDS]
        assert all(len(found.history) == 140 for found in founds)
        above[search] = np.mean([(within > found.best.score + 1e-9).mean() for found in founds])
    assert above[evolve] < 0.001
    assert above[evolve] < above[random_search] / 10


def test_every_candidate_is_another_network_within_the_window():
    history = evolve(SPACE, cost, score, BUDGET, LONGER).history
    assert all(0.975 * 300 <= one.cost <= 300 and one.cost == cost(one.subnet) for one in history)
    assert all(one.score == score(one.subnet) for one in history)
    assert len({one.subnet for one in history}) == len(history)
    assert [(one.generation, one.number) for one in history] == [
        (generation, index) for generation in range(6) for index in range(40 if generation == 0 else 20)
    ]


def test_the_best_so_far_never_falls_and_ends_at_the_winner():
    found = evolve(SPACE, cost, score, BUDGET, LONGER)
    assert found.best_so_far == sorted(found.best_so_far)
    assert found.best_so_far[0] < found.best_so_far[-1] == found.best.score == max(one.score for one in found.history)


def test_children_take_their_choices_from_the_best_of_all_generations():
    # Without mutation nothing new can come in, so each child mixes choices of the parents that were there.
    options = Evolution(initial=30, iterations=3, parents=8, mutation=0, crossover=10, lowest=0.0)
    history = evolve(SPACE, cost, score, BUDGET, options).history
    for generation in (1, 2):
        before = sorted((one for one in history if one.generation < generation), key=lambda one: (-one.score, one.cost))
        allowed = [{parent.subnet[name] for parent in before[:8]} for name in SPACE.values]
        born = [one for one in history if one.generation == generation]
        for child in born:
            assert all(value in some for (_, value), some in zip(child.subnet.choices, allowed, strict=True))


def test_the_seed_alone_decides():
    one, same, other = (evolve(SPACE, cost, score, BUDGET, SMALL, seed=seed) for seed in (1, 1, 2))
    assert places(one.history) == places(same.history) != places(other.history)


def test_the_control_begins_with_the_same_networks():
    evolved, control = (search(SPACE, cost, score, BUDGET, SMALL) for search in (evolve, random_search))
    assert places(control.history)[:6] == places(evolved.history)[:6]
    assert len(control.history) == len(evolved.history)


def test_of_equal_scores_the_cheapest_wins():
    found = evolve(SPACE, cost, lambda subnet: 1.0, BUDGET, SMALL)
    assert found.best.cost == min(one.cost for one in found.history)


def test_a_space_with_too_few_networks_gives_what_it_has_and_says_so():
    space = SearchSpace({"width": (1, 2, 3, 4), "depth": (1, 2, 3, 4)})
    found = evolve(space, lambda one: one["width"] * one["depth"], lambda one: one["depth"], Budget(12), SMALL)
    assert {str(one.subnet) for one in found.history} == {"width=3 depth=4", "width=4 depth=3"}
    assert str(found.best.subnet) == "width=3 depth=4"
    assert found.missing == SMALL.evaluations - 2 == 16
    assert found.note == "2 networks were judged: 16 fewer than asked for"


def test_a_window_that_no_random_draw_meets_is_walked_into():
    space = SearchSpace({f"place{place}": tuple(range(1, 9)) for place in range(30)})
    # Random networks cost 135 on average with a deviation of 12.5; 40 is more than 7 of them below.
    found = evolve(space, lambda one: sum(value for _, value in one.choices), lambda one: 0.0, Budget(40), SMALL)
    assert found.missing == 0
    assert all(39 <= one.cost <= 40 for one in found.history)


@pytest.mark.parametrize(("limit", "nearest"), [(20, "are 48,"), (500, "are 192,"), (60.4, "are 57 and 61,")])
def test_a_budget_that_no_network_meets_names_the_nearest_costs(limit, nearest):
    coarse = SearchSpace({"one": (1, 2, 3, 4), "other": (1, 2, 3, 4)})  # 48, 51, 54, 57, 93, ...; 60 for one=..
    prices = {(1, other): 45 + 3 * other for other in (1, 2, 3, 4)} | {(4, 4): 192}

    def price(subnet):
        return prices.get((subnet["one"], subnet["other"]), 61)

    with pytest.raises(
        ValueError, match=rf"nearest costs {nearest} the smallest network's is 48 and the largest's 192"
    ):
        evolve(coarse, price, score, Budget(limit), SMALL)


def test_a_budget_that_no_network_meets_names_the_nearest_network():
    space = SearchSpace({"one": (1, 2), "other": (1, 2)})
    with pytest.raises(ValueError, match=r"the nearest network costs 22: one=2 other=2$"):
        evolve(space, lambda one: 10 * one["one"] + one["other"], score, Budget(100), SMALL)


def test_a_network_without_a_cost_is_left_out():
    found = evolve(SPACE, lambda subnet: math.inf if subnet["place0"] == 1 else cost(subnet), score, BUDGET, SMALL)
    assert len(found.history) == len(evolve(SPACE, cost, score, BUDGET, SMALL).history)
    assert all(one.subnet["place0"] != 1 and one.cost <= BUDGET.limit for one in found.history)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match=r"the score is (nan|inf) for place0="):
        evolve(SPACE, cost, lambda subnet: value, BUDGET, SMALL)


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_a_cost_that_is_no_cost_is_refused(value):
    with pytest.raises(ValueError, match=r"the cost is (nan|-1.0) for place0="):
        evolve(SPACE, lambda subnet: value, score, BUDGET, SMALL)


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf])
def test_a_budget_is_a_positive_number(limit):
    with pytest.raises(ValueError, match="give a positive number"):
        Budget(limit)


@pytest.mark.parametrize(
    "wrong", [{"initial": 0}, {"iterations": 0}, {"parents": 0}, {"mutation": -1}, {"mutation_rate": 0}, {"lowest": 2}]
)
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        Evolution(**wrong)


def test_the_papers_figures():
    assert PAPER.evaluations == 500 + 19 * (75 + 75)


def test_each_cost_is_asked_once():
    asked = []
    evolve(SPACE, lambda subnet: asked.append(subnet) or cost(subnet), score, BUDGET, SMALL)
    assert len(asked) == len(set(asked))


def test_progress_counts_to_the_end_and_knows_the_best():
    told = []
    found = evolve(SPACE, cost, score, BUDGET, SMALL, progress=told.append)
    assert [one.done for one in told if one.done] == sorted(one.done for one in told if one.done)
    assert told[-1] == (18, 18, found.best)
    assert {one.done for one in told} >= set(range(1, 19))


# Networks with exits


def table(num_images=40, num_exits=3, num_classes=4, seed=0):
    """Later exits are right more often, and sure images more often than others."""
    random = np.random.default_rng(seed)
    scores = random.random((num_images, num_exits)).astype(np.float32)
    labels = random.integers(num_classes, size=(num_images, 50))
    matrices = np.zeros((num_images, num_exits, num_classes, num_classes), np.int64)
    for image in range(num_images):
        for exit in range(num_exits):
            right = random.random(50) < 0.4 + 0.2 * exit + 0.2 * scores[image, exit]
            said = np.where(right, labels[image], random.integers(num_classes, size=50))
            np.add.at(matrices[image, exit], (labels[image], said), 1)
    return ExitTable(scores, matrices, PathCosts(trunk=(10, 30, 60), heads=(1, 2, 3)))


def test_given_thresholds_are_looked_up():
    found = judge_dynamic(table(), thresholds=(0.7, 0.4))
    expected = at_thresholds(table(), (0.7, 0.4))
    assert found == (expected.miou, expected.average_cost, (0.7, 0.4))


@pytest.mark.parametrize("how", ["direct", "geometric"])
@pytest.mark.parametrize("limit", [11, 25, 50])
def test_solved_thresholds_keep_the_budget_and_are_those_that_the_figures_belong_to(limit, how):
    found = judge_dynamic(table(), Budget(limit), how=how)
    assert found.average_cost <= limit * (1 + 1e-9)
    assert judge_dynamic(table(), thresholds=found.thresholds) == found


def test_a_network_that_is_cheaper_than_the_budget_runs_to_its_end():
    found = judge_dynamic(table(), Budget(100))
    assert found.thresholds == (math.inf, math.inf)
    assert found.average_cost == 63


def test_a_dynamic_judgement_that_is_none_is_refused():
    with pytest.raises(ValueError, match="either a budget or thresholds"):
        judge_dynamic(table())
    with pytest.raises(ValueError, match="either a budget or thresholds"):
        judge_dynamic(table(), Budget(20), thresholds=(0.5, 0.5))
    with pytest.raises(ValueError, match="the budget is in ms, and the costs of the exits in MACs"):
        judge_dynamic(table(), Budget(20, "ms"))
    with pytest.raises(ValueError, match="leaving at the first exit costs 11"):
        judge_dynamic(table(), Budget(10))
    with pytest.raises(ValueError, match="take 2"):
        judge_dynamic(table(), thresholds=(0.5,))


def test_networks_with_exits_are_searched_by_what_they_spend_on_average():
    # Width multiplies all costs: 11 to 63 at width 1. At 100 width 1 cannot spend it and width 16 not keep it.
    space = SearchSpace({"width": (1, 2, 4, 8, 16), "kernel": (3, 5, 7)})
    budget = Budget(100)

    def costs(subnet):
        return PathCosts(tuple(subnet["width"] * one for one in (10, 30, 60)), (subnet["width"],) * 3)

    def judged(subnet):
        given = table(seed=int(subnet["kernel"]))
        return judge_dynamic(ExitTable(given.scores, given.matrices, costs(subnet)), budget).as_scored()

    found = evolve(space, lambda subnet: reachable_cost(costs(subnet), budget), judged, budget, SMALL)
    assert {one.subnet["width"] for one in found.history} == {2, 4, 8}
    assert all(one.details["average_cost"] <= 100 * (1 + 1e-9) for one in found.history)
    thresholds = [math.inf if one is None else one for one in found.best.details["thresholds"]]
    again = table(seed=int(found.best.subnet["kernel"]))
    again = ExitTable(again.scores, again.matrices, costs(found.best.subnet))
    assert judge_dynamic(again, thresholds=thresholds).miou == found.best.score


def test_details_stay_with_their_candidate():
    found = evolve(SPACE, cost, lambda one: Scored(score(one), {"said": str(one)}), BUDGET, SMALL)
    assert all(one.details["said"] == str(one.subnet) for one in found.history)
    assert found.best.as_record()["subnet"] == found.best.subnet.as_record()


# Rank correlation


def test_kendall_tau_of_pairs_counted_by_hand():
    # Of six pairs (1,1) (2,2) (3,2) (4,0): three with the last are in opposite order, two in equal, one tied in one.
    assert kendall_tau([1, 2, 3, 4], [1, 2, 2, 0]) == pytest.approx((2 - 3) / math.sqrt(6 * 5))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("values", [3, 1000])
def test_kendall_tau_is_scipys(seed, values):
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(seed)
    one, other = random.integers(values, size=(2, 15))
    assert kendall_tau(one, other + one // 2) == pytest.approx(stats.kendalltau(one, other + one // 2).statistic)


def test_kendall_tau_of_what_cannot_be_ranked():
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))
    for wrong in (([1], [1]), ([1, 2], [1, 2, 3]), ([1, math.nan], [1, 2])):
        with pytest.raises(ValueError, match=r"equal length|finite numbers"):
            kendall_tau(*wrong)


def test_where_no_network_has_a_cost_it_is_not_the_budget_that_is_blamed():
    with pytest.raises(ValueError, match=r"none of \d+ networks has a cost in ms: parts of each were not measured"):
        evolve(SPACE, lambda subnet: math.inf, score, Budget(10, "ms"), SMALL)
