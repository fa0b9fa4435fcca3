"""The loop on tiny drawn streams: `assert_*` say what it must do, and each known bug makes one of them fail."""

import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from dance_seg.batch_norm import set_bn_online
from dance_seg.checkpoint import load_checkpoint, save_checkpoint
from dance_seg.distillation import learning, online
from dance_seg.distillation import options as options_module
from dance_seg.distillation.accuracy import accuracy
from dance_seg.distillation.learning import attempt, images_of, target_of
from dance_seg.distillation.objects import grown, object_boxes, pixel_weights, weighted_cross_entropy
from dance_seg.distillation.online import TeacherError, follow
from dance_seg.distillation.options import OnlineDistillation
from dance_seg.distillation.real_time import follow_in_real_time
from dance_seg.distillation.state import StreamState, load_warm_start
from dance_seg.distillation.teacher import OracleTeacher, Teaching
from dance_seg.sample import IGNORE, Frame
from tests.dance_seg.distillation.streams import (
    CLASSES,
    SIZE,
    frame_at,
    options,
    stream,
    student,
    teacher,
    weights_of,
)


def followed_with(num=60, cuts=(), network=None, taught_by=None, **changes):
    still = changes.pop("still", False)
    network = network if network is not None else student()
    taught_by = taught_by or teacher()
    return list(follow(stream(num, cuts, still), network, taught_by, options(**changes), num_frames=num))


# What the loop must do --------------------------------------------------------------------------------------------


def assert_weights_change_on_key_frames_only(num=40, **changes):
    network = student()
    before, seen = weights_of(network), []
    for followed in follow(stream(num), network, teacher(), options(**changes)):
        after = weights_of(network)
        assert (after != before) == (followed.updates > 0), (
            f"frame {followed.frame.index}: weights and updates disagree"
        )
        assert followed.key_frame or not followed.updates
        before = after
        seen.append(followed)
    assert any(f.updates for f in seen)
    assert any(not f.key_frame for f in seen)


def assert_updates_raise_the_accuracy(share=0.8):
    """METHODS of the paper: not below before; strictly above it on more than four fifths of the key frames."""
    learnt = [f for f in followed_with(150, cuts=(70,), threshold=0.9, learning_rate=0.0005) if f.updates]
    assert len(learnt) >= 5
    assert all(f.accuracy_after >= f.accuracy_before for f in learnt), "an update made the student worse"
    assert sum(f.accuracy_after > f.accuracy_before for f in learnt) > share * len(learnt), "updates do not help"


def assert_stride_grows_on_a_stationary_stream(chosen=None):
    run = follow(stream(200, still=True), student(), teacher(), chosen or options())
    strides = [f.stride for f in run if f.key_frame]
    assert max(strides) == 64, "the stride never reaches its maximum"
    assert all(type(stride) is int for stride in strides), "a stride is no whole number"


def assert_strides_are_whole(monkeypatch):
    strides = scripted(monkeypatch, [0.95] * 3 + [0.5] * 5 + [0.95] * 3, stride_min=3, stride_max=40)
    assert all(type(stride) is int for stride in strides), "a stride is no whole number"
    assert strides == [6, 12, 24, 12, 6, 3, 3, 3, 6, 12, 24]


def assert_predictions_are_made_before_their_own_update(num=60):
    """What is scored equals what the weights from before the frame say, on key frames too."""
    network, chosen = student(), options(threshold=0.95, learning_rate=0.0005)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    changed = 0
    for followed in follow(stream(num), network, teacher(), chosen):
        old = student()
        old.load_state_dict(before)
        images = images_of(old, followed.frame, chosen)
        expected = attempt(old, images, SIZE, gradients=False).labels
        assert (followed.prediction == expected).all(), f"frame {followed.frame.index} is scored after its own update"
        changed += bool((attempt(network, images, SIZE, gradients=False).labels != expected).any())
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert changed >= 3  # there were updates that a later prediction would have profited from


def assert_momentum_lives_as_long_as_the_stream():
    """What the first update of a key frame finds is what the last of the key frame before has left."""
    network, chosen = student(), options(threshold=0.98)
    state = StreamState.start(network, CLASSES, chosen)
    first, learn, left, compared = state.optimizer, online.learn, [], 0

    def noted(state, *rest):
        nonlocal left, compared
        found = momenta(state)
        assert len(found) == len(left), "momentum was lost"
        assert all(torch.equal(one, other) for one, other in zip(left, found, strict=True)), "momentum was lost"
        compared += bool(left)
        lesson = learn(state, *rest)
        left = momenta(state)
        return lesson

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "learn", noted)
        list(follow(stream(40), network, teacher(), chosen, state=state))
    assert state.optimizer is first, "the optimiser was made anew"
    assert compared >= 3
    assert any(momentum.any() for momentum in left)


