"""How much of the machine a network uses, by the roofline model (Williams, Waterman and Patterson, CACM 2009).

No operation can run faster than the machine multiplies, nor than its memory brings the numbers: with I MACs for each
byte moved the roof is min(peak MAC/s, I x peak bytes/s). Both peaks are what torch attains here and now, with the same
threads: a product of large square matrices, and a copy of more than the caches hold (of each byte copied one is read
and one written).

Bytes are those of each operation's tensors, once each (macs.py). What stays in a cache from one operation to the next
is faster than the memory's roof, so shares above 1 are possible where memory is the bound. Each operation is timed on
its own, and on a GPU waited for, which adds some microseconds to each.
"""

import math
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dance_seg.cost.latency import (
    DTYPES,
    autocast,
    check,
    device_name,
    evaluating,
    images_for,
    load_average,
    measure,
    synchronise,
)
from dance_seg.cost.macs import OperationCounter, counted, forward_and_backward

SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of the matrices; as long as a product takes no longer than SLOWEST_MS
SLOWEST_MS = 150.0
COPIED_BYTES = {"cpu": 256 << 20}
COPIED_BYTES_ELSEWHERE = 1 << 30


@dataclass(frozen=True)
class Peak:
    """What the machine attains at best."""

    gmacs_per_second: float
    gigabytes_per_second: float  # read and written, 10^9 bytes
    device: str
    dtype: str
    threads: int
    load_average: float | None = None

    @property
    def ridge(self) -> float:
        """MACs per byte from which the products are the bound, and no longer the memory."""
        return self.gmacs_per_second / self.gigabytes_per_second

    def roof(self, macs_per_byte: float) -> float:
        """The GMAC/s that are possible at this many MACs per byte.

        >>> peak = Peak(gmacs_per_second=100, gigabytes_per_second=10, device="", dtype="", threads=1)
        >>> peak.ridge, peak.roof(2), peak.roof(50)
        (10.0, 20, 100)
        """
        return min(self.gmacs_per_second, macs_per_byte * self.gigabytes_per_second)


@dataclass(frozen=True)
class Usage:
    """What operations of one kind did in one forward of one batch, or all of them, or a training."""

    name: str
    macs: int
    bytes: int  # read and written
    seconds: float

    @property
    def macs_per_byte(self) -> float:
        """The arithmetic intensity."""
        return self.macs / self.bytes if self.bytes else 0.0

    @property
    def gmacs_per_second(self) -> float:
        """The speed attained."""
        return self.macs / self.seconds / 1e9 if self.seconds else 0.0

    def bound(self, peak: Peak) -> str:
        """What limits it: "compute" or "memory"."""
        return "compute" if self.macs_per_byte >= peak.ridge else "memory"

    def share(self, peak: Peak) -> float:
        """How much of its roof it reaches; without MACs, of the memory's speed.

        >>> peak = Peak(gmacs_per_second=100, gigabytes_per_second=10, device="", dtype="", threads=1)
        >>> Usage("a", macs=30 * 10**9, bytes=10**9, seconds=0.5).share(peak)  # 60 of 100 GMAC/s
        0.6
        >>> Usage("b", macs=0, bytes=4 * 10**9, seconds=0.5).share(peak)  # 8 of 10 GB/s
        0.8
        """
        if not self.seconds:
            return 0.0
        possible = max(self.macs / 1e9 / peak.gmacs_per_second, self.bytes / 1e9 / peak.gigabytes_per_second)
        return possible / self.seconds

    def as_record(self, peak: Peak) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "name": self.name,
            "gmacs": self.macs / 1e9,
            "gigabytes": self.bytes / 1e9,
            "seconds": self.seconds,
            "macs_per_byte": self.macs_per_byte,
            "gmacs_per_second": self.gmacs_per_second,
            "bound": self.bound(peak),
            "share": self.share(peak),
        }


@dataclass(frozen=True)
class Roofline:
    """A network under the roof of the machine, by kind of operation and as a whole."""

    peak: Peak
    operations: tuple[Usage, ...]  # of one forward, the longest first
    total: Usage
    batch: int
    input_size: tuple[int, int]  # (H, W)
    training: Usage | None = None
    training_peak: Peak | None = None  # where the training took its products in another type
    notes: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """The figures as plain data, for cost.json."""
        return {
            "peak": vars(self.peak),
            "operations": [usage.as_record(self.peak) for usage in self.operations],
            "total": self.total.as_record(self.peak),
            "batch": self.batch,
            "input_size": list(self.input_size),
            "training": self.training and self.training.as_record(self.training_peak or self.peak),
            "training_peak": vars(self.training_peak or self.peak) if self.training else None,
            "notes": list(self.notes),
        }


