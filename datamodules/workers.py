"""Batches from worker processes that may crash or hang: each wait has a deadline, each failure names worker and file.

torch's DataLoader waits for ever for a worker that hangs, and lets one that died raise in the middle of whatever the
main process does. Here both are noticed while waiting for a batch; the workers are started anew and the batch is made
again, which gives the same one, since what a batch holds depends on its place alone. A file that fails each time ends
the run with its name.
"""

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from dance_seg.errors import DataError
from dance_seg.sample import Batch, Sample

RESTARTS = 3
"""How often in one pass over the data workers are started anew before the failure ends the run."""

POLL_SECONDS = 2.0
"""How long a look for a batch takes before the workers are looked at."""


class WatchedSource:
    """A source that notes which image each worker loads, and names the image whenever loading fails."""

    def __init__(self, source: Any, workers: int) -> None:
        self.source = source
        self.names, self.groups = source.names, source.groups
        # In shared memory, so that what a worker noted can be read when it is dead.
        self.loading = torch.full((workers,), -1, dtype=torch.int64)
        if workers:
            self.loading.share_memory_()

    @property
    def fingerprint(self) -> str:
        """The source's own: watching changes no sample."""
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Sample:
        """The sample of one index. Raises DataError that begins with its name, whatever the source raises."""
        worker = get_worker_info()
        if worker is not None:
            self.loading[worker.id] = index
        try:
            return self.source.load(index)
        except (DataError, MemoryError):
            raise
        except Exception as error:
            raise DataError(f"{self.names[index]}: cannot be loaded ({type(error).__name__}: {error})") from error

    def loaded_by(self, worker: int) -> str:
        """The name of the image that a worker loads, or has loaded last."""
        index = int(self.loading[worker])
        return self.names[index] if index >= 0 else "its first image"


class Batches:
    """One pass over a DataLoader, or what is left of it; iterating starts the workers, and not before.

    `length` is what is left. `go_to(n)` makes the loader's sampler begin after the n batches that were given. `place`
    says for messages where in training this is. `patience` are the seconds that one batch may take.
    """

    def __init__(
        self,
        loader: DataLoader,
        length: int,
        *,
        go_to: Callable[[int], None],
        source: WatchedSource,
        patience: float,
        place: str,
    ) -> None:
        self.loader, self.length, self.go_to = loader, length, go_to
        self.source, self.patience, self.place = source, patience, place

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        if not self.loader.num_workers:
            yield from self.loader
            return
        given = restarts = 0
        batches: Any = None
        while True:
            try:
                if batches is None:
                    batches = self._begin(given)
                batch = self._next(batches)
            except StopIteration:
                return
            except _Failed as failure:
                batches = None
                restarts += 1
                said = f"{failure}, for batch {given} of {self.place}"
                if restarts > RESTARTS:
                    raise DataError(
                        f"{failure.image}: {said}; failure number {restarts} in one pass. Look at the file (python -m "
                        "tools.check_data RECIPE), at memory and at /dev/shm, or set data.args.workers=0"
                    ) from failure.__cause__
                warnings.warn(f"{said}; the batch is made again (restart {restarts} of {RESTARTS})", stacklevel=2)
                continue
            given += 1
            yield batch

    def _begin(self, given: int) -> Any:
        """The loader's iterator, from a place on, without torch's handler that raises wherever the program is."""
        self.go_to(given)
        in_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
        before = signal.getsignal(signal.SIGCHLD) if in_main else None
        if getattr(before, "__module__", None) == signal_handling.__name__:  # left by a loader before this one
            before = signal.SIG_DFL
        self.loader.timeout = POLL_SECONDS
        try:
            return iter(self.loader)
        except (RuntimeError, OSError, EOFError) as error:  # workers of the last pass that died meanwhile
            raise self._failure(self.loader._iterator, 0.0, error) from error
        finally:
            if in_main:
                signal.signal(signal.SIGCHLD, before)

    def _next(self, batches: Any) -> Batch:
        began = time.monotonic()
        while True:
            try:
                return next(batches)
            except DataError as error:
                # The loader puts the worker's traceback before what was said, which begins with the file.
                raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
            except (RuntimeError, OSError, EOFError) as error:
                waited = time.monotonic() - began
                is_late = str(error).startswith("DataLoader timed out")
                if not is_late and str(error).startswith("Caught "):
                    raise  # what a worker raised by itself
                if is_late and waited < self.patience and all(worker.is_alive() for worker in batches._workers):
                    continue
                raise self._failure(batches, waited, error) from error

    def _failure(self, batches: Any, waited: float, error: Exception) -> "_Failed":
        """What happened to which worker; all of them are ended, since a dead one may hold the lock of their queue."""
        workers = list(getattr(batches, "_workers", ()))
        dead = [number for number, worker in enumerate(workers) if not worker.is_alive()]
        if dead:
            number, what = dead[0], f"ended with {_code(workers[dead[0]].exitcode)}"
        else:
            number = batches._task_info.get(batches._rcvd_idx, (0,))[0] if workers else 0
            what = f"gave nothing for {waited:.0f} s" if waited else f"failed ({error})"
        image = self.source.loaded_by(number)
        process = workers[number].pid if workers else "none"
        self._dismiss(batches)
        return _Failed(f"worker {number} (process {process}) {what} at {image}", image)

    def _dismiss(self, batches: Any) -> None:
        """End the workers whatever they do, and forget the iterator, whose own end would wait for them."""
        self.loader._iterator = None
        if batches is None:
            return
        for worker in batches._workers:
            worker.kill()
        for worker in batches._workers:
            worker.join(10)
        batches._shutdown = True
        if getattr(batches, "_pin_memory_thread_done_event", None) is not None:
            batches._pin_memory_thread_done_event.set()
        for queue in batches._index_queues:
            queue.cancel_join_thread()
            queue.close()
        if batches._worker_pids_set:
            signal_handling._remove_worker_pids(id(batches))
            batches._worker_pids_set = False


class Order:
    """The indices of a map-style data set in order, from `start` on."""

    def __init__(self, length: int) -> None:
        self.length, self.start = length, 0

    def go_to(self, start: int) -> None:
        """Begin there from now on."""
        self.start = start

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.length))


class _Failed(Exception):
    def __init__(self, said: str, image: str) -> None:
        super().__init__(said)
        self.image = image


def _code(exitcode: int | None) -> str:
    """An exit status for a person.

    >>> _code(-11), _code(1)
    ('SIGSEGV', 'status 1')
    """
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"status {exitcode}"
