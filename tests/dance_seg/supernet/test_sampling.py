"""What a step runs depends on (seed, step, progress) alone and stays inside what its phase declares."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from dance_seg.supernet.sampling import Sampling, opened, sharing, sorted_by, subnets_of_step
from dance_seg.supernet.space import SearchSpace, Subnet, Value

SPACE = SearchSpace(
    {
        "resolution": (0.5, 1.0),
        "stage1.kernel": (3, 5, 7),
        "stage1.depth": (2, 3, 4),
        "stage2.depth": (1, 2),
        "stage1.width": (8, 16, 24, 32),
    }
)
OPTIONS = Sampling(start=0.1, end=0.7, drawn=3)
"""Kernels open from 0.1 to 0.3, depths to 0.5, widths to 0.7."""

# By hand: a phase of 0.2 adds its 1, 2 or 3 values in equal parts, the first at its beginning.
DECLARED: list[tuple[float, dict[str, tuple[Value, ...]]]] = [
    (0.0, {"stage1.kernel": (7,), "stage1.depth": (4,), "stage2.depth": (2,), "stage1.width": (32,)}),
    (0.1, {"stage1.kernel": (5, 7), "stage1.depth": (4,), "stage2.depth": (2,), "stage1.width": (32,)}),
    (0.25, {"stage1.kernel": (3, 5, 7), "stage1.depth": (4,), "stage2.depth": (2,), "stage1.width": (32,)}),
    (0.3, {"stage1.kernel": (3, 5, 7), "stage1.depth": (3, 4), "stage2.depth": (1, 2), "stage1.width": (32,)}),
    (0.45, {"stage1.kernel": (3, 5, 7), "stage1.depth": (2, 3, 4), "stage2.depth": (1, 2), "stage1.width": (32,)}),
    (0.5, {"stage1.kernel": (3, 5, 7), "stage1.depth": (2, 3, 4), "stage2.depth": (1, 2), "stage1.width": (24, 32)}),
    (0.7, dict(SPACE.values)),
    (1.0, dict(SPACE.values)),
]


@pytest.mark.parametrize(("progress", "declared"), DECLARED)
def test_every_phase_samples_all_that_it_declares_and_nothing_else(
    progress: float, declared: dict[str, tuple[Value, ...]]
) -> None:
    """The histogram of each choice over 300 steps; the resolution is of no phase, so open from the beginning."""
    seen = {name: Counter[Value]() for name in SPACE.values}
    for step in range(300):
        for subnet in subnets_of_step(SPACE, OPTIONS, 0, step, progress):
            assert subnet in SPACE
            for name, value in subnet.choices:
                seen[name][value] += 1
    for name, values in {**declared, "resolution": (0.5, 1.0)}.items():
        assert set(seen[name]) == set(values), name


def test_what_has_opened_stays_open() -> None:
    parts = [opened(SPACE, OPTIONS, step / 100) for step in range(101)]
    for one, later in pairwise(parts):
        assert all(set(one.values[name]) <= set(later.values[name]) for name in SPACE.values)


def test_the_largest_is_first_and_networks_are_distinct() -> None:
    for step in range(200):
        subnets = subnets_of_step(SPACE, OPTIONS, 3, step, step / 200)
        assert subnets[0] == SPACE.largest
        assert len(set(subnets)) == len(subnets) <= 5
        assert opened(SPACE, OPTIONS, step / 200).smallest in subnets


def test_draws_depend_on_seed_and_step_alone() -> None:
    """In any order and as often as asked, so that resuming and other ranks find the same."""
    forwards = [subnets_of_step(SPACE, OPTIONS, 1, step, 0.9) for step in range(20)]
    backwards = [subnets_of_step(SPACE, OPTIONS, 1, step, 0.9) for step in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) > 15
    assert forwards != [subnets_of_step(SPACE, OPTIONS, 2, step, 0.9) for step in range(20)]


def test_before_the_first_phase_only_the_largest_runs() -> None:
    space = SearchSpace({"a.kernel": (3, 5), "a.depth": (1, 2), "a.width": (8, 16)})
    assert subnets_of_step(space, OPTIONS, 0, 5, 0.05) == (space.largest,)


def test_the_smallest_can_be_left_out() -> None:
    options = Sampling(smallest=False, drawn=0)
    assert subnets_of_step(SPACE, options, 0, 0, 1.0) == (SPACE.largest,)


def test_phases_without_length_open_everything_at_once() -> None:
    options = Sampling(start=0.5, end=0.5)
    assert opened(SPACE, options, 0.49).values["stage1.width"] == (32,)
    assert opened(SPACE, options, 0.5) == SPACE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drawn": -1}, "supernet.drawn is -1"),
        ({"start": 0.7, "end": 0.2}, "0 <= start <= end <= 1, got 0.7 and 0.2"),
        ({"end": 1.5}, "got 0.1 and 1.5"),
        ({"phases": ("width", "width")}, "name a phase twice"),
        ({"distillation": -1.0}, "supernet.distillation is -1.0: zero"),
        ({"temperature": 0.0}, "supernet.temperature is 0.0: a positive number"),
        (
            {"distillation": 1.0, "method": "multi_architectural"},
            "does not see the images that smaller ones learn from",
        ),
    ],
)
def test_options_that_cannot_train_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_channels_are_sorted_when_fewer_of_them_open_and_not_without_such_a_phase() -> None:
    model = SimpleNamespace(sorted_kinds=("depth", "width"))
    assert [sorted_by(OPTIONS, model, progress) for progress in (0.2, 0.3, 0.5)] == [[], ["depth"], ["depth", "width"]]
    assert sorted_by(Sampling(sort_channels=False), model, 1.0) == []
    assert sorted_by(Sampling(phases=("kernel",)), model, 1.0) == []
    assert sorted_by(OPTIONS, object(), 1.0) == []


def test_a_phase_that_opens_nothing_is_refused_by_name() -> None:
    options = Sampling(phases=("kernel", "heads"))
    with pytest.raises(ValueError, match=r"names 'heads', and no choice .* depth, kernel, resolution, width"):
        subnets_of_step(SPACE, options, 0, 0, 0.0)


def subnets(count: int) -> list[Subnet]:
    return [Subnet((("width", 8 * number),)) for number in range(count)]


def test_as_many_networks_share_a_batch_as_divide_it() -> None:
    for batch_size in range(1, 20):
        for count in range(1, 8):
            found = sharing(subnets(count), batch_size)
            assert found == tuple(subnets(count)[: len(found)])
            assert batch_size % len(found) == 0
            assert all(batch_size % more for more in range(len(found) + 1, count + 1))


def test_the_control_runs_one_drawn_network() -> None:
    options = Sampling(method="single", start=0.0, end=0.0)
    found = {subnets_of_step(SPACE, options, 0, step, 0.5) for step in range(50)}
    assert {len(networks) for networks in found} == {1}
    assert len(found) > 40
