"""Thresholds for the exits of a trained network, chosen on a split that is not scored, and kept in the checkpoint.

The network runs once over the calibration split; what its exits say of each image, and what they cost, is the table
from which thresholds for any budget are chosen. The names of its images are kept, so that nobody scores on them.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dance_seg.checkpoint import load_checkpoint, save_checkpoint
from dance_seg.cost.latency import interleave
from dance_seg.cost.macs import count_macs
from dance_seg.early_exit.budget import (
    CurvePoint,
    ExitTable,
    How,
    at_thresholds,
    curve,
    random_exits,
    scored,
    solve,
)
from dance_seg.early_exit.exits import ExitNetwork
from dance_seg.early_exit.gain import fit_lines
from dance_seg.early_exit.paths import PathCosts, path_costs
from dance_seg.early_exit.policy import ExitPolicy, at_every_exit
from dance_seg.errors import CheckpointError
from dance_seg.metrics import confusion_matrix
from dance_seg.normalise import normalise
from dance_seg.sample import Batch

if TYPE_CHECKING:
    from datamodules.base import SegmentationDataModule

Unit = Literal["macs", "milliseconds"]
ROUNDS = 20
"""How often each way through the network is timed, the ways taking turns."""


class ExitsOfSplit(NamedTuple):
    """What every exit says of every image of a split."""

    names: tuple[str, ...]  # of the n images
    scores: np.ndarray  # float32 (n, K)
    matrices: np.ndarray  # int32 (n, K, C, C)
    size: tuple[int, int]  # (H, W) at which the network sees the first image
    policy: ExitPolicy  # whose scores they are; the score gain with its lines
    prices: tuple[float, ...] = ()  # of each image, in those of the first one; none where all are as large
    own_scores: np.ndarray | None = None  # float32 (n, K): by the policy; None where `scores` are

    def table(self, costs: PathCosts) -> ExitTable:
        """With what the exits cost for the first image, the table that thresholds are chosen from."""
        return ExitTable(self.scores, self.matrices, costs, self.prices)

    def own_table(self, costs: PathCosts) -> ExitTable:
        """The table of what the policy does on these very images.

        Where lines were fitted to them, that is not what it does on others, which `table` tells.
        """
        scores = self.scores if self.own_scores is None else self.own_scores
        return ExitTable(scores, self.matrices, costs, self.prices)


class Calibration(NamedTuple):
    """Thresholds that meet a budget on a calibration split, and what was known when they were chosen."""

    policy: ExitPolicy
    budget: float  # share of the cost of the whole network
    unit: Unit
    how: How
    split: str
    names: tuple[str, ...]  # of the calibration images
    costs: dict[str, PathCosts]  # by unit, of the first image
    achieved: dict[str, Any]  # on the calibration split, and `expected` of others
    mean_price: float = 1.0  # how many times as much as the first an image costs on average
    resolution: float = 1.0  # at which the images were seen

    def as_record(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        costs = {unit: {"trunk": list(c.trunk), "heads": list(c.heads)} for unit, c in self.costs.items()}
        return {
            **self._asdict(),
            "policy": self.policy.as_record(),
            "names": list(self.names),
            "costs": costs,
        }


def exits_of_split(
    model: ExitNetwork, datamodule: "SegmentationDataModule", split: str, *policies: ExitPolicy
) -> list[ExitsOfSplit]:
    """Run every exit over a split, with a progress bar; one result for each policy, with its scores.

    Runs on the first CUDA device where there is one. Raises ValueError as `exits_of_batches`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = tqdm(datamodule.evaluation_loader(split), desc=f"exits on {split}", unit="image")
    return exits_of_batches(model.to(device), batches, len(datamodule.classes), *policies)


