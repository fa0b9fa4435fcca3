"""How long `import dance_seg` and the --help of each tool take, each in a fresh process: seconds, not ratios.

    python -m tools.bench.startup [--runs 7]

`import_seconds` is one process that imports dance_seg, the start of Python included; `help_seconds` is the slowest
tool of each round, and `help_seconds/TOOL` each one. Targets: 0.3 s and 1 s. The first process of each kind is not
counted: it reads files that later ones find in memory, and writes Python's byte code.
"""

import argparse
import subprocess
import sys

from dance_seg.cost.latency import interleave
from tools.__main__ import verbs
from tools.bench.common import spread, write_result

IMPORT_TARGET_S, HELP_TARGET_S = 0.3, 1.0


def start(*words: str) -> None:
    """Run a fresh Python with these arguments to its end. Raises ValueError when it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"python {' '.join(words)} ended with {done.returncode}: {last}")


def main() -> None:
    """Measure all starts in turns and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=7, help="rounds (default 7)")
    given = arguments.parse_args()
    if given.runs < 1:
        raise SystemExit("error: --runs is at least 1")
    tools = verbs()
    sides = {tool: lambda tool=tool: start("-m", f"tools.{tool}", "--help") for tool in tools}
    bare, whole = "python without anything", "import"
    times = interleave(
        {bare: lambda: start("-c", "pass"), whole: lambda: start("-c", "import dance_seg"), **sides}, given.runs
    )
    slowest = [max(times[tool][round_number] for tool in tools) for round_number in range(given.runs)]
    seconds = {"import_seconds": spread(times[whole]), "help_seconds": spread(slowest)}
    seconds |= {f"help_seconds/{tool}": spread(times[tool]) for tool in tools}
    late = [
        f"{key} {seconds[key]['median']:.2f} s, above {limit} s"
        for key, limit in (("import_seconds", IMPORT_TARGET_S), ("help_seconds", HELP_TARGET_S))
        if seconds[key]["median"] >= limit
    ]
    notes = {
        "unit": "seconds",
        "python_alone_seconds": round(spread(times[bare])["median"], 3),
        "targets": "; ".join(late) or f"met: import below {IMPORT_TARGET_S} s, every --help below {HELP_TARGET_S} s",
    }
    write_result("startup", given.runs, seconds, notes)


if __name__ == "__main__":
    main()
