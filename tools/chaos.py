"""Kill a training again and again, and see that nothing is lost: python -m tools.chaos RECIPE... [key=value ...].

Each recipe is trained once undisturbed, on drawn scenes of 64x64 with a tiny network, its own slimming and options
kept. Then it is trained again and again, killed by SIGKILL at random moments, from start-up to the last save, and
started again, until it ends: weights, momentum, averages, structure and every logged loss must be those of the
undisturbed run, to the last bit. With several processes one rank, drawn at random, is killed, and the others have to
notice and end by themselves.

A process that has torch and Lightning loaded forks each training, so that a kill costs a second and not ten; what is
killed is a training process like any other. The result is runs/bench/chaos.json.
"""

import hashlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tools.cli import parser, run

if TYPE_CHECKING:
    from dance_seg.recipe import Recipe

KILLS_A_RUN = 5
"""How often one run is killed before it may end."""

ENDS_WITHIN_S = 300.0
"""How long a training of this size may take beside others, and the other ranks to notice that one was killed."""

TINY = (
    "data.args.size=[64,64]",
    "data.args.crop=[64,64]",
    "data.args.num_train=14",
    "data.args.num_val=3",
    "data.args.batch_size=4",
    "data.args.statistics_images=4",
    "data.args.cache_gb=0.1",
    "trainer.max_epochs=4",
    "trainer.validate_every=1",
    "trainer.log_every=1",
    "trainer.save_every_minutes=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.threads=1",
    "trainer.ema=0.9",
    "trainer.patience_minutes=0.5",
    "tracking.wandb=disabled",
)
_PORTS_GIVEN, _PORTS_LOCK = set[int](), Lock()
LOADED = ["torch", "pytorch_lightning", "dance_seg.build", "dance_seg.report.run_page", "datamodules"]


