"""The plan: hand arithmetic on few images, and identities at the limits."""

import numpy as np
import pytest

from dance_seg.data_slimming.plan import (
    DataSlimming,
    drawn_quantiles,
    force,
    in_tail,
    plan,
    rare_images,
    scaled_size,
    thresholds,
)

QUANTILES = np.array([0.05, 0.15, 0.35, 0.55, 0.75, 0.95])
NONE = np.zeros(len(QUANTILES), bool)


def options(**changes):
    given = {"schedule": "static", "sizes": "fixed", "warm_up": 0.1, "ramp_until": 0.3, "full_resolution_tail": 0.2}
    return DataSlimming(**{**given, **changes})


def test_the_scale_never_falls_with_complexity():
    for schedule in ("static", "progressive"):
        for progress in np.linspace(0, 0.99, 34):
            made = plan(QUANTILES, options(schedule=schedule), progress=progress, seed=0, epoch=1, rare_N=NONE)
            assert (np.diff(made.scale) >= 0).all()


def test_weights_are_linear_in_the_quantile_and_have_mean_one_over_the_kept_images():
    made = plan(QUANTILES, options(min_weight=0.5, drop_rate=1.0), progress=0.5, seed=0, epoch=3, rare_N=NONE)
    assert made.keep.tolist() == [False, False, True, True, True, True]
    assert made.weight[made.keep].mean() == pytest.approx(1.0)
    raw = 0.5 + 0.5 * QUANTILES  # before normalisation
    assert made.weight == pytest.approx(raw / raw[2:].mean())


def test_warm_up_and_tail_are_at_full_resolution_and_drop_nothing():
    for progress in (0.0, 0.09, 0.8, 0.95):
        made = plan(QUANTILES, options(drop_rate=1.0), progress=progress, seed=0, epoch=1, rare_N=NONE)
        assert made.keep.all()
        assert (made.scale == 2).all()


def test_a_static_schedule_raises_its_thresholds_during_the_ramp():
    # half-way between 0.1 and 0.3 the thresholds are half of (0.4, 0.8)
    assert thresholds(options(), 0.2) == pytest.approx((0.2, 0.4))
    made = plan(QUANTILES, options(drop_rate=0.0), progress=0.2, seed=0, epoch=1, rare_N=NONE)
    assert made.scale.tolist() == [0, 0, 1, 2, 2, 2]


def test_a_progressive_schedule_starts_small_and_lets_complex_images_grow_first():
    progressive = options(schedule="progressive", drop_rate=0.0)
    at = {p: plan(QUANTILES, progressive, progress=p, seed=0, epoch=1, rare_N=NONE).scale.tolist() for p in (0.0, 0.4)}
    assert at[0.0] == [0, 0, 0, 0, 0, 0]
    assert at[0.4] == [0, 0, 0, 1, 1, 2]  # half of 1 - 0.2: the static mapping at 0.4 and 0.8
    late = plan(QUANTILES, progressive, progress=0.7999, seed=0, epoch=1, rare_N=NONE)
    assert (late.scale == 2).all()


def test_images_with_a_rare_class_are_never_dropped():
    rare = np.array([True, False, False, False, False, False])
    for epoch in range(20):
        made = plan(QUANTILES, options(drop_rate=1.0), progress=0.5, seed=0, epoch=epoch, rare_N=rare)
        assert made.keep.tolist() == [True, False, True, True, True, True]


def test_dropping_is_drawn_anew_each_epoch_at_the_rate_given():
    many = np.zeros(1000)
    kept = [
        plan(many, options(drop_rate=0.25), progress=0.5, seed=0, epoch=e, rare_N=np.zeros(1000, bool)).keep
        for e in range(4)
    ]
    shares = [1 - k.mean() for k in kept]
    assert shares == pytest.approx([0.25] * 4, abs=0.05)
    assert not (kept[0] == kept[1]).all()


