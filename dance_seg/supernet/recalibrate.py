"""BatchNorm statistics of one network of a supernet, taken before it is judged.

A supernet's running statistics are those of its largest network, and what reaches a layer of a smaller one is other.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.early_exit.exits import outputs_of
from dance_seg.supernet.elastic import Supernet
from dance_seg.supernet.space import Subnet


class _EveryOutput(nn.Module):
    """A network whose exits all speak, so that statistics reach every head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """All that the network says of the images."""
        return outputs_of(self.model, images)


def recalibrated(model: Supernet, subnet: Subnet, batches: Iterable[Tensor]) -> nn.Module:
    """A network taken out of a supernet, in evaluation, with the statistics of the given images.

    `batches` are images (N, 3, H, W), normalised, on the model's device. Every head's statistics are taken, those of
    all exits. The supernet is left as it is. Raises ValueError for a network of another space and as
    `reestimate_batch_norm` does.
    """
    network = model.extract(subnet)
    recalibrate(network, batches)
    return network.eval()


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the statistics of a network, of all its exits, by those of the given images, in place.

    Raises ValueError as `reestimate_batch_norm` does.
    """
    reestimate_batch_norm(_EveryOutput(model), batches)
