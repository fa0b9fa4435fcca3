"""BatchNorm statistics of one network of a supernet, taken before it is judged.

A supernet's running statistics are those of its largest network, and what reaches a layer of a smaller one is other.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from dance_seg.early_exit.exits import recalibrate
from dance_seg.supernet.elastic import Supernet
from dance_seg.supernet.space import Subnet


def recalibrated(model: Supernet, subnet: Subnet, batches: Iterable[Tensor]) -> nn.Module:
    """A network taken out of a supernet, in evaluation, with the statistics of the given images.

    `batches` are images (N, 3, H, W), normalised, on the model's device. Every head's statistics are taken, those of
    all exits. The supernet is left as it is. Raises ValueError for a network of another space and as
    `reestimate_batch_norm` does.
    """
    network = model.extract(subnet)
    recalibrate(network, batches)
    return network.eval()
