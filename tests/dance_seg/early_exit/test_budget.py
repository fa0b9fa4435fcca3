"""Thresholds for a budget: against hand arithmetic, plain loops and all combinations of thresholds."""

import math
import statistics
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_seg.early_exit.budget import (
    ExitTable,
    at_thresholds,
    between_scores,
    curve,
    direct,
    geometric,
    geometric_for,
    random_exits,
    scored,
    solve,
)
from dance_seg.early_exit.paths import PathCosts
from dance_seg.metrics import scores as scores_of

INF = math.inf


def random_table(images=12, exits=3, classes=4, seed=0, ties=0, heads=0.05):
    """Deeper exits are right more often and cost more; each image's score tells a little of how right its exit is.

    With `ties` scores are rounded to so many steps.
    """
    random = np.random.default_rng(seed)
    hardness = random.random(images)
    matrices = np.zeros((images, exits, classes, classes), np.int32)
    for image, exit in product(range(images), range(exits)):
        labels = np.random.default_rng((seed, image)).integers(0, classes, 200)
        wrong = random.random(200) < 0.6 * hardness[image] * (1 - exit / exits)
        np.add.at(matrices[image, exit], (labels, np.where(wrong, random.integers(0, classes, 200), labels)), 1)
    scores = np.clip(1 - hardness[:, None] + 0.1 * random.standard_normal((images, exits)), 0, 1)
    scores = np.round(scores * ties) / ties if ties else scores
    trunk = tuple(100.0 * (exit + 1) ** 2 for exit in range(exits))
    return ExitTable(scores.astype(np.float32), matrices, PathCosts(trunk, (heads * 100.0,) * exits))


tables = st.builds(
    random_table,
    images=st.integers(1, 30),
    exits=st.integers(2, 4),
    classes=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    ties=st.sampled_from([0, 3, 10]),
    heads=st.sampled_from([0.0, 0.05, 0.4]),
)
shares_of_budget = st.floats(0, 1)


def within(table, share):
    """A budget at a share of the way from the cheapest to the full."""
    return table.costs.cheapest + share * (table.costs.full - table.costs.cheapest)


def matrix(right, wrong):
    """Two classes; `right` pixels of class 0, and `wrong` of class 1 taken for class 0."""
    return [[right, 0], [wrong, 0]]


BY_HAND = ExitTable(
    np.float32([[0.9, 0.0], [0.2, 0.0], [0.6, 0.0]]),
    np.array(
        [
            [[[4, 0], [0, 0]], [[4, 0], [0, 0]]],
            [[[0, 2], [0, 2]], [[2, 0], [0, 2]]],
            [[[2, 1], [0, 1]], [[3, 0], [0, 1]]],
        ]
    ),
    PathCosts((10, 40), (1, 2), "ms"),
)


# Judging ----------------------------------------------------------------------------------------------------------


def test_judgement_by_hand():
    found = at_thresholds(BY_HAND, (0.6,))

    assert found.exits.tolist() == [0, 1, 0]
    assert found.average_cost == pytest.approx((11 + 43 + 11) / 3)  # the second image paid both heads
    assert found.shares.tolist() == pytest.approx([2 / 3, 1 / 3])
    # Right: 4 + 2 + 2 of class 0, 2 + 1 of class 1; one pixel of class 0 was taken for class 1.
    assert found.miou == pytest.approx(100 * (8 / 9 + 3 / 4) / 2)
    # The sample's deviation of 11, 43 and 11, over the root of 3 images, and once more for the other split.
    assert found.cost_deviation == pytest.approx(statistics.stdev([11, 43, 11]) / math.sqrt(3) * math.sqrt(2))
    one = ExitTable(BY_HAND.scores[:1], BY_HAND.matrices[:1], BY_HAND.costs)
    assert at_thresholds(one, (0.6,)).cost_deviation == 0  # nothing is known of others


