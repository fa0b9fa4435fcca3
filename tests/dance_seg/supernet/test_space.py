from collections import Counter
from itertools import product

import numpy as np
import pytest

from dance_seg.supernet.space import SearchSpace, Subnet


def without_idle_width(chosen):
    """A block that is left out has the smallest width."""
    return chosen if chosen["depth"] == 2 else {**chosen, "width.1": 8}


SPACE = SearchSpace({"depth": (1, 2), "width.0": (8, 16), "width.1": (8, 16, 24)})
NORMAL = SearchSpace(SPACE.values, without_idle_width)


def test_every_network_is_sampled_evenly():
    random = np.random.default_rng(0)
    counts = Counter(SPACE.sample(random) for _ in range(12_000))
    assert len(counts) == SPACE.count() == 12
    assert all(900 < count < 1100 for count in counts.values())


def test_networks_that_are_the_same_are_equal():
    random = np.random.default_rng(0)
    found = {NORMAL.sample(random) for _ in range(1000)}
    expected = {
        NORMAL.subnet(dict(zip(SPACE.values, chosen, strict=True))) for chosen in product(*SPACE.values.values())
    }
    assert found == expected
    assert len(found) == 8  # depth 2: 2 x 3; depth 1: 2
    assert all(subnet in NORMAL for subnet in found)
    assert Subnet((("depth", 1), ("width.0", 8), ("width.1", 24))) not in NORMAL


def test_mutation_and_crossing_stay_inside_and_do_what_they_say():
    random = np.random.default_rng(1)
    for _ in range(50):
        one, other = SPACE.sample(random), SPACE.sample(random)
        assert SPACE.mutate(one, 0.0, random) == one
        assert SPACE.mutate(one, 1.0, random) in SPACE
        child = SPACE.cross(one, other, random)
        assert all(child[name] in (one[name], other[name]) for name in SPACE.values)
    assert SPACE.cross(one, one, random) == one


def test_neighbours_differ_in_one_choice():
    near = list(SPACE.neighbours(SPACE.largest))
    assert len(near) == 1 + 1 + 2
    assert all(sum(subnet[name] != SPACE.largest[name] for name in SPACE.values) == 1 for subnet in near)


def test_records_come_back_and_others_are_refused():
    subnet = SPACE.smallest
    assert SPACE.subnet(subnet.as_record()) == subnet
    for record, named in (
        ({**subnet.as_record(), "depth": 3}, "depth is 3; choose one of 1, 2"),
        ({**subnet.as_record(), "depth": True}, "depth is True"),
        ({**subnet.as_record(), "height": 3}, "'height' is no choice"),
        ({"depth": 1, "width.0": 8}, r"width\.1 is missing; choose one of 8, 16, 24"),
    ):
        with pytest.raises(ValueError, match=named):
            SPACE.subnet(record)


def test_a_phase_is_a_part_of_the_space():
    phase = SPACE.restricted({"depth": (2,)})
    assert phase.count() == 6
    assert all(phase.sample(np.random.default_rng(seed)) in SPACE for seed in range(20))
    with pytest.raises(ValueError, match=r"depth \[3\] is not part"):
        SPACE.restricted({"depth": (3,)})


def test_fingerprints_tell_spaces_apart():
    assert SPACE.fingerprint == NORMAL.fingerprint != SPACE.restricted({"depth": (1,)}).fingerprint


@pytest.mark.parametrize("values", [{}, {"width": ()}, {"width": (16, 8)}, {"width": (8, 8)}])
def test_spaces_that_are_none_are_refused(values):
    with pytest.raises(ValueError, match="at least one"):
        SearchSpace(values)
