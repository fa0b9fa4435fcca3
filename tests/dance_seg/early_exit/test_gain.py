"""The line to expected gains, against mIoU itself and against fits without each image."""

import numpy as np
import pytest
import torch

from dance_seg.calibration import exits_of_batches, with_lines
from dance_seg.early_exit.gain import PENALTIES, fit_line, fit_lines, gains
from dance_seg.early_exit.policy import ExitPolicy, at_every_exit, decide, predicted_boundary
from dance_seg.metrics import scores
from dance_seg.sample import Batch, CoarseLogits
from tests.dance_seg.early_exit.toy import CLASSES, Toy, random_images


def random_matrices(images=40, exits=3, classes=4):
    """Confusion matrices that are better from exit to exit, of the same labels."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 50, (images, classes))
    matrices = np.zeros((images, exits, classes, classes), np.int64)
    for image in range(images):
        for exit in range(exits):
            for true in range(classes):
                right = 0.4 + 0.2 * exit + 0.1 * generator.random()
                spread = np.full(classes, (1 - right) / (classes - 1))
                spread[true] = right
                matrices[image, exit, true] = generator.multinomial(labels[image, true], spread)
    return matrices


def miou(matrices):
    return scores(matrices.sum(axis=0)).miou


def test_gains_add_up_to_what_miou_rises():
    matrices = random_matrices()
    early, late = matrices[:, 0], matrices[:, 2]
    assert gains(early, late).sum() == pytest.approx(miou(late) - miou(early), rel=0.05)
    assert gains(early, late) == pytest.approx(-gains(late, early))


def test_a_gain_is_the_slope_of_miou_along_one_image():
    """Half of the images answered early and half late: the difference that one image more makes."""
    matrices = random_matrices(images=400)
    early, late = matrices[:, 0], matrices[:, 2]
    expected = gains(early, late)
    mean = ((early + late) / 2).sum(axis=0)
    for image in (0, 7):
        step = (late[image] - early[image]) / 2
        rise = _miou(mean + step) - _miou(mean - step)
        assert expected[image] == pytest.approx(rise, rel=1e-3, abs=1e-6)


def _miou(matrix):
    right = np.diagonal(matrix)
    return 100 * np.mean(right / (matrix.sum(0) + matrix.sum(1) - right))


def test_classes_that_are_nowhere_count_nothing():
    matrices = random_matrices(classes=3)
    padded = np.zeros((40, 3, 5, 5), np.int64)
    padded[:, :, :3, :3] = matrices
    assert gains(padded[:, 0], padded[:, 2]) == pytest.approx(gains(matrices[:, 0], matrices[:, 2]))


def ridge(uncertainty, gain, penalty):
    """The penalised least squares of centred gains on uncertainties standardised over all images."""
    return np.linalg.solve(uncertainty.T @ uncertainty + penalty * np.eye(uncertainty.shape[1]), uncertainty.T @ gain)


def test_images_left_out_are_predicted_by_a_fit_without_them():
    generator = np.random.default_rng(1)
    uncertainty = generator.random((30, 5))
    gain = uncertainty @ np.array([1.0, -2, 0, 0.5, 0]) + 0.3 * generator.normal(size=30)
    line = fit_line(uncertainty, gain)
    standard, centred = (uncertainty - uncertainty.mean(0)) / uncertainty.std(0), gain - gain.mean()
    errors, predicted = [], []
    for penalty in PENALTIES:
        left_out = np.zeros(30)
        for image in range(30):
            others = np.arange(30) != image
            left_out[image] = standard[image] @ ridge(standard[others], centred[others], penalty)
        predicted.append(left_out)
        errors.append(((left_out - centred) ** 2).sum())
    best = int(np.argmin(errors))
    fitted = standard @ ridge(standard, centred, PENALTIES[best])
    assert line.left_out == pytest.approx(predicted[best] / fitted.std())
    constant, *weights = line.weights
    assert uncertainty @ np.array(weights) + constant == pytest.approx(fitted / fitted.std())
    assert np.corrcoef(line.left_out, gain)[0, 1] > 0.8


@pytest.mark.parametrize(
    ("uncertainty", "gain"),
    [
        (np.ones((1, 3)), np.ones(1)),
        (np.ones((4, 3)), np.arange(4.0)),
        (np.random.default_rng(0).random((4, 3)), np.full(4, 2.0)),
    ],
    ids=["one image", "equal uncertainties", "equal gains"],
)
def test_where_nothing_can_be_told_all_images_are_alike(uncertainty, gain):
    line = fit_line(uncertainty, gain)
    assert line.weights == (0, 0, 0, 0)
    assert not line.left_out.any()


# The score ------------------------------------------------------------------------------------------------------------


def coarse(logits):
    return CoarseLogits(logits, (logits.shape[-2], logits.shape[-1]), align_corners=False)


def test_the_score_by_hand():
    """Two pixels with p = 1/2 of two classes, one of them certain of another: p (1 - p) is 1/4 in half of them."""
    logits = torch.tensor([[[[0.0, -99.0]], [[0.0, -99.0]], [[-99.0, 99.0]]]])
    policy = ExitPolicy(score="gain", lines=((1.0, 2.0, 0, 0, 8.0, 0.0, 5.0), (0.5, 0, 0, 1.0, 0.0, -4.0, 0.0)))
    assert policy.evidence(coarse(logits))[0].tolist() == pytest.approx([0.25, 0.25, 0.5, 0.125, 0.125, 0])
    assert policy.scores(coarse(logits), exit=0).item() == pytest.approx(1 / (1 + np.exp(1 + 2 * 0.25 + 8 * 0.125)))
    assert policy.scores(coarse(logits), exit=1).item() == pytest.approx(1 / (1 + np.exp(0.5 + 0.5 - 4 * 0.125)))
    assert policy.scores(coarse(logits), exit=2).item() == 0.5


def test_boundaries_may_count_for_less():
    logits = torch.randn(2, 3, 6, 7)
    weights = torch.where(predicted_boundary(logits), 0.25, 1.0)[:, None]
    probabilities = logits.softmax(1)
    told = torch.cat([probabilities, probabilities * (1 - probabilities)], dim=1)
    expected = (weights * told).sum((2, 3)) / weights.sum((2, 3))
    torch.testing.assert_close(ExitPolicy(score="gain", boundary_weight=0.25).evidence(coarse(logits)), expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lines": ((1.0, 2.0),), "score": "mean"}, "lines are those of the score gain, and score is 'mean'"),
        ({"lines": ((1.0, 2.0), (1.0,))}, r"lines\[1\] is \(1.0,\)"),
        ({"lines": ((1.0, float("nan")),)}, r"lines\[0\] is \(1.0, nan\)"),
        ({"lines": ((1.0, "a"),)}, r"lines\[0\]"),
        ({"lines": ((),)}, "lines is"),
        ({"lines": 3}, "lines is 3"),
        ({"limits": ((0.0, 1.0),)}, "limits is .*two per weight of lines"),
        ({"lines": ((1.0, 2.0),), "limits": ((0.0, 1.0, 2.0, 3.0),)}, "limits is .*two per weight of lines"),
        ({"lines": ((1.0, 2.0),), "limits": ((0.0, float("inf")),)}, r"limits\[0\] is"),
        ({"limits": ((1.0, 2.0),), "score": "mean"}, "limits are those of the score gain"),
    ],
)
def test_lines_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        ExitPolicy(**{"score": "gain", **changes})


def test_lines_are_needed_and_belong_to_the_network():
    logits = coarse(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"no lines yet; calibrate .*python -m tools\.calibrate"):
        ExitPolicy(score="gain").scores(logits)
    policy = ExitPolicy(score="gain", thresholds=(0.5,), lines=((0.0, 1.0, 2.0),))
    with pytest.raises(ValueError, match="lines are for 1 classes, and the exit tells 3 apart"):
        policy.scores(logits)
    with pytest.raises(ValueError, match="lines are for 1 exits and the network has 3"):
        policy.check_fits(3)


def test_a_record_keeps_the_lines_and_one_without_them_is_read():
    policy = ExitPolicy(score="gain", thresholds=(0.5,), lines=((0.0, 1.0, 2.0),), limits=((0.0, 0.1, 0.8, 0.2),))
    assert ExitPolicy.from_record(policy.as_record()) == policy
    plain = ExitPolicy(thresholds=(0.5,))
    assert "lines" not in plain.as_record()
    assert ExitPolicy.from_record(plain.as_record()) == plain


def test_a_class_that_calibration_hardly_saw_does_not_decide():
    """The weight of evidence is its slope over its deviation, so as large as the class was rare."""
    generator = np.random.default_rng(0)
    common = generator.dirichlet(np.ones(3), 100)
    rare = 1e-7 * generator.random((100, 1))
    p = np.concatenate([common, rare], axis=1)
    evidence = np.concatenate([p, p * (1 - p)], axis=1)[:, None].repeat(2, axis=1).astype(np.float32)
    right = (100 * common[:, :1]).round().astype(np.int32)  # the first class gains by going on
    matrices = np.zeros((100, 2, 4, 4), np.int32)
    matrices[:, 0, 0, 1], matrices[:, 1, 0, 0] = right[:, 0], right[:, 0]
    matrices[:, :, 1, 1] = 50
    policy, _, scores = with_lines(ExitPolicy(score="gain"), evidence, matrices)
    usual = evidence[:1, 0].copy()
    seen = usual.copy()
    seen[0, 3] = seen[0, 7] = 0.01  # one pixel in a hundred
    score, beyond = (float(policy.scores_of_evidence(torch.from_numpy(one), 0)) for one in (usual, seen))
    least, most = usual.copy(), usual.copy()
    for place in (3, 7):
        least[0, place], most[0, place] = evidence[:, 0, place].min(), evidence[:, 0, place].max()
    edges = [float(policy.scores_of_evidence(torch.from_numpy(one), 0)) for one in (least, most)]
    assert min(*edges, score) - 1e-6 <= beyond <= max(*edges, score) + 1e-6
    unlimited = ExitPolicy(score="gain", lines=policy.lines)
    assert float(unlimited.scores_of_evidence(torch.from_numpy(seen), 0)) in (0, 1)
    assert 0 < scores[:, 0].min() < scores[:, 0].max() < 1


# Calibration ----------------------------------------------------------------------------------------------------------


def batches(count=12):
    torch.manual_seed(0)
    images = random_images(count)
    labels = torch.randint(0, CLASSES, (count, 9, 12), dtype=torch.uint8)
    for place in range(count):
        one = slice(place, place + 1)
        yield Batch((images[one] * 40 + 120).clamp(0, 255).to(torch.uint8), labels[one], torch.ones(1), (str(place),))


def test_one_pass_serves_many_policies_and_fits_those_without_lines():
    torch.manual_seed(0)
    model = Toy(light=True).eval()
    gain, mean = ExitPolicy(score="gain", boundary_weight=0.5), ExitPolicy(score="mean")
    of_gain, of_mean = exits_of_batches(model, batches(), CLASSES, gain, mean)
    (alone,) = exits_of_batches(model, batches(), CLASSES, mean)
    assert np.array_equal(of_mean.scores, alone.scores)
    assert of_mean.matrices is of_gain.matrices
    assert of_mean.policy == mean
    assert len(of_gain.policy.lines) == 2
    assert len(of_gain.policy.lines[0]) == 1 + 2 * CLASSES
    left_out = fit_lines(_evidence(model, gain).astype(np.float64), of_gain.matrices)[0].left_out
    assert of_gain.scores[:, 0] == pytest.approx(1 / (1 + np.exp(left_out)), abs=1e-6)
    (again,) = exits_of_batches(model, batches(), CLASSES, of_gain.policy)  # with lines: as images never seen
    evidence = _evidence(model, gain)
    fitted, _, by_fitted = with_lines(gain, evidence, of_gain.matrices)
    assert of_gain.own_scores == pytest.approx(again.scores, abs=1e-5)
    assert of_gain.own_scores == pytest.approx(by_fitted, abs=1e-5)
    assert np.abs(of_gain.own_scores - of_gain.scores).max() > 0.01  # what is fitted to an image knows it
    assert fitted.limits[1] == pytest.approx((*evidence[:, 1].min(0), *evidence[:, 1].max(0)))
    assert again.policy == of_gain.policy
    assert np.array(fitted.lines) == pytest.approx(np.array(of_gain.policy.lines))
    constant, *weights = of_gain.policy.lines[1]
    expected = 1 / (1 + np.exp(_evidence(model, gain)[:, 1] @ np.array(weights) + constant))
    assert again.scores[:, 1] == pytest.approx(expected, abs=1e-5)


def _evidence(model, policy):
    from dance_seg.normalise import normalise

    found = [at_every_exit(model, normalise(batch.images), (9, 12)).evidence(policy) for batch in batches()]
    return torch.cat(found).numpy()


def test_images_leave_by_the_line_of_each_exit():
    torch.manual_seed(0)
    model, images = Toy(light=True).eval(), random_images(8)
    lines = ((0.0, 0, 0, 0, 9.0, -9.0, 0.0), (0.0, 0, 0, 0, 0.0, 5.0, -5.0))
    policy = ExitPolicy(score="gain", lines=lines)
    found = at_every_exit(model, images, (9, 12)).scores(policy)
    first = float(found[:, 0].sort().values[4:6].mean())
    second = float(found[found[:, 0] < first, 1].sort().values[1:3].mean())
    decided = decide(model, images, (9, 12), ExitPolicy(score="gain", lines=lines, thresholds=(first, second)))
    expected = torch.where(found[:, 0] >= first, 0, torch.where(found[:, 1] >= second, 1, 2))
    assert torch.equal(decided.exits, expected)
    assert len(set(expected.tolist())) == 3
