"""Run folders as training writes them, made up: figures are simple functions of their arguments, so that a test can say
what to expect.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from dance_seg.metrics_file import MetricsFile

CLASSES = ("sky", "building", "road", "pavement", "tree", "car", "pedestrian", "pole")
PALETTE = (
    (128, 190, 230),
    (110, 100, 100),
    (128, 64, 128),
    (200, 120, 200),
    (70, 130, 50),
    (30, 40, 150),
    (220, 60, 60),
    (190, 180, 120),
)
SLIMMING = {
    "measure": "spatial_information",
    "scales": [0.5, 0.75, 1.0],
    "quantiles": [0.4, 0.8],
    "schedule": "progressive",
    "sizes": "drawn",
    "drop_below": 0.2,
    "drop_rate": 0.5,
    "full_resolution_tail": 0.2,
}
SIZE = (192, 256)


def make_recipe(
    name: str, *, seed: int = 0, epochs: int = 12, slimming: bool = False, **changes: Any
) -> dict[str, Any]:
    """A resolved recipe; changes are given as section__key=value."""
    recipe: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "data": {"name": "shapes", "args": {"num_train": 120, "num_val": 40, "crop": list(SIZE), "batch_size": 8}},
        "model": {"name": "smp", "args": {"arch": "fpn", "encoder_name": "resnet18", "encoder_weights": None}},
        "loss": {"name": "cross_entropy"},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "data_slimming": dict(SLIMMING) if slimming else None,
        "trainer": {"max_epochs": epochs, "precision": "32-true", "choose_from": 0.8, "validate_every": 1},
        "tracking": {"wandb": "auto"},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = recipe
        for section in sections:
            place = place[section]
        place[last] = value
    return recipe


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    epochs: int = 12,
    epochs_done: int | None = None,
    slimming: bool = False,
    miou: float = 60.0,
    gmacs_per_epoch: float = 100.0,
    seconds_per_epoch: float = 10.0,
    steps_per_epoch: int = 15,
    validate_every: int = 1,
    pictures: bool = True,
    classes: tuple[str, ...] = CLASSES,
    circumstances: dict[str, Any] | None = None,
    inference: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a run whose mIoU rises to `miou` at its last epoch and is one point below after the first.

    Each epoch costs `gmacs_per_epoch` and `seconds_per_epoch`; with slimming one image in ten is dropped.
    """
    folder.mkdir(parents=True)
    done = epochs if epochs_done is None else epochs_done
    recipe = make_recipe(folder.name, seed=seed, epochs=epochs, slimming=slimming, **changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    notes: dict[str, Any] = {
        "run_id": "0a1b2c3d",
        "started": "2026-01-31T12:00:00+0000",
        "commit": "c015dfa",
        "processor": "A Processor @ 2 GHz",
        "cores": 2,
        "accelerator": "none",
        "versions": {"torch": "2.14.1"},
        "classes": list(classes),
    }
    if done == epochs:
        notes["finished"] = "2026-01-31T12:02:30+0000"
    (folder / "run.json").write_text(json.dumps({**notes, **(circumstances or {})}))
    dropped = 12 if slimming else 0
    metrics, random = MetricsFile(folder / "metrics.jsonl"), np.random.default_rng(seed)
    ledger: dict[str, float] = {}
    for epoch in range(done):
        for number in range(0, steps_per_epoch, 5):
            progress = (epoch + number / steps_per_epoch) / epochs
            step = epoch * steps_per_epoch + number
            loss = 0.3 + 1.5 * np.exp(-4 * progress) * (1 + 0.2 * random.standard_normal())
            figures = {"train/loss": loss, "train/lr": 1e-3 * (1 - progress) ** 0.9, "train/progress": progress}
            metrics.append(step, {**figures, "epoch": epoch})
        step = (epoch + 1) * steps_per_epoch - 1
        if (epoch + 1) % validate_every == 0:
            score = miou - (1 - (epoch + 1) / epochs) ** 2 * epochs / max(epochs - 1, 1)
            iou = {f"val/iou/{name}": max(1.0, score + 15 - 8 * i) for i, name in enumerate(classes)}
            scores = {"val/miou": score, "val/pixel_accuracy": score + 25, "val/class_accuracy": score + 8}
            metrics.append(step, {**scores, **iou, "epoch": epoch})
        ledger = ledger_sums(epoch + 1, gmacs_per_epoch, seconds_per_epoch, dropped, slimming)
        metrics.append(step, {**ledger, "epoch": epoch})
    metrics.close()
    if done:
        one_pass = {"gmacs": 3.25, "parameters": 13_050_000, "input_size": list(SIZE), "uncounted": []}
        record = {"training": ledger, "inference": {**one_pass, **(inference or {})}}
        (folder / "cost.json").write_text(json.dumps(record))
    (folder / "plan.json").write_text(json.dumps(make_plan(epochs, slimming, dropped, random)))
    if pictures:
        write_pictures(folder / "pictures", error=(75 - miou) / 100, slimming=slimming)
    return folder


def ledger_sums(epochs: int, gmacs: float, seconds: float, dropped: int, slimming: bool) -> dict[str, float]:
    """The ledger after so many epochs of 120 images; `gmacs` and `seconds` of an epoch hold its overheads."""
    paid = 120 - dropped
    overheads = {"cost/scoring_seconds": 0.4, "cost/batch_norm_seconds": 0.5 * epochs, "cost/batch_norm_gmacs": 2.0}
    overheads = {key: value if slimming else 0.0 for key, value in overheads.items()}
    sums = {
        "cost/train_gmacs": gmacs * epochs,
        "cost/forward_gmacs": gmacs * epochs / 3,
        "cost/backward_gmacs": gmacs * epochs * 2 / 3 - overheads["cost/batch_norm_gmacs"],
        "cost/train_seconds": seconds * epochs,
        "cost/step_seconds": seconds * epochs
        - overheads["cost/scoring_seconds"]
        - overheads["cost/batch_norm_seconds"],
        "cost/pixels": float(paid * epochs * SIZE[0] * SIZE[1] // (2 if slimming else 1)),
        "cost/images_offered": 120.0 * epochs,
        "cost/images_paid": float(paid * epochs),
        "cost/images_dropped": float(dropped * epochs),
        "cost/validation_seconds": 1.5 * epochs,
    }
    return sums | overheads


def make_plan(epochs: int, slimming: bool, dropped: int, random: np.random.Generator) -> dict[str, Any]:
    """A plan in which images move from the smallest scale to the largest."""
    scales = SLIMMING["scales"] if slimming else [1.0]
    sizes = [[96, 128], [160, 192], [192, 256]] if slimming else [list(SIZE)]
    summaries = []
    for epoch in range(epochs):
        progress = epoch / epochs
        gone = dropped if 0.1 <= progress < 0.8 else 0
        paid = 120 - gone
        per_scale = [paid]
        if slimming:
            small = int(paid * max(0.0, 0.95 - 1.4 * progress))
            middle = int((paid - small) * max(0.0, 0.8 - progress))
            per_scale = [small, middle, paid - small - middle]
        summaries.append(
            {
                "epoch": epoch,
                "progress": progress,
                "steps": paid // 8,
                "images_offered": 120,
                "images_paid": paid,
                "images_dropped": gone,
                "images_carried": 0,
                "pixels": sum(n * h * w for n, (h, w) in zip(per_scale, sizes, strict=True)),
                "images_per_scale": per_scale,
            }
        )
    values = np.sort(random.gamma(6, 0.012, 120))
    names = [f"scene_{i:04d}" for i in range(120)]
    scored = {"measure": "spatial_information", "names": names, "values": values.tolist()}
    return {
        "scales": scales,
        "sizes": sizes,
        "epochs": summaries,
        "complexity": scored if slimming else None,
        "weights": np.linspace(0.67, 1.33, 120).tolist() if slimming else None,
    }


def scene(number: int, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and its label (H, W) with sky, road, buildings and boxes of objects."""
    random, (height, width) = np.random.default_rng(number), SIZE
    label = np.zeros(SIZE, np.uint8)
    horizon = height // 2
    for left in range(0, width, 32):
        label[horizon - random.integers(20, 80) : horizon, left : left + 30] = 1
    label[horizon:] = 2
    label[horizon:, : width // 6], label[horizon:, -width // 6 :] = 3, 3
    for _ in range(objects):
        kind, x, y = random.integers(4, 8), random.integers(0, width - 20), random.integers(horizon - 40, height - 30)
        label[y : y + random.integers(8, 40), x : x + random.integers(4, 40)] = kind
    label[-8:] = 255
    colors = np.zeros((256, 3))
    colors[: len(PALETTE)] = np.array(PALETTE) * 0.7 + 50
    return (colors[label] + random.normal(0, 9, (*SIZE, 3))).clip(0, 255).astype(np.uint8), label


def write_pictures(folder: Path, *, error: float = 0.1, slimming: bool = False, count: int = 3) -> None:
    """Write validation pictures whose predictions are wrong in shifted boxes, and thumbnails."""
    folder.mkdir(parents=True)
    for number in range(count):
        image, label = scene(number, 6 + 6 * number)
        prediction = np.roll(label, int(40 * error), axis=1)
        prediction[prediction == 255] = 2
        stem = f"{number}_scene_{number:04d}"
        Image.fromarray(image).save(folder / f"{stem}_image.png")
        for kind, ids in (("label", label), ("prediction", prediction)):
            picture = Image.frombytes("P", ids.shape[::-1], ids.tobytes())
            colors = np.zeros((256, 3), np.uint8)  # a shorter palette would be written with too few bits for 255
            colors[: len(PALETTE)] = PALETTE
            picture.putpalette(colors.tobytes())
            picture.save(folder / f"{stem}_{kind}.png")
    if slimming:
        for number in range(4):
            Image.fromarray(scene(50 + number, number)[0]).save(
                folder / f"complexity_simple_{number}_scene_{number:04d}.png"
            )
            most = folder / f"complexity_complex_{number}_scene_{119 - number:04d}.png"
            Image.fromarray(scene(90 + number, 60)[0]).save(most)
