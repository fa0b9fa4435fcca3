"""A run folder as training leaves it, made in a second: its network has seen a few drawn scenes."""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.build import build_model
from dance_seg.checkpoint import save_checkpoint
from dance_seg.models.smp import SmpModel
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.network_slimming.structure import structure_record
from dance_seg.normalise import normalise
from dance_seg.recipe import recipe_record
from dance_seg.sample import IGNORE, Sample
from datamodules.label_table import LabelTable
from datamodules.scenes import CLASSES, PALETTE, render_scene
from tests.tiny import tiny

# Few layers, since exporting takes time for each; three stages make its stride 8.
SMALL = ("model.args.arch=unet", "model.args.encoder_depth=3", "model.args.decoder_channels=[32,16,16]")


def small_network(*, half: bool = False) -> SmpModel:
    """A U-Net of three stages, trained for a moment on drawn scenes; slimmed to half of its MACs where asked.

    Rounding would decide the class of many a pixel of an untrained network.
    """
    return deepcopy(_trained(half))


@lru_cache
def _trained(half: bool) -> SmpModel:
    torch.manual_seed(0)
    model = build_model(tiny(*SMALL), len(CLASSES))
    assert isinstance(model, SmpModel)
    _train(model, 30)
    if half:
        slim(model, NetworkSlimming(keep=0.5, importance="magnitude", round_to=4), input_size=(64, 64))
        _train(model, 20)
    return model.eval()


def _train(model: SmpModel, steps: int) -> None:
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*map(_scene, range(12)), strict=True))
    pixels, optimizer = normalise(images.permute(0, 3, 1, 2).contiguous()), torch.optim.AdamW(model.parameters(), 4e-3)
    model.train()
    for step in range(steps):
        batch = slice(step % 3 * 4, step % 3 * 4 + 4)
        optimizer.zero_grad()
        cross_entropy(model(pixels[batch]), labels[batch].long(), ignore_index=IGNORE).backward()
        optimizer.step()
    reestimate_batch_norm(model.eval(), [pixels])


def _scene(index: int) -> Sample:
    return render_scene(0, index, (64, 64))


def small_record(*overrides: str) -> dict[str, Any]:
    """What a checkpoint of that network says of it; the data are drawn scenes of 64x64."""
    table = tuple(train if train < len(CLASSES) or train == 255 else -1 for train in range(256))
    labels = LabelTable(CLASSES, PALETTE, table).as_record()
    return {"recipe": recipe_record(tiny(*SMALL, *overrides)), "labels": labels, "complexity": None}


def write_small_run(folder: Path, *overrides: str, half: bool = False) -> Path:
    """A run folder that holds the network's best checkpoint; returns the folder."""
    model = small_network(half=half)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    record = small_record(*overrides, f"data.args.cache_dir={folder / 'cache'}")
    checkpoint = {"dance_seg": record, "structure": structure_record(model), "state_dict": state}
    save_checkpoint(checkpoint, folder / "checkpoints" / "best.ckpt")
    return folder
