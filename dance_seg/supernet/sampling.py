"""Which networks of a supernet a training step runs: a function of the seed and the step alone, the same on all ranks.

Progressive shrinking (Once-for-All, arXiv 1908.09791): the largest network trains alone at first, then kernels, then
depths, then widths are opened, in each the larger values first. The sandwich rule (US-Nets, arXiv 1903.05134): each
step runs the largest network, the smallest and some drawn ones, so that every parameter has a gradient in every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dance_seg.randomness import Stream, generator
from dance_seg.supernet.space import SearchSpace, Subnet, Value


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many networks a step runs, and when which choices open.

    Training from `start` to `end` (progress) is shared evenly by the `phases`, and a phase by the values that it adds.
    A phase is the last part of the names of its choices: `kernel` opens `stage1.stride8.kernel`. Choices of no phase,
    such as the resolution, are open from the beginning, as Once-for-All's is.

    >>> Sampling(start=0.1, end=0.7).opens("depth")
    (0.3, 0.5)
    """

    drawn: int = 2  # networks drawn in each step, beside the largest and the smallest
    smallest: bool = True  # whether the smallest that is open runs in each step
    phases: tuple[str, ...] = ("kernel", "depth", "width")
    start: float = 0.1
    end: float = 0.6

    def __post_init__(self) -> None:
        """Refuse values that cannot train; lists become tuples."""
        if self.drawn < 0:
            raise ValueError(f"sampling.drawn is {self.drawn}: zero, or how many networks a step draws, such as 2")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"sampling needs 0 <= start <= end <= 1, got {self.start} and {self.end}")
        if len(set(self.phases)) < len(self.phases):
            raise ValueError(f"sampling.phases {list(self.phases)} name a phase twice")
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
                    f"sampling.phases names {phase!r}, and no choice of this search space ends so; they end in "
                    f"{', '.join(sorted(kinds))}"
                )


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
    """The networks of a step, the largest first; distinct, so they are fewer where less is open.

    Depends on (seed, global_step, progress) and nothing else, so it is equal on all ranks, and resuming changes
    nothing. Raises ValueError for a phase that opens nothing of the space.

    >>> space = SearchSpace({"depth": (1, 2), "width": (8, 16)})
    >>> [str(subnet) for subnet in subnets_of_step(space, Sampling(phases=("depth",), drawn=0), 0, 7, progress=0.0)]
    ['depth=2 width=16', 'depth=2 width=8']
    """
    part = opened(space, options, progress)
    random = generator(seed, Stream.SUBNETS, global_step)
    drawn = [part.sample(random) for _ in range(options.drawn)]
    smallest = [part.smallest] if options.smallest else []
    return tuple(dict.fromkeys([space.largest, *smallest, *drawn]))


def even_groups(subnets: Sequence[Subnet], batch_size: int, per_arch: int) -> tuple[int, ...]:
    """Which network each example of a batch runs in, as its place in `subnets`, when several run in one pass.

    Neighbouring examples form groups of `per_arch` (the last may be smaller), and groups are shared evenly by the
    networks: ViT-ResNAS's multi-architectural sampling. Raises ValueError when a network would get no example.

    >>> one, other = Subnet((("width", 8),)), Subnet((("width", 16),))
    >>> even_groups([one, other], batch_size=8, per_arch=2)
    (0, 0, 0, 0, 1, 1, 1, 1)
    """
    if per_arch < 1 or batch_size < 1:
        raise ValueError(f"per_arch is {per_arch} and the batch has {batch_size} examples; each at least 1")
    groups = -(-batch_size // per_arch)
    if not 1 <= len(subnets) <= groups:
        raise ValueError(
            f"{len(subnets)} networks and {groups} groups: {batch_size} examples with per_arch {per_arch} are for 1 to "
            f"{groups} networks; draw fewer, lower per_arch, or raise the batch size"
        )
    return tuple(example // per_arch * len(subnets) // groups for example in range(batch_size))
