"""Options of training that belong to no single method: the optimiser, its schedule and the trainer."""

import math
from dataclasses import dataclass
from typing import Any, Literal

MAX_EPOCHS = 1_000_000  # the plan of all of them is made before the first


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights are updated, and the learning rate as a function of progress in [0, 1]."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9  # of sgd
    nesterov: bool = False  # of sgd
    betas: tuple[float, float] = (0.9, 0.999)  # of adamw
    weight_decay: float = 5e-4
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    poly_power: float = 0.9
    warm_up: float = 0.0  # share of training over which the learning rate rises linearly
    encoder_lr: float = 1.0  # the encoder's learning rate over the rest's; below 1 to fine-tune given weights

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"optimizer.lr is {self.lr}: a positive number, such as 0.01 for sgd or 0.0005 for adamw")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}: zero or a positive number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum is {self.momentum}: in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {list(self.betas)}: two numbers in [0, 1), such as [0.9, 0.999]")
        if not (math.isfinite(self.poly_power) and self.poly_power >= 0):
            raise ValueError(f"optimizer.poly_power is {self.poly_power}: zero or a positive number, such as 0.9")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"optimizer.warm_up is {self.warm_up}: a share of training, in [0, 1)")
        if not (math.isfinite(self.encoder_lr) and self.encoder_lr > 0):
            raise ValueError(f"optimizer.encoder_lr is {self.encoder_lr}: a positive factor, 1.0 for the same rate")

    def lr_factor(self, progress: float) -> float:
        """The learning rate at `progress`, over its base.

        >>> Optimizer(schedule="poly", poly_power=0.9).lr_factor(0.0)
        1.0
        >>> round(Optimizer(schedule="cosine").lr_factor(0.5), 6)
        0.5
        >>> round(Optimizer(warm_up=0.1, schedule="constant").lr_factor(0.05), 6)
        0.5
        """
        if progress < self.warm_up:
            return max(progress / self.warm_up, 1e-3)  # not zero: the first step would be lost
        progress = min(1.0, (progress - self.warm_up) / (1 - self.warm_up))
        if self.schedule == "poly":
            return (1 - progress) ** self.poly_power
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0

    def batch_factor(self, images: int, batch_size: int) -> float:
        """How the learning rate follows a batch of another size: linearly for sgd, by the square root for adamw.

        >>> Optimizer(name="sgd").batch_factor(32, 8), Optimizer(name="adamw").batch_factor(32, 8)
        (4.0, 2.0)
        """
        return (images / batch_size) ** (1.0 if self.name == "sgd" else 0.5)


def first_to_choose(max_epochs: int, validate_every: int, choose_from: float) -> int:
    """The first epoch, from 0, whose validation may choose the best checkpoint.

    It begins at the progress `choose_from` or later, so that cuts and a full-resolution tail that begin there came
    first; where no validation does, it is the last one.

    >>> first_to_choose(100, 5, 0.8), first_to_choose(100, 1, 0.8), first_to_choose(12, 5, 0.9)
    (84, 80, 9)
    """
    validated = range(validate_every - 1, max_epochs, validate_every)
    late = (epoch for epoch in validated if epoch / max_epochs >= choose_from - 1e-9)
    return next(late, validated[-1] if validated else max_epochs - 1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and on what a run trains; one epoch offers every image once."""

    max_epochs: int = 100
    accelerator: Literal["auto", "cpu", "gpu", "mps", "tpu"] = "auto"
    devices: int = 1  # per machine
    num_nodes: int = 1
    execution: Literal["given", "auto"] = "given"  # auto: the next three are measured once and the fastest taken
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    channels_last: bool = True
    compile: bool = False  # torch.compile with dynamic sizes
    sync_batchnorm: bool = False
    accumulate: int = 1  # batches per step of the optimiser
    gradient_clip: float | None = None  # norm
    bad_steps: int = 10  # steps in a row that may be passed over for NaN or infinity before training stops
    ema: float | None = None  # decay of the averaged weights that are validated and exported; None: no average
    threads: int = 0  # of torch; 0: OMP_NUM_THREADS, else as many as this process may use cores
    validate_every: int = 1  # epochs
    choose_from: float = 0.8  # progress from which a validation may choose the best checkpoint
    save_every_minutes: float = 5.0
    patience_minutes: float = 10.0  # without a batch finished, after which another rank counts as lost
    log_every: int = 10  # steps
    deterministic: bool = True  # torch's deterministic algorithms where they exist

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        for key in ("max_epochs", "devices", "num_nodes", "accumulate", "validate_every", "log_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"trainer.{key} is {getattr(self, key)}: at least 1")
        if self.bad_steps < 0:
            raise ValueError(f"trainer.bad_steps is {self.bad_steps}: zero (stop at the first) or more")
        if self.max_epochs > MAX_EPOCHS:
            raise ValueError(f"trainer.max_epochs is {self.max_epochs}: at most {MAX_EPOCHS}")
        if not 0 <= self.choose_from < 1:
            raise ValueError(f"trainer.choose_from is {self.choose_from}: a progress in [0, 1)")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"trainer.ema is {self.ema}: a decay in (0, 1), such as 0.999, or null for none")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"trainer.gradient_clip is {self.gradient_clip}: a positive norm, or null for none")
        if not 0 < self.patience_minutes < math.inf:
            raise ValueError(f"trainer.patience_minutes is {self.patience_minutes}: a positive number of minutes")
        if not self.save_every_minutes >= 0:
            raise ValueError(f"trainer.save_every_minutes is {self.save_every_minutes}: zero (every step) or more")


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where figures go besides metrics.jsonl, which is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key, offline without
    project: str = "dance_seg"
    group: str | None = None  # null: the run's name without its seed, so that the seeds of a row stand together
    tags: tuple[str, ...] = ()  # added to those of the method, the data and the model
    artifacts: bool = False  # keep the best and the newest checkpoint with the tracker when the run ends


def plain(value: Any) -> Any:
    """Dataclasses, tuples and NumPy scalars as dicts, lists and numbers, for YAML, JSON and checkpoints.

    >>> plain(Optimizer())["betas"]
    [0.9, 0.999]
    """
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value
