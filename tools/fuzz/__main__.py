"""Run the readers on hostile input in bulk; see tools/fuzz/__init__.py."""

import argparse
import sys
import time
from pathlib import Path

from tools.bench.common import spread, write_result
from tools.fuzz.readers import READERS, SHARE
from tools.fuzz.watch import Outcome, try_reader
from tools.fuzz.worker import BATCH


def main() -> int:
    """Try all readers, print what was found, keep the inputs, and write runs/bench/fuzz.json."""
    made = argparse.ArgumentParser(prog="python -m tools.fuzz", description="Hostile input in bulk, for every reader.")
    made.add_argument("--inputs", type=int, default=100_000, help="over all readers (default 100000)")
    made.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    made.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS), help="which (default all)")
    made.add_argument("--seed", type=int, default=0, help="the same seed tries the same inputs (default 0)")
    made.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="where inputs that failed are kept")
    given = made.parse_args()
    parts = {reader: SHARE.get(reader, 1.0) for reader in given.readers}
    begun, outcomes = time.monotonic(), dict[str, Outcome]()
    for reader, part in parts.items():
        batches = max(1, -(-int(given.inputs * part / sum(parts.values())) // BATCH))
        outcome = outcomes[reader] = try_reader(reader, given.seed, batches, begun + given.seconds)
        rate = outcome.inputs / max(outcome.seconds, 1e-9)
        bad = [*outcome.crashes, *outcome.hangs, *outcome.wrong]
        print(f"{reader}: {outcome.inputs} inputs, {rate:.0f} a second, {len(bad)} kinds of failures", flush=True)
        for number, (what, data) in enumerate(bad):
            given.keep.mkdir(parents=True, exist_ok=True)
            path = given.keep / f"{reader}_{given.seed}_{number}"
            path.write_bytes(data)
            print(f"  {what}: {path}", flush=True)
    total = sum(outcome.inputs for outcome in outcomes.values())
    counts = {
        "inputs": total,
        "crashes": sum(len(outcome.crashes) for outcome in outcomes.values()),
        "hangs": sum(len(outcome.hangs) for outcome in outcomes.values()),
        "wrong": sum(len(outcome.wrong) for outcome in outcomes.values()),
        "inputs_per_second": total / (time.monotonic() - begun),
    }
    by_reader = {reader: outcome.inputs for reader, outcome in outcomes.items()}
    notes = {"unit": "counts; failures count once for each kind", "seed": given.seed, "inputs_by_reader": by_reader}
    write_result("fuzz", 1, {name: spread([float(count)]) for name, count in counts.items()}, notes)
    return int(any(counts[name] for name in ("crashes", "hangs", "wrong")))


if __name__ == "__main__":
    sys.exit(main())
