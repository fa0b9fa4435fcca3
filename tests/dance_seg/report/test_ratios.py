"""Intervals come from pairs of one seed, never from one run; the Pareto front is what no row beats in both."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_seg.report.ratios import (
    NORMAL_QUANTILE,
    T_QUANTILES,
    difference_interval,
    dominators,
    half_width,
    paired,
    ratio_interval,
)


def test_the_table_of_quantiles_is_students():
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in enumerate(T_QUANTILES, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)
    assert abs(NORMAL_QUANTILE - stats.norm.ppf(0.975)) < 6e-4


def test_a_difference_has_the_interval_of_a_paired_t_test():
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [61.0, 60.2, 62.1, 59.9], [60.1, 60.4, 60.8, 59.0]
    found = difference_interval(list(zip(ours, theirs, strict=True)))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-3)
    assert found.pairs == 4


def test_a_ratio_has_its_interval_in_logarithms_so_that_twice_and_half_are_alike():
    pairs = [(1.0, 2.0), (2.0, 1.0)]  # half, and twice
    found = ratio_interval(pairs)
    assert found is not None
    # The mean logarithm is 0, the standard error ln 2, and t with one degree of freedom 12.706.
    assert found.high == pytest.approx(2**12.706)
    assert found.low == pytest.approx(1 / found.high)


@pytest.mark.parametrize("pairs", [[], [(1.0, 2.0)]])
def test_one_run_has_no_interval(pairs):
    assert difference_interval(pairs) is None
    assert ratio_interval(pairs) is None


def test_figures_that_have_no_ratio_have_no_interval_of_it():
    assert ratio_interval([(0.0, 1.0), (1.0, 1.0)]) is None
    assert ratio_interval([(1.0, 0.0), (1.0, 1.0)]) is None


def test_rows_are_paired_by_seed_and_only_when_both_have_the_same():
    assert paired({"0": 1.0, "1": 2.0}, {"1": 20.0, "0": 10.0}) == [(1.0, 10.0), (2.0, 20.0)]
    assert paired({"0": 1.0}, {"0": 1.0, "1": 2.0}) == []
    assert paired({}, {}) == []


def test_what_a_seed_does_to_both_rows_cancels():
    """Seeds scatter by 10 points, and one row is always 1 point better: the pairs agree."""
    seeds = {str(seed): value for seed, value in enumerate([50.0, 60.0, 70.0])}
    found = difference_interval(paired({seed: value + 1 for seed, value in seeds.items()}, seeds))
    assert (found.low, found.high) == (1.0, 1.0)


def test_the_interval_holds_the_truth_in_95_of_100_cases():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        pairs = [(value, 0.0) for value in random.normal(2.0, 1.0, 3)]
        found = difference_interval(pairs)
        held += found.low <= 2.0 <= found.high
    assert 0.935 < held / 2000 < 0.965


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
def test_a_half_width_is_never_negative_nor_infinite(values):
    assert 0 <= half_width(values) < math.inf


def brute_force_front(points):
    """Those for which no other point is at least as good in both and better in one."""
    return {
        name
        for name, (cost, score) in points.items()
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points.values())
    }


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_nothing_beats(points):
    named = {str(number): (float(cost), float(score)) for number, (cost, score) in enumerate(points)}
    assert {name for name, others in dominators(named).items() if not others} == brute_force_front(named)


def test_equal_points_do_not_dominate_one_another():
    assert dominators({"a": (1.0, 5.0), "b": (1.0, 5.0), "c": (2.0, 5.0)}) == {"a": [], "b": [], "c": ["a", "b"]}
