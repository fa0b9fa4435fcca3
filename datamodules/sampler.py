"""Same-scale batches: which images form each step of an epoch, equal for any number of workers and ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dance_seg.data_slimming.plan import DataSlimming, Plan, plan, scaled_size
from dance_seg.randomness import Stream, generator
from dance_seg.sample import Draw


@dataclass(frozen=True)
class Group:
    """One global batch: image indices (n,), which of them come a second time, and their common scale."""

    images: np.ndarray
    again: np.ndarray
    scale: int


@dataclass(frozen=True)
class EpochSummary:
    """What an epoch will do, known before it starts."""

    epoch: int
    progress: float
    steps: int
    images_offered: int
    images_paid: int
    images_dropped: int
    images_carried: int  # left over at the largest scale, served in the next epoch
    pixels: int
    images_per_scale: tuple[int, ...]


class SameScaleBatches:
    """A batch sampler whose batches hold images of one scale, the same on every rank at the same step.

    `batch_size` counts the images of all ranks together; a rank takes its equal slice of each global batch, so the
    batches do not depend on the number of ranks. Yields lists of Draw. One epoch offers every image once. What is
    left at a scale joins the next larger one; what is left at the largest is carried into the next epoch.

    Raises ValueError when the batch does not divide among the ranks, leaves one image to a rank, or exceeds the set.
    """

    def __init__(
        self,
        quantiles: np.ndarray | Sequence[float],
        options: DataSlimming | None,
        *,
        crop: tuple[int, int],
        stride: int,
        batch_size: int,
        epochs: int,
        seed: int,
        rare: np.ndarray | None = None,
        num_ranks: int = 1,
        rank: int = 0,
    ) -> None:
        self.quantiles = np.asarray(quantiles, dtype=np.float64)
        num_images = len(self.quantiles)
        self.batch_size, self.epochs, self.seed = batch_size, epochs, seed
        self.share(num_ranks, rank)
        if batch_size > num_images:
            raise ValueError(f"batch_size {batch_size} exceeds the {num_images} training images; make it smaller")
        self.options = options
        self.rare = np.zeros(num_images, bool) if rare is None else rare
        scales = options.scales if options else (1.0,)
        self.sizes = [scaled_size(crop, scale, stride) for scale in scales]
        by_pixels = options is not None and options.batch_by == "pixels"
        # Multiples of batch_size, so that a batch divides among as many ranks whatever its scale.
        self.images_per_batch = [batch_size * (int(1 / scale**2) if by_pixels else 1) for scale in scales]
        self.epoch, self.start = 0, 0
        self._carried: list[np.ndarray] = [np.empty(0, np.int64)]
        self.schedule = [self._summarise(epoch) for epoch in range(epochs)]

    def share(self, num_ranks: int, rank: int) -> None:
        """Yield the slice of every global batch that belongs to one rank of several."""
        if self.batch_size % num_ranks or self.batch_size < 2 * num_ranks:
            raise ValueError(
                f"batch_size {self.batch_size} counts the images of all ranks: it must divide by the {num_ranks} ranks "
                f"and leave each at least 2 (BatchNorm needs two); the nearest is "
                f"{max(2, round(self.batch_size / num_ranks)) * num_ranks}"
            )
        self.num_ranks, self.rank = num_ranks, rank

    def plan(self, epoch: int) -> Plan:
        """What the epoch does with each image."""
        num_images = len(self.quantiles)
        if self.options is None:
            return Plan(np.zeros(num_images, np.int64), np.ones(num_images), np.ones(num_images, bool))
        return plan(
            self.quantiles,
            self.options,
            progress=epoch / self.epochs,
            seed=self.seed,
            epoch=epoch,
            rare_N=self.rare,
        )

    def groups(self, epoch: int) -> list[Group]:
        """The epoch's global batches, in order."""
        return self._grouped(epoch, self.plan(epoch))[0]

    def _grouped(self, epoch: int, chosen: Plan) -> tuple[list[Group], np.ndarray]:
        carried, keep = self._carried[epoch], chosen.keep
        missing = self.batch_size - len(carried) - int(keep.sum())
        if missing > 0:  # dropping must not leave an epoch without a step: the most complex of the dropped come back
            dropped = np.flatnonzero(~keep)
            keep = keep.copy()
            keep[dropped[np.argsort(self.quantiles[dropped], kind="stable")[::-1][:missing]]] = True
        images = np.concatenate([carried, np.flatnonzero(keep)])
        again = np.arange(len(images)) < len(carried)
        order = generator(self.seed, Stream.ORDER, epoch).permutation(len(images))
        images, again = images[order], again[order]
        groups, rest = [], np.empty(0, np.int64)  # rest: positions in `images`
        for scale, count in enumerate(self.images_per_batch):
            pool = np.concatenate([rest, np.flatnonzero(chosen.scale[images] == scale)])
            full = len(pool) // count * count
            groups += [Group(images[part], again[part], scale) for part in pool[:full].reshape(-1, count)]
            rest = pool[full:]
        shuffled = generator(self.seed, Stream.BATCHES, epoch).permutation(len(groups))
        return [groups[i] for i in shuffled], images[rest]

    def _summarise(self, epoch: int) -> EpochSummary:
        chosen = self.plan(epoch)
        groups, rest = self._grouped(epoch, chosen)
        self._carried.append(rest)
        paid = [0] * len(self.sizes)
        for group in groups:
            paid[group.scale] += len(group.images)
        return EpochSummary(
            epoch=epoch,
            progress=epoch / self.epochs,
            steps=len(groups),
            images_offered=len(self.quantiles),
            images_paid=sum(paid),
            # by the books: offered + carried in = paid + dropped + carried out
            images_dropped=len(self.quantiles) + len(self._carried[epoch]) - sum(paid) - len(rest),
            images_carried=len(rest),
            pixels=sum(n * height * width for n, (height, width) in zip(paid, self.sizes, strict=True)),
            images_per_scale=tuple(paid),
        )

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Go to batch `start` of `epoch`; the next iteration yields what is left of that epoch."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches that the next iteration yields."""
        return self.schedule[self.epoch].steps - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        chosen = self.plan(self.epoch)
        groups, _ = self._grouped(self.epoch, chosen)
        total = sum(len(group.images) for group in groups)
        before = 0
        for number, group in enumerate(groups):
            progress = (self.epoch + before / total) / self.epochs
            before += len(group.images)
            if number < self.start:
                continue
            share = len(group.images) // self.num_ranks
            mine = slice(self.rank * share, (self.rank + 1) * share)
            size = self.sizes[group.scale]
            yield [
                Draw(int(i), size, float(chosen.weight[i]), self.epoch, int(again), progress)
                for i, again in zip(group.images[mine], group.again[mine], strict=True)
            ]
