"""Run folders, read: the one place that knows what lies in runs/NAME/ and what it means.

recipe.yaml (the resolved recipe), run.json (circumstances), metrics.jsonl, cost.json, plan.json, widths.json,
image_losses.json, pictures/. All but the recipe may still be missing. Figures keep the names under which they were
logged, such as cost/train_gmacs.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dance_seg.errors import DataError
from dance_seg.metrics_file import read_metrics
from dance_seg.options import first_to_choose
from dance_seg.plain_data import MAX_BYTES, parse_yaml, read_object

_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # what makes no sense raises these
_PICTURE = re.compile(r"(\d+)_(.*)_image\.png", re.DOTALL)
_CHARGE = re.compile(r"cost/(.+)_(seconds|gmacs)")
_LEAVING = re.compile(r"exit_(\d+)_(\d+)_(.*)\.png", re.DOTALL)
_THUMBNAIL = re.compile(r"complexity_(simple|complex)_(\d+)_(.*)\.png", re.DOTALL)


@dataclass(frozen=True)
class Validation:
    """The scores of one validation, in points."""

    epoch: int  # epochs of training that were complete
    step: int
    miou: float
    pixel_accuracy: float | None
    class_accuracy: float | None
    iou: Mapping[str, float]  # by class, in the order of train ids


@dataclass(frozen=True)
class Picture:
    """One validation image with its label and its prediction (palette PNGs whose index is the class id)."""

    number: int
    name: str
    image: Path
    label: Path
    prediction: Path


@dataclass(frozen=True)
class Thumbnail:
    """One of the simplest or the most complex training images; rank 0 is the extreme one."""

    rank: int
    name: str
    path: Path


@dataclass(frozen=True)
class PlannedEpoch:
    """What one epoch does with the images."""

    steps: int
    images_offered: int
    images_paid: int
    images_dropped: int
    pixels: int
    images_per_scale: tuple[int, ...]


@dataclass(frozen=True)
class WholePlan:
    """What every epoch does, and the complexity (N,) of the images it follows; both orders are the data's own."""

    scales: tuple[float, ...]
    sizes: tuple[tuple[int, int], ...]  # (H, W) at each scale
    epochs: tuple[PlannedEpoch, ...]
    measure: str = ""
    complexity: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()  # in the loss, (N,), at the end
    names: tuple[str, ...] = ()  # of the images, (N,)

    @property
    def pixels(self) -> int:
        """Pixels that the plan pays for."""
        return sum(epoch.pixels for epoch in self.epochs)

    @property
    def dense_pixels(self) -> int:
        """Pixels of as many epochs with every image at full resolution."""
        height, width = self.sizes[-1]
        return height * width * sum(epoch.images_offered for epoch in self.epochs)


@dataclass(frozen=True)
class Cut:
    """One cut of network slimming: what is left of the full network after it."""

    epoch: int
    macs: float  # share
    channels: float  # share of those that can be cut
    parameters: int


@dataclass(frozen=True)
class Widths:
    """What network slimming left: (name, full width, width now), 0 for what is gone."""

    layers: tuple[tuple[str, int, int], ...]
    branches: tuple[tuple[str, int, int], ...]
    cuts: tuple[Cut, ...]

    def parts(self) -> dict[str, tuple[int, int]]:
        """The channels of each part of the network, such as encoder.layer1, full and now."""
        sums: dict[str, tuple[int, int]] = {}
        for name, full, now in self.layers:
            part = ".".join(name.removeprefix("network.").split(".")[:2])
            before = sums.get(part, (0, 0))
            sums[part] = (before[0] + full, before[1] + now)
        return sums


@dataclass(frozen=True)
class ImageLosses:
    """The mean loss of each training image that an epoch trained on."""

    epoch: int  # epochs of training that were complete
    by_name: Mapping[str, float]


class StaticNetwork(NamedTuple):
    """A network that never stops, beside one with exits."""

    name: str
    miou: float  # points
    costs: Mapping[str, float]  # by unit


class Leaving(NamedTuple):
    """A picture of an image that left at an exit, its predicted labels laid over it."""

    exit: int  # from 1
    rank: int
    name: str
    path: Path