@torch.inference_mode()
def exits_of_batches(
    model: ExitNetwork, batches: Iterable[Batch], num_classes: int, *policies: ExitPolicy
) -> list[ExitsOfSplit]:
    """Run every exit over batches of evaluation, where the model is; one result for each policy, with its scores.

    A policy of the score `gain` without lines gets its lines here, and each image's score is by the line fitted without
    it, as the score of an image that was never seen will be. What an image costs is taken to go with its pixels once it
    is padded, since counting every size that photographs come in takes long. Raises ValueError when logits are not
    finite, or there are no images.
    """
    model.eval()
    device = next(model.parameters()).device
    names, matrices, sizes = list[str](), list[np.ndarray](), list[tuple[int, int]]()
    told: list[list[np.ndarray]] = [[] for _ in policies]  # scores, or what they will be fitted to
    for batch in batches:
        labels_size = (batch.labels.shape[-2], batch.labels.shape[-1])
        found = at_every_exit(model, normalise(batch.images.to(device)), labels_size)
        for own, policy in zip(told, policies, strict=True):
            own += list((found.evidence(policy) if is_unfitted(policy) else found.scores(policy)).numpy())
        for place, name in enumerate(batch.names):
            names.append(name)
            sizes.append((batch.images.shape[-2], batch.images.shape[-1]))
            label = batch.labels[place].numpy()
            of_exits = [confusion_matrix(exit[place].numpy(), label, num_classes) for exit in found.labels]
            matrices.append(np.stack(of_exits).astype(np.int32))
    if not names:
        raise ValueError("there are no images to ask the exits of; choose another split")
    prices = tuple(price(model, size, sizes[0]) for size in sizes) if len(set(sizes)) > 1 else ()
    counted = np.stack(matrices)
    results = []
    for own, policy in zip(told, policies, strict=True):
        scores, fitted, by_fitted = np.stack(own), policy, None
        if is_unfitted(policy):
            fitted, scores, by_fitted = with_lines(policy, scores, counted)
        results.append(ExitsOfSplit(tuple(names), scores, counted, sizes[0], fitted, prices, by_fitted))
    return results


def is_unfitted(policy: ExitPolicy) -> bool:
    """Whether a policy's score waits for its lines."""
    return policy.score == "gain" and not policy.lines


def with_lines(
    policy: ExitPolicy, evidence: np.ndarray, matrices: np.ndarray
) -> tuple[ExitPolicy, np.ndarray, np.ndarray]:
    """The policy with lines for evidence float32 (n, K, 2 C) and matrices (n, K, C, C), and scores float32 (n, K).

    First those of each image by the line fitted without it, then those by the policy.
    """
    lines = fit_lines(evidence.astype(np.float64), matrices)
    fitted = replace(
        policy,
        lines=tuple(line.weights for line in lines),
        limits=tuple(
            (*own.min(axis=0).tolist(), *own.max(axis=0).tolist()) for own in evidence.swapaxes(0, 1)[: len(lines)]
        ),
    )
    expected = [*(line.left_out for line in lines), np.zeros(len(matrices))]
    scores = 1 / (1 + np.exp(np.stack(expected, axis=1)))
    by_fitted = [fitted.scores_of_evidence(torch.from_numpy(evidence[:, k]), k) for k in range(evidence.shape[1])]
    return fitted, scores.astype(np.float32), torch.stack(by_fitted, dim=1).numpy()


def price(model: nn.Module, size: tuple[int, int], reference: tuple[int, int]) -> float:
    """What an image of `size` (H, W) is taken to cost, in images of the reference's size: padded pixels over padded.

    >>> from dance_seg.models.ranet import RANet
    >>> price(RANet(11, size="tiny"), (144, 180), (320, 384))  # padded to 160x192
    0.25
    """
    if isinstance(model, ExitNetwork):
        size, reference = model.padded_size(*size), model.padded_size(*reference)
    return size[0] * size[1] / (reference[0] * reference[1])


