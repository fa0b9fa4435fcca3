"""What writing ONNX takes besides the exporter: its libraries, its silence, and poolings whose sizes stay open."""

import logging
import warnings
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

OPSET = 18
"""The version of ONNX's operators: what the exporter writes by itself, and runtimes of the last years read."""
LARGEST = 2**31 - 1  # bytes of one protobuf message


class BinAverages(nn.Module):
    """AdaptiveAvgPool2d as two products, which export with sizes left open.

    The exporter unrolls AdaptiveAvgPool2d for the size it was shown; at other sizes it fails or takes other pixels.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, maps: Tensor) -> Tensor:
        """The averages (N, C, rows, columns) of maps (N, C, H, W)."""
        rows, columns = (
            shares_of_bins(length, bins, maps)
            for length, bins in zip(maps.shape[-2:], (self.rows, self.columns), strict=True)
        )
        return rows @ maps @ columns.T


def shares_of_bins(length: int, bins: int, like: Tensor) -> Tensor:
    """The share (bins, length) of each pixel in the average of each bin, which overlap as in torch."""
    bin_number = torch.arange(bins, device=like.device)[:, None]
    start, end = bin_number * length // bins, ((bin_number + 1) * length + bins - 1) // bins
    place = torch.arange(length, device=like.device)[None]
    return ((place >= start) & (place < end)).to(like.dtype) / (end - start).to(like.dtype)


def with_open_pooling(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in evaluation mode, whose pooling into bins does not depend on the size."""
    copied = deepcopy(model).to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    for path, module in list(copied.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d):
            given = module.output_size
            rows, columns = given if isinstance(given, tuple) else (given, given)
            if rows is not None and columns is not None and (rows, columns) != (1, 1):
                parent, _, name = path.rpartition(".")
                setattr(copied.get_submodule(parent), name, BinAverages(rows, columns))
    return copied


def library(name: str, use: str) -> Any:
    """A library of the extra `export`. Raises ValueError with the command that installs it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"{name} is needed to {use} ONNX files and is not installed: pip install 'dance-seg[export]'"
        ) from None


@contextmanager
def quiet() -> Any:
    """What the exporter says of its own steps concerns nobody; what fails is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
