"""Anybody's torch Dataset of (image, label) pairs, with data slimming."""

import hashlib
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dance_seg.errors import DataError
from dance_seg.sample import Sample
from datamodules.base import SegmentationDataModule
from datamodules.label_table import LabelTable


class DatasetSource:
    """The pairs of a map-style Dataset: image (3, H, W) or (H, W, 3), uint8 or float in [0, 1], or a PIL image; label
    (H, W) of class indices, 255 where ignored.
    """

    def __init__(self, dataset: Any, name: str, label_table: LabelTable, fingerprint: str | None = None) -> None:
        self.dataset, self.label_table = dataset, label_table
        self.names = tuple(f"{name}_{index:07d}" for index in range(len(dataset)))
        self.groups = tuple(name for _ in self.names)
        what = fingerprint or secrets.token_hex(16)
        self.fingerprint = hashlib.sha256(f"{name} {len(self.names)} {what}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Sample:
        """One pair as uint8 arrays.

        Raises DataError when it is no image with a label of its size, or the label holds what is no class and not 255.
        """
        image, label = (np.asarray(item) for item in self.dataset[index][:2])
        if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
            image = image.transpose(1, 2, 0)
        if image.ndim != 3 or image.shape[2] != 3 or label.shape != image.shape[:2]:
            raise DataError(
                f"{self.names[index]}: image {image.shape} and label {label.shape}; give (3, H, W) or (H, W, 3), "
                "and (H, W)"
            )
        if image.dtype != np.uint8:
            if not 0 <= float(image.min()) <= float(image.max()) <= 1:
                raise DataError(f"{self.names[index]}: a float image lies in [0, 1]; give it before normalisation")
            image = (image * 255).round().astype(np.uint8)
        if label.dtype.kind not in "iu":
            raise DataError(f"{self.names[index]}: the label is {label.dtype}; give class indices, whole numbers")
        label = self.label_table.apply(label, Path(self.names[index]))
        return Sample(np.ascontiguousarray(image), np.ascontiguousarray(label))


class DatasetDataModule(SegmentationDataModule):
    """Data slimming over a user's own training and validation Dataset.

    `classes` are the names of the class indices; labels hold these and 255. A Dataset cannot say when it has changed,
    so nothing is kept between runs unless a `fingerprint` is given: any text, another one whenever the data are others.
    Its own random augmentation would be scored and planned with one draw: leave it to this. Raises ValueError for
    `cache_gb` without a fingerprint.
    """

    def __init__(
        self, train: Any, val: Any, classes: Sequence[str], *, fingerprint: str | None = None, **loading: Any
    ) -> None:
        super().__init__(**{"cache_gb": 0.0, **loading})
        if self.cache_gb and not fingerprint:
            raise ValueError(
                f"cache_gb is {self.cache_gb:g}, and a Dataset cannot say when it has changed; give a fingerprint, "
                'such as fingerprint="my data, version 1", or leave cache_gb out'
            )
        self.datasets = {"train": train, "val": val}
        self.given_fingerprint = fingerprint
        self.names_of_classes = tuple(classes)

    @cached_property
    def label_table(self) -> LabelTable:  # type: ignore[override]
        """Class indices as they are."""
        count = len(self.names_of_classes)
        return LabelTable(
            classes=self.names_of_classes,
            palette=tuple((37 * i % 256, 91 * i % 256, 53 * i % 256) for i in range(count)),
            table=tuple(i if i < count or i == 255 else -1 for i in range(256)),
        )

    @property
    def table_folder(self) -> Path | None:
        """None without a fingerprint, by which a table would be found again."""
        return super().table_folder if self.given_fingerprint else None

    def raw_source(self, split: str) -> DatasetSource:  # type: ignore[override]
        """The pairs of a split."""
        if split not in self.datasets:
            raise ValueError(f"a Dataset has the splits train and val, not {split}")
        return DatasetSource(self.datasets[split], split, self.label_table, self.given_fingerprint)
