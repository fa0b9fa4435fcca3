"""Measured milliseconds: warmed up, synchronised with the device, as percentiles.

A GPU works behind the program's back, so a clock read before it has finished measures nothing: each run is
synchronised on its own. The machine, its clock and its other work are part of the figure; the record says what it
can, and figures to compare are measured in turns in one sitting (tools/bench).
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.errors import DataError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEWEST_RUNS, MOST_RUNS = 5, 1000
FEWEST_WARM_UPS = 2  # the first call allocates and chooses kernels, the second may still be slow
ONNX_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


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
    threads: int  # that are used on the CPU
    channels_last: bool = False  # whether the weights lie so
    runtime: str = "torch"
    load_average: float | None = None  # of the machine over the minute before, our own work included

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
    meter: AbstractContextManager[Any] | None = None,
) -> Latency:
    """Measure the model's forward on images (H, W), on the device where the model is.

    Evaluation mode and inference_mode, each module's mode restored afterwards. With `runs` left out there are as many
    as fit into the time limit, from 5 to 1000. `dtype` other than float32 means autocast. A `meter`, such as an
    EnergyMeter, is open during exactly these runs, the warm-up left out. Raises ValueError for a choice that does not
    exist, and whatever the model raises for a size it cannot take.
    """
    check(input_size, batch, dtype, in_channels)
    load = load_average()
    images = images_for(model, input_size, batch, in_channels)
    device = images.device
    with evaluating(model), torch.inference_mode(), autocast(device, dtype):
        times = measure(
            lambda: model(images), device=device, warm_up=warm_up, runs=runs, time_limit_s=time_limit_s, meter=meter
        )
    return Latency(
        **percentiles(times),
        batch=batch,
        device=device_name(device),
        dtype=dtype if dtype != "float32" else str(images.dtype).removeprefix("torch."),
        input_size=(input_size[0], input_size[1]),
        threads=torch.get_num_threads(),
        channels_last=is_channels_last(model),
        load_average=load,
    )


def measure_onnx_latency(
    path: str | Path,
    input_size: tuple[int, int] | None = None,
    *,
    batch: int = 1,
    threads: int = 1,
    warm_up: int = 5,
    runs: int | None = None,
    time_limit_s: float = 5.0,
    meter: AbstractContextManager[Any] | None = None,
) -> Latency:
    """Measure an ONNX file's forward by onnxruntime on the CPU, with so many threads.

    `input_size` may be left out where the file fixes it. Raises DataError, naming the file, when it is no ONNX model
    of one image input (N, C, H, W), and ValueError for a size or a batch that it does not take.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("onnxruntime is not installed; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception for each way in which a file can be wrong
        raise DataError(f"{path}: onnxruntime cannot load it: {' '.join(str(error).split())[:300]}") from None
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in ONNX_TYPES:
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise DataError(f"{path}: takes {found}; one input of images (N, C, H, W) can be measured")
    num, channels, *size = inputs[0].shape
    fixed = all(isinstance(length, int) for length in size)
    if input_size is None and not fixed:
        raise ValueError(f"{path} takes images of any size; name one, such as --size 360 480")
    input_size = input_size or (size[0], size[1])
    for name, wanted, there in (
        ("batch", batch, num),
        ("height", input_size[0], size[0]),
        ("width", input_size[1], size[1]),
    ):
        if isinstance(there, int) and there != wanted:
            raise ValueError(f"{path} takes a {name} of {there} alone, not {wanted}; export it with dynamic sizes")
    in_channels = channels if isinstance(channels, int) else 3
    dtype = ONNX_TYPES[inputs[0].type]
    check(input_size, batch, "float32", in_channels)
    load = load_average()
    images = np.random.default_rng(0).standard_normal((batch, in_channels, *input_size)).astype(dtype)
    given = {inputs[0].name: images}
    try:
        session.run(None, given)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot take {batch} images of {input_size[0]}x{input_size[1]}: {reason}") from None
    times = measure(
        lambda: session.run(None, given), warm_up=warm_up, runs=runs, time_limit_s=time_limit_s, meter=meter
    )
    return Latency(
        **percentiles(times),
        batch=batch,
        device="cpu",
        dtype=dtype,
        input_size=(input_size[0], input_size[1]),
        threads=threads,
        runtime=f"onnxruntime {onnxruntime.__version__}",
        load_average=load,
    )


def measure(
    call: Callable[[], object],
    *,
    device: torch.device | str = "cpu",
    warm_up: int = 5,
    runs: int | None = None,
    time_limit_s: float = 5.0,
    meter: AbstractContextManager[Any] | None = None,
) -> list[float]:
    """Milliseconds of each run of any call, after a warm-up, each ended by waiting for the device.

    A warm-up that takes longer than the time limit ends after its second call.

    >>> len(measure(lambda: None, warm_up=1, runs=3))
    3
    """
    if warm_up < 0 or (runs is not None and runs < 1):
        raise ValueError(f"warm_up is {warm_up} and runs is {runs}; they must be at least 0 and 1")
    if not (math.isfinite(time_limit_s) and time_limit_s >= 0):
        raise ValueError(f"time_limit_s is {time_limit_s}; it is a number of seconds")
    device = torch.device(device)
    begin = time.perf_counter()
    for number in range(1, warm_up + 1):
        call()
        synchronise(device)
        if number >= FEWEST_WARM_UPS and time.perf_counter() - begin > time_limit_s:
            break
    if not warm_up:
        synchronise(device)  # what was asked of the device before is none of ours
    times: list[float] = []
    with meter or nullcontext():
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


def interleave(
    sides: Mapping[str, Callable[[], object]], runs: int, warm_up: int = 1, *, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each side over `runs` rounds, the sides taking turns so that drift of the machine hits all.

    Each call ends by waiting for the device.

    >>> {name: len(times) for name, times in interleave({"a": int, "b": str}, runs=3).items()}
    {'a': 3, 'b': 3}
    """
    device = torch.device(device)
    for _ in range(warm_up):
        for call in sides.values():
            call()
    synchronise(device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            synchronise(device)
            times[name].append(time.perf_counter() - start)
    return times


def percentiles(times: list[float]) -> dict[str, Any]:
    """What is kept of the milliseconds of each run."""
    return {
        "p50_ms": float(np.percentile(times, 50)),
        "p90_ms": float(np.percentile(times, 90)),
        "mean_ms": float(np.mean(times)),
        "runs": len(times),
    }


def check(input_size: tuple[int, int], batch: int, dtype: str, in_channels: int = 3) -> None:
    """Refuse a measurement that cannot be made. Raises ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    if len(input_size) != 2 or min(input_size) < 1:
        raise ValueError(f"input_size is {tuple(input_size)}; it is a height and a width in pixels, such as (360, 480)")
    if in_channels < 1:
        raise ValueError(f"in_channels is {in_channels}; it must be at least 1")


def images_for(model: nn.Module, input_size: tuple[int, int], batch: int, in_channels: int = 3) -> Tensor:
    """A batch (N, C, H, W) of normal noise where the model is; it leaves torch's random state as it is.

    Noise and not zeros: a GPU whose factors are zeros draws less power and so keeps a higher clock.
    """
    parameter = next(model.parameters(), torch.empty(0))
    images = torch.randn((batch, in_channels, *input_size), generator=torch.Generator().manual_seed(0))
    return images.to(parameter.device, parameter.dtype)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """The context in which products are taken in that type."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def is_channels_last(model: nn.Module) -> bool:
    """Whether the weights of convolutions lie so that channels are the innermost, which convolutions then follow."""
    weights = [weight for weight in model.parameters() if weight.dim() == 4 and weight.shape[1] > 1]
    spread = [weight for weight in weights if weight.shape[2] * weight.shape[3] > 1]  # else both orders are one
    return any(weight.is_contiguous(memory_format=torch.channels_last) for weight in spread)


def load_average() -> float | None:
    """How many processes wanted to run over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def is_noisy(load: float | None, threads: int) -> bool:
    """Whether other work leaves too few cores for so many threads; asked before any measurement.

    >>> is_noisy(1000.0, 1), is_noisy(None, 1)
    (True, False)
    """
    return load is not None and load + threads > (os.cpu_count() or 1) + 0.5


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
