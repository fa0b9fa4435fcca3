"""The folder of a run: whose it is, who may write into it, and the facts that stand beside its figures (run.json)."""

import json
import os
import time
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


def open_folder(recipe: Recipe, folder: Path) -> Recipe:
    """Make the run folder, or check that the run in it is this one; returns the recipe with what that run has chosen.

    A recipe whose execution is still to be measured is not written yet.
    """
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    check_writable(folder)
    clean_temporary(folder / "checkpoints")
    there = folder / "recipe.yaml"
    if there.is_file():
        earlier = load_recipe(there)
        if recipe.trainer.execution == earlier.trainer.execution == "auto":
            recipe = with_execution(recipe, earlier.trainer)
        differing = [d for d in recipe_differences(earlier, recipe) if not d.startswith(FREE_KEYS)]
        if differing:
            raise ValueError(
                f"{folder} holds a run of another recipe (there / here: {'; '.join(differing[:5])}); choose another "
                f"name=..., or move {folder} away"
            )
    if there.is_file() or recipe.trainer.execution != "auto":
        save_recipe(recipe, there)
    return recipe


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
