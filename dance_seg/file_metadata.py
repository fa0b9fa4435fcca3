"""What an exported file says of itself, as JSON strings in its own metadata, and how it is read back.

Classes and colours, the recipe, the sizes the network takes, how pixels become its input, the protocol its scores were
taken by, and its structure. What a file of this project is told by is the key `dance_seg.version`. Paths of the machine
that trained are left out.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dance_seg.errors import DataError
from dance_seg.network_slimming.structure import structure_hash
from dance_seg.normalise import MEAN, STD, padded_size
from dance_seg.plain_data import parse_json

VERSION = 2  # of the metadata below
PREFIX = "dance_seg."
LARGEST_STEP = 1 << 12  # that a file may have images padded to multiples of, so that none asks for gigabytes
PRIVATE = ("root", "cache_dir")  # of data.args: paths of the machine that trained


@dataclass(frozen=True)
class Sizes:
    """Which images a network takes as they are; others are padded at the bottom and on the right, or refused."""

    multiple_of: int = 32  # height and width must be divisible by this
    at_least: int = 32
    only: tuple[int, int] | None = None  # the one size (H, W) of a file that was exported for one

    def __post_init__(self) -> None:
        for side in (self.multiple_of, self.at_least, *(self.only or ())):
            if type(side) is not int or side < 1:
                raise ValueError(f"a size is {side!r}; it is a whole number from 1")
        if max(self.multiple_of, self.at_least) > LARGEST_STEP:
            raise ValueError(
                f"images are padded to {self.multiple_of} and {self.at_least}, at most {LARGEST_STEP} each"
            )

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) at which the network runs on an image. Raises ValueError when it cannot.

        >>> Sizes(32, 64).padded(45, 100)
        (64, 128)
        """
        rows, columns = padded_size((height, width), self.multiple_of, self.at_least)
        if self.only is not None and (rows, columns) != self.only:
            raise ValueError(
                f"the network was exported for images of {self.only[0]}x{self.only[1]}, and this one is "
                f"{height}x{width} ({rows}x{columns} when padded); choose another resolution, or export again with "
                f"--size {rows} {columns}"
            )
        return rows, columns


def protocol(resolution: float) -> str:
    """How labels come from an image, in words.

    >>> protocol(1.0)[:27]
    'whole images at full size; '
    """
    scaled = "full size" if resolution == 1 else f"{resolution:g} of their size, areas averaged"
    return (
        f"whole images at {scaled}; padded at the bottom and on the right by reflection to what the network takes, "
        "logits cut back, resized bilinearly to the image's own size (align_corners=False), argmax; RGB"
    )


def sizes_of(model: nn.Module, only: tuple[int, int] | None) -> Sizes:
    """Which images a network takes; `only` one size (H, W) where a file was exported for one."""
    stride = int(getattr(model, "stride", 32))
    return Sizes(stride, int(getattr(model, "minimum_size", stride)), only)


def file_metadata(model: nn.Module, record: Mapping[str, Any], sizes: Sizes) -> dict[str, str]:
    """What a file says of itself, as JSON strings."""
    data = record["recipe"]["data"]
    arguments = {key: value for key, value in data.get("args", {}).items() if key not in PRIVATE}
    resolution, exits = float(arguments.get("resolution", 1.0)), record.get("exits")
    facts = {
        "version": VERSION,
        "labels": dict(record["labels"]),
        "recipe": {**record["recipe"], "data": {**data, "args": arguments}},
        "complexity": record.get("complexity"),  # by which adaptive inference finds an image's size
        "exits": exits and {"policy": exits["policy"]},  # by which a network with exits stops
        "resolution": resolution,
        "protocol": protocol(resolution),
        "normalisation": {"formula": "(x / 255 - mean) / std", "mean": MEAN, "std": STD, "order": "RGB"},
        "sizes": asdict(sizes),
        "structure": structure_hash(model),
        "written_by": {"torch": str(torch.__version__)},
    }
    return {PREFIX + key: json.dumps(value) for key, value in facts.items()}


def read_metadata(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, Any], Sizes, str]:
    """The record, the sizes and the structure's hash that a file carries."""
    if PREFIX + "version" not in metadata:
        raise DataError(
            f"{path}: exported by something else: it says nothing of classes, sizes and normalisation; "
            "python -m tools.export RUN writes files that do"
        )
    if read_value(metadata, "version", path) != VERSION:
        raise DataError(f"{path}: written by another version of dance_seg; export it again from its run")
    labels, recipe, structure, complexity, exits = (
        read_value(metadata, key, path) for key in ("labels", "recipe", "structure", "complexity", "exits")
    )
    try:
        said = dict(read_value(metadata, "sizes", path))
        if said["only"] is not None:
            rows, columns = said["only"]
            said["only"] = rows, columns
        sizes = Sizes(**said)
        if len(labels["classes"]) != len(labels["palette"]) or not isinstance(recipe["data"], dict):
            raise ValueError
        if complexity is not None and not all(isinstance(value, int | float) for value in complexity):
            raise ValueError
    except (TypeError, KeyError, ValueError, IndexError):
        raise DataError(f"{path}: its metadata is damaged; export it again from its run") from None
    return {"labels": labels, "recipe": recipe, "complexity": complexity, "exits": exits}, sizes, structure


def read_value(metadata: Mapping[str, str], key: str, path: Path) -> Any:
    """A value of the metadata. Raises DataError, beginning with the path, when it is missing or no JSON."""
    try:
        return parse_json(metadata[PREFIX + key])
    except (KeyError, ValueError):
        raise DataError(f"{path}: its metadata is damaged ({PREFIX}{key}); export it again from its run") from None
