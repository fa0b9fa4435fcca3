"""What data slimming does, in the log."""

from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer

from dance_seg.module import write_figures


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