def test_thresholds_of_one_split_spend_on_the_next_as_much_more_or_less_as_is_said():
    table = random_table(images=2400, heads=0.0)
    splits = [
        ExitTable(table.scores[start : start + 60], table.matrices[start : start + 60], table.costs)
        for start in range(0, 2400, 60)
    ]
    said, seen = [], []
    for chosen_on, other in pairwise(splits):
        thresholds = solve(chosen_on, within(table, 0.5), "geometric")
        found = at_thresholds(chosen_on, thresholds)
        said.append(found.cost_deviation)
        seen.append(at_thresholds(other, thresholds).average_cost - found.average_cost)
    assert math.hypot(*seen) / math.sqrt(len(seen)) == pytest.approx(statistics.mean(said), rel=0.3)
    assert abs(statistics.mean(seen)) < 0.5 * statistics.mean(said)  # and no more often more than less


def test_an_exit_that_is_not_asked_costs_no_head():
    found = at_thresholds(BY_HAND, (INF,))

    assert found.average_cost == 42
    assert found.miou == 100
    assert at_thresholds(BY_HAND, (0.0,)).average_cost == 11


def test_a_larger_image_costs_so_many_times_more():
    table = ExitTable(BY_HAND.scores, BY_HAND.matrices, BY_HAND.costs, (1.0, 4.0, 0.5))

    assert at_thresholds(table, (0.6,)).average_cost == pytest.approx((11 + 4 * 43 + 0.5 * 11) / 3)
    assert at_thresholds(table, (0.6,)).miou == at_thresholds(BY_HAND, (0.6,)).miou
    # Every image costs 11 at least and 42 at most, times its price.
    for budget in (11 * 5.5 / 3 - 0.1, 42 * 5.5 / 3 + 0.1):
        with pytest.raises(ValueError, match="give a budget between them"):
            solve(table, budget)
    assert at_thresholds(table, solve(table, 63)).exits.tolist() == [0, 1, 0]
    assert at_thresholds(table, solve(table, 62)).exits.tolist() == [0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(table=tables, data=st.data())
def test_judgement_is_that_of_a_plain_loop(table, data):
    number = st.one_of(st.just(INF), st.sampled_from([float(score) for score in table.scores.ravel()]))
    thresholds = data.draw(st.tuples(*[number] * (table.num_exits - 1)))
    asked = [threshold < INF for threshold in thresholds]
    exits, costs = [], []
    total = np.zeros(table.matrices.shape[2:], np.int64)
    for image, row in enumerate(table.scores):
        exit = next((k for k, threshold in enumerate(thresholds) if row[k] >= threshold), table.num_exits - 1)
        exits.append(exit)
        costs.append(table.costs.total(exit, asked))
        total += table.matrices[image, exit]

    found = at_thresholds(table, thresholds)

    assert found.exits.tolist() == exits
    assert found.average_cost == pytest.approx(np.mean(costs))
    assert found.miou == pytest.approx(scores_of(total).miou)
    assert found.shares.tolist() == pytest.approx([exits.count(k) / len(exits) for k in range(table.num_exits)])
    assert scored(table, np.array(exits)) == pytest.approx(found.miou)


def test_counts_beyond_32_bits_are_exact():
    matrices = np.full((2, 2, 1, 1), 2**31, np.int64)
    table = ExitTable(np.zeros((2, 2), np.float32), matrices, PathCosts((1, 2), (0, 0)))

    assert at_thresholds(table, (INF,)).miou == 100


# The geometric form -----------------------------------------------------------------------------------------------


def test_geometric_shares_by_hand():
    scores = np.float32(
        [[0.1, 0.1, 0], [0.2, 0.9, 0], [0.3, 0.2, 0], [0.4, 0.8, 0], [0.5, 0.3, 0], [0.6, 0.7, 0], [0.7, 0.4, 0]]
    )
    table = ExitTable(scores, np.ones((7, 3, 1, 1), int), PathCosts((1, 2, 3), (0, 0, 0)))

    # q = 1: a third of 7 images at each exit, so 2; the four least sure that go on score 0.1 0.9 0.2 0.8 0.3 next.
    assert geometric(table, 1.0) == pytest.approx((0.6, 0.8))
    # q = 1/2: shares 4/7, 2/7, 1/7, so 4 and 2 images.
    assert geometric(table, 0.5) == pytest.approx((0.4, 0.2))
    # q = 2: shares 1/7, 2/7, 4/7.
    assert geometric(table, 2.0) == pytest.approx((0.7, 0.8))
    # q = 10: 7 / 111 of an image at the first exit, which is not asked, and 0.63 at the second, neither.
    assert geometric(table, 10.0) == (INF, INF)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), q=st.floats(0.05, 20), exits=st.integers(2, 5))
