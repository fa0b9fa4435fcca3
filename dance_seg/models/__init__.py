"""The networks a recipe can name: one literal table, `model.name` -> the class that `model.args` build."""

from collections.abc import Callable

from torch import nn

from dance_seg.models.basisnet import BasisNet
from dance_seg.models.jitnet import JITNet
from dance_seg.models.multi_stage import MultiStage, MultiStageSupernet
from dance_seg.models.ranet import RANet
from dance_seg.models.smp import SmpModel
from dance_seg.models.smp_exits import SmpWithExits
from dance_seg.models.vit_resnas import VitResNas, vit_resnas

MODELS: dict[str, Callable[..., nn.Module]] = {
    "smp": SmpModel,  # every architecture and encoder of segmentation-models-pytorch
    "jitnet": JITNet,  # the small student that follows a video
    "smp_exits": SmpWithExits,  # the same with exits between the encoder's stages
    "ranet": RANet,  # sub-networks from low to high resolution, each giving a mask
    "basisnet": BasisNet,  # a light preview, and the specialist that it mixes from basis kernels
    "multi_stage": MultiStage,  # stages are slices of the width, a mask after each
    "multi_stage_supernet": MultiStageSupernet,  # all of those in one
    "vit_resnas": vit_resnas,  # a transformer with residual spatial reduction
    "vit_resnas_supernet": VitResNas,  # all of those in one
}
"""All of them take images of any size."""

NETWORK_OF = {"multi_stage_supernet": "multi_stage", "vit_resnas_supernet": "vit_resnas"}
"""What a network taken out of a supernet is called; it takes the supernet's arguments, and `subnet` besides."""
