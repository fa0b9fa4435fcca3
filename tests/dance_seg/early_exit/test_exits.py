"""What a network with exits promises: lazy, selectable, and in evaluation the plain network."""

import weakref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dance_seg.early_exit.exits import Outputs, State, full_size, select
from dance_seg.sample import CoarseLogits
from tests.dance_seg.early_exit.toy import CLASSES, Toy, random_images


class Pair(NamedTuple):
    first: Tensor
    second: list[Tensor | None]


def test_training_gives_every_exit_at_the_size_of_the_images():
    outputs = Toy().train()(random_images(2, (9, 11)))

    assert isinstance(outputs, Outputs)
    assert outputs.penalty is None
    assert [tuple(logits.shape) for logits in outputs.logits] == [(2, CLASSES, 9, 11)] * 3


def test_evaluation_gives_the_last_exit_of_training_and_runs_no_other_head():
    model, images = Toy(), random_images(2)
    of_training = model.train()(images).logits[-1]
    before = model.head_calls()

    of_evaluation = model.eval()(images)

    assert torch.equal(of_evaluation, of_training)
    assert [after - b for after, b in zip(model.head_calls(), before, strict=True)] == [0, 0, 2]


def test_what_lies_behind_an_exit_runs_only_when_the_walk_goes_on():
    model = Toy().eval()

    walk = model.exits(random_images(4))

    assert model.calls() == [0, 0, 0]
    next(walk)
    assert model.calls() == [4, 0, 0]
    walk.send(torch.tensor([3, 1]))
    assert model.calls() == [4, 2, 0]
    next(walk)
    assert model.calls() == [4, 2, 2]


def test_images_that_go_on_are_computed_as_without_the_others():
    model, images = Toy().eval(), random_images(4)
    walk = model.exits(images)
    next(walk)

    together = walk.send(torch.tensor([3, 1]))

    alone = model.exits(images[[3, 1]])
    next(alone)
    torch.testing.assert_close(together.logits, next(alone).logits)


def test_what_only_a_head_needs_does_not_wait_while_the_exit_is_judged():
    class HeadsHaveTheirOwn(Toy):
        """A head sees a copy, which nobody else needs."""

        seen: weakref.ref[Tensor]

        def part(self, exit: int, state: State) -> tuple[State, State]:
            seen, state = super().part(exit, state)
            copied = seen.clone()
            self.seen = weakref.ref(copied)
            return copied, state

    model = HeadsHaveTheirOwn().eval()
    with torch.no_grad():
        for _ in model.exits(random_images(2)):
            assert model.seen() is None


@pytest.mark.parametrize("wanted", [(True, True), (True,) * 4])
def test_another_number_of_wishes_than_exits_is_refused_before_anything_runs(wanted):
    model = Toy().eval()

    with pytest.raises(ValueError, match=f"wanted has {len(wanted)} values; the network has 3 exits"):
        model.exits(random_images(1), wanted)
    assert model.calls() == [0, 0, 0]


@pytest.mark.parametrize("align_corners", [False, True])
def test_full_size_resizes_to_the_padded_size_and_cuts(align_corners):
    logits = torch.randn(2, 3, 4, 4)

    found = full_size(CoarseLogits(logits, (16, 12), align_corners), (13, 12))

    resized = F.interpolate(logits, size=(16, 12), mode="bilinear", align_corners=align_corners)
    assert torch.equal(found, resized[:, :, :13])


def test_full_size_logits_are_only_cut():
    logits = torch.randn(1, 2, 4, 4)

    assert torch.equal(full_size(CoarseLogits(logits, (4, 4), align_corners=False), (3, 4)), logits[:, :, :3])


def test_select_takes_rows_of_everything_and_keeps_the_containers():
    rows = torch.arange(6).reshape(3, 2)
    features = {"a": [rows, None], "b": (rows + 10,), "c": Pair(rows, [rows, None])}

    found = select(features, torch.tensor([2, 0]))

    assert type(found["b"]) is tuple
    assert type(found["c"]) is Pair
    for kept, whole in ((found["a"][0], rows), (found["b"][0], rows + 10), (found["c"].second[0], rows)):
        assert torch.equal(kept, whole[[2, 0]])


def test_select_of_all_copies_nothing():
    features = [torch.zeros(2)]

    assert select(features, None) is features