@torch.inference_mode()
def path_milliseconds(model: ExitNetwork, size: tuple[int, int], policy: ExitPolicy, rounds: int = ROUNDS) -> PathCosts:
    """The milliseconds of one image of `size` (H, W) on each way through the network, medians; ways take turns.

    A head is worth what asking it adds to the whole way, the score of the policy with it, and never below zero.
    """
    device = next(model.parameters()).device
    images = torch.zeros(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    last = model.num_exits - 1
    model.eval()

    def way(end: int, *asked: int) -> Callable[[], object]:
        wanted = [place in asked for place in range(model.num_exits)]

        def walk() -> None:
            with closing(model.exits(images, wanted)) as exits:
                for exit, coarse in zip(range(end + 1), exits, strict=False):
                    if coarse is not None and exit < last:
                        policy.scores(coarse, size, exit).cpu()

        return walk

    ends = {f"end {exit}": way(exit, exit) for exit in range(last + 1)}
    with_heads = {f"head {exit}": way(last, exit, last) for exit in range(last)}
    seconds = interleave({**ends, **with_heads}, rounds, device=device)
    times = {name: 1000 * statistics.median(own) for name, own in seconds.items()}
    whole = times[f"end {last}"]
    heads = [max(0.0, times[name] - whole) for name in with_heads] + [0.0]
    trunk = [max(0.0, times[name] - head) for name, head in zip(ends, heads, strict=True)]
    return PathCosts(tuple(trunk), tuple(heads), "milliseconds")


@torch.inference_mode()
def whole_costs(model: nn.Module, size: tuple[int, int], rounds: int = ROUNDS) -> dict[str, float]:
    """The MACs and milliseconds of one image of `size` (H, W) by all of any network, counted as those of ways are."""
    device = next(model.parameters()).device
    images = torch.zeros(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    call = partial(getattr(model.eval(), "coarse_logits", model), images)
    seconds = interleave({"whole": call}, rounds, device=device)["whole"]
    return {"macs": float(count_macs(model, size).macs), "milliseconds": 1000 * statistics.median(seconds)}


def calibrate(
    model: ExitNetwork,
    datamodule: "SegmentationDataModule",
    *,
    budget: float,
    split: str,
    unit: Unit = "macs",
    how: How = "direct",
    policy: ExitPolicy | None = None,
    is_share: bool = True,
) -> tuple[Calibration, ExitsOfSplit]:
    """Thresholds whose average cost on the split is at most `budget` times that of the whole network.

    Where the budget is no share it is a cost in the unit; more than the whole network's is spent by the last exit.
    `policy` gives the score; its thresholds are chosen here. Raises ValueError for a budget that no thresholds meet.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unit is {unit!r}; choose one of {', '.join(get_args(Unit))}")
    (found,) = exits_of_split(model, datamodule, split, policy or ExitPolicy())
    costs = costs_of_ways(model, found.size, found.policy)
    table = found.table(costs[unit])
    full = table.mean_price * costs[unit].full
    if not is_share:
        budget = 1.0 if budget > full else budget / full
    check_share(budget, costs[unit])
    policy = replace(found.policy, thresholds=solve(table, budget * full, how, spend=0.97))
    achieved = as_figures(found, policy, costs)
    calibration = Calibration(
        policy, budget, unit, how, split, found.names, costs, achieved, table.mean_price, datamodule.resolution
    )
    return calibration, found


def costs_of_ways(model: ExitNetwork, size: tuple[int, int], policy: ExitPolicy) -> dict[str, PathCosts]:
    """What each way costs for an image of `size` (H, W), by unit."""
    return {"macs": path_costs(model, size), "milliseconds": path_milliseconds(model, size, policy)}


def check_share(budget: float, costs: PathCosts) -> None:
    """Raise ValueError unless a budget, a share of the whole network's cost, lies between those of the exits."""
    least = costs.cheapest / costs.full
    if not (math.isfinite(budget) and least <= budget <= 1):
        raise ValueError(
            f"the budget is {budget:g} of the whole network's cost; leaving at the first exit costs {least:.3f} of it "
            f"in {costs.unit}: give a share from {math.ceil(1000 * least) / 1000:g} to 1"
        )


def as_figures(found: ExitsOfSplit, policy: ExitPolicy, costs: dict[str, PathCosts]) -> dict[str, Any]:
    """What a policy comes to on a split: mIoU in points, average costs and shares of them, and who leaves where.

    `expected` has mIoU and shares of other images: where lines were fitted to these, the policy knows them better than
    others. The deviations of the shares are from one such split to the next.
    """
    tables = {unit: (found.own_table(cost), found.table(cost)) for unit, cost in costs.items()}
    spent = {unit: [at_thresholds(table, policy.thresholds) for table in both] for unit, both in tables.items()}
    table, (judged, others) = tables["macs"][0], spent["macs"]  # what the images do does not depend on the unit
    expected = {"miou": others.miou}
    draws = [scored(table, random_exits(table, judged.shares, seed)) for seed in range(20)]
    figures: dict[str, Any] = {
        "images": len(found.names),
        "miou": judged.miou,
        "miou_random": float(np.mean(draws)),
        "miou_of_exits": [scored(table, np.full(len(found.names), exit)) for exit in range(table.num_exits)],
        "exits": [float(share) for share in judged.shares],
        "expected": expected,
    }
    for unit, cost in costs.items():
        own, others = spent[unit]
        full = table.mean_price * cost.full
        figures[unit] = own.average_cost
        figures[f"{unit}_share"] = own.average_cost / full
        expected[f"{unit}_share"] = others.average_cost / full
        expected[f"{unit}_share_deviation"] = others.cost_deviation / full
    return figures


def curves(found: ExitsOfSplit, costs: dict[str, PathCosts], how: How) -> dict[str, list[dict[str, float]]]:
    """For each unit, what thresholds of many budgets give on the split they are chosen on; random exits beside them."""
    return {unit: [_point(point) for point in curve(found.table(cost), how)] for unit, cost in costs.items()}


def _point(point: CurvePoint) -> dict[str, float]:
    figures = point._asdict()
    del figures["thresholds"]
    return figures


# In a checkpoint --------------------------------------------------------------------------------------------------


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Put the thresholds into a checkpoint, which stays whole whatever happens meanwhile."""
    checkpoint = load_checkpoint(path)
    checkpoint["dance_seg"]["exits"] = calibration.as_record()
    save_checkpoint(checkpoint, path)


def calibrated_policy(record: dict[str, Any], model: ExitNetwork, *, at: str) -> ExitPolicy | None:
    """The policy that a checkpoint's record holds for its network; None where it was never calibrated.

    Raises CheckpointError, beginning with `at`, when the record holds something else.
    """
    exits = record.get("exits")
    if exits is None:
        return None
    try:
        policy = ExitPolicy.from_record(exits["policy"] if isinstance(exits, dict) else exits)
        policy.check_fits(model.num_exits)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{at}: its exit policy is damaged: {error}; calibrate again") from None
    return policy


def refuse_overlap(record: dict[str, Any], datamodule: "SegmentationDataModule", split: str) -> None:
    """Raise ValueError when thresholds were chosen on images of the split that is to be scored.

    Images of different parts of a data set may have the same names.
    """
    shared = set(datamodule.source(split).names) & set(record["exits"].get("names", ()))
    if shared and datamodule.parts(split) & datamodule.parts(record["exits"].get("split", split)):
        raise ValueError(
            f"{len(shared)} images of {split}, such as {min(shared)}, were used to calibrate the exits "
            f"(split {record['exits'].get('split')}), so a score on them would flatter; evaluate another --split, "
            "calibrate on another, or give --exit last"
        )


def fixed_exit(num_exits: int, exit: int) -> ExitPolicy:
    """The policy by which every image leaves at one exit, from 0; no other is asked.

    >>> fixed_exit(3, 1).asked
    (False, True, True)
    """
    if not 0 <= exit < num_exits:
        raise ValueError(f"exit {exit + 1} does not exist; the network has {num_exits} exits, from 1 to {num_exits}")
    return ExitPolicy(thresholds=tuple(0.0 if place == exit else math.inf for place in range(num_exits - 1)))
