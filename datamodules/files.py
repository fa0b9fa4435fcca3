"""The data sets that are read from files, each a LightningDataModule around its reader."""

from pathlib import Path
from typing import Any, Literal

from datamodules.ade20k import ade20k_split
from datamodules.base import SegmentationDataModule
from datamodules.camvid import camvid_split
from datamodules.cityscapes import cityscapes_split
from datamodules.folder import folder_split
from datamodules.label_table import LabelTable
from datamodules.sources import FileSource, Pair, hold_out, usable_pairs


class FileDataModule(SegmentationDataModule):
    """A data set of image and label files under `root`; subclasses say how they are found."""

    def __init__(self, root: str, train_on: Literal["train", "trainval"] = "train", **loading: Any) -> None:
        super().__init__(**loading)
        if train_on not in ("train", "trainval"):
            raise ValueError(f"data.args.train_on is {train_on!r}; choose train or trainval")
        if train_on == "trainval" and self.validate_on == "val":
            raise ValueError(
                "data.args.train_on is trainval, which holds the images of val: set data.args.hold_out or validate_on"
            )
        if not isinstance(root, str | Path) or not str(root):
            raise ValueError(f"data.args.root is {root!r}; name the folder that holds the data")
        self.root = Path(root).expanduser()
        self.train_on = train_on
        self._pairs: dict[str, tuple[list[Pair], LabelTable]] = {}

    def read_split(self, split: str) -> tuple[list[Pair], LabelTable]:
        """The files of the data set's own split, and their label table."""
        raise NotImplementedError

    def pairs(self, split: str) -> list[Pair]:
        """The files of a split after `hold_out` and quarantine, in a fixed order."""
        own = self._own(split)
        if own not in self._pairs:
            found, table = self.read_split(own)
            usable = usable_pairs(found, table, self.bad_files, self.bad_files_cap, folder=self.cache_folder)
            self._pairs[own] = (usable, table)
        found = self._pairs[own][0]
        if split in ("train", "held_out") and self.held is not None:
            kept, held = hold_out(found, self.held)
            return held if split == "held_out" else kept
        return found

    def _own(self, split: str) -> str:
        """The data set's own split that a split is taken from."""
        return self.train_on if split in ("train", "held_out") else split

    def parts(self, split: str) -> frozenset[str]:
        """The data set's own splits from which the images of a split come."""
        own = self._own(split)
        return frozenset(("train", "val") if own == "trainval" else (own,))

    @property
    def label_table(self) -> LabelTable:
        """The one table from raw label ids to classes."""
        if not self._pairs:
            self.pairs("train")
        return next(iter(self._pairs.values()))[1]

    def raw_source(self, split: str) -> FileSource:  # type: ignore[override]
        """The images of a split as they are on disk."""
        pairs = self.pairs(split)
        return FileSource(pairs, self._pairs[self._own(split)][1])

    def sources_for_check(self) -> dict[str, tuple[list[Pair], LabelTable]]:
        """The files of each split that is there."""
        found = {"train": self.read_split("train")}
        for split in ("val", "test"):
            try:
                found[split] = self.read_split(split)
            except (ValueError, OSError):
                if split == self.validate_on:
                    raise
        return found


class CamVidDataModule(FileDataModule):
    """CamVid as SegNet's copy has it: 11 classes, void ignored; groups are the drives, such as 0006R0."""

    def __init__(self, root: str = "data/camvid", **loading: Any) -> None:
        super().__init__(root, **loading)

    def read_split(self, split: str) -> tuple[list[Pair], LabelTable]:
        """The files of train, val or test."""
        return camvid_split(self.root, split)


class CityscapesDataModule(FileDataModule):
    """Cityscapes fine annotations: 19 classes, labelIds read through a table; groups are the cities."""

    def __init__(self, root: str = "data/cityscapes", **loading: Any) -> None:
        super().__init__(root, **loading)

    def read_split(self, split: str) -> tuple[list[Pair], LabelTable]:
        """The files of train, val or test."""
        return cityscapes_split(self.root, split)


class ADE20KDataModule(FileDataModule):
    """ADEChallengeData2016: 150 classes, 0 ignored; groups are the scene categories where the list of them is there."""

    def __init__(self, root: str = "data/ADEChallengeData2016", **loading: Any) -> None:
        super().__init__(root, **loading)

    def read_split(self, split: str) -> tuple[list[Pair], LabelTable]:
        """The files of train or val."""
        return ade20k_split(self.root, split)


class FolderDataModule(FileDataModule):
    """A user's own images/, masks/ and classes.yaml; `val_fraction` of them validate where no split is given."""

    def __init__(self, root: str, val_fraction: float = 0.2, **loading: Any) -> None:
        super().__init__(root, **loading)
        self.val_fraction = val_fraction

    def read_split(self, split: str) -> tuple[list[Pair], LabelTable]:
        """The files of train, val or test."""
        return folder_split(self.root, split, val_fraction=self.val_fraction)
