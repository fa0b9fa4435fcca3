"""Which channels of a network must be cut together, for any network that runs on images."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dance_seg.cost.macs import collect, usual_kernels
from dance_seg.early_exit.exits import outputs_of
from dance_seg.network_slimming.channels import Group, Groups
from dance_seg.network_slimming.surgery import cut
from dance_seg.network_slimming.trace import images_without_values, trace_groups, walkable


def find_groups(model: nn.Module, input_size: tuple[int, int], *, in_channels: int = 3) -> Groups:
    """The groups of channels of a model that takes images (N, 3, H, W), without running it on any value.

    A group that the trace found and the network cannot lose channels of, since its code remembers a width, stays as it
    is and is listed among the frozen. The model is left as it is. Raises whatever the model raises for a size it cannot
    take, and ValueError when nothing can be cut.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> [group.channels for group in find_groups(model, (8, 8))]
    [8]
    """
    found = trace_groups(model, input_size, in_channels=in_channels)
    if _failure(model, found.groups, input_size, in_channels) is not None:
        sound, frozen = [], list(found.frozen)
        for group in found:
            failure = _failure(model, (group,), input_size, in_channels)
            if failure is None:
                sound.append(group)
            else:
                frozen.append(f"{group.name}: its network remembers the width: {failure}")
        found = replace(found, groups=tuple(sound), frozen=tuple(frozen))
    if not len(found):
        raise ValueError(f"no channel of this network can be cut: {'; '.join(found.frozen) or 'it has no convolution'}")
    return found


@usual_kernels()
def _failure(model: nn.Module, groups: tuple[Group, ...], input_size: tuple[int, int], in_channels: int) -> str | None:
    """How the network fails when each group loses every third channel; None when it does not."""
    copied = walkable(model)
    images = images_without_values(copied, (2, in_channels, *input_size))
    with torch.no_grad():
        with _Numbers() as numbers:
            shape = [tuple(output.shape) for output in collect(outputs_of(copied, images))]
        try:
            kept = [np.flatnonzero(np.arange(group.channels) % 3 != 1) for group in groups]
            cut(copied, groups, kept)
            with _Numbers() as numbers_cut:
                shape_cut = [tuple(output.shape) for output in collect(outputs_of(copied, images))]
        except Exception as error:  # whatever a network raises
            return str(error).splitlines()[0] if str(error) else type(error).__name__
    if numbers_cut.met != numbers.met:
        return "it computes with the width as a number"
    return None if shape_cut == shape else f"its output becomes {shape_cut} instead of {shape}"


class _Numbers(TorchDispatchMode):
    """Collects the plain numbers that values are computed with, such as one over the root of a width."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[float] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Perform one operation and note its numbers."""
        given = (*args, *(kwargs or {}).values())
        if torch.Tag.pointwise in operation.tags:
            self.met += [value for value in given if isinstance(value, int | float)]
        return operation(*args, **(kwargs or {}))
