"""A recipe: the options of one run, from one YAML file and the command line. The only file that knows OmegaConf."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING, MissingMandatoryValue, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from dance_seg.data_slimming.adaptive import AdaptiveResolution
from dance_seg.data_slimming.plan import DataSlimming
from dance_seg.distillation.online import OnlineDistillation
from dance_seg.early_exit.learning import EarlyExit
from dance_seg.errors import RecipeError, first_line
from dance_seg.losses import Loss, SoftLabels
from dance_seg.machine import secrets, write_text
from dance_seg.network_slimming.schedule import NetworkSlimming
from dance_seg.options import Optimizer, Tracking, Training, plain
from dance_seg.part import Part
from dance_seg.plain_data import MAX_DEPTH, parse_yaml, write_yaml
from dance_seg.supernet.sampling import Sampling

MAX_BYTES = 1 << 20  # no honest recipe is larger
MAX_BATCH = 1 << 16  # images
MIN_SECRET = 16  # characters from which the value of an environment variable is no chance agreement
MAX_NAME = 100  # characters of a run's name, which names a folder
VIDEO = "video_"
VIDEOS = ("video_shapes", "video_camvid", "video_file", "video_folder")  # names of `data` for a student that follows
_PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a run. A section that is absent is off."""

    data: Part
    model: Part
    name: str = ""  # of the run's folder; the file's name when empty
    seed: int = 0
    start_from: str | None = None  # a run whose weights training begins with, where names and shapes fit
    loss: Loss = field(default_factory=Loss)
    soft_labels: SoftLabels | None = None  # of a trained network, learnt beside the labels
    optimizer: Optimizer = field(default_factory=Optimizer)
    data_slimming: DataSlimming | None = None
    network_slimming: NetworkSlimming | None = None
    supernet: Sampling | None = None  # which networks of a supernet each step trains; absent: its largest alone
    early_exit: EarlyExit | None = None  # how the exits of a model that has some learn; absent: all alike
    distillation: OnlineDistillation | None = None  # the model follows a video, and `data` names the video
    teacher: Part | None = None  # who labels the key frames of that video
    trainer: Training = field(default_factory=Training)
    tracking: Tracking = field(default_factory=Tracking)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file with `section.key=value` overrides applied.

    Raises RecipeError for anything that is not a recipe: unknown keys (with the nearest known one), wrong types and
    values, contradictions between sections, YAML tags, aliases and interpolation. Nothing of it is ever executed.
    """
    path = Path(path)
    if "\0" in str(path) or not path.is_file():
        if "\0" not in str(path) and (path / "recipe.yaml").is_file():
            raise RecipeError(f"{path} is the folder of a run; its recipe is {path / 'recipe.yaml'}")
        there = "\0" not in str(path) and path.parent.is_dir()
        near = sorted(other.name for other in path.parent.glob("*.yaml")) if there else []
        close = get_close_matches(path.name, near, n=1)
        hint = f"did you mean {path.parent / close[0]}?" if close else f"found there: {', '.join(near) or 'no recipe'}"
        raise RecipeError(f"{path}: no such recipe; {hint}")
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: {path.stat().st_size} bytes is no recipe; the limit is {MAX_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
    return parse_recipe(text, overrides, at=str(path), name=path.stem)


def parse_recipe(text: str, overrides: Sequence[str] = (), *, at: str = "recipe", name: str = "run") -> Recipe:
    """The recipe of a YAML text; `at` names it in errors."""
    try:
        record = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{at}: {error}") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise RecipeError(f"{at}: a recipe is a mapping of sections, such as data: and model:, not {kind}")
    return recipe_from_record(record, overrides, at=at, name=name)


def recipe_from_record(
    record: Mapping[str, Any], overrides: Sequence[str] = (), *, at: str = "recipe", name: str = "run"
) -> Recipe:
    """The recipe that `recipe_record` wrote, or any plain data, with overrides; `at` names it in errors.

    Raises RecipeError like `load_recipe`.
    """
    if not isinstance(record, dict):
        raise RecipeError(f"{at}: a recipe is a mapping of sections, not {type(record).__name__}")
    try:
        written = [_override(override) for override in overrides]
        hidden = {name: value for name, value in secrets().items() if len(value) >= MIN_SECRET and os.sep not in value}
        for part in (record, *written):
            _refuse_tricks(part, hidden)
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), record, *written)
        recipe: Recipe = OmegaConf.to_object(merged)  # type: ignore[assignment]
        if not recipe.name:
            recipe = replace(recipe, name=name)
        check_recipe(recipe)
    except MissingMandatoryValue as error:
        raise RecipeError(f"{at}: {first_line(error)}; every recipe names its data and its model") from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", "") else ""
        raise RecipeError(f"{at}: {key}{first_line(error)}{_known_keys(error)}") from None
    except (ValueError, TypeError, AssertionError) as error:
        raise RecipeError(f"{at}: {first_line(error)}") from None
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Refuse sections that contradict one another, before any data or device is touched."""
    if not all(char.isalnum() or char in "-_." for char in recipe.name) or recipe.name.startswith("."):
        raise ValueError(f"name is {recipe.name!r}: letters, digits, '-', '_' and '.', since it names a folder")
    if len(recipe.name) > MAX_NAME:
        raise ValueError(f"name has {len(recipe.name)} characters; at most {MAX_NAME}, since it names a folder")
    if recipe.seed < 0:
        raise ValueError(f"seed is {recipe.seed}: zero or more")
    ranks = recipe.trainer.devices * recipe.trainer.num_nodes
    batch_size = recipe.data.args.get("batch_size", 8)
    if isinstance(batch_size, int) and batch_size > MAX_BATCH:
        raise ValueError(f"data.args.batch_size is {batch_size}: the images of all devices, at most {MAX_BATCH}")
    if isinstance(batch_size, int) and (batch_size % ranks or batch_size < 2 * ranks):
        raise ValueError(
            f"data.args.batch_size {batch_size} counts the images of all devices: it must divide by trainer.devices x "
            f"trainer.num_nodes = {ranks} and leave each at least 2; try {max(2, round(batch_size / ranks)) * ranks}"
        )
    slimming = recipe.data_slimming
    if slimming is not None and recipe.trainer.choose_from < 1 - slimming.full_resolution_tail - 1e-9:
        raise ValueError(
            f"trainer.choose_from is {recipe.trainer.choose_from}, before the full-resolution tail begins at "
            f"{1 - slimming.full_resolution_tail:g}: the best checkpoint is chosen only in the tail; raise one or the "
            "other"
        )
    cuts = recipe.network_slimming
    if cuts is not None and cuts.end > recipe.trainer.choose_from:
        raise ValueError(
            f"network_slimming.end is {cuts.end}, after trainer.choose_from {recipe.trainer.choose_from}: the best "
            "checkpoint is chosen only among networks that are cut to the end; lower one or raise the other"
        )
    if cuts is not None and recipe.trainer.max_epochs < 2:
        raise ValueError("trainer.max_epochs is 1: network_slimming cuts between two epochs, so there must be two")
    _check_supernet(recipe)
    _check_stream(recipe)


