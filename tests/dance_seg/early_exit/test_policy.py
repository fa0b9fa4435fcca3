"""Who leaves where: scores by hand, decisions against every exit's own answer, and what does not run."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_seg.early_exit.exits import ExitNetwork
from dance_seg.early_exit.policy import ExitPolicy, at_every_exit, decide, predicted_boundary, within_image
from dance_seg.evaluator import labels_of
from dance_seg.inference import predict_labels
from dance_seg.sample import CoarseLogits
from tests.dance_seg.early_exit.toy import CLASSES, Toy, random_images

NEVER = (math.inf, math.inf)


def coarse(logits, padded=None, *, align_corners=False):
    tensor = torch.as_tensor(logits)
    return CoarseLogits(tensor, tuple(padded or tensor.shape[-2:]), align_corners)


def two_classes(*leads):
    """One image of one row: logits (1, 2, 1, w) whose first class leads by so much."""
    return coarse([[[list(map(float, leads))], [[0.0] * len(leads)]]])


def confidence(lead):
    return 1 / (1 + math.exp(-abs(lead)))


def entropy(lead):
    p = confidence(lead)
    return -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)


# Scores -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    logits = two_classes(3, 1, 0, -4)  # confidences 0.953, 0.731, 0.5, 0.982
    leads = (3, 1, 0, -4)

    assert ExitPolicy().scores(logits).item() == 0.5
    assert ExitPolicy(confident_from=0.7).scores(logits).item() == 0.75
    assert ExitPolicy(score="mean").scores(logits).item() == pytest.approx(sum(map(confidence, leads)) / 4, rel=1e-6)
    expected = 1 - (entropy(3) + entropy(1) + 1 + entropy(-4)) / 4
    assert ExitPolicy(score="entropy").scores(logits).item() == pytest.approx(expected, rel=1e-5)


def test_boundary_pixels_count_with_their_weight():
    logits = two_classes(3, 1, 0.5, -4)  # mask 0 0 0 1: the last two differ from a neighbour
    values = [confidence(lead) for lead in (3, 1, 0.5, -4)]

    for weight in (0.0, 0.25, 1.0):
        weights = (1, 1, weight, weight)
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        found = ExitPolicy(score="mean", boundary_weight=weight).scores(logits)
        assert found.item() == pytest.approx(expected, rel=1e-6)


def test_an_image_of_nothing_but_boundary_has_the_plain_score():
    logits = two_classes(3, -3, 3, -1)

    plain = ExitPolicy(score="mean").scores(logits)

    assert torch.equal(ExitPolicy(score="mean", boundary_weight=0.0).scores(logits), plain)


def test_boundary_is_where_one_of_four_neighbours_differs():
    mask = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    logits = torch.stack([1 - mask, mask])[None].float()

    assert predicted_boundary(logits)[0].int().tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


def test_padding_does_not_count():
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0, :2, :3] = 9.0  # images of 9 x 12, padded to 16 x 16, cover 2.25 rows and 3 columns
    found = ExitPolicy().scores(coarse(logits, (16, 16)), (9, 12))

    assert within_image(coarse(logits, (16, 16)), (9, 12)).shape[-2:] == (3, 3)
    assert found.item() == pytest.approx(6 / 9)


@pytest.mark.parametrize("score", ["confident", "mean", "entropy"])
@settings(max_examples=30, deadline=None)
@given(
    scale=st.sampled_from([0.0, 1.0, 50.0, 3e38]),
    classes=st.integers(1, 20),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_scores_lie_between_0_and_1(score, scale, classes, weight, seed):
    logits = scale * torch.rand(2, classes, 3, 4, generator=torch.Generator().manual_seed(seed)).mul(2).sub(1)

    found = ExitPolicy(score=score, boundary_weight=weight).scores(coarse(logits))

    assert found.dtype == torch.float32
    assert ((found >= 0) & (found <= 1)).all()


def test_entropy_is_that_of_torch():
    logits = torch.randn(3, 7, 5, 6)
    expected = torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy().mean(dim=(1, 2)) / math.log(7)

    torch.testing.assert_close(ExitPolicy(score="entropy").scores(coarse(logits)), 1 - expected)


def test_half_precision_is_scored_in_float32():
    logits = torch.randn(2, 3, 40, 40).bfloat16()

    assert torch.equal(ExitPolicy().scores(coarse(logits)), ExitPolicy().scores(coarse(logits.float())))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits = torch.zeros(1, 2, 3, 3)
    logits[0, 1, 1, 1] = bad

    with pytest.raises(ValueError, match="1 of 18 logits are NaN or infinite"):
        ExitPolicy().scores(coarse(logits))


# Decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 12), (8, 10), (17, 23)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_thresholds_of_infinity_are_the_plain_network_bit_for_bit(size, align_corners):
    model, images = Toy(light=True, align_corners=align_corners).eval(), random_images(size=(9, 12))
    plain = predict_labels(model, images, size)
    before = model.head_calls()

    decided = decide(model, images, size, ExitPolicy(thresholds=NEVER))

    assert decided.labels.dtype == torch.uint8
    assert torch.equal(decided.labels, plain)
    assert decided.exits.tolist() == [2] * 6
    assert decided.scores.isnan().all()
    assert [after - b for after, b in zip(model.head_calls(), before, strict=True)] == [0, 0, 6]


def test_a_threshold_of_zero_is_the_first_exit_and_nothing_else_runs():
    model, images = Toy().eval(), random_images()

    decided = decide(model, images, (9, 12), ExitPolicy(thresholds=(0.0, math.inf)))

    assert torch.equal(decided.labels, labels_of(next(model.exits(images)), (9, 12), (9, 12)))
    assert decided.exits.tolist() == [0] * 6
    assert model.calls()[1:] == [0, 0]
    assert model.head_calls()[1:] == [0, 0]


def middle_policy(model: ExitNetwork, images: torch.Tensor, **options) -> tuple[ExitPolicy, torch.Tensor]:
    """Thresholds half-way between scores, so that some images leave at each exit; and where they should."""
    policy = ExitPolicy(score="mean", **options)
    scores = at_every_exit(model, images, (9, 12)).scores(policy)
    first = scores[:, 0].sort().values[3:5].mean().item()
    rest = scores[scores[:, 0] < first, 1].sort().values[1:3].mean().item()
    expected = torch.where(scores[:, 0] >= first, 0, torch.where(scores[:, 1] >= rest, 1, 2))
    return ExitPolicy(score="mean", thresholds=(first, rest), **options), expected


@pytest.mark.parametrize("boundary_weight", [1.0, 0.0])
def test_each_image_gets_the_answer_of_its_exit_and_the_parts_behind_do_not_see_it(boundary_weight):
    model, images = Toy(light=True).eval(), random_images()
    policy, expected = middle_policy(model, images, boundary_weight=boundary_weight)
    every = at_every_exit(model, images, (9, 12))
    for counted in (*model.parts, *model.heads):
        counted.images.clear()

    decided = decide(model, images, (9, 12), policy)

    assert decided.exits.tolist() == expected.tolist()
    assert [int((expected == exit).sum()) for exit in range(3)] == [2, 2, 2]
    assert torch.equal(decided.labels, every.labels[expected, torch.arange(6)])
    assert model.calls() == model.head_calls() == [6, 4, 2]
    leave_early = expected < 2
    torch.testing.assert_close(
        decided.scores[leave_early], every.scores(policy)[torch.arange(6), expected][leave_early], rtol=1e-5, atol=1e-6
    )
    assert decided.scores[~leave_early].isnan().all()


def test_a_batch_is_decided_as_its_images_one_at_a_time():
    model, images = Toy(light=True, hand_over=True).eval(), random_images()
    policy, _ = middle_policy(model, images)

    together = decide(model, images, (9, 12), policy)
    alone = [decide(model, image[None], (9, 12), policy) for image in images]

    assert together.exits.tolist() == [one.exits.item() for one in alone]
    assert torch.equal(together.labels, torch.cat([one.labels for one in alone]))


def test_labels_are_taken_at_another_size_than_the_images():
    model, images = Toy().eval(), random_images()
    policy, expected = middle_policy(model, images)

    decided = decide(model, images, (20, 31), policy)

    assert torch.equal(decided.labels, at_every_exit(model, images, (20, 31)).labels[expected, torch.arange(6)])


def test_the_walk_is_closed_when_nobody_is_left():
    model, walks = Toy().eval(), []
    walk_of = model.exits

    def kept(images, wanted=None):
        walks.append(walk_of(images, wanted))
        return walks[0]

    model.exits = kept
    decide(model, random_images(), (9, 12), ExitPolicy(thresholds=(0.0, 0.0)))

    assert walks[0].gi_frame is None


def test_an_image_leaves_at_a_score_equal_to_the_threshold():
    model, image = Toy().eval(), random_images(1)
    score = at_every_exit(model, image, (9, 12)).scores(ExitPolicy(score="mean"))[0, 0].item()

    for threshold, exit in ((score, 0), (float(np.nextafter(np.float32(score), np.float32(1))), 2)):
        policy = ExitPolicy(score="mean", thresholds=(threshold, math.inf))
        assert decide(model, image, (9, 12), policy).exits.tolist() == [exit]


def test_a_deadline_lets_everybody_leave_at_the_next_exit():
    model, images = Toy().eval(), random_images()
    asked = []

    def passed() -> bool:
        asked.append(True)
        return len(asked) == 2

    decided = decide(model, images, (9, 12), ExitPolicy(thresholds=NEVER), deadline=passed)

    assert decided.exits.tolist() == [1] * 6
    assert model.calls() == model.head_calls() == [6, 6, 0]  # every exit is asked
    every = at_every_exit(model, images, (9, 12))
    assert torch.equal(decided.labels, every.labels[1])


def test_a_deadline_that_never_comes_changes_no_label():
    model, images = Toy().eval(), random_images()
    policy, _ = middle_policy(model, images)

    without = decide(model, images, (9, 12), policy)

    within = decide(model, images, (9, 12), policy, deadline=lambda: False)
    assert torch.equal(within.labels, without.labels)
    assert torch.equal(within.exits, without.exits)


def test_thresholds_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"thresholds has 1 values and the network 3 exits, which takes 2"):
        decide(Toy().eval(), random_images(), (9, 12), ExitPolicy(thresholds=(0.5,)))


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        decide(Toy().train(), random_images(), (9, 12), ExitPolicy(thresholds=NEVER))
    with pytest.raises(ValueError, match="training mode"):
        at_every_exit(Toy().train(), random_images(), (9, 12))


@pytest.mark.parametrize("thresholds", [NEVER, (0.5, 0.5)])
def test_logits_that_are_not_finite_give_no_label(thresholds):
    model = Toy().eval()
    with torch.no_grad():
        model.parts[0].inner.weight[0, 0, 0, 0] = math.nan

    with pytest.raises(ValueError, match="NaN or infinite"):
        decide(model, random_images(), (9, 12), ExitPolicy(thresholds=thresholds))


def test_every_exit_is_the_networks_own():
    model, images = Toy().eval(), random_images(2)

    every = at_every_exit(model, images, (9, 12))

    assert every.labels.shape == (3, 2, 9, 12)
    assert every.scores(ExitPolicy()).shape == (2, 3)
    assert torch.equal(every.labels[2], predict_labels(model, images, (9, 12)))
    assert np.unique(every.labels).max() < CLASSES


# Options and records ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "margin"}, r"score is 'margin'; choose one of confident, mean, entropy"),
        ({"score": ["mean"]}, r"score is \['mean'\]; choose one of"),
        ({"confident_from": 0.0}, r"confident_from is 0\.0: a confidence above 0"),
        ({"confident_from": True}, "confident_from is True"),
        ({"confident_from": math.nan}, "confident_from is nan"),
        ({"confident_from": "0.9"}, "confident_from is '0.9'"),
        ({"boundary_weight": 1.5}, "boundary_weight is 1.5: 0 leaves boundaries out"),
        ({"boundary_weight": -0.1}, "boundary_weight is -0.1"),
        ({"thresholds": (0.5, -math.inf)}, r"thresholds\[1\] is -inf: one number from 0 to 1 per exit but the last"),
        ({"thresholds": (math.nan,)}, r"thresholds\[0\] is nan"),
        ({"thresholds": (1.5,)}, r"thresholds\[0\] is 1.5"),
        ({"thresholds": (False,)}, r"thresholds\[0\] is False"),
        ({"thresholds": 0.5}, r"thresholds is 0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy(**options)


def test_a_record_survives_json():
    policy = ExitPolicy(score="entropy", confident_from=0.7, boundary_weight=0.25, thresholds=(0.1 + 0.2, math.inf))

    text = json.dumps(policy.as_record(), allow_nan=False)

    assert ExitPolicy.from_record(json.loads(text)) == policy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 1}, "'scale' is unknown"),
        ({"score": None}, "score is None"),
        ({"confident_from": None}, "confident_from is None"),
        ({"thresholds": "0.5"}, "thresholds is '0.5': a list of numbers"),
        ({"thresholds": None}, "thresholds is None: a list of numbers"),
        ({"thresholds": [None, "x"]}, r"thresholds\[1\] is 'x'"),
        ({"thresholds": {"0": 1}}, "thresholds is"),
    ],
)
def test_a_record_that_was_tampered_with_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy.from_record({**ExitPolicy().as_record(), **change})


def test_a_record_that_is_no_mapping_or_lacks_a_key_is_refused():
    with pytest.raises(ValueError, match="record of an exit policy is list"):
        ExitPolicy.from_record([])
    without = {key: value for key, value in ExitPolicy().as_record().items() if key != "boundary_weight"}
    with pytest.raises(ValueError, match="boundary_weight is missing"):
        ExitPolicy.from_record(without)
