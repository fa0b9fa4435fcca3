"""From files to normalised float32 batches: this project's input pipeline beside Pillow, albumentations and DataLoader.

CamVid at 360x480, batch 8, no workers, random scale 0.5 to 2, crop 360x480, flip; no data slimming. Both sides run in
this process, one epoch each in turn. The decoded cache is warm; what it took to build is in the notes.

    python -m tools.bench.pipeline          # DANCE_SEG_CAMVID names the real images; without it scenes are drawn
"""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before albumentations, which asks the network when it is imported

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import albumentations
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dance_seg.cost.latency import interleave
from dance_seg.normalise import MEAN, STD, normalise
from dance_seg.randomness import generator
from dance_seg.sample import IGNORE, Batch, Draw
from datamodules.camvid import VOID, camvid_split
from datamodules.decoded_cache import CachedSource, open_cache
from datamodules.image_files import decodes
from datamodules.sources import FileSource, Pair
from datamodules.transforms import Augmentation, TrainingImages
from tools.bench.common import memory, ratio, write_result
from tools.make_shapes import write_layout

KEY, MEMORY_KEY = "pipeline_vs_reference", "memory_all_over_few_images"
FEW = 48  # images
CROP = (360, 480)
BATCH_SIZE = 8
RANDOM_SCALE = (0.5, 2.0)


class ReferenceImages(Dataset):
    """What most projects write: Pillow opens, albumentations scales, pads, crops, flips and normalises."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        low, high = RANDOM_SCALE
        self.pairs = pairs
        self.transform = albumentations.Compose(
            [
                albumentations.RandomScale((low - 1, high - 1), p=1.0),
                albumentations.PadIfNeeded(*CROP, position="random", border_mode=cv2.BORDER_CONSTANT, fill_mask=VOID),
                albumentations.RandomCrop(*CROP),
                albumentations.HorizontalFlip(p=0.5),
                albumentations.Normalize(mean=MEAN, std=STD),
                ToTensorV2(),
            ]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image, label = np.array(Image.open(pair.image).convert("RGB")), np.array(Image.open(str(pair.label)))
        found = self.transform(image=image, mask=label)
        return found["image"], found["mask"]


class Epochs:
    """A batch sampler with the order of a new epoch each time, as SameScaleBatches has it without data slimming."""

    def __init__(self, num_images: int) -> None:
        self.num_images, self.epoch = num_images, 0

    def __len__(self) -> int:
        return self.num_images // BATCH_SIZE

    def __iter__(self) -> Iterator[list[Draw]]:
        self.epoch += 1
        order = generator(0, self.epoch).permutation(self.num_images).tolist()
        for start in range(0, len(self) * BATCH_SIZE, BATCH_SIZE):
            yield [Draw(index, CROP, epoch=self.epoch) for index in order[start : start + BATCH_SIZE]]


def as_it_is(batch: Batch) -> Batch:
    """Nothing is left to collate."""
    return batch


def reference_loader(pairs: Sequence[Pair]) -> DataLoader:
    """The reference's batches: float32 images and labels."""
    return DataLoader(ReferenceImages(pairs), batch_size=BATCH_SIZE, shuffle=True, drop_last=True, num_workers=0)


def our_loader(source: CachedSource) -> DataLoader:
    """This project's batches: uint8, to be normalised."""
    images = TrainingImages(source, CROP, Augmentation(random_scale=RANDOM_SCALE), seed=0)
    how: dict[str, Any] = {"batch_sampler": Epochs(len(source)), "collate_fn": as_it_is}
    return DataLoader(images, num_workers=0, **how)


def reference_epoch(loader: DataLoader) -> None:
    """All batches, each looked at once."""
    for images, _ in loader:
        assert images.dtype == torch.float32


def our_epoch(loader: DataLoader) -> None:
    """All batches, each normalised into the memory of the one before and looked at once."""
    images = None
    for batch in loader:
        images = normalise(batch.images, out=images)
        assert images.dtype == torch.float32


