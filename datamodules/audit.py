"""What a data set's files hold, looked at before anyone trains: bad files, ids, classes, sizes, images met twice."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from dance_seg.errors import DataError
from dance_seg.sample import IGNORE
from datamodules.image_files import read_image, read_label
from datamodules.label_table import CITYSCAPES_IDS, LabelTable, count_ids
from datamodules.listing import some
from datamodules.sources import BadFile, Pair, check_sizes, in_order, with_progress


@dataclass(frozen=True)
class Report:
    """What the files of one split hold."""

    label_table: LabelTable
    num_pairs: int
    num_unlabelled: int  # pairs without a label file, such as a test split's
    bad: tuple[BadFile, ...]
    sizes: dict[tuple[int, int], int]  # (H, W) -> images
    raw_pixels: dict[int, int]  # raw id -> pixels, over all labels that could be read
    class_images: tuple[int, ...]  # labels that hold each class
    all_ignored: tuple[Path, ...]  # labels without a single pixel of a class
    hashes: dict[Path, str]  # image -> hash of its decoded pixels

    @property
    def class_pixels(self) -> tuple[int, ...]:
        """Pixels of each class."""
        counts: Counter[int] = Counter()
        for raw, pixels in self.raw_pixels.items():
            counts[self.label_table.table[raw]] += pixels
        return tuple(counts[train] for train in range(self.label_table.num_classes))

    @property
    def ignored_pixels(self) -> int:
        """Pixels that count neither in the loss nor in a score."""
        return sum(pixels for raw, pixels in self.raw_pixels.items() if self.label_table.table[raw] == IGNORE)

    @property
    def ids_outside(self) -> dict[int, int]:
        """Raw ids that the table does not know -> pixels."""
        return {raw: pixels for raw, pixels in self.raw_pixels.items() if raw not in self.label_table.allowed_set}

    def as_record(self) -> dict[str, Any]:
        """The figures as plain data."""
        classes = zip(self.label_table.classes, self.class_pixels, self.class_images, strict=True)
        return {
            "pairs": self.num_pairs,
            "unlabelled": self.num_unlabelled,
            "bad": [{"path": str(file.path), "reason": file.reason} for file in self.bad],
            "sizes": {f"{height}x{width}": number for (height, width), number in self.sizes.items()},
            "raw_pixels": {str(raw): pixels for raw, pixels in self.raw_pixels.items()},
            "classes": {name: {"pixels": pixels, "images": images} for name, pixels, images in classes},
            "ignored_pixels": self.ignored_pixels,
            "all_ignored": [str(path) for path in self.all_ignored],
        }


class Twin(NamedTuple):
    """Two image files with the same pixels."""

    split: str
    path: Path
    other_split: str
    other_path: Path


class _Look(NamedTuple):
    """What one pair holds, as far as it could be read."""

    bad: BadFile | None = None
    size: tuple[int, int] | None = None
    pixels_hash: str = ""
    counts: dict[int, int] | None = None


def check_pairs(pairs: Sequence[Pair], label_table: LabelTable, *, progress: bool = True) -> Report:
    """Decode every image and label of a split and report what they hold; bad files are listed, not raised."""
    looks = in_order(lambda index: _look_at(pairs[index], label_table), len(pairs))
    bad, all_ignored, hashes = [], [], {}
    sizes: Counter[tuple[int, int]] = Counter()
    raw_pixels: Counter[int] = Counter()
    class_images = [0] * label_table.num_classes
    for pair, look in zip(pairs, with_progress(looks, len(pairs), "checking files", progress), strict=True):
        if look.bad is not None:
            bad.append(look.bad)
        if look.size is not None:
            sizes[look.size] += 1
            hashes[pair.image] = look.pixels_hash
        if look.counts is None or pair.label is None:
            continue
        raw_pixels.update(look.counts)
        classes = {label_table.table[raw] for raw in look.counts} & set(range(label_table.num_classes))
        for train in classes:
            class_images[train] += 1
        if not classes and look.bad is None:
            all_ignored.append(pair.label)
    return Report(
        label_table=label_table,
        num_pairs=len(pairs),
        num_unlabelled=sum(pair.label is None for pair in pairs),
        bad=tuple(bad),
        sizes=dict(sizes.most_common()),
        raw_pixels=dict(sorted(raw_pixels.items())),
        class_images=tuple(class_images),
        all_ignored=tuple(all_ignored),
        hashes=hashes,
    )


def _look_at(pair: Pair, label_table: LabelTable) -> _Look:
    try:
        image = read_image(pair.image)
    except DataError as error:
        return _Look(BadFile(pair.image, str(error)))
    size = (image.shape[0], image.shape[1])
    pixels_hash = blake2b(image.data, digest_size=16, key=repr(size).encode()).hexdigest()
    if pair.label is None:
        return _Look(None, size, pixels_hash)
    try:
        raw = read_label(pair.label)
        check_sizes(pair, size, (raw.shape[0], raw.shape[1]))
    except DataError as error:
        return _Look(BadFile(pair.label, str(error)), size, pixels_hash)
    counts = count_ids(raw)
    fits = counts.keys() <= label_table.allowed_set
    bad = None if fits else BadFile(pair.label, f"{pair.label}: {label_table.describe_outside(counts)}")
    return _Look(bad, size, pixels_hash, counts)


def find_twins(reports: Mapping[str, Report]) -> list[Twin]:
    """Images with the same pixels, within a split and across splits, in the order of the reports."""
    first: dict[str, tuple[str, Path]] = {}
    twins = []
    for split, report in reports.items():
        for path, pixels_hash in report.hashes.items():
            if pixels_hash in first:
                twins.append(Twin(*first[pixels_hash], split, path))
            else:
                first[pixels_hash] = (split, path)
    return twins


def errors_found(reports: Mapping[str, Report]) -> list[str]:
    """What makes training fail, a sentence each: bad files, and ids outside the table with a diagnosis."""
    found = []
    for split, report in reports.items():
        if report.bad:
            found.append(f"{split}: {len(report.bad)} of {report.num_pairs} pairs cannot be used")
        if report.ids_outside:
            found.append(f"{split}: {report.label_table.describe_outside(report.raw_pixels)}")
    return found


def warnings_found(reports: Mapping[str, Report]) -> list[str]:
    """What training would not notice, a sentence each."""
    found = [warning for split, report in reports.items() for warning in _warnings(split, report)]
    twins = find_twins(reports)
    across = [twin for twin in twins if twin.split != twin.other_split]
    within = [twin for twin in twins if twin.split == twin.other_split]
    for what, which in (("in two splits", across), ("twice in one split", within)):
        if which:
            shown = (f"{twin.split} {twin.path.name} = {twin.other_split} {twin.other_path.name}" for twin in which)
            found.append(f"{len(which)} images occur {what}: {some(shown)}")
    return found


def _warnings(split: str, report: Report) -> list[str]:
    found = []
    if report.all_ignored:
        paths = some(report.all_ignored)
        found.append(f"{split}: {len(report.all_ignored)} labels are ignored everywhere, so teach nothing: {paths}")
    present = {raw for raw, pixels in report.raw_pixels.items() if pixels}
    if not present:
        return found
    if present <= {0, 255} and report.label_table.table[255] == IGNORE:
        found.append(
            f"{split}: the labels hold only 0 and 255, and 255 is ignored: masks saved with 255 for white? "
            "Save them with the ids 0 and 1, or map 255 to a class"
        )
    of_label_ids = all(report.label_table.table[raw] == train for train, raw in enumerate(CITYSCAPES_IDS))
    if of_label_ids and 255 in present and max(present - {255}, default=0) < len(CITYSCAPES_IDS):
        found.append(
            f"{split}: the ids are 0 to 18 and 255: these are Cityscapes labelTrainIds in files named labelIds"
        )
    absent = [name for name, number in zip(report.label_table.classes, report.class_images, strict=True) if not number]
    if absent:
        found.append(f"{split}: {len(absent)} classes occur in no image: {some(absent)}")
    return found
