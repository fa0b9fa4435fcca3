"""What training has spent: pixels, images, MACs at the size each batch was executed at, seconds, decodes, overheads.

Training's own cost is its steps and everything done for their sake: scoring complexity, building caches, estimating
batch-norm statistics anew, asking a teacher, cutting channels. Validation is written down apart and is not part of it.
A dropped image is offered and not paid for. MACs are counted per distinct size (MacsPerSize), not by profiling.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from dance_seg.cost.macs import TrainingCost, count_training_macs

OVERHEADS = ("scoring", "batch_norm", "cache", "teacher", "cuts")
"""What training needs beside its steps, and so is part of its cost."""

KINDS = (*OVERHEADS, "validation")


@dataclass
class Ledger:
    """What one rank has spent; plain numbers, so that a checkpoint and cost.json can hold it.

    >>> ledger = Ledger()
    >>> ledger.add_offered(3)
    >>> ledger.add_dropped(1)
    >>> ledger.add_step(images=2, pixels=2 * 64 * 64, macs_forward=10, macs_backward=20, seconds=0.5, decodes=2)
    >>> ledger.add("scoring", seconds=0.1)
    >>> ledger.training_macs, ledger.training_seconds, ledger.images_offered - ledger.images_paid
    (30, 0.6, 1)
    """

    steps: int = 0
    images_offered: int = 0  # that an epoch held out to training, dropped ones too
    images_paid: int = 0  # that were trained on
    images_dropped: int = 0
    pixels: int = 0  # that were trained on, at the executed size
    decode_calls: int = 0  # image files opened and decoded
    forward_macs: int = 0  # of the steps
    backward_macs: int = 0
    step_seconds: float = 0.0
    overhead_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    overhead_macs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    joules: float | None = None  # measured while training; None where nothing, or not everything, was measured
    energy_source: str = ""  # of the joules, or why there are none

    def add_step(
        self, *, images: int, pixels: int, macs_forward: int, macs_backward: int, seconds: float, decodes: int
    ) -> None:
        """One step of this rank: its images and pixels, the MACs of all of them together, its decoded files."""
        self.steps += 1
        self.images_paid += images
        self.pixels += pixels
        self.forward_macs += macs_forward
        self.backward_macs += macs_backward
        self.step_seconds += seconds
        self.decode_calls += decodes

    def add_offered(self, images: int) -> None:
        """Images that an epoch offers, dropped ones included; each is to be counted by one rank."""
        self.images_offered += images

    def add_dropped(self, images: int) -> None:
        """Images that an epoch offers and does not train on; each is to be counted by one rank."""
        self.images_dropped += images

    def add(self, kind: str, *, seconds: float, macs: int = 0, decodes: int = 0) -> None:
        """Work beside the steps; validation's decodes are not counted. Raises ValueError for a kind not in KINDS."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of overhead; choose one of {', '.join(KINDS)}")
        self.overhead_seconds[kind] += seconds
        self.overhead_macs[kind] += macs
        if kind != "validation":
            self.decode_calls += decodes

    def add_energy(self, joules: float | None, source: str) -> None:
        """Joules of a stretch of training; once a stretch could not be measured, there is no total any more."""
        unmeasured = self.energy_source != "" and self.joules is None
        self.joules = None if joules is None or unmeasured else (self.joules or 0.0) + joules
        self.energy_source = self.energy_source if unmeasured else source

    @property
    def training_macs(self) -> int:
        """Forward, backward and every overhead, without validation."""
        return self.forward_macs + self.backward_macs + sum(self.overhead_macs[kind] for kind in OVERHEADS)

    @property
    def training_seconds(self) -> float:
        """Steps and every overhead, without validation."""
        return self.step_seconds + sum(self.overhead_seconds[kind] for kind in OVERHEADS)

    def summary(self) -> dict[str, float | int]:
        """The figures under the names they are logged by: GMACs, seconds, counts; joules where there are some."""
        figures: dict[str, float | int] = {
            "cost/train_gmacs": self.training_macs / 1e9,
            "cost/forward_gmacs": self.forward_macs / 1e9,
            "cost/backward_gmacs": self.backward_macs / 1e9,
            "cost/train_seconds": self.training_seconds,
            "cost/step_seconds": self.step_seconds,
            "cost/steps": self.steps,
            "cost/pixels": self.pixels,
            "cost/images_offered": self.images_offered,
            "cost/images_paid": self.images_paid,
            "cost/images_dropped": self.images_dropped,
            "cost/decode_calls": self.decode_calls,
        }
        for kind in KINDS:
            figures[f"cost/{kind}_seconds"] = self.overhead_seconds[kind]
            figures[f"cost/{kind}_gmacs"] = self.overhead_macs[kind] / 1e9
        if self.joules is not None:
            figures["cost/train_joules"] = self.joules
        return figures

    def as_record(self) -> dict[str, Any]:
        """The ledger as a plain dict of numbers, texts and dicts, for a checkpoint or JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Ledger":
        """The ledger of a record. Raises ValueError that names what the record lacks or has too much."""
        names = {entry.name for entry in fields(cls)}
        if names != set(record):
            wrong = ", ".join(sorted(names ^ set(record)))
            raise ValueError(f"this is no ledger of this version; missing or unknown: {wrong}")
        for name in ("overhead_seconds", "overhead_macs"):
            if set(record[name]) != set(KINDS):
                wrong = ", ".join(sorted(set(record[name]) ^ set(KINDS)))
                raise ValueError(f"{name} of this ledger has missing or unknown kinds: {wrong}")
        copied: dict[str, Any] = {
            name: dict(value) if isinstance(value, Mapping) else value for name, value in record.items()
        }
        return cls(**copied)


def merge_ranks(ledgers: Iterable[Ledger]) -> Ledger:
    """One ledger for the whole run from those of its ranks.

    Summed: images, pixels, decodes, MACs and joules, since each rank does its own. The largest: steps and seconds,
    since ranks step together and a wall clock is one. Joules are None if those of a rank could not be measured. When a
    run is resumed, rank 0 goes on with the merged ledger of the checkpoint, and the others begin with a new one.

    >>> merge_ranks([Ledger(pixels=4, step_seconds=2.0), Ledger(pixels=3, step_seconds=2.5)]).as_record()["pixels"]
    7
    """
    ranks = list(ledgers)
    metered = [rank for rank in ranks if rank.energy_source]
    unmeasured = [rank for rank in metered if rank.joules is None]
    return Ledger(
        steps=max(rank.steps for rank in ranks),
        images_offered=sum(rank.images_offered for rank in ranks),
        images_paid=sum(rank.images_paid for rank in ranks),
        images_dropped=sum(rank.images_dropped for rank in ranks),
        pixels=sum(rank.pixels for rank in ranks),
        decode_calls=sum(rank.decode_calls for rank in ranks),
        forward_macs=sum(rank.forward_macs for rank in ranks),
        backward_macs=sum(rank.backward_macs for rank in ranks),
        step_seconds=max(rank.step_seconds for rank in ranks),
        overhead_seconds={kind: max(rank.overhead_seconds[kind] for rank in ranks) for kind in KINDS},
        overhead_macs={kind: sum(rank.overhead_macs[kind] for rank in ranks) for kind in KINDS},
        joules=sum(rank.joules or 0.0 for rank in metered) if metered and not unmeasured else None,
        energy_source=next((rank.energy_source for rank in (*unmeasured, *metered)), ""),
    )


class MacsPerSize:
    """What training on one image costs at each size, counted once per distinct size.

    >>> macs_per_size = MacsPerSize(nn.Conv2d(3, 8, kernel_size=1))
    >>> macs_per_size((4, 4)).forward_macs, macs_per_size((2, 4)).forward_macs
    (384, 192)
    """

    def __init__(self, model: nn.Module) -> None:
        self.renew(model)

    def renew(self, model: nn.Module) -> None:
        """Forget all counts: the model has another structure now, after a cut for example."""
        self._model = model
        self._costs: dict[tuple[int, int], TrainingCost] = {}

    def __call__(self, size: Sequence[int]) -> TrainingCost:
        """Forward and backward MACs of one image of size (H, W)."""
        size = (int(size[0]), int(size[1]))
        if size not in self._costs:
            self._costs[size] = count_training_macs(self._model, size)
        return self._costs[size]