def measure_peak(device: torch.device | str = "cpu", dtype: str = "float32", *, time_limit_s: float = 1.5) -> Peak:
    """What matrix products and copies attain on the device, with torch's present number of threads.

    The fastest run of each counts, since other work only slows them. Takes about the time limit. Raises ValueError for
    a type that does not exist.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    device, load = torch.device(device), load_average()
    with torch.inference_mode():
        gmacs = _fastest_product(device, DTYPES[dtype], 0.6 * time_limit_s)
        gigabytes = _fastest_copy(device, 0.4 * time_limit_s)
    return Peak(gmacs, gigabytes, device_name(device), dtype, torch.get_num_threads(), load)


def _fastest_product(device: torch.device, dtype: torch.dtype, time_limit_s: float) -> float:
    """GMAC/s of the best square product; larger ones are tried while they are not slow."""
    best, end = 0.0, time.perf_counter() + time_limit_s
    usual = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as convolutions are by default; else they would break through
    try:
        for side in SIDES:
            left = torch.randn(side, side, device=device, dtype=dtype)
            right, out = left.T.contiguous(), torch.empty_like(left)

            def product(left: Any = left, right: Any = right, out: Any = out) -> None:
                torch.mm(left, right, out=out)

            # A CPU without instructions for the type takes a thousand times as long: no warm-up without a look.
            (first,) = measure(product, device=device, warm_up=0, runs=1)
            last = max(first, 1e-3) * 8 > SLOWEST_MS or side == SIDES[-1]
            left_s = max(0.0, end - time.perf_counter())
            times = [first]
            if first < 1000 * left_s:
                times += measure(product, device=device, warm_up=1, time_limit_s=left_s if last else left_s / 6)
            best = max(best, side**3 / (min(times) / 1000) / 1e9)
            if last:
                break
    finally:
        torch.set_float32_matmul_precision(usual)
    return best


def _fastest_copy(device: torch.device, time_limit_s: float) -> float:
    """GB/s, read and written, of copying a large tensor."""
    copied = COPIED_BYTES.get(device.type, COPIED_BYTES_ELSEWHERE)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = measure(lambda: target.copy_(source), device=device, warm_up=1, time_limit_s=time_limit_s)
    return 2 * copied / (min(times) / 1000) / 1e9


class TimedCounter(OperationCounter):
    """Counts MACs and bytes, and the seconds of each kind of operation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def perform(self, operation: Any, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation and wait for it."""
        start = time.perf_counter()
        output = operation(*args, **kwargs)
        synchronise(self.device)
        self.seconds[kind] += time.perf_counter() - start
        return output


def time_operations(
    model: nn.Module,
    input_size: tuple[int, int],
    *,
    batch: int = 1,
    dtype: str = "float32",
    in_channels: int = 3,
    time_limit_s: float = 2.0,
) -> tuple[Usage, ...]:
    """MACs, bytes and seconds of each kind of operation in one forward, the longest first.

    In evaluation mode, without gradients, where the model is; seconds are the median of three forwards or more.
    Raises ValueError for a choice that does not exist, and whatever the model raises for a size it cannot take.
    """
    check(input_size, batch, dtype, in_channels)
    images = images_for(model, input_size, batch, in_channels)
    counters: list[TimedCounter] = []
    with evaluating(model), torch.no_grad(), autocast(images.device, dtype):
        model(images)
        end = time.perf_counter() + time_limit_s
        while len(counters) < 3 or (time.perf_counter() < end and len(counters) < 50):
            counter = TimedCounter(images.device)
            with counter:
                model(images)
            counters.append(counter)
    macs, moved = counters[0].macs["forward"], counters[0].bytes["forward"]
    usages = [
        Usage(kind, macs[kind], moved[kind], statistics.median(counter.seconds[kind] for counter in counters))
        for kind in counters[0].seconds
    ]
    return tuple(sorted(usages, key=lambda usage: -usage.seconds))


def roofline(
    operations: tuple[Usage, ...],
    peak: Peak,
    *,
    seconds: float | None = None,
    batch: int = 1,
    input_size: tuple[int, int] = (0, 0),
    training: Usage | None = None,
    training_peak: Peak | None = None,
    notes: tuple[str, ...] = (),
) -> Roofline:
    """Operations under the roof; `seconds` is what one forward takes as it runs otherwise, without being watched."""
    total = Usage(
        "whole network",
        sum(usage.macs for usage in operations),
        sum(usage.bytes for usage in operations),
        sum(usage.seconds for usage in operations) if seconds is None else seconds,
    )
    return Roofline(
        peak, operations, total, batch, (input_size[0], input_size[1]), training, training_peak, tuple(notes)
    )


def training_usage(
    model: nn.Module, input_size: tuple[int, int], batch: int, *, gmacs: float, seconds: float
) -> Usage | None:
    """A training of so many GMACs and seconds, as its ledger has them.

    Its bytes follow from the MACs per byte of one step of this network at this size and batch, counted on the meta
    device in float32, without the optimiser's: of a network that was cut or images that were smaller it is an
    approximation. Waiting for data is in a ledger's seconds. None where nothing was trained.
    """
    counter = counted(model, forward_and_backward, (batch, 3, *input_size))
    macs = sum(counter.macs[phase].total() for phase in ("forward", "backward"))
    moved = sum(counter.bytes[phase].total() for phase in ("forward", "backward"))
    if not (macs and math.isfinite(gmacs) and gmacs > 0 and math.isfinite(seconds) and seconds > 0):
        return None
    return Usage("training", round(gmacs * 1e9), round(gmacs * 1e9 * moved / macs), seconds)