def momenta(state):
    return [kept["momentum_buffer"].clone() for kept in state.optimizer.state.values()]


def scripted(monkeypatch, accuracies, num=None, **changes):
    """The strides after key frames whose accuracies after updates are as given; every update costs one of them."""
    given = iter(accuracies)
    monkeypatch.setattr(learning, "agreement", lambda *_: next(given))
    chosen = options(**{"u_max": 1, **changes})
    network, strides = student(), []
    monkeypatch.setattr(learning, "update", lambda *_: None)
    monkeypatch.setattr(online, "learn", lambda state, *_: online.Lesson(0, 0.5, next(given)))
    for followed in follow(stream(num or 2000, still=True), network, teacher(), chosen):
        strides += [followed.stride] if followed.key_frame else []
        if len(strides) == len(accuracies):
            return strides
    raise AssertionError("too few key frames")


def test_weights_change_on_key_frames_only():
    assert_weights_change_on_key_frames_only()


def test_accuracy_after_updates_is_not_below_before():
    assert_updates_raise_the_accuracy()


def test_the_stride_reaches_its_maximum_on_a_stationary_stream():
    assert_stride_grows_on_a_stationary_stream()


def test_on_a_stationary_stream_the_teacher_is_asked_on_under_3_percent_of_frames():
    assert np.mean([f.key_frame for f in followed_with(1000, still=True)]) < 0.03


def test_no_score_uses_a_prediction_made_after_its_own_update():
    assert_predictions_are_made_before_their_own_update()


def test_momentum_is_kept_from_key_frame_to_key_frame():
    assert_momentum_lives_as_long_as_the_stream()


def test_three_failing_key_frames_take_the_stride_from_64_to_8_and_three_good_ones_back(monkeypatch):
    assert scripted(monkeypatch, [0.95] * 3 + [0.5] * 3 + [0.95] * 3) == [16, 32, 64, 32, 16, 8, 16, 32, 64]


def test_strides_of_odd_limits_stay_whole(monkeypatch):
    assert_strides_are_whole(monkeypatch)


def test_key_frames_are_a_stride_apart(monkeypatch):
    key_frames = [f for f in followed_with(120, threshold=0.7) if f.key_frame]
    assert key_frames[0].frame.index == 0
    assert all(after.frame.index - before.frame.index == before.stride for before, after in pairwise(key_frames))


@pytest.mark.parametrize("u_max", [1, 3, 8])
def test_updates_never_exceed_u_max_and_stop_at_the_threshold(u_max):
    learnt = [f for f in followed_with(80, u_max=u_max, threshold=0.9) if f.key_frame]
    assert max(f.updates for f in learnt) == u_max
    for f in learnt:
        assert (f.updates == u_max) or f.accuracy_after >= 0.9
        assert (f.updates == 0) == (f.accuracy_before >= 0.9)


def test_updates_stop_at_an_accuracy_equal_to_the_threshold(monkeypatch):
    accuracies = iter([0.5, 0.8, 0.9])
    monkeypatch.setattr(learning, "agreement", lambda *_: next(accuracies))
    first = next(iter(follow(stream(1), student(), teacher(), options(threshold=0.8))))
    assert (first.updates, first.accuracy_before, first.accuracy_after, first.stride) == (1, 0.5, 0.8, 8)


def test_a_higher_threshold_asks_the_teacher_more_often_and_agrees_with_it_more():
    asked, agreed = [], []
    for threshold in (0.5, 0.8, 0.9, 0.95):
        found = followed_with(240, cuts=(70, 150), threshold=threshold, taught_by=teacher(noise=0.05))
        asked.append(sum(f.key_frame for f in found))
        agreed.append(np.mean([accuracy(f.prediction, f.frame.label, 3, foreground=(1, 2)) for f in found]))
    assert asked == sorted(set(asked))
    assert agreed == sorted(set(agreed))


def test_after_a_cut_the_student_fails_first_and_is_back_within_three_key_frames():
    found = [f for f in followed_with(200, cuts=(96,), threshold=0.8) if f.key_frame]
    after = [f for f in found if f.frame.index >= 96]
    assert found[found.index(after[0]) - 1].accuracy_after >= 0.8
    assert after[0].accuracy_before < 0.8
    assert max(f.accuracy_after for f in after[:3]) >= 0.8


