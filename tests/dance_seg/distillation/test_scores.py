"""Scores and costs of streams made up by hand."""

import numpy as np
import pytest

from dance_seg.distillation.online import Asked, Followed, TeacherError, follow
from dance_seg.distillation.scores import Price, StreamScores, pricing, scored, stream_macs
from dance_seg.distillation.teacher import Teaching
from dance_seg.sample import IGNORE, Frame
from tests.dance_seg.distillation.streams import CLASSES, SIZE, options, stream, student, teacher

ONE, FOUR = (1, 1), (1, 4)


def made(index, prediction, *, taught=None, truth=None, updates=0, seconds=(1.0, 0.0, 0.0), scored=True, asked=None):
    """A frame of one row, as the loop would have yielded it."""
    prediction, taught, truth = (None if row is None else np.uint8([row]) for row in (prediction, taught, truth))
    frame = Frame(index, index / 10, np.zeros((*prediction.shape, 3), np.uint8), truth)
    teaching = None if taught is None else Teaching(taught)
    parts = dict(zip(("student", "teacher", "updates"), seconds, strict=True))
    shown = prediction if taught is None else taught
    key = taught is not None
    return Followed(frame, prediction, shown, teaching, key, updates, None, None, 8, parts, scored, asked)


def test_scores_are_of_one_matrix_over_all_frames_that_a_teacher_labelled():
    """Class 1: right 1, said 3 times, meant 2 times: 1 / 4. Class 2: right 1, said 1, meant 3: 1 / 3. Not per frame."""
    scores = StreamScores(CLASSES, options())
    figures = scores.add(made(0, [1, 1, 0, 2], taught=[1, 2, 0, 2]))
    scores.add(made(1, [1, 1, 1, 1]))  # nobody knows
    scores.add(made(2, [0, 1, 0, 0], taught=[0, 2, 1, 0]))
    found = scores.record()
    assert figures["stream/accuracy"] == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)
    assert found["against_teacher"]["iou"] == pytest.approx({"background": 75.0, "red": 25.0, "blue": 100 / 3})
    assert found["against_teacher"]["miou_foreground"] == pytest.approx((25 + 100 / 3) / 2)
    assert found["against_teacher"]["miou"] == pytest.approx((75 + 25 + 100 / 3) / 3)
    assert found["against_teacher"]["foreground"] == ["red", "blue"]
    assert (found["frames"], found["frames_against_teacher"], found["key_frames"]) == (3, 2, 2)
    assert found["against_truth"] is None


def test_what_the_user_was_shown_is_never_scored():
    """The teacher's mask is shown and right; the prediction, which is wrong, is what counts."""
    scores = StreamScores(CLASSES, options())
    scores.add(made(0, [1, 1], taught=[2, 2], truth=[2, 2]))
    found = scores.record()
    assert found["against_teacher"]["miou_foreground"] == found["against_truth"]["miou_foreground"] == 0
    assert found["teacher_against_truth"]["miou_foreground"] == 100


def test_the_teacher_is_scored_where_it_knows():
    scores = StreamScores(CLASSES, options())
    scores.add(made(0, [1, 1, 1], taught=[1, IGNORE, 2], truth=[1, 2, 2]))
    assert scores.record()["teacher_against_truth"]["pixel_accuracy"] == 100
    assert scores.record()["against_teacher"]["pixel_accuracy"] == 50


def asked_at(index, prediction, truth=None):
    return Asked(*made(index, prediction, truth=truth)[:2])


def test_labels_that_came_back_later_are_compared_with_what_was_predicted_of_their_own_frame():
    """The teacher says [2, 1] of frame 3, predicted [2, 2] and really [2, 2]; frame 5 is predicted [1, 1]."""
    scores = StreamScores(CLASSES, options())
    scores.add(made(3, [2, 2], truth=[2, 2]))
    figures = scores.add(made(5, [1, 1], taught=[2, 1], truth=[1, 1], asked=asked_at(3, [2, 2], truth=[2, 2])))
    found = scores.record()
    assert found["against_teacher"]["pixel_accuracy"] == 50
    assert figures["stream/accuracy"] == pytest.approx(100 * (1 / 2 + 0) / 2)
    assert found["teacher_against_truth"]["pixel_accuracy"] == 50
    assert (found["frames_against_teacher"], found["frames_against_truth"], found["key_frames"]) == (1, 2, 1)
    assert found["against_truth"]["pixel_accuracy"] == 100


