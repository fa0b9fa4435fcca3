"""What the networks of a trained supernet score and cost on a split: what a search asks of each.

A network is taken out of the supernet with its inherited weights, gets statistics of its own from training images, and
passes over the split once. Static performance is that of its last exit; dynamic performance that of thresholds which
spend the budget best, chosen from what its exits say of the split, without running it again.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.calibration import ExitsOfSplit, exits_of_batches
from dance_seg.cost.latency import measure_latency
from dance_seg.cost.macs import count_macs
from dance_seg.early_exit.budget import ExitTable
from dance_seg.early_exit.exits import ExitNetwork, recalibrate
from dance_seg.early_exit.paths import PathCosts, Walked
from dance_seg.early_exit.policy import ExitPolicy
from dance_seg.errors import DataError
from dance_seg.inference import predict_labels
from dance_seg.metrics import confusion_matrix, scores
from dance_seg.normalise import normalise
from dance_seg.randomness import Stream, generator
from dance_seg.sample import Batch
from dance_seg.supernet.elastic import ElasticBatchNorm2d, Supernet
from dance_seg.supernet.latency_table import (
    LatencyTable,
    Parts,
    UnmeasuredError,
    check,
    conditions_here,
    corrected,
    load_table,
    measure_table,
    parts_of,
    save_table,
)
from dance_seg.supernet.macs import SubnetMacs
from dance_seg.supernet.search import Budget, judge_dynamic, reachable_cost
from dance_seg.supernet.space import Subnet
from dance_seg.supernet.storage import Scored

if TYPE_CHECKING:
    from datamodules.base import SegmentationDataModule

Performance = Literal["static", "dynamic"]
PATIENCE = 15
"""After so many networks in a row without a part that was not measured, a latency table is complete enough."""

CHECKED = 6
"""Whole networks that a latency table is corrected by and checked on."""

KEPT = 256
"""Networks of which what ran over the images is remembered: 100 images of 19 classes and 3 exits take 0.4 MB."""

MOST_ERROR = 0.15
"""Of a latency table's sums, relative to whole networks: above it costs say little, and a warning is given."""


class JudgedSplit:
    """The images that networks are judged on, kept in memory, and those that statistics are taken from.

    `most` images at most are kept, evenly spread over the split. Raises ValueError for images of several sizes, whose
    networks have no single cost.
    """

    def __init__(self, datamodule: "SegmentationDataModule", split: str, most: int | None = None) -> None:
        self.split = split
        self.num_classes = len(datamodule.classes)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        total = len(datamodule.source(split))
        wanted = set(np.linspace(0, total - 1, min(total, most or total)).round().astype(int).tolist())
        loader = datamodule.evaluation_loader(split)
        self.batches: list[Batch] = [batch for place, batch in enumerate(loader) if place in wanted]
        sizes = {(batch.images.shape[-2], batch.images.shape[-1]) for batch in self.batches}
        if len(sizes) > 1:
            raise ValueError(
                f"the images of {split} have {len(sizes)} sizes, and a network's cost depends on them; judge on images "
                "of one size"
            )
        self.size: tuple[int, int] = sizes.pop()
        self.statistics: list[Tensor] = list(datamodule.statistics_batches())

    @property
    def names(self) -> list[str]:
        """The names of the images that are kept."""
        return [name for batch in self.batches for name in batch.names]

    @torch.inference_mode()
    def miou(self, network: nn.Module) -> float:
        """The mIoU, in points, of a network in evaluation: of its last exit, where it has several."""
        network = network.to(self.device).eval()
        matrix = np.zeros((self.num_classes, self.num_classes), np.int64)
        for batch in self.batches:
            found = predict_labels(network, normalise(batch.images.to(self.device)), batch.labels.shape[-2:])
            for prediction, label in zip(found.numpy(), batch.labels.numpy(), strict=True):
                matrix += confusion_matrix(prediction, label, self.num_classes)
        return scores(matrix).miou

    def exits(self, network: ExitNetwork, policy: ExitPolicy) -> ExitsOfSplit:
        """What every exit of a network says of every image, with the policy's score."""
        return exits_of_batches(network.to(self.device), self.batches, self.num_classes, policy)[0]