def test_the_student_beats_a_frozen_one_and_the_held_mask_at_the_same_key_frames():
    online_run = followed_with(150, threshold=0.9)
    key_frames = {f.frame.index for f in online_run if f.key_frame}
    runs = {"online": online_run, "frozen": followed_with(150, method="frozen")}
    runs["hold"] = list(follow(stream(150), student(), teacher(), options(method="hold"), key_frames=key_frames))
    assert {f.frame.index for f in runs["hold"] if f.key_frame} == key_frames
    agree = {name: np.mean([(f.prediction == f.frame.label).mean() for f in run]) for name, run in runs.items()}
    assert agree["online"] > agree["hold"]
    assert agree["online"] > agree["frozen"]


# Known bugs of other implementations, put in again: each must be noticed -------------------------------------------


def test_noticed_no_step_of_the_optimiser_after_backward(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: None)
    with pytest.raises(AssertionError, match="weights and updates disagree"):
        assert_weights_change_on_key_frames_only()
    with pytest.raises(AssertionError, match="updates do not help"):
        assert_updates_raise_the_accuracy()


def test_noticed_a_threshold_of_80_against_accuracies_up_to_1():
    with pytest.raises(ValueError, match=r"distillation\.threshold is 80: .*0\.8 for 80 points"):
        OnlineDistillation(threshold=80)
    chosen = options()
    object.__setattr__(chosen, "threshold", 80.0)
    with pytest.raises(AssertionError, match="never reaches its maximum"):
        assert_stride_grows_on_a_stationary_stream(chosen)


def test_noticed_half_a_stride_that_is_no_whole_number(monkeypatch):
    def halved(stride, accuracy, threshold, stride_min, stride_max):
        return min(stride * 2, stride_max) if accuracy > threshold else max(stride / 2, stride_min)

    monkeypatch.setitem(options_module.CONTROLLERS, "geometric", halved)
    with pytest.raises(AssertionError, match="no whole number"):
        assert_strides_are_whole(monkeypatch)


def test_noticed_a_score_of_the_updated_student(monkeypatch):
    learn = online.learn

    def learn_first(state, images, teaching, first):
        lesson = learn(state, images, teaching, first)
        first.labels[:] = attempt(state.student, images, SIZE, gradients=False).labels
        return lesson

    monkeypatch.setattr(online, "learn", learn_first)
    with pytest.raises(AssertionError, match="scored after its own update"):
        assert_predictions_are_made_before_their_own_update()


def test_noticed_an_optimiser_that_forgets_its_momentum(monkeypatch):
    learn = online.learn

    def forgetful(state, *rest):
        lesson = learn(state, *rest)
        state.optimizer = torch.optim.SGD(state.student.parameters(), lr=0.02, momentum=0.9, nesterov=True)
        return lesson

    monkeypatch.setattr(online, "learn", forgetful)
    with pytest.raises(AssertionError, match="optimiser was made anew"):
        assert_momentum_lives_as_long_as_the_stream()


def test_noticed_a_momentum_that_is_cleared_when_a_key_frame_begins(monkeypatch):
    ask = online.ask

    def clearing(teacher, frame, state, seconds):
        state.optimizer.state.clear()
        return ask(teacher, frame, state, seconds)

    monkeypatch.setattr(online, "ask", clearing)
    with pytest.raises(AssertionError, match="momentum was lost"):
        assert_momentum_lives_as_long_as_the_stream()


def test_noticed_updates_on_frames_that_are_no_key_frames(monkeypatch):
    predicted = online.predicted

    def learns_always(frame, state):
        with torch.no_grad():
            state.student.head.bias.add_(1e-3)
        return predicted(frame, state)

    monkeypatch.setattr(online, "predicted", learns_always)
    with pytest.raises(AssertionError, match="weights and updates disagree"):
        assert_weights_change_on_key_frames_only()


# Variants ---------------------------------------------------------------------------------------------------------


def test_with_restore_best_no_key_frame_ends_below_where_it_began():
    """At a learning rate far too high the last weights are seldom the best."""
    changes = {"learning_rate": 0.2, "threshold": 0.99, "controller": "linear", "num": 60}
    plain_run = followed_with(**changes)
    assert any(f.accuracy_after < f.accuracy_before for f in plain_run if f.key_frame)
    network, chosen = student(), options(learning_rate=0.2, threshold=0.99, controller="linear", restore_best=True)
    seen = 0
    for f in follow(stream(60), network, teacher(), chosen):
        if f.key_frame:
            assert f.accuracy_after >= f.accuracy_before
            labels = attempt(network, images_of(network, f.frame, chosen), SIZE, gradients=False).labels
            assert accuracy(labels, f.frame.label, 3, foreground=(1, 2)) == pytest.approx(f.accuracy_after)
            seen += 1
    assert seen >= 2