@dataclass(frozen=True)
class Exits:
    """What the exits of a network are worth, and by which thresholds it stops, as calibrated."""

    thresholds: tuple[float | None, ...]  # of all but the last; None where an exit is not asked
    mious: tuple[float, ...]  # points, every image leaving there
    shares: tuple[float, ...]  # of the images that leave there
    costs: Mapping[str, tuple[float, ...]]  # by unit, of leaving at each exit with no other asked
    achieved: tuple[float, float]  # mIoU of stopping by the thresholds, and of the same shares at random
    spent: Mapping[str, float]  # by unit, the average
    curves: Mapping[str, tuple[tuple[float, float, float, float], ...]]  # cost, mIoU; random cost, mIoU
    budget: float
    unit: str
    split: str
    images: int
    beside: tuple[StaticNetwork, ...] = ()
    epochs: int | None = None  # that the run had when it was calibrated
    leaving: tuple[Leaving, ...] = ()


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()  # of metrics.jsonl, superseded ones left out
    training: Mapping[str, Any] = field(default_factory=dict)  # the ledger's sums
    inference: Mapping[str, Any] = field(default_factory=dict)  # one forward pass
    other_costs: Mapping[str, Any] = field(default_factory=dict)  # what else cost.json holds
    plan: WholePlan | None = None
    widths: Widths | None = None
    exits: Exits | None = None
    search: Mapping[str, Any] = field(default_factory=dict)  # what a search of a supernet came to
    pictures: tuple[Picture, ...] = ()
    simplest: tuple[Thumbnail, ...] = ()
    most_complex: tuple[Thumbnail, ...] = ()
    image_losses: ImageLosses | None = None
    title: str = ""  # where the folder's name is not that of the run

    @property
    def name(self) -> str:
        """The name of its folder, or its title."""
        return self.title or self.folder.name or str(self.folder)

    @property
    def seed(self) -> Any:
        """The seed of the recipe."""
        return self.recipe.get("seed", 0)

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return bool(self.circumstances.get("finished"))

    @property
    def max_epochs(self) -> int:
        """The epochs of the whole training, complete or not."""
        return max(1, int(number(section(self.recipe, "trainer").get("max_epochs")) or 1))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the order of their train ids; empty when the run does not say."""
        return tuple(str(name) for name in self.circumstances.get("classes") or ())

    @cached_property
    def validations(self) -> tuple[Validation, ...]:
        """All validations in order; of several after one epoch the last counts."""
        found: dict[int, Validation] = {}
        for epoch, row in self._rows_with_epoch:
            miou = number(row.get("val/miou"))
            if miou is None:
                continue
            found[epoch] = Validation(
                epoch=epoch,
                step=int(number(row.get("step")) or 0),
                miou=miou,
                pixel_accuracy=number(row.get("val/pixel_accuracy")),
                class_accuracy=number(row.get("val/class_accuracy")),
                iou={
                    key.removeprefix("val/iou/"): value
                    for key, item in row.items()
                    if key.startswith("val/iou/") and (value := number(item)) is not None
                },
            )
        return tuple(found[epoch] for epoch in sorted(found))

    @property
    def choose_from(self) -> float:
        """The progress from which a validation may choose the best checkpoint."""
        value = number(section(self.recipe, "trainer").get("choose_from"))
        return 0.8 if value is None else value

    @property
    def validate_every(self) -> int:
        """The epochs from one validation to the next."""
        return max(1, int(number(section(self.recipe, "trainer").get("validate_every")) or 1))

    @property
    def best(self) -> Validation | None:
        """The validation of the best checkpoint: the first with the highest mIoU among those that may choose."""
        first = first_to_choose(self.max_epochs, self.validate_every, self.choose_from)
        allowed = [v for v in self.validations if v.epoch > first]  # those of complete epochs, the others from 0
        return max(allowed, key=lambda v: v.miou, default=None)

    @property
    def last(self) -> Validation | None:
        """The newest validation."""
        return self.validations[-1] if self.validations else None

    @cached_property
    def spent(self) -> Mapping[int, Mapping[str, float]]:
        """The ledger's sums after each number of complete epochs."""
        found = {}
        for epoch, row in self._rows_with_epoch:
            figures = {
                key: value
                for key, item in row.items()
                if key.startswith("cost/") and (value := number(item)) is not None
            }
            if figures:
                found[epoch] = figures
        return found

    @property
    def charges(self) -> Mapping[str, Mapping[str, float]]:
        """What was spent by kind and unit (seconds, gmacs): the steps first, then overheads, validation last."""
        found: dict[str, dict[str, float]] = {}
        for key, item in self.training.items():
            match, value = _CHARGE.fullmatch(key), number(item)
            if match and value and match[1] != "train":  # that is the sum of all but validation
                found.setdefault(match[1], {})[match[2]] = value
        place = {"step": 0, "forward": 1, "backward": 2, "validation": 4}
        return {kind: found[kind] for kind in sorted(found, key=lambda kind: place.get(kind, 3))}

    @property
    def latency(self) -> Mapping[str, Any]:
        """Milliseconds of one forward pass (p50, p90, mean), and the conditions under which they were measured."""
        measured = section(self.inference, "latency_ms")
        return {key.removesuffix("_ms"): value for key, value in measured.items()}

    @property
    def epochs_done(self) -> int:
        """How many epochs are complete, as far as the metrics tell."""
        if self.finished:
            return self.max_epochs
        return max([*self.spent, *(validation.epoch for validation in self.validations)], default=0)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Epochs (fractions while training) and values of one metric, those that are finite."""
        epochs, values = [], []
        for epoch, row in self._rows_with_epoch:
            value = number(row.get(key))
            if value is not None:
                progress = number(row.get("train/progress"))
                epochs.append(float(epoch) if progress is None else progress * self.max_epochs)
                values.append(value)
        return epochs, values

    @cached_property
    def _rows_with_epoch(self) -> list[tuple[int, Mapping[str, Any]]]:
        """Each row with the number of epochs that are complete when its epoch ends."""
        found, epoch = [], 0
        for row in self.rows:
            given = number(row.get("epoch"))
            epoch = epoch if given is None else int(given) + 1
            found.append((epoch, row))
        return found


def read_run(folder: str | Path) -> Run:
    """Read a run folder, whether the run is finished or not.

    Raises ValueError when there is no such run, and DataError, naming the file, when one of its files is damaged.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        reason = "holds no run (there is no recipe.yaml)" if folder.is_dir() else "no such run"
        beside = {*folder.parent.glob("*/recipe.yaml"), *Path("runs").glob("*/recipe.yaml")}
        known = ", ".join(sorted(str(path.parent) for path in beside))
        raise ValueError(f"{folder}: {reason}; there are: {known or 'none, train one first'}")
    recipe, text = _read_recipe(folder / "recipe.yaml")
    costs = read_object(folder / "cost.json")
    simplest, most_complex = _thumbnails(folder / "pictures")
    return Run(
        folder=folder,
        recipe=recipe,
        recipe_text=text,
        circumstances=read_object(folder / "run.json"),
        rows=_read_rows(folder / "metrics.jsonl"),
        training=section(costs, "training"),
        inference=section(costs, "inference"),
        plan=_read_plan(folder / "plan.json"),
        widths=_read_widths(folder / "widths.json"),
        exits=_read_exits(folder / "calibration.json", folder / "pictures"),
        search=read_object(folder / "search.json"),
        pictures=_pictures(folder / "pictures"),
        simplest=simplest,
        most_complex=most_complex,
        image_losses=_read_image_losses(folder / "image_losses.json"),
        other_costs={key: value for key, value in costs.items() if key not in ("training", "inference")},
    )


