"""Faults for training processes: small picklable actions that `tools.chaos.start` calls in the process first.

Each changes the process it runs in and nothing else; the product has no switches for faults.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def rank() -> int:
    """Which rank this process is, before anything is set up."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@dataclass(frozen=True)
class AtStep:
    """Does something in the middle of one training step of some ranks: after the forward pass, before the backward."""

    step: int
    act: Callable[[Any], None]
    ranks: Sequence[int] = (0, 1)

    def __call__(self) -> None:
        from dance_seg.module import SegmentationModule

        training_step = SegmentationModule.training_step

        def spoilt(module: Any, batch: Any, batch_idx: int) -> Any:
            loss = training_step(module, batch, batch_idx)
            if module.global_step == self.step and rank() in self.ranks:
                self.act(module)
            return loss

        SegmentationModule.training_step = spoilt  # type: ignore[method-assign]


@dataclass(frozen=True)
class Several:
    """One fault after the other."""

    faults: Sequence[Callable[[], None]]

    def __call__(self) -> None:
        for fault in self.faults:
            fault()


@dataclass(frozen=True)
class Send:
    """A signal to this process, `times` times, or to all of its processes."""

    number: int
    times: int = 1
    everywhere: bool = False

    def __call__(self, module: Any) -> None:
        for _ in range(self.times):
            if self.everywhere:
                os.killpg(0, self.number)
            else:
                os.kill(os.getpid(), self.number)
            time.sleep(0.05)


@dataclass(frozen=True)
class Sleep:
    """A stall."""

    seconds: float

    def __call__(self, module: Any) -> None:
        time.sleep(self.seconds)


def kill(module: Any) -> None:
    """The end, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_once_saved(module: Any) -> None:
    """The end, when the checkpoint of the step before is on the disk."""
    from dance_seg.callbacks import Checkpoints

    next(one for one in module.trainer.callbacks if isinstance(one, Checkpoints)).writer.finish()
    kill(module)


def own_group() -> None:
    """Make the process the head of a group, as a shell does with what it starts."""
    os.setpgrp()


def without_signals() -> None:
    """No flag, no stop at a boundary: signals do what Lightning and the system make of them."""
    from dance_seg.callbacks import StopOnSignal

    StopOnSignal.on_train_start = lambda *_: None  # type: ignore[method-assign,assignment]


def without_agreement() -> None:
    """Each rank follows its own flag alone."""
    import dance_seg.callbacks.stop as stop

    stop.greatest_over_ranks = lambda value, device: value  # type: ignore[assignment]
