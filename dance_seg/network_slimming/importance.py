"""How much each channel matters, and which of them stay.

A group's channels are scored together, over all tensors that make them. Scores come from the weights, which are equal
on all ranks, or from gradients, which are summed over the ranks first: each rank must cut the same channels. What a
channel costs can be weighed against what it is worth (`per_mac`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dance_seg.distributed import sum_over_ranks
from dance_seg.network_slimming.channels import Group, Groups, Member
from dance_seg.network_slimming.size_bounds import MacsBounds
from dance_seg.randomness import Stream, generator

Measure = Literal["bn_scale", "magnitude", "taylor", "random"]
MEASURES: tuple[Measure, ...] = ("bn_scale", "magnitude", "taylor", "random")


def importance(
    model: nn.Module,
    groups: Iterable[Group],
    measure: Measure,
    *,
    seed: int = 0,
    passes: Iterable[object] | None = None,
) -> list[np.ndarray | None]:
    """One score per channel (float64, higher matters more) for each group; None where the measure says nothing.

    bn_scale: mean |gamma| of the batch and group norms that scale the channel (network slimming, arXiv 1708.06519).
    magnitude: root mean square of the weights that make it, over that of its group, since layers differ in scale.
    taylor: |sum of weight x gradient| over what makes it, from the gradients that the parameters hold now, summed over
    ranks (first-order Taylor, arXiv 1906.10771). Iterating over `passes` makes one backward pass after another, each
    leaving its own gradients; then it is the root mean square over the passes of all ranks. random: the control.

    Raises ValueError for a measure that says nothing of any group, such as bn_scale without a norm.
    """
    parameters, scales, groups = dict(model.named_parameters()), norm_scales(model), list(groups)
    makers = [
        [member for member in group.members if not member.reads and member.tensor in parameters] for group in groups
    ]
    scores: list[np.ndarray | None]
    if measure == "taylor":
        scores = _taylor(parameters, [group.channels for group in groups], makers, passes)
    elif measure == "bn_scale":
        scores = [_bn_scale(parameters, [m for m in of_group if m.tensor in scales]) for of_group in makers]
    elif measure == "magnitude":
        scores = [_magnitude(parameters, of_group) for of_group in makers]
    else:
        scores = [generator(seed, Stream.CUTS, n).random(group.channels) for n, group in enumerate(groups)]
    if all(score is None for score in scores):
        why = {
            "bn_scale": "no group has a batch or group norm; choose magnitude or taylor",
            "taylor": "no parameter has a gradient; run a backward pass first, or choose magnitude",
        }.get(measure, "no group is made by parameters")
        raise ValueError(f"network_slimming.importance is {measure}: {why}")
    return scores


def _bn_scale(parameters: Mapping[str, nn.Parameter], scales: Sequence[Member]) -> np.ndarray | None:
    found = [_per_channel(parameters[scale.tensor].detach().abs(), scale) for scale in scales]
    return np.mean(found, axis=0) if found else None


def _magnitude(parameters: Mapping[str, nn.Parameter], makers: Sequence[Member]) -> np.ndarray | None:
    weights = [maker for maker in makers if parameters[maker.tensor].ndim > 1] or makers
    if not weights:  # made by buffers
        return None
    squares = np.mean([_per_channel(parameters[m.tensor].detach() ** 2, m) for m in weights], axis=0)
    return np.sqrt(squares / max(float(squares.mean()), 1e-30))


def _taylor(
    parameters: Mapping[str, nn.Parameter],
    channels: Sequence[int],
    makers: Sequence[Sequence[Member]],
    passes: Iterable[object] | None,
) -> list[np.ndarray | None]:
    device = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))

    def changes() -> np.ndarray:
        """Of all channels; then for each group whether it is known; then 1."""
        found = [_change(parameters, of_group) for of_group in makers]
        known = [np.zeros(n) if change is None else change for n, change in zip(channels, found, strict=True)]
        return np.concatenate([*known, [change is not None for change in found], [1.0]])

    if passes is None:
        scores = np.abs(_sum_over_ranks(changes(), device))
    else:  # squared one by one: in the sum of all, what a channel adds here and takes away there would be lost
        own = np.zeros(sum(channels) + len(channels) + 1)
        for _ in passes:
            own += changes() ** 2
        squares = _sum_over_ranks(own, device)
        scores = np.sqrt(squares / max(squares[-1], 1.0))
    *of_groups, rest = np.split(scores, np.cumsum(channels))
    return [score if known else None for score, known in zip(of_groups, rest[:-1], strict=True)]


def _sum_over_ranks(values: np.ndarray, device: torch.device) -> np.ndarray:
    """NCCL adds up what lies on its device."""
    held = torch.from_numpy(values)
    return sum_over_ranks(held.to(device) if device.type == "cuda" else held).cpu().numpy()


def _change(parameters: Mapping[str, nn.Parameter], makers: Sequence[Member]) -> np.ndarray | None:
    """How fast the loss changes when all that makes a channel is scaled; None where nothing holds a gradient."""
    total = None
    for member in makers:
        parameter = parameters[member.tensor]
        if parameter.grad is not None:
            product = _per_channel(parameter.detach() * parameter.grad, member, mean=False)
            total = product if total is None else total + product
    return total


def _per_channel(values: Tensor, member: Member, *, mean: bool = True) -> np.ndarray:
    """The mean or sum of a tensor over everything that belongs to each channel of a member."""
    rows = values.movedim(member.dim, 0).flatten(1) if values.ndim > 1 else values[:, None]
    rows = rows.cpu()  # Apple's GPUs have no float64
    of_rows = rows.mean(1, dtype=torch.float64) if mean else rows.sum(1, dtype=torch.float64)
    per_position = of_rows.numpy()[member.positions]
    return per_position.mean(1) if mean else per_position.sum(1)


def per_mac(
    model: nn.Module, groups: Groups, scores: Sequence[np.ndarray | None], input_size: tuple[int, int]
) -> list[np.ndarray | None]:
    """Scores over the MACs that one channel of its group costs, for a ranking over groups that differ in cost.

    What a channel costs is taken while half of its group is there and all of the others, for one image (H, W), as far
    as convolutions and linear layers count. Where it costs nothing its score is infinite: nothing is saved without it.
    """
    bounds = MacsBounds(model, input_size)
    whole = [np.arange(group.channels) for group in groups]
    now, _ = bounds.after(groups, whole)
    found: list[np.ndarray | None] = []
    for number, (group, score) in enumerate(zip(groups, scores, strict=True)):
        if score is None:
            found.append(None)
            continue
        half = max(1, group.channels // 2)
        fewer, _ = bounds.after(groups, [*whole[:number], whole[number][:half], *whole[number + 1 :]])
        cost = (now - fewer) / max(group.channels - half, 1)
        found.append(score / cost if cost else np.full_like(score, np.inf))
    return found


def norm_scales(model: nn.Module) -> set[str]:
    """The names of the scales (gamma) of all batch and group norms."""
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm | nn.GroupNorm) and module.weight is not None
    }


def scales_of(model: nn.Module, groups: Iterable[Group]) -> list[nn.Parameter]:
    """The scales (gamma) of the norms of the channels that may be cut, on which a sparsity penalty acts."""
    parameters, scales = dict(model.named_parameters()), norm_scales(model)
    return [parameters[name] for name in sorted({m.tensor for group in groups for m in group.members} & scales)]


def absolute_sum(scales: Sequence[Tensor]) -> Tensor | float:
    """Sum of |gamma| over all scales: an L1 penalty, which drives some of them to zero.

    As a loss it pulls each scale towards zero at the same rate (network slimming, arXiv 1708.06519).

    >>> absolute_sum([torch.tensor([1.0, -2.0]), torch.tensor([3.0])])
    tensor(6.)
    """
    return torch.cat(list(scales)).abs().sum() if scales else 0.0


def channels_to_keep(
    groups: Sequence[Group],
    scores: Sequence[np.ndarray | None],
    fraction: float,
    *,
    scope: Literal["global", "group"] = "global",
    minimum: int = 8,
    round_to: int = 8,
) -> list[np.ndarray]:
    """The channels of each group that stay when `fraction` of all scored channels is to be kept: the highest scores.

    global: one ranking over all groups, so that the network finds its own widths; group: each keeps that fraction.
    Widths are rounded to multiples of `round_to` positions, since odd widths are slower than wider even ones, and are
    never below `minimum` positions or above what there is. Groups without a score stay as they are.

    >>> group = Group("conv.weight", (Member("conv.weight", 0, np.arange(16)[:, None], False),))
    >>> channels_to_keep([group], [np.arange(16.0)], 0.5)[0].tolist()
    [8, 9, 10, 11, 12, 13, 14, 15]
    """
    wanted_of_all = _wanted_of_each([score for score in scores if score is not None], fraction)
    kept = []
    for group, score in zip(groups, scores, strict=True):
        if score is None:
            kept.append(np.arange(group.channels))
            continue
        of_all = next(wanted_of_all)
        wanted = of_all if scope == "global" else fraction * group.channels
        count = rounded_width(wanted, group.channels, group.unit, minimum, round_to)
        kept.append(np.sort(np.argsort(-score, kind="stable")[:count]))
    return kept


def _wanted_of_each(scored: Sequence[np.ndarray], fraction: float) -> Iterator[float]:
    """How many channels of each group are among the best of all; equal scores give up the same share of each group."""
    if not scored:
        return
    number = np.concatenate([np.full(len(score), n) for n, score in enumerate(scored)])
    place = np.concatenate([np.argsort(np.argsort(-score, kind="stable")) / len(score) for score in scored])
    best = np.lexsort((place, -np.concatenate(scored)))[: int(len(number) * fraction + 0.5)]
    yield from np.bincount(number[best], minlength=len(scored)).astype(float)


def rounded_width(wanted: float, channels: int, unit: int, minimum: int, round_to: int) -> int:
    """The number of channels nearest to `wanted` whose positions (`unit` each) are a multiple of `round_to`.

    >>> [rounded_width(n, channels=64, unit=1, minimum=8, round_to=8) for n in (0, 13, 60, 64)]
    [8, 16, 64, 64]
    >>> rounded_width(5, channels=10, unit=1, minimum=8, round_to=8)
    8
    """
    step = round_to // np.gcd(round_to, unit)  # channels that together take a multiple of round_to positions
    count = int(step * np.floor(wanted / step + 0.5))
    least = -(-minimum // unit)
    return int(min(channels, max(count, least)))
