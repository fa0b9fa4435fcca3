"""The LightningDataModule that every data set shares: splits, cache, complexity, plan, loaders."""

import os
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from dance_seg.data_slimming.adaptive import AdaptiveResolution
from dance_seg.data_slimming.complexity import quantiles
from dance_seg.data_slimming.plan import DataSlimming, rare_images, scaled_size
from dance_seg.normalise import normalise
from dance_seg.randomness import Stream, generator
from dance_seg.sample import IGNORE, Batch, Sample
from datamodules.complexity_table import ComplexityTable, complexity_table
from datamodules.decoded_cache import open_cache
from datamodules.image_files import MAX_PIXELS
from datamodules.label_table import LabelTable
from datamodules.sampler import EpochSummary, SameScaleBatches
from datamodules.sources import Pair
from datamodules.transforms import Augmentation, EvaluationImages, NothingToCount, TrainingImages, worker_init
from datamodules.workers import Batches, Order, WatchedSource


class Source(Protocol):
    """Decoded images in a fixed order, with train ids as labels."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def load(self, index: int) -> Sample:
        """The image and label of one index."""
        ...


class SegmentationDataModule(LightningDataModule):
    """Train and validation images of one data set; data slimming's plan decides what an epoch offers.

    crop: (H, W) of a training image at full resolution. batch_size: images of all devices together. resolution: the
    images are used at this fraction of their size, while scores are always taken at the labels' own. hold_out: a
    drive, a list or a fraction of train taken away from training and validated on. validate_on: the split to validate
    on; "auto" is what was held out, or else val. cache_gb: size of the store of decoded images, outside the data.
    worker_timeout: seconds that a worker may take for a batch before it is ended and started anew.
    """

    def __init__(
        self,
        *,
        crop: tuple[int, int] = (352, 480),
        batch_size: int = 8,
        workers: int = 0,
        random_scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        color: float = 0.0,
        resolution: float = 1.0,
        hold_out: str | float | list[str] | None = None,
        validate_on: Literal["auto", "held_out", "train", "val", "test"] = "auto",
        bad_files: Literal["error", "quarantine"] = "error",
        bad_files_cap: float = 0.01,
        cache_gb: float = 8.0,
        cache_dir: str | None = None,
        statistics_images: int = 64,
        worker_timeout: float = 300.0,
    ) -> None:
        super().__init__()
        self.crop = _size(crop, "data.args.crop")
        self.batch_size = _whole(batch_size, "data.args.batch_size", 2)
        self.workers = _whole(workers, "data.args.workers", 0)
        self.worker_timeout = _number(worker_timeout, "data.args.worker_timeout", 1, 1e6)
        low, high = _pair(random_scale, "data.args.random_scale")
        self.resolution = _number(resolution, "data.args.resolution", 0.05, 1.0)
        self.augmentation = Augmentation(
            random_scale=(low * self.resolution, high * self.resolution),
            flip=_number(flip, "data.args.flip", 0, 1),
            color=_number(color, "data.args.color", 0, 1),
        )
        self.held = hold_out
        if validate_on not in ("auto", "held_out", "train", "val", "test"):
            raise ValueError(f"data.args.validate_on is {validate_on!r}; choose auto, held_out, train, val or test")
        if validate_on == "held_out" and hold_out is None:
            raise ValueError("data.args.validate_on is held_out but data.args.hold_out names nothing to hold out")
        self.validate_on = validate_on if validate_on != "auto" else ("held_out" if hold_out is not None else "val")
        if bad_files not in ("error", "quarantine"):
            raise ValueError(f"data.args.bad_files is {bad_files!r}; choose error or quarantine")
        self.bad_files, self.bad_files_cap = bad_files, _number(bad_files_cap, "data.args.bad_files_cap", 0, 1)
        self.cache_gb = _number(cache_gb, "data.args.cache_gb", 0, 1e6)
        if cache_dir is not None and not isinstance(cache_dir, str | Path):
            raise ValueError(f"data.args.cache_dir is {cache_dir!r}; name a folder, or null for the default")
        default = os.environ.get("DANCE_SEG_CACHE") or Path.home() / ".cache" / "dance_seg"
        self.cache_folder = Path(cache_dir or default).expanduser()
        self.statistics_images = _whole(statistics_images, "data.args.statistics_images", 2)
        # Set by `fit_to`, which every run calls before training.
        self.data_slimming: DataSlimming | None = None
        self.epochs, self.seed, self.stride = 1, 0, 32
        self.charges: dict[str, float] = {}  # seconds spent on preparing, by kind, for the ledger
        self._sources: dict[str, Source] = {}
        self._normalised: dict[torch.Size, Tensor] = {}

    # What a data set says of itself -------------------------------------------------------------------------------

    @property
    def label_table(self) -> LabelTable:
        """The one table from raw label ids to classes."""
        raise NotImplementedError

    def raw_source(self, split: str) -> Source:
        """The images of a split as they are on disk, before caching; split is train, held_out, val or test."""
        raise NotImplementedError

    def sources_for_check(self) -> dict[str, tuple[list[Pair], LabelTable]]:
        """The files of each split that is there, for `tools.check_data`."""
        raise ValueError("this data set is drawn, not read: there are no files to check")

    # What a run says ----------------------------------------------------------------------------------------------

    def fit_to(self, *, stride: int, epochs: int, seed: int, data_slimming: DataSlimming | None) -> None:
        """Tell what the sizes must divide by, and what the plan depends on."""
        self.stride, self.epochs, self.seed, self.data_slimming = stride, epochs, seed, data_slimming

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the order of their train ids."""
        return self.label_table.classes

    def parts(self, split: str) -> frozenset[str]:
        """The data set's own splits from which the images of a split come: only within these do names tell them apart.

        >>> sorted(SegmentationDataModule().parts("val"))
        ['val']
        """
        return frozenset({split})

    def source(self, split: str) -> Source:
        """The images of a split, from the decoded cache; opened once."""
        if split not in self._sources:
            raw = self.raw_source(split)
            if not len(raw):
                raise ValueError(f"the split {split} holds no images")
            began = time.perf_counter()
            cached = open_cache(raw, folder=self.cache_folder, budget_gb=self.cache_gb) if self.cache_gb else raw
            if split == "train":
                self.charges["cache"] = time.perf_counter() - began
            self._sources[split] = cached  # type: ignore[assignment]
        return self._sources[split]

    @cached_property
    def table(self) -> ComplexityTable:
        """The complexity of each training image, scored once."""
        measure = self.data_slimming.measure if self.data_slimming else "spatial_information"
        options: dict[str, Any] = {"seed": self.seed} if measure == "random" else {}
        return complexity_table(self.source("train"), measure, folder=self.table_folder, **options)

    @property
    def table_folder(self) -> Path | None:
        """Where tables of complexity are kept; None where none is."""
        return self.cache_folder / "complexity"

    @cached_property
    def adaptive(self) -> AdaptiveResolution | None:
        """How much smaller each image is shown at inference; None: at full resolution.

        Known of a run that trains; set by whoever has a checkpoint instead.
        """
        if self.data_slimming is None or self.data_slimming.inference == "full":
            return None
        return AdaptiveResolution(self.data_slimming, self.table.values, self.seed)

    def inference_sizes(self, split: str) -> dict[tuple[int, int], float]:
        """The sizes (H, W) that the crop has at inference, with the share of a split's images that have each."""
        if self.adaptive is None:
            return {self.crop: 1.0}
        source = self.source(split)
        scales = [self.adaptive.scale(source.load(i).image, source.names[i]) for i in range(len(source))]
        return {
            scaled_size(self.crop, scale, self.stride): scales.count(scale) / len(scales)
            for scale in sorted(set(scales))
        }

    def prepare_data(self) -> None:
        """Decode and score what is not there yet; one process of each machine does."""
        self.source("train")
        self.source(self.validate_on)
        _say_single_class(self.source("train"), self.classes)
        if self.data_slimming is not None:
            _ = self.table

    def setup(self, stage: str | None = None) -> None:
        """Open the data on every rank."""
        if stage in (None, "fit"):
            self.batches.share(*self._ranks)
            if self.data_slimming is not None:
                # Charged whenever it was paid: an efficiency claim includes its own overhead.
                self.charges["scoring"] = self.table.seconds_decoding + self.table.seconds_scoring

    @cached_property
    def batches(self) -> SameScaleBatches:
        """The batch sampler of the whole run."""
        slimming = self.data_slimming
        quantile_N = quantiles(self.table.values) if slimming else np.zeros(len(self.source("train")))
        rare = None
        if slimming is not None:
            rare = rare_images(self.table.classes_present, slimming.rare_class_images)
            _say_protected(quantile_N < slimming.drop_below, rare)
        return SameScaleBatches(
            quantile_N,
            slimming,
            crop=self.crop,
            stride=self.stride,
            batch_size=self.batch_size,
            epochs=self.epochs,
            seed=self.seed,
            rare=rare,
        )

    @property
    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @property
    def schedule(self) -> list[EpochSummary]:
        """What each epoch will do."""
        return self.batches.schedule

    # Loaders ------------------------------------------------------------------------------------------------------

    @cached_property
    def _train_loader(self) -> tuple[DataLoader, WatchedSource]:
        source = WatchedSource(self.source("train"), self.workers)
        images = TrainingImages(source, self.crop, self.augmentation, self.seed)
        # Workers stay for the next epoch; those of validation end with it.
        return self._loader(images, batch_sampler=self.batches, persistent_workers=self.workers > 0), source

    def train_dataloader(self) -> Batches:
        """What is left of the current epoch; Lightning asks anew each epoch."""
        if self.trainer is not None:
            self.batches.set_position(*_position(self.trainer))
        epoch, start = self.batches.epoch, self.batches.start
        loader, source = self._train_loader
        return Batches(
            loader,
            len(self.batches),
            go_to=lambda given: self.batches.set_position(epoch, start + given),
            source=source,
            patience=self.worker_timeout,
            place=f"epoch {epoch}",
        )

    def val_dataloader(self) -> Batches:
        """Full images, one at a time, each on one rank only: nothing is padded or counted twice."""
        return self.evaluation_loader(self.validate_on)

    def evaluation_loader(self, split: str) -> Batches:
        """The full images of a split."""
        source = WatchedSource(self.source(split), self.workers)
        images = EvaluationImages(source, self.resolution, self.adaptive)
        ranks, rank = self._ranks
        mine: Subset | NothingToCount = Subset(images, range(rank, len(images), ranks))
        if rank >= len(images) > 0:
            mine = NothingToCount(images)
        order = Order(len(mine))
        loader = self._loader(mine, batch_size=None, sampler=order)
        place = f"the split {split}"
        return Batches(loader, len(order), go_to=order.go_to, source=source, patience=self.worker_timeout, place=place)

    def _loader(self, images: Any, **how: Any) -> DataLoader:
        workers = self.workers
        return DataLoader(
            images,
            num_workers=workers,
            worker_init_fn=worker_init if workers else None,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            **how,
        )

    def statistics_batches(self) -> Iterator[Tensor]:
        """Normalised full images of a fixed list of training images, for BatchNorm statistics."""
        waiting: dict[tuple[int, ...], list[Tensor]] = {}
        for batch in self._statistics_images():
            image = batch.images[0]
            alike = waiting.setdefault(tuple(image.shape), [])
            alike.append(image)
            if len(alike) == 4:
                yield normalise(torch.stack(waiting.pop(tuple(image.shape))))
        for alike in waiting.values():
            # BatchNorm after global pooling needs two images; one image twice has the statistics of one.
            yield normalise(torch.stack(alike if len(alike) > 1 else alike * 2))

    def labelled_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised full images (1, 3, H, W) of the same fixed list and their labels (1, H, W), for gradients."""
        for batch in self._statistics_images():
            size = (batch.images.shape[-2], batch.images.shape[-1])
            labels = functional.interpolate(batch.labels[:, None].float(), size=size, mode="nearest")
            yield normalise(batch.images), labels[:, 0].long()

    def _statistics_images(self) -> Iterator[Batch]:
        """This rank's share of a fixed list of training images, full and one at a time; sums are taken over ranks."""
        images = EvaluationImages(self.source("train"), self.resolution, self.adaptive)
        chosen = generator(self.seed, Stream.STATISTICS).permutation(len(images))[: self.statistics_images]
        ranks, rank = self._ranks
        for index in chosen[rank::ranks]:
            yield images[int(index)]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise on the device, where a quarter of the bytes arrived.

        While training on a CPU the images of a batch lie in the memory of the last batch of their size: fresh memory
        costs more than the arithmetic. Whoever keeps images beyond their step copies them.
        """
        training = self.trainer is not None and self.trainer.training and batch.images.device.type == "cpu"
        images = normalise(batch.images, out=self._normalised.get(batch.images.shape) if training else None)
        if training:
            self._normalised[batch.images.shape] = images
        return batch._replace(images=images, labels=batch.labels.long())


def _position(trainer: Any) -> tuple[int, int]:
    """The epoch and the batch to go on with."""
    from dance_seg.callbacks import ExactResume

    for callback in trainer.callbacks:
        if isinstance(callback, ExactResume) and callback.epoch == trainer.current_epoch:
            return callback.epoch, callback.batch
    return trainer.current_epoch, 0


def _say_protected(droppable: np.ndarray, rare: np.ndarray) -> None:
    """Say how many images a rare class keeps from being dropped, loudly when that is most of them."""
    protected, could = int((droppable & rare).sum()), int(droppable.sum())
    if not could:
        return
    said = f"{protected} of the {could} simple images that could be dropped are kept for a rare class"
    if protected > could / 2:
        rank_zero_warn(f"{said}: dropping saves little; lower data_slimming.rare_class_images")
    elif protected:
        rank_zero_info(said)


def _say_single_class(source: Source, classes: Sequence[str], looked_at: int = 8) -> None:
    """Say loudly when some labels from all over the source have one class between them: there is nothing to learn."""
    places = np.unique(np.linspace(0, len(source) - 1, looked_at).round().astype(int))
    found = set().union(*(np.unique(source.load(int(place)).label).tolist() for place in places)) - {IGNORE}
    if len(found) == 1 and len(classes) > 1:
        rank_zero_warn(
            f"the labels of {len(places)} training images hold no class but {classes[found.pop()]}: are the masks "
            "saved with 255 for white, which is ignored? python -m tools.check_data RECIPE looks at all of them"
        )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _whole(value: Any, key: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key} is {value!r}: a whole number, at least {least}")
    return value


def _number(value: Any, key: str, least: float, most: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{key} is {value!r}: a number from {least} to {most}")
    return float(value)


def _pair(value: Any, key: str) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{key} is {value!r}: two numbers, such as [0.5, 2.0]")
    low, high = (_number(item, key, 0.05, 20.0) for item in value)
    if low > high:
        raise ValueError(f"{key} is {list(value)}: the first is at most the second")
    return low, high


def _size(value: Any, key: str) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{key} is {value!r}: height and width, such as [352, 480]")
    height, width = (_whole(item, key, 32) for item in value)
    if height * width > MAX_PIXELS:
        raise ValueError(f"{key} is {value!r}: {height * width:,} pixels, and images have at most {MAX_PIXELS:,}")
    return height, width