def test_with_tail_the_encoder_stays_as_it_is():
    network = student()
    encoder, head = network.encoder.weight.clone(), network.head.weight.clone()
    assert sum(f.updates for f in followed_with(20, network=network, partial="tail"))
    assert torch.equal(network.encoder.weight, encoder)
    assert not torch.equal(network.head.weight, head)
    for network in (nn.Conv2d(3, 3, 1), nn.ModuleDict({"encoder": nn.Conv2d(3, 3, 1)})):
        with pytest.raises(ValueError, match=r"distillation\.partial is tail"):
            StreamState.start(network, CLASSES, options(partial="tail"))


def test_the_student_sees_smaller_frames_and_labels_whole_ones():
    found = followed_with(20, resolution=0.5, threshold=0.6)
    assert {f.prediction.shape for f in found} == {SIZE}
    learnt = [f for f in found if f.updates]
    assert learnt[-1].accuracy_after > learnt[0].accuracy_before


def test_a_student_with_running_statistics_trains_in_training_mode():
    def normalising():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    for mode, moves in (("running", True), ("frame", False), ("frozen", False)):
        network = normalising()
        found = followed_with(20, network=network, bn_online=mode)
        assert sum(f.updates for f in found)
        assert bool(network[1].running_mean.any()) == moves
        assert not network.training


def test_with_frame_statistics_the_accuracy_and_the_update_are_of_one_forward():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    set_bn_online(network, "frame")
    found = followed_with(30, network=network)
    assert len(calls) == len(found) + sum(f.updates for f in found)


def test_a_warm_start_takes_all_tensors_but_a_head_of_other_classes():
    other, network = student(seed=1, classes=5), student(seed=2)
    assert load_warm_start(network, other.state_dict()) == ("head.weight", "head.bias")
    assert torch.equal(network.encoder.weight, other.encoder.weight)
    with pytest.raises(ValueError, match="0 of the student's 4 tensors"):
        load_warm_start(network, student(width=5, classes=7).state_dict())


def test_values_that_cannot_work_are_refused_with_key_value_and_choices():
    refused = {
        "method": "offlin", "accuracy": "median", "controller": "pid", "growth_of": "both", "partial": "head",
        "teacher_failure": "retry", "bn_online": "batch", "threshold": 1.0, "u_max": 0, "stride_min": 0,
        "stride_max": 4, "learning_rate": 0.0, "momentum": 1.0, "weight_decay": -1.0, "object_weight": 0.0,
        "box_growth": -0.1, "resolution": 1.5, "offline_share": 1.0, "offline_updates": 0,
    }  # fmt: skip
    for key, value in refused.items():
        with pytest.raises(ValueError, match=rf"distillation\.[a-z_ ]*{key}.* {value!r}"):
            OnlineDistillation(**{key: value})
    with pytest.raises(ValueError, match="choose one of online, teacher, frozen, hold, offline"):
        OnlineDistillation(method="offlin")
    with pytest.raises(ValueError, match="nesterov"):
        OnlineDistillation(momentum=0.0)


# Accuracy and loss ------------------------------------------------------------------------------------------------


def test_a_frame_without_foreground_agrees_and_is_not_learnt_from():
    def empty(frame):
        return Teaching(np.zeros(SIZE, np.uint8))

    empty.classes, empty.macs = CLASSES, lambda size: 1
    network = student()
    with torch.no_grad():
        network.head.bias[0] = 100.0  # says background everywhere
    found = followed_with(30, network=network, taught_by=empty)
    assert [f.accuracy_before for f in found if f.key_frame] == [1.0, 1.0]
    assert [f.stride for f in found if f.key_frame] == [16, 32]
    assert not any(f.updates for f in found)


def test_ignored_pixels_count_neither_in_accuracy_nor_in_the_loss():
    labels = np.uint8([[1, 1, IGNORE, IGNORE]])
    assert accuracy(np.uint8([[1, 1, 2, 0]]), labels, 3, foreground=(1, 2)) == 1.0
    assert (
        accuracy(np.uint8([[1, 1, 2, 0]]), np.full((1, 4), IGNORE, np.uint8), 3, of="pixel", foreground=(1, 2)) == 1.0
    )
    logits = torch.randn(1, 3, 1, 4, requires_grad=True)
    weighted_cross_entropy(logits, torch.tensor(labels[None].astype(int)), torch.ones(1, 1, 4)).mean().backward()
    assert not logits.grad[..., 2:].any()
    assert logits.grad[..., :2].all()


