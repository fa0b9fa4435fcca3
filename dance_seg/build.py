"""From a recipe to objects, and the phases of a run: prepare, train or go on, write what it came to."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from dance_seg.allocation import ValuesAtMost
from dance_seg.background import BackgroundWriter
from dance_seg.callbacks import (
    Checkpoints,
    CostLedger,
    ExactResume,
    FiniteSteps,
    ImageLosses,
    Moves,
    NetworkCuts,
    Pictures,
    PlanInLog,
    ReestimatedStatistics,
    StopOnSignal,
    TrainingEnergy,
    checkpoint_of,
)
from dance_seg.checkpoint import forget_older, newest_valid
from dance_seg.checkpoint_io import AtomicCheckpointIO
from dance_seg.ddp import UnevenValidation
from dance_seg.early_exit.exits import ExitNetwork
from dance_seg.errors import first_line
from dance_seg.heartbeat import Heartbeat
from dance_seg.losses import SoftLabels
from dance_seg.machine import has_bfloat16, processor, use_threads, write_text
from dance_seg.models import MODELS
from dance_seg.module import SegmentationModule
from dance_seg.network_slimming.slim import check_reachable
from dance_seg.network_slimming.structure import restructure
from dance_seg.options import Training, first_to_choose
from dance_seg.part import Part, build_part
from dance_seg.recipe import Recipe, load_recipe, recipe_from_record, recipe_record, save_recipe, with_execution
from dance_seg.run_folder import is_main, note, notes, open_folder, run_id, written_by_this_process
from dance_seg.signals import signals_as_before
from dance_seg.supernet.elastic import ElasticBatchNorm2d
from dance_seg.tracking import GuardedWandbLogger, JsonlLogger, guarded_wandb_logger

if TYPE_CHECKING:
    from datamodules.base import SegmentationDataModule


LEAST_TAKEN = 0.5
"""The share of a network's weights that a run to start from must have, since less is a mistake and no start."""

LARGEST_NETWORK = 4_000_000_000
"""Values of a network; what a recipe describes beyond is a slip of the pen, or meant to fill the memory."""

LARGEST_CUT, SMALL_NETWORK = 20, 100_000_000
"""A network built for a checkpoint may hold so many times the values of its tensors, and so many more."""

MAX_CLASSES = 254

MEASURING_SECONDS = 600
"""How long other ranks wait for rank 0 to prepare the data and measure how to execute a step."""


def build_model(recipe: Recipe, num_classes: int, *, most_values: int = LARGEST_NETWORK) -> nn.Module:
    """The network that a recipe names.

    Raises ValueError for a name or an argument that does not exist, and for a network of more than `most_values`,
    before there is memory for it.
    """
    with ValuesAtMost(most_values, "model.args: the network"):
        return build_part(MODELS, recipe.model, at="model", num_classes=num_classes)


def build_module(recipe: Recipe, model: nn.Module, datamodule: "SegmentationDataModule") -> SegmentationModule:
    """The training step of a recipe around a model."""
    weights = recipe.loss.class_weights
    if weights is not None and len(weights) != len(datamodule.classes):
        raise ValueError(
            f"loss.class_weights has {len(weights)} numbers; the data has {len(datamodule.classes)} classes: "
            f"{', '.join(datamodule.classes)}"
        )
    if recipe.early_exit is not None and not isinstance(model, ExitNetwork):
        raise ValueError(
            f"early_exit is given and the model {recipe.model.name} has one exit; name a model with exits, or take the "
            "section out"
        )
    options = recipe.trainer
    if options.sync_batchnorm and any(isinstance(layer, ElasticBatchNorm2d) for layer in model.modules()):
        raise ValueError(
            f"trainer.sync_batchnorm replaces BatchNorm layers, and those of {recipe.model.name} run at several "
            "widths; set it to false"
        )
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.precision == "bf16-mixed":
        from dance_seg.execution import depthwise_in_float32

        model = depthwise_in_float32(model)
    module = SegmentationModule(
        model,
        classes=datamodule.classes,
        loss=recipe.loss,
        optimizer=recipe.optimizer,
        batch_size=datamodule.batch_size,
        ema=options.ema,
        early_exit=recipe.early_exit,
        soft_labels=recipe.soft_labels,
        teacher=load_teacher(recipe.soft_labels, datamodule.classes) if recipe.soft_labels is not None else None,
        supernet=recipe.supernet,
        seed=recipe.seed,
    )
    if options.compile:
        module.model.compile(dynamic=True)
    return module


