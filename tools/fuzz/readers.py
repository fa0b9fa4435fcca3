"""Which readers there are."""

from collections.abc import Callable
from pathlib import Path

from tools.fuzz import data_readers as data
from tools.fuzz import run_readers as runs
from tools.fuzz.target import Target

READERS: dict[str, Callable[[Path], Target]] = {
    "recipe": runs.recipe,
    "list": data.listing,
    "classes": data.classes,
    "label": data.label,
    "image": data.image,
    "predictions": data.predictions,
    "video": data.video,
    "complexity": data.complexity,
    "decoded": data.decoded,
    "audit": data.audit,
    "checkpoint": runs.checkpoint,
    "network": runs.network,
    "safetensors": runs.safetensors,
    "onnx": runs.onnx,
    "run_folder": runs.run_folder,
    "offline_run": runs.offline_run,
    "storage": runs.storage,
    "latency_table": runs.latency_table,
}
"""Each makes, in an empty folder, what lies around its files; its target has files to change and judges them read."""

SHARE = {
    "recipe": 0.15, "run_folder": 0.15, "video": 0.3, "network": 0.02, "safetensors": 0.02, "decoded": 0.3,
    "complexity": 0.5, "audit": 0.5, "predictions": 0.5,
}  # fmt: skip
"""Of the inputs of a reader of files alone (1), how many these get, since they take longer."""