def test_the_loss_of_a_pixel_near_an_object_counts_five_times():
    """Boxes of 20 wide grow by 3 in all (1.5 a side, pixels touched count) or by 3 a side."""
    box = np.array([[10.0, 10, 30, 30]])
    total, side = (pixel_weights(grown(box, 0.15, of), (40, 40), 5.0) for of in ("total", "side"))
    assert (total == 5).sum() == 24**2
    assert (side == 5).sum() == 26**2
    assert (total[8:32, 8:32] == 5).all()
    assert (side[7:33, 7:33] == 5).all()
    outside = pixel_weights(np.array([[-9.0, -9, -2, -2], [38.0, 38, 60, 60]]), (40, 40), 5.0)
    assert (outside == 5).sum() == 4


def test_without_boxes_connected_regions_of_the_named_classes_are_the_objects():
    frame = frame_at(0)
    assert object_boxes(frame.label, [1, 2]).tolist() == [[4, 4, 16, 16], [26, 14, 40, 28]]
    state = StreamState.start(student(), CLASSES, options(objects=("red",), box_growth=0.0))
    images = images_of(state.student, frame, state.options)
    assert (target_of(state, Teaching(frame.label), images).weights[0].numpy() == 5).sum() == 12 * 12
    given = Teaching(frame.label, np.zeros((0, 4)))
    assert (target_of(state, given, images).weights == 1).all()  # a teacher that knows instances and found none
    with pytest.raises(ValueError, match=r"distillation\.objects holds 'green'; the classes are background, red, blue"):
        StreamState.start(student(), CLASSES, options(objects=("green",)))
    with pytest.raises(ValueError, match=r"distillation\.background holds 'sky'"):
        StreamState.start(student(), CLASSES, options(background=("sky",)))


def test_a_larger_object_weight_raises_the_iou_of_small_objects():
    """A red square of 4 x 4 on 32 x 48 is one pixel in a hundred: without weights it is learnt later."""

    def small(index):
        label = np.zeros(SIZE, np.uint8)
        label[10:14, 20:24] = 1
        noise = np.random.default_rng(index).integers(-12, 13, (*SIZE, 3))
        image = (np.array([(90, 60, 60), (150, 40, 40), (0, 0, 0)])[label] + noise).clip(0, 255).astype(np.uint8)
        return Frame(index, 0.0, image, label)

    found = {}
    for weight in (1.0, 5.0):
        chosen = options(object_weight=weight, threshold=0.95, learning_rate=0.02)
        run = follow(map(small, range(30)), student(), teacher(), chosen)
        found[weight] = np.mean([accuracy(f.prediction, f.frame.label, 3, foreground=(1,)) for f in run])
    assert found[5.0] > found[1.0]


# Resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["online", "hold", "offline", "teacher"])
@pytest.mark.parametrize("split", [3, 8, 41])
def test_a_resumed_stream_has_the_same_strides_weights_and_predictions(tmp_path, method, split):
    chosen = options(method=method, threshold=0.9, offline_share=0.3)

    def run(start, stop, state, network):
        return list(follow(stream(stop, (30,), start=start), network, teacher(), chosen, state=state, num_frames=60))

    whole = student()
    expected = run(0, 60, None, whole)
    first, second = student(), student(seed=9)
    state = StreamState.start(first, CLASSES, chosen)
    found = run(0, split, state, first)
    save_checkpoint(state.record(), tmp_path / "stream.ckpt")
    torch.load(tmp_path / "stream.ckpt", weights_only=True)
    found += run(split, 60, load_checkpoint(tmp_path / "stream.ckpt"), second)
    assert weights_of(second) == weights_of(whole)
    for one, other in zip(found, expected, strict=True):
        same = ("key_frame", "updates", "accuracy_before", "accuracy_after", "stride", "scored")
        assert all(getattr(one, name) == getattr(other, name) for name in same), one.frame.index
        np.testing.assert_array_equal(one.prediction, other.prediction)


def test_a_saved_state_is_a_copy_that_later_updates_do_not_touch():
    network, chosen = student(), options()
    state = StreamState.start(network, CLASSES, chosen)
    frames = follow(stream(20), network, teacher(), chosen, state=state)
    next(frames)
    record = state.record()
    saved = record["student"]["head.weight"].clone()
    momentum = record["optimizer"]["state"][0]["momentum_buffer"].clone()
    list(frames)
    assert torch.equal(record["student"]["head.weight"], saved)
    assert torch.equal(record["optimizer"]["state"][0]["momentum_buffer"], momentum)
    list(follow(stream(20, start=1), student(), teacher(), chosen, state=record))
    assert torch.equal(record["optimizer"]["state"][0]["momentum_buffer"], momentum)


def test_a_state_of_other_options_classes_or_student_is_refused():
    record = StreamState.start(student(), CLASSES, options()).record()
    with pytest.raises(ValueError, match=r"options: threshold 0\.8 / 0\.7"):
        follow(stream(1), student(), teacher(), options(threshold=0.7), state=record)
    with pytest.raises(ValueError, match="another student"):
        follow(stream(1), student(width=5), teacher(), options(), state=record)
    with pytest.raises(ValueError, match="other classes"):
        follow(stream(1), student(), OracleTeacher(("a", "b", "c")), options(), state=record)


