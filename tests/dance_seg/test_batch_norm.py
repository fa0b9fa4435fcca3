"""Statistics re-estimated on given images are those that NumPy finds, and nothing else in the model changes."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.models.smp import SmpModel


def batches(*shapes: tuple[int, int, int]) -> list[Tensor]:
    return [torch.randn(n, 3, height, width) * 2 + 1 for n, height, width in shapes]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def test_mean_and_variance_are_those_of_all_values_of_all_images() -> None:
    """Batches of unequal number and size; the mean of batch variances would be another figure."""
    layer = nn.BatchNorm2d(3)
    images = [batch + number for number, batch in enumerate(batches((4, 8, 8), (1, 6, 10), (3, 5, 5)))]
    reestimate_batch_norm(layer, images)
    values = np.concatenate([batch.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1) for batch in images], axis=1)
    np.testing.assert_allclose(layer.running_mean, values.mean(1), rtol=1e-5)
    np.testing.assert_allclose(layer.running_var, values.var(1, ddof=1), rtol=1e-5)


def test_a_deeper_layer_sees_values_normalised_by_each_batch() -> None:
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    images = batches((4, 8, 8), (2, 8, 8))
    reestimate_batch_norm(nn.Sequential(first, nn.ReLU(), second), images)
    reference = nn.BatchNorm2d(3, track_running_stats=False)
    seen = [reference(batch).relu() for batch in images]
    values = torch.cat([batch.transpose(0, 1).flatten(1) for batch in seen], dim=1).detach().double()
    torch.testing.assert_close(second.running_mean, values.mean(1).float())
    torch.testing.assert_close(second.running_var, values.var(1).float())


def test_old_statistics_and_the_order_of_batches_do_not_matter(tiny_model: nn.Module) -> None:
    images = batches((4, 16, 16), (2, 8, 24), (3, 12, 12))
    reestimate_batch_norm(tiny_model, images)
    forwards = statistics(tiny_model)
    tiny_model[1].running_mean.fill_(float("nan"))
    reestimate_batch_norm(tiny_model, reversed(images))
    for name, value in statistics(tiny_model).items():
        torch.testing.assert_close(value, forwards[name], rtol=1e-6, atol=1e-7)


def test_on_one_batch_evaluation_then_equals_training_with_dropout_off(tiny_model: nn.Module) -> None:
    """Up to the unbiased variance, which BatchNorm keeps but does not normalise by: n / (n - 1), here n = 4 x 8 x 8."""
    (images,) = batches((4, 16, 16))
    reestimate_batch_norm(tiny_model, [images])
    tiny_model[3].p = 0.0
    torch.testing.assert_close(tiny_model.eval()(images), tiny_model.train()(images), rtol=0.01, atol=0.01)


def test_dropout_is_off_and_no_random_number_is_drawn() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3))
    images = batches((4, 8, 8))
    before = torch.get_rng_state()
    reestimate_batch_norm(model.train(), images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(model[1].running_mean, images[0].mean((0, 2, 3)))


def test_modes_weights_momenta_and_gradients_are_left_alone(tiny_model: nn.Module) -> None:
    tiny_model.train()
    tiny_model[3].eval()
    tiny_model[1].momentum = 0.3
    modes = [module.training for module in tiny_model.modules()]
    weights = [weight.clone() for weight in tiny_model.parameters()]
    reestimate_batch_norm(tiny_model, batches((2, 8, 8)))
    assert [module.training for module in tiny_model.modules()] == modes
    assert tiny_model[1].momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(weights, tiny_model.parameters(), strict=True))
    assert all(weight.grad is None for weight in tiny_model.parameters())
    assert not tiny_model[1]._forward_hooks
    assert not tiny_model[1]._forward_pre_hooks


def test_without_batch_norm_the_images_are_not_even_fetched() -> None:
    def images() -> Iterator[Tensor]:
        raise AssertionError("fetched")
        yield

    reestimate_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), images())


def test_no_images_are_refused_and_the_statistics_kept(tiny_model: nn.Module) -> None:
    before = statistics(tiny_model)
    with pytest.raises(ValueError, match="no images"):
        reestimate_batch_norm(tiny_model, [])
    for name, value in statistics(tiny_model).items():
        assert torch.equal(value, before[name])


def test_after_an_error_midway_statistics_modes_and_momenta_are_as_before(tiny_model: nn.Module) -> None:
    def images() -> Iterator[Tensor]:
        yield torch.randn(2, 3, 8, 8)
        raise OSError("the disk is gone")

    tiny_model.train()
    before = statistics(tiny_model)
    with pytest.raises(OSError, match="the disk is gone"):
        reestimate_batch_norm(tiny_model, images())
    assert tiny_model.training
    assert tiny_model[1].momentum == 0.1
    for name, value in statistics(tiny_model).items():
        assert torch.equal(value, before[name])


def test_a_layer_that_no_image_reaches_keeps_its_statistics() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taken, self.spare = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            return self.taken(images)

    model = Branches()
    model.spare.running_mean.fill_(7.0)
    reestimate_batch_norm(model, batches((2, 8, 8)))
    assert model.spare.running_mean.tolist() == [7.0, 7.0, 7.0]
    assert model.taken.running_mean.tolist() != [0.0, 0.0, 0.0]


def test_every_layer_of_a_real_network_is_given_new_statistics() -> None:
    model = SmpModel(arch="deeplabv3plus", encoder_name="resnet18", num_classes=3)
    before = statistics(model)
    reestimate_batch_norm(model, batches((2, 64, 64), (2, 45, 67)))
    after = statistics(model)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.isfinite(value).all() for value in after.values())
