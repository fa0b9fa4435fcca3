"""A reader that fails in every way, one after another over the processes that are started for it."""

import os
import signal
import sys
import time
from pathlib import Path

from tools.fuzz.target import Target, Wrong
from tools.fuzz.worker import work


def planted(folder: Path) -> Target:
    counter = Path(os.environ["PLANTED"])

    def check(data: bytes) -> None:
        number = int(counter.read_text() or 0) + 1 if counter.exists() else 1
        counter.write_text(str(number))
        if number == 3:
            raise Wrong("a figure")
        if number == 4:
            raise KeyError("foreign")
        if number == 6:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 9:
            time.sleep(600)

    return Target([b"valid"], check)


if __name__ == "__main__":
    reader, seed, first, last, folder = sys.argv[1:]
    work(planted, reader, int(seed), int(first), int(last), Path(folder))
