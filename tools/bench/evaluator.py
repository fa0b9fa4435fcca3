"""From a trained network's logits at quarter resolution to mIoU at 1024x2048 and 19 classes.

Both sides start from the same float32 logits (19, 256, 512). The reference is F.interpolate, argmax and torchmetrics'
MulticlassJaccardIndex as it comes; its labels are converted to int64 before the clock starts. The confusion matrices
must be identical. The network is trained here for a few seconds on drawn street scenes, because random logits have
boundaries everywhere and a map drawn by hand has none that a network would leave.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from dance_seg.evaluator import boundary_cells, leaders, resized_argmax
from dance_seg.metrics import confusion_matrix, scores
from dance_seg.sample import IGNORE
from datamodules.scenes import render_scene
from tools.bench.common import interleave, ratio, write_result

SIZE = (1024, 2048)
NUM_CLASSES = 19
STRIDE = 4
CROP = (256, 512)


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


def train(network: nn.Module, seconds: float) -> int:
    """Train on scenes never drawn twice until the time is up; the number of steps taken."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    network.train()
    steps, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        samples = [render_scene(1, 4 * steps + index, CROP) for index in range(4)]
        images = torch.cat([as_input(sample.image) for sample in samples])
        labels = torch.stack(
            [torch.from_numpy(sample.label[::STRIDE, ::STRIDE].astype(np.int64)) for sample in samples]
        )
        loss = F.cross_entropy(network(images), labels, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    network.eval()
    return steps


def reference_scores(logits: Tensor, labels: Tensor, align_corners: bool, metric: MulticlassJaccardIndex) -> float:
    """mIoU as most code computes it."""
    resized = F.interpolate(logits[None], size=SIZE, mode="bilinear", align_corners=align_corners)
    metric.reset()
    metric.update(resized.argmax(1), labels[None])
    return 100 * metric.compute().item()


def our_scores(logits: Tensor, labels: np.ndarray, align_corners: bool) -> float:
    """The same by dance_seg."""
    return scores(confusion_matrix(resized_argmax(logits, SIZE, align_corners=align_corners), labels, NUM_CLASSES)).miou


def reference_at_full_resolution(logits: Tensor, labels: Tensor, metric: MulticlassJaccardIndex) -> float:
    """mIoU as most code computes it, from logits that need no interpolation."""
    metric.reset()
    metric.update(logits[None].argmax(1), labels[None])
    return 100 * metric.compute().item()


def assert_same_matrix(metric: MulticlassJaccardIndex, logits: Tensor, labels: np.ndarray, align_corners: bool) -> None:
    """Stop unless the reference's confusion matrix, just filled, is ours to the last pixel."""
    ours = confusion_matrix(resized_argmax(logits, SIZE, align_corners=align_corners), labels, NUM_CLASSES)
    different = int(np.abs(metric.confmat.numpy() - ours).sum())
    if different:
        raise SystemExit(f"the confusion matrices differ in {different} counts (align_corners={align_corners})")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that NumPy held during the call, in bytes."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Train the network, measure both sides in turns, check that they agree, write runs/bench/evaluator.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="rounds of measurement (default 7)")
    parser.add_argument("--images", type=int, default=3, help="scenes measured in each round (default 3)")
    parser.add_argument("--train-seconds", type=float, default=30, help="how long to train the network (default 30)")
    options = parser.parse_args()

    torch.manual_seed(0)
    network = small_network()
    steps = train(network, options.train_seconds)
    samples = [render_scene(0, index, SIZE) for index in range(options.images)]
    labels = [sample.label for sample in samples]
    wide_labels = [torch.from_numpy(label.astype(np.int64)) for label in labels]
    with torch.inference_mode():
        logits = [network(as_input(sample.image))[0].contiguous() for sample in samples]
        metric = MulticlassJaccardIndex(num_classes=NUM_CLASSES, ignore_index=IGNORE)
        ratios, times = {}, {}
        for align_corners in (True, False):
            for image_logits, label, wide_label in zip(logits, labels, wide_labels, strict=True):
                reference_scores(image_logits, wide_label, align_corners, metric)
                assert_same_matrix(metric, image_logits, label, align_corners)
            pairs = list(zip(logits, labels, wide_labels, strict=True))
            sides: dict[str, Callable[[], object]] = {
                "reference": lambda ac=align_corners, pairs=pairs: [
                    reference_scores(x, wide, ac, metric) for x, _, wide in pairs
                ],
                "ours": lambda ac=align_corners, pairs=pairs: [our_scores(x, label, ac) for x, label, _ in pairs],
            }
            key = "evaluator_vs_torchmetrics" + ("" if align_corners else "/align_corners_false")
            times[key] = interleave(sides, options.runs)
            ratios[key] = ratio(times[key]["reference"], times[key]["ours"])
        full = F.interpolate(logits[0][None], size=SIZE, mode="bilinear", align_corners=True)[0]
        key = "evaluator_vs_torchmetrics/full_resolution_logits"
        times[key] = interleave(
            {
                "reference": partial(reference_at_full_resolution, full, wide_labels[0], metric),
                "ours": partial(our_scores, full, labels[0], True),
            },
            options.runs,
        )
        ratios[key] = ratio(times[key]["reference"], times[key]["ours"])
        total = sum(
            confusion_matrix(resized_argmax(x, SIZE, align_corners=True), label, NUM_CLASSES)
            for x, label in zip(logits, labels, strict=True)
        )
        boundary = statistics.mean(float(boundary_cells(*leaders(x.numpy())).mean()) for x in logits)
        extra = max(peak_bytes(partial(our_scores, x, label, True)) for x, label in zip(logits, labels, strict=True))
    main_times = {side: statistics.median(values) for side, values in times["evaluator_vs_torchmetrics"].items()}
    notes = {
        "milliseconds per image": {side: round(1000 * value / options.images, 1) for side, value in main_times.items()},
        "confusion matrices": f"identical on {options.images} scenes, with align_corners true and false",
        "network": f"{steps} steps in {options.train_seconds:g} s, mIoU {scores(total).miou:.1f} on these scenes",
        "boundary cells": f"{boundary:.3f} of all cells",
        "memory": f"{extra / logits[0].nbytes:.2f} times the logits, at most, beside them",
        "threads": torch.get_num_threads(),
    }
    write_result("evaluator", options.runs, ratios, notes)


if __name__ == "__main__":
    main()
