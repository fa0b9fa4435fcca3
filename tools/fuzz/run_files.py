"""The files of a small run folder, as they are written."""

import json
from typing import Any


def _json(**record: Any) -> bytes:
    return json.dumps(record).encode()


_EPOCH = {
    "steps": 2,
    "images_offered": 8,
    "images_paid": 8,
    "images_dropped": 0,
    "pixels": 4096,
    "images_per_scale": [4, 4],
}
_POINT = {"average_cost": 1.0, "miou": 50.0, "random_cost": 1.0, "random_miou": 40.0}

FILES = {
    "recipe.yaml": b"""data: {name: shapes, args: {batch_size: 8}}
model: {name: smp, args: {arch: fpn}}
name: a
seed: 0
trainer: {max_epochs: 2, choose_from: 0.5}
""",
    "run.json": _json(run_id="ab", classes=["a", "b"], commit="c", cores=2, finished="2026-01-31T12:02:30+0000"),
    "cost.json": _json(
        training={"cost/train_gmacs": 5.0, "cost/step_seconds": 2.0, "cost/step_gmacs": 4.0},
        inference={"gmacs": 1.0, "latency_ms": {"p50_ms": 1.5}},
    ),
    "metrics.jsonl": b"".join(
        json.dumps(row).encode() + b"\n"
        for row in (
            {"step": 0, "train/loss": 1.5, "train/progress": 0.1, "epoch": 0},
            {"step": 1, "val/miou": 40.0, "val/iou/a": 50.0, "val/pixel_accuracy": 60.0, "epoch": 0},
            {"resumed_at": 1},
            {"step": 3, "cost/train_gmacs": 5.0, "val/miou": None, "not_finite": {"val/miou": "nan"}, "epoch": 1},
        )
    ),
    "plan.json": _json(
        scales=[0.5, 1.0], sizes=[[32, 32], [64, 64]], epochs=[_EPOCH, _EPOCH], weights=[1.0, 1.0],
        complexity={"measure": "spatial_information", "names": ["a", "b"], "values": [0.1, 0.2]},
    ),
    "widths.json": _json(
        layers={"conv": [64, 32]}, branches={"aspp": [4, 2]},
        cuts=[{"epoch": 1, "macs": 0.5, "channels": 0.5, "parameters": 1000}],
    ),
    "image_losses.json": _json(epoch=1, names=["a", "b"], losses=[0.5, 0.25]),
    "calibration.json": _json(
        policy={"thresholds": [0.5, None]},
        achieved={"miou_of_exits": [1.0, 2.0, 3.0], "exits": [0.5, 0.25, 0.25], "miou": 2.5, "miou_random": 2.0,
                  "macs": 1.0, "images": 10},
        costs={"macs": {"trunk": [1.0, 2.0, 3.0], "heads": [0.5, 0.5, 0.5]}}, curves={"macs": [_POINT]}, budget=0.5,
        unit="macs", split="val",
    ),
}  # fmt: skip
