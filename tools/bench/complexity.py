"""Spatial information beside plain NumPy, and what scoring costs next to a first epoch of training.

The NumPy side is the definition written down: luminance in float64, the border reflected, the two Sobel kernels as
weighted sums of shifted copies, the mean magnitude. The values must agree to 1e-5. The epoch is that of an FPN with
ResNet-18 at 352x480, batch 8, over 367 images on this machine's processor; a few steps are measured and multiplied.

    python -m tools.bench.complexity        # DANCE_SEG_CAMVID names real images; without it scenes are drawn
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from dance_seg.cost.latency import interleave
from dance_seg.data_slimming.complexity import classes_in, complexity, spatial_information
from dance_seg.normalise import normalise
from dance_seg.sample import Sample
from datamodules.image_files import read_image
from datamodules.scenes import render_scene
from tools.bench.common import ratio, spread, write_result

SIZES = ((360, 480), (1024, 2048))
TOLERANCE = 1e-5
NUM_IMAGES = 367  # of CamVid's train split
CROP, BATCH_SIZE = (352, 480), 8


def numpy_spatial_information(image: np.ndarray) -> float:
    """The definition in NumPy, float64."""
    y = (0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]) / 255
    height, width = y.shape
    padded = np.pad(y, 1, mode="reflect")
    kernel = np.outer([1, 2, 1], [-1, 0, 1])

    def correlate(weights: np.ndarray) -> np.ndarray:
        taps = [(i, j) for i in range(3) for j in range(3) if weights[i, j]]
        return sum(weights[i, j] * padded[i : i + height, j : j + width] for i, j in taps)

    return float(np.sqrt(correlate(kernel) ** 2 + correlate(kernel.T) ** 2).mean())


def separable_numpy(image: np.ndarray) -> float:
    """The same with its sums arranged for speed, for the notes: what a careful NumPy programmer would reach."""
    y = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    padded = np.pad(y, 1, mode="reflect")
    across, down = padded[:, 2:] - padded[:, :-2], padded[2:] - padded[:-2]
    across = across[:-2] + 2 * across[1:-1] + across[2:]
    down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return float(np.sqrt(across * across + down * down).mean())


def images_of(size: tuple[int, int], count: int) -> list[np.ndarray]:
    """CamVid's images where they are and fit, or drawn scenes."""
    root = os.environ.get("DANCE_SEG_CAMVID")
    if root is not None and size == (360, 480):
        paths = sorted(Path(root, "train").glob("*.png"))
        return [read_image(path) for path in paths[:: len(paths) // count][:count]]
    return [render_scene(0, index, size).image for index in range(count)]


def over(images: list[np.ndarray], measure: Callable[[np.ndarray], float], calls: int) -> Callable[[], None]:
    """Score the next `calls` images each time it is called."""
    upcoming: Iterator[np.ndarray] = cycle(images)

    def run() -> None:
        for _ in range(calls):
            measure(next(upcoming))

    return run


def page_faults(call: Callable[[], None]) -> int:
    """How many pages the system hands out anew during a call; 0 where it does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def largest_difference(images: list[np.ndarray]) -> float:
    """The largest relative difference from NumPy over mean, and over all images; raises when it is above 1e-5."""
    differences = [abs(spatial_information(image) / numpy_spatial_information(image) - 1) for image in images]
    if max(differences) > TOLERANCE:
        raise ValueError(f"the values differ from NumPy's by {max(differences):.2g}, more than {TOLERANCE}")
    return max(differences)


def training_step() -> Callable[[], None]:
    """Forward, backward and optimiser step of one batch."""
    import segmentation_models_pytorch as smp

    model = smp.FPN("resnet18", encoder_weights=None, classes=11).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch = torch.randint(0, 256, (BATCH_SIZE, *CROP, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels: Tensor = torch.randint(0, 11, (BATCH_SIZE, *CROP))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(normalise(batch)), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure all three and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=9, help="rounds (default 9)")
    arguments.add_argument("--steps", type=int, default=3, help="training steps measured (default 3)")
    given = arguments.parse_args()
    ratios: dict[str, dict[str, float]] = {}
    notes: dict[str, object] = {}
    for size, calls in zip(SIZES, (20, 3), strict=True):
        name = f"{size[0]}x{size[1]}"
        images = images_of(size, 10)
        # The sides take turns of about the same length, so that each works with its own memory in the cache.
        sides = {"numpy": (numpy_spatial_information, calls), "ours": (spatial_information, 15 * calls)}
        times = interleave({side: over(images, *how) for side, how in sides.items()}, given.runs)
        milliseconds = {side: [1e3 * turn / sides[side][1] for turn in turns] for side, turns in times.items()}
        ratios[f"complexity_vs_numpy/{name}"] = ratio(milliseconds["numpy"], milliseconds["ours"])
        for side, values in milliseconds.items():
            notes[f"{side}_ms_per_image/{name}"] = round(statistics.median(values), 3)
        # NumPy's time depends on whether the C library keeps the memory of its arrays from one call to the next.
        faults = page_faults(over(images, numpy_spatial_information, calls))
        notes[f"numpy_page_faults_per_image/{name}"] = faults // calls
        separable = interleave({"separable": over(images, separable_numpy, calls)}, given.runs)["separable"]
        ours_ms = statistics.median(milliseconds["ours"])
        notes[f"ratio_to_separable_numpy/{name}"] = round(1e3 * statistics.median(separable) / calls / ours_ms, 2)
        notes[f"largest_difference/{name}"] = largest_difference(images)
    ratios["scoring_share_of_epoch"], more = scoring_share(given.steps)
    write_result("complexity", given.runs, ratios, notes | more)


def scoring_share(steps: int) -> tuple[dict[str, float], dict[str, object]]:
    """What scoring 367 images at the reference size takes, over what training on them once takes."""
    images = images_of((360, 480), 40)
    samples = [Sample(image, image[..., 0].copy()) for image in images]

    def score() -> None:
        for sample in samples:
            complexity("spatial_information", sample, "")
            classes_in(sample.label)

    def decode() -> None:
        for data in encoded:
            cv2.imdecode(data, cv2.IMREAD_COLOR)

    encoded = [cv2.imencode(".png", image)[1] for image in images]
    times = interleave({"score": score, "decode": decode, "step": training_step()}, steps)
    scoring, decoding = (
        [seconds * NUM_IMAGES / len(images) for seconds in times[side]] for side in ("score", "decode")
    )
    epochs = [seconds * NUM_IMAGES / BATCH_SIZE for seconds in times["step"]]
    notes = {
        "scoring_seconds": round(statistics.median(scoring), 3),
        "decoding_seconds": round(statistics.median(decoding), 3),
        "epoch_seconds": round(statistics.median(epochs), 1),
        "epoch": f"FPN, ResNet-18, {CROP[0]}x{CROP[1]}, batch {BATCH_SIZE}, float32, "
        f"{torch.get_num_threads()} threads, extrapolated from {steps} steps to {NUM_IMAGES} images",
        "later_epochs": "read the table and score nothing",
    }
    return spread([score / epoch for score, epoch in zip(scoring, epochs, strict=True)]), notes


if __name__ == "__main__":
    main()