def _check_supernet(recipe: Recipe) -> None:
    """Refuse what does not go with training many networks at once."""
    options = recipe.supernet
    if options is None:
        return
    if recipe.network_slimming is not None:
        raise ValueError(
            "network_slimming has no place beside supernet, whose smaller networks are its slimmed ones; take one of "
            "the sections out"
        )
    if recipe.trainer.compile or recipe.trainer.execution == "auto":
        raise ValueError(
            "trainer.compile and trainer.execution=auto have no place beside supernet, of which each step would be "
            "compiled anew; set compile: false and execution: given"
        )
    if options.end > recipe.trainer.choose_from:
        raise ValueError(
            f"supernet.end is {options.end}, after trainer.choose_from {recipe.trainer.choose_from}: the best "
            "checkpoint is chosen only once the smallest networks have been trained; lower one or raise the other"
        )
    ranks = recipe.trainer.devices * recipe.trainer.num_nodes
    if options.method == "single" and ranks > 1:
        raise ValueError(
            "supernet.method is single, which leaves weights without a gradient, and ranks would wait for them; set "
            "trainer.devices=1, or another method"
        )
    networks = 1 + options.smallest + options.drawn
    images = recipe.data.args.get("batch_size", 8) // ranks
    if options.method == "multi_architectural" and images % networks:
        fitting = [num for num in range(1, images + 1) if images % num == 0]
        drawn = max([num - 1 - options.smallest for num in fitting if num <= networks] + [0])
        raise ValueError(
            f"supernet.drawn is {options.drawn}, so that {networks} networks share a batch of {images} images (of one "
            f"device), which does not divide; set supernet.drawn={drawn}, or data.args.batch_size to "
            f"{ranks * networks * max(1, round(images / networks))}"
        )


