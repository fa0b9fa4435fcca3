"""Cutting channels out of a network for good: smaller tensors, and everything that is kept beside them.

A cut is said as one array of kept channels for each group. The same indices shrink parameters, gradients, running
statistics and the state of an optimiser, so that training goes on where it was.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dance_seg.network_slimming.channels import Group

Kept = Sequence[np.ndarray]
"""The channels of each group that stay, ascending."""

Replaced = Mapping[int, tuple[Tensor, Tensor, dict[int, Tensor]]]
"""By the id of an old tensor: that tensor, the new one, and the positions kept along each dimension."""


@torch.no_grad()
def cut(
    model: nn.Module, groups: Iterable[Group], kept: Kept, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> None:
    """Remove the channels that are not kept from a model, in place, and from the state of its optimisers.

    Each parameter that shrinks becomes a new one, with its gradient; momenta follow by the same indices. Names and
    order stay. Raises ValueError when a group would be left with no channel.

    >>> from dance_seg.network_slimming.groups import find_groups
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    >>> cut(model, find_groups(model, (8, 8)), [np.array([1, 4, 5])])
    >>> [tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim > 1]
    [(3, 3, 3, 3), (2, 3, 1, 1)]
    """
    replaced = shrink(model, kept_positions(model, groups, kept))
    for module in model.modules():
        fit_attributes(module)
    for optimizer in optimizers:
        _cut_optimizer(optimizer, replaced)


@torch.no_grad()
def shrink(model: nn.Module, left: Mapping[str, dict[int, Tensor]]) -> Replaced:
    """Replace tensors of a model by what is left of them, in place; layers' attributes are not touched.

    `left` says for each tensor, by name, which positions stay along its dimensions. Tied weights stay tied.
    """
    replaced: dict[int, tuple[Tensor, Tensor, dict[int, Tensor]]] = {}
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                positions = left.get(f"{path}.{name}" if path else name)
                if id(tensor) in replaced:  # tied weights
                    store[name] = replaced[id(tensor)][1]  # type: ignore[assignment]
                elif positions:
                    store[name] = _shrunk(tensor, positions)  # type: ignore[assignment]
                    replaced[id(tensor)] = (tensor, store[name], positions)  # type: ignore[assignment]
    return replaced


@torch.no_grad()
def silence(model: nn.Module, groups: Iterable[Group], kept: Kept) -> None:
    """Zero the channels that are not kept, in place: after this the model computes what the cut one will.

    The weights, biases and normalisation that make a channel become zero, buffers among them; what reads it does not
    matter any more.
    """
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for group, stay in zip(groups, kept, strict=True):
        gone = np.setdiff1d(np.arange(group.channels), stay)
        for member in group.members:
            if not member.reads:
                index = torch.from_numpy(member.positions[gone].ravel())
                tensors[member.tensor].index_fill_(member.dim, index.to(tensors[member.tensor].device), 0)


def kept_positions(model: nn.Module, groups: Iterable[Group], kept: Kept) -> dict[str, dict[int, Tensor]]:
    """For each tensor that shrinks, the positions that stay along each of its dimensions.

    Raises ValueError when a group would be left with no channel.
    """
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    stays: dict[tuple[str, int], np.ndarray] = {}
    for group, stay in zip(groups, kept, strict=True):
        if not len(stay):
            raise ValueError(f"{group.name}: all its {group.channels} channels would be cut; keep at least one")
        if len(stay) == group.channels:
            continue
        gone = np.setdiff1d(np.arange(group.channels), stay)
        for member in group.members:
            slot = (member.tensor, member.dim)
            mask = stays.setdefault(slot, np.ones(shapes[member.tensor][member.dim], bool))
            mask[member.positions[gone].ravel()] = False
    left: dict[str, dict[int, Tensor]] = {}
    for (tensor, dim), mask in stays.items():
        left.setdefault(tensor, {})[dim] = torch.from_numpy(np.flatnonzero(mask))
    return left


def take_positions(tensor: Tensor, positions: Mapping[int, Tensor]) -> Tensor:
    """The tensor with only the given positions along some of its dimensions, in its own memory format.

    Strides are exactly those of a fresh tensor: kernels of 1x1 have two equivalent ones, the next layer's layout
    follows from them, and a run that is resumed must compute the same bits.
    """
    format = torch.contiguous_format
    if tensor.ndim == 4 and tensor.stride() == _strides(tensor.shape, torch.channels_last):
        format = torch.channels_last
    for dim, index in positions.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return torch.empty_like(tensor, memory_format=format).copy_(tensor)


def _strides(shape: torch.Size, format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=format).stride()


def fit_attributes(module: nn.Module, groups: int | None = None) -> None:
    """Make a layer's own account of its widths agree with its tensors, whose sizes are the truth.

    Of a convolution whose number of groups is not known, a depthwise one has as many as channels; others keep theirs.
    """
    if isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        first, second = module.weight.shape[:2]
        if groups is not None:
            module.groups = groups
        elif module.groups > 1 and module.groups == module.in_channels:  # depthwise
            multiplier = module.out_channels // module.groups
            module.groups = first if transposed else first // multiplier
        given, made = (first, second * module.groups) if transposed else (second * module.groups, first)
        module.in_channels, module.out_channels = given, made
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        tensor = module.weight if module.weight is not None else module.running_mean
        if tensor is not None:
            module.num_features = len(tensor)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        per_group = module.num_channels // module.num_groups
        module.num_channels = len(module.weight)
        module.num_groups = module.num_channels // per_group


def _shrunk(tensor: Tensor, positions: Mapping[int, Tensor]) -> Tensor:
    taken = take_positions(tensor.detach(), positions)
    if not isinstance(tensor, nn.Parameter):
        return taken
    new = nn.Parameter(taken, requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        new.grad = take_positions(tensor.grad, positions)
    return new


def _cut_optimizer(optimizer: torch.optim.Optimizer, replaced: Replaced) -> None:
    for group in optimizer.param_groups:
        group["params"] = [
            replaced[id(parameter)][1] if id(parameter) in replaced else parameter for parameter in group["params"]
        ]
    for old, new, positions in replaced.values():
        state: dict[str, Any] | None = optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[new] = {
                key: take_positions(value, positions)
                if isinstance(value, Tensor) and value.shape == old.shape
                else value
                for key, value in state.items()
            }


def forget(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> None:
    """Let optimisers forget the parameters that a model no longer has, such as those of a removed branch."""
    present = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in present:
                    optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in present]