def test_the_geometric_share_of_images_leaves_at_each_exit(seed, q, exits):
    table = random_table(50, exits, 2, seed)
    table = replace(table, scores=np.random.default_rng(seed).random((50, exits)))  # without ties
    powers = np.array([q**k for k in range(1, exits + 1)])

    found = at_thresholds(table, geometric(table, q))

    expected = np.floor(50 * powers / powers.sum() + 1e-9)
    assert (np.round(found.shares * 50)[:-1] == expected[:-1]).all()


@pytest.mark.parametrize("q", [0.0, -1.0, math.nan, INF])
def test_a_q_that_makes_no_sense_is_refused(q):
    with pytest.raises(ValueError, match=r"q is .* a positive number"):
        geometric(BY_HAND, q)


# A budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["geometric", "direct"])
@settings(max_examples=25, deadline=None)
@given(table=tables, share=shares_of_budget)
def test_the_budget_is_never_exceeded_on_the_table(how, table, share):
    budget = within(table, share)

    found = at_thresholds(table, solve(table, budget, how))

    assert found.average_cost <= budget * (1 + 1e-8)


@settings(max_examples=25, deadline=None)
@given(table=tables, share=shares_of_budget)
def test_direct_is_never_worse_than_geometric(table, share):
    budget = within(table, share)

    by_direct = at_thresholds(table, direct(table, budget))

    assert by_direct.miou >= at_thresholds(table, geometric_for(table, budget)).miou - 1e-9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("exits", [2, 3, 4])
def test_geometric_comes_within_3_percent_of_the_budget(seed, exits):
    table = random_table(200, exits, 2, seed, heads=0.1)

    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        budget = within(table, share)
        found = at_thresholds(table, geometric_for(table, budget))
        assert 0.97 * budget <= found.average_cost <= budget * (1 + 1e-8)


def test_no_single_threshold_brings_geometric_closer_to_the_budget():
    for seed in range(4):
        table = random_table(40, 4, 2, seed, heads=0.1)
        budget = within(table, 0.4)
        thresholds = geometric_for(table, budget)
        reached = at_thresholds(table, thresholds).average_cost

        for exit, score in product(range(3), range(40)):
            other = [*thresholds]
            other[exit] = float(table.scores[score, exit])
            found = at_thresholds(table, other)
            assert not reached + 1e-6 < found.average_cost <= budget or pays_for_nothing(found, other)


