"""When the network is cut, by hand; and what options cannot be."""

import numpy as np
import pytest

from dance_seg.network_slimming.schedule import MaskDistance, NetworkSlimming, planned_cuts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"network_slimming.keep is 0.0: a share above 0, which would empty the network, and at most 1"),
        ({"keep": 1.5}, "network_slimming.keep is 1.5"),
        ({"keep": float("nan")}, "network_slimming.keep is nan"),
        ({"start": 0.6, "end": 0.5}, r"network_slimming needs 0 <= start <= end < 1, got 0.6 and 0.5"),
        ({"start": -0.1}, "network_slimming needs 0 <= start <= end < 1, got -0.1 and 0.5"),
        ({"end": 1.0}, "network_slimming needs 0 <= start <= end < 1, got 0.1 and 1.0"),
        ({"cuts": 0}, "network_slimming.cuts is 0: at least 1"),
        ({"min_channels": 0}, "network_slimming.min_channels is 0: at least 1"),
        ({"round_to": -8}, "network_slimming.round_to is -8: at least 1"),
        ({"sparsity": -1e-4}, "network_slimming.sparsity is -0.0001: zero or a small positive number"),
        ({"sparsity": float("inf")}, "network_slimming.sparsity is inf"),
        ({"branches": 1.0}, r"network_slimming.branches is 1.0: a share in \[0, 1\); 0 keeps all branches"),
        ({"branches": -0.1}, "network_slimming.branches is -0.1"),
    ],
)
def test_an_option_that_cannot_be_is_named_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkSlimming(**options)


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"start": 0.0, "end": 0.0}, {"sparsity": 0.0}, {"cuts": 1}])
def test_the_ends_of_each_range_are_allowed(options):
    NetworkSlimming(**options)


def test_shares_follow_the_cubic_rule_by_hand():
    planned = planned_cuts(NetworkSlimming(keep=0.2, start=0.1, end=0.7, cuts=4), epochs=10)
    assert [cut.epoch for cut in planned] == [1, 3, 5, 7]
    # of the 0.8 that go, 1 - (3/4)^3, 1 - (2/4)^3, 1 - (1/4)^3 and all are gone
    gone = [0.578125, 0.875, 0.984375, 1.0]
    assert [cut.share for cut in planned] == pytest.approx([1 - 0.8 * part for part in gone])


def test_a_single_cut_comes_at_the_start_and_goes_all_the_way():
    (cut,) = planned_cuts(NetworkSlimming(keep=0.3, start=0.25, end=0.5, cuts=1), epochs=8)
    assert cut.epoch == 2
    assert cut.share == pytest.approx(0.3)


def test_a_cut_between_two_epochs_waits_for_the_next():
    (cut,) = planned_cuts(NetworkSlimming(start=0.3, end=0.5, cuts=1), epochs=8)
    assert cut.epoch == 3  # 2.4


def test_a_cut_at_the_edge_of_an_epoch_does_not_wait_for_the_next_by_rounding():
    assert 10 * (0.1 + 0.5 * (0.5 - 0.1)) > 3  # by 4e-16
    assert [cut.epoch for cut in planned_cuts(NetworkSlimming(start=0.1, end=0.5, cuts=3), epochs=10)] == [1, 3, 5]


def test_of_several_cuts_on_one_epoch_the_last_remains():
    options = NetworkSlimming(keep=0.2, start=0.1, end=0.7, cuts=4)
    planned = planned_cuts(options, epochs=3)  # at 0.3, 0.9, 1.5 and 2.1 epochs
    assert [cut.epoch for cut in planned] == [1, 2]
    assert [cut.share for cut in planned] == pytest.approx([1 - 0.8 * 0.875, 0.2])


def test_no_cut_comes_before_the_first_epoch_or_after_the_last():
    options = NetworkSlimming(keep=0.5, start=0.0, end=0.99, cuts=3)
    assert [cut.epoch for cut in planned_cuts(options, epochs=4)] == [1, 2, 3]
    assert planned_cuts(options, epochs=1) == ()
    (cut,) = planned_cuts(options, epochs=2)
    assert tuple(cut) == (1, 0.5)


@pytest.mark.parametrize("epochs", [2, 3, 7, 20, 100])
def test_epochs_rise_shares_fall_and_the_last_is_what_is_kept(epochs):
    for cuts in (1, 2, 5, 9):
        planned = planned_cuts(NetworkSlimming(keep=0.4, cuts=cuts), epochs)
        assert all(0 < cut.epoch < epochs for cut in planned)
        assert (np.diff([cut.epoch for cut in planned]) > 0).all()
        assert (np.diff([cut.share for cut in planned]) < 0).all()
        assert planned[-1].share == pytest.approx(0.4)


def test_nothing_is_planned_where_the_masks_decide():
    assert planned_cuts(NetworkSlimming(schedule="mask_distance"), epochs=20) == ()


def mask(*gone: int) -> np.ndarray:
    """Twenty channels, of which these go: one is a twentieth of the distance."""
    return ~np.isin(np.arange(20), gone)


def test_masks_settle_once_each_of_four_differs_from_the_newest_by_less_than_a_tenth():
    for distance, settles in ((0, True), (1, True), (2, False), (10, False)):
        for odd in range(4):
            rule = MaskDistance()
            masks = [mask(*range(distance)) if number == odd else mask() for number in range(4)]
            assert not any(rule.settled(one) for one in masks)
            assert rule.settled(mask()) is settles, (distance, odd)


def test_only_the_last_five_masks_are_compared():
    rule = MaskDistance()
    rule.settled(mask(*range(10)))
    assert [rule.settled(mask()) for _ in range(5)] == [False, False, False, False, True]
    assert len(rule.masks) == 5


def test_masks_drift_without_ever_settling_while_the_oldest_is_far():
    rule = MaskDistance()
    drifting = [mask(*range(number)) for number in range(12)]  # a twentieth each time, a fifth over five
    assert not any(rule.settled(one) for one in drifting)


def test_a_rule_made_from_its_masks_goes_on_where_it_was():
    rule = MaskDistance()
    for number in range(4):
        rule.settled(mask(number))
    again = MaskDistance(list(rule.masks))
    assert all(isinstance(text, str) for text in rule.masks)
    assert again.masks == rule.masks
    for rules in (rule, again):
        assert not rules.settled(mask(9))  # each differs by two
    for one in (mask(9),) * 4:
        assert rule.settled(one) == again.settled(one)
    assert again.settled(mask(9))
