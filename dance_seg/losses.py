"""One loss per image, and the one place where an image's weight meets its loss.

N images, C classes, H rows, W columns, P = H x W pixels, K classes that an image holds. Each image is averaged over its
own pixels first, so that a large image counts no more than a small one. Pixels labelled IGNORE count nowhere. An image
in which every pixel is ignored has loss exactly 0, with a graph: a training step on it is a step like any other.

Sums are divided by counts, never by weights: a weight that divides itself out has no effect.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dance_seg.distributed import num_ranks, sum_over_ranks
from dance_seg.sample import IGNORE


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is minimised: a weighted sum of per-image losses, and how the cross-entropy is taken.

    >>> Loss(dice=0.5).cross_entropy
    1.0
    """

    cross_entropy: float = 1.0  # how much each loss counts; 0 leaves it out
    dice: float = 0.0
    lovasz: float = 0.0
    class_weights: tuple[float, ...] | None = None  # one per class, in the cross-entropy
    label_smoothing: float = 0.0  # share of the target spread evenly over the classes, in [0, 1)
    ohem: float | None = None  # share of an image's pixels kept for the cross-entropy, those of highest loss

    def __post_init__(self) -> None:
        for name in ("cross_entropy", "dice", "lovasz"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; it takes a number from 0 up")
        if self.cross_entropy == self.dice == self.lovasz == 0:
            raise ValueError("loss.cross_entropy, loss.dice and loss.lovasz are all 0; set one of them above 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing is {self.label_smoothing}; it takes a share from 0 up to below 1")
        if self.ohem is not None and not 0 < self.ohem <= 1:
            raise ValueError(
                f"loss.ohem is {self.ohem}; it takes the share of pixels to keep, above 0 up to 1, or null for all"
            )
        if self.class_weights is not None and not (
            all(0 <= weight < math.inf for weight in self.class_weights) and any(self.class_weights)
        ):
            raise ValueError(
                f"loss.class_weights are {list(self.class_weights)}; they take numbers from 0 up, not all of them 0"
            )
        if self.cross_entropy == 0:
            idle = [name for name, default in _CROSS_ENTROPY_ONLY.items() if getattr(self, name) != default]
            if idle:
                raise ValueError(
                    f"loss.{idle[0]} shapes the cross-entropy, and loss.cross_entropy is 0; leave one of them out"
                )


@dataclass(frozen=True, kw_only=True)
class SoftLabels:
    """What a trained network adds to the labels: a run whose soft labels are learnt from, and how much they count.

    >>> SoftLabels(teacher="runs/big").weight
    1.0
    """

    teacher: str  # a run folder, whose best checkpoint teaches; it sees the same images, as small as they are
    weight: float = 1.0  # against the loss of the labels
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name in ("weight", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"soft_labels.{name} is {getattr(self, name)}; it takes a positive number")


_CROSS_ENTROPY_ONLY = {"class_weights": None, "label_smoothing": 0.0, "ohem": None}


def per_sample_loss(logits_NCHW: Tensor, labels_NHW: Tensor, options: Loss) -> Tensor:
    """The loss of each image (N,), float32: the options' weighted sum of cross-entropy, Dice and Lovasz.

    Raises ValueError when logits and labels differ in size, when class_weights are not one per class, and, for
    labels on the CPU, when one of them is neither a class nor IGNORE.

    >>> logits = torch.zeros(1, 2, 1, 1)
    >>> per_sample_loss(logits, torch.tensor([[[0]]]), Loss())  # two classes, undecided: ln 2
    tensor([0.6931])
    """
    _check_shapes(logits_NCHW, labels_NHW, options.class_weights)
    losses_N = logits_NCHW.new_zeros(len(logits_NCHW), dtype=torch.float32)
    if options.cross_entropy:
        class_weights = None if options.class_weights is None else losses_N.new_tensor(options.class_weights)
        losses_NHW = _pixel_cross_entropy(logits_NCHW, labels_NHW, class_weights, options.label_smoothing)
        kept = (
            pixel_mean(losses_NHW, labels_NHW) if options.ohem is None else ohem(losses_NHW, labels_NHW, options.ohem)
        )
        losses_N = losses_N + options.cross_entropy * kept
    else:
        _check_labels(labels_NHW, logits_NCHW.shape[1])
    if options.dice:
        losses_N = losses_N + options.dice * per_sample_dice(logits_NCHW, labels_NHW)
    if options.lovasz:
        losses_N = losses_N + options.lovasz * per_sample_lovasz(logits_NCHW, labels_NHW)
    return losses_N


def weighted_mean(losses_N: Tensor, weights_N: Tensor) -> Tensor:
    """Weighted loss per image of the global batch; weights have mean 1 over the epoch's plan.

    DDP averages gradients over ranks, so the sum is divided by the images of all ranks and multiplied by the number of
    ranks. It is divided by a count, not by the weights: images of one batch share a scale and so nearly a weight,
    which would cancel. Raises ValueError when there is not one weight per loss.

    >>> weighted_mean(torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 3.0, 2.0]))  # 15.5 / 4
    tensor(3.8750)
    """
    if losses_N.shape != weights_N.shape or losses_N.ndim != 1:
        raise ValueError(
            f"one weight per loss is needed, got shapes {tuple(weights_N.shape)} and {tuple(losses_N.shape)}"
        )
    images = sum_over_ranks(torch.tensor(float(len(losses_N)), device=losses_N.device))
    return num_ranks() * (weights_N * losses_N).sum() / images.clamp(min=1)


def per_sample_cross_entropy(
    logits_NCHW: Tensor, labels_NHW: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each image (N,), averaged over its own pixels that are not ignored.

    With class weights (C,) a pixel's loss is multiplied by the weight of its class and the sum is still divided by the
    number of pixels, unlike that of `torch.nn.functional.cross_entropy`, which divides by the weights: an image of
    one class would then not feel that class's weight at all.

    >>> logits = torch.tensor([[[[0.0, 9.0]], [[0.0, -9.0]]]])  # the second pixel is ignored
    >>> per_sample_cross_entropy(logits, torch.tensor([[[1, 255]]]))
    tensor([0.6931])
    """
    return pixel_mean(_pixel_cross_entropy(logits_NCHW, labels_NHW, class_weights, label_smoothing), labels_NHW)


def pixel_mean(losses_NHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Mean (N,) of each image's losses over its pixels that are not ignored; 0 where there are none.

    >>> pixel_mean(torch.tensor([[[1.0, 3.0, 8.0]]]), torch.tensor([[[0, 0, 255]]]))
    tensor([2.])
    """
    counted_NHW = labels_NHW != IGNORE
    return (losses_NHW * counted_NHW).sum((1, 2)) / counted_NHW.sum((1, 2)).clamp(min=1)


def soft_label_loss(logits_NCHW: Tensor, teacher_NCHW: Tensor, labels_NHW: Tensor, temperature: float) -> Tensor:
    """Distance of each image's logits (N,) from a teacher's: T^2 KL(softmax(teacher/T) || softmax(logits/T)).

    The mean over the pixels that are not ignored. Times T^2, so that its gradient stays as large as a hard label's
    (Hinton, Vinyals and Dean, arXiv 1503.02531).

    >>> same = torch.randn(1, 3, 2, 2)
    >>> soft_label_loss(same, same, torch.zeros(1, 2, 2, dtype=torch.long), 2.0).abs().item() < 1e-6
    True
    """
    log_student = F.log_softmax(logits_NCHW.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_NCHW.float() / temperature, dim=1)
    distance_NHW = (log_teacher.exp() * (log_teacher - log_student)).sum(1)
    return temperature**2 * pixel_mean(distance_NHW, labels_NHW)


def ohem(losses_NHW: Tensor, labels_NHW: Tensor, keep: float) -> Tensor:
    """Mean (N,) over the hardest pixels of each image: the share `keep` of highest loss, rounded up.

    Online hard example mining (Shrivastava et al. 2016), per image: the hard pixels of one image are not crowded out
    by those of another.

    >>> ohem(torch.tensor([[[1.0, 4.0, 3.0, 9.0]]]), torch.tensor([[[0, 0, 0, 255]]]), keep=0.5)  # 2 of 3: 4 and 3
    tensor([3.5000])
    """
    counted_NP = (labels_NHW != IGNORE).flatten(1)
    # Below every loss, so that ignored pixels come last and are never among the kept.
    losses_NP = losses_NHW.flatten(1).masked_fill(~counted_NP, -1.0)
    most = math.ceil(keep * losses_NP.shape[1])
    hardest = losses_NP.topk(most).values
    num_kept = (keep * counted_NP.sum(1, keepdim=True)).ceil().clamp(max=most)  # (N, 1)
    is_kept = torch.arange(most, device=losses_NP.device) < num_kept
    return (hardest * is_kept).sum(1) / num_kept.squeeze(1).clamp(min=1)


def per_sample_dice(logits_NCHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Dice loss of each image (N,): 1 - 2 |A and B| / (|A| + |B|), soft, averaged over the classes its label holds.

    Milletari et al. 2016. Classes that the image does not hold are left out: their Dice coefficient says nothing but
    how many of them there are.

    >>> per_sample_dice(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]]))  # 1 - 2 x 0.5 / (1 + 1) for both
    tensor([0.5000])
    """
    counted_N1HW = (labels_NHW != IGNORE).unsqueeze(1)
    probabilities_NCHW = logits_NCHW.float().softmax(1) * counted_N1HW
    targets_NCHW = _one_hot(labels_NHW, logits_NCHW.shape[1])
    pixels_NC = targets_NCHW.sum((2, 3))
    overlap_NC = (probabilities_NCHW * targets_NCHW).sum((2, 3))
    total_NC = probabilities_NCHW.sum((2, 3)) + pixels_NC
    losses_NC = 1 - 2 * overlap_NC / total_NC.clamp(min=1e-7)
    present_NC = pixels_NC > 0
    return (losses_NC * present_NC).sum(1) / present_NC.sum(1).clamp(min=1)


def per_sample_lovasz(logits_NCHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Lovasz-softmax loss of each image (N,), averaged over the classes its label holds.

    Berman et al. 2018: the convex extension of the Jaccard loss, 1 - IoU, at the errors |target - probability|.

    >>> per_sample_lovasz(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]]))  # every error is 0.5
    tensor([0.5000])
    """
    probabilities_NCP = logits_NCHW.float().softmax(1).flatten(2)
    return torch.stack(
        [_lovasz(image_CP, label_P) for image_CP, label_P in zip(probabilities_NCP, labels_NHW.flatten(1), strict=True)]
    )