def pays_for_nothing(found, thresholds):
    """Whether some exit is asked at which no image leaves."""
    return any(t < INF and share == 0 for t, share in zip(thresholds, found.shares[:-1], strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [3, 8, 20])
def test_with_ties_geometric_comes_within_3_percent_where_any_thresholds_do(seed, ties):
    table = random_table(200, 3, 2, seed, ties, heads=0.1)
    choices = [[*np.unique(table.scores[:, exit]).tolist(), INF] for exit in range(2)]
    judged = [(thresholds, at_thresholds(table, thresholds)) for thresholds in product(*choices)]
    all_of_them = [found for thresholds, found in judged if not pays_for_nothing(found, thresholds)]

    for share in (0.1, 0.5, 0.9):
        budget = within(table, share)
        closest = max(found.average_cost for found in all_of_them if found.average_cost <= budget)
        found = at_thresholds(table, geometric_for(table, budget))
        assert found.average_cost >= min(0.97 * budget, closest) - 1e-6


def test_no_head_is_paid_where_nobody_leaves():
    for seed, share in product(range(10), (0.2, 0.6, 0.95)):
        table = random_table(15, 4, 2, seed, ties=4, heads=0.3)
        for how in ("direct", "geometric"):
            thresholds = solve(table, within(table, share), how)
            assert not pays_for_nothing(at_thresholds(table, thresholds), thresholds)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
@pytest.mark.parametrize("heads", [0.0, 0.3])
def test_direct_finds_the_best_of_all_thresholds(seed, share, heads):
    table = random_table(12, 3, 3, seed, heads=heads)
    budget = within(table, share)
    choices = [[*np.unique(table.scores[:, exit]).tolist(), INF] for exit in range(2)]
    all_of_them = [at_thresholds(table, thresholds) for thresholds in product(*choices)]
    best = max(found.miou for found in all_of_them if found.average_cost <= budget)

    assert at_thresholds(table, direct(table, budget)).miou == pytest.approx(best)


def test_direct_spends_what_it_is_told_to():
    # Deeper exits are no better, so nothing speaks for going there but `spend`.
    table = random_table(100, 3, 2, 0)
    table = ExitTable(table.scores, np.repeat(table.matrices[:, -1:], 3, axis=1), table.costs)
    budget = within(table, 0.5)

    assert at_thresholds(table, solve(table, budget)).average_cost == pytest.approx(table.costs.cheapest)
    assert at_thresholds(table, solve(table, budget, spend=0.97)).average_cost >= 0.97 * budget


def test_budgets_at_the_limits_are_the_first_and_the_last_exit():
    table = random_table(20, 4, 3)

    for how in ("direct", "geometric"):
        assert solve(table, table.costs.cheapest, how)[0] == 0
    assert solve(table, table.costs.full, "geometric") == (INF, INF, INF)


@pytest.mark.parametrize("how", ["direct", "geometric"])
@pytest.mark.parametrize("budget", [10.9, 42.1, math.nan, -1])
def test_a_budget_out_of_reach_is_refused_with_both_limits(how, budget):
    with pytest.raises(ValueError, match=r"first exit costs 11 ms and going to the last 42 ms"):
        solve(BY_HAND, budget, how)


def test_a_way_to_solve_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="how is 'magic'; choose one of direct, geometric"):
        solve(BY_HAND, 20, "magic")
    with pytest.raises(ValueError, match=r"spend is 1\.5"):
        solve(BY_HAND, 20, spend=1.5)


@settings(max_examples=40, deadline=None)
@given(table=tables, q=st.floats(0.05, 20))
def test_thresholds_between_scores_decide_the_same_and_lie_on_no_score(table, q):
    thresholds = geometric(table, q)

    moved = between_scores(table, thresholds)

    assert at_thresholds(table, moved).exits.tolist() == at_thresholds(table, thresholds).exits.tolist()
    for exit, (before, after) in enumerate(zip(thresholds, moved, strict=True)):
        assert after <= before
        assert after in (0, INF) or after not in table.scores[:, exit].tolist()


def test_neighbouring_float32_scores_are_kept_apart():
    lower, upper = np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(1))
    table = ExitTable(np.array([[lower, 0], [upper, 0]]), np.ones((2, 2, 1, 1), int), PathCosts((1, 2), (0, 0)))

    assert at_thresholds(table, between_scores(table, (float(upper),))).exits.tolist() == [1, 0]


