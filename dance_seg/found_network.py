"""A network taken out of a trained supernet, as a run of its own: evaluated, exported and trained on as any other.

Its folder holds recipe.yaml, which trains it on from the weights it has (`start_from=null`: from scratch), a checkpoint
with these weights, the network's own BatchNorm statistics, and for dynamic performance the thresholds of its exits; and
search.json, what the search came to.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn

from dance_seg.build import tracker_of
from dance_seg.calibration import Calibration, Unit, as_figures, costs_of_ways, curves
from dance_seg.checkpoint import save_checkpoint
from dance_seg.cost.macs import count_macs
from dance_seg.early_exit.exits import ExitNetwork
from dance_seg.machine import write_text
from dance_seg.models import NETWORK_OF
from dance_seg.network_slimming.structure import structure_record
from dance_seg.part import Part
from dance_seg.plain_data import read_object
from dance_seg.recipe import Recipe, recipe_from_record, recipe_record, save_recipe
from dance_seg.run_folder import note, run_id
from dance_seg.subnet_scores import SubnetScores
from dance_seg.supernet.search import Found
from dance_seg.supernet.space import Subnet
from dance_seg.supernet.storage import Candidate

SEARCH = "search.json"
TRAINED = "_trained"


def recipe_of_network(recipe: Recipe, subnet: Subnet, folder: Path) -> Recipe:
    """The recipe that trains one network of a supernet's recipe, beginning with the weights in a folder."""
    args = {**recipe.model.args, "subnet": subnet.as_record()}
    return replace(
        recipe,
        name=f"{folder.name}{TRAINED}",
        model=Part(NETWORK_OF[recipe.model.name], args),
        supernet=None,
        start_from=str(folder),
    )


def check_folder(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise ValueError when a folder holds anything but a network found by the same search."""
    if not folder.exists() or all(path.suffix == ".tmp" for path in folder.iterdir()):  # of a writer that was killed
        return
    there = read_object(folder / SEARCH).get("about")
    if not isinstance(there, dict):
        raise ValueError(f"{folder} holds something else than a network that was found; name another --out")
    differing = [key for key in {**there, **about} if there.get(key) != about.get(key)]
    if differing:
        said = "; ".join(f"{key} is {there.get(key)!r} there and {about.get(key)!r} here" for key in sorted(differing))
        raise ValueError(f"{folder} holds what another search found ({said}); name another --out, or move it away")


def write_found(
    folder: Path, record: Mapping[str, Any], judge: SubnetScores, subnet: Subnet, figures: Mapping[str, Any]
) -> nn.Module:
    """Write the folder of a network; returns the network. `record` is that of the supernet's checkpoint.

    `figures` is what goes to search.json. Raises CheckpointError when a file cannot be written.
    """
    # First, since it says whose folder this is: when we are killed, the same search finds it and writes the rest.
    write_text(folder / SEARCH, json.dumps(figures, indent=1) + "\n")
    recipe = recipe_of_network(recipe_from_record(dict(record["recipe"])), subnet, folder)
    network = judge.network(subnet).cpu()
    kept = {**record, "recipe": recipe_record(recipe)}
    kept.pop("exits", None)
    if judge.performance == "dynamic":
        assert isinstance(network, ExitNetwork)
        calibration, curve = calibration_of(network, judge, figures["best"]["details"]["thresholds"])
        resolution = float(recipe.data.args.get("resolution", 1.0))
        kept["exits"] = calibration._replace(resolution=resolution).as_record()
        write_text(folder / "calibration.json", json.dumps(kept["exits"] | {"curves": curve}, indent=1) + "\n")
        network = network.cpu()
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in network.state_dict().items()},
        "structure": structure_record(network),
        "dance_seg": kept,
    }
    save_checkpoint(checkpoint, folder / "checkpoints" / "best.ckpt")
    save_recipe(recipe, folder / "recipe.yaml")
    cost = count_macs(network, judge.split.size)
    write_text(folder / "cost.json", json.dumps({"inference": cost.as_record()}, indent=2) + "\n")
    run_id(folder)
    note(folder, classes=record["labels"]["classes"])
    return network


def calibration_of(
    network: ExitNetwork, judge: SubnetScores, thresholds: list[float | None]
) -> tuple[Calibration, dict[str, Any]]:
    """The thresholds that a search chose, with what a calibration says beside them, and the curves for the report."""
    policy = replace(judge.policy, thresholds=tuple(float("inf") if one is None else one for one in thresholds))
    found = judge.split.exits(network, policy)
    costs = costs_of_ways(network, found.size, policy)
    unit: Unit = "macs" if judge.table is None else "milliseconds"
    share = min(1.0, judge.budget.limit / costs[unit].full)
    achieved = as_figures(found, policy, costs)
    calibration = Calibration(policy, share, unit, "direct", judge.split.split, found.names, costs, achieved)
    return calibration, curves(found, costs, "direct")


def search_figures(found: Found, judge: SubnetScores) -> dict[str, Any]:
    """What a search within a budget came to, as plain data."""
    macs = judge.macs.inference(found.best.subnet, judge.split.size)
    return {
        "unit": judge.unit,
        "limit": judge.budget.limit,
        "best": found.best.as_record() | {"gmacs": macs / 1e9},
        "best_so_far": found.best_so_far,
        "history": [one.as_record() for one in found.history],
        "missing": found.missing,
    }


def judged_rows(history: Sequence[Candidate]) -> list[dict[str, float]]:
    """Every judged network for the tracker, with the best score so far.

    >>> one = Candidate(0, 0, Subnet({"width": 8}), cost=5.0, score=3.0)
    >>> judged_rows([one, one._replace(score=2.0)])[1]
    {'search/score': 2.0, 'search/cost': 5.0, 'search/best': 3.0}
    """
    best = accumulate((one.score for one in history), max)
    return [
        {"search/score": one.score, "search/cost": one.cost, "search/best": so_far}
        for one, so_far in zip(history, best, strict=True)
    ]


def track(recipe: Recipe, folder: Path, *series: Sequence[Mapping[str, float]]) -> None:
    """Rows of figures in the tracker, each series from step 0, in the run named after the folder."""
    logger = tracker_of(replace(recipe, name=folder.name), folder, "search")
    if logger is None:
        return
    for rows in series:
        for step, row in enumerate(rows):
            logger.log_metrics(dict(row), step=step)
    logger.finish()
