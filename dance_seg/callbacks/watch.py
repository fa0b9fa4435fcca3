"""Tells the heartbeat where training is."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from dance_seg.heartbeat import Heartbeat


class Moves(Callback):
    """Every batch that is finished, and every change of what is done, is a sign of life; the first in the list."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch begins, with a cut of the network perhaps."""
        self.heartbeat.moved("beginning an epoch", trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is here."""
        self.heartbeat.moved("training", trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The step is done."""
        self.heartbeat.moved("waiting for a batch", trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Statistics may be re-estimated first."""
        self.heartbeat.moved("beginning a validation", trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """An image was scored."""
        self.heartbeat.moved("validating", trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Figures are summed up and the state is saved."""
        self.heartbeat.moved("ending an epoch", trainer.global_step)
