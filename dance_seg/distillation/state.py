"""Where a stream stands: the student, its optimiser, the stride; to be saved between any two frames."""

import copy
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.batch_norm import set_bn_online
from dance_seg.distillation.accuracy import foreground_of
from dance_seg.distillation.options import OnlineDistillation
from dance_seg.distillation.teacher import Teaching
from dance_seg.errors import first_line
from dance_seg.options import plain

ENCODER = ("encoder", "stem")
"""Parts of a parameter's name that make it one of the encoder: what `partial: tail` leaves as it is."""


@dataclass
class StreamState:
    """Where a stream stands: all that decides what comes next. `record()` makes it plain data and tensors."""

    student: nn.Module
    classes: tuple[str, ...]
    options: OnlineDistillation
    optimizer: torch.optim.SGD
    stride: int
    next_key_frame: int = 0
    position: int = 0  # the index of the first frame that was not followed yet
    size: tuple[int, int] | None = None  # (H, W) of the last frame
    frames: int = 0
    key_frames: int = 0
    updates: int = 0
    teacher_failures: int = 0
    passed_over: int = 0  # frames that came again or out of order
    late: int = 0  # in real time: frames by which key frames were late, since teacher or updates were too slow
    held: np.ndarray | None = None  # the last mask of `hold` and `teacher`
    kept: list[tuple[np.ndarray, Teaching]] = field(default_factory=list)  # what `offline` learns from
    trained: bool = False  # whether `offline` has learnt
    lock: Any = field(default_factory=threading.Lock, repr=False)  # in real time weights change in another thread
    failure: Exception | None = field(default=None, repr=False)  # what an update failed by there

    @classmethod
    def start(cls, student: nn.Module, classes: Iterable[str], options: OnlineDistillation) -> "StreamState":
        """The state before the first frame. The student is set to evaluation; its optimiser lives as long as this.

        Raises ValueError for classes that are none, and for a student without an encoder where only the tail learns.
        """
        classes = tuple(classes)
        foreground_of(classes, options.background)
        for name in options.objects:
            if name not in classes:
                raise ValueError(f"distillation.objects holds {name!r}; the classes are {', '.join(classes)}")
        outputs = getattr(student, "num_classes", len(classes))
        if outputs != len(classes):
            raise ValueError(
                f"the student tells {outputs} classes apart and the teacher has {len(classes)}: {', '.join(classes)}"
            )
        if options.bn_online is not None:
            set_bn_online(student, options.bn_online)
        optimizer = torch.optim.SGD(
            trainable(student, options.partial),
            lr=options.learning_rate,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
        )
        return cls(student.eval(), classes, options, optimizer, options.stride_min)

    def record(self) -> dict[str, Any]:
        """Plain data and tensors on the CPU, copied: what a checkpoint keeps.

        In real time it waits for updates that are being made. They are then in the weights, while the stride they lead
        to may not be: resuming repeats that key frame. Raises ValueError when updates failed: their weights are not to
        be kept.
        """
        with self.lock:
            if self.failure is not None:
                raise ValueError(str(self.failure)) from self.failure
            return {
                "global_step": self.position,
                "options": plain(self.options),
                "classes": list(self.classes),
                **{name: getattr(self, name) for name in _COUNTERS},
                "size": list(self.size) if self.size else None,
                "held": None if self.held is None else torch.from_numpy(self.held.copy()),
                "kept": [[torch.tensor(image), *_tensors(teaching)] for image, teaching in self.kept],
                "trained": self.trained,
                "student": copied(self.student.state_dict()),
                "optimizer": copied(self.optimizer.state_dict()),
            }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Stand where a record says. Raises ValueError when it is of other options, classes or another student."""
        wanted, given = plain(self.options), dict(record["options"])
        differing = [f"{key} {given.get(key)} / {wanted.get(key)}" for key in wanted if wanted[key] != given.get(key)]
        if differing or list(record["classes"]) != list(self.classes):
            what = f"options: {'; '.join(differing)} (saved / asked for)" if differing else "classes"
            raise ValueError(f"the saved state is of other {what}; resume with the same, or begin in another folder")
        try:
            self.student.load_state_dict(record["student"])
            self.optimizer.load_state_dict(copy.deepcopy(record["optimizer"]))  # which would keep the record's tensors
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the saved state is of another student: {first_line(error)}") from error
        for name in _COUNTERS:
            setattr(self, name, record[name])
        self.size = tuple(record["size"]) if record["size"] else None
        self.held = None if record["held"] is None else record["held"].numpy().copy()
        self.kept = [
            (image.numpy(), Teaching(labels.numpy(), None if boxes is None else boxes.numpy()))
            for image, labels, boxes in record["kept"]
        ]
        self.trained = record["trained"]


_COUNTERS = (
    "stride", "next_key_frame", "position",
    "frames", "key_frames", "updates", "teacher_failures", "passed_over", "late",
)  # fmt: skip


def trainable(student: nn.Module, partial: str) -> list[nn.Parameter]:
    """The parameters that learn; with `tail` those of the encoder take no gradient from here on.

    Raises ValueError for `tail` where no parameter, or every one, is the encoder's.

    >>> student = nn.ModuleDict({"encoder": nn.Conv2d(3, 8, 3), "head": nn.Conv2d(8, 2, 1)})
    >>> [tuple(parameter.shape) for parameter in trainable(student, "tail")]
    [(2, 8, 1, 1), (2,)]
    """
    named = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    if partial == "all":
        return list(named.values())
    encoder = {name for name in named if set(name.split(".")) & set(ENCODER)}
    if not encoder or len(encoder) == len(named):
        raise ValueError(
            "distillation.partial is tail, and the student has no part called encoder to leave as it is"
            if not encoder
            else "distillation.partial is tail, and all of the student is its encoder; choose all"
        )
    for name in encoder:
        named[name].requires_grad_(False)
    return [parameter for name, parameter in named.items() if name not in encoder]


def load_warm_start(student: nn.Module, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Give the student all tensors of `weights` that it has in the same shape; returns the names of its others.

    A network for other classes so gives all but its last layer. Raises ValueError when less than half of the
    student's tensors are found.
    """
    own = student.state_dict()
    fitting = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    if 2 * len(fitting) < len(own):
        raise ValueError(
            f"distillation.warm_start: {len(fitting)} of the student's {len(own)} tensors are found there in the same "
            "shape; it is of another architecture or width"
        )
    student.load_state_dict({**own, **fitting})
    return tuple(name for name in own if name not in fitting)


def _tensors(teaching: Teaching) -> tuple[Tensor, Tensor | None]:
    return torch.tensor(teaching.labels), None if teaching.boxes is None else torch.tensor(teaching.boxes)


def copied(value: Any) -> Any:
    """Nested dicts and lists with their tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copied(item) for item in value]
    return value
