"""The options of a student that follows a video."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dance_seg.batch_norm import BnOnline
from dance_seg.distillation.stride import CONTROLLERS


@dataclass(frozen=True, kw_only=True)
class OnlineDistillation:
    """How a student follows a video; a recipe without this section is not of a stream."""

    method: Literal["online", "teacher", "frozen", "hold", "offline"] = "online"  # all but the first are baselines
    threshold: float = 0.9  # accuracy from which updates stop, and above which the stride grows
    accuracy: Literal["mean", "min", "pixel"] = "mean"  # mean or smallest IoU of the classes found, or share of pixels
    u_max: int = 8  # updates at one key frame
    stride_min: int = 8  # frames from one key frame to the next
    stride_max: int = 64
    controller: Literal["geometric", "linear"] = "geometric"  # JITNet's doubling and halving; ShadowTutor's
    learning_rate: float = 0.01
    momentum: float = 0.9  # kept from key frame to key frame
    nesterov: bool = True
    weight_decay: float = 4e-5
    object_weight: float = 5.0  # how much a pixel near an object counts in the loss; 1: like any other
    box_growth: float = 0.15  # what "near" is: objects' boxes are made wider and higher by this share
    growth_of: Literal["total", "side"] = "total"  # the share is added in all, or on each side
    partial: Literal["all", "tail"] = "all"  # tail: the encoder is left as it is
    restore_best: bool = False  # return to the best weights of a key frame whose updates did not reach the threshold
    bn_online: Literal["frame", "running", "frozen"] | None = None  # what BatchNorm goes by; null: as the model says
    resolution: float = 1.0  # of the frames as the student sees them; labels are made at full size
    background: tuple[str, ...] | None = None  # classes left out of the accuracy; null: one named background
    objects: tuple[str, ...] = ()  # classes whose regions are objects if the teacher has no boxes; empty: foreground
    warm_start: str | None = None  # run or checkpoint whose weights the student starts from; null: as it was built
    teacher_failure: Literal["skip", "stop"] = "skip"  # skip: the student goes on alone and the teacher is asked later
    offline_share: float = 0.2  # of the stream: the part that `offline` learns from
    offline_updates: int | None = None  # null: u_max for each frame it learns from
    score_every_frame: bool = False  # ask the teacher on every frame to score against, beside the stream's own cost

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        at = "distillation."
        for key in _CHOICES:
            if getattr(self, key) not in _CHOICES[key]:
                raise ValueError(f"{at}{key} is {getattr(self, key)!r}; choose one of {', '.join(_CHOICES[key])}")
        if not 0 < self.threshold < 1:
            raise ValueError(
                f"{at}threshold is {self.threshold}: a share above 0 and below 1, such as 0.8 for 80 points"
            )
        if not 1 <= self.stride_min <= self.stride_max:
            raise ValueError(
                f"{at}stride_min and stride_max are {self.stride_min} and {self.stride_max}: whole numbers, at least 1 "
                "and in this order"
            )
        for key in ("u_max", "stride_min", "stride_max", "offline_updates"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{at}{key} is {value}: a whole number, at least 1")
        for key in ("learning_rate", "object_weight"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{at}{key} is {getattr(self, key)}: a positive number")
        for key in ("weight_decay", "box_growth"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{at}{key} is {getattr(self, key)}: zero or a positive number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"{at}momentum is {self.momentum}: in [0, 1)")
        if self.nesterov and not self.momentum:
            raise ValueError(f"{at}nesterov needs a momentum above 0; set nesterov to false")
        if not 0 < self.resolution <= 1:
            raise ValueError(f"{at}resolution is {self.resolution}: above 0 and at most 1")
        if not 0 < self.offline_share < 1:
            raise ValueError(f"{at}offline_share is {self.offline_share}: above 0 and below 1")

        if self.bn_online not in (None, *get_args(BnOnline)):
            choices = ", ".join(get_args(BnOnline))
            raise ValueError(
                f"{at}bn_online is {self.bn_online!r}; choose one of {choices}, or null for the model's own"
            )

    def next_stride(self, stride: int, accuracy: float) -> int:
        """The stride after a key frame that ended at this accuracy."""
        return CONTROLLERS[self.controller](stride, accuracy, self.threshold, self.stride_min, self.stride_max)


_CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(option.type)
    for name, option in OnlineDistillation.__dataclass_fields__.items()
    if getattr(option.type, "__origin__", None) is Literal
}