# Baselines --------------------------------------------------------------------------------------------------------


def test_the_teacher_on_every_frame_is_its_own_prediction():
    found = followed_with(10, method="teacher", taught_by=teacher(noise=0.2))
    assert all(f.key_frame for f in found)
    for f in found:
        np.testing.assert_array_equal(f.prediction, f.teaching.labels)


def test_a_frozen_student_never_asks_and_never_changes():
    network = student()
    before = weights_of(network)
    found = followed_with(10, network=network, method="frozen", taught_by=failing(after=0))
    assert not any(f.key_frame for f in found)
    assert weights_of(network) == before


def test_the_held_mask_is_the_last_one_before_the_frame():
    """Before there is one it is class 0; on a key frame it is still the one before, and the user sees the new one."""
    found = followed_with(10, method="hold")
    assert not found[0].prediction.any()
    np.testing.assert_array_equal(found[0].shown, found[0].frame.label)
    for f in found[1:9]:
        np.testing.assert_array_equal(f.prediction, found[0].frame.label)
    assert [f.frame.index for f in found if f.key_frame] == [0, 8]
    np.testing.assert_array_equal(found[9].prediction, found[8].frame.label)


def test_an_offline_student_learns_from_the_first_part_and_is_scored_after_it():
    """0.25 of 80 frames, the teacher on every 8th of those 20: frames 0, 8, 16; 3 x 8 updates before frame 20."""
    network = student()
    states = []
    for f in follow(stream(80), network, teacher(), options(method="offline", offline_share=0.25), num_frames=80):
        states.append((f.key_frame, f.scored, f.updates, weights_of(network)))
    assert [i for i, s in enumerate(states) if s[0]] == [0, 8, 16]
    assert [s[1] for s in states] == [False] * 20 + [True] * 60
    assert {i: s[2] for i, s in enumerate(states) if s[2]} == {20: 24}
    assert len({s[3] for s in states[:20]}) == len({s[3] for s in states[20:]}) == 1
    assert states[0][3] != states[-1][3]
    found = followed_with(80, method="offline", offline_share=0.25, offline_updates=5)
    assert sum(f.updates for f in found) == 5
    with pytest.raises(ValueError, match="its length is unknown"):
        follow(stream(8), student(), teacher(), options(method="offline"))


# What goes wrong --------------------------------------------------------------------------------------------------


def failing(after, until=10**9):
    """A teacher that fails from one call to another; counts its calls."""
    good = teacher()

    def ask(frame):
        ask.calls += 1
        if after < ask.calls <= until:
            raise RuntimeError("out of memory")
        return good(frame)

    ask.calls, ask.classes, ask.macs = 0, CLASSES, good.macs
    return ask


def test_a_failing_teacher_is_asked_again_a_stride_later_and_warned_of_once():
    chosen, network = options(threshold=0.99), student()
    state = StreamState.start(network, CLASSES, chosen)
    with pytest.warns(UserWarning, match="frame 8: the teacher failed: out of memory") as caught:
        found = list(follow(stream(41), network, failing(1, 3), chosen, state=state))
    assert len([w for w in caught if "teacher failed" in str(w.message)]) == 1
    key_frames = [f.frame.index for f in found if f.key_frame]
    assert key_frames[:2] == [0, 24]  # 8 and 16 failed
    assert state.teacher_failures == 2
    assert all(f.prediction.shape == SIZE for f in found)


def test_a_failing_teacher_stops_the_stream_where_that_is_asked_for_with_its_state_before_the_frame():
    chosen, network = options(teacher_failure="stop", threshold=0.99), student()
    state = StreamState.start(network, CLASSES, chosen)
    with pytest.raises(TeacherError, match=r"frame 8: the teacher failed: out of memory; .*=skip"):
        list(follow(stream(41), network, failing(1), chosen, state=state))
    assert state.position == 8
    rest = list(follow(stream(20, start=8), network, teacher(), chosen, state=state))
    assert rest[0].frame.index == 8
    assert rest[0].key_frame


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.zeros((8, 8), np.uint8), "frame's size"),
        (np.zeros(SIZE, np.int64), "int64"),
        (np.full(SIZE, 7, np.uint8), "says class 7, and there are 3"),
    ],
)
def test_labels_that_are_none_are_a_failure_of_the_teacher(labels, problem):
    def wrong(frame):
        return Teaching(labels)

    wrong.classes, wrong.macs = CLASSES, lambda size: 1
    with pytest.raises(TeacherError, match=problem):
        followed_with(3, taught_by=wrong, teacher_failure="stop")


