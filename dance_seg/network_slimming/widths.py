"""How wide a network's layers are, to show what a cut has left."""

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from dance_seg.network_slimming.branches import Absent, find_branches


def layer_widths(model: nn.Module) -> dict[str, int]:
    """The channels that each convolution and linear layer makes, in the order of the model.

    >>> layer_widths(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    {'0': 8, '2': 2}
    """
    return {
        path: module.out_channels if isinstance(module, _ConvNd) else module.out_features
        for path, module in model.named_modules()
        if isinstance(module, _ConvNd | nn.Linear)
    }


def widths_record(model: nn.Module, full: dict[str, int]) -> dict[str, Any]:
    """Full and present width of each layer, 0 where it is gone, and of each multi-scale branch, as plain data.

    A branch is as wide as its last layer.
    """
    now = layer_widths(model)
    branches = {}
    for path in (branch for siblings in find_branches(model) for branch in siblings):
        inside = [name for name in full if name.startswith(f"{path}.")]
        gone = isinstance(model.get_submodule(path), Absent)
        last = inside[-1] if inside else path
        branches[path] = [full.get(last, 0), 0 if gone else now.get(last, 0)]
    return {"layers": {name: [width, now.get(name, 0)] for name, width in full.items()}, "branches": branches}
