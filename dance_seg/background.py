"""Checkpoints written while training goes on: a copy in memory, and a thread that brings it to the disk.

Training waits for the copy, which is as fast as memory, and not for hashing, writing and flushing. There are two
copies, so that one can be made while the other is written; a third save waits. A file is written as by
`dance_seg.checkpoint.save_checkpoint`: whole, hashed, and under its name only when it is on the disk. What goes wrong
there is raised by the next call here, and nothing is forgotten: `finish` waits for all of it.
"""

import os
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dance_seg.checkpoint import check_plain, save_checkpoint
from dance_seg.errors import CheckpointError

PATIENCE_SECONDS = 600.0
"""How long a save may take before the disk counts as stuck."""


class BackgroundWriter:
    """Saves records to checkpoints in a thread, in the order of the calls.

    There `before` is called before each, such as to bring to the disk what belongs to it, and `after` when it is whole.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> writer, weight = BackgroundWriter(), torch.zeros(2)
    >>> writer.save({"weight": weight}, folder / "a.ckpt")
    >>> _ = weight.add_(1)  # training goes on; what is written is what was
    >>> writer.finish()
    >>> torch.load(folder / "a.ckpt", weights_only=True)["weight"]
    tensor([0., 0.])
    """

    def __init__(
        self,
        *,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self.before, self.after, self.patience_seconds = before, after, patience_seconds
        self._copies = [Copy(), Copy()]
        self._jobs: list[tuple[Future[None], Path, Copy]] = []  # in order; finished ones until they are looked at
        self._thread: ThreadPoolExecutor | None = None

    def save(self, record: dict[str, Any], path: str | Path) -> None:
        """Copy the record, and have it written. Raises CheckpointError: for this record, or for a save before."""
        path = Path(path)
        check_plain(record, path)
        self.check()
        while len(self._jobs) >= len(self._copies):
            self._await_first()
        copy = next(copy for copy in self._copies if all(copy is not busy for _, _, busy in self._jobs))
        copied = copy.take(record)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoints", initializer=_step_back)
        self._jobs.append((self._thread.submit(self._write, copied, path), path, copy))

    def check(self) -> None:
        """Raise the CheckpointError of a save that has failed since the last call; costs nothing else."""
        while self._jobs and self._jobs[0][0].done():
            job, _, _ = self._jobs.pop(0)
            job.result()

    def finish(self) -> None:
        """Wait until all is on the disk. Raises CheckpointError when something could not be written, or not in time."""
        while self._jobs:
            self._await_first()

    def close(self) -> None:
        """Wait like `finish`, and let go of thread and memory; a later save begins anew."""
        try:
            self.finish()
        finally:
            if self._thread is not None and not self._jobs:
                self._thread.shutdown()
                self._thread = None
            self._copies = [Copy(), Copy()] if not self._jobs else self._copies

    def _await_first(self) -> None:
        job, path, _ = self._jobs[0]
        wait([job], timeout=self.patience_seconds)
        if not job.done():
            raise CheckpointError(
                f"{path}: is still not written after {self.patience_seconds:g} s; the disk or the file system of "
                f"{path.parent} does not answer. What was saved before is untouched"
            )
        self._jobs.pop(0)
        job.result()

    def _write(self, record: dict[str, Any], path: Path) -> None:
        if self.before is not None:
            self.before()
        save_checkpoint(record, path)
        if self.after is not None:
            self.after()


class Copy:
    """The memory of one copy of a record, used again for the next: fresh memory costs more than the copying."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record as it is now: tensors copied to the CPU, and every container made anew."""
        before, self._memory = self._memory, {}
        on_device = False

        def copied(value: Any, at: str) -> Any:
            nonlocal on_device
            if isinstance(value, Tensor):
                memory = before.get(at)
                if memory is None or (memory.shape, memory.dtype, memory.stride()) != (
                    value.shape,
                    value.dtype,
                    value.stride(),
                ):
                    memory = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")
                memory.copy_(value.detach(), non_blocking=True)
                on_device = on_device or value.device.type != "cpu"
                self._memory[at] = memory
                return torch.nn.Parameter(memory, value.requires_grad) if type(value) is torch.nn.Parameter else memory
            if isinstance(value, dict):
                items = {key: copied(item, f"{at}.{key!r}") for key, item in value.items()}
                return type(value)(items) if type(value) in (OrderedDict, Counter) else items
            if type(value) in (list, tuple, set):
                return type(value)(copied(item, f"{at}[{number}]") for number, item in enumerate(value))
            return value

        made = copied(record, "")
        if on_device:
            torch.accelerator.synchronize()
        return made


def _step_back() -> None:
    """Let training go first where there are fewer cores than threads; on Linux a thread has its own priority."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
