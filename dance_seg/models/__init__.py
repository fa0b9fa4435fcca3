"""The networks a recipe can name: one literal table, `model.name` -> the class that `model.args` build."""

from collections.abc import Callable

from torch import nn

from dance_seg.models.jitnet import JITNet
from dance_seg.models.smp import SmpModel

MODELS: dict[str, Callable[..., nn.Module]] = {
    "smp": SmpModel,  # every architecture and encoder of segmentation-models-pytorch
    "jitnet": JITNet,  # the small student that follows a video
}
"""All of them take images of any size."""