def test_the_plan_is_a_pure_function_of_its_arguments():
    many = np.linspace(0, 1, 50)
    drawn = options(sizes="drawn", drop_rate=0.5)
    one = plan(many, drawn, progress=0.4, seed=3, epoch=7, rare_N=np.zeros(50, bool))
    np.random.seed(1)  # noqa: NPY002  # the global generator must not matter
    two = plan(many, drawn, progress=0.4, seed=3, epoch=7, rare_N=np.zeros(50, bool))
    other = plan(many, drawn, progress=0.4, seed=4, epoch=7, rare_N=np.zeros(50, bool))
    assert (one.scale == two.scale).all()
    assert (one.keep == two.keep).all()
    assert not (one.scale == other.scale).all()


def test_drawn_sizes_keep_the_share_of_each_scale_and_show_an_image_at_several():
    many = (np.arange(100) + 0.5) / 100
    drawn = options(sizes="drawn", complexity_pull=0.5, drop_rate=0.0)
    plans = [plan(many, drawn, progress=0.5, seed=0, epoch=e, rare_N=np.zeros(100, bool)).scale for e in range(8)]
    for scale in plans:
        assert np.bincount(scale, minlength=3).tolist() == [40, 40, 20]
    assert (np.stack(plans).max(0) > np.stack(plans).min(0)).mean() > 0.5
    # complexity shifts the distribution
    assert np.stack(plans)[:, 80:].mean() > np.stack(plans)[:, :20].mean() + 0.5


def test_pull_one_follows_complexity_alone_and_pull_zero_ignores_it():
    many = (np.arange(1000) + 0.5) / 1000
    assert drawn_quantiles(many, 1.0, seed=0, epoch=0) == pytest.approx(many)
    assert abs(np.corrcoef(drawn_quantiles(many, 0.0, seed=0, epoch=0), many)[0, 1]) < 0.1


def test_dropping_everything_keeps_the_most_complex():
    same = np.array([0.1, 0.1, 0.15])
    made = plan(same, options(drop_rate=1.0), progress=0.5, seed=0, epoch=1, rare_N=np.zeros(3, bool))
    assert made.keep.tolist() == [False, False, True]


def test_options_at_their_limits_change_nothing():
    off = DataSlimming(scales=(1.0,), quantiles=(), drop_rate=0.0, min_weight=1.0)
    made = plan(QUANTILES, off, progress=0.5, seed=0, epoch=1, rare_N=NONE)
    assert (made.scale == 0).all()
    assert made.keep.all()
    assert made.weight.tolist() == [1.0] * 6


def test_a_rare_class_is_one_found_in_few_images_not_in_few_pixels():
    present = np.zeros((100, 3), bool)
    present[:, 0] = True
    present[:1, 1] = True  # class 1: in one of a hundred; class 2: in none
    assert rare_images(present, 0.02).tolist() == [True] + [False] * 99
    assert not rare_images(present, 0.01).any()  # one is not fewer than one in a hundred


def test_sizes_divide_by_the_stride_and_are_at_least_one_stride():
    assert scaled_size((352, 480), 0.5, 32) == (192, 256)  # 176 and 240 are each half-way: rounded up
    assert scaled_size((64, 64), 0.1, 32) == (32, 32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scales": (0.5, 0.25, 1.0)}, "scales"),
        ({"scales": (0.5, 0.75), "quantiles": (0.5,)}, "scales"),
        ({"quantiles": (0.5,)}, "quantiles"),
        ({"quantiles": (0.8, 0.4)}, "quantiles"),
        ({"drop_rate": 1.5}, "drop_rate"),
        ({"min_weight": 0.0}, "min_weight"),
        ({"warm_up": 0.5}, "warm_up"),
        ({"full_resolution_tail": 0.9}, "full_resolution_tail"),
    ],
)
def test_options_that_contradict_one_another_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        options(**changes)


def test_force_and_tail_at_their_borders():
    assert [force(options(), p) for p in (0.099, 0.1, 0.3, 0.79)] == [0.0, 0.0, 1.0, 1.0]
    assert not in_tail(options(), 0.799)
    assert in_tail(options(), 0.8)
