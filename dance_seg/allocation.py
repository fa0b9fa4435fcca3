"""A limit on the tensors that are made, so that a file that names a huge network costs no memory."""

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ValuesAtMost(TorchDispatchMode):
    """A context in which new tensors hold so many values together at most; they are counted before they are made.

    Raises ValueError, with `what` would be too large, at the first tensor beyond.

    >>> with ValuesAtMost(1000, "the network"):
    ...     torch.nn.Linear(10**6, 10**6)
    Traceback (most recent call last):
    ValueError: the network would have more than 1,000 values
    """

    def __init__(self, most: int, what: str) -> None:
        super().__init__()
        self.most, self.what, self.made = most, what, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], list | tuple | torch.Size) and all(isinstance(n, int) for n in args[0]):
            self.count(math.prod(args[0]))  # empty, zeros, rand, ...
        elif func.__name__.startswith(("arange", "linspace")):
            ends = [number for number in args if isinstance(number, int | float)]
            self.count(int(max((abs(number) for number in ends if math.isfinite(number)), default=0)))
        return func(*args, **(kwargs or {}))

    def count(self, values: int) -> None:
        """Add to what was made, unless it is too much."""
        self.made += values
        if self.made > self.most:
            raise ValueError(f"{self.what} would have more than {self.most:,} values")
