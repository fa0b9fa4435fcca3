"""What happens around the training step: exact resuming, the ledger, re-estimated statistics, checkpoints."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.checkpoint import load_checkpoint
from dance_seg.cost.ledger import Ledger, MacsPerSize, merge_ranks
from dance_seg.cost.macs import Cost, count_macs
from dance_seg.distributed import gather, rank
from dance_seg.machine import write_text
from dance_seg.module import write_figures
from dance_seg.normalise import denormalise
from dance_seg.randomness import Stream, seed_torch
from dance_seg.sample import Batch

LOOK_EVERY = 8  # steps between two looks at the clock, which ranks have to agree on


class ExactResume(Callback):
    """Makes a resumed run go on exactly where it was, for any LightningModule with SameScaleBatches.

    The place in training is two integers, epoch and batch. Every step seeds torch from (seed, epoch, batch, rank), so
    there is no generator state to keep. Lightning's own counters for a broken epoch are replaced in the checkpoint by
    those of a run at the start of the epoch; the data then offers the rest of it (`set_position`).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch, self.batch = 0, 0

    def state_dict(self) -> dict[str, int]:
        """The place in training."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to a place in training."""
        self.epoch, self.batch = int(state_dict["epoch"]), int(state_dict["batch"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count batches from the start of the epoch, unless it is the one resumed."""
        if trainer.current_epoch != self.epoch:
            self.epoch, self.batch = trainer.current_epoch, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed dropout and its like for this step of this rank."""
        seed_torch(self.seed, Stream.STEP, self.epoch, self.batch, trainer.global_rank)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """One batch further."""
        self.batch += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next epoch begins."""
        self.epoch, self.batch = trainer.current_epoch + 1, 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write Lightning's counters as if this epoch had just begun."""
        loops = checkpoint["loops"]["fit_loop"]
        epochs = dict.fromkeys(("ready", "started", "processed", "completed"), self.epoch)
        loops["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}
        batches = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
        progress = loops["epoch_loop.batch_progress"]
        done = progress["total"]["ready"]
        progress.update(total=dict.fromkeys(progress["total"], done), current=batches, is_last_batch=False)
        steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for counter in (steps["step"], steps["zero_grad"]):
            counter["current"] = dict.fromkeys(counter["current"], 0)


class CostLedger(Callback):
    """Keeps the ledger: what each step costs at its true size, and what the run's overheads cost."""

    def __init__(self, folder: Path | None) -> None:
        self.ledger = Ledger()
        self.folder = folder
        self._macs: MacsPerSize | None = None
        self._mark = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The ledger of all ranks together, as plain data; every rank takes part."""
        return merge_ranks(gather(self.ledger)).as_record()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The ledger of the run that is resumed: rank 0 goes on with what all ranks had spent."""
        self.ledger = Ledger.from_record(state_dict) if rank() == 0 else Ledger()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Charge what came before the first step, once."""
        self._macs = MacsPerSize(pl_module.model)
        if trainer.global_step == 0:
            for kind, seconds in trainer.datamodule.charges.items():  # type: ignore[attr-defined]
                self.ledger.add(kind, seconds=seconds)
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Charge a step: MACs at its size, and the seconds since the last one, waiting for data included."""
        assert self._macs is not None
        images, (height, width) = len(batch.weights), batch.images.shape[-2:]
        cost = self._macs((height, width))
        now = time.perf_counter()
        self.ledger.add_step(
            images=images,
            pixels=images * height * width,
            macs_forward=images * cost.forward_macs,
            macs_backward=images * cost.backward_macs,
            seconds=now - self._mark,
            decodes=batch.decodes,
        )
        self._mark = now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is timed apart."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no training cost."""
        self._mark = time.perf_counter()
        self.ledger.add("validation", seconds=self._mark - self._validation_began)

    def forward_macs(self, size: tuple[int, int]) -> int:
        """MACs of one image's forward pass at a size."""
        assert self._macs is not None
        return self._macs(size).forward_macs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Charge the images that were offered and dropped; write and log the sums."""
        if trainer.is_global_zero:  # the plan is of all ranks together
            summary = trainer.datamodule.schedule[trainer.current_epoch]  # type: ignore[attr-defined]
            self.ledger.add_offered(summary.images_offered)
            self.ledger.add_dropped(summary.images_dropped)
        spent = merge_ranks(gather(self.ledger))
        write_figures(pl_module, spent.summary())
        if self.folder is not None and trainer.is_global_zero:
            cost = count_macs(pl_module.evaluated_model, trainer.datamodule.crop)  # type: ignore[attr-defined]
            write_cost(self.folder / "cost.json", spent, cost)


def write_cost(path: Path, spent: Ledger, cost: Cost) -> None:
    """Write cost.json: what training spent, and what one forward pass costs."""
    record = {
        "training": spent.summary(),
        "inference": {
            "gmacs": cost.macs / 1e9,
            "parameters": cost.parameters,
            "input_size": list(cost.input_size),
            "uncounted": list(cost.uncounted),
        },
    }
    write_text(path, json.dumps(record, indent=2) + "\n")


class PlanInLog(Callback):
    """Logs what each epoch's plan does: images at each scale, dropped and carried; and, to the tracker, histograms."""

    def __init__(self, tracker: Any = None) -> None:
        self.tracker = tracker

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the plan of the epoch that begins."""
        batches = trainer.datamodule.batches  # type: ignore[attr-defined]
        if batches.options is None:
            return
        epoch = trainer.current_epoch
        summary = batches.schedule[epoch]
        figures = {
            f"plan/images_at_{scale:g}": float(count)
            for scale, count in zip(batches.options.scales, summary.images_per_scale, strict=True)
        }
        figures |= {"plan/images_dropped": summary.images_dropped, "plan/images_carried": summary.images_carried}
        write_figures(pl_module, figures)
        if self.tracker is not None:
            chosen, step = batches.plan(epoch), trainer.global_step
            scales = np.asarray(batches.options.scales)[chosen.scale]
            self.tracker.log_histogram("plan/scale", scales[chosen.keep], step)
            self.tracker.log_histogram("plan/weight", chosen.weight[chosen.keep], step)
            self.tracker.log_histogram("plan/complexity_of_dropped", batches.quantiles[~chosen.keep], step)


class ReestimatedStatistics(Callback):
    """Re-estimates BatchNorm statistics on full-resolution training images before a validation that may choose.

    Statistics gathered at small sizes do not fit full images. The cost is charged to the ledger.
    """

    def __init__(self, images: Callable[[], Iterable[Tensor]], due: Callable[[int], bool], ledger: CostLedger) -> None:
        self.images, self.due, self.ledger = images, due, ledger

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Re-estimate, when this validation may choose a checkpoint."""
        if trainer.sanity_checking or (not trainer.training and trainer.state.fn != "fit"):
            return
        if not self.due(trainer.current_epoch):
            return
        began = time.perf_counter()
        macs = 0

        def counted() -> Iterable[Tensor]:
            nonlocal macs
            for images in self.images():
                macs += len(images) * self.ledger.forward_macs((images.shape[-2], images.shape[-1]))
                yield images.to(pl_module.device)

        reestimate_batch_norm(pl_module.evaluated_model, counted())
        pl_module.evaluated_model.eval()
        self.ledger.ledger.add("batch_norm", seconds=time.perf_counter() - began, macs=macs)


class Checkpoints(Callback):
    """Saves the newest state every few minutes and after each validation, and the best validated one in the tail.

    Two of the newest are kept, so that one is always whole. A checkpoint is never written between the last batch of
    an epoch and its validation: a run killed there does the last steps again rather than lose the figures.
    """

    def __init__(self, folder: Path, every_minutes: float, may_choose: Callable[[int], bool], record: dict[str, Any]):
        self.folder = folder
        self.every_seconds = every_minutes * 60
        self.may_choose = may_choose
        self.record = record  # what a reader of the checkpoint needs: recipe, labels, complexity table
        self.best_miou: float | None = None
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best_miou": self.best_miou}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best score of the run that is resumed."""
        self.best_miou = state_dict["best_miou"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put in what a reader of the checkpoint needs."""
        checkpoint["dance_seg"] = self.record

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch is validated whatever `validate_every` says."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when it is time and the optimiser has just stepped."""
        last = batch_idx + 1 >= trainer.num_training_batches
        steps, waiting = divmod(batch_idx + 1, trainer.accumulate_grad_batches)  # gradients that wait are not saved
        looked_at = steps % LOOK_EVERY == 0 or not self.every_seconds
        if looked_at and not waiting and not last and self._is_due(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the best, then save the newest: by time, after a choice, and at the end."""
        validated = (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0  # type: ignore[operator]
        miou = trainer.callback_metrics.get("val/miou")
        chosen = validated and miou is not None and self.may_choose(trainer.current_epoch)
        if chosen and (self.best_miou is None or float(miou) > self.best_miou):  # type: ignore[arg-type]
            self.best_miou = float(miou)  # type: ignore[arg-type]
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=False)
        due = self._is_due(trainer)  # by every rank, since it may ask them all
        if due or validated or trainer.current_epoch + 1 == trainer.max_epochs:
            self.save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        due = time.monotonic() - self._saved_at >= self.every_seconds
        # One clock decides for all, or ranks would wait for one another.
        return bool(trainer.strategy.broadcast(due)) if trainer.world_size > 1 else due

    def save(self, trainer: Trainer) -> None:
        """Write the newest state and let the third newest go."""
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*.ckpt"))[:-2]:
                old.unlink()
        self._saved_at = time.monotonic()


class Pictures(Callback):
    """Keeps the first validation images with label and prediction as PNG files, and shows them to the tracker."""

    def __init__(self, folder: Path, palette: Sequence[tuple[int, int, int]], tracker: Any = None, count: int = 6):
        self.folder, self.palette, self.tracker, self.count = folder, palette, tracker, count
        self._kept: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._kept = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Keep the first few."""
        if not trainer.is_global_zero:
            return
        for name, image, label, prediction in zip(batch.names, batch.images, batch.labels, outputs, strict=True):
            if len(self._kept) < self.count:
                shown = denormalise(image).permute(1, 2, 0).cpu().numpy()
                self._kept.append((name, shown, label.cpu().numpy().astype(np.uint8), prediction.cpu().numpy()))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write them."""
        if not trainer.is_global_zero or not self._kept:
            return
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        # All 256 colours: with fewer Pillow writes 4 bits a pixel, and an ignored 255 becomes 15.
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self.palette)] = self.palette
        for number, (name, image, label, prediction) in enumerate(self._kept):
            stem = f"{number}_{Path(name).name}"
            Image.fromarray(image).save(self.folder / f"{stem}_image.png")
            for kind, indices in (("label", label), ("prediction", prediction)):
                picture = Image.fromarray(indices.astype(np.uint8), mode="P")
                picture.putpalette(palette.tobytes())
                picture.save(self.folder / f"{stem}_{kind}.png")
        if self.tracker is not None:
            _, images, labels, predictions = zip(*self._kept, strict=True)
            masks = {"prediction": predictions, "label": labels}
            self.tracker.log_images("val/pictures", images, masks, pl_module.classes, step=trainer.global_step)


def checkpoint_of(folder: Path, choice: str) -> tuple[Path, dict[str, Any]]:
    """The `best`, the `last` or a named checkpoint of a run folder, with what it holds.

    Raises CheckpointError or ValueError when there is none or it is damaged.
    """
    from dance_seg.checkpoint import newest_valid

    if choice == "best" and (folder / "best.ckpt").is_file():
        return folder / "best.ckpt", load_checkpoint(folder / "best.ckpt")
    if choice in ("best", "last"):
        found = newest_valid(folder, "step-*.ckpt")
        if found is None:
            raise ValueError(f"{folder} holds no checkpoint; train first: python -m tools.train RECIPE")
        return found
    path = Path(choice)
    return path, load_checkpoint(path)