def number(value: Any) -> float | None:
    """A finite number as a float; None for anything else, such as NaN, a text or a truth value.

    >>> number(3), number(float("nan")), number("3"), number(True)
    (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def section(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section of a record; empty when it is absent, null or no mapping.

    >>> section({"trainer": None}, "trainer")
    {}
    """
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """A nested record by dotted keys; lists are values.

    >>> flat({"model": {"name": "smp", "args": {}}, "seed": 0})
    {'model.name': 'smp', 'model.args': {}, 'seed': 0}
    """
    if not isinstance(record, dict) or not record:
        return {prefix: record}
    found: dict[str, Any] = {}
    for key, value in record.items():
        found.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _read_recipe(path: Path) -> tuple[dict[str, Any], str]:
    text = _read_text(path)
    try:
        recipe = parse_yaml(text)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(recipe, dict):
        raise DataError(f"{path}: a recipe is a mapping of sections, not {type(recipe).__name__}")
    return recipe, text


def _finite(value: Any) -> float:
    """A finite number. Raises ValueError for another."""
    if not math.isfinite(given := float(value)):
        raise ValueError(f"a number is {given}")
    return given


def _read_plan(path: Path) -> WholePlan | None:
    record = read_object(path)
    if not record:
        return None
    scored = section(record, "complexity")
    try:
        plan = WholePlan(
            scales=tuple(_finite(scale) for scale in record["scales"]),
            sizes=tuple((int(height), int(width)) for height, width in record["sizes"]),
            epochs=tuple(_planned_epoch(epoch) for epoch in record["epochs"]),
            measure=str(scored.get("measure", "")),
            complexity=tuple(_finite(value) for value in scored.get("values") or ()),
            weights=tuple(_finite(value) for value in record.get("weights") or ()),
            names=tuple(str(name) for name in scored.get("names") or ()),
        )
    except _DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a plan ({reason}); move it away to go on without it") from None
    counts = {len(plan.scales), len(plan.sizes), *(len(epoch.images_per_scale) for epoch in plan.epochs)}
    if not plan.scales or not plan.epochs or len(counts) > 1 or plan.dense_pixels <= 0:
        raise DataError(f"{path}: not a plan (scales and epochs do not fit); move it away to go on without it")
    return plan


def _read_image_losses(path: Path) -> ImageLosses | None:
    record = read_object(path)
    if not record:
        return None
    try:
        pairs = zip(record["names"], record["losses"], strict=True)
        return ImageLosses(
            int(record["epoch"]) + 1, {str(name): loss for name, given in pairs if (loss := number(given)) is not None}
        )
    except _DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: no losses of images ({reason}); move it away to go on without it") from None


