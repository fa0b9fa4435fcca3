"""The loss of the networks of one step, all in one graph: one backward pass, and every weight has its gradient.

A step's networks come from `sampling`. Alone, one after another, each sees the whole batch; sharing a pass, each sees
its group of images.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dance_seg.early_exit.learning import distance_from_teacher, logits_of_exits
from dance_seg.supernet.elastic import Supernet, activated
from dance_seg.supernet.prefix import MultiArchitectural, several_at_once
from dance_seg.supernet.sampling import Sampling, sharing
from dance_seg.supernet.space import Subnet

LossesOf = Callable[[Any], Tensor]
"""From what a network returns for a batch to the loss of each image (N,)."""


def losses_of_subnets(
    model: nn.Module, images: Tensor, labels: Tensor, subnets: Sequence[Subnet], options: Sampling, losses_of: LossesOf
) -> tuple[Tensor, tuple[Subnet, ...]]:
    """The loss of each image (N,), and the networks that ran.

    One after another, the mean over the networks; with `distillation` all but the first, the largest, also learn its
    soft labels, at every exit those of its last. Sharing a pass, the loss of the image's own network, and as many
    networks as share the batch evenly. `losses_of` is called while the network whose output it is given is active.
    """
    if options.method == "multi_architectural":
        ran = sharing(subnets, len(images))
        return losses_of(output_of_several(model, images, ran)), ran
    assert isinstance(model, Supernet)
    total: Tensor | None = None
    soft: Tensor | None = None
    for subnet in subnets:
        with activated(model, subnet):
            output = model(images)  # type: ignore[operator]
            losses = losses_of(output)
        if soft is not None and options.distillation:
            losses = losses + options.distillation * distance_from_teacher(output, soft, labels, options.temperature)
        soft = logits_of_exits(output)[-1].detach() if soft is None else soft
        total = losses if total is None else total + losses
    assert total is not None
    return total / len(subnets), tuple(subnets)


def output_of_several(model: nn.Module, images: Tensor, subnets: Sequence[Subnet]) -> Any:
    """What networks that share one pass say, each of its group of neighbouring images; the largest is among them."""
    if len(subnets) == 1:
        return model(images)
    assert isinstance(model, MultiArchitectural)
    with several_at_once(model, subnets):
        return model(images)  # type: ignore[operator]
