"""The networks a recipe can name: one literal table, `model.name` -> the class that `model.args` build."""

from collections.abc import Callable

from torch import nn

from dance_seg.models.basisnet import BasisNet
from dance_seg.models.jitnet import JITNet
from dance_seg.models.ranet import RANet
from dance_seg.models.smp import SmpModel
from dance_seg.models.smp_exits import SmpWithExits

MODELS: dict[str, Callable[..., nn.Module]] = {
    "smp": SmpModel,  # every architecture and encoder of segmentation-models-pytorch
    "jitnet": JITNet,  # the small student that follows a video
    "smp_exits": SmpWithExits,  # the same with exits between the encoder's stages
    "ranet": RANet,  # sub-networks from low to high resolution, each giving a mask
    "basisnet": BasisNet,  # a light preview, and the specialist that it mixes from basis kernels
}
"""All of them take images of any size."""
