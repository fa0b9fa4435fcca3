"""Who of the ranks is where: each says so once a second, so that a run that waits in vain can name whom it waits for.

A collective tells those who wait only that it failed or took too long. The signs are files in the run folder, which
all machines share: they are there when a process is not, the one that would keep a store of them included.

    runs/NAME/ranks/1.json  {"rank": 1, "host": "node7", "process": 4711, "beat": 12, "step": 57, "doing": "training",
                             "still_for": 0.4}
"""

import faulthandler
import json
import os
import platform
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dance_seg.errors import LostRankError
from dance_seg.machine import write_text

BEAT_SECONDS = 1.0
FOLDER = "ranks"

# How the libraries below a collective say that the other side is gone or silent.
_FROM_RANKS = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|timed? ?out (waiting|after)|broken pipe|TCPStore|DistStore",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sign:
    """What a rank has said of itself last."""

    rank: int
    host: str
    process: int
    beat: int
    step: int  # of the optimiser
    doing: str
    still_for: float  # seconds since it last moved


class Heartbeat:
    """Says where this rank is, in a thread, while it is entered; ends a process that has not moved for too long.

    `moved` costs three assignments. After twice `patience_seconds` without one the process says where it stands, with
    the stack of every thread, and ends with LostRankError's status: whatever it waited for has had its own deadline.
    """

    def __init__(self, folder: Path, ranks: int, patience_seconds: float, rank: int = 0) -> None:
        self.folder, self.rank, self.ranks, self.patience_seconds = folder / FOLDER, rank, ranks, patience_seconds
        self.step, self.doing = 0, "starting"
        self._still_for = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._still_for = 0.0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        with suppress(OSError):
            (self.folder / f"{self.rank}.json").unlink(missing_ok=True)
            self.folder.rmdir()  # by the last of them

    def moved(self, doing: str, step: int) -> None:
        """Say that something was finished and what comes next."""
        self.doing, self.step, self._still_for = doing, step, 0.0

    def explain(self, error: BaseException) -> LostRankError | None:
        """Who is missing, when an error came of waiting for another rank; None for any other error."""
        if self.ranks == 1 or not _FROM_RANKS.search(str(error)):
            return None
        missing = self.missing()
        first = " ".join(str(error).split())[:200]
        return LostRankError(
            f"{missing or 'a rank cannot be reached'}; rank {self.rank} waited for it after step {self.step} "
            f"({self.doing}). Start the same command again: it goes on from the newest checkpoint. ({first})"
        )

    def missing(self) -> str:
        """Which rank has ended, or stands still the longest; empty when all look well. Takes a few seconds."""
        before = self.signs()
        time.sleep(3 * BEAT_SECONDS)
        after = self.signs()
        others = [number for number in range(self.ranks) if number != self.rank]
        never = [number for number in others if number not in before and number not in after]
        dead = [n for n in others if n in before and (n not in after or after[n].beat == before[n].beat)]
        if dead:
            sign = before[dead[0]]
            return f"rank {sign.rank} ({sign.host}, process {sign.process}) has ended; its last sign was of {_at(sign)}"
        if never:
            return f"rank {never[0]} gave no sign: it never began, or has ended"
        still = max((after[n] for n in others), key=lambda sign: sign.still_for, default=None)
        if still is None or still.still_for < min(5.0, self.patience_seconds / 2):
            return ""
        return (
            f"rank {still.rank} ({still.host}, process {still.process}) has stood still for {still.still_for:.0f} s at "
            f"{_at(still)}"
        )

    def signs(self) -> dict[int, Sign]:
        """What each rank has said last."""
        found = {}
        for path in self.folder.glob("*.json"):
            with suppress(OSError, ValueError, TypeError, KeyError):
                sign = Sign(**json.loads(path.read_text()))
                found[sign.rank] = sign
        return found

    def _beat(self) -> None:
        beat, last = 0, time.monotonic()
        while True:
            beat += 1
            now = time.monotonic()
            # A process that was stopped (Ctrl-Z) or a machine that slept did not stand still meanwhile.
            still_for = self._still_for = self._still_for + min(now - last, 5 * BEAT_SECONDS)
            last = now
            if self.ranks > 1:
                sign = Sign(self.rank, platform.node(), os.getpid(), beat, self.step, self.doing, round(still_for, 1))
                with suppress(OSError):  # the disk's failures are for those to tell who save to it
                    write_text(self.folder / f"{self.rank}.json", json.dumps(asdict(sign)))
            if still_for > 2 * self.patience_seconds:
                self._end(still_for)
            if self._over.wait(BEAT_SECONDS):
                return

    def _end(self, still_for: float) -> None:
        where = f"step {self.step} ({self.doing})"
        print(
            f"error: rank {self.rank} has stood still for {still_for:.0f} s at {where}; it is ended (limit: twice "
            f"trainer.patience_minutes). {self.missing() if self.ranks > 1 else ''}",
            file=sys.stderr,
            flush=True,
        )
        with suppress(Exception):  # a standard error without a file
            faulthandler.dump_traceback(all_threads=True)
        os._exit(LostRankError.status)


def _at(sign: Sign) -> str:
    return f"step {sign.step} ({sign.doing})"
