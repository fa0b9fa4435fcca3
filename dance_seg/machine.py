"""What the machine is, and writing a file on it whole or not at all."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name, as far as the operating system tells."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all, with its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # Names come from files and arguments, and may hold bytes that are no text.
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path