def _check_stream(recipe: Recipe) -> None:
    """Refuse a video without a student that follows it, a student without a video or a teacher, and slimming of it."""
    is_video = recipe.data.name.startswith(VIDEO)
    if recipe.distillation is None:
        if is_video:
            raise ValueError(
                f"data.name is {recipe.data.name}, a video, and there is no section distillation; add one "
                "(distillation: {} takes every default), or name images to train on"
            )
        if recipe.teacher is not None:
            raise ValueError(
                f"teacher is {recipe.teacher.name}, and there is no section distillation that would ask it; add one or "
                "take the teacher out"
            )
        return
    if not is_video:
        raise ValueError(
            f"data.name is {recipe.data.name!r}: with a section distillation the student follows a video; choose one "
            f"of {', '.join(VIDEOS)}, or take distillation out"
        )
    if recipe.teacher is None:
        raise ValueError(
            "there is no teacher to learn from; name one, such as teacher: {name: checkpoint, args: {run: runs/...}} "
            "or teacher: {name: train, args: {recipe: recipes/...}}"
        )
    for section in ("data_slimming", "network_slimming", "supernet"):
        if getattr(recipe, section) is not None:
            raise ValueError(
                f"{section} has no place beside distillation, where nothing is trained in epochs; take it out (a "
                "student that was slimmed before is named by model: {name: checkpoint, args: {run: runs/...}})"
            )


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, for recipe.yaml, checkpoints and trackers; passwords in addresses are left out.

    >>> text = "data: {name: video_file, args: {path: 'rtsp://me:word@host/live'}}\\nmodel: {name: jitnet}"
    >>> text += "\\ndistillation: {}\\nteacher: {name: oracle}"
    >>> recipe_record(parse_recipe(text))["data"]["args"]
    {'path': 'rtsp://host/live'}
    """

    def without_password(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_password(item) for key, item in value.items()}
        if isinstance(value, list):
            return [without_password(item) for item in value]
        return _PASSWORD.sub("", value) if isinstance(value, str) and "://" in value else value

    return without_password(plain(recipe))


def adaptive_of(record: Mapping[str, Any]) -> AdaptiveResolution | None:
    """The adaptive resolution of a checkpoint's record; None where its recipe infers at full resolution.

    Raises ValueError when the recipe asks for it and the record lacks the table.
    """
    recipe = recipe_from_record(dict(record["recipe"]))
    options = recipe.data_slimming
    if options is None or options.inference == "full":
        return None
    if not record.get("complexity"):
        raise ValueError("the checkpoint keeps no complexity of training images; set data_slimming.inference=full")
    return AdaptiveResolution(options, np.asarray(record["complexity"], dtype=np.float64), recipe.seed)


def with_execution(recipe: Recipe, execution: Any) -> Recipe:
    """The recipe with the precision, channels_last and compile of something that has these, such as its trainer."""
    chosen = {key: getattr(execution, key) for key in ("precision", "channels_last", "compile")}
    return replace(recipe, trainer=replace(recipe.trainer, **chosen))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML, whole or not at all."""
    write_text(path, write_yaml(recipe_record(recipe)))


def recipe_differences(first: Recipe, second: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ, with both values."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {prefix: value}
        return {
            k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else key).items()
        }

    one, two = flat(recipe_record(first), ""), flat(recipe_record(second), "")
    return [f"{k}: {one.get(k)} / {two.get(k)}" for k in sorted(one.keys() | two.keys()) if one.get(k) != two.get(k)]


def _override(override: str) -> dict[str, Any]:
    """What section.key=value says, as a recipe that holds nothing else.

    >>> _override("data.args.hold_out=[0016E5, 0006R0]")
    {'data': {'args': {'hold_out': ['0016E5', '0006R0']}}}
    """
    key, equals, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names) or len(names) > MAX_DEPTH or set(key) & set("[]{}"):
        raise ValueError(f"{override[:80]!r} is no override; write section.key=value, such as trainer.max_epochs=2")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    for name in reversed(names):
        value = {name: value}
    return value


def _refuse_tricks(value: Any, hidden: Mapping[str, str], key: str = "", depth: int = 0) -> None:
    """Refuse what OmegaConf would look up elsewhere, what other programs would call, and what no option can be."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{key[:80]}: nested too deeply for a recipe")
    if isinstance(value, dict):
        for name, item in value.items():
            here = f"{key}.{name}" if key else str(name)
            if not isinstance(name, str):
                raise ValueError(
                    f"{here}: a key is a name, not {type(name).__name__}; take it out, or put it in quotes"
                )
            if name.startswith("_") or "${" in name:
                raise ValueError(f"{here}: no option has such a name; recipes name no code and interpolate nothing")
            _refuse_tricks(item, hidden, here, depth + 1)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _refuse_tricks(item, hidden, f"{key}[{number}]", depth + 1)
    elif isinstance(value, str):
        if "${" in value:
            raise ValueError(f"{key} holds '${{'; recipes are literal, nothing is interpolated; write the value out")
        if (name := next((name for name, secret in hidden.items() if secret in value), None)) is not None:
            raise ValueError(
                f"{key} holds the value of the environment variable {name}; recipes are written to run folders, "
                "checkpoints and reports: take it out"
            )
        if value == MISSING:
            raise ValueError(f"{key} is {MISSING}; write its value, or take the key out for the default")
        if _CONTROL.search(value):
            raise ValueError(f"{key} is {value[:80]!r}, which holds characters that cannot be seen; take them out")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}: an option is a finite number; take it out for the default")
    elif isinstance(value, int):
        if abs(value) >= 1 << 63:
            raise ValueError(f"{key} is a number of {value.bit_length()} bits; at most 63 are read")
    elif value is not None:
        raise ValueError(f"{key} is a {type(value).__name__}; a recipe holds names, numbers, lists and mappings")


def _known_keys(error: OmegaConfBaseException) -> str:
    """The keys that there are, where an unknown one is like none of them."""
    section = getattr(error, "object_type", None)
    if not isinstance(error, ConfigKeyError) or not is_dataclass(section) or "Did you mean" in str(error):
        return ""
    return f"; it takes: {', '.join(one.name for one in fields(section))}"