def test_frames_that_come_again_are_passed_over_and_dropped_ones_are_not_missed():
    chosen, network = options(), student()
    state = StreamState.start(network, CLASSES, chosen)
    indices = [0, 1, 1, 2, 0, 5, 30, 29, 31]
    found = list(follow(map(frame_at, indices), network, teacher(), chosen, state=state))
    assert [f.frame.index for f in found] == [0, 1, 2, 5, 30, 31]
    assert [f.frame.index for f in found if f.key_frame] == [0, 30]
    assert state.passed_over == 3


def test_a_frame_of_another_size_is_a_key_frame_and_the_held_mask_is_resized():
    def frames():
        yield from stream(3)
        yield from (frame_at(index, size=(40, 64)) for index in (3, 4))

    for method in ("online", "hold"):
        found = list(follow(frames(), student(), teacher(), options(method=method)))
        assert [f.key_frame for f in found] == [True, False, False, True, False]
        assert [f.prediction.shape for f in found] == [SIZE] * 3 + [(40, 64)] * 2


def test_weights_that_diverge_are_said_to():
    with pytest.raises(ValueError, match=r"frame \d+: .*logits are NaN or infinite.*distillation\.learning_rate is 50"):
        followed_with(40, learning_rate=50.0)


def test_frames_that_are_no_images_are_refused_by_their_index():
    for image in (np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="frame 2: "):
            list(follow([frame_at(0), Frame(2, 0.0, image)], student(), teacher(), options()))
    with pytest.raises(ValueError, match=r"its label is \(3, 3\)"):
        list(follow([frame_at(0)._replace(label=np.zeros((3, 3), np.uint8))], student(), teacher(), options()))


def test_a_student_of_another_number_of_classes_is_refused():
    network = student(classes=5)
    network.num_classes = 5
    with pytest.raises(ValueError, match="tells 5 classes apart and the teacher has 3: background, red, blue"):
        follow(stream(1), network, teacher(), options())


def test_record_gets_one_row_of_figures_for_each_frame():
    rows = []
    found = list(follow(stream(10, cuts=(4,)), student(), teacher(), options(), record=rows.append))
    assert [row["stream/frame"] for row in rows] == list(range(10))
    assert rows[0]["stream/accuracy_before"] == 100 * found[0].accuracy_before
    assert "stream/accuracy_before" not in rows[1]
    assert [row["stream/cut"] for row in rows] == [0] * 4 + [1] + [0] * 5
    assert rows[1]["cost/teacher_ms"] == 0 < rows[0]["cost/teacher_ms"]


# Real time --------------------------------------------------------------------------------------------------------


class Waiting:
    """A teacher that answers when it is allowed to."""

    classes = CLASSES

    def __init__(self):
        self.allowed, self.asked, self.good = threading.Semaphore(0), [], teacher()

    def macs(self, size):
        return 1

    def __call__(self, frame):
        self.asked.append(frame.index)
        assert self.allowed.acquire(timeout=20)
        return self.good(frame)


def until_taught(frames):
    """Frames at the pace of a camera until what the teacher said is there."""
    for followed in frames:
        if followed.taught is not None:
            return followed
        time.sleep(0.005)
    raise AssertionError("the teacher's labels never came")


@pytest.mark.filterwarnings("ignore:frame .*longer than the stride")
def test_in_real_time_inference_goes_on_while_the_teacher_thinks_and_takes_new_weights_after():
    network, chosen, waiting = student(), options(threshold=0.99), Waiting()
    untaught = student()
    state = StreamState.start(network, CLASSES, chosen)
    frames = follow_in_real_time(stream(5000), network, waiting, chosen, state=state)
    found = [next(frames) for _ in range(12)]
    assert [f.frame.index for f in found if f.key_frame] == [0]
    assert all(f.teaching is None and not f.updates for f in found)
    for f in found:
        expected = attempt(untaught, images_of(untaught, f.frame, chosen), SIZE, gradients=False).labels
        np.testing.assert_array_equal(f.prediction, expected)
    waiting.allowed.release(10)
    f = until_taught(frames)
    assert (f.taught, f.updates, f.stride, f.key_frame) == (0, 8, 8, True)  # the next key frame was due at 8
    assert f.accuracy_after > f.accuracy_before
    assert state.late == f.frame.index - 8
    assert (f.prediction != attempt(untaught, images_of(untaught, f.frame, chosen), SIZE, gradients=False).labels).any()
    frames.close()
    assert waiting.asked == [0, f.frame.index]


