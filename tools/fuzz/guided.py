"""A reader against inputs that go where none has been: python -m tools.fuzz.guided READER [--seconds 60].

atheris, libFuzzer for Python (`pip install atheris==3.0.0`, on Linux), sees which branches of dance_seg and datamodules
an input takes, and goes on changing those that take new ones. It begins with the reader's valid files, half of the
changed ones get right checksums, and it ends with the first input that is neither read nor refused, which is kept.
"""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tools.cli import parser, run
from tools.fuzz.readers import READERS
from tools.fuzz.target import SECRET


def main() -> int:
    """Run the worker, which atheris ends as it likes, and say what came of it; exit status 1 for a failure."""
    made = parser(__doc__)
    made.add_argument("reader", choices=list(READERS), metavar="READER", help=", ".join(READERS))
    made.add_argument("--seconds", type=int, default=60, help="stop after so long; default 60")
    made.add_argument("--seed", type=int, default=0, help="of the changes; default 0")
    made.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="where an input that failed is kept")
    given = made.parse_args()
    if given.seconds < 1 or given.seed < 0:
        raise ValueError(f"--seconds {given.seconds}, --seed {given.seed}: at least 1 second, and a seed from 0")
    if find_spec("atheris") is None:
        raise ValueError("atheris is not installed; on Linux: pip install atheris==3.0.0. make fuzz does without")
    given.keep.mkdir(parents=True, exist_ok=True)
    kept = given.keep / f"{given.reader}_guided_{given.seed}"
    with tempfile.TemporaryDirectory(prefix="dance-seg-fuzz-") as folder:
        words = [given.reader, str(given.seconds), str(given.seed), folder, str(kept.resolve())]
        command = [sys.executable, "-m", "tools.fuzz.guided_worker", *words]
        status = subprocess.run(command, env={**os.environ, "FUZZ_SECRET_KEY": SECRET}).returncode
    if status:
        print(f"{given.reader}: failed with status {status}; the input is kept as {kept}*")
    else:
        print(f"{given.reader}: no failure in {given.seconds} s")
    return int(status != 0)


if __name__ == "__main__":
    run(main)