class SubnetScores:
    """Scores and costs of a supernet's networks on a split, for a search.

    `policy` says how sure exits are, by default the score `mean`. `table` gives costs in milliseconds; without one they
    are counted in MACs. Raises ValueError for dynamic performance of a supernet without exits, and for the score
    `gain`, which is fitted to one network.
    """

    def __init__(
        self,
        model: nn.Module,
        split: JudgedSplit,
        budget: Budget,
        performance: Performance,
        *,
        policy: ExitPolicy | None = None,
        table: LatencyTable | None = None,
    ) -> None:
        assert isinstance(model, Supernet)
        if performance == "dynamic" and not isinstance(model, ExitNetwork):
            raise ValueError("this supernet has one exit, where no image can stop early; search for static performance")
        if policy is not None and policy.score == "gain":
            raise ValueError("the score gain is fitted to one network, and a search judges many; choose another score")
        self.model, self.split, self.budget, self.performance = model, split, budget, performance
        self.policy = policy or ExitPolicy(score="mean")
        self.macs = SubnetMacs(model)
        self.table = table
        self.left_out: set[Subnet] = set()
        """Networks that were asked for a cost, and of which a part was not measured."""
        self._weights = weights_identity(model)
        self._has_own_statistics = any(isinstance(layer, ElasticBatchNorm2d) for layer in model.modules())
        # A random search beside an evolution begins with the same networks, and another budget judges them again.
        self._exits, self._miou = lru_cache(KEPT)(self._run_exits), lru_cache(KEPT)(self._run_whole)

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return "MACs" if self.table is None else "ms"

    def about(self) -> dict[str, Any]:
        """Plain data that tells scores of these weights and images from any others."""
        return {
            "weights": self._weights,
            "performance": self.performance,
            "score": [self.policy.score, self.policy.confident_from, self.policy.boundary_weight],
            "split": self.split.split,
            "images": len(self.split.names),
            "names": hashlib.sha256("\n".join(self.split.names).encode()).hexdigest()[:16],
            "size": list(self.split.size),
            "statistics_images": sum(map(len, self.split.statistics)) if self._has_own_statistics else 0,
            "latency": None if self.table is None else self.table.fingerprint,
        }

    def network(self, subnet: Subnet) -> nn.Module:
        """A network on its own, in evaluation, with statistics of its own where the supernet's are not every network's.

        Raises ValueError for a network of another space.
        """
        network = self.model.extract(subnet).to(self.split.device)
        if self._has_own_statistics:
            recalibrate(network, (images.to(self.split.device) for images in self.split.statistics))
        return network.eval()

    def within(self, budget: Budget) -> "SubnetScores":
        """The same scores within another budget; networks that ran over the images do not run again."""
        other = copy(self)
        other.budget = budget
        return other

    def miou(self, subnet: Subnet) -> float:
        """The score of a whole network, in points."""
        return self._miou(subnet)

    def exit_table(self, subnet: Subnet) -> ExitTable:
        """What the exits of a network say of the images and cost: from it any thresholds are judged.

        Raises ValueError for a supernet without exits.
        """
        return self._exits(subnet).table(self.path_costs(subnet))

    def _run_whole(self, subnet: Subnet) -> float:
        return self.split.miou(self.network(subnet))

    def _run_exits(self, subnet: Subnet) -> ExitsOfSplit:
        network = self.network(subnet)
        if not isinstance(network, ExitNetwork):
            raise ValueError("this supernet has one exit, so there are no exits to compare")
        return self.split.exits(network, self.policy)

    def score(self, subnet: Subnet) -> Scored:
        """What a search makes as large as it can, in points; dynamic performance with its thresholds beside it."""
        if self.performance == "static":
            return Scored(self.miou(subnet))
        return judge_dynamic(self.exit_table(subnet), self.budget).as_scored()

    def cost(self, subnet: Subnet) -> float:
        """What a search holds against the budget: of dynamic performance what thresholds can make the network spend.

        Infinite where a part of the network was not measured, so that it is left out and not guessed.
        """
        try:
            if self.performance == "dynamic":
                return reachable_cost(self.path_costs(subnet), self.budget)
            return self.whole_cost(subnet)
        except UnmeasuredError:
            self.left_out.add(subnet)
            return math.inf

    def whole_cost(self, subnet: Subnet) -> float:
        """The cost of one image that goes through all of a network.

        Raises UnmeasuredError, a ValueError, where a part was not measured.
        """
        if self.table is None:
            return self.macs.inference(subnet, self.split.size)
        return self._milliseconds(self._without_values(subnet))

    def cost_of_other(self, network: nn.Module) -> float:
        """The cost of one image in a network of no supernet; milliseconds are measured."""
        if self.table is None:
            return count_macs(network, self.split.size).macs
        return measure_latency(network.to(self.split.device), self.split.size).p50_ms

    def path_costs(self, subnet: Subnet) -> PathCosts:
        """What leaving a network at each exit costs. Raises UnmeasuredError as `whole_cost` does."""
        if self.table is None:
            return self.macs.paths(subnet, self.split.size)
        network = self._without_values(subnet)
        assert isinstance(network, ExitNetwork)
        last = network.num_exits - 1

        def milliseconds(exit: int, *asked: int) -> float:
            walked = Walked(network, exit, [place in asked for place in range(last + 1)], to_full_size=False)
            return self._milliseconds(walked)

        full = milliseconds(last, last)
        heads = [milliseconds(last, exit, last) - full for exit in range(last)] + [0.0]
        ends = [milliseconds(exit, exit) for exit in range(last + 1)]
        return PathCosts(tuple(end - head for end, head in zip(ends, heads, strict=True)), tuple(heads), "ms")

    def _without_values(self, subnet: Subnet) -> nn.Module:
        supernet: Any = self.macs.model
        return supernet.extract(subnet)

    def _milliseconds(self, network: nn.Module) -> float:
        assert self.table is not None
        return self.table.milliseconds(parts_of(network, self.split.size, whole=measured_whole(self.model)))


