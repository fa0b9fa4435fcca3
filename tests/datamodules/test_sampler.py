"""The batch sampler: every image offered once, one scale a batch, the same for any number of ranks."""

from collections import Counter

import numpy as np
import pytest

from dance_seg.data_slimming.plan import DataSlimming
from datamodules.sampler import SameScaleBatches

SLIMMING = DataSlimming(warm_up=0.0, ramp_until=0.0, drop_rate=0.5)


def batches(num_images=53, options=SLIMMING, **changes):
    given = {"crop": (64, 96), "stride": 32, "batch_size": 4, "epochs": 10, "seed": 0}
    quantiles = (np.arange(num_images) + 0.5) / num_images
    return SameScaleBatches(quantiles, options, **{**given, **changes})


def epoch_of(sampler, epoch, start=0):
    sampler.set_position(epoch, start)
    return list(sampler)


def test_every_batch_holds_one_size_and_is_full():
    sampler = batches()
    for epoch in range(10):
        for batch in epoch_of(sampler, epoch):
            assert len(batch) == 4
            assert len({draw.size for draw in batch}) == 1


def test_over_all_epochs_every_image_is_paid_for_dropped_or_carried_exactly_once_an_epoch():
    sampler = batches()
    carried = 0
    for epoch, summary in enumerate(sampler.schedule):
        paid = sum(len(batch) for batch in epoch_of(sampler, epoch))
        assert paid == summary.images_paid
        kept = int(sampler.plan(epoch).keep.sum())
        assert summary.images_dropped == 53 - kept
        assert kept + carried == paid + summary.images_carried
        carried = summary.images_carried
        assert carried < 4


def test_dense_epochs_offer_each_image_once_and_carry_what_is_left():
    sampler = batches(num_images=10, options=None)  # 10 images in batches of 4: 2 batches, 2 carried
    seen = Counter()
    for epoch in range(2):
        for batch in epoch_of(sampler, epoch):
            seen.update(draw.index for draw in batch)
    assert [s.steps for s in sampler.schedule[:2]] == [2, 3]
    assert all(count == 2 for count in seen.values())
    assert len(seen) == 10


def test_what_is_left_at_a_scale_joins_the_next_larger_and_never_a_smaller():
    options = DataSlimming(
        schedule="static", sizes="fixed", warm_up=0, ramp_until=0, full_resolution_tail=0.1, drop_rate=0
    )
    sampler = batches(num_images=50, options=options)  # 20 at half, 20 at three quarters, 10 full: 20, 20, 8 and 2 left
    planned = sampler.plan(3).scale
    for group in sampler.groups(3):
        assert (planned[group.images[~group.again]] <= group.scale).all()
    sampler = batches(num_images=45, options=options)  # 18, 18, 9: 2 join the middle (20), the full hold 9, 1 carried
    assert sampler.schedule[0].images_per_scale == (16, 20, 8)


def test_the_batches_do_not_depend_on_the_number_of_ranks():
    alone = batches(batch_size=12)
    for ranks in (2, 3):
        shares = [batches(batch_size=12, num_ranks=ranks, rank=rank) for rank in range(ranks)]
        for epoch in range(10):
            whole = epoch_of(alone, epoch)
            parts = [epoch_of(share, epoch) for share in shares]
            assert {len(part) for part in parts} == {len(whole)}
            for step, batch in enumerate(whole):
                assert batch == [draw for part in parts for draw in part[step]]


def test_the_rest_of_an_epoch_is_what_an_undisturbed_epoch_would_have_given():
    sampler = batches()
    whole = epoch_of(sampler, 4)
    for start in (0, 1, len(whole) // 2, len(whole) - 1):
        rest = epoch_of(sampler, 4, start)
        assert rest == whole[start:]
        assert len(rest) == len(sampler)


def test_epochs_differ_and_seeds_differ():
    one, other = batches(), batches(seed=1)
    assert epoch_of(one, 0) != epoch_of(one, 1)
    assert epoch_of(one, 0) != epoch_of(other, 0)
    assert epoch_of(one, 0) == epoch_of(batches(), 0)


def test_progress_rises_from_zero_and_stays_below_one():
    sampler = batches()
    progress = [batch[0].progress for epoch in range(10) for batch in epoch_of(sampler, epoch)]
    assert progress[0] == 0
    assert (np.diff(progress) > 0).all()
    assert progress[-1] < 1


def test_slimming_at_its_limits_gives_the_dense_batches():
    off = DataSlimming(scales=(1.0,), quantiles=(), drop_rate=0.0, min_weight=1.0)
    slim, dense = batches(options=off), batches(options=None)
    for epoch in range(10):
        assert epoch_of(slim, epoch) == epoch_of(dense, epoch)


def test_a_pixel_budget_puts_more_images_into_small_batches():
    options = DataSlimming(batch_by="pixels", warm_up=0, ramp_until=0, drop_rate=0, scales=(0.5, 1.0), quantiles=(0.5,))
    sampler = batches(num_images=64, options=options)
    sizes = {(draw[0].size, len(draw)) for draw in epoch_of(sampler, 0)}
    assert sizes == {((32, 64), 16)}  # 0.5 squared: four times as many; 96/2 = 48 rounds to 64


def test_an_epoch_always_has_a_step():
    options = DataSlimming(warm_up=0, ramp_until=0, drop_below=1.0, drop_rate=1.0)
    sampler = batches(num_images=6, options=options)
    assert all(summary.steps >= 1 for summary in sampler.schedule)


def test_a_batch_that_no_rank_can_share_or_no_set_can_fill_is_refused():
    with pytest.raises(ValueError, match="must divide by the 3 ranks"):
        batches(batch_size=4, num_ranks=3)
    with pytest.raises(ValueError, match="at least 2"):
        batches(batch_size=2, num_ranks=2)
    with pytest.raises(ValueError, match="exceeds the 3 training images"):
        batches(num_images=3)


def test_dropped_images_are_not_drawn():
    sampler = batches(num_images=40)
    epoch = 5
    keep = sampler.plan(epoch).keep
    drawn = {draw.index for batch in epoch_of(sampler, epoch) for draw in batch if not draw.occurrence}
    assert not keep.all()
    assert drawn <= set(np.flatnonzero(keep).tolist())
