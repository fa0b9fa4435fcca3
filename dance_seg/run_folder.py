"""The folder of a run: whose it is, who may write into it, and the facts that stand beside its figures (run.json)."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dance_seg.checkpoint import check_writable, clean_temporary
from dance_seg.machine import processor, write_text
from dance_seg.plain_data import read_object
from dance_seg.recipe import Recipe, load_recipe, recipe_differences, save_recipe, with_execution

# Keys that may differ when a run goes on: they change where and how fast it runs, not what it computes.
FREE_KEYS = (
    "tracking.",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.bad_steps",
    "trainer.save_every_minutes",
    "trainer.patience_minutes",
    "trainer.log_every",
    "data.args.root",
    "data.args.workers",
    "data.args.cache_",
)


LOCK_SECONDS = 10.0
"""How long another process may still write into the folder."""


def open_folder(recipe: Recipe, folder: Path) -> Recipe:
    """Make the run folder, or check that the run in it is this one; returns the recipe with what that run has chosen.

    Within `written_by_this_process`, since what a killed process left half written is thrown away.
    A recipe whose execution is still to be measured is not written yet. Where nothing was trained, since the command
    had a mistake, say, the folder is nobody's yet.
    """
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    clean_temporary(folder / "checkpoints")
    there = folder / "recipe.yaml"
    trained = any((folder / "checkpoints").glob("*.ckpt")) or (folder / "metrics.jsonl").is_file()
    if there.is_file() and trained:
        earlier = load_recipe(there)
        if recipe.trainer.execution == earlier.trainer.execution == "auto":
            recipe = with_execution(recipe, earlier.trainer)
        differing = [d for d in recipe_differences(earlier, recipe) if not d.startswith(FREE_KEYS)]
        if differing:
            raise ValueError(
                f"{folder} holds a run of another recipe (there / here: {'; '.join(differing[:5])}); choose another "
                f"name=..., to train on from its weights with start_from={folder}, or move {folder} away"
            )
    if trained or recipe.trainer.execution != "auto":
        save_recipe(recipe, there)
    return recipe


@contextmanager
def written_by_this_process(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a run folder until the end of the block, or of this process.

    One that is about to end, as when a job was queued again, has a few seconds for it. Raises ValueError, naming the
    other, when it goes on, and CheckpointError when the folder cannot be written. Where the file system has no locks
    there is none.
    """
    check_writable(folder)
    with open(folder / ".lock", "a+") as file:
        until = time.monotonic() + LOCK_SECONDS
        while not _locked(file.fileno()):
            if time.monotonic() > until:
                file.seek(0)
                raise ValueError(
                    f"{folder} is being written by another process ({file.read().strip() or 'unknown'}); wait for it, "
                    "end it, or give another name=..."
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _locked(descriptor: int) -> bool:
    """Whether this process has the lock now; unlike one of `flock`, processes forked from it do not keep it."""
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, ImportError):  # a file system, or a system, without locks
        return True
    return True


def run_id(folder: Path) -> str:
    """A random name that stays the same when the run goes on."""
    import secrets

    known = notes(folder)
    if "run_id" not in known:
        note(folder, run_id=secrets.token_hex(4), started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **circumstances())
    return str(notes(folder)["run_id"])


def is_main() -> bool:
    """Whether this process is the one that writes: rank 0, as the launchers of Lightning, torchrun and SLURM tell."""
    names = ("RANK", "SLURM_PROCID") if "LOCAL_RANK" not in os.environ else ("RANK", "LOCAL_RANK", "NODE_RANK")
    return all(int(os.environ.get(name, 0)) == 0 for name in names)


def circumstances() -> dict[str, Any]:
    """Hardware, versions and commit, to be kept beside the figures of a run."""
    import subprocess
    from importlib.metadata import version

    try:
        command = ["git", "describe", "--always", "--dirty=+"]
        place = Path(__file__).parent
        described = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        described = ""
    return {
        "commit": described,
        "processor": processor(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "segmentation-models-pytorch")},
    }


def notes(folder: Path) -> dict[str, Any]:
    """What is known of a run: its run.json; nothing where there is none yet. Raises DataError when it is damaged."""
    return read_object(folder / "run.json")


def note(folder: Path, **facts: Any) -> None:
    """Add facts to a run's run.json."""
    write_text(folder / "run.json", json.dumps({**notes(folder), **facts}, indent=2) + "\n")