def main() -> int:
    """Kill, compare, and write the result; exit status 1 when a run ended otherwise than the undisturbed one."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("recipes", metavar="RECIPE|key=value", nargs="+", help="recipes, and what to change")
    arguments_parser.add_argument("--kills", type=int, default=100, help="of each recipe and each number of processes")
    arguments_parser.add_argument("--processes", type=int, nargs="+", default=[1], help="such as 1 2; default 1")
    arguments_parser.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    arguments_parser.add_argument("--at-once", type=int, default=8, help="trainings at the same time; default 8")
    arguments = arguments_parser.parse_intermixed_args()
    if min(arguments.kills, arguments.at_once, *arguments.processes) < 1:
        raise ValueError("--kills, --processes and --at-once are at least 1")
    recipes = [word for word in arguments.recipes if "=" not in word]
    overrides = [word for word in arguments.recipes if "=" in word]
    if not recipes:
        raise ValueError("no recipe was named; name one, such as recipes/shapes_dance.yaml")
    # What killed processes did not give back is given back for them, and said at length.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="dance-seg-chaos-") as place:
        for path in recipes:
            for ranks in arguments.processes:
                name = f"{Path(path).stem} x{ranks}"
                recipe = tiny_recipe(path, [f"trainer.devices={ranks}", *overrides], cache=Path(place) / "cache")
                outcomes[name] = chaos(
                    recipe,
                    Path(place) / name.replace(" ", "-"),
                    arguments.kills,
                    arguments.seed,
                    at_once=1 if ranks == 1 else arguments.at_once,  # alone it does not wait, and others only slow it
                )
                write(outcomes)
    return 0 if all(outcome.identical == outcome.kills for outcome in outcomes.values()) else 1


def write(outcomes: dict[str, "Outcome"]) -> None:
    """Write what is known so far."""
    from tools.bench.common import spread, write_result

    identical, kills = (sum(getattr(o, key) for o in outcomes.values()) for key in ("identical", "kills"))
    figures = {"identical": spread([identical]), "kills": spread([kills])}
    figures |= {f"identical/{name}": spread([outcome.identical]) for name, outcome in outcomes.items()}
    figures |= {f"seconds_a_kill/{name}": spread(outcome.seconds) for name, outcome in outcomes.items()}
    differing = [f"{name}: {what}" for name, outcome in outcomes.items() for what in outcome.differences]
    write_result("chaos", len(outcomes), figures, {"differences": differing} if differing else {})


@dataclass
class Outcome:
    """What came of the kills of one recipe: how many, and how many of them in runs that ended as if undisturbed."""

    kills: int
    identical: int
    seconds: list[float]
    differences: list[str]

    def with_those_of(self, other: "Outcome") -> "Outcome":
        """Both together."""
        return Outcome(
            self.kills + other.kills,
            self.identical + other.identical,
            self.seconds + other.seconds,
            self.differences + other.differences,
        )


def tiny_recipe(path: str, overrides: list[str], *, cache: Path) -> "Recipe":
    """A recipe with its own sections, on drawn scenes with a network that trains in seconds."""
    import yaml

    from dance_seg.part import Part
    from dance_seg.recipe import load_recipe, recipe_from_record, recipe_record

    record = recipe_record(replace(load_recipe(path), data=Part("shapes"), model=Part("jitnet", {"width": 0.125})))
    if record["network_slimming"] is not None:
        record["network_slimming"] |= {"round_to": 1, "keep": max(0.6, record["network_slimming"]["keep"]), "cuts": 2}
    given = [*TINY, f"data.args.cache_dir={yaml.safe_dump(str(cache)).splitlines()[0]}", *overrides]
    return recipe_from_record(record, given, at=path)


def chaos(
    recipe: "Recipe",
    folder: Path,
    kills: int,
    seed: int = 0,
    tamper: Callable[[], None] | None = None,
    *,
    at_once: int = 1,
) -> Outcome:
    """Train undisturbed, then again under `kills` kills, and compare the ends.

    `tamper` is called in each training process first: a test takes a protection away by it. So many runs are under way
    `at_once`: when one rank is killed at start-up, the others wait for it for as long as their patience lasts. Raises
    ValueError when the undisturbed run itself fails.
    """
    recipe = replace(recipe, name="run")
    warm_up()
    began = time.monotonic()
    train_to_its_end(recipe, folder / "undisturbed")
    took = time.monotonic() - began
    whole, outcome, number = end_of(folder / "undisturbed/run"), Outcome(0, 0, [], []), 0
    with ThreadPoolExecutor(at_once) as pool:
        while outcome.kills < kills:
            asked = [min(KILLS_A_RUN, left) for left in range(kills - outcome.kills, 0, -KILLS_A_RUN)]
            runs = [
                pool.submit(disturbed, recipe, folder / f"killed-{number + each}", count, took, seed, tamper, whole)
                for each, count in enumerate(asked)
            ]
            number += len(runs)
            for run in runs:
                outcome = outcome.with_those_of(run.result())
            if outcome.kills < kills:
                took *= 0.8  # some ended before they could be killed
    return outcome


def disturbed(
    recipe: "Recipe",
    place: Path,
    kills: int,
    took: float,
    seed: int,
    tamper: Callable[[], None] | None,
    whole: dict[str, str],
) -> Outcome:
    """One training that is killed so often, or until it ends before, and its end against that of the whole one."""
    moments, left, seconds = random.Random(f"{seed} {place.name}"), took, list[float]()
    try:
        for _ in range(kills):
            began, moment = time.monotonic(), moments.uniform(0, left)
            if not killed(recipe, place, moment, moments, tamper):
                break
            seconds.append(time.monotonic() - began)
            left = max(took / 4, left - moment / 2)  # a part of that time was spent on starting
        train_to_its_end(recipe, place, tamper)
        found = differing(whole, end_of(place / "run"))
    except TimeoutError as error:
        seconds, found = seconds or [ENDS_WITHIN_S], [str(error)]
    return Outcome(len(seconds), 0 if found else len(seconds), seconds, found)


def killed(
    recipe: "Recipe", place: Path, moment: float, moments: random.Random, tamper: Callable[[], None] | None
) -> bool:
    """Start a training and kill one of its ranks after `moment` seconds; False when it had ended before."""
    ranks = start(recipe, place, tamper)
    time.sleep(moment)
    unlucky = moments.choice(ranks)
    unlucky.kill()  # which is nothing to a process that ends at this moment
    codes = wait(ranks)
    if codes[ranks.index(unlucky)] == -signal.SIGKILL:
        return True
    if any(codes):
        raise ValueError(f"a training that was not killed ended with {codes}:\n{said(place)}")
    return False


def train_to_its_end(recipe: "Recipe", place: Path, tamper: Callable[[], None] | None = None) -> None:
    """Train, or go on, undisturbed. Raises ValueError with what was said when it fails."""
    codes = wait(start(recipe, place, tamper))
    if any(codes):
        raise ValueError(f"the training ended with {codes}:\n{said(place)}")


# Processes ----------------------------------------------------------------------------------------------------------


def start(recipe: "Recipe", place: Path, tamper: Callable[[], None] | None = None) -> list[Any]:
    """Start the processes of a training into PLACE/NAME, one for each device, and give them back.

    What each says goes to PLACE/rank-*.log.
    """
    place.mkdir(parents=True, exist_ok=True)
    ranks = recipe.trainer.devices
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    port = free_port() if ranks > 1 else 0
    processes = [
        context.Process(target=_train, args=(recipe, place, tamper, rank, ranks, port)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def warm_up() -> None:
    """Let the process that forks the others load what they need, so that no training is charged for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=int)
    process.start()
    process.join()


