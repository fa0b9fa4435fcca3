"""Which checkpoints a run keeps, and which of them a reader takes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from dance_seg.background import BackgroundWriter
from dance_seg.callbacks.finite import bad_ones
from dance_seg.checkpoint import load_checkpoint, newest_valid
from dance_seg.errors import NotFiniteError

LOOK_EVERY = 8  # steps between two looks at the clock, which ranks have to agree on


class Checkpoints(Callback):
    """Saves the newest state every few minutes and after each validation, and the best validated one in the tail.

    Files are written while training goes on; what failed is raised after the next step, and at the end of training
    all of them are on the disk. Two of the newest are kept, so that one is always whole. A checkpoint is never written
    between the last batch of an epoch and its validation: a run killed there does the last steps again rather than
    lose the figures.
    """

    def __init__(
        self,
        folder: Path,
        every_minutes: float,
        may_choose: Callable[[int], bool],
        record: dict[str, Any],
        writer: BackgroundWriter,
    ) -> None:
        self.folder, self.writer = folder, writer
        self.every_seconds = every_minutes * 60
        self.may_choose = may_choose
        self.record = record  # what a reader of the checkpoint needs: recipe, labels, complexity table
        self.best_miou: float | None = None
        self._saved_at = time.monotonic()
        self._saved_step = -1

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best_miou": self.best_miou}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best score of the run that is resumed."""
        self.best_miou = state_dict["best_miou"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put in what a reader of the checkpoint needs; NaN and infinity are never saved."""
        averaged = checkpoint.get("average", {}).get("state_dict", {})
        bad = bad_ones([*checkpoint["state_dict"].items(), *averaged.items()])
        if bad:
            raise NotFiniteError(
                f"{self.folder}: not saved: {bad[0]} ({len(bad)} tensors in all) holds NaN or infinity after step "
                f"{trainer.global_step}; what was saved before is untouched. Try a smaller optimizer.lr, "
                "trainer.gradient_clip=1.0 or float32, and start again"
            )
        checkpoint["dance_seg"] = self.record

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch is validated whatever `validate_every` says."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save between two steps of the optimiser when it is time.

        Not at the end of a step: what that has measured is logged after every callback, and a run that was killed in
        between would have the step and lack its figures.
        """
        self.writer.check()
        steps, waiting = divmod(batch_idx, trainer.accumulate_grad_batches)  # gradients that wait are not saved
        looked_at = steps % LOOK_EVERY == 0 or not self.every_seconds
        if steps and looked_at and not waiting and self._is_due(trainer):
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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is on the disk before anybody reads it."""
        self._finish(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        due = time.monotonic() - self._saved_at >= self.every_seconds
        # One clock decides for all, or ranks would wait for one another.
        return bool(trainer.strategy.broadcast(due)) if trainer.world_size > 1 else due

    def save(self, trainer: Trainer) -> None:
        """Write the newest state; when it is whole the third newest goes."""
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt", weights_only=False)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def save_now(self, trainer: Trainer) -> None:
        """Write the newest state unless it is written already, and wait until it is on the disk."""
        if self._saved_step != trainer.global_step:
            self.save(trainer)
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        self.writer.finish()
        trainer.strategy.barrier("checkpoints are written")  # or another rank's end would end the one that writes


def checkpoint_of(folder: Path, choice: str) -> tuple[Path, dict[str, Any]]:
    """The `best`, the `last` or a named checkpoint of a run folder, with what it holds.

    Raises CheckpointError or ValueError when there is none or it is damaged.
    """
    if choice == "best" and (folder / "best.ckpt").is_file():
        return folder / "best.ckpt", load_checkpoint(folder / "best.ckpt")
    if choice in ("best", "last"):
        found = newest_valid(folder, "step-*.ckpt")
        if found is None:
            raise ValueError(f"{folder} holds no checkpoint; train first: python -m tools.train RECIPE")
        return found
    path = Path(choice)
    if not path.exists():
        there = ", ".join(sorted(str(one) for one in folder.glob("*.ckpt")))
        raise ValueError(f"{choice}: no such checkpoint; give best, last or one of {there or 'none: train first'}")
    return path, load_checkpoint(path)
