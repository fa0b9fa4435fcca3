"""The training step, as a LightningModule: logits, a loss per image, one weighted mean."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from dance_seg.early_exit.exits import ExitNetwork, Outputs, every_exit, logits_of_every_exit
from dance_seg.early_exit.learning import EarlyExit, distance_from_teacher, exit_losses
from dance_seg.inference import predict_labels
from dance_seg.losses import Loss, SoftLabels, per_sample_loss, weighted_mean
from dance_seg.metrics import ConfusionMatrix
from dance_seg.network_slimming.channels import Group
from dance_seg.network_slimming.importance import absolute_sum, scales_of
from dance_seg.network_slimming.schedule import NetworkSlimming
from dance_seg.network_slimming.slim import Size, slim
from dance_seg.network_slimming.structure import structure_record
from dance_seg.options import Optimizer
from dance_seg.sample import Batch
from dance_seg.supernet.elastic import Supernet
from dance_seg.supernet.learning import losses_of_subnets
from dance_seg.supernet.sampling import Sampling, check_trains, sorted_by, subnets_of_step
from dance_seg.supernet.space import Subnet


class SegmentationModule(LightningModule):
    """Trains a model on batches of one size whose images count by their weights.

    `model` maps images (N, 3, H, W) to logits (N, C, H, W); one with exits to its `Outputs`, which `early_exit` turns
    into a loss, and each exit is validated. With `supernet` each step trains several networks of a supernet, which ones
    follows from the seed and the step; the largest is validated. With `soft_labels` the logits of a `teacher`, which
    does not learn, are learnt beside the labels, at every exit. `batch_size` is the global batch the learning rate is
    meant for; batches of another size scale it (Optimizer.batch_factor). With `ema`, a decaying average of the weights
    is kept and is what gets validated, chosen and exported.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: Sequence[str],
        loss: Loss | None = None,
        optimizer: Optimizer | None = None,
        batch_size: int = 8,
        ema: float | None = None,
        early_exit: EarlyExit | None = None,
        soft_labels: SoftLabels | None = None,
        teacher: nn.Module | None = None,
        supernet: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.classes = tuple(classes)
        self.loss = loss or Loss()
        self.optimizer_options = optimizer or Optimizer()
        self.batch_size = batch_size
        self.average = WeightAverage(model, ema) if ema is not None else None
        self.early_exit = early_exit or EarlyExit()
        num_exits = model.num_exits if isinstance(model, ExitNetwork) else 1
        self.early_exit.weights_of(num_exits)  # a recipe for another network is refused before it trains
        if (soft_labels is None) != (teacher is None):
            raise ValueError("soft_labels and a teacher go together: the one says how much the other's logits count")
        self.soft_labels = soft_labels
        if supernet is not None:
            check_trains(supernet, model)
        self.supernet, self.seed = supernet, seed
        self.kinds_sorted: list[str] = []  # of choices, whose channels were put in order
        self.last_subnets: tuple[Subnet, ...] = ()  # of the newest training step, when it trained several networks
        self._teacher = (teacher,)  # no submodule: it is neither saved nor synchronised
        self.matrices = nn.ModuleList(ConfusionMatrix(len(self.classes)) for _ in range(num_exits))  # the last decides
        self.sparsity, self._scales = 0.0, list[nn.Parameter]()
        self.last_losses: Tensor | None = None  # (N,), of the newest training step, before weights
        self.step_passed_over = False  # whether the newest step changed nothing, since it was not finite

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is validated and exported: the averaged one if there is an average."""
        return self.average.model if self.average is not None else self.model

    @property
    def _matrices(self) -> list[ConfusionMatrix]:
        return list(self.matrices)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C, H, W) of normalised images (N, 3, H, W)."""
        return self.model(images)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate for this batch: a function of progress, so that resuming needs no schedule state."""
        options = self.optimizer_options
        images = len(batch.weights) * self.trainer.world_size
        factor = options.lr_factor(batch.progress) * options.batch_factor(images, self.batch_size)
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            group["lr"] = options.lr * group["lr_scale"] * factor
        set_progress = getattr(self.model, "set_progress", None)
        if set_progress is not None:
            set_progress(batch.progress)
        if self.supernet is not None:
            for kind in sorted_by(self.supernet, self.model, batch.progress):
                if kind not in self.kinds_sorted:
                    self._sort_channels(kind)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        losses, penalty = self._losses_of_subnets(batch) if self.supernet else self._losses(batch)
        self.last_losses = losses.detach()
        loss = weighted_mean(losses, batch.weights)
        self.log("train/loss", loss, prog_bar=True)
        if penalty is not None:
            loss = loss + penalty
        if self.sparsity:
            loss = loss + self.sparsity * absolute_sum(self._scales)
        self.log_dict({"train/lr": self._learning_rate(), "train/progress": batch.progress})
        return loss

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The loss of each image (N,), and what the network itself adds."""
        soft = self._soft_labels(batch)
        output = self.model(batch.images)
        return self._losses_of_output(output, batch, soft), output.penalty if isinstance(output, Outputs) else None

    def _losses_of_subnets(self, batch: Batch) -> tuple[Tensor, None]:
        """The loss of each image (N,) over the networks that this step trains, the largest among them."""
        assert self.supernet is not None
        assert isinstance(self.model, Supernet)
        subnets = subnets_of_step(self.model.space, self.supernet, self.seed, self.global_step, batch.progress)
        soft = self._soft_labels(batch)

        def losses_of(output: Outputs | Tensor) -> Tensor:
            assert isinstance(self.model, Supernet)
            return self._losses_of_output(output, batch, soft, logged=self.model.active == self.model.space.largest)

        losses, self.last_subnets = losses_of_subnets(
            self.model, batch.images, batch.labels, subnets, self.supernet, losses_of
        )
        return losses, None

    def _losses_of_output(
        self, output: Outputs | Tensor, batch: Batch, soft: Tensor | None, *, logged: bool = True
    ) -> Tensor:
        """The loss of each image (N,): of the labels at every exit, and of a teacher's soft labels."""
        if isinstance(output, Outputs):
            losses, of_exits = exit_losses(output, batch.labels, self.loss, self.early_exit)
            if logged:
                self.log_dict({f"train/loss/exit_{k}": own.mean() for k, own in enumerate(of_exits, start=1)})
        else:
            losses = per_sample_loss(output, batch.labels, self.loss)
        if soft is not None and self.soft_labels is not None:
            distance = distance_from_teacher(output, soft, batch.labels, self.soft_labels.temperature)
            losses = losses + self.soft_labels.weight * distance
        return losses

    @property
    def teacher(self) -> nn.Module | None:
        """The network whose soft labels are learnt, if there is one."""
        return self._teacher[0]

    @torch.no_grad()
    def _soft_labels(self, batch: Batch) -> Tensor | None:
        """The teacher's logits, where there is one."""
        return None if self.teacher is None else self.teacher(batch.images)

    def _learning_rate(self) -> float:
        return self.optimizers(use_pl_optimizer=False).param_groups[-1]["lr"]  # type: ignore[union-attr]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and let the average follow."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None and not self.step_passed_over:
            self.average.follow(self.model)

    def _sort_channels(self, kind: str) -> None:
        """Let narrower networks begin with the channels that matter most; the largest one says the same as before."""
        followers = [self.average.model] if self.average is not None else []
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
        self.model.sort_channels(kind, optimizers, followers)  # type: ignore[operator]
        self.kinds_sorted.append(kind)

    def set_sparsity(self, sparsity: float, groups: Iterable[Group]) -> None:
        """Let training push the normalisation scales of these groups towards zero with that weight; 0 ends it."""
        self.sparsity = sparsity
        self._scales = scales_of(self.model, groups) if sparsity else []

    def slim(
        self,
        options: NetworkSlimming,
        *,
        input_size: tuple[int, int],
        share: float | None = None,
        full: Size | None = None,
        seed: int = 0,
        labelled: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None,
    ) -> None:
        """Cut the network to a share of its full size, with its average and the state of its optimiser.

        `labelled` begins batches of images (N, 3, H, W) and labels (N, H, W) to take gradients from, for importance by
        Taylor. Whoever wraps the model (DDP) wraps it anew afterwards. Raises ValueError when nothing can be cut.
        """
        trained = self._trainer is not None  # a Trainer has the optimiser; without one there is none yet
        optimizer = self.optimizers(use_pl_optimizer=False) if trained else []
        self._scales = []
        slim(
            self.model,
            options,
            input_size=input_size,
            share=share,
            full=full,
            optimizers=[optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer),  # type: ignore[arg-type]
            followers=[self.average.model] if self.average is not None else [],
            seed=seed,
            passes=self.passes(labelled) if labelled is not None else None,
        )
        self.model.zero_grad()
        self.sparsity = 0.0

    def passes(self, labelled: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> Callable[[], Iterator[None]]:
        """What leaves the gradients of one labelled batch after another, as often as it is called."""
        return lambda: self._backward_passes(labelled())

    def _backward_passes(self, labelled: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Leave the gradients of one batch's loss after another, in evaluation mode: statistics stay as they are."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        # In bfloat16 where training is, which is faster; gradients in float16 would need a scale.
        in_bfloat16 = self._trainer is not None and self.trainer.precision == "bf16-mixed"
        for images, labels in labelled:
            self.model.zero_grad()
            with torch.enable_grad():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16):
                    output = logits_of_every_exit(self.model, images.to(self.device))
                if isinstance(output, Outputs):
                    losses, _ = exit_losses(output, labels.to(self.device), self.loss, self.early_exit)
                else:
                    losses = per_sample_loss(output, labels.to(self.device), self.loss)
                losses.mean().backward()
            yield
        for module, training in modes:
            module.training = training

    def on_fit_start(self) -> None:
        """Bring average and teacher to the device; as submodules, DDP would synchronise them for nothing."""
        if self.average is not None:
            self.average.model.to(self.device)
        if self.teacher is not None:
            self.teacher.to(self.device).eval().requires_grad_(False)

    def on_validation_epoch_start(self) -> None:
        """Score from nothing."""
        for matrix in self._matrices:
            matrix.reset()
        self.evaluated_model.eval()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count the prediction of full images against their labels, at the labels' own resolution."""
        size = (batch.labels.shape[-2], batch.labels.shape[-1])
        model = self.evaluated_model
        if isinstance(model, ExitNetwork):
            predictions = every_exit(model, batch.images, size)
        else:
            predictions = [predict_labels(model, batch.images, size)]
        for matrix, found in zip(self._matrices, predictions, strict=True):
            matrix.update(found, batch.labels)
        return predictions[-1]

    def on_validation_epoch_end(self) -> None:
        """Log mIoU, accuracies and the IoU of each class, in points."""
        *earlier, scores = [matrix.compute() for matrix in self._matrices]
        figures = {
            **{f"val/miou/exit_{k}": found.miou for k, found in enumerate(earlier, start=1)},
            "val/miou": scores.miou,
            "val/pixel_accuracy": scores.pixel_accuracy,
            "val/class_accuracy": scores.class_accuracy,
        }
        for name, iou in zip(self.classes, scores.iou, strict=True):
            if iou is not None and np.isfinite(iou):  # a class that is nowhere has no IoU
                figures[f"val/iou/{name}"] = iou
        # The matrix is summed over ranks already, so every rank holds the same figures.
        self.log("val/miou", scores.miou, prog_bar=True, logger=False, sync_dist=False)
        write_figures(self, figures)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser; normalisation and biases do not decay."""
        # With float16 a fused optimiser scales gradients itself, and they could not be clipped.
        return make_optimizer(self.model, self.optimizer_options, fused=self.trainer.precision != "16-mixed")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the structure of the network, and the averaged weights."""
        checkpoint["structure"] = structure_record(self.model)
        if self.supernet is not None:
            checkpoint["kinds_sorted"] = list(self.kinds_sorted)
        if self.average is not None:
            checkpoint["average"] = self.average.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the averaged weights, and whether channels have their order already."""
        self.kinds_sorted = list(checkpoint.get("kinds_sorted", ()))
        if self.average is not None:
            self.average.restore(checkpoint["average"])


def write_figures(module: LightningModule, figures: Mapping[str, float]) -> None:
    """Hand figures to the loggers as they are; Lightning's own `log` would round them to float32."""
    row = {**{key: float(value) for key, value in figures.items()}, "epoch": module.current_epoch}
    for logger in module.loggers:
        logger.log_metrics(row, step=module.global_step)


class WeightAverage:
    """A decaying average of a model's weights; normalisation statistics are the model's own.

    Early on the decay is smaller, min(decay, (1 + n) / (10 + n)) after n steps, so that the start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Move towards the model's weights after a step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        mine, theirs = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_([p.data for p in mine], [p.data for p in theirs], 1 - decay)
        for buffer, current in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(current)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"steps": self.steps, "state_dict": self.model.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.steps = int(state["steps"])
        self.model.load_state_dict(state["state_dict"])


def make_optimizer(model: nn.Module, options: Optimizer, *, fused: bool = True) -> torch.optim.Optimizer:
    """SGD or AdamW over a model's parameters; weight decay is for weights of two or more dimensions only.

    Parameters of a submodule named `encoder` have `encoder_lr` times the learning rate.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(("encoder." in name, parameter.ndim > 1), []).append(parameter)
    settings: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr": options.lr * (options.encoder_lr if is_encoder else 1.0),
            "lr_scale": options.encoder_lr if is_encoder else 1.0,
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (is_encoder, decays), parameters in groups.items()
    ]
    # One kernel for all parameters: at small image sizes the step itself is a good part of the time.
    if options.name == "sgd":
        return torch.optim.SGD(
            settings, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, fused=fused
        )
    return torch.optim.AdamW(settings, lr=options.lr, betas=options.betas, fused=fused)