def _lovasz(probabilities_CP: Tensor, label_P: Tensor) -> Tensor:
    """The Lovasz-softmax loss of one image, over the classes present."""
    targets_CP = _one_hot(label_P.unsqueeze(0), len(probabilities_CP))[0]
    present_C = targets_CP.any(1)
    targets_KP = targets_CP[present_C].float()
    if not len(targets_KP):
        return probabilities_CP.sum() * 0.0
    # An ignored pixel gets error 0: it sorts last, where it changes no gradient of another pixel and adds nothing.
    errors_KP = (targets_KP - probabilities_CP[present_C]).abs() * (label_P != IGNORE)
    return (errors_KP * _jaccard_steps(errors_KP.detach(), targets_CP[present_C])).sum(1).mean()


def _jaccard_steps(errors_KP: Tensor, targets_KP: Tensor) -> Tensor:
    """By how much the Jaccard loss of a class grows when a pixel joins those of larger error: the loss's gradient."""
    if errors_KP.device.type == "cpu":
        return torch.from_numpy(_jaccard_steps_on_cpu(errors_KP.numpy(), targets_KP.numpy()))
    order_KP = errors_KP.argsort(dim=1, descending=True)
    hits_KP = targets_KP.gather(1, order_KP).float()
    pixels_K1 = hits_KP.sum(1, keepdim=True)
    intersection_KP = pixels_K1 - hits_KP.cumsum(1)
    union_KP = pixels_K1 + (1 - hits_KP).cumsum(1)
    jaccard_KP = 1 - intersection_KP / union_KP
    steps_KP = torch.diff(jaccard_KP, dim=1, prepend=torch.zeros_like(pixels_K1))
    return torch.empty_like(steps_KP).scatter_(1, order_KP, steps_KP)