def test_in_real_time_a_teacher_slower_than_the_stream_is_warned_of_once():
    waiting = Waiting()
    frames = follow_in_real_time(stream(5000), student(), waiting, options(threshold=0.99))
    for _ in range(30):
        next(frames)
    waiting.allowed.release(10)
    with pytest.warns(UserWarning, match="frames longer than the stride of 8"):
        until_taught(frames)
    frames.close()


def test_in_real_time_what_is_learnt_after_the_last_frame_is_in_the_state():
    network, waiting = student(), Waiting()
    state = StreamState.start(network, CLASSES, options())
    frames = follow_in_real_time(stream(3), network, waiting, options(), state=state)
    found = [next(frames) for _ in range(3)]
    waiting.allowed.release()
    assert not list(frames)
    assert not any(f.updates for f in found)
    assert (state.key_frames, state.updates > 0, state.position) == (1, True, 3)
    assert state.next_key_frame == state.stride


@pytest.mark.filterwarnings("ignore:frame .*longer than the stride")
def test_in_real_time_the_prediction_beside_a_teaching_is_the_one_made_before_it_was_learnt():
    """Of the second key frame too, for which the student had learnt from the first."""
    network, chosen, waiting = student(), options(threshold=0.99), Waiting()
    frames = follow_in_real_time(stream(5000), network, waiting, chosen)
    predictions, seen = {}, []
    waiting.allowed.release(2)
    for followed in frames:
        predictions[followed.frame.index] = followed.prediction
        if followed.asked is not None:
            seen.append(followed.taught)
            np.testing.assert_array_equal(followed.asked.prediction, predictions[followed.taught])
            np.testing.assert_array_equal(followed.teaching.labels, followed.asked.frame.label)
        if len(seen) == 2:
            break
        time.sleep(0.002)
    waiting.allowed.release(10)
    frames.close()
    assert seen == waiting.asked[:2]


def test_in_real_time_updates_that_diverge_are_said_to_and_their_weights_are_not_to_be_saved():
    network, chosen = student(), options(learning_rate=1e30)
    state = StreamState.start(network, CLASSES, chosen)
    frames = follow_in_real_time(stream(5000), network, teacher(), chosen, state=state)
    next(frames)
    until = time.monotonic() + 20
    while state.failure is None and time.monotonic() < until:
        time.sleep(0.002)
    with pytest.raises(ValueError, match=r"frame 0: .*NaN or infinite.*distillation\.learning_rate is 1e\+30"):
        state.record()
    with pytest.raises(ValueError, match=r"frame 0: .*NaN or infinite.*distillation\.learning_rate is 1e\+30"):
        frames.close()


def test_in_real_time_what_is_being_learnt_when_it_is_closed_is_handed_on_as_what_is_left_over():
    network, waiting, left = student(), Waiting(), []
    state = StreamState.start(network, CLASSES, options())
    frames = follow_in_real_time(stream(100), network, waiting, options(), state=state, left_over=left.append)
    first = next(frames)
    waiting.allowed.release()
    frames.close()
    (followed,) = left
    assert (followed.frame.index, followed.taught, followed.updates) == (0, 0, state.updates)
    assert followed.prediction is first.prediction
    assert (followed.seconds["student"], followed.seconds["teacher"] > 0) == (0.0, True)
    assert (state.key_frames, state.next_key_frame) == (1, state.stride)


def test_a_record_waits_for_updates_that_are_being_made():
    state = StreamState.start(student(), CLASSES, options())
    recorded = threading.Event()
    with state.lock:
        thread = threading.Thread(target=lambda: (state.record(), recorded.set()))
        thread.start()
        assert not recorded.wait(0.1)
    assert recorded.wait(20)
    thread.join()


def test_in_real_time_a_failing_teacher_is_met_by_the_same_policy():
    slowly = (time.sleep(0.003) or frame for frame in stream(40))
    frames = follow_in_real_time(slowly, student(), failing(0, 1), options())
    with pytest.warns(UserWarning, match="frame 0: the teacher failed"):
        found = list(frames)
    assert [f.frame.index for f in found if f.key_frame][:2] == [0, 8]
    assert len(found) == 40
    with pytest.raises(TeacherError, match="frame 0"):
        list(follow_in_real_time(stream(5), student(), failing(0), options(teacher_failure="stop")))


def test_in_real_time_stopping_early_ends_the_thread():
    before = threading.active_count()
    frames = follow_in_real_time(stream(100), student(), teacher(), options())
    next(frames)
    frames.close()
    assert threading.active_count() == before


def test_only_the_online_method_runs_in_real_time():
    with pytest.raises(ValueError, match="method is hold"):
        follow_in_real_time(stream(1), student(), teacher(), options(method="hold"))
