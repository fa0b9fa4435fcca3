"""From a recipe to the teacher and the student of a stream: trained, loaded, or built with its first weights."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from dance_seg.build import build_model, load_model, load_run
from dance_seg.checkpoint import load_checkpoint
from dance_seg.distillation.state import load_warm_start
from dance_seg.distillation.teacher import TEACHERS, NetworkTeacher, Teacher, check_classes
from dance_seg.inference import WHOLE
from dance_seg.inference import Protocol as Views
from dance_seg.part import Part, build_part
from dance_seg.recipe import Recipe, load_recipe, recipe_from_record, recipe_record
from dance_seg.report.runs import flat
from dance_seg.run_folder import FREE_KEYS, notes
from dance_seg.sample import Frame

if TYPE_CHECKING:
    from datamodules.base import SegmentationDataModule


class Source(Protocol):
    """Where frames come from: what `datamodules.video` builds."""

    name: str
    label_table: Any  # of its ground truth; None where there is none
    frames_per_second: float
    num_frames: int | None

    @property
    def classes(self) -> tuple[str, ...]:
        """Of its ground truth; empty where there is none."""

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """Their colours."""

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """The frames from number `start` on, in order of time."""


def build_teacher(
    recipe: Recipe,
    source: Source,
    *,
    teachers: Path = Path("runs/teachers"),
    build_datamodule: "Callable[[Recipe], SegmentationDataModule] | None" = None,
) -> Teacher:
    """The teacher that a recipe names, for the classes of a video.

    `checkpoint` takes a run or a file that holds a network, `train` the recipe of one, which is trained once and kept
    under `teachers`; `recorded`, `oracle`, `mask_rcnn` and `hugging_face` are those of
    `dance_seg.distillation.teacher`; where the video has no ground truth they are given `classes`. Raises ValueError
    for names, arguments and classes that do not fit, DataError and CheckpointError for files that cannot be used.
    """
    part = recipe.teacher
    if part is None:
        raise ValueError("the recipe names no teacher; add teacher: {name: checkpoint, args: {run: runs/...}}")
    table: dict[str, Callable[..., Teacher]] = {name: make for name, make in TEACHERS.items() if name != "network"}

    def train(
        recipe: str,
        overrides: Sequence[str] = (),
        resolution: float | None = None,
        scales: Sequence[float] = WHOLE.scales,
        flip: bool = WHOLE.flip,
    ) -> Teacher:
        if build_datamodule is None:
            raise ValueError(
                "teacher.name is train, and nothing here can build its data; train it by tools.distill_video"
            )
        wanted = teacher_recipe(recipe, overrides, outer)
        run = trained(wanted, teachers, build_datamodule)
        return checkpoint_teacher(str(run), resolution=resolution, scales=scales, flip=flip)

    outer = recipe
    table |= {"checkpoint": checkpoint_teacher, "train": train}
    if part.name in table and part.name not in ("checkpoint", "train") and source.classes:
        teacher = build_part(table, part, at="teacher", classes=source.classes)
    else:
        teacher = build_part(table, part, at="teacher")
    if source.classes:
        check_classes(teacher.classes, source.classes)
    if recipe.trainer.channels_last and isinstance(teacher, NetworkTeacher):
        teacher.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher


def checkpoint_teacher(
    run: str,
    checkpoint: str = "best",
    resolution: float | None = None,
    device: str | None = None,
    scales: Sequence[float] = WHOLE.scales,
    flip: bool = WHOLE.flip,
) -> NetworkTeacher:
    """A teacher from a run folder (its `best`, `last` or a named checkpoint), a .ckpt or a .safetensors file.

    It sees frames at the resolution it was trained at, unless told otherwise, at each of the `scales` of that and, with
    `flip`, mirrored too. Raises ValueError and CheckpointError.
    """
    protocol = Views(tuple(scales), flip)
    path = Path(run)
    if path.suffix == ".safetensors":
        from dance_seg.export import load_safetensors

        model, record = load_safetensors(path)
    elif path.is_file():
        model, record = load_model(path)
    else:
        model, record, _ = load_run(path, checkpoint)
    if resolution is None:
        resolution = float(record["recipe"]["data"].get("args", {}).get("resolution", 1.0))
    teacher = NetworkTeacher(model, record["labels"]["classes"], resolution, device, protocol)
    teacher.palette = tuple(tuple(color) for color in record["labels"]["palette"])  # type: ignore[attr-defined]
    return teacher


def teacher_recipe(path: str, overrides: Sequence[str], stream: Recipe) -> Recipe:
    """The recipe of a teacher to train; it reads the same folder as the stream where both are of one data set."""
    recipe = load_recipe(path, overrides)
    root = stream.data.args.get("root")
    same_data = stream.data.name == f"video_{recipe.data.name}"
    if root is not None and same_data and not any(override.startswith("data.args.root=") for override in overrides):
        recipe = replace(recipe, data=Part(recipe.data.name, {**recipe.data.args, "root": root}))
    return replace(recipe, tracking=replace(recipe.tracking, wandb=stream.tracking.wandb))


def trained(recipe: Recipe, teachers: Path, build_datamodule: "Callable[[Recipe], SegmentationDataModule]") -> Path:
    """The run folder of a recipe, trained now unless it was before; named by the hash of what decides the run."""
    folder = teachers / f"{recipe.name}-{recipe_hash(recipe)}"
    if not notes(folder).get("finished"):
        from dance_seg.build import train

        train(replace(recipe, name=folder.name), build_datamodule(recipe), folder)
    return folder


def recipe_hash(recipe: Recipe) -> str:
    """Twelve digits that differ where two recipes compute different things; name, place of the data and speed do not.

    >>> from dance_seg.recipe import parse_recipe
    >>> text = "data: {name: shapes}\\nmodel: {name: smp}"
    >>> one, moved = parse_recipe(text, name="a"), parse_recipe(text, ["data.args.root=/there"], name="b")
    >>> recipe_hash(one) == recipe_hash(moved), recipe_hash(one) == recipe_hash(replace(one, seed=1))
    (True, False)
    """
    decisive = {k: v for k, v in flat(recipe_record(recipe)).items() if k != "name" and not k.startswith(FREE_KEYS)}
    decisive = {k: v for k, v in decisive.items() if k != "data.args" or v}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:12]


def palette_of(source: Source, teacher: Teacher) -> tuple[tuple[int, int, int], ...]:
    """A colour for each class: the video's, else the teacher's, else evenly spread hues."""
    known = source.palette or getattr(teacher, "palette", ())
    if len(known) == len(teacher.classes):
        return tuple(known)
    import colorsys

    hues = (k * 0.618034 % 1 for k in range(len(teacher.classes)))
    return tuple(tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.65, 0.85)) for hue in hues)  # type: ignore[misc]


def build_student(recipe: Recipe, classes: Sequence[str]) -> tuple[nn.Module, Recipe, dict[str, Any] | None]:
    """The student of a recipe, the recipe that builds its network again, and the structure it was cut to, if it was.

    `model: {name: checkpoint, args: {run: ...}}` takes the network of another run, slimmed ones too. Raises ValueError
    where its classes are not the teacher's `classes`, or as many others in the run of `distillation.warm_start`.
    """
    torch.manual_seed(recipe.seed)  # decides the initial weights
    structure = None
    if recipe.model.name == "checkpoint":
        model, record, path = build_part({"checkpoint": _network_of}, recipe.model, at="model")
        _check_classes_of(record, classes, f"model.args.run {path}")
        structure = load_checkpoint(path).get("structure")
        recipe = replace(recipe, model=recipe_from_record(record["recipe"]).model)
    else:
        model = build_model(recipe, len(classes))
    assert recipe.distillation is not None
    if recipe.distillation.warm_start is not None:
        other, record, path = _network_of(recipe.distillation.warm_start)
        if len(record["labels"]["classes"]) == len(classes):  # else its last layer does not fit and is left out
            _check_classes_of(record, classes, f"distillation.warm_start {path}")
        load_warm_start(model, other.state_dict())
    if recipe.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    on_cpu = recipe.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    return model.to("cpu" if on_cpu else "cuda"), recipe, structure


def _check_classes_of(record: Mapping[str, Any], classes: Sequence[str], at: str) -> None:
    try:
        check_classes(classes, record["labels"]["classes"])
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None


def _network_of(run: str, checkpoint: str = "best") -> tuple[nn.Module, dict[str, Any], Path]:
    path = Path(run)
    return (*load_model(path), path) if path.is_file() else load_run(path, checkpoint)
