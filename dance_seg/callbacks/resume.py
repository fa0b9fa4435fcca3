"""Resuming exactly where a run was."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from dance_seg.distributed import gather
from dance_seg.errors import CheckpointError
from dance_seg.randomness import Stream, seed_torch


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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ranks that found different checkpoints, on storage that lags behind, must not average their gradients."""
        places = gather((self.epoch, self.batch))
        if len(set(places)) > 1:
            told = "; ".join(f"rank {rank}: epoch {epoch}, batch {batch}" for rank, (epoch, batch) in enumerate(places))
            raise CheckpointError(
                f"{trainer.default_root_dir}: the ranks go on from different checkpoints ({told}); the run's folder "
                "must be on storage that all of them see alike. Start again, or move the newest checkpoint away"
            )

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
        done = progress["total"]["completed"]
        progress.update(total=dict.fromkeys(progress["total"], done), current=batches, is_last_batch=False)
        # The step that figures are logged at; Lightning counts it up after its hooks, so it lags behind in all of them.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step
        steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for counter in (steps["step"], steps["zero_grad"]):
            counter["current"] = dict.fromkeys(counter["current"], 0)
