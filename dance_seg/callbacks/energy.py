"""The joules of training, where the machine has a meter."""

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from dance_seg.callbacks.ledger import CostLedger
from dance_seg.cost.energy import SHORTEST_S, EnergyMeter

SAMPLE_SECONDS = 30.0
"""How often counters are read within a stretch: those of processors begin again after a minute or more."""


class TrainingEnergy(Callback):
    """Charges the ledger with the joules between two validations, epochs or checkpoints; stands before it in the list.

    Each rank meters its own GPU; the processors, which its ranks share, are metered by one rank of each machine. A
    stretch too short for the counters goes on into the next, or, before a validation, is left out.
    """

    def __init__(self, ledger: CostLedger) -> None:
        self.ledger = ledger
        self._meter: EnergyMeter | None = None
        self._gpus: tuple[int, ...] = ()
        self._processors = True
        self._began = self._sampled = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own; what was used so far is charged, so that the ledger's state has it."""
        self._charge()
        return {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        device = trainer.strategy.root_device
        self._gpus = (device.index or 0,) if device.type == "cuda" else ()
        self._processors = trainer.local_rank == 0
        self._open()

    def on_train_batch_end(self, *_: Any) -> None:
        """Read the counters now and then, before they begin again."""
        now = time.monotonic()
        if self._meter is not None and now - self._sampled > SAMPLE_SECONDS:
            self._meter.sample()
            self._sampled = now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no training cost."""
        self._charge()
        self._meter = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on counting."""
        self._open()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Charge the epoch, before the ledger writes it down."""
        self._charge()

    def _open(self) -> None:
        if self._gpus or self._processors:
            self._meter = EnergyMeter(self._gpus, processors=self._processors).__enter__()
            self._began = self._sampled = time.monotonic()

    def _charge(self) -> None:
        if self._meter is not None and time.monotonic() - self._began > 1.1 * SHORTEST_S:
            self._meter.__exit__()
            self.ledger.ledger.add_energy(self._meter.joules, self._meter.source)
            self._open()
