"""The structure of a slimmed network as plain data: enough to build it again and load its tensors, without pickle.

The record holds the shape of each tensor and the branches that are gone. The full network is built from the recipe and
then made as narrow as the record says, so a checkpoint needs nothing but tensors, numbers and names.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dance_seg.errors import CheckpointError
from dance_seg.network_slimming.branches import Absent, put_absent
from dance_seg.network_slimming.surgery import fit_attributes, take_positions


def structure_record(model: nn.Module) -> dict[str, Any]:
    """The shape of each tensor of a model, and its absent branches.

    >>> structure_record(nn.Conv2d(3, 8, 1))
    {'shapes': {'weight': [8, 3, 1, 1], 'bias': [8]}, 'absent': {}}
    """
    return {
        "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "absent": {path: module.record() for path, module in model.named_modules() if isinstance(module, Absent)},
    }


def structure_hash(model: nn.Module) -> str:
    """SHA-256 of a model's structure, equal on all ranks that hold the same one."""
    return hashlib.sha256(json.dumps(structure_record(model), sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def restructure(model: nn.Module, record: Mapping[str, Any], *, at: str = "structure") -> None:
    """Make a full network as narrow as a record says, in place; its values are then to be loaded.

    Raises CheckpointError, before anything is changed, for a record that is not of this network: it names the tensor.
    """
    shapes, absent = _checked(model, record, at)
    for path, values in absent.items():
        put_absent(model, path, _absent(values, f"{at}: absent.{path}"))
    state = model.state_dict()
    if state.keys() != shapes.keys():
        differing = ", ".join(sorted(state.keys() ^ shapes.keys())[:5])
        raise CheckpointError(f"{at}: names other tensors than this network has: {differing}")
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                shape = shapes.get(f"{path}.{name}" if path else name)
                if tensor is None or shape is None or tuple(shape) == tuple(tensor.shape):
                    continue
                narrow = take_positions(tensor.detach(), {dim: torch.arange(size) for dim, size in enumerate(shape)})
                learnt = isinstance(tensor, nn.Parameter)
                store[name] = nn.Parameter(narrow, tensor.requires_grad) if learnt else narrow  # type: ignore[assignment]
    for module in model.modules():
        fit_attributes(module)


def _checked(model: nn.Module, record: Mapping[str, Any], at: str) -> tuple[dict[str, list[int]], dict[str, Any]]:
    shapes, absent = record.get("shapes"), record.get("absent")
    if not isinstance(shapes, dict) or not isinstance(absent, dict):
        raise CheckpointError(f"{at}: is no record of a structure: it needs 'shapes' and 'absent'")
    modules = dict(model.named_modules())
    for path in absent:
        if path not in modules:
            raise CheckpointError(f"{at}: the branch {path} is absent in it and unknown to this network")
    full = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        if name not in full:
            raise CheckpointError(f"{at}: {name} is no tensor of this network; the checkpoint is of another model")
        fits = isinstance(shape, list) and len(shape) == len(full[name])
        if not fits or any(
            not isinstance(n, int) or not 0 < n <= most for n, most in zip(shape, full[name], strict=True)
        ):
            raise CheckpointError(f"{at}: {name} of shape {shape} is no part of this network's {list(full[name])}")
    return shapes, absent


def _absent(values: Any, at: str) -> Absent:
    try:
        channels, scale, size = values
        factors = (float(scale[0]), float(scale[1])) if scale else None
        return Absent(int(channels), factors, (int(size[0]), int(size[1])) if size else None)
    except (TypeError, ValueError, IndexError):
        raise CheckpointError(f"{at}: {values!r} describes no absent branch") from None