def test_what_comes_back_after_the_last_frame_is_paid_for_and_scored_and_is_no_frame_more():
    scores = StreamScores(CLASSES, options(), price=lambda size: Price(student=1, teacher=50, update=4))
    scores.add(made(0, [2, 2]))
    asked = asked_at(0, [2, 2])
    scores.add_left_over(made(0, [2, 2], taught=[2, 2], updates=3, seconds=(0.0, 5.0, 6.0), asked=asked))
    found, costs = scores.record(), scores.costs()
    assert (found["frames"], found["key_frames"], found["updates"]) == (1, 1, 3)
    assert found["against_teacher"]["pixel_accuracy"] == 100
    assert costs["seconds"] == {"student": 1.0, "teacher": 5.0, "updates": 6.0}
    assert costs["counts"] == {"student": 1, "teacher": 1, "updates": 3}
    assert costs["gmacs"]["total"] * 1e9 == pytest.approx(1 + 50 + 3 * 4)
    assert costs["gmacs"]["teacher_every_frame"] * 1e9 == pytest.approx(50)


def test_frames_that_an_offline_student_learns_from_are_paid_for_and_not_scored():
    scores = StreamScores(CLASSES, options(method="offline"))
    scores.add(made(0, [1, 1], taught=[2, 2], scored=False))
    scores.add(made(1, [2, 2]), np.uint8([[2, 2]]), judging_seconds=3.0)
    found = scores.record()
    assert (found["frames"], found["frames_against_teacher"], found["against_teacher"]["pixel_accuracy"]) == (2, 1, 100)
    assert scores.costs()["seconds"] == {"student": 2.0, "teacher": 0.0, "updates": 0.0}
    assert scores.costs()["judging_seconds"] == 3.0


def test_other_methods_can_be_scored_on_the_same_part():
    scores = StreamScores(CLASSES, options(), score_from=1)
    scores.add(made(0, [1, 1], taught=[2, 2]))
    assert scores.record()["against_teacher"] is None
    scores.add(made(1, [2, 2], taught=[2, 2]))
    assert scores.record()["against_teacher"]["pixel_accuracy"] == 100


def test_windows_hold_the_frames_of_their_stretch():
    scores = StreamScores(CLASSES, options(), window=10)
    for index in (0, 9, 10, 31):
        right = index != 10
        scores.add(made(index, [1, 1] if right else [2, 2], taught=[1, 1], truth=[1, 2], updates=index % 2))
    windows = scores.record()["windows"]
    assert [(w["start"], w["frames"], w["taught"], w["updates"]) for w in windows] == [
        (0, 2, 2, 1),
        (10, 1, 1, 0),
        (31, 1, 1, 1),
    ]
    assert [w["miou_against_teacher"] for w in windows] == [100, 0, 100]
    assert windows[0]["miou_against_truth"] == pytest.approx(25)  # red: 2 of 4, blue: none


def test_the_cost_model_is_the_sum_of_what_each_frame_pays():
    """Frames 0 and 16 are key frames, with 3 updates: 17 x 1 + 2 x 50 + 3 x 4 = 129 of 17 x 50 = 850."""
    price = Price(student=1, teacher=50, update=4)
    scores = StreamScores(CLASSES, options(), price=lambda size: price)
    for index in range(17):
        key = index in (0, 16)
        scores.add(
            made(index, [0], taught=[0] if key else None, updates=3 if index == 0 else 0, seconds=(1, 5 * key, 2))
        )
    found = scores.costs(alone={"student": 1.0, "teacher": 5.0, "updates": 2.0})
    assert found["gmacs"]["total"] * 1e9 == pytest.approx(129)
    assert found["gmacs"]["total"] * 1e9 == pytest.approx(stream_macs(17, 2, 3, price))
    assert found["times_cheaper"]["macs"] == pytest.approx(850 / 129)
    assert found["times_cheaper"]["milliseconds"] == pytest.approx(17 * 5 / (17 + 10 + 34))
    assert found["counts"] == {"student": 17, "teacher": 2, "updates": 3}
    assert found["model"] == pytest.approx({"seconds": 17 + 10 + 6, "times_cheaper": 85 / 33})
    assert found["milliseconds"]["updates"] == pytest.approx(1000 * 2 / 3)
    assert stream_macs(10, 1, 0, Price(1, None, 3)) is None


def test_the_cost_model_takes_the_streams_medians_of_what_was_not_measured_alone():
    """17 frames of 1 s, key frames of 5 s and 3 updates of 2 s; a teacher that never answered has no time."""
    scores = StreamScores(CLASSES, options())
    for index in range(17):
        key = index in (0, 16)
        scores.add(made(index, [0], taught=[0] if key else None, updates=3 * key, seconds=(1, 5 * key, 6 * key)))
    found = scores.costs(alone={"student": 0.5})["model"]
    assert found == pytest.approx({"seconds": 17 / 2 + 2 * 5 + 6 * 2, "times_cheaper": 17 * 5 / 30.5})
    scores = StreamScores(CLASSES, options())
    scores.add(made(0, [0]))
    assert scores.costs(alone={"student": 1.0})["model"] == {"seconds": 1.0, "times_cheaper": None}