def measured_whole(model: object) -> tuple[type[nn.Module], ...]:
    """Modules of a supernet that a latency table measures as one part, since products inside are no modules."""
    return getattr(model, "measured_whole", ())


def with_every_head(network: nn.Module) -> nn.Module:
    """A network whose forward asks all its exits, where in evaluation only the last one speaks."""
    if not isinstance(network, ExitNetwork):
        return network
    return Walked(network, network.num_exits - 1, (True,) * network.num_exits, to_full_size=False)


def latency_table(
    model: nn.Module,
    size: tuple[int, int],
    path: Path,
    tell: Callable[[str], None],
    time_limit_s: float = 0.3,
    *,
    device: torch.device | None = None,
    named: Sequence[Subnet] = (),
) -> LatencyTable:
    """The milliseconds of the parts of a supernet's networks on this machine, read from a file or measured and written.

    On a device, by default where the model is. `named` networks are measured first, then others are drawn until
    `PATIENCE` in a row bring no new part; half of `CHECKED` whole networks then give the factor between them and the
    sum of their parts, and the others say how far sums are off. Warns where that is more than `MOST_ERROR`. Raises
    DataError for a file of another space, machine or image size, and for one without the parts of a named network.
    """
    assert isinstance(model, Supernet)
    space, whole = model.space, measured_whole(model)
    device = device or next(model.parameters()).device
    without_values: Any = SubnetMacs(model).model

    def every_part(subnet: Subnet) -> Parts:
        return parts_of(with_every_head(without_values.extract(subnet)), size, whole=whole)

    if not path.is_file():
        random = generator(0, Stream.SEARCH, 0)
        known: set[str] = set()
        checked = [space.sample(random) for _ in range(CHECKED)]

        def bringing_new_parts() -> Iterator[nn.Module]:
            waited, subnets = 0, iter([space.largest, space.smallest, *named, *checked])
            while waited < PATIENCE:
                subnet = next(subnets, None) or space.sample(random)
                new = every_part(subnet).keys() - known
                waited = 0 if new else waited + 1
                if new:
                    known.update(new)
                    yield with_every_head(model.extract(subnet).to(device).eval())

        table = measure_table(
            space,
            bringing_new_parts(),
            size,
            whole=whole,
            time_limit_s=time_limit_s,
            progress=lambda parts: tell(f"{parts} parts measured"),
        )
        networks = [model.extract(subnet).to(device).eval() for subnet in checked]
        table = corrected(table, check(table, networks[::2], whole=whole, time_limit_s=time_limit_s))
        others = check(table, networks[1::2], whole=whole, time_limit_s=time_limit_s)
        table = replace(table, errors=tuple(one.relative_error for one in others))
        errors = ", ".join(f"{error:+.0%}" for error in table.errors)
        tell(f"{len(table.parts)} parts measured; sums are off by {errors} of whole networks")
        save_table(table, path)
    table = load_table(path, space, conditions_here(model, size, device=device))
    for subnet in named:
        if every_part(subnet).keys() - table.parts.keys():
            raise DataError(
                f"{path}: the times of some parts of {subnet} are missing; move it away, and a table is measured that "
                "has them"
            )
    if table.typical_error > MOST_ERROR:
        warnings.warn(
            f"{path}: sums of this latency table are off by {table.typical_error:.0%} of whole networks, more than "
            f"{MOST_ERROR:.0%}; move it away and search again on an idle machine, which measures another",
            stacklevel=2,
        )
    return table


def weights_identity(model: nn.Module) -> str:
    """A name of a network's weights, so that scores of one are not taken for those of another."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
