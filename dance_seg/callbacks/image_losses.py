"""What each training image's loss was, so that it can be seen beside its complexity."""

import json
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dance_seg.distributed import gather, rank
from dance_seg.machine import write_text
from dance_seg.sample import Batch


class ImageLosses(Callback):
    """Keeps the mean unweighted loss of each image over an epoch and writes FOLDER/image_losses.json at its end.

    The losses are those of the training step, at the size and with the augmentation of that step; nothing is computed
    for them. They stay on the device until the epoch ends, so that no step waits. An image that the epoch dropped has
    none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.epoch = 0
        self._sums: dict[str, tuple[float, int]] = {}  # by image: the sum of its losses, and how many there were
        self._waiting: list[tuple[tuple[str, ...], Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """The losses of the epoch so far, of all ranks together; every rank takes part."""
        sums = self._sums_of_all_ranks()
        names = sorted(sums)
        return {
            "epoch": self.epoch,
            "names": names,
            "losses": [sums[name][0] for name in names],
            "counts": [sums[name][1] for name in names],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The epoch of the run that is resumed: rank 0 goes on with what all ranks had seen."""
        self.epoch, self._waiting = int(state_dict["epoch"]), []
        each = zip(state_dict["names"], state_dict["losses"], state_dict["counts"], strict=True)
        self._sums = {str(name): (float(loss), int(count)) for name, loss, count in each} if rank() == 0 else {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, unless it is the epoch that is resumed."""
        if trainer.current_epoch != self.epoch:
            self.epoch, self._sums, self._waiting = trainer.current_epoch, {}, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Keep the losses of the step."""
        losses = getattr(pl_module, "last_losses", None)
        if losses is not None:
            self._waiting.append((batch.names, losses))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the mean of each image."""
        sums = self._sums_of_all_ranks()
        if not trainer.is_global_zero or not sums:
            return
        names = sorted(sums)
        losses = [float(f"{sums[name][0] / sums[name][1]:.6g}") for name in names]
        write_text(
            self.folder / "image_losses.json", json.dumps({"epoch": self.epoch, "names": names, "losses": losses})
        )

    def _sums_of_all_ranks(self) -> dict[str, tuple[float, int]]:
        self._collect()
        merged: dict[str, tuple[float, int]] = {}
        for sums in gather(self._sums):
            for name, (loss, count) in sums.items():
                before, times = merged.get(name, (0.0, 0))
                merged[name] = before + loss, times + count
        return merged

    def _collect(self) -> None:
        """Bring what waits on the device to the sums; a loss that is not finite counts for nothing."""
        if not self._waiting:
            return
        names = [name for batch, _ in self._waiting for name in batch]
        losses = torch.cat([losses for _, losses in self._waiting]).double()
        self._waiting = []
        for name, loss, good in zip(names, losses.tolist(), losses.isfinite().tolist(), strict=True):
            if good:
                before, times = self._sums.get(name, (0.0, 0))
                self._sums[name] = before + loss, times + 1
