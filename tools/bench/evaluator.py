"""From a trained network's logits at quarter resolution to mIoU at 1024x2048 and 19 classes.

Both sides start from the same float32 logits (19, 256, 512). The reference is F.interpolate, argmax and torchmetrics'
MulticlassJaccardIndex as it comes; its labels are converted to int64 before the clock starts. The confusion matrices
must be identical. The network is trained here, for a minute or less, on drawn street scenes, because random logits have
boundaries everywhere and a map drawn by hand has none that a network would leave.
"""

import argparse
import statistics
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from tqdm import tqdm

from dance_seg.cost.latency import interleave
from dance_seg.evaluator import boundary_cells, leaders, resized_argmax
from dance_seg.metrics import confusion_matrix, scores
from dance_seg.sample import IGNORE
from datamodules.scenes import render_scene
from tools.bench.common import ratio, write_result

SIZE = (1024, 2048)
NUM_CLASSES = 19
STRIDE = 4
CROP = (192, 384)
KEY = "evaluator_vs_torchmetrics"


class Prepared(NamedTuple):
    """What both sides start from, one entry per image."""

    logits: list[Tensor]  # (C, h, w) float32
    labels: list[np.ndarray]  # (H, W) uint8
    wide_labels: list[Tensor]  # (H, W) int64


def small_network() -> nn.Module:
    """Six convolutions that give logits at a quarter of the image's resolution."""

    def convolution(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        padding = dilation
        layer = nn.Conv2d(inputs, outputs, 3, stride, padding, dilation, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    wide = [convolution(48, 48, dilation=dilation) for dilation in (1, 2, 4, 8)]
    return nn.Sequential(convolution(3, 24, 2), convolution(24, 48, 2), *wide, nn.Conv2d(48, NUM_CLASSES, 1))


def as_input(image: np.ndarray) -> Tensor:
    """An image as the network takes it: (1, 3, H, W), roughly from -1 to 1."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1


def as_labels(label: np.ndarray) -> Tensor:
    """A label as torch and torchmetrics take it: int64."""
    return torch.from_numpy(label.astype(np.int64))


def train(network: nn.Module, steps: int) -> None:
    """Train on scenes that are never drawn twice, four to a step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    network.train()
    for step in tqdm(range(steps), desc="training", unit="step"):
        samples = [render_scene(1, 4 * step + index, CROP) for index in range(4)]
        images = torch.cat([as_input(sample.image) for sample in samples])
        labels = torch.stack([as_labels(sample.label[::STRIDE, ::STRIDE]) for sample in samples])
        loss = F.cross_entropy(network(images), labels, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


def reference_scores(prepared: Prepared, metric: MulticlassJaccardIndex, align_corners: bool) -> None:
    """mIoU of each image as most code computes it."""
    for logits, labels in zip(prepared.logits, prepared.wide_labels, strict=True):
        if logits.shape[1:] != labels.shape:
            logits = F.interpolate(logits[None], size=SIZE, mode="bilinear", align_corners=align_corners)[0]
        metric.reset()
        metric.update(logits[None].argmax(1), labels[None])
        metric.compute()


def our_scores(prepared: Prepared, align_corners: bool) -> None:
    """The same by dance_seg."""
    for logits, labels in zip(prepared.logits, prepared.labels, strict=True):
        scores(our_matrix(logits, labels, align_corners))


def our_matrix(logits: Tensor, labels: np.ndarray, align_corners: bool) -> np.ndarray:
    """One image's confusion matrix by dance_seg."""
    return confusion_matrix(resized_argmax(logits, SIZE, align_corners=align_corners), labels, NUM_CLASSES)


def refuse_difference(prepared: Prepared, metric: MulticlassJaccardIndex, align_corners: bool) -> None:
    """Stop unless both sides count every image alike, to the last pixel."""
    for index, (logits, labels, wide_labels) in enumerate(zip(*prepared, strict=True)):
        reference_scores(Prepared([logits], [labels], [wide_labels]), metric, align_corners)
        ours = our_matrix(logits, labels, align_corners)
        different = int(np.abs(metric.confmat.numpy() - ours).sum())
        if different:
            raise SystemExit(f"scene {index}, align_corners={align_corners}: {different} counts differ")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that NumPy held during the call, in bytes."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Train the network, check that both sides agree, measure them in turns, write runs/bench/evaluator.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="rounds of measurement (default 7)")
    parser.add_argument("--images", type=int, default=3, help="scenes measured in each round (default 3)")
    parser.add_argument("--steps", type=int, default=150, help="steps of training the network (default 150)")
    options = parser.parse_args()

    torch.manual_seed(0)
    network = small_network()
    train(network, options.steps)
    samples = [render_scene(0, index, SIZE) for index in range(options.images)]
    labels = [sample.label for sample in samples]
    wide_labels = [as_labels(label) for label in labels]
    with torch.inference_mode():
        logits = [network(as_input(sample.image))[0].contiguous() for sample in samples]
        full = [F.interpolate(logits[0][None], size=SIZE, mode="bilinear", align_corners=True)[0]]
        quarter = Prepared(logits, labels, wide_labels)
        cases = {
            KEY: (quarter, True),
            f"{KEY}/align_corners_false": (quarter, False),
            f"{KEY}/full_resolution_logits": (Prepared(full, labels[:1], wide_labels[:1]), True),
        }
        metric = MulticlassJaccardIndex(num_classes=NUM_CLASSES, ignore_index=IGNORE)
        times = {}
        for key, (prepared, align_corners) in cases.items():
            refuse_difference(prepared, metric, align_corners)
            sides = {
                "reference": partial(reference_scores, prepared, metric, align_corners),
                "ours": partial(our_scores, prepared, align_corners),
            }
            times[key] = interleave(sides, options.runs)
        memory = peak_bytes(partial(our_scores, quarter, True))
    matrices = [our_matrix(*pair, True) for pair in zip(logits, labels, strict=True)]
    boundary = statistics.mean(float(boundary_cells(*leaders(one.numpy())).mean()) for one in logits)
    notes = {
        **{
            f"{side}, ms per image": round(1000 * statistics.median(values) / options.images, 1)
            for side, values in times[KEY].items()
        },
        "confusion matrices": f"identical on {options.images} scenes",
        "network": f"{options.steps} steps, mIoU {scores(np.sum(matrices, axis=0)).miou:.1f} on these scenes",
        "boundary cells": f"{boundary:.3f} of all",
        "memory beside the logits": f"{memory / logits[0].nbytes:.2f} times theirs at most",
        "threads": torch.get_num_threads(),
    }
    write_result("evaluator", options.runs, {key: ratio(t["reference"], t["ours"]) for key, t in times.items()}, notes)


if __name__ == "__main__":
    main()
