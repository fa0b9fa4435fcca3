"""Signals that ask a run to end: noted when they come, acted on when the work at hand is whole.

A handler that saved by itself would run between two lines of anything: of a step, of a collective that the other
ranks wait in, of another save. So it only notes the number, and whoever works looks at it where a stop is possible.
A second signal ends the process at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STATUS = {signal.SIGUSR1: 75, signal.SIGINT: 130, signal.SIGTERM: 143}
"""The exit status for each signal, in rising urgency. 75 is EX_TEMPFAIL of sysexits.h: not done, start it again."""


class StoppedBySignal(SystemExit):
    """Ends the program with the status for a signal, once what it had done is saved."""

    def __init__(self, number: int, *, status: int | None = None) -> None:
        self.number = number
        self.status = STATUS[signal.Signals(number)] if status is None else status
        super().__init__(self.status)


class NotedSignals:
    """Notes the signals of STATUS while it is entered; a second one ends the process with its status.

    Outside the main thread, where Python installs no handlers, nothing is noted.

    >>> with NotedSignals() as noted:
    ...     before = noted.number
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     (before, noted.number)
    (0, 15)
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that came; 0: none
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "NotedSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STATUS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def urgency(self) -> int:
        """How urgent the signal is that came, from 1; 0: none. Ranks compare it, and the greatest counts.

        >>> NotedSignals().urgency
        0
        """
        return list(STATUS).index(signal.Signals(self.number)) + 1 if self.number else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(STATUS[signal.Signals(number)])
        self.number = number


@contextmanager
def signals_as_before() -> Iterator[None]:
    """On leaving, the signals of STATUS do what they did, whatever handlers were put in place meanwhile.

    >>> with signals_as_before():
    ...     _ = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    >>> signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    False
    """
    before = {number: signal.getsignal(number) for number in STATUS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None: put in place by other code than Python's, which cannot be named
                    signal.signal(number, handler)


def signal_of(urgency: int) -> signal.Signals:
    """The signal of an urgency above 0.

    >>> signal_of(3).name
    'SIGTERM'
    """
    return list(STATUS)[urgency - 1]
