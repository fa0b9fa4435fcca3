"""What the run spends, written down while it does."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dance_seg.cost.ledger import Ledger, MacsPerSize, merge_ranks
from dance_seg.cost.macs import Cost, count_macs
from dance_seg.distributed import gather, rank
from dance_seg.machine import write_text
from dance_seg.module import write_figures
from dance_seg.sample import Batch
from dance_seg.supernet.macs import StepMacs, SubnetMacs
from dance_seg.supernet.space import Subnet

Images = TypeVar("Images", Tensor, tuple[Tensor, Tensor])


class CostLedger(Callback):
    """Keeps the ledger: what each step costs at its true size, and what the run's overheads cost."""

    def __init__(self, folder: Path | None) -> None:
        self.ledger = Ledger()
        self.folder = folder
        self._macs: MacsPerSize | None = None
        self._of_subnets: SubnetMacs | None = None  # of a supernet whose networks run one after another
        self._taught_at: dict[tuple[int, int], int] = {}  # MACs of the teacher, by size
        self._inference_sizes: dict[tuple[int, int], float] | None = None
        self._mark = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The ledger of all ranks together, as plain data; every rank takes part."""
        return merge_ranks(gather(self.ledger)).as_record()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The ledger of the run that is resumed: rank 0 goes on with what all ranks had spent."""
        self.ledger = Ledger.from_record(state_dict) if rank() == 0 else Ledger()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Charge what came before the first step, once."""
        self._macs = MacsPerSize(pl_module.model)
        if pl_module.supernet is not None and pl_module.supernet.method != "multi_architectural":
            self._of_subnets = SubnetMacs(pl_module.model)
        if trainer.global_step == 0:
            for kind, seconds in trainer.datamodule.charges.items():  # type: ignore[attr-defined]
                self.ledger.add(kind, seconds=seconds)
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Charge a step: MACs at its size, and the seconds since the last one, waiting for data included."""
        images, (height, width) = len(batch.weights), batch.images.shape[-2:]
        cost = self._step_macs(pl_module.last_subnets, (int(height), int(width)), images)
        now = time.perf_counter()
        self.ledger.add_step(
            images=images,
            pixels=images * height * width,
            macs_forward=cost.forward,
            macs_backward=cost.backward,
            seconds=now - self._mark,
            decodes=batch.decodes,
        )
        if pl_module.teacher is not None:  # its seconds are the step's
            taught = self._teacher_macs((int(height), int(width)), pl_module.teacher)
            self.ledger.add("teacher", seconds=0.0, macs=images * taught)
        self._mark = now

    def _step_macs(self, subnets: Sequence[Subnet], size: tuple[int, int], images: int) -> StepMacs:
        """What all that ran in a step cost: the network, or those of a supernet that ran one after another."""
        assert self._macs is not None
        if self._of_subnets is None:
            cost = self._macs(size)
            return StepMacs(images * cost.forward_macs, images * cost.backward_macs)
        each = [self._of_subnets.training(subnet, size, images) for subnet in subnets]
        return StepMacs(sum(macs.forward for macs in each), sum(macs.backward for macs in each))

    def _teacher_macs(self, size: tuple[int, int], teacher: nn.Module) -> int:
        if size not in self._taught_at:
            self._taught_at[size] = count_macs(teacher, size).macs
        return self._taught_at[size]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is timed apart."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no training cost."""
        self._mark = time.perf_counter()
        self.ledger.add("validation", seconds=self._mark - self._validation_began)

    def charged(self, kind: str, batches: Iterable[Images], *, backward: bool = False) -> Iterator[Images]:
        """Batches on their way through the network, whose MACs are charged under a kind at their size.

        A batch is images (N, 3, H, W), or a tuple that begins with them.
        """
        assert self._macs is not None
        for batch in batches:
            images = batch[0] if isinstance(batch, tuple) else batch
            cost = self._macs(images.shape[-2:])
            macs = len(images) * (cost.macs if backward else cost.forward_macs)
            self.ledger.add(kind, seconds=0.0, macs=macs)
            yield batch

    def renew(self, model: Any) -> None:
        """Count the steps to come anew: the network has another structure now."""
        assert self._macs is not None
        self._macs.renew(model)

    def charge_seconds(self, kind: str, seconds: float) -> None:
        """Charge the time of work between two steps under its own name; the next step's clock begins after it."""
        self.ledger.add(kind, seconds=seconds)
        self._mark = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Charge the images that were offered and dropped; write and log the sums."""
        if trainer.is_global_zero:  # the plan is of all ranks together
            summary = trainer.datamodule.schedule[trainer.current_epoch]  # type: ignore[attr-defined]
            self.ledger.add_offered(summary.images_offered)
            self.ledger.add_dropped(summary.images_dropped)
        spent = merge_ranks(gather(self.ledger))
        write_figures(pl_module, spent.summary())
        if self.folder is not None and trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            if self._inference_sizes is None:
                self._inference_sizes = data.inference_sizes(data.validate_on)
            costs = [count_macs(pl_module.evaluated_model, size) for size in self._inference_sizes]
            write_cost(self.folder / "cost.json", spent, costs, list(self._inference_sizes.values()))


def write_cost(path: Path, spent: Ledger, costs: Sequence[Cost], shares: Sequence[float]) -> None:
    """Write cost.json: what training spent, and what one forward pass costs, the mean over the sizes of inference."""
    inference = costs[-1].as_record()  # of the largest size
    inference["gmacs"] = sum(share * cost.macs for share, cost in zip(shares, costs, strict=True)) / 1e9
    if len(costs) > 1:
        inference["sizes"] = [[*cost.input_size, share] for share, cost in zip(shares, costs, strict=True)]
    write_text(path, json.dumps({"training": spent.summary(), "inference": inference}, indent=2) + "\n")
