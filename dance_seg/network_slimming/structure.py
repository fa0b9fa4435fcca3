"""The structure of a slimmed network as plain data: enough to build it again and load its tensors, without pickle.

The record holds the shape of each tensor, the branches that are gone, and how many groups each convolution in groups
has left: one that comes down to a channel for each group loses groups from then on, which its shapes do not tell. The
full network is built from the recipe and then made as narrow as the record says, so a checkpoint needs nothing but
tensors, numbers and names.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from dance_seg.errors import CheckpointError, cut_off, short
from dance_seg.network_slimming.branches import Absent, put_absent
from dance_seg.network_slimming.surgery import fit_attributes, shrink


def structure_record(model: nn.Module) -> dict[str, Any]:
    """The shape of each tensor of a model, the groups of its convolutions where they have any, and its absent branches.

    >>> structure_record(nn.Conv2d(4, 8, 1, groups=2))
    {'shapes': {'weight': [8, 2, 1, 1], 'bias': [8]}, 'groups': {'': 2}, 'absent': {}}
    """
    return {
        "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "groups": {path: conv.groups for path, conv in _convolutions(model).items() if conv.groups > 1},
        "absent": {path: module.record() for path, module in model.named_modules() if isinstance(module, Absent)},
    }


def structure_hash(model: nn.Module) -> str:
    """SHA-256 of a model's structure, equal on all ranks that hold the same one."""
    return hashlib.sha256(json.dumps(structure_record(model), sort_keys=True).encode()).hexdigest()


def restructure(model: nn.Module, record: Mapping[str, Any], *, at: str = "structure") -> None:
    """Make a full network as narrow as a record says, in place; its values are then to be loaded.

    Raises CheckpointError, before anything is changed, for a record that is not of this network: it names the tensor.
    """
    shapes, groups, absent = _checked(model, record, at)
    for path, branch in absent.items():
        put_absent(model, path, branch)
    left = {
        name: {dim: torch.arange(size) for dim, size in enumerate(shapes[name]) if size < tensor.shape[dim]}
        for name, tensor in model.state_dict().items()
    }
    shrink(model, left)
    for path, module in model.named_modules():
        fit_attributes(module, groups.get(path, 1) if groups is not None else None)


def _convolutions(model: nn.Module) -> dict[str, _ConvNd]:
    return {path: module for path, module in model.named_modules() if isinstance(module, _ConvNd)}


def _checked(
    model: nn.Module, record: Mapping[str, Any], at: str
) -> tuple[dict[str, list[int]], dict[str, int] | None, dict[str, Absent]]:
    shapes, groups, absent = record.get("shapes"), record.get("groups"), record.get("absent")
    if not isinstance(shapes, dict) or not isinstance(groups, dict | None) or not isinstance(absent, dict):
        raise CheckpointError(f"{at}: is no record of a structure: it needs 'shapes' and 'absent'")
    modules = dict(model.named_modules())
    for path in absent:
        if not path or path not in modules:
            raise CheckpointError(f"{at}: the branch {cut_off(path)} is absent in it and unknown to this network")
    full = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        if name not in full:
            raise CheckpointError(
                f"{at}: {cut_off(name)} is no tensor of this network; the checkpoint is of another model"
            )
        fits = isinstance(shape, list) and len(shape) == len(full[name])
        if not fits or any(
            not isinstance(n, int) or not 0 < n <= most for n, most in zip(shape, full[name], strict=True)
        ):
            raise CheckpointError(
                f"{at}: {name} of shape {cut_off(shape)} is no part of this network's {list(full[name])}"
            )
    present = {name for name in full if not any(name.startswith(f"{path}.") for path in absent)}
    if present != shapes.keys():
        differing = ", ".join(sorted(present ^ shapes.keys())[:5])
        raise CheckpointError(f"{at}: names other tensors than this network has: {differing}")
    convolutions = _convolutions(model)
    for path, count in (groups or {}).items():
        most = convolutions[path].groups if path in convolutions else 0
        if not isinstance(count, int) or not 0 < count <= most:
            raise CheckpointError(
                f"{at}: {cut_off(path)} in {cut_off(count)} groups is no part of this network, where it has {most}"
            )
    branches = {path: _absent(values, f"{at}: absent.{path}") for path, values in absent.items()}
    return shapes, groups, branches


def _absent(values: Any, at: str) -> Absent:
    try:
        channels, scale, size = values
        factors = (float(scale[0]), float(scale[1])) if scale else None
        sides = (int(size[0]), int(size[1])) if size else None
        if channels < 1 or min(factors or sides or (0,)) <= 0:
            raise ValueError
        return Absent(int(channels), factors, sides)
    except (TypeError, ValueError, IndexError):
        raise CheckpointError(f"{at}: {short(values)} describes no absent branch") from None
