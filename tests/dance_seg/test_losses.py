"""Losses per image: hand arithmetic, torch's and SMP's own losses, and what a weight does."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dance_seg import losses
from dance_seg.losses import Loss, ohem, per_sample_cross_entropy, per_sample_loss, pixel_mean, weighted_mean
from dance_seg.sample import IGNORE

EVERY_LOSS = [
    Loss(),
    Loss(label_smoothing=0.1),
    Loss(class_weights=(1.0, 2.0, 0.5)),
    Loss(ohem=0.3),
    Loss(cross_entropy=0.0, dice=1.0),
    Loss(cross_entropy=0.0, lovasz=1.0),
    Loss(dice=0.5, lovasz=0.5, ohem=0.5),
]


def random_batch(num_images: int = 2, num_classes: int = 3, size: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor]:
    logits = torch.randn(num_images, num_classes, *size, requires_grad=True)
    return logits, torch.randint(0, num_classes, (num_images, *size))


# -- the weight of an image --------------------------------------------------------------------------------------------


def test_weighted_mean_divides_by_the_number_of_images() -> None:
    """(1 x 0.5 + 1 x 1 + 3 x 2 + 2 x 4) / 4 = 3.875."""
    loss = weighted_mean(torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 3.0, 2.0]))
    assert loss.item() == 3.875


def test_two_ranks_average_to_the_weighted_mean_of_the_joined_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with weights (1, 1), (3, 2) and losses (0.5, 1), (2, 4): 2 x 1.5 / 4 and 2 x 14 / 4 average to 3.875."""
    monkeypatch.setattr(losses, "num_ranks", lambda: 2)
    monkeypatch.setattr(losses, "sum_over_ranks", lambda count: 2 * count)
    first = weighted_mean(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0]))
    second = weighted_mean(torch.tensor([2.0, 4.0]), torch.tensor([3.0, 2.0]))
    assert (first.item(), second.item()) == (0.75, 7.0)
    assert (first + second).item() / 2 == 3.875


