"""The few things the methods need to know about the other processes of a run; all of it works without any."""

from typing import Any, TypeVar

import torch.distributed
from torch import Tensor

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