def tracker_of(recipe: Recipe, folder: Path, *tags: str) -> GuardedWandbLogger | None:
    """The tracker of a recipe's run in a folder, with further tags; None where it is disabled."""
    return guarded_wandb_logger(
        folder,
        mode=recipe.tracking.wandb,
        project=recipe.tracking.project,
        name=recipe.name,
        run_id=run_id(folder),
        config=recipe_record(recipe) | {"run": notes(folder)},
        group=recipe.tracking.group,
        tags=[*tags, *recipe.tracking.tags],
        artifacts=recipe.tracking.artifacts,
    )


def build_trainer(recipe: Recipe, datamodule: "SegmentationDataModule", folder: Path, heartbeat: Heartbeat) -> Trainer:
    """The Trainer of a recipe, writing into a run folder."""
    options = recipe.trainer
    ranks = options.devices * options.num_nodes
    on_cpu = options.accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if options.sync_batchnorm and on_cpu:
        rank_zero_info("trainer.sync_batchnorm is ignored: SyncBatchNorm does not run on a CPU")
    if options.precision == "bf16-mixed" and on_cpu and has_bfloat16() is False:
        rank_zero_warn(
            f"trainer.precision is bf16-mixed, and {processor()} has no bfloat16 instructions: this takes several "
            "times as long as trainer.precision=32-true"
        )
    metrics = JsonlLogger(folder)
    mirror = tracker_of(recipe, folder)

    first = first_to_choose(options.max_epochs, options.validate_every, options.choose_from)

    def may_choose(epoch: int) -> bool:
        return epoch >= first

    ledger = CostLedger(folder)
    slimming = recipe.network_slimming
    cuts = slimming and NetworkCuts(
        slimming,
        datamodule.crop,
        options.max_epochs,
        recipe.seed,
        ledger,
        datamodule.statistics_batches,
        datamodule.labelled_batches,
        folder,
        mirror,
    )
    record = checkpoint_record(recipe, datamodule)
    place = folder / "checkpoints"
    # What was measured is on the disk before the state that goes on after it.
    writer = BackgroundWriter(before=metrics.sync, after=partial(forget_older, place))
    checkpoints = Checkpoints(place, options.save_every_minutes, may_choose, record, writer)
    return Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        precision=options.precision,
        strategy=UnevenValidation(timeout=timedelta(minutes=options.patience_minutes)) if ranks > 1 else "auto",
        sync_batchnorm=options.sync_batchnorm and not on_cpu,
        max_epochs=options.max_epochs,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.gradient_clip,
        check_val_every_n_epoch=options.validate_every,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,  # an epoch has as many batches as its plan says
        use_distributed_sampler=False,  # SameScaleBatches divides among the ranks, and validation must not be padded
        log_every_n_steps=options.log_every,
        deterministic="warn" if options.deterministic else False,
        enable_checkpointing=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO(writer)],
        logger=[metrics, *([mirror] if mirror is not None else [])],
        callbacks=[
            Moves(heartbeat),
            ExactResume(recipe.seed),
            # Part of what training costs: before those that stop counting when validation starts.
            ReestimatedStatistics(datamodule.statistics_batches, may_choose, ledger),
            TrainingEnergy(ledger),
            ledger,
            *([cuts] if cuts else []),
            FiniteSteps(options.bad_steps, folder),
            PlanInLog(mirror),
            ImageLosses(folder),
            Pictures(folder / "pictures", datamodule.label_table.palette, mirror),
            checkpoints,
            StopOnSignal(checkpoints),
        ],
        default_root_dir=folder,
    )


def checkpoint_record(recipe: Recipe, datamodule: "SegmentationDataModule") -> dict[str, Any]:
    """What a reader of a checkpoint needs besides the weights, as plain data."""
    slimming = recipe.data_slimming
    return {
        "recipe": recipe_record(recipe),
        "labels": datamodule.label_table.as_record(),
        "training_images": _images_record(datamodule),
        # The training images' complexity in ascending order: the quantile of any other image is looked up in it.
        "complexity": sorted(float(value) for value in datamodule.table.values) if slimming else None,
    }


def check_devices(options: Training) -> None:
    """Raise ValueError when training asks for devices that torch does not find here."""
    asked, gpus = options.accelerator, torch.cuda.device_count()
    mps = torch.backends.mps.is_available()
    there = {"cpu": True, "gpu": gpus > 0 or mps, "mps": mps, "tpu": find_spec("torch_xla") is not None}
    if not there.get(asked, True):
        raise ValueError(
            f"trainer.accelerator is {asked} and torch {torch.__version__} finds none here; set it to cpu or auto, or "
            "install torch for your device and its driver"
        )
    if asked in ("gpu", "auto") and 0 < gpus < options.devices:
        raise ValueError(
            f"trainer.devices is {options.devices} and torch finds {gpus} GPU{'s' if gpus > 1 else ''} here; set it to "
            f"{gpus}, or trainer.accelerator=cpu"
        )


