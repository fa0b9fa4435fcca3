"""Street scenes drawn on demand from a seed: the data set that needs no download."""

import hashlib
from functools import cached_property
from typing import Any

from dance_seg.sample import IGNORE, Sample
from datamodules.base import SegmentationDataModule, _size, _whole
from datamodules.label_table import LabelTable
from datamodules.scenes import CLASSES, PALETTE, render_scene

SCENES_VERSION = 2  # raise it when scenes are drawn otherwise, or stores of old ones would be taken
SPLITS = {"train": 0, "val": 1_000_000, "test": 2_000_000}  # index of the first scene


class Scenes:
    """The scenes first, first + 1, ... of a seed, drawn when asked for."""

    def __init__(self, seed: int, first: int, count: int, size: tuple[int, int]) -> None:
        self.seed, self.first, self.size = seed, first, size
        self.names = tuple(f"scene_{first + i:07d}" for i in range(count))
        self.groups = tuple("scenes" for _ in range(count))
        drawn = f"scenes {SCENES_VERSION} {seed} {first} {count} {size[0]}x{size[1]}"
        self.fingerprint = hashlib.sha256(drawn.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Sample:
        """Draw one scene."""
        return render_scene(self.seed, self.first + index, self.size)


class ShapesDataModule(SegmentationDataModule):
    """num_train, num_val, num_test scenes of `size` (H, W), different for each `scene_seed`."""

    def __init__(
        self,
        num_train: int = 160,
        num_val: int = 40,
        num_test: int = 40,
        size: tuple[int, int] = (192, 256),
        scene_seed: int = 0,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.counts = {
            "train": _whole(num_train, "data.args.num_train", 2),
            "val": _whole(num_val, "data.args.num_val", 1),
            "test": _whole(num_test, "data.args.num_test", 1),
        }
        self.size = _size(size, "data.args.size")
        self.scene_seed = _whole(scene_seed, "data.args.scene_seed", 0)
        if self.held is not None:
            raise ValueError("data.args.hold_out: shapes draws its own val and test scenes; leave hold_out out")

    @cached_property
    def label_table(self) -> LabelTable:  # type: ignore[override]
        """Class indices as drawn."""
        table = tuple(i if i < len(CLASSES) or i == IGNORE else -1 for i in range(256))
        return LabelTable(classes=CLASSES, palette=PALETTE, table=table)

    def raw_source(self, split: str) -> Scenes:  # type: ignore[override]
        """The scenes of a split. Raises ValueError for a split that shapes does not have."""
        if split not in SPLITS:
            raise ValueError(f"shapes has no split {split!r}; choose one of {', '.join(SPLITS)}")
        return Scenes(self.scene_seed, SPLITS[split], self.counts[split], self.size)
