"""Measured milliseconds: warmed up, synchronised with the device, as percentiles.

A GPU works behind the program's back, so a clock read before it has finished measures nothing: each run is
synchronised on its own. The machine, its clock and its other work are part of the figure; the record says what it
can, and figures to compare are measured in turns in one sitting (tools/bench).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEWEST_RUNS, MOST_RUNS = 5, 1000


@dataclass(frozen=True)
class Latency:
    """How long one forward of one batch takes, and under which conditions that was measured."""

    p50_ms: float  # half of the runs were faster
    p90_ms: float  # nine in ten were faster
    mean_ms: float
    runs: int
    batch: int
    device: str  # its name as torch gives it
    dtype: str  # of the products: float32, or the type that autocast chose
    input_size: tuple[int, int]  # (H, W)
    threads: int  # that torch uses on the CPU

    @property
    def images_per_second(self) -> float:
        """The throughput at this batch."""
        return 1000 * self.batch / self.mean_ms


def measure_latency(
    model: nn.Module,
    input_size: tuple[int, int],
    *,
    batch: int = 1,
    dtype: str = "float32",
    in_channels: int = 3,
    warm_up: int = 5,
    runs: int | None = None,
    time_limit_s: float = 5.0,
) -> Latency:
    """Measure the model's forward on images (H, W), on the device where the model is.

    Evaluation mode and inference_mode, each module's mode restored afterwards. With `runs` left out there are as many
    as fit into the time limit, from 5 to 1000. `dtype` other than float32 means autocast. Raises ValueError for a
    choice that does not exist.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    parameter = next(model.parameters(), torch.empty(0))
    device = parameter.device
    images = torch.zeros((batch, in_channels, *input_size), device=device, dtype=parameter.dtype)
    autocast = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")
    with evaluating(model), torch.inference_mode(), autocast:
        times = measure(lambda: model(images), device=device, warm_up=warm_up, runs=runs, time_limit_s=time_limit_s)
    return Latency(
        p50_ms=float(np.percentile(times, 50)),
        p90_ms=float(np.percentile(times, 90)),
        mean_ms=float(np.mean(times)),
        runs=len(times),
        batch=batch,
        device=device_name(device),
        dtype=dtype if dtype != "float32" else str(parameter.dtype).removeprefix("torch."),
        input_size=(input_size[0], input_size[1]),
        threads=torch.get_num_threads(),
    )


def measure(
    call: Callable[[], object],
    *,
    device: torch.device | str = "cpu",
    warm_up: int = 5,
    runs: int | None = None,
    time_limit_s: float = 5.0,
) -> list[float]:
    """Milliseconds of each run of any call, after a warm-up, each ended by waiting for the device.

    >>> len(measure(lambda: None, warm_up=1, runs=3))
    3
    """
    if warm_up < 0 or (runs is not None and runs < 1):
        raise ValueError(f"warm_up is {warm_up} and runs is {runs}; they must be at least 0 and 1")
    device = torch.device(device)
    for _ in range(warm_up):
        call()
    synchronise(device)
    times: list[float] = []
    end = time.perf_counter() + time_limit_s
    while len(times) < (runs or MOST_RUNS):
        start = time.perf_counter()
        call()
        synchronise(device)
        now = time.perf_counter()
        times.append(1000 * (now - start))
        if runs is None and now >= end and len(times) >= FEWEST_RUNS:
            break
    return times


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; on leaving, each module in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_name(device: torch.device) -> str:
    """The device as a person knows it: "cpu", or the accelerator's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
