"""Network slimming while a run trains: when a cut is due, and what is renewed after it."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from dance_seg.callbacks.ledger import CostLedger
from dance_seg.cost.macs import count_macs
from dance_seg.distributed import share_buffers
from dance_seg.early_exit.exits import recalibrate
from dance_seg.machine import write_text
from dance_seg.module import write_figures
from dance_seg.network_slimming.importance import channels_to_keep
from dance_seg.network_slimming.schedule import MaskDistance, NetworkSlimming, planned_cuts
from dance_seg.network_slimming.slim import Size, channel_scores, size_of, slimmable
from dance_seg.network_slimming.widths import layer_widths, widths_record


class NetworkCuts(Callback):
    """Lets the module cut its network before the first batch of an epoch in which a cut is due.

    A cut is a function of the state at the end of an epoch, so a run that is resumed there makes the same one. After
    it the optimiser steps on the smaller tensors, and the DDP wrapper and the ledger's counts are made anew.
    """

    def __init__(
        self,
        options: NetworkSlimming,
        input_size: tuple[int, int],
        epochs: int,
        seed: int,
        ledger: CostLedger,
        images: Callable[[], Iterable[Tensor]],
        labelled: Callable[[], Iterable[tuple[Tensor, Tensor]]],
        folder: Path | None = None,
        tracker: Any = None,
    ) -> None:
        self.options, self.input_size, self.epochs, self.seed = options, input_size, epochs, seed
        self.ledger, self.images, self.labelled = ledger, images, labelled
        self.folder, self.tracker = folder, tracker
        self.planned = planned_cuts(options, epochs)
        self.full: Size | None = None
        self.cut_in: list[int] = []  # the epochs before which a cut was made
        self.widths: dict[str, int] = {}  # of the full network's layers
        self.history: list[dict[str, Any]] = []  # what each cut left
        self.masks = MaskDistance()
        self.settled = False

    def state_dict(self) -> dict[str, Any]:
        """The full size that shares are taken of, the cuts made, and the masks of the last epochs."""
        return {
            "full": asdict(self.full) if self.full else None,
            "widths": dict(self.widths),
            "cut_in": list(self.cut_in),
            "history": [dict(cut) for cut in self.history],
            "masks": list(self.masks.masks),
            "settled": self.settled,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was."""
        self.full = Size(**state_dict["full"]) if state_dict["full"] else None
        self.cut_in = [int(epoch) for epoch in state_dict["cut_in"]]
        self.widths = {str(name): int(width) for name, width in state_dict["widths"].items()}
        self.history = [dict(cut) for cut in state_dict["history"]]
        self.masks, self.settled = MaskDistance(state_dict["masks"]), bool(state_dict["settled"])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the measure of the full network, once."""
        self._prepare(pl_module)
        if self.full is None:
            full = size_of(pl_module.model, self.options, self.input_size, self.groups)
            # A latency is that which rank 0 has measured.
            self.full = trainer.strategy.broadcast(full) if trainer.world_size > 1 else full
            self.widths = layer_widths(pl_module.model)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Cut when a cut is due, and has not been made by the run that is resumed."""
        epoch = trainer.current_epoch
        share = self.due(epoch)
        if share is not None:
            self.cut_in.append(epoch)
            self._cut(trainer, pl_module, share)

    def due(self, epoch: int) -> float | None:
        """The share that is to be left before an epoch begins; None when no cut is due."""
        if epoch in self.cut_in:
            return None
        if self.options.schedule == "progressive":
            return next((cut.share for cut in self.planned if cut.epoch == epoch), None)
        late = epoch / self.epochs >= self.options.end - 1e-9
        return self.options.keep if not self.cut_in and epoch and (self.settled or late) else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Compare this epoch's mask with those before it, where the masks decide when to cut."""
        progress = (trainer.current_epoch + 1) / self.epochs
        if self.options.schedule != "mask_distance" or self.cut_in or progress < self.options.start:
            return
        began = time.perf_counter()
        share_buffers(pl_module.model)
        passes = pl_module.passes(self._charged_labelled) if self.options.importance == "taylor" else None
        scores = channel_scores(pl_module.model, self.groups, self.options, self.input_size, self.seed, passes)
        pl_module.model.zero_grad()
        kept = channels_to_keep(self.groups.groups, scores, self.options.keep, scope=self.options.scope, round_to=1)
        mask = np.concatenate(
            [np.isin(np.arange(group.channels), stay) for group, stay in zip(self.groups, kept, strict=True)]
        )
        self.settled = self.masks.settled(mask)
        self.ledger.charge_seconds("cuts", time.perf_counter() - began)

    def _charged_labelled(self) -> Iterable[tuple[Tensor, Tensor]]:
        return self.ledger.charged("cuts", self.labelled(), backward=True)

    def _prepare(self, pl_module: Any) -> None:
        """Find what can be cut next; the penalty prepares those channels, and ends with the last cut."""
        self.groups = slimmable(pl_module.model, self.options, self.input_size)
        all_made = len(self.cut_in) >= (len(self.planned) if self.planned else 1)
        pl_module.set_sparsity(0.0 if all_made else self.options.sparsity, self.groups)

    def _cut(self, trainer: Trainer, pl_module: Any, share: float) -> None:
        began = time.perf_counter()
        share_buffers(pl_module.model)  # scores may depend on them, and all ranks must cut alike
        pl_module.slim(
            self.options,
            share=share,
            input_size=self.input_size,
            full=self.full,
            seed=self.seed + trainer.current_epoch,
            labelled=self._charged_labelled if self.options.importance == "taylor" else None,
        )
        self.ledger.renew(pl_module.model)
        images = self.ledger.charged("cuts", self.images())
        recalibrate(pl_module.model, (batch.to(pl_module.device) for batch in images))
        renew = getattr(trainer.strategy, "renew", None)
        if renew is not None:
            renew()
        self._prepare(pl_module)
        macs = count_macs(pl_module.model, self.input_size).macs
        assert self.full is not None
        figures = {
            "slim/macs": macs / self.full.macs,
            "slim/channels": sum(group.channels for group in self.groups) / self.full.channels,
            "slim/gmacs": macs / 1e9,
            "slim/parameters": sum(parameter.numel() for parameter in pl_module.model.parameters()),
        }
        write_figures(pl_module, figures)
        rank_zero_info(
            f"epoch {trainer.current_epoch}: the network was cut to {figures['slim/macs']:.2f} of its MACs and "
            f"{figures['slim/channels']:.2f} of its channels"
        )
        self.history.append({"epoch": trainer.current_epoch, **{key[5:]: value for key, value in figures.items()}})
        record = widths_record(pl_module.model, self.widths) | {"cuts": self.history}
        if self.folder is not None and trainer.is_global_zero:
            write_text(self.folder / "widths.json", json.dumps(record, indent=1) + "\n")
        if self.tracker is not None:
            shares = np.array([now / full for full, now in record["layers"].values()])
            self.tracker.log_histogram("slim/kept_of_each_layer", shares, trainer.global_step)
        self.ledger.charge_seconds("cuts", time.perf_counter() - began)
