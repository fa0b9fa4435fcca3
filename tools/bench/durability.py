"""What it costs a run to be safe: python -m tools.bench.durability.

`save_stall_share`: the share of training time that one checkpoint a minute takes from it: the seconds by which steps
with a save outlast the same steps without, the sides taking turns, over 60 s. `resume_seconds`: from the network being
built to the beginning of the first new step, checkpoint read and verified. `guard_share`: the share of a step that the
guards take by their own clock: the look for NaN and infinity, for signals, for failed saves, the heartbeat.

The network and the size are those of recipes/camvid_dance.yaml with averaged weights, on drawn scenes of 360x480.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tools.bench.common import spread, write_result
from tools.cli import parser, run

MINUTE = 60.0
HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
TARGETS = {"save_stall_share": 0.02, "resume_seconds": 3.0, "guard_share": 0.01}


def main() -> int:
    """Measure, and write runs/bench/durability.json."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--runs", type=int, default=5, help="rounds; default 5")
    arguments_parser.add_argument("--size", type=int, nargs=2, default=(352, 480), help="of a crop; default 352 480")
    arguments_parser.add_argument("--batch", type=int, default=8, help="images of a step; default 8")
    arguments = arguments_parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dance-seg-durability-") as place:
        recipe = bench_recipe(Path(place), tuple(arguments.size), arguments.batch)
        stalls, calls, megabytes = measure_saves(recipe, Path(place), arguments.runs)
        resumes, shares = measure_runs(recipe, Path(place), arguments.runs)
    figures = {
        "save_stall_share": spread([seconds / MINUTE for seconds in stalls["background"]]),
        "resume_seconds": spread(resumes),
        "guard_share": spread(shares),
        "save_stall_share/waiting": spread([seconds / MINUTE for seconds in stalls["waiting"]]),
        "save_call_seconds": spread(calls),
    }
    missed = [f"{key} {figures[key]['median']:.3g}, above {most}" for key, most in TARGETS.items()
              if figures[key]["median"] > most]  # fmt: skip
    notes = {
        "checkpoint_megabytes": round(megabytes, 1),
        "save_stall_share/waiting": "the same, when training waits for every save",
        "targets": "; ".join(missed) or "met: " + ", ".join(f"{key} below {most}" for key, most in TARGETS.items()),
    }
    write_result("durability", arguments.runs, figures, notes)
    return 0


def bench_recipe(place: Path, crop: tuple[int, int], batch_size: int) -> Any:
    """Four steps an epoch of the network of recipes/camvid_dance.yaml, without slimming, which changes its size."""
    from dance_seg.part import Part
    from dance_seg.recipe import load_recipe, recipe_from_record, recipe_record

    recipe = load_recipe("recipes/camvid_dance.yaml")
    images = {
        "num_train": 4 * batch_size, "num_val": 1, "size": [crop[0] + 8, crop[1]], "crop": list(crop),
        "batch_size": batch_size, "cache_dir": str(place / "cache"), "statistics_images": 2,
    }  # fmt: skip
    scenes = replace(recipe, data=Part("shapes", images), data_slimming=None, network_slimming=None)
    changes = ("trainer.ema=0.99", "trainer.save_every_minutes=0", "trainer.max_epochs=2", "trainer.validate_every=2")
    quiet = ("tracking.wandb=disabled", "trainer.accelerator=cpu", "name=bench")
    return recipe_from_record(recipe_record(scenes), [*changes, *quiet], at="bench")


