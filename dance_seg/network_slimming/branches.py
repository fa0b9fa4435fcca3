"""The branches of multi-scale modules: a whole rate of ASPP, bin of a pyramid pooling or level of an FPN can go.

Sibling branches see the same features at several scales and are joined or added afterwards. A branch whose channels
matter little beside those of its siblings is replaced by zeros, so that its arithmetic is gone and the rest of the
network computes what it would with that branch silenced.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.cost.macs import collect, usual_kernels, without_values
from dance_seg.network_slimming.channels import Groups
from dance_seg.network_slimming.importance import norm_scales
from dance_seg.network_slimming.surgery import cut, forget

# Classes of segmentation-models-pytorch that hold sibling branches, and where. Any other module says so by an
# attribute `multi_scale = True` on the nn.ModuleList of its branches.
SIBLINGS = {"ASPP": "convs", "PSPModule": "blocks", "FPNDecoder": "seg_blocks", "UPerNetDecoder": "fpn_conv_blocks"}


class Absent(nn.Module):
    """Stands where a branch was: zeros (N, channels, H, W), of a fixed size or a multiple of the input's."""

    def __init__(self, channels: int, scale: tuple[float, float] | None, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.channels, self.scale, self.size = channels, scale, size

    def forward(self, given: Tensor, *others: object) -> Tensor:
        """Zeros for the features (N, C, H, W) that the branch was given."""
        if self.size is not None:
            height, width = self.size
        else:
            assert self.scale is not None
            height, width = (round(side * factor) for side, factor in zip(given.shape[-2:], self.scale, strict=True))
        return given.new_zeros(given.shape[0], self.channels, height, width)

    def record(self) -> list[object]:
        """Plain data that makes it again: `Absent(*record)`."""
        return [self.channels, list(self.scale) if self.scale else None, list(self.size) if self.size else None]


def find_branches(model: nn.Module) -> list[list[str]]:
    """The paths of sibling branches in a model, one list for each multi-scale module.

    >>> class Pyramid(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.levels = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)])
    ...         self.levels.multi_scale = True
    >>> find_branches(Pyramid())
    [['levels.0', 'levels.1']]
    """
    found = []
    for path, module in model.named_modules():
        name = SIBLINGS.get(type(module).__name__)
        for child_name, child in module.named_children():
            if child_name == name or getattr(child, "multi_scale", False):
                prefix = f"{path}.{child_name}" if path else child_name
                found.append([f"{prefix}.{key}" for key, _ in child.named_children()])
    return found


def weak_branches(model: nn.Module, groups: Groups, scores: Sequence[np.ndarray | None], below: float) -> list[str]:
    """The branches whose channels score less than `below` times the mean of their siblings'; one of them always stays.

    A branch's score is the mean over the channels that leave it: those of the last group it makes by itself, or, where
    its output is added to that of its siblings, the mean size of its own last scales in the group they share, or of its
    last weights there if no norm scales them.
    """
    weak = []
    parameters, scales = dict(model.named_parameters()), norm_scales(model)
    for siblings in find_branches(model):
        present = [path for path in siblings if not isinstance(model.get_submodule(path), Absent)]
        values = {path: _branch_score(path, parameters, scales, groups, scores) for path in present}
        known = {path: value for path, value in values.items() if value is not None}
        if len(known) < 2:
            continue
        for path in sorted(known, key=lambda path: known[path])[: len(known) - 1]:
            others = [value for other, value in known.items() if other != path]
            if known[path] < below * float(np.mean(others)):
                weak.append(path)
    return weak


def _branch_score(
    path: str,
    parameters: dict[str, nn.Parameter],
    scales: set[str],
    groups: Groups,
    scores: Sequence[np.ndarray | None],
) -> float | None:
    """The mean score of the channels that a branch gives to what comes after it."""
    last: float | None = None
    for group, score in zip(groups, scores, strict=True):
        makers = [m for m in group.members if not m.reads and m.tensor in parameters]
        inside = [m for m in makers if m.tensor.startswith(f"{path}.")]
        if not inside or score is None:
            continue
        if len(inside) == len(makers):
            last = float(score.mean())
        else:  # shared with its siblings: what this branch adds is scaled by its own weights only
            scaled = [m for m in inside if m.tensor in scales]
            own = scaled or [m for m in inside if parameters[m.tensor].ndim > 1] or inside
            return float(parameters[own[-1].tensor].detach().abs().mean())
    return last


def remove_branch(
    model: nn.Module,
    path: str,
    groups: Groups,
    input_size: tuple[int, int],
    *,
    minimum: int = 8,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> None:
    """Replace a branch by zeros, in place, and whatever fed it alone; optimisers follow.

    Where its output is joined to others, what reads it shrinks to `minimum` channels of zeros. The groups of the model
    change: find them anew. Raises ValueError when the branch is the last of its siblings.
    """
    known = find_branches(model)
    siblings = next((found for found in known if path in found), None)
    if siblings is None:
        there = ", ".join(branch for found in known for branch in found)
        raise ValueError(f"{path} is no branch; there are: {there or 'none'}")
    if all(isinstance(model.get_submodule(other), Absent) for other in siblings if other != path):
        raise ValueError(f"{path} is the last of its siblings and must stay")
    kept = []
    for group in groups:
        own = all(m.reads or m.tensor.startswith(f"{path}.") for m in group.members)
        kept.append(np.arange(min(-(-minimum // group.unit), group.channels) if own else group.channels))
    optimizers = list(optimizers)
    cut(model, groups, kept, optimizers)
    _replace(model, path, input_size)
    while (dead := _fed_to_nothing(model, input_size)) is not None:
        _replace(model, dead, input_size)
    forget(optimizers, model)


def put_absent(model: nn.Module, path: str, absent: Absent) -> None:
    """Put an Absent in the place of a submodule."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, absent)


@usual_kernels()
def _replace(model: nn.Module, path: str, input_size: tuple[int, int]) -> None:
    shapes = []
    for factor in (1, 2):
        copied = without_values(model).eval()
        seen: list[tuple[torch.Size, torch.Size]] = []
        copied.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append((inputs[0].shape, output.shape))
        )
        with torch.no_grad():
            copied(torch.empty(2, 3, factor * input_size[0], factor * input_size[1], device="meta"))
        shapes.append(seen[0])
    (given, made), (_, made_larger) = shapes
    if made[-2:] == made_larger[-2:]:
        absent = Absent(made[1], None, (made[-2], made[-1]))
    else:
        absent = Absent(made[1], (made[-2] / given[-2], made[-1] / given[-1]), None)
    put_absent(model, path, absent)


@usual_kernels()
def _fed_to_nothing(model: nn.Module, input_size: tuple[int, int]) -> str | None:
    """The outermost submodule that runs on maps and that the output does not depend on; None when there is none."""
    copied = without_values(model).eval()
    maps: set[nn.Module] = set()  # that run on a feature map and make one, so that zeros can stand for it

    def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if inputs and all(isinstance(value, Tensor) and value.ndim == 4 for value in (inputs[0], output)):
            maps.add(module)

    for module in copied.modules():
        module.register_forward_hook(note)
    for parameter in copied.parameters():
        parameter.requires_grad_(True)  # an average of weights is told the same as what it is the average of
    outputs = collect(copied(torch.empty(2, 3, *input_size, device="meta")))
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    for path, module in copied.named_modules():
        weights = list(module.parameters())
        if module in maps and weights and all(parameter.grad is None for parameter in weights):
            return path
    return None
