"""One cut, from looking at a network to its smaller self: branches, groups, importance, share, surgery."""

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from dance_seg.cost.latency import measure_latency
from dance_seg.cost.macs import count_macs, without_values
from dance_seg.distributed import gather
from dance_seg.network_slimming.branches import find_branches, remove_branch, weak_branches
from dance_seg.network_slimming.channels import Group, Groups
from dance_seg.network_slimming.groups import find_groups
from dance_seg.network_slimming.importance import channels_to_keep, importance, per_mac
from dance_seg.network_slimming.schedule import NetworkSlimming
from dance_seg.network_slimming.size_bounds import MacsBounds
from dance_seg.network_slimming.structure import structure_hash
from dance_seg.network_slimming.surgery import Kept, cut

_TRIES = 12  # halvings of the interval of shares: to a four-thousandth


@dataclass(frozen=True)
class Size:
    """How large a network is, in what a share can be taken of."""

    channels: int  # that can be cut, counted where they are made
    macs: int  # of one forward of one image
    latency_ms: float | None = None  # measured, median; None where it was not asked for


def slimmable(model: nn.Module, options: NetworkSlimming, input_size: tuple[int, int]) -> Groups:
    """The groups of channels that these options let a model lose.

    Raises ValueError when there are none.
    """
    found = find_groups(model, input_size)
    if options.only:
        chosen = tuple(group for group in found if any(part in group.name for part in options.only))
        if not chosen:
            made = sorted({group.name.rpartition(".")[0] for group in found})
            raise ValueError(
                f"network_slimming.only {list(options.only)}: no channels that can be cut are made in such a module; "
                f"they are made in: {', '.join(made[:20])}{' ...' if len(made) > 20 else ''}"
            )
        found = replace(found, groups=chosen)
    return found


def size_of(
    model: nn.Module, options: NetworkSlimming, input_size: tuple[int, int], groups: Groups | None = None
) -> Size:
    """The size of a model; the latency is measured only when the options ask for a share of it.

    `groups` are those of `slimmable`, where they are known.
    """
    groups = groups or slimmable(model, options, input_size)
    latency = measure_latency(model, input_size, time_limit_s=1.0).p50_ms if options.of == "latency" else None
    return Size(sum(group.channels for group in groups), count_macs(model, input_size).macs, latency)


def check_reachable(model: nn.Module, options: NetworkSlimming, input_size: tuple[int, int]) -> None:
    """Raise ValueError, before training, when the network cannot be cut as far as `keep` says or not be scored so."""
    groups = slimmable(model, options, input_size)
    if options.importance == "bn_scale":
        importance(model, groups, "bn_scale")
    if options.of == "latency":
        return  # known only once it is measured
    full = size_of(model, options, input_size, groups)
    scores = [np.zeros(group.channels) for group in groups]
    least = _share(model, options, groups, _kept(options, groups, scores, 0.0), input_size, full)
    if least > options.keep:
        raise ValueError(
            f"network_slimming.keep is {options.keep} of {options.of}: this network can be cut to {least:.2f} and no "
            f"further with min_channels {options.min_channels} and round_to {options.round_to}. What stays: "
            f"{'; '.join(groups.frozen[:8])}. Raise keep, lower min_channels, or choose another model"
        )


def slim(
    model: nn.Module,
    options: NetworkSlimming,
    *,
    input_size: tuple[int, int],
    share: float | None = None,
    full: Size | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    followers: Iterable[nn.Module] = (),
    seed: int = 0,
    passes: Callable[[], Iterable[object]] | None = None,
) -> tuple[Groups, Kept]:
    """Cut a model in place to a share of its full size; returns the groups and the channels of each that stayed.

    `share` is what is left, of what `options.of` names, by default `options.keep`; `full` is the size to take it of, by
    default the model's own now. Optimiser state follows, and so do `followers`, models of the same structure such as an
    average of the weights. For `importance: taylor` the parameters hold gradients, or `passes` begins backward passes
    to iterate over (see `importance`). Under DDP every rank calls this and wraps the model anew. Raises ValueError when
    nothing can be cut or scored, RuntimeError when ranks would differ.

    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 2, 1))
    >>> _ = slim(model, NetworkSlimming(keep=0.5, importance="magnitude"), input_size=(8, 8))
    >>> model[0].out_channels
    16
    """
    share = options.keep if share is None else share
    models = [model, *followers]
    groups = slimmable(model, options, input_size)
    full = full or size_of(model, options, input_size, groups)
    if _remove_weak_branches(models, options, input_size, seed, optimizers, passes):
        groups = slimmable(model, options, input_size)
    scores = channel_scores(model, groups, options, input_size, seed, passes)
    kept = _kept_for_share(model, options, groups, scores, share, input_size, full)
    for number, each in enumerate(models):
        cut(each, groups, kept, optimizers if number == 0 else ())
    hashes = gather(structure_hash(model))
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the ranks have cut different channels: {hashes}; their weights differed before the cut")
    return groups, kept


