"""The training step: what it multiplies, when the rate falls, what the average does; and the optimiser's groups."""

import pytest
import torch
from torch import nn

from dance_seg.early_exit.exits import Outputs
from dance_seg.early_exit.learning import EarlyExit, exit_losses
from dance_seg.losses import Loss
from dance_seg.module import SegmentationModule, WeightAverage, make_optimizer
from dance_seg.options import Optimizer
from tests.dance_seg.early_exit.toy import CLASSES, Toy


def test_weights_decay_and_biases_and_norms_do_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    groups = make_optimizer(model, Optimizer(name="adamw", weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(model[0].weight)] == 0.1
    assert decay[id(model[0].bias)] == decay[id(model[1].weight)] == decay[id(model[1].bias)] == 0.0


def test_the_encoder_may_learn_more_slowly():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    groups = make_optimizer(model, Optimizer(name="sgd", lr=0.1, encoder_lr=0.1)).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model["encoder"].weight)] == pytest.approx(0.01)
    assert rates[id(model["decoder"].weight)] == pytest.approx(0.1)


def test_gradients_for_importance_are_those_of_every_exit_as_it_learns():
    torch.manual_seed(0)
    options = EarlyExit(weights=(0.5, 0.25, 2.0))
    module = SegmentationModule(Toy(light=True), classes=[str(i) for i in range(CLASSES)], early_exit=options)
    images, labels = torch.randn(1, 3, 8, 12), torch.randint(0, CLASSES, (1, 8, 12))
    module.model.train()
    (_,) = module._backward_passes([(images, labels)])
    found = {name: weight.grad.clone() for name, weight in module.model.named_parameters()}
    assert module.model.training

    module.zero_grad()
    module.model.eval()  # BatchNorm as in the passes
    outputs = Outputs(tuple(full_logits(module.model, images)))
    exit_losses(outputs, labels, Loss(), options)[0].mean().backward()
    for name, weight in module.model.named_parameters():
        assert torch.allclose(found[name], weight.grad, atol=1e-6), name
        assert weight.grad.abs().sum() > 0, name


def full_logits(model, images):
    return [nn.functional.interpolate(exit.logits, images.shape[-2:], mode="bilinear") for exit in model.exits(images)]


def test_poly_falls_to_zero_and_cosine_passes_one_half():
    assert Optimizer(schedule="poly", poly_power=0.9).lr_factor(0.5) == pytest.approx(0.5**0.9)
    assert Optimizer(schedule="poly").lr_factor(1.0) == 0.0
    assert Optimizer(schedule="cosine").lr_factor(0.5) == pytest.approx(0.5)
    warm = Optimizer(schedule="poly", poly_power=1.0, warm_up=0.2)
    assert [warm.lr_factor(p) for p in (0.1, 0.2, 0.6)] == pytest.approx([0.5, 1.0, 0.5])


def test_the_average_follows_by_the_decay_of_its_step():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = WeightAverage(model, decay=0.5)
    model.weight.data.fill_(1.0)
    average.follow(model)  # decay min(0.5, 1/10): 0.1 * 0 + 0.9 * 1
    assert average.model.weight.item() == pytest.approx(0.9)
    average.follow(model)  # min(0.5, 2/11)
    assert average.model.weight.item() == pytest.approx(2 / 11 * 0.9 + 9 / 11)


def test_the_average_survives_being_saved_and_takes_the_models_statistics():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    average = WeightAverage(model, decay=0.9)
    model.train()(torch.randn(4, 1, 3, 3))
    average.follow(model)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    other = WeightAverage(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), decay=0.9)
    other.restore(average.state())
    assert other.steps == 1
    for mine, theirs in zip(other.model.parameters(), average.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