def _read_widths(path: Path) -> Widths | None:
    record = read_object(path)
    if not record:
        return None
    try:
        layers, branches = (
            tuple((str(name), int(full), int(now)) for name, (full, now) in record[kind].items())
            for kind in ("layers", "branches")
        )
        cuts = tuple(
            Cut(int(cut["epoch"]), _finite(cut["macs"]), _finite(cut["channels"]), int(cut["parameters"]))
            for cut in record["cuts"]
        )
    except _DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: no widths of a network ({reason}); move it away to go on without it") from None
    if not layers or any(full < 1 or not 0 <= now <= full for _, full, now in layers):
        raise DataError(f"{path}: no widths of a network; move it away to go on without it")
    return Widths(layers, branches, cuts)


def _read_exits(path: Path, pictures: Path) -> Exits | None:
    record = read_object(path)
    if not record:
        return None
    try:
        achieved, policy = record["achieved"], record["policy"]
        exits = Exits(
            thresholds=tuple(None if value is None else float(value) for value in policy["thresholds"]),
            mious=tuple(_finite(value) for value in achieved["miou_of_exits"]),
            shares=tuple(_finite(value) for value in achieved["exits"]),
            costs={
                unit: tuple(
                    _finite(record.get("mean_price", 1.0)) * (_finite(a) + _finite(b))
                    for a, b in zip(cost["trunk"], cost["heads"], strict=True)
                )
                for unit, cost in record["costs"].items()
            },
            achieved=(_finite(achieved["miou"]), _finite(achieved["miou_random"])),
            spent={unit: _finite(achieved[unit]) for unit in record["costs"]},
            curves={
                unit: tuple(
                    (
                        _finite(p["average_cost"]),
                        _finite(p["miou"]),
                        _finite(p["random_cost"]),
                        _finite(p["random_miou"]),
                    )
                    for p in points
                )
                for unit, points in record["curves"].items()
            },
            budget=_finite(record["budget"]),
            unit=str(record["unit"]),
            split=str(record["split"]),
            images=int(achieved["images"]),
            beside=tuple(
                StaticNetwork(
                    str(one["name"]), _finite(one["miou"]), {unit: _finite(one[unit]) for unit in record["costs"]}
                )
                for one in record.get("beside", ())
            ),
            epochs=None if record.get("epochs") is None else int(record["epochs"]),
            leaving=_leaving(pictures),
        )
    except _DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: no calibration of exits ({reason}); calibrate again, or move it away") from None
    count = len(exits.mious)
    if not count or {len(exits.shares), len(exits.thresholds) + 1, *map(len, exits.costs.values())} != {count}:
        raise DataError(f"{path}: its parts are of different numbers of exits; calibrate again, or move it away")
    return exits


def _leaving(folder: Path) -> tuple[Leaving, ...]:
    found = [(match, path) for path in folder.glob("exit_*.png") if (match := _LEAVING.fullmatch(path.name))]
    return tuple(sorted(Leaving(int(match[1]), int(match[2]), match[3], path) for match, path in found))


def _planned_epoch(record: Mapping[str, Any]) -> PlannedEpoch:
    return PlannedEpoch(
        steps=int(record["steps"]),
        images_offered=int(record["images_offered"]),
        images_paid=int(record["images_paid"]),
        images_dropped=int(record["images_dropped"]),
        pixels=int(record["pixels"]),
        images_per_scale=tuple(int(count) for count in record["images_per_scale"]),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return read_metrics(path)


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{path}: {size} bytes; a run writes no file of this kind above {MAX_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a UTF-8 text ({error.reason} at byte {error.start})") from None


def _pictures(folder: Path) -> tuple[Picture, ...]:
    found = []
    for path in folder.glob("*_image.png"):
        match = _PICTURE.fullmatch(path.name)
        stem = path.name.removesuffix("_image.png")
        label, prediction = path.with_name(f"{stem}_label.png"), path.with_name(f"{stem}_prediction.png")
        if match and label.is_file() and prediction.is_file():
            found.append(Picture(int(match[1]), match[2], path, label, prediction))
    return tuple(sorted(found, key=lambda picture: (picture.number, picture.name)))


def _thumbnails(folder: Path) -> tuple[tuple[Thumbnail, ...], tuple[Thumbnail, ...]]:
    found: dict[str, list[Thumbnail]] = {"simple": [], "complex": []}
    for path in folder.glob("complexity_*.png"):
        if match := _THUMBNAIL.fullmatch(path.name):
            found[match[1]].append(Thumbnail(int(match[2]), match[3], path))
    simple, complex_ = (tuple(sorted(found[kind], key=lambda one: (one.rank, one.name))) for kind in found)
    return simple, complex_
