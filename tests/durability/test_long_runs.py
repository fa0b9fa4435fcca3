"""Soak: over 2,000 steps memory, open files, shared memory and logs grow by nothing, or by what was measured."""

import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.durability.small import small
from tools.chaos import start, wait

pytestmark = pytest.mark.slow
EVERY = 100  # steps
SETTLED = 800  # steps after which every kind of thing has happened: sizes, epochs, validations, saves


def watch():
    """Writes what the process holds to the log, every so many steps."""
    from dance_seg.callbacks import ExactResume

    before = ExactResume.on_train_batch_start

    def watching(self, trainer, pl_module, batch, batch_idx):
        before(self, trainer, pl_module, batch, batch_idx)
        if trainer.global_step % EVERY == 0:
            gc.collect()  # what waits for the collector is no leak
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            held = {
                "step": trainer.global_step,
                # Its own memory: pages of the mapped store of images are the system's, and come with being read.
                "kilobytes": int(status["RssAnon"].split()[0]),
                "threads": int(status["Threads"]),
                "files": len(os.listdir("/proc/self/fd")),
                "shared": len([name for name in os.listdir("/dev/shm") if name.startswith("torch_")]),
                "log": (Path(trainer.default_root_dir) / "metrics.jsonl").stat().st_size,
            }
            print("held", json.dumps(held), flush=True)

    ExactResume.on_train_batch_start = watching


def leak():
    """The control: 4 KB a step that nobody lets go of."""
    from dance_seg.callbacks import Moves

    kept, before = [], Moves.on_train_batch_end

    def leaking(self, *arguments):
        kept.append(os.urandom(4096))
        before(self, *arguments)

    Moves.on_train_batch_end = leaking
    watch()


def held(place, tamper, cache, *overrides):
    recipe = small(
        "data_slimming", "data.args.num_train=400", "trainer.max_epochs=28", "trainer.validate_every=4",
        "trainer.save_every_minutes=0.02", "trainer.log_every=10", "trainer.ema=0.9", "name=run", *overrides,
        cache=cache,
    )  # fmt: skip
    assert wait(start(recipe, place, tamper), seconds=1500) == [0]
    lines = (place / "rank-0.log").read_text().splitlines()
    rows = [json.loads(line[line.index("held {") + 5 :]) for line in lines if "held {" in line]
    rows = [row for row in rows if row["step"] >= SETTLED]
    assert rows[-1]["step"] >= 2000
    return rows


def slope(rows, key):
    """By how much a figure grows in one step: the line of least squares."""
    return float(np.polyfit([row["step"] for row in rows], [row[key] for row in rows], 1)[0])


def test_nothing_grows_over_two_thousand_steps(tmp_path):
    rows = held(tmp_path, watch, tmp_path / "cache", "data.args.workers=2")
    assert slope(rows, "kilobytes") < 1.0, [row["kilobytes"] for row in rows]
    for key in ("files", "threads", "shared"):
        assert max(row[key] for row in rows) <= rows[0][key] + 4, key
    assert slope(rows, "log") < 100  # bytes a step, at a row every ten steps
    assert (tmp_path / "rank-0.log").stat().st_size < 5e6


def test_a_leak_of_four_kilobytes_a_step_would_be_seen(tmp_path):
    assert slope(held(tmp_path, leak, tmp_path / "cache"), "kilobytes") > 2.0
