"""The process in which atheris tries a reader: python -m tools.fuzz.guided_worker READER SECONDS SEED FOLDER KEPT."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

from tools.bench.common import memory
from tools.fuzz.target import Target, judge
from tools.fuzz.worker import SPARE

HANG_S = 60  # for one input; then libFuzzer ends the process


def main() -> None:
    """Fuzz until the time is over or an input fails; does not return."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    name, seconds, seed, folder, kept = sys.argv[1:]
    around, corpus = Path(folder) / "around", Path(folder) / "corpus"
    around.mkdir()
    corpus.mkdir()
    with atheris.instrument_imports(include=["dance_seg", "datamodules"]):
        from tools.fuzz.readers import READERS

        target = READERS[name](around)
        for number, data in enumerate(target.seeds):
            (corpus / f"valid_{number}").write_bytes(data)
            if said := judge(target.check, data):  # imports what the reader needs, too
                sys.exit(f"a valid file is not read: {said}")

    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
    (Path(folder) / "words").write_text("".join(f'"{word}"\n' for word in escaped))

    def look(data: bytes) -> None:
        if what := judge(target.check, data):
            Path(kept).write_bytes(data)
            print(what, file=sys.stderr, flush=True)
            os._exit(1)

    options = [
        f"-max_total_time={seconds}",
        f"-seed={int(seed) + 1}",  # 0 would draw one
        f"-max_len={2 * max(map(len, target.seeds))}",
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={(memory('VmRSS') + SPARE) >> 20}",
        f"-dict={Path(folder) / 'words'}",
        f"-artifact_prefix={kept}_",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], look, custom_mutator=mutator_of(target))
    atheris.Fuzz()


def mutator_of(target: Target) -> Callable[[bytes, int, int], bytes]:
    """libFuzzer's own changes; where the format has checksums, half of what comes out has the right ones."""

    def change(data: bytes, longest: int, seed: int) -> bytes:
        changed = atheris.Mutate(data, longest)
        return changed if target.repair is None or seed % 2 else target.repair(changed)[:longest]

    return change


if __name__ == "__main__":
    main()
