"""Steps in which a number is NaN or infinite: passed over on all ranks together, and never for long."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dance_seg.checkpoint import save_checkpoint
from dance_seg.distributed import gather, rank, sum_over_ranks
from dance_seg.errors import NotFiniteError
from dance_seg.machine import write_text

DUMP = "not_finite"
"""The folder, in that of the run, for what a run that was stopped had seen in its last step."""


class FiniteSteps(Callback):
    """Passes over a step of the optimiser whose loss or gradients are not finite on any rank, on all ranks alike.

    Weights, momentum and averaged weights stay as they were, and normalisation statistics go back to those before the
    batch, which may have spoilt them: without that the next validation would be NaN although no weight is. A step in
    which no rank had a labelled pixel teaches nothing and is passed over too, so that momentum moves nothing by
    itself. After `at_most` bad steps in a row, or as soon as a weight is not finite, which no step heals, training
    stops with NotFiniteError, and FOLDER/not_finite/ holds what each rank saw.
    """

    def __init__(self, at_most: int, folder: Path | None = None) -> None:
        self.at_most, self.folder = at_most, folder
        self.in_a_row = self.passed_over = 0
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []  # the same, before the first batch of this step
        self._losses: Tensor | None = None  # summed since then
        self._batch: Any = None
        self._is_new = True  # whether the next batch begins a step: several are one with trainer.accumulate

    def state_dict(self) -> dict[str, int]:
        """How many steps were passed over, and how many of them just now."""
        return {"in_a_row": self.in_a_row, "passed_over": self.passed_over}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where `state_dict` was."""
        self.in_a_row, self.passed_over = int(state_dict["in_a_row"]), int(state_dict["passed_over"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the buffers, which a cut has replaced."""
        self._buffers = list(pl_module.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the statistics of normalisation, which the forward pass changes."""
        self._batch = batch
        if self._is_new:
            self._is_new, self._losses = False, None
            if self._buffers:
                torch._foreach_copy_(self._before, self._buffers)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add up the losses of the batches that make one step, without waiting for the device."""
        losses = getattr(pl_module, "last_losses", None)
        # Of a module that does not keep the losses of the images, every step teaches something.
        here = torch.ones_like(loss) if losses is None else losses.abs().sum()
        # What is added to them, such as a penalty, may be the culprit.
        here = (here + 0 * loss).detach().float()
        self._losses = here if self._losses is None else self._losses + here

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Ask all ranks whether this step is good; where it is not, leave the optimiser nothing to do."""
        self._is_new = True
        pl_module.step_passed_over = False
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        assert self._losses is not None
        # One number that is finite only if all are; gradients whose squares overflow are past saving as well.
        total = torch.stack([*torch._foreach_norm(gradients), self._losses]).sum() if gradients else self._losses
        bad, learnt = sum_over_ranks(torch.stack([~total.isfinite(), self._losses != 0]).float()).tolist()
        if not bad:
            self.in_a_row = 0
        if bad or not learnt:
            self._pass_over(trainer, pl_module, is_bad=bool(bad))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Let go of the batch."""
        self._batch = None

    def _pass_over(self, trainer: Trainer, pl_module: Any, *, is_bad: bool) -> None:
        found = not_finite(pl_module, self._batch) if is_bad else {}
        pl_module.zero_grad(set_to_none=True)  # an optimiser leaves alone what has no gradient
        pl_module.step_passed_over = True
        if not is_bad:
            return
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        self.in_a_row += 1
        self.passed_over += 1
        everywhere = gather(found)
        said = "; ".join(
            f"{'on rank ' + str(number) + ', ' if len(everywhere) > 1 else ''}{told(here)}"
            for number, here in enumerate(everywhere)
            if here
        ) or "the loss"  # fmt: skip
        place = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        hopeless = any("weights" in here for here in everywhere)
        if hopeless or self.in_a_row > self.at_most:
            why = "a weight is not finite, which no step heals" if hopeless else f"{self.in_a_row} steps in a row"
            self._dump(trainer, found)
            raise NotFiniteError(
                f"{place}: NaN or infinity in {said} ({why}); training stopped and nothing of it was saved. "
                f"{self.folder / DUMP if self.folder else 'No folder'} holds what each rank saw; try a smaller "
                "optimizer.lr, trainer.gradient_clip=1.0 or float32, and start again: it goes on from the newest "
                "checkpoint"
            )
        # A run that has many of them says so without filling its log.
        if rank() == 0 and (self.passed_over <= 10 or self.passed_over % 100 == 0):
            warnings.warn(
                f"{place}: NaN or infinity in {said}; the step is passed over ({self.in_a_row} in a row, at most "
                f"{self.at_most}; {self.passed_over} in all)",
                stacklevel=2,
            )

    def _dump(self, trainer: Trainer, found: dict[str, list[str]]) -> None:
        """Write what this rank saw: names for a person, and the batch itself to look into."""
        if self.folder is None:
            return
        place = {"epoch": trainer.current_epoch, "step": trainer.global_step, "rank": trainer.global_rank}
        stem = self.folder / DUMP / f"rank-{trainer.global_rank}"
        batch = self._batch
        names = list(getattr(batch, "names", ()))
        write_text(stem.with_suffix(".json"), json.dumps({**place, "images": names, "not_finite": found}, indent=1))
        if hasattr(batch, "images"):
            save_checkpoint({"images": batch.images.cpu(), "labels": batch.labels.cpu()}, stem.with_suffix(".ckpt"))


def not_finite(pl_module: LightningModule, batch: Any = None) -> dict[str, list[str]]:
    """Where NaN or infinity is, by kind: images, losses, weights, gradients, and statistics; empty where nowhere.

    It looks at every number, so it is for the rare step that is known to be bad.
    """
    names = list(getattr(batch, "names", ()))
    by_image = {"images": getattr(batch, "images", None), "losses": getattr(pl_module, "last_losses", None)}
    found = {
        kind: [name for name, good in zip(names, values.flatten(1).isfinite().all(1).tolist(), strict=True) if not good]
        for kind, values in ((k, v[:, None] if v.ndim == 1 else v) for k, v in by_image.items() if v is not None)
        if len(values) == len(names)
    }
    parameters = list(pl_module.named_parameters())
    found["weights"] = bad_ones(parameters)
    found["gradients"] = bad_ones((name, p.grad) for name, p in parameters if p.grad is not None)
    return {kind: where for kind, where in found.items() if where}


def bad_ones(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that hold NaN or infinity.

    >>> bad_ones([("good", torch.ones(2)), ("bad", torch.tensor([1.0, float("inf")])), ("count", torch.tensor(3))])
    ['bad']
    """
    floating = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    # One pass over each, without a mask of its size, tells the good case.
    if not floating or torch.stack(torch._foreach_norm([tensor for _, tensor in floating])).sum().isfinite():
        return []
    return [name for name, tensor in floating if not tensor.isfinite().all()]


def told(found: dict[str, list[str]]) -> str:
    """The findings of one rank for a person.

    >>> told({"images": ["a.png"], "gradients": ["head.weight", "head.bias"]})
    'images (a.png) and gradients (head.weight and 1 more)'
    """
    each = [f"{kind} ({where[0]}{f' and {len(where) - 1} more' * (len(where) > 1)})" for kind, where in found.items()]
    return " and ".join(each)