def _jaccard_steps_on_cpu(errors_KP: np.ndarray, targets_KP: np.ndarray) -> np.ndarray:
    """The same for float32 errors of at least 0, whose bits sort as they do."""
    rank_P = np.arange(1, errors_KP.shape[1] + 1)
    steps_KP = np.empty_like(errors_KP)
    for errors_P, targets_P, steps_P in zip(errors_KP, targets_KP, steps_KP, strict=True):
        # Largest error first, by the lower half of the bits and then by the upper: NumPy sorts 16 bits stably by
        # counting, in an eighth of the time that it takes to sort the numbers themselves.
        bits_P = ~errors_P.view(np.uint32)
        order_P = bits_P.astype(np.uint16).argsort(kind="stable")
        order_P = order_P[(bits_P >> 16).astype(np.uint16)[order_P].argsort(kind="stable")]
        hits_P = targets_P[order_P].cumsum(dtype=np.int32)
        jaccard_P = 1 - (hits_P[-1] - hits_P) / (hits_P[-1] + rank_P - hits_P)
        steps_P[order_P] = np.diff(jaccard_P, prepend=0.0)
    return steps_KP


def _pixel_cross_entropy(
    logits_NCHW: Tensor, labels_NHW: Tensor, class_weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Cross-entropy of each pixel (N, H, W) in float32, whatever the logits' precision; 0 where ignored."""
    try:
        return F.cross_entropy(
            logits_NCHW.float(),
            labels_NHW.long(),
            weight=class_weights,
            ignore_index=IGNORE,
            reduction="none",
            label_smoothing=label_smoothing,
        )
    except IndexError:  # torch looks at every label on the way, so that the good case pays for no look of ours
        _check_labels(labels_NHW, logits_NCHW.shape[1])
        raise


def _one_hot(labels_NP: Tensor, num_classes: int) -> Tensor:
    """Whether each pixel is of each class, bool (N, C, ...); no class where ignored."""
    classes = torch.arange(num_classes, device=labels_NP.device).view(1, -1, *[1] * (labels_NP.ndim - 1))
    return labels_NP.unsqueeze(1) == classes


def _check_shapes(logits_NCHW: Tensor, labels_NHW: Tensor, class_weights: tuple[float, ...] | None) -> None:
    num_images, num_classes, height, width = logits_NCHW.shape
    if labels_NHW.shape != (num_images, height, width):
        raise ValueError(
            f"logits {tuple(logits_NCHW.shape)} need labels of shape {(num_images, height, width)}, "
            f"got {tuple(labels_NHW.shape)}"
        )
    if class_weights is not None and len(class_weights) != num_classes:
        raise ValueError(
            f"loss.class_weights has {len(class_weights)} entries for {num_classes} classes; give one per class"
        )


def _check_labels(labels_NHW: Tensor, num_classes: int) -> None:
    """Raise ValueError for labels that are neither a class nor IGNORE; on an accelerator the look would cost a wait."""
    if labels_NHW.device.type != "cpu":
        return
    wrong_NHW = (labels_NHW != IGNORE) & ((labels_NHW < 0) | (labels_NHW >= num_classes))
    if wrong_NHW.any():
        values = ", ".join(str(value) for value in sorted(labels_NHW[wrong_NHW].unique().tolist())[:10])
        raise ValueError(
            f"{int(wrong_NHW.sum())} pixels are labelled {values}; labels must be 0 to {num_classes - 1}, or {IGNORE} "
            "to be ignored. `python -m tools.check_data RECIPE` names the files"
        )
