"""One process that tries inputs on a reader, batch after batch.

    python -m tools.fuzz.worker READER SEED FIRST LAST FOLDER

It may be killed by what it reads. The batch at work and the input stand in FOLDER, and what was found wrong.
"""

import hashlib
import json
import logging
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from tools.bench.common import memory
from tools.fuzz.changes import Generated, changed_file
from tools.fuzz.slot import Slot
from tools.fuzz.target import Target, judge

BATCH = 250  # inputs drawn from one seed; those that follow a crash in the same batch are not tried
SPARE = 3 << 30  # bytes of memory that reading one small file may take


def seed_of(reader: str, first: int, number: int) -> int:
    """The seed of a batch.

    >>> seed_of("label", 0, 1) == seed_of("label", 0, 2)
    False
    """
    return int.from_bytes(hashlib.sha256(f"{reader} {first} {number}".encode()).digest()[:8], "big")


def try_batch(target: Target, seed: int, begun: Slot, report: Callable[[str, bytes], None], count: int = BATCH) -> None:
    """Try a batch of inputs; what is wrong is reported at once, each kind with ever shorter inputs."""
    chance, found = Generated(seed), dict[str, int]()
    for _ in range(count):
        data = changed_file(chance, target)
        begun.put(data)
        what = judge(target.check, data)[:120]
        if what and len(data) < found.get(what, len(data) + 1):
            found[what] = len(data)
            report(what, data)


def work(make: Callable[[Path], Target], reader: str, seed: int, first: int, last: int, folder: Path) -> None:
    """Try the batches from `first` to before `last` on a reader."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    begun = Slot(folder / "slot")

    def report(what: str, data: bytes) -> None:
        with open(folder / "found.jsonl", "a") as file:  # closed at once, since the next input may be the last
            file.write(json.dumps({"what": what, "data": data.hex()}) + "\n")

    with tempfile.TemporaryDirectory(dir=folder) as around:
        target = make(Path(around))
        for data in target.seeds:
            if said := judge(target.check, data):
                sys.exit(f"a valid file is not read: {said}")
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + SPARE, resource.RLIM_INFINITY))
        for number in range(first, last):
            (folder / "batch").write_text(str(number))
            try_batch(target, seed_of(reader, seed, number), begun, report)


def main() -> None:
    """Try a reader of the table."""
    from tools.fuzz.readers import READERS

    reader, seed, first, last, folder = sys.argv[1:]
    work(READERS[reader], reader, int(seed), int(first), int(last), Path(folder))


if __name__ == "__main__":
    main()
