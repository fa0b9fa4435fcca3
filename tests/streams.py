"""The smallest real stream: drawn frames of 64x64 with a cut, a narrow JITNet, an oracle that is sometimes wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dance_seg.metrics_file import read_metrics
from dance_seg.part import Part
from dance_seg.recipe import Recipe, parse_recipe

FRAMES = 32
TINY_STREAM = f"""
data: {{name: video_shapes, args: {{num_frames: {FRAMES}, size: [64, 64], cuts: [22]}}}}
model: {{name: jitnet, args: {{width: 0.125}}}}
teacher: {{name: oracle, args: {{noise: 0.02, macs: 1000000000}}}}
distillation: {{threshold: 0.5, stride_min: 4, stride_max: 16, u_max: 3, score_every_frame: true}}
trainer: {{accelerator: cpu, threads: 1}}
tracking: {{wandb: disabled}}
"""


def tiny_stream(*overrides: str, **parts: Part) -> Recipe:
    """A tiny recipe of a stream with overrides; parts, such as `teacher`, are taken whole."""
    return replace(parse_recipe(TINY_STREAM, overrides, name="tiny_stream"), **parts)  # type: ignore[arg-type]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a stream's metrics, without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key != "time" and not key.startswith("cost/")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def write_film(path: Path, frames: int) -> None:
    """A film of noise, 64x96."""
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, (96, 64))
    for number in range(frames):
        film.write(np.random.default_rng(number).integers(0, 256, (64, 96, 3), np.uint8))
    film.release()
