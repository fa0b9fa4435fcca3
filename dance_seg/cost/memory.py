"""The most memory that one forward holds at once: what decides whether a network fits on a device.

Counted are the batch of images, every result on the way for as long as something still needs it, and the output.
Parameters and buffers are there before and are given apart. On CUDA the figure is torch's own allocator's, so the
workspaces of kernels are in it, and not what the driver and the libraries load (some hundred MB a process).

On a CPU there is no such counter: the resident size of a process goes by what the C library gives back and by what ran
before. So each operation is watched and the bytes of the tensors that are alive are added up. That is exact for tensors
and the same on every run and machine, and leaves out what a kernel takes for itself while it runs. It is done on the
CPU and not on the meta device since the two take different kernels, of attention for one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from dance_seg.cost.latency import autocast, check, device_name, evaluating, images_for, synchronise
from dance_seg.cost.macs import collect


@dataclass(frozen=True)
class PeakMemory:
    """The memory of one forward of one batch, in bytes."""

    peak_bytes: int  # images, results and output, the most at one time
    parameter_bytes: int  # parameters and buffers, which stay and are not in the peak
    batch: int
    input_size: tuple[int, int]  # (H, W)
    dtype: str
    device: str
    counted_by: str  # "live tensors", or "allocator" where it includes the workspaces of kernels

    @property
    def total_bytes(self) -> int:
        """Peak and parameters together."""
        return self.peak_bytes + self.parameter_bytes


def measure_memory(
    model: nn.Module, input_size: tuple[int, int], *, batch: int = 1, dtype: str = "float32", in_channels: int = 3
) -> PeakMemory:
    """The peak memory of a forward in evaluation mode, without gradients, where the model is.

    Raises ValueError for a choice that does not exist, and whatever the model raises for a size it cannot take.

    >>> peak = measure_memory(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), (10, 20))
    >>> peak.peak_bytes == 4 * 200 * (3 + 8 + 4), peak.parameter_bytes == 4 * (3 * 8 + 8 + 8 * 4 + 4)
    (True, True)
    """
    check(input_size, batch, dtype, in_channels)
    device = next(model.parameters(), torch.empty(0)).device
    # Not inference mode: in it composite operations are not shown in their parts.
    with evaluating(model), torch.no_grad(), autocast(device, dtype):
        if device.type == "cuda":
            model(images_for(model, input_size, batch, in_channels))  # workspaces that stay are there from now on
            synchronise(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            model(images_for(model, input_size, batch, in_channels))
            synchronise(device)
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            with LiveTensors() as live:
                model(images_for(model, input_size, batch, in_channels))
            peak = live.peak_bytes
    return PeakMemory(
        peak_bytes=peak,
        parameter_bytes=held_bytes([*model.parameters(), *model.buffers()]),
        batch=batch,
        input_size=(input_size[0], input_size[1]),
        dtype=dtype,
        device=device_name(device),
        counted_by="allocator" if device.type == "cuda" else "live tensors",
    )


class LiveTensors(TorchDispatchMode):
    """Adds up the memory of tensors that are made while it is active, and notes the most there was at once.

    Views share the memory of what they view, and count once. What was there before does not count.

    >>> with LiveTensors() as live:
    ...     a = torch.zeros(100)
    ...     b = a.view(10, 10) + 1
    ...     del a, b
    ...     c = torch.zeros(50)
    >>> live.peak_bytes
    800
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._held: Any = WeakIdKeyDictionary()  # memory that was made here and is still there -> its bytes

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Perform one operation and look at what is alive then."""
        kwargs = kwargs or {}
        given = {id(memory) for memory in memories(collect((args, tuple(kwargs.values()))))}
        output = operation(*args, **kwargs)
        for memory in memories(collect(output)):
            if memory in self._held or id(memory) not in given:  # else it views, or is, what was there before
                self._held[memory] = memory.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(self._held.values()))
        return output


def memories(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The memory behind tensors; those without one of their own are left out."""
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of all tensors together; memory that several share counts once.

    >>> weight = torch.zeros(10)
    >>> held_bytes([weight, weight.view(2, 5), torch.zeros(1)])
    44
    """
    return sum({memory.data_ptr(): memory.nbytes() for memory in memories(tensors) if memory.nbytes()}.values())


def free_bytes(device: torch.device) -> int | None:
    """The memory that is free on the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if device.type == "cpu" and file.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