# Controls ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(table=tables, share=shares_of_budget, seed=st.integers(0, 99))
def test_the_random_control_has_the_same_share_at_each_exit(table, share, seed):
    shares = at_thresholds(table, geometric_for(table, within(table, share))).shares

    exits = random_exits(table, shares, seed)

    assert (np.bincount(exits, minlength=table.num_exits) / len(exits)).tolist() == pytest.approx(shares.tolist())
    assert random_exits(table, shares, seed).tolist() == exits.tolist()


def test_shares_that_are_no_whole_numbers_of_images_are_rounded_to_them():
    table = random_table(10, 3)

    counts = np.bincount(random_exits(table, (1 / 3, 1 / 3, 1 / 3), 0))

    assert sorted(counts.tolist()) == [3, 3, 4]
    assert np.bincount(random_exits(table, (0.52, 0.28, 0.2), 0)).tolist() == [5, 3, 2]


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.6, 0.1), (1.5, -0.5, 0)])
def test_shares_that_make_no_sense_are_refused(shares):
    with pytest.raises(ValueError, match=r"shares are .* give 3"):
        random_exits(random_table(10, 3), shares, 0)


def test_a_score_that_tells_something_beats_the_random_control():
    table = random_table(200, 3, 4, seed=1)

    middle = curve(table, points=5)[1:4]

    assert all(point.miou > point.random_miou for point in middle)
    assert all(point.random_cost <= point.average_cost for point in middle)


@pytest.mark.parametrize("how", ["direct", "geometric"])
def test_a_curve_goes_from_the_first_exit_to_the_last(how):
    table = random_table(40, 3, 4, seed=2)

    points = curve(table, how, points=7)

    assert len(points) == 7
    assert points[0].average_cost == pytest.approx(table.costs.cheapest)
    assert points[0].random_miou == pytest.approx(points[0].miou)
    assert points[-1].miou >= scored(table, np.full(40, 2)) - 1e-9
    if how == "direct":
        mious = [point.miou for point in points]
        assert mious[-1] == max(mious)


# Tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros(3, np.float32)}, r"scores are \(3,\); give \(n, K\)"),
        ({"scores": np.zeros((2, 2), np.float32)}, r"matrices are \(3, 2, 2, 2\); with scores \(2, 2\)"),
        ({"scores": np.float32([[math.nan, 0], [0, 0], [0, 0]])}, "scores hold NaN or values outside"),
        ({"scores": np.float32([[1.5, 0], [0, 0], [0, 0]])}, "scores hold NaN or values outside"),
        ({"matrices": np.zeros((3, 2, 2, 2), int)}, "count no pixel"),
        ({"matrices": np.ones((3, 2, 2, 2))}, "matrices are float64; give counts"),
        ({"matrices": np.ones((3, 2, 2, 3), int)}, "matrices are"),
        ({"matrices": np.arange(24).reshape(3, 2, 2, 2)}, "differ in their labels"),
        ({"costs": PathCosts((1, 2, 3), (0, 0))}, r"costs.trunk is \(1, 2, 3\); give 2 finite numbers"),
        ({"costs": PathCosts((1, 2), (0, math.nan))}, "costs.heads is"),
    ],
)
def test_tables_that_do_not_fit_are_refused(changes, message):
    given = {"scores": BY_HAND.scores, "matrices": BY_HAND.matrices, "costs": BY_HAND.costs}
    with pytest.raises(ValueError, match=message):
        ExitTable(**{**given, **changes})


def test_scores_of_the_last_exit_are_not_read():
    scores = BY_HAND.scores.copy()
    scores[:, -1] = math.nan

    table = ExitTable(scores, BY_HAND.matrices, BY_HAND.costs)

    assert at_thresholds(table, (0.6,)).miou == at_thresholds(BY_HAND, (0.6,)).miou


def test_thresholds_of_another_table_are_refused():
    with pytest.raises(ValueError, match="there are 2 thresholds for 2 exits, which take 1"):
        at_thresholds(BY_HAND, (0.5, 0.5))