def _images_record(datamodule: "SegmentationDataModule") -> dict[str, Any]:
    """By what the training images are known again, wherever they lie."""
    names = datamodule.source("train").names
    return {"number": len(names), "names": hashlib.sha256("\n".join(names).encode()).hexdigest()}


def _refuse_other_images(checkpoint: dict[str, Any], datamodule: "SegmentationDataModule", folder: Path) -> None:
    """Raise ValueError when a run would go on with other training images: its place in the plan is one in theirs."""
    kept = checkpoint["dance_seg"]
    then, now = kept.get("training_images"), _images_record(datamodule)
    if then is not None and then != now:
        raise ValueError(
            f"{folder} began with other training images: {then['number']} then, {now['number']} now, with other names; "
            "bring those back, or train anew under another name="
        )
    if kept.get("complexity") and datamodule.data_slimming is not None:
        values = np.sort(datamodule.table.values)
        if len(values) != len(kept["complexity"]) or not np.allclose(values, kept["complexity"], rtol=1e-6, atol=1e-9):
            raise ValueError(
                f"{folder} began with other training images: these have the same names and another complexity; bring "
                "those back, or train anew under another name="
            )


def train(recipe: Recipe, datamodule: "SegmentationDataModule", folder: Path) -> Path:
    """Train a recipe into a run folder, going on where an interrupted run was; returns the folder.

    Raises ValueError when the folder holds a run of another recipe or of other training images, and when another
    process writes into it.
    """
    check_devices(recipe.trainer)
    if not is_main():
        return _train(recipe, datamodule, folder, main=False)
    with written_by_this_process(folder):
        return _train(open_folder(recipe, folder), datamodule, folder, main=True)


