"""What a student learns from one frame that its teacher has labelled, and from all of those it was taught offline."""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.distillation.accuracy import accuracy, foreground_of
from dance_seg.distillation.objects import grown, object_boxes, pixel_weights, weighted_cross_entropy
from dance_seg.distillation.options import OnlineDistillation
from dance_seg.distillation.state import StreamState, copied
from dance_seg.distillation.teacher import Teaching, network_input
from dance_seg.evaluator import labels_from_logits
from dance_seg.inference import predict_labels
from dance_seg.randomness import generator
from dance_seg.sample import Frame

_OFFLINE = 0x0FF1  # counter of the order of offline training, which no Stream of dance_seg.randomness has


class Attempt(NamedTuple):
    """What the student says of a frame."""

    logits: Tensor | None  # (1, C, h, w) with their graph, from which the next update can start; None: without
    labels: np.ndarray  # (H, W) uint8


class Lesson(NamedTuple):
    """What became of a key frame."""

    updates: int
    before: float  # accuracy in [0, 1]
    after: float


def learn(state: StreamState, images: Tensor, teaching: Teaching, first: Attempt) -> Lesson:
    """Update the student until it agrees with the teacher on this frame, at most `u_max` times.

    The forward that an accuracy is taken from is the one that the update after it goes back through, so that u updates
    cost u + 1 forwards and u backwards. With `restore_best` the weights return to the best of them, those before the
    first update included, where none reached the threshold.
    """
    options = state.options
    attempted, before = first, agreement(state, first.labels, teaching)
    reached, updates, best = before, 0, before
    best_weights = copied(state.student.state_dict()) if options.restore_best and before < options.threshold else None
    target: Target | None = None
    while reached < options.threshold and updates < options.u_max:
        target = target or target_of(state, teaching, images)
        update(state, images, attempted.logits, target)
        updates += 1
        attempted = attempt(state.student, images, teaching.labels.shape, gradients=updates < options.u_max)
        reached = agreement(state, attempted.labels, teaching)
        if best_weights is not None and best < reached < options.threshold:
            best, best_weights = reached, copied(state.student.state_dict())
    if best_weights is not None and reached < options.threshold:
        state.student.load_state_dict(best_weights)
        reached = best
    return Lesson(updates, before, reached)


class Target(NamedTuple):
    """What an update goes by, at the size at which the student sees the frame."""

    labels: Tensor  # (1, h, w) int64
    weights: Tensor  # (1, h, w) float32


def update(state: StreamState, images: Tensor, logits: Tensor | None, target: Target) -> None:
    """One step of the optimiser."""
    with torch.enable_grad():
        if logits is None:  # the student trains in another mode than it predicts in
            logits = state.student.train()(images)
        loss = weighted_cross_entropy(logits, target.labels, target.weights).mean()
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
    state.optimizer.step()
    state.student.eval()


def attempt(student: nn.Module, images: Tensor, size: tuple[int, ...], *, gradients: bool) -> Attempt:
    """What the student says, at `size`; with `gradients` the graph is kept for an update.

    The student predicts and learns in evaluation mode, in which BatchNorm takes what it takes at inference: with
    `bn_online: frame` the statistics of this frame, else stored ones. Only with `bn_online: running` is there another
    mode to train in, which then takes a forward of its own.
    """
    if not gradients or trains_apart(student):
        return Attempt(None, predict_labels(student, images, size)[0].numpy())
    with torch.enable_grad():
        logits = student(images)
    return Attempt(logits, labels_from_logits(logits, (size[0], size[1]), align_corners=False)[0])


def trains_apart(student: nn.Module) -> bool:
    """Whether the student normalises otherwise in training than when it predicts."""
    return any(getattr(layer, "bn_online", None) == "running" for layer in student.modules())


def target_of(state: StreamState, teaching: Teaching, images: Tensor) -> Target:
    """The teacher's labels, and the weights of pixels near its objects, at the student's size."""
    options, classes = state.options, state.classes
    boxes = teaching.boxes
    if boxes is None:
        named = [classes.index(name) for name in options.objects] or foreground_of(classes, options.background)
        boxes = object_boxes(teaching.labels, named)
    size = (teaching.labels.shape[0], teaching.labels.shape[1])
    weights = pixel_weights(grown(boxes, options.box_growth, options.growth_of), size, options.object_weight)
    labels, weights = (nearest(values, (images.shape[-2], images.shape[-1])) for values in (teaching.labels, weights))
    return Target(
        torch.from_numpy(labels.astype(np.int64))[None].to(images.device),
        torch.from_numpy(weights)[None].to(images.device),
    )


def learn_offline(state: StreamState, seed: int) -> int:
    """Learn from the frames of the first part, each as often as the others, in an order drawn anew each round."""
    wanted = state.options.offline_updates or state.options.u_max * len(state.kept)
    done = 0
    while done < wanted and state.kept:
        for index in generator(seed, _OFFLINE, done).permutation(len(state.kept))[: wanted - done].tolist():
            image, teaching = state.kept[index]
            images = network_input(image, state.options.resolution, _device(state.student))
            attempted = attempt(state.student, images, teaching.labels.shape, gradients=True)
            update(state, images, attempted.logits, target_of(state, teaching, images))
            done += 1
    state.trained, state.kept = True, []
    return done


def agreement(state: StreamState, labels: np.ndarray, teaching: Teaching) -> float:
    """The accuracy of labels on a frame that the teacher has labelled."""
    foreground = foreground_of(state.classes, state.options.background)
    return accuracy(labels, teaching.labels, len(state.classes), of=state.options.accuracy, foreground=foreground)


def images_of(student: nn.Module, frame: Frame, options: OnlineDistillation) -> Tensor:
    """A frame as the student takes it."""
    return network_input(frame.image, options.resolution, _device(student))


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels or weights (H, W) at another size, each from the pixel nearest: labels are names, not numbers."""
    if values.shape == size:
        return values
    return cv2.resize(values, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)


def _device(student: nn.Module) -> torch.device:
    return next(student.parameters()).device
