"""How a network with exits learns: a loss at every exit, weighted, and optionally each exit taught by the last.

RANet adds up the cross-entropies of its exits, all alike; BasisNet counts the preview's less. Nothing is detached but
the last exit's logits where they teach.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dance_seg.early_exit.exits import Outputs
from dance_seg.losses import Loss, per_sample_loss, soft_label_loss


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """What each exit's loss counts, and how much the earlier exits learn from the last.

    >>> EarlyExit().weights_of(3)
    (1.0, 1.0, 1.0)
    """

    weights: tuple[float, ...] = ()  # of the exits' losses, shallow to deep; empty: 1 each
    self_distillation: float = 0.0  # weight of the distance of each earlier exit from the last one's soft labels
    temperature: float = 2.0  # of those soft labels

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        if not all(0 <= weight < math.inf for weight in self.weights) or (self.weights and not self.weights[-1]):
            raise ValueError(
                f"early_exit.weights are {list(self.weights)}: numbers from 0 up, one for each exit, the last above 0"
            )
        if not 0 <= self.self_distillation < math.inf:
            raise ValueError(f"early_exit.self_distillation is {self.self_distillation}: zero (off) or a weight")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"early_exit.temperature is {self.temperature}: a positive number, such as 2.0")

    def weights_of(self, num_exits: int) -> tuple[float, ...]:
        """The weight of each exit's loss. Raises ValueError when the recipe gives another number of them."""
        if not self.weights:
            return (1.0,) * num_exits
        if len(self.weights) != num_exits:
            raise ValueError(
                f"early_exit.weights has {len(self.weights)} numbers and the network {num_exits} exits; give one for "
                "each, shallow to deep, or none for 1 each"
            )
        return self.weights


def exit_losses(
    outputs: Outputs, labels_NHW: Tensor, loss: Loss, options: EarlyExit
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of each image (N,) over all exits, and each exit's own (N,), unweighted."""
    each = tuple(per_sample_loss(logits, labels_NHW, loss) for logits in outputs.logits)
    total = sum(weight * own for weight, own in zip(options.weights_of(len(each)), each, strict=True))
    if options.self_distillation:
        last = outputs.logits[-1].detach()
        for logits in outputs.logits[:-1]:
            total = total + options.self_distillation * soft_label_loss(logits, last, labels_NHW, options.temperature)
    assert isinstance(total, Tensor)
    return total, each


def distance_from_teacher(
    output: Outputs | Tensor, soft_NCHW: Tensor, labels_NHW: Tensor, temperature: float
) -> Tensor:
    """How far each image's logits (N,) are from a teacher's soft labels, the mean over the exits."""
    exits = logits_of_exits(output)
    return torch.stack([soft_label_loss(logits, soft_NCHW, labels_NHW, temperature) for logits in exits]).mean(0)


def logits_of_exits(output: Outputs | Tensor) -> tuple[Tensor, ...]:
    """The logits of every exit, shallow to deep; of the only one where there is one."""
    return output.logits if isinstance(output, Outputs) else (output,)