def wait(processes: list[Any], seconds: float = ENDS_WITHIN_S) -> list[int | None]:
    """The exit statuses; a process that does not end in time is killed, and that is an error.

    Raises TimeoutError.
    """
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hung = [number for number, process in enumerate(processes) if process.exitcode is None]
    for number in hung:
        processes[number].kill()
        processes[number].join()
    if hung:
        raise TimeoutError(f"rank {hung[0]} had not ended after {seconds:g} s")
    return [process.exitcode for process in processes]


def said(place: Path) -> str:
    """The last lines of each rank's log."""
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in sorted(place.glob("*.log")))


def free_port() -> int:
    """A port that nobody listens on, and that was not given before."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        with _PORTS_LOCK:
            if port not in _PORTS_GIVEN:
                _PORTS_GIVEN.add(port)
                return port


def _train(recipe: "Recipe", place: Path, tamper: Callable[[], None] | None, rank: int, ranks: int, port: int) -> None:
    """One rank, in its own process."""
    with (place / f"rank-{rank}.log").open("ab", buffering=0) as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from dance_seg.build import train
    from datamodules import build_datamodule

    if tamper is not None:
        tamper()

    def go() -> None:
        train(recipe, build_datamodule(recipe), place / recipe.name)

    run(go)


# What a run came to -------------------------------------------------------------------------------------------------


def end_of(folder: Path) -> dict[str, str]:
    """The hash of each part of a finished run that must not depend on interruptions."""
    from dance_seg.checkpoint import newest_valid
    from dance_seg.metrics_file import read_metrics

    found = newest_valid(folder / "checkpoints", "step-*.ckpt")
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint")
    record = found[1]
    parts = {key: record.get(key) for key in ("state_dict", "optimizer_states", "average", "structure", "global_step")}
    parts["place"] = record["callbacks"]["ExactResume"]
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row or "val/miou" in row]
    parts["figures"] = [sorted((key, value) for key, value in row.items() if key != "time") for row in rows]
    return {key: digest(value) for key, value in parts.items()}


def digest(value: Any) -> str:
    """The SHA-256 of plain data and tensors, whose bytes count and not how they lie in memory.

    >>> digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1})
    True
    """
    hashed = hashlib.sha256()
    for piece in _pieces(value):
        hashed.update(piece)
    return hashed.hexdigest()


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The parts in which two ends differ.

    >>> differing({"state_dict": "ab", "place": "c"}, {"state_dict": "ab", "place": "d"})
    ['place']
    """
    return [key for key in one if one[key] != other[key]]


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield f"{key}:".encode()
            yield from _pieces(value[key])
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}]".encode()
        for item in value:
            yield from _pieces(item)
    elif hasattr(value, "detach"):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().contiguous().numpy().tobytes()
    else:
        yield repr(value).encode()


if __name__ == "__main__":
    run(main)
