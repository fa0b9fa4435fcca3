"""A run that is asked to end by a signal ends where it can go on."""

import os
import signal
import subprocess
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from dance_seg.callbacks.checkpoints import Checkpoints
from dance_seg.distributed import greatest_over_ranks
from dance_seg.signals import NotedSignals, StoppedBySignal, signal_of

REQUEUE_SECONDS = 30
"""How long SLURM may take to put the job back into its queue."""


class StopOnSignal(Callback):
    """Saves and ends after the step in which SIGTERM, SIGINT or SIGUSR1 came to any rank; the last in the list.

    Ranks agree before every step of the optimiser, so all of them stop after the same one, whichever got the signal.
    Within the last step of an epoch or its validation, the validation is finished first, since its figures belong to
    that epoch. In a job of SLURM, SIGUSR1 (sbatch --signal=USR1@90) also puts the job back into the queue.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.signals = NotedSignals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save; Lightning has put its own handlers in place before."""
        self.signals.__enter__()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From here on nothing looks at signals that are noted."""
        self.signals.__exit__()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop between two steps when a rank was asked to."""
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients that wait are not saved
        urgency = greatest_over_ranks(self.signals.urgency, pl_module.device)
        if urgency:
            self._stop(trainer, urgency)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs; after the last there is nothing left to stop."""
        urgency = greatest_over_ranks(self.signals.urgency, pl_module.device)
        if urgency and trainer.current_epoch + 1 < trainer.max_epochs:  # type: ignore[operator]
            self._stop(trainer, urgency)

    def _stop(self, trainer: Trainer, urgency: int) -> None:
        self.checkpoints.save_now(trainer)
        asked = signal_of(urgency)
        requeued = asked == signal.SIGUSR1 and trainer.is_global_zero and requeue()
        rank_zero_info(
            f"{asked.name}: stopped after step {trainer.global_step}, which is saved in {self.checkpoints.folder}; "
            + ("the job is in the queue again" if requeued else "the same command goes on from there")
        )
        # One rank speaks for all: a launcher takes another rank's status for a failure and kills the rest.
        status = 0 if requeued or not trainer.is_global_zero else None
        raise StoppedBySignal(asked, status=status)


def requeue() -> bool:
    """Put this SLURM job back into its queue; whether that worked. Outside of one there is nothing to do."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=REQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        rank_zero_info(f"scontrol requeue {job} failed: {error}")
        return False
    if done.returncode:
        rank_zero_info(f"scontrol requeue {job} ended with {done.returncode}: {done.stderr.strip()}")
    return done.returncode == 0
