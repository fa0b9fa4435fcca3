"""Which networks of a supernet a training step runs: a function of the seed and the step alone, the same on all ranks.

Progressive shrinking (Once-for-All, arXiv 1908.09791): the largest network trains alone at first, then kernels, then
depths, then widths are opened, in each the larger values first. The sandwich rule (US-Nets, arXiv 1903.05134): each
step runs the largest network, the smallest and some drawn ones, so that every parameter has a gradient in every step.
Multi-architectural sampling (ViT-ResNAS, arXiv 2109.00642): these networks share the batch, a group of images each, in
one forward and one backward pass. There every layer has the widths of the groups in another random order; that is not
built: networks are drawn whole, each choice apart from the others, so two of them may have the same width in a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dance_seg.randomness import Stream, generator
from dance_seg.supernet.elastic import Supernet
from dance_seg.supernet.prefix import MultiArchitectural
from dance_seg.supernet.space import SearchSpace, Subnet, Value

Method = Literal["sandwich", "multi_architectural", "single"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which networks a step trains and how: the section `supernet` of a recipe.

    `sandwich` runs the networks of a step one after another on the whole batch and takes the mean of their losses;
    `multi_architectural` runs them in one pass, each on its share of the batch; `single`, the control, runs one drawn
    network a step and the largest not at all.

    Training from `start` to `end` (progress) is shared evenly by the `phases`, and a phase by the values that it adds.
    A phase is the last part of the names of its choices: `kernel` opens `stage1.stride8.kernel`. Choices of no phase,
    such as the resolution, are open from the beginning, as Once-for-All's is.

    >>> Sampling(start=0.1, end=0.7).opens("depth")
    (0.3, 0.5)
    """

    method: Method = "sandwich"
    drawn: int = 2  # networks drawn in each step, beside the largest and the smallest
    smallest: bool = True  # whether the smallest that is open runs in each step
    distillation: float = 0.0  # sandwich: weight of the largest network's soft labels in the smaller ones' loss
    temperature: float = 1.0  # of those soft labels
    sort_channels: bool = True  # by importance, before narrower networks are opened, where the network can
    phases: tuple[str, ...] = ("kernel", "depth", "width")
    start: float = 0.1
    end: float = 0.6

    def __post_init__(self) -> None:
        """Refuse values that cannot train; lists become tuples."""
        if self.drawn < 0:
            raise ValueError(f"supernet.drawn is {self.drawn}: zero, or how many networks a step draws, such as 2")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"supernet needs 0 <= start <= end <= 1, got {self.start} and {self.end}")
        if len(set(self.phases)) < len(self.phases):
            raise ValueError(f"supernet.phases {list(self.phases)} name a phase twice; name each once")
        if not 0 <= self.distillation < math.inf:
            raise ValueError(f"supernet.distillation is {self.distillation}: zero (off) or a weight, such as 1.0")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"supernet.temperature is {self.temperature}: a positive number, such as 1.0")
        if self.distillation and self.method != "sandwich":
            raise ValueError(
                f"supernet.distillation is {self.distillation} and supernet.method {self.method}: there the largest "
                "network does not see the images that smaller ones learn from; set it to 0, or the method to sandwich"
            )
        object.__setattr__(self, "phases", tuple(self.phases))

    def opens(self, phase: str) -> tuple[float, float]:
        """The progress at which a phase begins, with its second-largest values, and by which all values are open."""
        number, length = self.phases.index(phase), (self.end - self.start) / max(1, len(self.phases))
        return round(self.start + number * length, 12), round(self.start + (number + 1) * length, 12)

    def check_fits(self, space: SearchSpace) -> None:
        """Raise ValueError unless each phase opens something of a space."""
        kinds = {kind(name) for name in space.values}
        for phase in self.phases:
            if phase not in kinds:
                raise ValueError(
                    f"supernet.phases names {phase!r}, and no choice of this search space ends so; they end in "
                    f"{', '.join(sorted(kinds))}"
                )