def _train(recipe: Recipe, datamodule: "SegmentationDataModule", folder: Path, *, main: bool) -> Path:
    use_threads(recipe.trainer.threads)
    # With deterministic kernels torch fills all new memory, so that who reads it unwritten is found: 6 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # The seed also decides the initial weights, so it is set before the model is built.
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, len(datamodule.classes))
    datamodule.fit_to(
        stride=getattr(model, "stride", 32),
        epochs=recipe.trainer.max_epochs,
        seed=recipe.seed,
        data_slimming=recipe.data_slimming,
    )
    if recipe.network_slimming is not None:
        check_reachable(model, recipe.network_slimming, datamodule.crop)
    datamodule.prepare_data()
    if recipe.trainer.execution == "auto":
        recipe = _with_measured_execution(recipe, folder, model, datamodule)
    found = newest_valid(folder / "checkpoints", "step-*.ckpt")
    if found is None and recipe.start_from is not None:
        rank_zero_info(take_weights(model, recipe.start_from))
    if found is not None:
        _refuse_other_images(found[1], datamodule, folder)
    if found is not None and "structure" in found[1]:
        restructure(model, found[1]["structure"], at=f"{found[0]}: structure")
    module = build_module(recipe, model, datamodule)
    if main:
        write_plan(folder, datamodule)
        note(folder, classes=list(datamodule.classes))
    ranks = recipe.trainer.devices * recipe.trainer.num_nodes
    heartbeat = Heartbeat(folder, ranks, 60 * recipe.trainer.patience_minutes)
    trainer = build_trainer(recipe, datamodule, folder, heartbeat)
    heartbeat.rank = trainer.global_rank
    if found is not None:
        path, checkpoint = found
        place = checkpoint["callbacks"]["ExactResume"]
        if place["epoch"] >= recipe.trainer.max_epochs:
            rank_zero_info(f"{folder} is finished: {place['epoch']} epochs; give another name= to train anew")
            return folder
        rank_zero_info(f"Going on from {path}: epoch {place['epoch']}, batch {place['batch']}")
        if main:
            JsonlLogger(folder).mark_resumed(checkpoint["global_step"])
        del checkpoint
    elif main and (folder / "metrics.jsonl").is_file():
        JsonlLogger(folder).mark_resumed(0)  # from its beginning: no checkpoint was whole
    try:
        with heartbeat:
            fit(trainer, module, datamodule, found[0] if found else None, heartbeat)
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, GuardedWandbLogger):
                logger.finish()
    if trainer.is_global_zero and trainer.current_epoch >= recipe.trainer.max_epochs:
        note(folder, finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    return folder


def fit(
    trainer: Trainer,
    module: SegmentationModule,
    datamodule: "SegmentationDataModule",
    checkpoint: Path | None,
    heartbeat: Heartbeat,
) -> None:
    """Train. Raises LostRankError, which names the rank, where waiting for another one has failed."""
    end_ranks = getattr(trainer.strategy, "end_ranks", lambda: None)
    try:
        # Lightning puts its handlers away before our callback does, which would leave Lightning's in place for good.
        with signals_as_before():
            trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except RuntimeError as error:
        lost = heartbeat.explain(error)
        end_ranks()
        if lost is None:
            raise
        raise lost from error
    except BaseException:
        end_ranks()
        raise


def write_plan(folder: Path, datamodule: "SegmentationDataModule") -> None:
    """Write plan.json, what each epoch will do, and pictures of the simplest and the most complex images."""
    batches, slimming = datamodule.batches, datamodule.data_slimming
    plan: dict[str, Any] = {
        "scales": list(slimming.scales if slimming else (1.0,)),
        "sizes": [list(size) for size in batches.sizes],
        "epochs": [vars(summary) for summary in datamodule.schedule],
        "complexity": None,
        "weights": None,
    }
    if slimming is not None:
        table = datamodule.table
        plan["complexity"] = {"measure": slimming.measure, "names": list(table.names), "values": table.values.tolist()}
        plan["weights"] = batches.plan(len(datamodule.schedule) - 1).weight.tolist()
        order = np.argsort(table.values, kind="stable")
        _thumbnails(folder / "pictures", datamodule, {"simple": order[:4], "complex": order[::-1][:4]})
    write_text(folder / "plan.json", json.dumps(plan))
    dense = len(batches.quantiles) * batches.sizes[-1][0] * batches.sizes[-1][1] * len(datamodule.schedule)
    share = sum(summary.pixels for summary in datamodule.schedule) / dense
    steps = sum(summary.steps for summary in datamodule.schedule)
    rank_zero_info(f"{len(batches.quantiles)} training images, {steps} steps, {share:.2f} of the dense pixels")


def _thumbnails(folder: Path, datamodule: "SegmentationDataModule", chosen: dict[str, Any]) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    source = datamodule.source("train")
    for kind, indices in chosen.items():
        for number, index in enumerate(indices):
            picture = Image.fromarray(np.asarray(source.load(int(index)).image))
            picture.thumbnail((320, 320))
            picture.save(folder / f"complexity_{kind}_{number}_{Path(source.names[index]).name}.png")


def load_model(path: Path, *, averaged: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, on the CPU in evaluation mode, and the checkpoint's record (recipe, labels).

    The averaged weights are taken where the run kept them.
    Raises CheckpointError when the file is damaged or holds no run of this project.
    """
    from dance_seg.checkpoint import load_checkpoint
    from dance_seg.errors import CheckpointError

    checkpoint = load_checkpoint(path)
    record = checkpoint.get("dance_seg")
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: holds no dance_seg record; give a checkpoint that tools.train wrote")
    try:
        if averaged and "average" in checkpoint:
            weights = checkpoint["average"]["state_dict"]
        else:
            prefix = "model."
            weights = {k[len(prefix) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path}: holds no weights of a network; give a checkpoint that tools.train wrote"
        ) from None
    return model_of_record(record, checkpoint.get("structure"), weights, at=str(path)), record


def model_of_record(
    record: dict[str, Any], structure: dict[str, Any] | None, weights: dict[str, Any], *, at: str
) -> nn.Module:
    """The network that a checkpoint's record, structure and tensors describe, on the CPU in evaluation mode.

    Without a structure it is the full network of the recipe. Raises CheckpointError, beginning with `at`, when they do
    not fit together.
    """
    from dance_seg.errors import CheckpointError

    recipe = recipe_from_record(record.get("recipe") or {}, at=f"{at}:recipe")
    # The weights are at hand; nothing is to be fetched.
    fetched = {key: None for key in ("encoder_weights", "preview_weights") if recipe.model.args.get(key)}
    recipe = replace(recipe, model=Part(recipe.model.name, {**recipe.model.args, **fetched}))
    classes = (record.get("labels") or {}).get("classes") if isinstance(record.get("labels") or {}, dict) else None
    if not isinstance(classes, list) or not 1 <= len(classes) <= MAX_CLASSES:
        raise CheckpointError(f"{at}: does not name its classes; give a file that this project wrote")
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{at}: holds no tensors of a network")
    try:
        at_hand = sum(tensor.numel() for tensor in weights.values())
        model = build_model(recipe, len(classes), most_values=LARGEST_CUT * at_hand + SMALL_NETWORK)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{at}: its recipe names no network that can be built: {first_line(error)}") from None
    if structure is not None:
        if not isinstance(structure, dict):
            raise CheckpointError(f"{at}: structure: is a {type(structure).__name__}")
        restructure(model, structure, at=f"{at}: structure")
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        why = next(iter(str(error).splitlines()[1:]), str(error)).strip()[:500]
        raise CheckpointError(f"{at}: its tensors do not fit its recipe: {why}") from None
    return model.eval()


def load_run(folder: Path, choice: str = "best") -> tuple[nn.Module, dict[str, Any], Path]:
    """The network, the record and the path of a run's `best`, `last` or named checkpoint."""
    if not folder.is_dir():
        known = sorted({str(p.parent.parent) for p in Path("runs").glob("*/checkpoints/*.ckpt")})
        raise ValueError(f"{folder}: no such run; there are: {', '.join(known) or 'none yet, train one first'}")
    if choice in ("best", "last") and not (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder} is not the folder of a run: there is no checkpoints/ in it")
    path, _ = checkpoint_of(folder / "checkpoints", choice)
    model, record = load_model(path)
    return model, record, path


def take_weights(model: nn.Module, run: str) -> str:
    """Give a network the weights of a run's best checkpoint where names and shapes fit; returns what was taken.

    Raises ValueError when there is no such run, or less than half of the network's weights are found in it.
    """
    try:
        source, _, path = load_run(Path(run))
    except ValueError as error:
        raise ValueError(f"start_from: {error}") from None
    given, own = source.state_dict(), model.state_dict()
    fitting = {name: given[name] for name in own if name in given and given[name].shape == own[name].shape}
    left = sorted(name for name, _ in model.named_parameters() if name not in fitting)
    taken = sum(weight.numel() for name, weight in model.named_parameters() if name in fitting)
    share = taken / max(1, sum(weight.numel() for weight in model.parameters()))
    if share < LEAST_TAKEN:
        raise ValueError(
            f"start_from: only {share:.0%} of this network's weights fit those of {path}; {left[0]} does not; name a "
            "run of the same model"
        )
    model.load_state_dict(fitting, strict=False)
    return f"Beginning with {share:.0%} of the weights from {path}" + (f"; not {', '.join(left[:3])}" if left else "")


def load_teacher(soft_labels: SoftLabels, classes: Sequence[str]) -> nn.Module:
    """The network whose soft labels a recipe learns from.

    Raises ValueError when there is no such run, or it tells other classes apart.
    """
    try:
        model, record, path = load_run(Path(soft_labels.teacher))
    except ValueError as error:
        raise ValueError(f"soft_labels.teacher: {error}") from None
    if list(classes) != record["labels"]["classes"]:
        raise ValueError(
            f"soft_labels.teacher: {path} tells {', '.join(record['labels']['classes'])} apart; the data has "
            f"{', '.join(classes)}"
        )
    return model


def _with_measured_execution(
    recipe: Recipe, folder: Path, model: nn.Module, datamodule: "SegmentationDataModule"
) -> Recipe:
    """The recipe with the execution that stands in the run's recipe.yaml; measured and written there if it is new."""
    from dance_seg.execution import choose, described, workload

    there = folder / "recipe.yaml"
    if is_main() and not there.is_file():
        batches, ranks = datamodule.batches, recipe.trainer.devices * recipe.trainer.num_nodes
        paid = np.sum([epoch.images_per_scale for epoch in datamodule.schedule], axis=0)
        work = workload(batches.sizes, [count // ranks for count in batches.images_per_batch], paid.tolist())
        steps = sum(epoch.steps for epoch in datamodule.schedule)
        chosen, trials = choose(recipe, model, work, len(datamodule.classes), steps=steps)
        rank_zero_info(described(chosen, trials))
        note(folder, execution=[{**trial.execution._asdict(), "milliseconds": trial.milliseconds} for trial in trials])
        save_recipe(with_execution(recipe, chosen), there)
    end = time.monotonic() + MEASURING_SECONDS
    while not there.is_file():  # the other ranks of a launcher that starts them all at once
        if time.monotonic() > end:
            raise TimeoutError(
                f"{there} was not written within {MEASURING_SECONDS} s; has rank 0 ended? See its messages"
            )
        time.sleep(0.2)
    return with_execution(recipe, load_recipe(there).trainer)