def channel_scores(
    model: nn.Module,
    groups: Groups,
    options: NetworkSlimming,
    input_size: tuple[int, int],
    seed: int,
    passes: Callable[[], Iterable[object]] | None = None,
) -> list[np.ndarray | None]:
    """What the channels of each group are ranked by."""
    scores = _importance(model, groups, options, seed, passes)
    return per_mac(model, groups, scores, input_size) if options.per_mac else scores


def _importance(
    model: nn.Module,
    groups: Groups,
    options: NetworkSlimming,
    seed: int,
    passes: Callable[[], Iterable[object]] | None,
) -> list[np.ndarray | None]:
    made = passes() if passes is not None else None
    return importance(model, groups, options.importance, seed=seed, passes=made)


def _remove_weak_branches(
    models: Sequence[nn.Module],
    options: NetworkSlimming,
    input_size: tuple[int, int],
    seed: int,
    optimizers: Sequence[torch.optim.Optimizer],
    passes: Callable[[], Iterable[object]] | None,
) -> bool:
    """Whether there were any."""
    model = models[0]
    if not options.branches or not find_branches(model):
        return False
    groups = find_groups(model, input_size)  # of the whole network, whatever `only` leaves of it for cutting
    scores = _importance(model, groups, options, seed, passes)
    weak = weak_branches(model, groups, scores, options.branches)
    for number, path in enumerate(weak):
        if number:
            groups = find_groups(model, input_size)  # others since the branch before this went
        for each in models:
            followed = optimizers if each is model else ()
            remove_branch(each, path, groups, input_size, minimum=options.min_channels, optimizers=followed)
    return bool(weak)


def _kept(options: NetworkSlimming, groups: Groups, scores: Sequence[np.ndarray | None], fraction: float) -> Kept:
    return channels_to_keep(
        groups.groups,
        scores,
        fraction,
        scope=options.scope,
        minimum=options.min_channels,
        round_to=options.round_to,
    )


def _kept_for_share(
    model: nn.Module,
    options: NetworkSlimming,
    groups: Groups,
    scores: Sequence[np.ndarray | None],
    share: float,
    input_size: tuple[int, int],
    full: Size,
) -> Kept:
    """The most channels with which the network is no larger than that share of its full size."""
    whole = [np.arange(group.channels) for group in groups]
    if _share(model, options, groups, whole, input_size, full) <= share:
        return whole  # an earlier cut, rounded, went as far already
    bounds = MacsBounds(model, input_size) if options.of == "macs" else None
    low, high = 0.0, 1.0
    best = _kept(options, groups, scores, low)
    for _ in range(_TRIES):
        middle = (low + high) / 2
        tried = _kept(options, groups, scores, middle)
        least, most = bounds.after(groups, tried) if bounds else (0, math.inf)
        if most <= share * full.macs:
            fits = True
        elif least > share * full.macs:
            fits = False
        else:
            fits = _share(model, options, groups, tried, input_size, full) <= share
        if fits:
            low, best = middle, tried
        else:
            high = middle
    return best


def _share(
    model: nn.Module,
    options: NetworkSlimming,
    groups: Iterable[Group],
    kept: Kept,
    input_size: tuple[int, int],
    full: Size,
) -> float:
    """How large the cut network would be, over the full one."""
    if options.of == "channels":
        return sum(len(stay) for stay in kept) / full.channels
    if options.of == "macs":
        copied = without_values(model)
        cut(copied, groups, kept)
        return count_macs(copied, input_size).macs / full.macs
    copied = deepcopy(model)
    cut(copied, groups, kept)
    # One clock decides for all ranks.
    measured = gather(measure_latency(copied, input_size, warm_up=2, time_limit_s=0.5).p50_ms)[0]
    assert full.latency_ms is not None
    return measured / full.latency_ms