def test_ranks_with_unequal_numbers_of_images_still_average_to_the_joined_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank one holds three images of loss 1, rank two one of loss 5; joined: 8 / 4 = 2."""
    monkeypatch.setattr(losses, "num_ranks", lambda: 2)
    monkeypatch.setattr(losses, "sum_over_ranks", lambda count: torch.tensor(4.0))
    parts = weighted_mean(torch.ones(3), torch.ones(3)), weighted_mean(torch.tensor([5.0]), torch.ones(1))
    assert sum(part.item() for part in parts) / 2 == 2.0


def test_batches_of_weight_a_half_and_one_and_a_half_give_gradients_in_the_ratio_one_to_three() -> None:
    """Images of one batch share a scale and so a weight; had the weights divided themselves out, the ratio were 1."""
    logits, labels = random_batch()
    gradients = []
    for weight in (0.5, 1.5):
        loss = weighted_mean(per_sample_loss(logits, labels, Loss()), torch.full((2,), weight))
        (gradient,) = torch.autograd.grad(loss, logits)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], 3 * gradients[0])


def test_a_weight_per_loss_is_demanded() -> None:
    with pytest.raises(ValueError, match="one weight per loss"):
        weighted_mean(torch.ones(2), torch.ones(2, 1))  # would broadcast to four products


# -- cross-entropy -----------------------------------------------------------------------------------------------------


def test_with_equal_weights_and_nothing_ignored_it_is_torchs_cross_entropy() -> None:
    logits, labels = random_batch()
    loss = weighted_mean(per_sample_loss(logits, labels, Loss()), torch.ones(2))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_each_image_alone_has_torchs_mean_over_its_own_pixels(label_smoothing: float) -> None:
    logits, labels = random_batch(num_images=3)
    labels[0, :2] = IGNORE
    labels[1, :, 3:] = IGNORE
    mine = per_sample_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    for number in range(3):
        expected = F.cross_entropy(
            logits[number : number + 1],
            labels[number : number + 1],
            ignore_index=IGNORE,
            label_smoothing=label_smoothing,
        )
        torch.testing.assert_close(mine[number], expected)


def test_an_image_with_many_labelled_pixels_counts_no_more_than_one_with_few() -> None:
    """Losses per pixel 1 on ten pixels and 3 on a single one: mean per image (1 + 3) / 2, not (10 + 3) / 11."""
    pixel_losses = torch.stack([torch.full((1, 10), 1.0), torch.full((1, 10), 3.0)])
    labels = torch.zeros(2, 1, 10, dtype=torch.long)
    labels[1, 0, 1:] = IGNORE
    assert weighted_mean(pixel_mean(pixel_losses, labels), torch.ones(2)).item() == 2.0


def test_a_class_weight_counts_even_where_an_image_holds_one_class_only() -> None:
    """Undecided between two classes, ln 2 per pixel; the second class counts three times."""
    logits = torch.zeros(2, 2, 1, 2)
    labels = torch.tensor([[[0, 0]], [[1, 1]]])
    found = per_sample_loss(logits, labels, Loss(class_weights=(1.0, 3.0)))
    torch.testing.assert_close(found, math.log(2) * torch.tensor([1.0, 3.0]))


def test_labels_may_come_as_bytes() -> None:
    logits, labels = random_batch()
    for options in EVERY_LOSS:
        assert torch.equal(per_sample_loss(logits, labels.byte(), options), per_sample_loss(logits, labels, options))


# -- OHEM --------------------------------------------------------------------------------------------------------------


def test_ohem_keeps_the_hardest_pixels_of_each_image() -> None:
    """Half of four pixels: (5 + 4) / 2. Half of the three counted ones, rounded up: (3 + 2) / 2. None counted: 0."""
    pixel_losses = torch.tensor([[[1.0, 5.0, 2.0, 4.0]], [[1.0, 9.0, 2.0, 3.0]], [[7.0, 7.0, 7.0, 7.0]]])
    labels = torch.tensor([[[0, 0, 0, 0]], [[0, IGNORE, 0, 0]], [[IGNORE] * 4]])
    assert ohem(pixel_losses, labels, keep=0.5).tolist() == [4.5, 2.5, 0.0]


def test_ohem_that_keeps_all_pixels_is_the_mean() -> None:
    logits, labels = random_batch()
    labels[0, :2] = IGNORE
    torch.testing.assert_close(per_sample_loss(logits, labels, Loss(ohem=1.0)), per_sample_loss(logits, labels, Loss()))


def test_easy_pixels_get_no_gradient_under_ohem() -> None:
    logits = torch.tensor([[[[0.0, 9.0]], [[0.0, 0.0]]]], requires_grad=True)  # the second pixel is right and sure
    per_sample_loss(logits, torch.tensor([[[0, 0]]]), Loss(ohem=0.5)).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, :, 0, 0].tolist() == [-0.5, 0.5]
    assert logits.grad[0, :, 0, 1].tolist() == [0.0, 0.0]


# -- Dice and Lovasz ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [False, True])
def test_dice_is_smps_dice_loss_of_each_image_that_holds_all_classes(ignored: bool) -> None:
    from segmentation_models_pytorch.losses import DiceLoss

    logits, labels = random_batch(num_images=3, size=(8, 9))
    if ignored:
        labels[:, :2] = IGNORE
    theirs = DiceLoss("multiclass", ignore_index=IGNORE)
    expected = torch.stack([theirs(logits[n : n + 1], labels[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(losses.per_sample_dice(logits, labels), expected)


@pytest.mark.parametrize("ignored", [False, True])
def test_lovasz_is_smps_lovasz_loss_of_each_image(ignored: bool) -> None:
    from segmentation_models_pytorch.losses import LovaszLoss

    logits, labels = random_batch(num_images=3, num_classes=4, size=(8, 9))
    labels[labels == 3] = 0  # a class that no image holds
    if ignored:
        labels[:, :2] = IGNORE
    theirs = LovaszLoss("multiclass", per_image=True, ignore_index=IGNORE)
    expected = torch.stack([theirs(logits[n : n + 1], labels[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(losses.per_sample_lovasz(logits, labels), expected)


def test_dice_leaves_out_classes_that_an_image_does_not_hold() -> None:
    """Sure and right everywhere: 0, whatever the other classes."""
    logits = torch.full((1, 4, 2, 2), -50.0)
    logits[:, 1] = 50.0
    assert losses.per_sample_dice(logits, torch.ones(1, 2, 2, dtype=torch.long)).item() == pytest.approx(0, abs=1e-6)


def test_lovasz_of_a_sure_prediction_is_one_minus_iou() -> None:
    """Four pixels, of which the model calls three road; two are: IoU of road 2 / 3, of sky 1 / 2."""
    predicted, labels = torch.tensor([[[0, 0, 0, 1]]]), torch.tensor([[[0, 0, 1, 1]]])
    logits = 100.0 * (2 * F.one_hot(predicted, 2).permute(0, 3, 1, 2).float() - 1)
    found = losses.per_sample_lovasz(logits, labels).item()
    assert found == pytest.approx(1 - (2 / 3 + 1 / 2) / 2)


def test_losses_add_up_by_their_weights() -> None:
    logits, labels = random_batch()
    parts = [
        per_sample_loss(logits, labels, Loss()),
        per_sample_loss(logits, labels, Loss(cross_entropy=0.0, dice=1.0)),
        per_sample_loss(logits, labels, Loss(cross_entropy=0.0, lovasz=1.0)),
    ]
    both = per_sample_loss(logits, labels, Loss(cross_entropy=0.5, dice=2.0, lovasz=3.0))
    torch.testing.assert_close(both, 0.5 * parts[0] + 2 * parts[1] + 3 * parts[2])


# -- whatever the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EVERY_LOSS, ids=str)
def test_an_image_with_all_pixels_ignored_has_loss_zero_with_a_graph(options: Loss) -> None:
    logits, labels = random_batch()
    labels[:] = IGNORE
    loss = weighted_mean(per_sample_loss(logits, labels, options), torch.ones(2))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("options", EVERY_LOSS, ids=str)
def test_ignored_pixels_change_nothing_and_learn_nothing(options: Loss) -> None:
    logits, labels = random_batch()
    labels[:, 3:] = IGNORE
    loss = per_sample_loss(logits, labels, options)
    cropped = per_sample_loss(logits[:, :, :3], labels[:, :3], options)
    torch.testing.assert_close(loss, cropped)
    loss.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[:, :, 3:].any()
    assert logits.grad[:, :, :3].any()


@pytest.mark.parametrize("options", EVERY_LOSS, ids=str)
def test_an_image_has_the_same_loss_whatever_else_is_in_the_batch(options: Loss) -> None:
    logits, labels = random_batch(num_images=3)
    labels[1, :3] = IGNORE
    together = per_sample_loss(logits, labels, options)
    alone = torch.cat([per_sample_loss(logits[n : n + 1], labels[n : n + 1], options) for n in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("options", EVERY_LOSS, ids=str)
def test_logits_of_half_precision_are_summed_in_full_precision(options: Loss) -> None:
    """A mean over 90 000 pixels in bfloat16, which has 8 bits, would be off by per cents."""
    logits, labels = random_batch(size=(300, 300))
    logits = logits.detach().bfloat16()
    loss = per_sample_loss(logits, labels, options)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, per_sample_loss(logits.float(), labels, options))


@pytest.mark.parametrize("options", [Loss(), Loss(cross_entropy=0.0, dice=1.0)], ids=str)
def test_a_label_that_is_no_class_is_named_and_counted(options: Loss) -> None:
    logits, labels = random_batch()
    labels[0, 0, :3] = 3
    labels[1, 0, 0] = 200
    with pytest.raises(ValueError, match="4 pixels are labelled 3, 200; labels must be 0 to 2, or 255"):
        per_sample_loss(logits, labels, options)


def test_labels_of_another_size_are_refused() -> None:
    logits, labels = random_batch()
    with pytest.raises(ValueError, match=r"need labels of shape \(2, 5, 7\), got \(2, 4, 7\)"):
        per_sample_loss(logits, labels[:, 1:], Loss())


def test_class_weights_must_be_one_per_class() -> None:
    logits, labels = random_batch()
    with pytest.raises(ValueError, match="2 entries for 3 classes"):
        per_sample_loss(logits, labels, Loss(class_weights=(1.0, 2.0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dice": -1.0}, "loss.dice is -1.0"),
        ({"lovasz": math.nan}, "loss.lovasz is nan"),
        ({"cross_entropy": 0.0}, "are all 0"),
        ({"label_smoothing": 1.0}, "loss.label_smoothing is 1.0"),
        ({"ohem": 0.0}, "loss.ohem is 0.0"),
        ({"ohem": 1.5}, "loss.ohem is 1.5"),
        ({"class_weights": (1.0, -1.0)}, "loss.class_weights"),
        ({"class_weights": (0.0, 0.0)}, "not all of them 0"),
        ({"cross_entropy": 0.0, "dice": 1.0, "ohem": 0.5}, "loss.ohem shapes the cross-entropy"),
    ],
)
def test_options_that_make_no_loss_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loss(**options)  # type: ignore[arg-type]


def test_lovasz_has_the_same_gradient_by_numpys_sort_as_by_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(3, 500, generator=generator)
    errors[:, :100] = 0.0  # ignored pixels and sure ones
    errors[0, 100:110] = 0.25
    targets = torch.rand(3, 500, generator=generator) < 0.3
    targets[0, 100:110] = True  # equal errors in any order
    by_numpy = losses._jaccard_steps_on_cpu(errors.numpy(), targets.numpy())
    order = errors.argsort(dim=1, descending=True)
    hits = targets.gather(1, order).double()
    jaccard = 1 - (hits.sum(1, keepdim=True) - hits.cumsum(1)) / (hits.sum(1, keepdim=True) + (1 - hits).cumsum(1))
    steps = torch.diff(jaccard, dim=1, prepend=torch.zeros(3, 1, dtype=torch.float64))
    counted = errors > 0  # where an error is 0 its step counts nothing
    expected = torch.empty_like(steps).scatter_(1, order, steps).float()
    different = counted & ~((errors == 0.25) & (torch.arange(3) == 0)[:, None])
    torch.testing.assert_close(torch.from_numpy(by_numpy)[different], expected[different])
    torch.testing.assert_close(torch.from_numpy(by_numpy).sum(1), torch.ones(3))  # all of the Jaccard loss
