"""What the machine is, what of it this process may use, which secrets its environment holds, and writing a file on it
whole or not at all.
"""

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

_FLAGS = re.compile(r"^(?:flags|Features)\s*:(.*)$", re.MULTILINE)  # on x86 and ARM
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def processor() -> str:
    """The processor's name, as far as the operating system tells."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor has instructions for bfloat16; None where the operating system does not tell.

    Without them torch computes in float32 and converts: a step of a multi-stage supernet took four times as long.
    """
    if not cpuinfo.exists():
        return None
    listed = _FLAGS.search(cpuinfo.read_text())
    return None if listed is None else not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(listed[1].split())


def cores() -> int:
    """How many cores this process may use: those it is bound to, and no more than the limit of its container.

    Torch's threads wait for each other by spinning, so more of them than cores are slower than one.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _container_limit(Path("/sys/fs/cgroup"))
    return found if limit is None else max(1, min(found, round(limit)))


def threads(asked: int = 0) -> int:
    """How many threads torch may compute with: as many as asked for; for 0 OMP_NUM_THREADS, else `cores()`.

    >>> threads(3)
    3
    """
    if asked:
        return asked
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else cores()


def use_threads(asked: int = 0) -> None:
    """Let torch compute with `threads(asked)`.

    What was asked for holds for the other ranks that this process starts too: without OMP_NUM_THREADS Lightning gives
    each of them, and this one, an equal share of the cores.
    """
    import torch

    if asked:
        os.environ["OMP_NUM_THREADS"] = str(asked)
    torch.set_num_threads(threads(asked))


def _container_limit(groups: Path) -> float | None:
    """The cores that a control group grants, version 2 or 1; None for no limit."""
    with suppress(OSError, ValueError):
        quota, period = (groups / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def secrets() -> dict[str, str]:
    """The environment variables that are secrets by their names, with values long enough to be told from words."""
    return {name: value for name, value in os.environ.items() if len(value) >= 8 and _SECRET_NAME.search(name)}


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all, with its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # Names come from files and arguments, and may hold bytes that are no text.
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path
