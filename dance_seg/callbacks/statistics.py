"""BatchNorm statistics that fit what is about to be judged."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from pytorch_lightning import Callback, Trainer
from torch import Tensor

from dance_seg.callbacks.ledger import CostLedger
from dance_seg.distributed import share_buffers
from dance_seg.early_exit.exits import recalibrate


class ReestimatedStatistics(Callback):
    """Before a validation every rank gets the statistics of BatchNorm of rank 0, which are those that are saved.

    Before one that may choose they are re-estimated on full-resolution training images, of every exit: statistics
    gathered at small sizes do not fit full images. The cost is charged to the ledger.
    """

    def __init__(self, images: Callable[[], Iterable[Tensor]], due: Callable[[int], bool], ledger: CostLedger) -> None:
        self.images, self.due, self.ledger = images, due, ledger

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Re-estimate, when this validation may choose a checkpoint."""
        if trainer.sanity_checking or (not trainer.training and trainer.state.fn != "fit"):
            return
        if pl_module.evaluated_model is not pl_module.model:
            share_buffers(pl_module.evaluated_model)
        share_buffers(pl_module.model)
        if not self.due(trainer.current_epoch):
            return
        began = time.perf_counter()
        images = self.ledger.charged("batch_norm", self.images())
        recalibrate(pl_module.evaluated_model, (batch.to(pl_module.device) for batch in images))
        pl_module.evaluated_model.eval()
        self.ledger.ledger.add("batch_norm", seconds=time.perf_counter() - began)
