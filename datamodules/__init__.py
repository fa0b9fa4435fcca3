"""Where samples come from: one LightningDataModule for each data set."""

from typing import TYPE_CHECKING

from dance_seg.part import build_part

if TYPE_CHECKING:
    from dance_seg.recipe import Recipe
    from datamodules.base import SegmentationDataModule


def build_datamodule(recipe: "Recipe") -> "SegmentationDataModule":
    """The data that a recipe names.

    Raises ValueError for a name or an argument that does not exist.
    """
    if recipe.data.name.startswith("video_"):
        raise ValueError(
            f"data.name is {recipe.data.name}, a video, which a student follows: python -m tools.distill_video RECIPE"
        )
    from datamodules.files import ADE20KDataModule, CamVidDataModule, CityscapesDataModule, FolderDataModule
    from datamodules.shapes import ShapesDataModule

    # Here and not at the top: they bring in Lightning, and readers, scenes and sampler are of use without it.
    table = {
        "shapes": ShapesDataModule,
        "camvid": CamVidDataModule,
        "cityscapes": CityscapesDataModule,
        "ade20k": ADE20KDataModule,
        "folder": FolderDataModule,
    }
    return build_part(table, recipe.data, at="data")