def check_trains(options: Sampling, model: object) -> None:
    """Raise ValueError unless a model is a supernet that these options train."""
    if not isinstance(model, Supernet):
        raise ValueError(
            "supernet is given and the model is a single network; name a model that holds many, such as "
            "multi_stage_supernet or vit_resnas_supernet, or take the section out"
        )
    if options.method == "multi_architectural" and not isinstance(model, MultiArchitectural):
        raise ValueError(
            "supernet.method is multi_architectural, and this model runs one network at a time; set it to sandwich, or "
            "name vit_resnas_supernet"
        )
    options.check_fits(model.space)


def sorted_by(options: Sampling, model: object, progress: float) -> list[str]:
    """The kinds of choices whose channels should be in order by a progress, since fewer of them begin to open."""
    kinds = getattr(model, "sorted_kinds", ()) if options.sort_channels else ()
    return [kind for kind in kinds if kind in options.phases and progress >= options.opens(kind)[0]]


def kind(name: str) -> str:
    """What is chosen, without where.

    >>> kind("stage1.stride8.kernel")
    'kernel'
    """
    return name.rpartition(".")[2]


def opened(space: SearchSpace, options: Sampling, progress: float) -> SearchSpace:
    """The part of a space that is open at a progress in [0, 1]; the largest network always is.

    Raises ValueError for a phase that opens nothing of the space.

    >>> space = SearchSpace({"kernel": (3, 5, 7), "depth": (1, 2)})
    >>> halves = Sampling(phases=("kernel", "depth"), start=0.0, end=0.8)
    >>> [opened(space, halves, progress).values["kernel"] for progress in (0.0, 0.2)]
    [(5, 7), (3, 5, 7)]
    """
    options.check_fits(space)
    return space.restricted(
        {
            name: open_values(values, options.opens(kind(name)), progress)
            for name, values in space.values.items()
            if kind(name) in options.phases
        }
    )


def open_values(values: tuple[Value, ...], opens: tuple[float, float], progress: float) -> tuple[Value, ...]:
    """The values of a choice that are open: the second-largest from `opens[0]` on, the others one by one until the end.

    >>> [open_values((2, 3, 4), (0.2, 0.6), progress) for progress in (0.1, 0.2, 0.4)]
    [(4,), (3, 4), (2, 3, 4)]
    """
    start, end = opens
    added = len(values) - 1
    if progress < start or not added:
        return values[-1:]
    share = (progress - start) / (end - start) if end > start else 1.0
    number = min(added, 1 + int(share * added + 1e-9))
    return values[-1 - number :]


def subnets_of_step(
    space: SearchSpace, options: Sampling, seed: int, global_step: int, progress: float
) -> tuple[Subnet, ...]:
    """The networks of a step, the largest first; distinct, so they are fewer where less is open. Of `single`, one.

    Depends on (seed, global_step, progress) and nothing else, so it is equal on all ranks, and resuming changes
    nothing. Raises ValueError for a phase that opens nothing of the space.

    >>> space = SearchSpace({"depth": (1, 2), "width": (8, 16)})
    >>> [str(subnet) for subnet in subnets_of_step(space, Sampling(phases=("depth",), drawn=0), 0, 7, progress=0.0)]
    ['depth=2 width=16', 'depth=2 width=8']
    """
    part = opened(space, options, progress)
    random = generator(seed, Stream.SUBNETS, global_step)
    if options.method == "single":
        return (part.sample(random),)
    drawn = [part.sample(random) for _ in range(options.drawn)]
    smallest = [part.smallest] if options.smallest else []
    return tuple(dict.fromkeys([space.largest, *smallest, *drawn]))


def sharing(subnets: Sequence[Subnet], batch_size: int) -> tuple[Subnet, ...]:
    """The first networks, as many as can share a batch evenly, for one pass over neighbouring groups of images.

    >>> one, other, third = (Subnet((("width", width),)) for width in (32, 16, 8))
    >>> len(sharing([one, other, third], batch_size=9)), len(sharing([one, other, third], batch_size=8))
    (3, 2)
    """
    return tuple(subnets[: max(num for num in range(1, len(subnets) + 1) if batch_size % num == 0)])