def measure_saves(recipe: Any, place: Path, runs: int) -> tuple[dict[str, list[float]], list[float], float]:
    """Seconds by which a save prolongs steps, in the background and waited for; the call's own; megabytes of a file."""
    import torch

    from dance_seg.background import BackgroundWriter
    from dance_seg.build import build_model, build_module
    from dance_seg.losses import per_sample_loss, weighted_mean
    from dance_seg.module import make_optimizer
    from datamodules import build_datamodule

    torch.manual_seed(0)
    datamodule = build_datamodule(recipe)
    model = build_model(recipe, len(datamodule.classes))
    datamodule.fit_to(stride=model.stride, epochs=2, seed=0, data_slimming=None)  # type: ignore[arg-type]
    datamodule.prepare_data()
    module = build_module(recipe, model, datamodule)
    optimizer, average = make_optimizer(model, recipe.optimizer), module.average
    assert average is not None
    batch = datamodule.on_after_batch_transfer(next(iter(datamodule.train_dataloader())), 0)
    writer, path, calls = BackgroundWriter(), place / "measured.ckpt", list[float]()

    def step() -> None:
        losses = per_sample_loss(module.model(batch.images), batch.labels, recipe.loss)
        optimizer.zero_grad()
        weighted_mean(losses, batch.weights).backward()
        optimizer.step()
        average.follow(module.model)

    def record() -> dict[str, Any]:
        return {
            "state_dict": module.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "average": average.state(),
        }

    def save() -> None:
        began = time.perf_counter()
        writer.save(record(), path)
        calls.append(time.perf_counter() - began)

    def save_and_wait() -> None:
        writer.save(record(), path)
        writer.finish()

    def steps(act: Callable[[], None]) -> float:
        began = time.perf_counter()
        act()
        for _ in range(2):  # long enough for the thread to be done
            step()
        took = time.perf_counter() - began
        writer.finish()
        return took

    sides = {"without": lambda: None, "background": save, "waiting": save_and_wait}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(runs + 1):  # the first warms up: memory, kernels, the state of the optimiser
        for name, act in sides.items():
            took = steps(act)
            if turn:
                times[name].append(took)
    stalls = {
        name: [max(0.0, a - b) for a, b in zip(times[name], times["without"], strict=True)]
        for name in ("background", "waiting")
    }
    return stalls, calls[1:], path.stat().st_size / 1e6


def measure_runs(recipe: Any, place: Path, runs: int) -> tuple[list[float], list[float]]:
    """For each round: seconds to resume a run broken off in its second epoch, and the share of its guards."""
    from pytorch_lightning import Callback

    import dance_seg.build as build
    from dance_seg.callbacks import FiniteSteps, Moves, StopOnSignal
    from dance_seg.signals import StoppedBySignal
    from datamodules import build_datamodule

    made_model, made_trainer = build.build_model, build.build_trainer
    marks: dict[str, float] = {}
    spent = {"guards": 0.0, "steps": 0.0}
    breaks = True

    def build_model(*arguments: Any) -> Any:
        model = made_model(*arguments)
        marks["built"] = time.perf_counter()
        return model

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                spent["guards"] += time.perf_counter() - began

        return measured

    def build_trainer(*arguments: Any) -> Any:
        trainer = made_trainer(*arguments)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, FiniteSteps | Moves | StopOnSignal):
                for hook in (
                    "on_train_batch_start",
                    "on_before_backward",
                    "on_before_optimizer_step",
                    "on_train_batch_end",
                ):
                    setattr(callback, hook, timed(getattr(callback, hook)))
        callbacks.insert(0, Clock())
        return trainer

    class Clock(Callback):
        """Marks the first step, and breaks the run off in its second epoch."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            marks.setdefault("step", time.perf_counter())
            marks["began"] = time.perf_counter()
            if breaks and trainer.global_step == 6:
                raise StoppedBySignal(15)

        def on_train_batch_end(self, *_: Any) -> None:
            spent["steps"] += time.perf_counter() - marks["began"]

    resumes, shares = [], []
    with patch.multiple(build, build_model=build_model, build_trainer=build_trainer):
        for number in range(runs):
            folder, breaks = place / f"run-{number}", True
            try:
                build.train(recipe, build_datamodule(recipe), folder)
            except StoppedBySignal:
                breaks = False
            marks.clear()
            spent |= {"guards": 0.0, "steps": 0.0}
            build.train(recipe, build_datamodule(recipe), folder)
            resumes.append(marks["step"] - marks["built"])
            shares.append(spent["guards"] / spent["steps"])
    return resumes, shares


if __name__ == "__main__":
    run(main)
