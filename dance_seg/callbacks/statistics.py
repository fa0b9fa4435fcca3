"""BatchNorm statistics that fit what is about to be judged."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from pytorch_lightning import Callback, Trainer
from torch import Tensor

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.callbacks.ledger import CostLedger


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
        images = self.ledger.charged("batch_norm", self.images())
        reestimate_batch_norm(pl_module.evaluated_model, (batch.to(pl_module.device) for batch in images))
        pl_module.evaluated_model.eval()
        self.ledger.ledger.add("batch_norm", seconds=time.perf_counter() - began)
