"""What every model must satisfy, whatever its architecture."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

SIZES = ((45, 67), (96, 128))


def check_model(
    make_model: Callable[[], nn.Module], num_classes: int, sizes: Sequence[tuple[int, int]] = SIZES
) -> None:
    """Check one model that maps images (N, 3, H, W) to logits (N, num_classes, H, W).

    Any size, odd ones included; every weight learns; state can be kept; evaluation is repeatable; the cost is known.
    """
    torch.manual_seed(0)
    model = make_model()
    check_logits_have_the_size_of_the_images(model, num_classes, sizes)
    check_every_weight_gets_a_gradient(model, sizes[0])
    check_state_can_be_kept(make_model, model, sizes[0])
    check_cost_is_counted(model, sizes[-1])


def check_logits_have_the_size_of_the_images(
    model: nn.Module, num_classes: int, sizes: Sequence[tuple[int, int]]
) -> None:
    model.eval()
    with torch.no_grad():
        for height, width in sizes:
            logits = model(torch.randn(1, 3, height, width))
            assert tuple(logits.shape) == (1, num_classes, height, width)
            assert torch.isfinite(logits).all()


def check_every_weight_gets_a_gradient(model: nn.Module, size: tuple[int, int]) -> None:
    model.train()
    model(torch.randn(2, 3, *size)).square().mean().backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    without = [name for name, weight in trained.items() if weight.grad is None]
    assert not without, f"{len(without)} of {len(trained)} weights got no gradient, such as {without[0]}"
    assert all(torch.isfinite(weight.grad).all() for weight in trained.values() if weight.grad is not None)
    model.zero_grad()


def check_state_can_be_kept(make_model: Callable[[], nn.Module], model: nn.Module, size: tuple[int, int]) -> None:
    images = torch.randn(1, 3, *size)
    torch.manual_seed(1)
    other = make_model().eval()
    other.load_state_dict(model.state_dict())
    model.eval()
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(model(images), logits), "evaluation differs from one call to the next"
        assert torch.equal(other(images), logits), "a model with the loaded state gives other logits"


def check_cost_is_counted(model: nn.Module, size: tuple[int, int]) -> None:
    macs = pytest.importorskip("dance_seg.cost.macs")
    cost = macs.count_macs(model, input_size=size)
    assert cost.uncounted == ()
    assert cost.macs > 0
