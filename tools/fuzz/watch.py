"""Watches the processes that try inputs: what they were at when they died or hung is kept, and another goes on."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools.fuzz.slot import Slot
from tools.fuzz.target import SECRET

HANG_SECONDS = 60.0  # without a new input
START_SECONDS = 300.0  # until the first input, libraries read


@dataclass
class Outcome:
    """What came of a reader's inputs. Each entry of the lists says what it is and holds the input."""

    inputs: int = 0
    seconds: float = 0.0
    crashes: list[tuple[str, bytes]] = field(default_factory=list)
    hangs: list[tuple[str, bytes]] = field(default_factory=list)
    wrong: list[tuple[str, bytes]] = field(default_factory=list)


def try_reader(
    reader: str,
    seed: int,
    batches: int,
    until: float = float("inf"),
    *,
    hang_seconds: float = HANG_SECONDS,
    worker: str = "tools.fuzz.worker",
) -> Outcome:
    """Try batches of inputs on a reader in processes of their own; one that dies or hangs is followed by another."""
    outcome, batch, start = Outcome(), 0, time.monotonic()
    while batch < batches and time.monotonic() < until:
        with tempfile.TemporaryDirectory(prefix="fuzz_") as place:
            folder = Path(place)
            slot = Slot(folder / "slot")
            words = [sys.executable, "-m", worker, reader, str(seed), str(batch), str(batches), place]
            environment = {**os.environ, "FUZZ_SECRET_KEY": SECRET}
            with open(folder / "errors", "wb") as errors:
                process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
                ended = _watch(process, slot, until, hang_seconds)
            outcome.inputs += slot.count
            if ended == "hang":
                outcome.hangs.append((f"no end within {hang_seconds:g} s", slot.data))
            elif ended == "crash":
                said = (folder / "errors").read_text(errors="replace").strip().splitlines()
                outcome.crashes.append(
                    (f"ended with {process.returncode}: {said[-1][:200] if said else ''}", slot.data)
                )
            _take_found(folder / "found.jsonl", outcome)
            at = folder / "batch"
            batch = int(at.read_text()) + 1 if at.is_file() else batches
    outcome.seconds = time.monotonic() - start
    return outcome


def _watch(process: subprocess.Popen[bytes], slot: Slot, until: float, hang_seconds: float) -> str:
    """How a process ended: "" when it was done or its time was over, "crash" or "hang"."""
    last, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        if slot.count != last:
            last, since = slot.count, now
        hangs = now - since > (hang_seconds if last else START_SECONDS)
        if hangs or now > until:
            process.kill()
            process.wait()
            return "hang" if hangs else ""
    return "crash" if process.returncode else ""


def _take_found(path: Path, outcome: Outcome) -> None:
    for line in path.read_text().splitlines() if path.is_file() else ():
        entry = json.loads(line)
        what, data = entry["what"], bytes.fromhex(entry["data"])
        kinds = outcome.crashes if what.startswith("crash") else outcome.wrong
        before = next((number for number, (other, _) in enumerate(kinds) if other == what), None)
        if before is None:
            kinds.append((what, data))
        elif len(data) < len(kinds[before][1]):
            kinds[before] = (what, data)
