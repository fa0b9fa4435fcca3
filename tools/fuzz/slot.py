"""The input that a process is at work on, in a file that outlives the process however it ends."""

import mmap
import struct
from pathlib import Path

from tools.fuzz.changes import MOST

_HEAD = struct.Struct("<QQ")  # how many inputs were begun, and how long the present one is


class Slot:
    """Written by the process that tries inputs, read by the one that watches it."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_HEAD.size + MOST))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def put(self, data: bytes) -> None:
        """Begin an input."""
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        self._memory[: _HEAD.size] = _HEAD.pack(self.count + 1, len(data))

    @property
    def count(self) -> int:
        """How many inputs were begun."""
        return int(_HEAD.unpack_from(self._memory)[0])

    @property
    def data(self) -> bytes:
        """The input that was begun last."""
        return bytes(self._memory[_HEAD.size : _HEAD.size + _HEAD.unpack_from(self._memory)[1]])
