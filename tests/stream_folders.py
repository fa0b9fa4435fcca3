"""Run folders of streams as dance_seg.stream writes them, made up: figures are simple functions of the frame."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from dance_seg.metrics_file import MetricsFile
from tests.run_folders import CLASSES, PALETTE, make_recipe, scene

CUTS = (120, 240)
LIMITS = (8, 64)


def write_stream_run(
    folder: Path, *, frames: int = 360, finished: bool = True, truth: bool = True, pictures: int = 4, **changes: Any
) -> Path:
    """Write the run of a stream with cuts at CUTS: strides double from 8 and fall back to 8 at the key frame after one.

    Accuracy is 90 points, and 40 from a cut to the next key frame, whose updates bring it back to 92.
    """
    folder.mkdir(parents=True)
    distillation = {"method": "online", "threshold": 0.8, "stride_min": LIMITS[0], "stride_max": LIMITS[1]}
    recipe = make_recipe(folder.name, distillation=distillation, teacher={"name": "oracle", "args": {}}, **changes)
    recipe["data"] = {"name": "video_shapes", "args": {}}
    recipe["model"] = {"name": "jitnet", "args": {}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    notes = {"run_id": "0a1b2c3d", "started": "2026-01-31T12:00:00+0000", "classes": list(CLASSES), "source": "a film"}
    if finished:
        notes["finished"] = "2026-01-31T12:02:30+0000"
    (folder / "run.json").write_text(json.dumps(notes))
    metrics, random = MetricsFile(folder / "metrics.jsonl"), np.random.default_rng(0)
    stride, next_key, low, key_frames, updates = LIMITS[0], 0, False, 0, 0
    for frame in range(frames):
        low = low or frame in CUTS or frame == 0
        accuracy = (40.0 if low else 90.0) + random.normal(0, 1.5)
        row: dict[str, Any] = {"stream/accuracy": accuracy, "stream/cut": int(frame in CUTS)}
        row["stream/key_frame"] = int(frame == next_key)
        if frame == next_key:
            stride = LIMITS[0] if low else min(2 * stride, LIMITS[1])
            row |= {"stream/accuracy_before": accuracy, "stream/accuracy_after": 92.0 if low else accuracy}
            row["stream/updates"] = 8 if low else 0
            key_frames, updates, next_key, low = key_frames + 1, updates + row["stream/updates"], frame + stride, False
        row["stream/stride"] = stride
        seconds = 0.007 * (frame + 1) + 0.3 * key_frames + 0.03 * updates
        row["cost/times_cheaper"] = 0.3 * (frame + 1) / seconds
        metrics.append(frame, row)
    metrics.close()
    iou = {name: 95.0 - 3 * k for k, name in enumerate(CLASSES)}
    scored = {"miou": 84.5, "pixel_accuracy": 96.0, "iou": iou}
    scores = {
        "frames": frames,
        "frames_against_teacher": frames,
        "key_frames": key_frames,
        "updates": updates,
        "teacher_fraction": key_frames / frames,
        "against_teacher": scored,
        "against_truth": {**scored, "miou": 71.25} if truth else None,
        "teacher_against_truth": {**scored, "miou": 78.5} if truth else None,
        "stability": {"student": 81.5, "teacher": 83.0},
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    spent = {"student": 0.007 * frames, "teacher": 0.3 * key_frames, "updates": 0.03 * updates}
    costs = {
        "seconds": spent,
        "counts": {"student": frames, "teacher": key_frames, "updates": updates},
        "milliseconds": {"student": 7.0, "teacher": 300.0, "updates": 30.0},
        "gmacs": {"student": 7.5, "teacher": 695.0, "updates": 22.5, "total": 7.5 * frames + 695.0 * key_frames},
        "times_cheaper": {"milliseconds": 0.3 * frames / sum(spent.values()), "macs": 12.5},
        "model": {"seconds": sum(spent.values()) * 1.02, "times_cheaper": 0.3 * frames / sum(spent.values()) / 1.02},
    }
    inference = {"gmacs": 7.5, "parameters": 3_000_000, "input_size": [192, 256], "uncounted": []}
    (folder / "cost.json").write_text(json.dumps({"inference": inference, "stream": costs}))
    write_samples(folder / "pictures", [round(k * (frames - 1) / max(pictures - 1, 1)) for k in range(pictures)], truth)
    return folder


def write_samples(folder: Path, indices: list[int], truth: bool = True, shape: tuple[int, int] | None = None) -> None:
    """Write sample frames whose student's mask is shifted by 4 pixels against the teacher's."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        image, label = scene(index, 8)
        if shape is not None:  # noise, which nothing compresses
            image = np.random.default_rng(index).integers(0, 256, (*shape, 3), np.uint8)
            label = image[..., 0] % len(PALETTE)
        label[label == 255] = 2
        Image.fromarray(image).save(folder / f"{index:06d}_image.png")
        masks = {"student": np.roll(label, 4, axis=1), "teacher": label, **({"truth": label} if truth else {})}
        for kind, ids in masks.items():
            picture = Image.frombytes("P", ids.shape[::-1], np.ascontiguousarray(ids).tobytes())
            colors = np.zeros((256, 3), np.uint8)
            colors[: len(PALETTE)] = PALETTE
            picture.putpalette(colors.tobytes())
            picture.save(folder / f"{index:06d}_{kind}.png")
