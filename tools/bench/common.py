"""What every benchmark shares: interleaved timing, the machine's description, the result file."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from dance_seg.machine import has_bfloat16, processor

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "numpy", "opencv-python-headless", "pillow", "albumentations")


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """The ratio of two sides, round by round, as median, minimum and maximum.

    >>> ratio([4.0, 9.0], [2.0, 3.0])
    {'median': 2.5, 'min': 2.0, 'max': 3.0}
    """
    return spread([a / b for a, b in zip(over, under, strict=True)])


def machine() -> dict[str, Any]:
    """The processor, its cores and the memory, as far as the operating system tells."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def precision() -> str:
    """The override by which training is fastest on this processor: bfloat16 where it has instructions for it.

    >>> precision() in ("trainer.precision=bf16-mixed", "trainer.precision=32-true")
    True
    """
    return f"trainer.precision={'32-true' if has_bfloat16() is False else 'bf16-mixed'}"


def memory(key: Literal["VmRSS", "VmHWM", "RssAnon", "VmSize"]) -> int:
    """Bytes that are held (VmRSS), were at most (VmHWM), are of no file (RssAnon) or reserved (VmSize); on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def versions() -> dict[str, str]:
    """The versions of the libraries that the figures depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured, with a + when files differ from it; empty outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write_result(
    name: str, runs: int, ratios: Mapping[str, Mapping[str, float]], notes: Mapping[str, Any] | None = None
) -> Path:
    """Write runs/bench/NAME.json and print its ratios as a table."""
    load = os.getloadavg()[0]
    result = {
        "name": name,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "load_average": round(load, 2),
        "noisy": load > (os.cpu_count() or 1) + 0.5,
        "runs": runs,
        "ratios": {key: dict(value) for key, value in ratios.items()},
        "notes": dict(notes or {}),
    }
    path = Path("runs/bench") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    width = max((len(key) for key in ratios), default=4)
    print(
        f"{name}: {runs} runs, load average {load:.2f}" + (" (noisy: more load than cores)" if result["noisy"] else "")
    )
    print(f"  {'':{width}}  {'median':>10} {'min':>10} {'max':>10}")
    for key, value in ratios.items():
        print(f"  {key:{width}}  {value['median']:10.4g} {value['min']:10.4g} {value['max']:10.4g}")
    for key, note in (notes or {}).items():
        print(f"  {key}: {note}")
    print(f"written to {path}")
    return path
