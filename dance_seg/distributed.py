"""The few things the methods need to know about the other processes of a run; all of it works without any."""

from typing import Any, TypeVar

import torch.distributed
from torch import Tensor, nn

T = TypeVar("T")


def num_ranks() -> int:
    """How many processes train together; 1 outside distributed training.

    >>> num_ranks()
    1
    """
    return torch.distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Which of the processes this one is, from 0.

    >>> rank()
    0
    """
    return torch.distributed.get_rank() if _is_distributed() else 0


def mean_over_ranks(rows: Tensor) -> Tensor:
    """The mean over the first dimension, and over all ranks; every rank must call it, whatever its number of rows.

    A gradient goes to this rank's own rows, times the number of ranks: averaged over ranks, as DDP does, it is that of
    one process with all rows. Where nothing is computed (meta), the ranks are left alone.

    >>> import torch
    >>> mean_over_ranks(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    tensor([2., 4.])
    """
    if not _is_distributed() or rows.is_meta:
        return rows.mean(0)
    own = rows.sum(0)
    count = sum_over_ranks(torch.tensor(float(len(rows)), device=rows.device))
    scaled = num_ranks() * own
    return (sum_over_ranks(own) + scaled - scaled.detach()) / count


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, such as BatchNorm's running statistics, taken of the rank's own images.

    DDP does so before a step in training and not after it, so what is judged or cut then would differ by rank, and from
    what is saved. Every rank must call it.
    """
    if _is_distributed():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, the same on each; the tensor itself outside distributed training.

    Every rank must call it, with equal shape and type. No gradient flows through the sum.

    >>> import torch
    >>> sum_over_ranks(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if not _is_distributed():
        return tensor
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def greatest_over_ranks(value: int, device: torch.device | str = "cpu") -> int:
    """The greatest of the ranks' values, the same on each; every rank must call it, with its device.

    >>> greatest_over_ranks(3)
    3
    """
    if not _is_distributed():
        return value
    greatest = torch.tensor(value, device=device)
    torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX)
    return int(greatest)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gather(value: T) -> list[T]:
    """The value of every rank, in order; every rank takes part and gets all.

    >>> gather(3)
    [3]
    """
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(found, value)
    return found
