"""Images per second at the batch that suits the machine best, found by doubling."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from dance_seg.cost.latency import Latency, measure_latency
from dance_seg.cost.memory import free_bytes, measure_memory

GAIN = 1.02  # less than two in a hundred more images a second is no gain
MOST_BATCH = 1024


@dataclass(frozen=True)
class Throughput:
    """The best of the batches that were tried."""

    batch: int
    images_per_second: float
    tried: tuple[tuple[int, float], ...]  # (batch, images per second), in the order of the batches
    ended_by: str  # why no larger batch was tried


def measure_throughput(
    model: nn.Module,
    input_size: tuple[int, int],
    *,
    dtype: str = "float32",
    in_channels: int = 3,
    time_limit_s: float = 20.0,
    seconds_per_batch: float = 1.0,
) -> Throughput:
    """Try batches 1, 2, 4, ... until two in a row bring no gain, or half the free memory or the time would not do.

    Raises ValueError for a choice that does not exist, and whatever the model raises for a size it cannot take.
    """
    device = next(model.parameters(), torch.empty(0)).device
    peak = measure_memory(model, input_size, dtype=dtype, in_channels=in_channels).peak_bytes
    room, end = free_bytes(device), time.perf_counter() + time_limit_s
    tried: list[Latency] = []
    batch, without_gain = 1, 0
    while True:
        try:
            found = measure_latency(
                model, input_size, batch=batch, dtype=dtype, in_channels=in_channels, warm_up=2,
                time_limit_s=seconds_per_batch,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            if not tried:
                raise
            ended_by = f"batch {batch} does not fit into the memory"
            break
        best = max((one.images_per_second for one in tried), default=0.0)
        without_gain = 0 if found.images_per_second > GAIN * best else without_gain + 1
        tried.append(found)
        batch *= 2
        # Two warm-ups and five runs at least, each as long as two of the last batch's.
        seconds = max(seconds_per_batch, 7 * 2 * found.mean_ms / 1000)
        if without_gain == 2:
            ended_by = "two doublings brought no gain"
        elif room is not None and batch * peak > room / 2:
            ended_by = f"batch {batch} would take over half of the free memory"
        elif time.perf_counter() + seconds > end:
            ended_by = f"batch {batch} would go beyond the time limit of {time_limit_s:g} s"
        elif batch > MOST_BATCH:
            ended_by = f"the largest batch tried is {MOST_BATCH}"
        else:
            continue
        break
    best_one = max(tried, key=lambda one: one.images_per_second)
    return Throughput(
        batch=best_one.batch,
        images_per_second=best_one.images_per_second,
        tried=tuple((one.batch, one.images_per_second) for one in tried),
        ended_by=ended_by,
    )