def memory_growth(source: CachedSource) -> dict[str, float] | None:
    """The process's own memory after epochs over all images, over that after epochs over a few; 1 is no growth.

    Pages of the decoded cache are the file's and the system's, not the process's. None where the system does not tell.
    """
    if not Path("/proc/self/status").is_file():
        return None
    found = []
    for count in (FEW, len(source)):
        images = TrainingImages(source, CROP, Augmentation(random_scale=RANDOM_SCALE), seed=0)
        how: dict[str, Any] = {"batch_sampler": Epochs(count), "collate_fn": as_it_is}
        loader = DataLoader(images, num_workers=0, **how)
        our_epoch(loader)  # grows what is kept for batches of this size
        readings: list[float] = []
        for _ in range(3):
            our_epoch(loader)
            readings.append(memory("RssAnon"))
        found.append(readings)
    return ratio(found[1], found[0])


def describe(images: Tensor, labels: Tensor, ignored: int) -> tuple[float, float, float]:
    """Mean and standard deviation of the normalised pixels that have a label, and the share of those that have none."""
    known = labels != ignored
    pixels = images.permute(0, 2, 3, 1)[known]
    return float(pixels.mean()), float(pixels.std()), float(1 - known.float().mean())


def compare_distributions(reference: DataLoader, ours: DataLoader) -> dict[str, str]:
    """The same three figures over an epoch of each side."""
    theirs = [describe(images, labels, VOID) for images, labels in reference]
    mine = [describe(normalise(batch.images), batch.labels, IGNORE) for batch in ours]

    def mean_of(rows: list[tuple[float, float, float]]) -> str:
        mean, deviation, ignored = (statistics.mean(column) for column in zip(*rows, strict=True))
        return f"pixel mean {mean:.3f}, deviation {deviation:.3f}, unlabelled {ignored:.3f}"

    return {"distribution_reference": mean_of(theirs), "distribution_ours": mean_of(mine)}


def measure(root: Path, cache: Path, runs: int) -> None:
    """Build the cache, run both sides in turn, write the result."""
    pairs, label_table = camvid_split(root, "train")
    start = time.perf_counter()
    source = open_cache(FileSource(pairs, label_table), folder=cache)
    build_seconds = time.perf_counter() - start
    reference, ours = reference_loader(pairs), our_loader(source)
    memory = memory_growth(source)  # before the other side's memory is there
    distributions = compare_distributions(reference, ours)
    before = decodes()
    times = interleave({"reference": lambda: reference_epoch(reference), "ours": lambda: our_epoch(ours)}, runs)
    num_images = len(ours) * BATCH_SIZE
    per_image = {side: statistics.median(seconds) / num_images * 1e3 for side, seconds in times.items()}
    uint8_only = statistics.median(interleave({"bytes": lambda: sum(1 for _ in ours)}, runs)["bytes"])
    notes = {
        "images": f"{num_images} an epoch, {'CamVid train' if 'DANCE_SEG_CAMVID' in os.environ else 'drawn scenes'}",
        "reference_ms_per_image": round(per_image["reference"], 3),
        "ours_ms_per_image": round(per_image["ours"], 3),
        "ours_ms_per_image_before_normalising": round(uint8_only / num_images * 1e3, 3),
        "cache_build_seconds": round(build_seconds, 2),
        "epochs_until_the_cache_pays": round(build_seconds / (num_images * (per_image["reference"] / 1e3)), 2),
        "decodes_while_measured": decodes() - before,
        "padding": "reference: black; ours: reflection; both unlabelled",
        "threads": {"torch": torch.get_num_threads(), "opencv": cv2.getNumThreads()},
        **distributions,
    }
    ratios = {KEY: ratio(times["reference"], times["ours"])} | ({MEMORY_KEY: memory} if memory else {})
    write_result("pipeline", runs, ratios, notes)


def main() -> None:
    """Measure on CamVid, or on scenes drawn in its layout."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=7, help="epochs of each side (default 7)")
    arguments.add_argument("--images", type=int, default=200, help="scenes to draw where CamVid is not there")
    given = arguments.parse_args()
    with TemporaryDirectory() as folder:
        root = os.environ.get("DANCE_SEG_CAMVID")
        if root is None:
            root = f"{folder}/camvid"
            write_layout("camvid", Path(root), 2 * given.images, size=CROP, progress=True)
        measure(Path(root), Path(folder) / "cache", given.runs)


if __name__ == "__main__":
    main()
