import pytest
import torch

from dance_seg.early_exit.exits import Outputs
from dance_seg.early_exit.learning import EarlyExit, exit_losses
from dance_seg.losses import Loss, per_sample_loss, soft_label_loss


@pytest.fixture
def logits():
    return tuple(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


@pytest.fixture
def labels():
    return torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(9))


def test_the_losses_of_the_exits_are_added_up_by_their_weights(logits, labels):
    each = [per_sample_loss(one, labels, Loss()) for one in logits]
    total, own = exit_losses(Outputs(logits), labels, Loss(), EarlyExit())
    assert torch.allclose(total, each[0] + each[1] + each[2])  # RANet's plain sum
    assert all(torch.equal(a, b) for a, b in zip(own, each, strict=True))
    total, _ = exit_losses(Outputs(logits), labels, Loss(), EarlyExit(weights=(0.5, 0.0, 2.0)))
    assert torch.allclose(total, 0.5 * each[0] + 2 * each[2])


def test_one_exit_is_the_plain_loss(logits, labels):
    total, _ = exit_losses(Outputs(logits[:1]), labels, Loss(), EarlyExit(self_distillation=1.0))
    assert torch.equal(total, per_sample_loss(logits[0], labels, Loss()))


def test_soft_labels_by_hand():
    # One pixel, two classes, T = 1: teacher (3/4, 1/4), student (1/2, 1/2).
    teacher = torch.tensor([[[[3.0]], [[1.0]]]]).log()
    student = torch.zeros(1, 2, 1, 1)
    expected = 0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5))
    assert torch.allclose(soft_label_loss(student, teacher, torch.zeros(1, 1, 1).long(), 1.0), expected)


def test_soft_labels_of_ignored_pixels_do_not_count(logits, labels):
    ignored = labels.clone()
    ignored[:, 2:] = 255
    expected = soft_label_loss(logits[0][:, :, :2], logits[1][:, :, :2], labels[:, :2], 2.0)
    assert torch.allclose(soft_label_loss(logits[0], logits[1], ignored, 2.0), expected)


def test_the_last_exit_teaches_and_does_not_learn_from_it(logits, labels):
    alone = torch.full_like(labels, 255)  # no labels: what is left is what the exits learn from the last
    alone[:, 0, 0] = labels[:, 0, 0]
    given = [one.clone().requires_grad_() for one in logits]
    options = EarlyExit(weights=(0.0, 0.0, 1.0), self_distillation=1.0)
    total, _ = exit_losses(Outputs(tuple(given)), alone, Loss(), options)
    total.sum().backward()
    assert given[0].grad is not None
    assert given[0].grad.abs().sum() > 0
    own = logits[2].clone().requires_grad_()
    per_sample_loss(own, alone, Loss()).sum().backward()
    assert torch.allclose(given[2].grad, own.grad)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weights": (1.0, -1.0)}, "early_exit.weights"),
        ({"weights": (1.0, 0.0)}, "the last above 0"),
        ({"self_distillation": -1.0}, "early_exit.self_distillation"),
        ({"temperature": 0.0}, "early_exit.temperature"),
    ],
)
def test_values_that_cannot_train_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        EarlyExit(**options)


def test_weights_for_another_number_of_exits_are_refused():
    with pytest.raises(ValueError, match="2 numbers and the network 3 exits"):
        EarlyExit(weights=(1.0, 1.0)).weights_of(3)
