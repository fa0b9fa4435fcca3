"""How many MACs a network has after a cut, between two bounds that need no walk through it."""

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dance_seg.cost.macs import collect, count_macs, usual_kernels
from dance_seg.early_exit.exits import outputs_of
from dance_seg.network_slimming.channels import Group
from dance_seg.network_slimming.surgery import Kept, kept_positions
from dance_seg.network_slimming.trace import images_without_values, walkable


class MacsBounds:
    """Bounds for the MACs of one image (3, H, W) through a model that keeps only some of its channels.

    The MACs of convolutions and linear layers are their uses times the numbers in their weights, and so known for any
    cut. What else is counted, interpolation and attention, is between nothing and what it is now. A cut is searched
    among a dozen, and a count is a walk through the whole network: the bounds decide almost all of them.

    >>> from dance_seg.network_slimming.groups import find_groups
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    >>> groups = find_groups(model, (4, 4))
    >>> MacsBounds(model, (4, 4)).after(groups, [[0, 1, 2]])  # 16 pixels x 3 channels x (3 inputs + 2 outputs)
    (240, 240)
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int]) -> None:
        self.model = model
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.uses = _uses_of_weights(model, input_size)
        now = sum(uses * prod(self.shapes[name]) for name, uses in self.uses.items())
        self.rest = count_macs(model, input_size).macs - now

    def after(self, groups: Iterable[Group], kept: Kept) -> tuple[int, int]:
        """The least and the most MACs when these channels of each group stay."""
        left = kept_positions(self.model, groups, kept)
        total = 0
        for name, uses in self.uses.items():
            shape = list(self.shapes[name])
            for dim, positions in left.get(name, {}).items():
                shape[dim] = len(positions)
            total += uses * prod(shape)
        return total, total + self.rest


@usual_kernels()
def _uses_of_weights(model: nn.Module, input_size: tuple[int, int]) -> dict[str, int]:
    """How often each number of a convolution's or linear layer's weight multiplies something for one image."""
    uses: dict[str, int] = {}
    copied = walkable(model)

    def count(name: str, module: nn.Module, given: Tensor, made: Tensor) -> None:
        if isinstance(module, nn.Linear):
            times = made.numel() // made.shape[-1]
        else:
            times = (given if isinstance(module, _ConvTransposeNd) else made)[0, 0].numel()
        uses[name] = uses.get(name, 0) + times

    for path, module in copied.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            name = f"{path}.weight" if path else "weight"
            module.register_forward_hook(lambda module, given, made, name=name: count(name, module, given[0], made))
    with torch.no_grad():
        collect(outputs_of(copied, images_without_values(copied, (1, 3, *input_size))))
    return uses
