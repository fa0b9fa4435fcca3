"""What the machine is, which secrets its environment holds, and writing a file on it whole or not at all."""

import os
import platform
import re
from pathlib import Path

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def processor() -> str:
    """The processor's name, as far as the operating system tells."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name


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
