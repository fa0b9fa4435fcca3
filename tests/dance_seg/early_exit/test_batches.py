"""Whole sets in full batches: the same answers as one image at a time, and parts that run full."""

import math

import numpy as np
import pytest
import torch

from dance_seg.early_exit.batches import decide_in_batches, together
from dance_seg.early_exit.policy import ExitPolicy, at_every_exit, decide
from dance_seg.models.basisnet import BasisNet
from dance_seg.models.ranet import RANet
from dance_seg.models.smp_exits import SmpWithExits
from tests.dance_seg.early_exit.toy import Toy, random_images

SIZE = (9, 12)


def a_set(count=11):
    """Images in groups of 3, 1, 5 and 2, and thresholds by which some leave at each exit."""
    torch.manual_seed(0)
    model, images = Toy(light=True).eval(), random_images(count)[torch.randperm(count)]
    scores = at_every_exit(model, images, SIZE).scores(ExitPolicy(score="mean"))
    policy = ExitPolicy(score="mean", thresholds=(scores[:, 0].median().item(), scores[:, 1].median().item()))
    for counted in (*model.parts, *model.heads):
        counted.images.clear()
    return model, images, list(images.split([3, 1, 5, 2])), policy


def gathered(found, count):
    """The labels, exits and scores in the images' order, and how often each was answered."""
    labels, times = torch.zeros((count, *SIZE), dtype=torch.uint8), np.zeros(count, int)
    exits, scores = torch.full((count,), -1), torch.zeros(count)
    for places, decided in found:
        labels[places], exits[places], scores[places] = decided
        times[places] += 1
    return labels, exits, scores, times


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_answers_are_those_of_one_image_at_a_time(batch):
    model, images, groups, policy = a_set()
    alone = [decide(model, image[None], SIZE, policy) for image in images]

    labels, exits, scores, times = gathered(decide_in_batches(model, iter(groups), SIZE, policy, batch), len(images))

    assert times.tolist() == [1] * len(images)
    assert exits.tolist() == [one.exits.item() for one in alone]
    assert set(exits.tolist()) == {0, 1, 2}
    assert torch.equal(labels, torch.cat([one.labels for one in alone]))
    torch.testing.assert_close(scores, torch.cat([one.scores for one in alone]), equal_nan=True)


def test_parts_run_full_batches_until_the_end():
    model, images, groups, policy = a_set()
    list(decide_in_batches(model, groups, SIZE, policy, 4))

    came = model.calls()
    assert came[0] == len(images)
    assert came[0] > came[1] > came[2] > 0
    for part, count in zip(model.parts, came, strict=True):
        assert part.images == [4] * (count // 4) + ([count % 4] if count % 4 else [])


def test_an_exit_that_is_not_asked_has_no_head_run():
    model, images, groups, _ = a_set()
    found = gathered(decide_in_batches(model, groups, SIZE, ExitPolicy(thresholds=(math.inf, 0.0)), 4), len(images))

    assert found[1].tolist() == [1] * len(images)
    assert model.head_calls() == [0, len(images), 0]
    assert model.calls() == [len(images), len(images), 0]


NETWORKS = {
    "ranet": lambda: RANet(num_classes=5, size="tiny"),
    "basisnet": lambda: BasisNet(num_classes=5),
    "fpn": lambda: SmpWithExits(arch="fpn", encoder_name="resnet18", num_classes=5, at=[8, 16]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_answer_as_they_do_in_a_batch_of_their_own(name):
    torch.manual_seed(0)
    model, images = NETWORKS[name]().eval(), torch.randn(6, 3, 64, 96)
    scores = at_every_exit(model, images, (64, 96)).scores(ExitPolicy(score="mean"))
    policy = ExitPolicy(score="mean", thresholds=tuple(scores.median(0).values.tolist()[:-1]))
    whole = decide(model, images, (64, 96), policy)

    answered = list(decide_in_batches(model, images.split(2), (64, 96), policy, 3))
    assert sorted(np.concatenate([places for places, _ in answered])) == list(range(6))
    for places, decided in answered:
        assert decided.exits.tolist() == whole.exits[places].tolist()
        # Sums of another order: a pixel of two equal classes may change.
        assert (decided.labels != whole.labels[places]).float().mean() < 1e-3


def test_states_of_any_shape_are_laid_together():
    one = {"a": torch.zeros(2, 3), "b": [None, (torch.ones(2),)]}
    both = together([one, {"a": torch.ones(1, 3), "b": [None, (torch.zeros(1),)]}])

    assert both["a"].tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3]
    assert both["b"][0] is None
    assert both["b"][1][0].tolist() == [1, 1, 0]


def test_what_makes_no_sense_is_refused():
    model, images, groups, policy = a_set()
    with pytest.raises(ValueError, match="batch is 0; give how many"):
        list(decide_in_batches(model, groups, SIZE, policy, 0))
    with pytest.raises(ValueError, match=r"images of \(8, 12\) came behind some of \(9, 12\)"):
        list(decide_in_batches(model, [images, images[:, :, :8]], SIZE, policy, 4))
    with pytest.raises(ValueError, match="training mode"):
        list(decide_in_batches(model.train(), groups, SIZE, policy, 4))
    with pytest.raises(ValueError, match="thresholds has 1 values"):
        list(decide_in_batches(model.eval(), groups, SIZE, ExitPolicy(thresholds=(0.5,)), 4))