@pytest.mark.parametrize(
    ("method", "macs"),
    [("teacher", 50), ("hold", 50), ("frozen", 1), ("offline", 51), ("online", 51)],
)
def test_a_method_pays_for_what_it_runs(method, macs):
    scores = StreamScores(CLASSES, options(method=method), price=lambda size: Price(1, 50, 4))
    scores.add(made(0, [0], taught=None if method == "frozen" else [0]))
    assert scores.costs()["gmacs"]["total"] * 1e9 == pytest.approx(macs)


def test_a_teacher_of_unknown_cost_leaves_the_macs_out():
    scores = StreamScores(CLASSES, options(), price=lambda size: Price(1, None, 4))
    scores.add(made(0, [0], taught=[0]))
    assert "gmacs" not in scores.costs()
    assert scores.costs()["times_cheaper"]["macs"] is None


def test_the_price_of_an_update_is_that_of_what_learns():
    """Forward 1; backward to both layers' weights and through the head 1 + 1/2; of the tail, its weights alone 1/2."""
    from dance_seg.distillation.state import StreamState

    prices = {}
    for partial in ("all", "tail"):
        network = student()
        StreamState.start(network, CLASSES, options(partial=partial))
        prices[partial] = pricing(network, teacher(), options(partial=partial))(SIZE)
    forward = (3 * 12 + 12 * 3) * 9 * 32 * 48
    assert prices["all"] == Price(forward, 500_000_000, forward * 5 // 2)
    assert prices["tail"].update == forward * 3 // 2
    assert pricing(student(), teacher(), options(resolution=0.5))(SIZE).student == forward // 4


def test_the_teacher_can_be_asked_on_every_frame_for_scores_alone():
    calls = []

    class Counting:
        classes, macs = CLASSES, staticmethod(lambda size: 1)

        def __call__(self, frame):
            calls.append(frame.index)
            return teacher()(frame)

    scores = StreamScores(CLASSES, options())
    run = follow(stream(20), student(), Counting(), options())
    found = list(scored(run, scores, Counting()))
    assert sorted(calls) == list(range(20))
    record = scores.record()
    assert (record["frames_against_teacher"], record["frames_against_truth"]) == (20, 20)
    assert record["against_teacher"] == record["against_truth"]  # this teacher is the truth
    assert record["teacher_fraction"] == sum(f.key_frame for f, _, _ in found) / 20
    assert scores.counts["teacher"] == sum(f.key_frame for f, _, _ in found)
    assert scores.judging_seconds > 0
    assert all((labels == f.frame.label).all() for f, labels, _ in found)


def mistaken(frame):
    """A teacher that says a class that does not exist on frames 5 and 6, which are no key frames."""
    return Teaching(np.full_like(frame.label, 7)) if frame.index in (5, 6) else teacher()(frame)


def test_labels_that_are_none_leave_a_frame_unscored_where_they_were_for_scores_alone():
    scores = StreamScores(CLASSES, options())
    with pytest.warns(UserWarning, match=r"frame 5: .*scores alone: it says class 7, and there are 3") as told:
        found = list(scored(follow(stream(10), student(), teacher(), options()), scores, mistaken))
    assert len(told) == 1
    assert [f.frame.index for f, labels, _ in found if labels is None] == [5, 6]
    record = scores.record()
    assert (record["frames"], record["frames_against_teacher"], record["frames_against_truth"]) == (10, 8, 10)


def test_where_a_failing_teacher_stops_the_stream_it_does_so_for_scores_too_after_the_frame():
    scores = StreamScores(CLASSES, options(teacher_failure="stop"))
    run = scored(follow(stream(10), student(), teacher(), scores.options), scores, mistaken)
    followed = []
    with pytest.raises(TeacherError, match=r"frame 5: .*class 7.*teacher_failure=skip goes on"):
        followed.extend(f.frame.index for f, _, _ in run)
    assert followed == list(range(6))
    assert scores.record()["frames"] == 6


def test_stability_follows_neighbours_of_one_scene_only():
    """A still picture: a prediction that stays is stable; cuts and gaps are not compared across."""
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)

    def at(index, label, cut=False):
        labels = np.full((48, 64), label, np.uint8)
        frame = Frame(index, 0.0, image, None, cut)
        return Followed(
            frame, labels, labels, Teaching(labels), True, 0, None, None, 8, {"student": 1.0, "teacher": 1.0}
        )

    scores = StreamScores(CLASSES, options(), stability=True)
    for followed in (at(0, 1), at(1, 1), at(2, 2, cut=True), at(3, 2), at(7, 1)):
        scores.add(followed)
    assert scores.record()["stability"] == {"student": 100.0, "teacher": 100.0}
    scores.add(at(8, 2))
    assert scores.record()["stability"]["student"] < 100


def test_what_is_kept_does_not_grow_with_the_stream():
    scores = StreamScores(CLASSES, options(), window=10**6)
    for index in range(3000):
        scores.add(made(index, [0], taught=[0]))
    assert max(len(times) for times in scores._recent.values()) <= 1001
    assert len(scores.windows) == 0
