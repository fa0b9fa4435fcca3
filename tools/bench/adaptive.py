"""Networks that stop early against static ones of equal milliseconds: python -m tools.bench.adaptive [key=value ...].

Trains what is not there yet, as `four_rows` does: RANet and BasisNet, and static twins of each. BasisNet's is its
specialist without bases, at several resolutions; RANet's is the network with the last exit alone, at two, and the way
to each earlier exit, trained for that exit alone: RANet is many small layers, of which half the milliseconds remain at
any resolution. On drawn scenes an ensemble of full twins, with about as many parameters, stands beside BasisNet.
BasisNet and its twins begin with EfficientNet-Lite0's ImageNet weights, which tools.fetch_weights brings; RANet with
random ones. Thresholds are chosen on one split, by the score of best mIoU there, and all is reported on another. A twin
of just as many milliseconds rarely exists, so it is read off the upper hull of them: any point on a line between two is
had by sending images to one or the other by lot. Drawn scenes; with --root CamVid, thresholds on val and scores on the
drive held out.

Overrides apply to every run; those of model. and early_exit. to the networks with exits only.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from dance_seg.cost.latency import interleave
from tools.bench.common import precision, ratio, seconds, spread, write_result
from tools.bench.four_rows import trained
from tools.cli import parser, run
from tools.fetch_weights import ENCODER, WEIGHTS, fetch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from dance_seg.calibration import ExitsOfSplit
    from dance_seg.early_exit.budget import ExitTable
    from dance_seg.early_exit.exits import ExitNetwork
    from dance_seg.early_exit.paths import PathCosts
    from dance_seg.early_exit.policy import ExitPolicy
    from dance_seg.sample import CoarseLogits
    from datamodules.base import SegmentationDataModule

MODELS = ("ranet", "basisnet")
BUDGET = 0.5  # of what the whole network costs, in MACs and in milliseconds
SWEEP = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of the way from the first exit's cost to the last's: the curve's budgets
BOUNDARY_WEIGHTS = (1.0, 0.25)  # of pixels at predicted boundaries, in each score
FAINT = 1e-9  # the weight of a last exit that must count and should not
ON_SHAPES = ("tracking.wandb=disabled",)
ON_CAMVID = (
    "data.args.resolution=0.5334",
    "data.args.crop=[192,256]",
    precision(),
    "tracking.wandb=disabled",
)
# A share of 40 scenes is known to 8 points only, and the score gain is fitted to the scenes that calibrate.
MEASURED_ON = ("data.args.num_val=960", "data.args.num_test=640")
# Recipes are short, so that anybody can run them; but after few steps every exit is far from what it can do, and chance
# says which images gain by going on.
LONGER = {
    ("shapes", "ranet"): ("data.args.num_train=480", "trainer.max_epochs=18", "trainer.validate_every=18"),
    ("shapes", "basisnet"): ("data.args.num_train=480", "trainer.max_epochs=10", "trainer.validate_every=10"),
    ("camvid", "ranet"): ("trainer.max_epochs=30", "trainer.validate_every=30"),
    ("camvid", "basisnet"): ("trainer.max_epochs=16", "trainer.validate_every=16"),
}
BATCHES = (1, 8)
SYNTHESES: tuple[Literal["grouped", "auto"], ...] = ("grouped", "auto")
SPEED_IMAGES = 40
SPEED_ROUNDS = 8
RANDOM_DRAWS = 20
# Channels, rows and columns of layers, the last two those of BasisNet's default encoder for 360x480.
SIZES = ((64, 48, 64), (128, 24, 32), (256, 24, 30), (512, 12, 15))


class Twin(NamedTuple):
    """A static network: at a share of the resolution, and the way to which exit of RANet it is where not the last.

    `copy` counts further runs of the same network, each with a seed of its own, for an ensemble.
    """

    scale: float = 1.0
    exit: int | None = None
    copy: int = 0

    @property
    def row(self) -> str:
        """What the table calls it."""
        if self.exit is not None:
            return f"static twin of exit {self.exit + 1}"
        return f"static twin, resolution x {self.scale:.2f}"

    @property
    def name(self) -> str:
        """What its runs are called."""
        name = f"twin_{100 * self.scale:.0f}" if self.exit is None else f"twin_exit_{self.exit + 1}"
        return f"{name}_copy_{self.copy}" if self.copy else name


# Of a scene, the resolutions are 1, 2/3, 2/5 and 3/10 of the padded pixels.
TWINS = {
    "ranet": (Twin(), Twin(0.6667), Twin(exit=1), Twin(exit=0)),
    "basisnet": (Twin(), Twin(0.8333), Twin(0.6667), Twin(0.5)),
}


# With the twin about as many parameters as BasisNet of four bases has; on CamVid it has eight.
COPIES = {("shapes", "basisnet"): 3}


class Setting(NamedTuple):
    """Which data, and how it is trained and measured on."""

    data: str
    common: list[str]  # overrides of every run
    with_exits: list[str]  # overrides of networks with exits only
    measured_on: list[str]  # overrides of the data that is measured on
    calibration: str
    test: str
    runs: Path


class Figures(NamedTuple):
    """One line of the table for one seed."""

    miou: float  # points, on the test split
    gmacs: float  # per image, average
    milliseconds: float  # per image, average, batch of one


class Costs(NamedTuple):
    """What the ways through a network cost per image."""

    macs: "PathCosts"
    milliseconds: "PathCosts"


@dataclass(frozen=True)
class Measured:
    """One model with one seed: the table's lines, figures that have targets (by round), and what else was seen."""

    rows: dict[str, Figures]
    ratios: dict[str, list[float]]
    notes: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Train what is not there yet, and write runs/bench/adaptive.json with the table."""
    arguments_parser = parser(__doc__ or "")
    arguments_parser.add_argument("--root", type=Path, help="CamVid, instead of drawn scenes")
    arguments_parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments_parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    arguments_parser.add_argument("--runs", type=Path, default=Path("runs/adaptive"), help="where runs are kept")
    arguments_parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    arguments = arguments_parser.parse_intermixed_args()
    setting = setting_of(arguments.root, arguments.runs, arguments.overrides)
    folders: dict[str, list[dict[Twin | None, Path]]] = {model: [] for model in arguments.models}
    for seed in arguments.seeds:  # seed by seed, so that an early stop leaves whole comparisons
        for model in arguments.models:
            folders[model].append(trained_runs(model, seed, setting))
    measured = {model: measured_runs(of_seeds, setting) for model, of_seeds in folders.items()}
    synthesis = grouped_synthesis()
    report(setting, measured, synthesis, {m: [f[None].name for f in found] for m, found in folders.items()})
    return 0


# Training -------------------------------------------------------------------------------------------------------------


def setting_of(root: Path | None, runs: Path, overrides: Sequence[str]) -> Setting:
    """CamVid where a folder is given, else drawn scenes. Raises ValueError when there is no such folder."""
    with_exits = [o for o in overrides if o.startswith(("model.", "early_exit."))]
    common = [o for o in overrides if o not in with_exits]
    if root is None:
        sizes = [o for o in common if o.startswith(("data.args.num_val=", "data.args.num_test="))]
        return Setting("shapes", [*ON_SHAPES, *common], with_exits, [*MEASURED_ON, *sizes], "val", "test", runs)
    if not root.is_dir():
        raise ValueError(f"--root {root}: no such folder; give CamVid's, with train/ and trainannot/")
    common = [*ON_CAMVID, f"data.args.root={root.resolve()}", *common]
    return Setting("camvid", common, with_exits, [], "val", "held_out", runs)


def trained_runs(model: str, seed: int, setting: Setting) -> dict[Twin | None, Path]:
    """The run folders of a network with exits (None) and of its static twins, trained now unless they are there."""
    from dance_seg.recipe import load_recipe, recipe_record

    path = f"recipes/{setting.data}_{model}.yaml"
    common = [*LONGER[setting.data, model], *setting.common]
    overrides = [*common, *(pretrained(setting.with_exits) if model == "basisnet" else ()), *setting.with_exits]
    record = recipe_record(load_recipe(path, overrides))
    folders: dict[Twin | None, Path] = {None: trained(model, path, seed, overrides, setting.runs).folder}
    single = str(write_twin(record, setting.runs / "recipes" / f"{model}_twin.yaml"))
    for twin in (*TWINS[model], *(Twin(copy=copy) for copy in range(1, COPIES.get((setting.data, model), 0) + 1))):
        name = f"{model}_{twin.name}"
        if twin.exit is None:
            smaller = [*common, *at_scale(record["data"]["args"], twin.scale)]
            own_seed = seed + 1000 * twin.copy
            folders[twin] = trained(name, single, own_seed, smaller, setting.runs).folder
        else:
            alone = [*overrides, *for_exit(twin.exit, len(record["early_exit"]["weights"]))]
            folders[twin] = trained(name, path, seed, alone, setting.runs).folder
    return folders


def pretrained(given: Sequence[str]) -> list[str]:
    """The overrides by which preview and specialist begin with ImageNet's weights, unless another encoder is given."""
    if any(override.startswith("model.args.encoder_name=") for override in given):
        return []
    file = fetch(WEIGHTS).resolve()
    begun = {"encoder_name": ENCODER, "encoder_weights": file, "preview_encoder": ENCODER, "preview_weights": file}
    return [f"model.args.{key}={value}" for key, value in begun.items()]


def for_exit(exit: int, num_exits: int) -> list[str]:
    """The overrides by which a network learns for one exit alone.

    >>> for_exit(1, 3)
    ['early_exit.weights=[0.0,1.0,1e-09]', 'early_exit.self_distillation=0']
    """
    weights = [float(place == exit) for place in range(num_exits)]
    weights[-1] = weights[-1] or FAINT
    return [f"early_exit.weights=[{','.join(map(str, weights))}]", "early_exit.self_distillation=0"]


def write_twin(record: Mapping[str, Any], path: Path) -> Path:
    """The recipe of the network that never stops: RANet's last exit alone, BasisNet's specialist with one kernel."""
    from dance_seg.recipe import recipe_from_record, save_recipe

    given = record["model"]["args"]
    if record["model"]["name"] == "ranet":
        twin = {"name": "ranet", "args": {**given, "exits": "last"}}
    else:
        kept = {key: given[key] for key in ("arch", "encoder_name", "encoder_weights") if key in given}
        twin = {"name": "smp", "args": kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe_from_record({**record, "model": twin, "early_exit": None}), path)
    return path


def at_scale(data: Mapping[str, Any], scale: float) -> list[str]:
    """The overrides by which images and crops are smaller; crops in steps of 32, so that as much is seen of the image.

    >>> at_scale({"crop": [128, 192]}, 0.6667)
    ['data.args.resolution=0.6667', 'data.args.crop=[96,128]']
    """
    resolution = data.get("resolution", 1.0) * scale
    rows, columns = (32 * max(2, math.ceil(side * scale / 32 - 0.01)) for side in data["crop"])
    return [f"data.args.resolution={resolution:.4g}", f"data.args.crop=[{rows},{columns}]"]


# Measuring ------------------------------------------------------------------------------------------------------------


Network = tuple[Any, "SegmentationDataModule"]
"""A network of a run, and its data."""


def measured_runs(folders: Sequence[Mapping[Twin | None, Path]], setting: Setting) -> list[Measured]:
    """The figures of one model's runs, a dictionary of folders per seed; milliseconds are measured on the first."""
    milliseconds: tuple[PathCosts, dict[Twin, float]] | None = None
    found = []
    for of_seed in folders:
        exits, data = loaded(of_seed[None], setting.measured_on)
        every = {twin: loaded(of_seed[twin], setting.measured_on, twin.exit) for twin in of_seed if twin is not None}
        twins = {twin: network for twin, network in every.items() if not twin.copy}
        milliseconds = milliseconds or all_milliseconds((exits, data), twins, setting.test)
        one = measured((exits, data), twins, *milliseconds, setting)
        members = [network[0] for twin, network in every.items() if twin._replace(copy=0) == Twin()]
        if len(members) > 1:
            of_ensemble(one, (exits, data), members, milliseconds[1][Twin()], setting.test)
        found.append(one)
    return found


def of_ensemble(
    found: Measured, exits: Network, members: Sequence["nn.Module"], milliseconds: float, split: str
) -> None:
    """Add the line of an ensemble, whose members take so many milliseconds each, and how large it is."""
    row = f"ensemble of {len(members)} full twins"
    found.rows[row] = static_figures(mean_of(members), exits[1], split, len(members) * milliseconds)
    found.ratios["miou_last_minus_ensemble"] = [found.rows[exit_row(1)].miou - found.rows[row].miou]
    own, theirs = (sum(p.numel() for model in models for p in model.parameters()) for models in ([exits[0]], members))
    found.ratios["parameters_over_ensemble"] = [own / theirs]


def mean_of(members: Sequence["nn.Module"]) -> "nn.Module":
    """A network whose probabilities are the mean of the members'."""
    import torch
    from torch import nn

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(members)

        def forward(self, images: "Tensor") -> "Tensor":
            return torch.stack([member(images).softmax(1) for member in self.members]).mean(0).log()

    return Mean()


def loaded(folder: Path, overrides: Sequence[str], exit: int | None = None) -> Network:
    """The network of a run at its last epoch (the best would be chosen on what is reported), and its data."""
    import torch

    from dance_seg.build import load_run
    from dance_seg.recipe import recipe_from_record
    from datamodules import build_datamodule

    model: Any
    model, record, _ = load_run(folder, "last")
    if exit is not None:
        model = way_to(model, exit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), build_datamodule(recipe_from_record(record["recipe"], overrides))


def way_to(model: "ExitNetwork", exit: int) -> "nn.Module":
    """The part of a network up to one exit, as a network that has no other."""
    from torch import nn

    from dance_seg.evaluator import full_size
    from dance_seg.sample import CoarseLogits

    class Way(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: "Tensor") -> "Tensor":
            return full_size(self.coarse_logits(images), images.shape[-2:])

        def coarse_logits(self, images: "Tensor") -> CoarseLogits:
            return coarse_at(self.model, images, exit, (False,) * self.model.num_exits)

    return Way()


def coarse_at(model: "ExitNetwork", images: "Tensor", exit: int, asked: Sequence[bool]) -> "CoarseLogits":
    """What an exit says of all images, by way of the heads before it that are asked."""
    wanted = [asked[place] if place < exit else place == exit for place in range(model.num_exits)]
    with closing(model.exits(images, wanted)) as walk:
        coarse = [next(walk) for _ in range(exit + 1)][-1]
    assert coarse is not None
    return coarse


def all_milliseconds(
    exits: Network, twins: Mapping[Twin, Network], split: str, rounds: int = 40
) -> tuple["PathCosts", dict[Twin, float]]:
    """Milliseconds of the ways through the network with exits, and of each twin: of its share of the whole way.

    All up to the logits as the network makes them, as calibration counts, and deciding by the score that takes longest;
    twins and the whole way take turns.
    """
    import torch

    from dance_seg.calibration import path_milliseconds
    from dance_seg.early_exit.policy import ExitPolicy

    def side(network: Network) -> Callable[[], object]:
        return partial(network[0].coarse_logits, first_images(*network, split, 1)[0][0])

    sides = {"whole": side(exits), **{twin.row: side(network) for twin, network in twins.items()}}
    images = first_images(*exits, split, 1)[0][0]
    with torch.inference_mode():
        line = (0.0,) * (1 + 2 * len(exits[1].classes))
        dearest = ExitPolicy(
            score="gain", boundary_weight=min(BOUNDARY_WEIGHTS), lines=(line,) * (exits[0].num_exits - 1)
        )
        costs = path_milliseconds(exits[0], (images.shape[-2], images.shape[-1]), dearest, rounds)
        times = interleave(sides, rounds, warm_up=3, device=images.device)
    return costs, {twin: costs.full * ratio(times[twin.row], times["whole"])["median"] for twin in twins}


def measured(
    exits: Network,
    twins: Mapping[Twin, Network],
    milliseconds: "PathCosts",
    of_twins: Mapping[Twin, float],
    setting: Setting,
) -> Measured:
    """All figures of one seed."""
    from dance_seg.early_exit.policy import FITTED

    model, data = exits
    found, costs = stopping(model, data, milliseconds, setting.calibration, setting.test)
    for twin, network in twins.items():
        found.rows[twin.row] = static_figures(*network, setting.test, of_twins[twin])
    adaptive = found.rows[adaptive_row("milliseconds")]
    static = static_of_equal_milliseconds([found.rows[twin.row] for twin in twins], adaptive.milliseconds)
    found.rows["static, as many ms"] = static
    last, single = found.rows[exit_row(model.num_exits - 1)], found.rows[Twin().row]
    found.ratios["miou_minus_static_twin"] = [adaptive.miou - static.miou]
    found.ratios["miou_last_minus_twin"] = [last.miou - single.miou]
    policy = found.notes.pop("policies")["milliseconds"]
    found.ratios.update(speeds(model, data, setting.test, policy, costs))
    found.notes["policy"] = {key: value for key, value in policy.as_record().items() if key not in FITTED}
    figures, said = proofs(model, data, setting.test)
    found.ratios.update({key: [value] for key, value in figures.items()})
    found.notes.update(said)
    return found


def stopping(
    model: "ExitNetwork", data: "SegmentationDataModule", milliseconds: "PathCosts", calibration: str, test: str
) -> tuple[Measured, Costs]:
    """The lines of all exits alone, of stopping within both budgets and of random exits; budgets met, who left."""
    from dance_seg.early_exit.budget import at_thresholds
    from dance_seg.early_exit.paths import path_costs

    on_calibration = by_policy(model, data, calibration, every_score())
    on_test = by_policy(model, data, test, list(on_calibration))
    some = next(iter(on_test.values()))
    costs = Costs(path_costs(model, some.size), milliseconds)
    rows = exit_figures(some, costs)
    mious = [row.miou for row in rows.values()]
    ratios = {
        f"miou_exit_{k}_minus_exit_{k - 1}": [later - earlier]
        for k, (earlier, later) in enumerate(pairwise(mious), start=2)
    }
    policies: dict[str, ExitPolicy] = {}
    notes: dict[str, Any] = {"policies": policies, "mious_of_exits": [round(row.miou, 2) for row in rows.values()]}
    for unit, cost in costs._asdict().items():
        policy = chosen(on_calibration, cost, BUDGET * cost.full)
        rows[adaptive_row(unit)] = figures_of(on_test[unset(policy)], policy, costs)
        policies[unit] = policy
        spent = [
            at_thresholds(table, policy.thresholds).average_cost
            for table in (on_calibration[unset(policy)].own_table(cost), on_test[unset(policy)].table(cost))
        ]
        errors = [one / (BUDGET * cost.full) - 1 for one in spent]
        notes[f"spent_over_budget_{unit}"] = [round(1 + error, 3) for error in errors]
        if unit == "macs":
            ratios["budget_error_calibration"], ratios["budget_error_test"] = ([abs(error)] for error in errors)
    policy = policies["milliseconds"]
    adaptive, table = rows[adaptive_row("milliseconds")], on_test[unset(policy)].table(milliseconds)
    shares = shares_at(table, policy)
    same, equal = random_miou(table, shares), random_miou(table, shares_of_cost(table, shares, adaptive.milliseconds))
    rows["random exits, as many ms"] = adaptive._replace(miou=equal, gmacs=math.nan)
    ratios["miou_minus_random"] = [adaptive.miou - equal]
    ratios["miou_minus_random_of_equal_shares"] = [adaptive.miou - same]
    notes["leaving"] = [round(share, 3) for share in shares]
    curve = swept(on_calibration, on_test, milliseconds)
    ratios["miou_minus_random_on_the_curve"] = [own - by_chance for _, own, by_chance in curve]
    notes["curve"] = [[round(figure, 3) for figure in point] for point in curve]  # ms, mIoU, at random exits
    ratios |= {key: [rank] for key, rank in orders(on_test[unset(policy)], policy, data, test).items()}
    return Measured(rows, ratios, notes), costs


def swept(
    on_calibration: "Mapping[ExitPolicy, ExitsOfSplit]",
    on_test: "Mapping[ExitPolicy, ExitsOfSplit]",
    cost: "PathCosts",
) -> list[tuple[float, float, float]]:
    """The test split at thresholds for several budgets: average cost, mIoU, and that of random exits of equal cost."""
    points = []
    for share in SWEEP:
        policy = chosen(on_calibration, cost, cost.cheapest + share * (cost.full - cost.cheapest))
        found = on_test[unset(policy)]
        table, spent = found.table(cost), average(found, policy, cost)
        shares = shares_of_cost(table, shares_at(table, policy), spent)
        points.append((spent, figures_of(found, policy, Costs(cost, cost)).miou, random_miou(table, shares)))
    return points


def exit_row(exit: int) -> str:
    """What the table calls leaving at one exit."""
    return f"exit {exit + 1} alone"


def adaptive_row(unit: str) -> str:
    """What the table calls stopping within a budget."""
    return f"adaptive, {BUDGET:g} of the {'MACs' if unit == 'macs' else 'ms'}"


def every_score() -> "list[ExitPolicy]":
    """The policies that are tried: each score and weight of boundaries; thresholds are not set."""
    from dance_seg.early_exit.policy import ExitPolicy, Score

    return [ExitPolicy(score=score, boundary_weight=w) for score in get_args(Score) for w in BOUNDARY_WEIGHTS]


def by_policy(
    model: "ExitNetwork", data: "SegmentationDataModule", split: str, policies: "Sequence[ExitPolicy]"
) -> "dict[ExitPolicy, ExitsOfSplit]":
    """What every exit says of a split, by the score of each policy, with lines where those are fitted here."""
    from dance_seg.calibration import exits_of_split

    return {found.policy: found for found in exits_of_split(model, data, split, *policies)}


def unset(policy: "ExitPolicy") -> "ExitPolicy":
    """The same without thresholds."""
    return replace(policy, thresholds=())


def chosen(found: "Mapping[ExitPolicy, ExitsOfSplit]", costs: "PathCosts", budget: float) -> "ExitPolicy":
    """Thresholds within a budget, in the costs' unit, by the score with which they are worth most on this split."""
    from dance_seg.early_exit.budget import at_thresholds, solve

    judged = []
    for policy, of_split in found.items():
        table = of_split.table(costs)
        thresholds = solve(table, budget, spend=0.97)  # of the budget, as tools.calibrate does
        judged.append((at_thresholds(table, thresholds).miou, replace(policy, thresholds=thresholds)))
    return max(judged, key=lambda pair: pair[0])[1]


def exit_figures(found: "ExitsOfSplit", costs: Costs) -> dict[str, Figures]:
    """The lines of the table in which all images leave at one exit, no other asked."""
    from dance_seg.calibration import fixed_exit

    exits = found.scores.shape[1]
    return {exit_row(exit): figures_of(found, fixed_exit(exits, exit), costs) for exit in range(exits)}


def figures_of(found: "ExitsOfSplit", policy: "ExitPolicy", costs: Costs) -> Figures:
    """What a policy comes to on a split."""
    from dance_seg.early_exit.budget import at_thresholds

    miou = at_thresholds(found.table(costs.macs), policy.thresholds).miou
    return Figures(miou, average(found, policy, costs.macs) / 1e9, average(found, policy, costs.milliseconds))


def average(found: "ExitsOfSplit", policy: "ExitPolicy", cost: "PathCosts") -> float:
    """What an image of the split costs on average."""
    from dance_seg.early_exit.budget import at_thresholds

    return at_thresholds(found.table(cost), policy.thresholds).average_cost


def shares_at(table: "ExitTable", policy: "ExitPolicy") -> list[float]:
    """The share of the images that leaves at each exit."""
    from dance_seg.early_exit.budget import at_thresholds

    return [float(share) for share in at_thresholds(table, policy.thresholds).shares]


def shares_of_cost(table: "ExitTable", shares: Sequence[float], cost: float) -> list[float]:
    """Shares that cost as much without asking any exit: so many more go to the last as asking had cost.

    Random exits need no scores, and heads that are only asked are not paid: at equal shares they are the cheaper ones.
    """
    alone = [trunk + head for trunk, head in zip(table.costs.trunk, table.costs.heads, strict=True)]
    spent = sum(share * price for share, price in zip(shares, alone, strict=True))
    moved = min(1.0, max(0.0, (cost - spent) / (alone[-1] - spent))) if alone[-1] > spent else 0.0
    kept = [(1 - moved) * share for share in shares]
    return [*kept[:-1], kept[-1] + moved]


def random_miou(table: "ExitTable", shares: Sequence[float]) -> float:
    """The mIoU of random exits in these shares, mean of some draws."""
    from dance_seg.early_exit.budget import random_exits, scored

    return statistics.mean(scored(table, random_exits(table, shares, seed)) for seed in range(RANDOM_DRAWS))


def static_figures(model: Any, data: "SegmentationDataModule", split: str, milliseconds: float) -> Figures:
    """The line of a network that never stops."""
    from dance_seg.cost.macs import count_macs
    from dance_seg.inference import evaluate

    images = first_images(model, data, split, 1)[0][0]
    macs = count_macs(model, (images.shape[-2], images.shape[-1])).macs
    return Figures(evaluate(model, data, split).miou, macs / 1e9, milliseconds)


def static_of_equal_milliseconds(twins: Sequence[Figures], milliseconds: float) -> Figures:
    """The best that static twins give for as many milliseconds: on the best line between two of them, or one of them.

    Where none is as fast, the fastest, although it takes longer.

    >>> static_of_equal_milliseconds([Figures(40, 1, 2), Figures(60, 3, 4), Figures(45, 2, 3)], 3)
    Figures(miou=50.0, gmacs=2.0, milliseconds=3)
    """
    fast = [twin for twin in twins if twin.milliseconds <= milliseconds]
    if not fast:
        return min(twins, key=lambda twin: twin.milliseconds)
    points = [best._replace(milliseconds=milliseconds) for best in fast]
    for first, second in combinations(sorted(twins, key=lambda twin: twin.milliseconds), 2):
        if first.milliseconds <= milliseconds < second.milliseconds:
            share = (milliseconds - first.milliseconds) / (second.milliseconds - first.milliseconds)
            miou, gmacs = ((1 - share) * getattr(first, k) + share * getattr(second, k) for k in ("miou", "gmacs"))
            points.append(Figures(miou, gmacs, milliseconds))
    return max(points, key=lambda point: point.miou)


def orders(found: "ExitsOfSplit", policy: "ExitPolicy", data: "SegmentationDataModule", split: str) -> dict[str, float]:
    """Whether what left late is what is hard: rank correlations of the exit taken, by image (METHODS.md 3.5).

    There is none where all images left at the same exit.
    """
    import numpy as np

    from dance_seg.data_slimming.complexity import label_boundary_density
    from dance_seg.early_exit.budget import as_sets, exits_at

    table = found.table(uniform_costs(found))
    exits = exits_at(table, as_sets(table, [policy.thresholds]))[0]
    first = found.matrices[:, 0].astype(np.int64)
    labelled = np.maximum(first.sum(axis=(1, 2)), 1)
    errors = 1 - np.trace(first, axis1=1, axis2=2) / labelled
    source = data.source(split)
    boundaries = np.array([label_boundary_density(source.load(index).label) for index in range(len(source))])
    ranks = {
        "spearman_exit_and_error_of_exit_1": spearman(exits, errors),
        "spearman_exit_and_boundary_density": spearman(exits, boundaries),
    }
    return {key: rank for key, rank in ranks.items() if rank is not None}


def uniform_costs(found: "ExitsOfSplit") -> "PathCosts":
    """Costs for where images leave, which depends on none."""
    from dance_seg.early_exit.paths import PathCosts

    exits = found.scores.shape[1]
    return PathCosts((1.0,) * exits, (0.0,) * exits)


def spearman(first: "np.ndarray", second: "np.ndarray") -> float | None:
    """The rank correlation of two series, equal values sharing their ranks; None where one is constant.

    >>> import numpy as np
    >>> spearman(np.array([0, 0, 2, 2]), np.array([1.0, 2.0, 8.0, 9.0]))
    0.894
    """
    import numpy as np

    from dance_seg.data_slimming.complexity import quantiles

    one, other = quantiles(first), quantiles(second)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return round(float(np.corrcoef(one, other)[0, 1]), 3)


# Time -----------------------------------------------------------------------------------------------------------------

Side = list[tuple[float, Callable[[], object]]]
"""Calls, and how often each counts."""


def speeds(
    model: "ExitNetwork",
    data: "SegmentationDataModule",
    split: str,
    policy: "ExitPolicy",
    costs: Costs,
    rounds: int = SPEED_ROUNDS,
) -> dict[str, list[float]]:
    """Adaptive inference over what it should cost, in batches, round by round; and that it says what it should say.

    Raises AssertionError unless infinite thresholds are the plain network, zero ones the first exit, bit for bit.
    """
    import torch

    images, size = first_images(model, data, split, SPEED_IMAGES)
    found: dict[str, list[float]] = {"infinite_threshold_over_plain": []}
    with torch.inference_mode():
        for batch in BATCHES:
            groups = in_batches(images, batch)
            exits = exits_taken(model, groups, size, policy)
            check_parts(model, groups, size, policy, exits)
            found[f"executed_over_path_macs_batch_{batch}"] = [
                executed_macs(model, groups, size, policy) / sum(costs.macs.total(e, policy.asked) for e in exits)
            ]
            check_limits(model, groups, size, policy)
            times = in_turns(sides_of(model, images, size, policy, batch, exits), rounds)
            share = statistics.mean(costs.macs.total(exit, policy.asked) for exit in exits) / costs.macs.full
            found[f"time_over_measured_path_batch_{batch}"] = quotients(times["adaptive"], times["paths"])
            found[f"time_over_plain_batch_{batch}"] = quotients(times["adaptive"], times["plain"])
            for side in ("adaptive", "plain"):
                found[f"{side}_ms_batch_{batch}"] = [1000 * time / len(images) for time in times[side]]
            found[f"time_share_over_macs_share_batch_{batch}"] = [
                time / share for time in quotients(times["adaptive"], times["plain"])
            ]
            found["infinite_threshold_over_plain"] += quotients(times["infinite"], times["plain"])
    return found


def quotients(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def first_images(
    model: "nn.Module", data: "SegmentationDataModule", split: str, count: int
) -> tuple[list["Tensor"], tuple[int, int]]:
    """Normalised images (1, 3, h, w) of a split as evaluation shows them, of one size; their labels' size (H, W)."""
    from dance_seg.normalise import normalise

    device = next(model.parameters()).device
    images: list[Tensor] = []
    size = (0, 0)
    for batch in data.evaluation_loader(split):
        own = (batch.labels.shape[-2], batch.labels.shape[-1])
        size = size if images else own
        if own == size and (not images or images[0].shape == batch.images.shape):
            images.append(normalise(batch.images.to(device)))
        if len(images) == count:
            break
    return images, size


def in_batches(images: Sequence["Tensor"], batch: int) -> list["Tensor"]:
    """One tensor per batch; the last may hold fewer."""
    import torch

    return [torch.cat(list(images[start : start + batch])) for start in range(0, len(images), batch)]


def sides_of(
    model: "ExitNetwork",
    images: Sequence["Tensor"],
    size: tuple[int, int],
    policy: "ExitPolicy",
    batch: int,
    exits: Sequence[int],
) -> dict[str, Side]:
    """What is timed: stopping, the ways that images took each on its own, no stopping asked, the plain network.

    In batches of several, images that go on wait for others, so that every part runs full ones. The ways are run
    by images that took them, repeated where there are too few for whole batches, and count so much less. They ask the
    same heads and make the same labels; scores, decisions and the choice of rows are left out.
    """
    from dance_seg.early_exit.policy import decide
    from dance_seg.inference import predict_labels

    groups = in_batches(images, batch)
    never = infinite(policy, model.num_exits)
    paths: Side = []
    for exit in sorted(set(exits)):
        own = [image for image, taken in zip(images, exits, strict=True) if taken == exit]
        filled = [own[place % len(own)] for place in range(-(-len(own) // batch) * batch)]
        for group in in_batches(filled, batch):
            paths.append((len(own) / len(filled), partial(along, model, group, size, exit, policy.asked)))
    one_by_one: Side = [(1.0, partial(decide, model, group, size, policy)) for group in groups]
    return {
        "adaptive": one_by_one if batch == 1 else [(1.0, partial(exits_taken, model, groups, size, policy))],
        "paths": paths,
        "infinite": [(1.0, partial(decide, model, group, size, never)) for group in groups],
        "plain": [(1.0, partial(predict_labels, model, group, size)) for group in groups],
    }


def along(model: "ExitNetwork", images: "Tensor", size: tuple[int, int], exit: int, asked: Sequence[bool]) -> "Tensor":
    """The labels (N, H, W) at one exit, by way of the heads that are asked, with nothing decided."""
    from dance_seg.evaluator import labels_of

    coarse = coarse_at(model, images, exit, asked)
    return labels_of(coarse, images.shape[-2:], size)


def infinite(policy: "ExitPolicy", num_exits: int, threshold: float = math.inf) -> "ExitPolicy":
    """The same score with one threshold at all exits."""
    return replace(policy, thresholds=(threshold,) * (num_exits - 1))


def in_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of all calls of each side, by round; the sides' calls are spread over the round, first ones in turn.

    Sides that take seconds are too long to alternate as a whole: the machine drifts within a round.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first one warms up
        names = list(sides) if number % 2 else list(sides)[::-1]
        calls = [
            ((place + 0.5) / len(sides[name]), order, name, *call)
            for order, name in enumerate(names)
            for place, call in enumerate(sides[name])
        ]
        sums = dict.fromkeys(sides, 0.0)
        for _, _, name, weight, call in sorted(calls, key=lambda entry: entry[:2]):
            sums[name] += weight * seconds(call)
        if number:
            for name, total in sums.items():
                times[name].append(total)
    return times


def exits_taken(
    model: "ExitNetwork", groups: Sequence["Tensor"], size: tuple[int, int], policy: "ExitPolicy"
) -> list[int]:
    """Where each image leaves, in batches as large as the first one given in every part of the network."""
    from dance_seg.early_exit.batches import decide_in_batches

    exits: dict[int, int] = {}
    for places, decided in decide_in_batches(model, groups, size, policy, len(groups[0])):
        exits.update(zip(places.tolist(), decided.exits.tolist(), strict=True))
    return [exits[place] for place in sorted(exits)]


def executed_macs(model: "ExitNetwork", groups: Sequence["Tensor"], size: tuple[int, int], policy: "ExitPolicy") -> int:
    """The MACs that run while images stop, counted operation by operation."""
    from dance_seg.cost.macs import OperationCounter

    with OperationCounter() as counter:
        exits_taken(model, groups, size, policy)
    return counter.macs["forward"].total()


def grouped_synthesis(rounds: int = 30, sizes: Sequence[tuple[int, int, int]] = SIZES) -> dict[str, list[float]]:
    """A basis layer of eight kernels over a plain convolution of its size, batch of eight, in both layouts.

    As one grouped convolution, and in the way that the layer takes of itself (`auto`), where that is another.
    """
    import torch
    from torch import nn

    from dance_seg.models.basis_layers import BasisConv2d, handed

    found = {}
    for channels, rows, columns in sizes:
        for layout, memory in (("", torch.contiguous_format), ("_channels_last", torch.channels_last)):
            torch.manual_seed(0)
            plain = nn.Conv2d(channels, channels, 3, padding=1, bias=False).eval()
            layers = {way: BasisConv2d(plain, 8, synthesis=way).eval() for way in SYNTHESES}
            plain = plain.to(memory_format=memory)  # type: ignore[call-overload]
            features = torch.randn(8, channels, rows, columns).contiguous(memory_format=memory)
            with torch.inference_mode(), handed(list(layers.values()), torch.rand(8, len(layers), 8).softmax(-1)):
                sides: dict[str, Callable[[], object]] = {
                    way: partial(layer, features) for way, layer in layers.items()
                }
                times = interleave({**sides, "plain": partial(plain, features)}, rounds, 5)
            for way in SYNTHESES:
                key = f"{way}_synthesis_over_plain/{channels}_at_{rows}x{columns}{layout}"
                found[key] = quotients(times[way], times["plain"])
    return found


# Checks ---------------------------------------------------------------------------------------------------------------


def check_limits(model: "ExitNetwork", groups: Sequence["Tensor"], size: tuple[int, int], policy: "ExitPolicy") -> None:
    """Raise AssertionError unless infinite thresholds are the plain network and zero ones the first exit.

    Bit for bit; and with infinite ones nothing runs that the plain network does not run.
    """
    import torch

    from dance_seg.early_exit.policy import decide
    from dance_seg.inference import predict_labels

    never, at_once = infinite(policy, model.num_exits), infinite(policy, model.num_exits, 0.0)
    for number, group in enumerate(groups):
        if not torch.equal(decide(model, group, size, never).labels, predict_labels(model, group, size)):
            raise AssertionError(f"batch {number}: with infinite thresholds the labels are not the plain network's")
        first = along(model, group, size, 0, (True,) * model.num_exits)
        if not torch.equal(decide(model, group, size, at_once).labels, first):
            raise AssertionError(f"batch {number}: with thresholds of zero the labels are not the first exit's")
    ran = [layers_run(model, partial(one, model, groups[0], size)) for one in (partial(_never, never), predict_labels)]
    if ran[0] != ran[1]:
        raise AssertionError(
            f"infinite thresholds run other layers than the plain network: {set(ran[0]) ^ set(ran[1])}"
        )


def _never(policy: "ExitPolicy", model: "ExitNetwork", images: "Tensor", size: tuple[int, int]) -> object:
    from dance_seg.early_exit.policy import decide

    return decide(model, images, size, policy)


def layers_run(model: "nn.Module", call: Callable[[], object]) -> list[str]:
    """The names of the layers that run, in order."""
    ran: list[str] = []
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, leaf in leaves]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def check_parts(
    model: "ExitNetwork",
    groups: Sequence["Tensor"],
    size: tuple[int, int],
    policy: "ExitPolicy",
    exits: Sequence[int],
) -> list[int]:
    """How many images each part of the network ran; AssertionError unless it is those that had not left before it.

    That is BasisNet's identity: the specialist is called for the (1 - e) N images that the preview does not answer.
    """
    ran = images_of_parts(model, lambda: exits_taken(model, groups, size, policy))
    expected = [sum(exit >= place for exit in exits) for place in range(len(ran))]
    if ran != expected:
        raise AssertionError(f"the parts ran {ran} images, and {expected} were still there")
    return ran


def images_of_parts(model: "ExitNetwork", call: Callable[[], object]) -> list[int]:
    """How many images came to each part of the network, one before each exit; of BasisNet's to each encoder."""
    from dance_seg.early_exit.exits import changed
    from dance_seg.models.basisnet import BasisNet

    ran = [0] * model.num_exits

    def counted(place: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any) -> None:
            ran[place] += len(inputs[0])

        return hook

    def part(exit: int, state: Any) -> Any:
        images: list[int] = []
        changed(state, lambda tensor: images.append(len(tensor)))
        ran[exit] += images[0]
        return type(model).part(model, exit, state)

    hooks = []
    if isinstance(model, BasisNet):  # whose second part does nothing: the specialist is its head
        encoders = (model.preview.encoder, model.specialist.network.encoder)
        hooks = [encoder.register_forward_pre_hook(counted(place)) for place, encoder in enumerate(encoders)]
    else:
        model.part = part  # type: ignore[method-assign]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
        model.__dict__.pop("part", None)
    return ran


Proofs = tuple[dict[str, float], dict[str, Any]]
"""Figures, and what else was seen."""


def proofs(model: Any, data: "SegmentationDataModule", split: str) -> Proofs:
    """What METHODS.md 3.5 and 4.5 ask of a trained RANet or BasisNet."""
    from dance_seg.models.basisnet import BasisNet
    from dance_seg.models.ranet import RANet

    if isinstance(model, RANet):
        return ranet_proofs(model, data, split)
    return basisnet_proofs(model, data, split) if isinstance(model, BasisNet) else ({}, {})


def ranet_proofs(model: Any, data: "SegmentationDataModule", split: str) -> Proofs:
    """By how many points each exit falls when the features of the coarser sub-network are zeroed."""
    from dance_seg.calibration import exits_of_split
    from dance_seg.early_exit.policy import ExitPolicy

    (found,) = exits_of_split(model, data, split, ExitPolicy())
    with coarse_features_zeroed(model):
        (without_coarse,) = exits_of_split(model, data, split, ExitPolicy())
    whole, without = exit_mious(found), exit_mious(without_coarse)
    pairs = list(zip(whole, without, strict=True))[1:]  # the first sub-network has nothing coarser
    return {f"drop_without_coarse_features_exit_{k}": a - b for k, (a, b) in enumerate(pairs, start=2)}, {}


def exit_mious(found: "ExitsOfSplit") -> list[float]:
    """The mIoU of each exit when all images leave there."""
    import numpy as np

    from dance_seg.early_exit.budget import scored

    table = found.table(uniform_costs(found))
    images, exits = found.scores.shape
    return [scored(table, np.full(images, exit)) for exit in range(exits)]


@contextmanager
def coarse_features_zeroed(model: "nn.Module") -> Iterator[None]:
    """Let RANet's fusion blocks see nothing of the coarser sub-network."""
    import torch

    from dance_seg.models.ranet import FusionBlock

    def zeroed(module: Any, inputs: Any) -> Any:
        features, coarse = inputs
        return features, [torch.zeros_like(own) for own in coarse]

    blocks = [module for module in model.modules() if isinstance(module, FusionBlock)]
    hooks = [block.register_forward_pre_hook(zeroed) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def basisnet_proofs(model: Any, data: "SegmentationDataModule", split: str) -> Proofs:
    """What coefficients are worth: the specialist's fall with those of others or of nobody; and how they are used."""
    import torch

    from dance_seg.inference import evaluate

    with torch.inference_mode():
        images, _ = first_images(model, data, split, -1)
        alphas = torch.cat([model.coefficients(image) for image in images])  # (n, L, N)
    generator = torch.Generator().manual_seed(0)
    shuffled = iter(alphas[torch.randperm(len(alphas), generator=generator)].split(1))
    whole = evaluate(model, data, split).miou
    with coefficients_replaced(model, lambda own: torch.full_like(own, 1 / own.shape[-1])):
        uniform = evaluate(model, data, split).miou
    with coefficients_replaced(model, lambda own: next(shuffled)):
        others = evaluate(model, data, split).miou
    figures, said = use_of_bases(alphas)
    return {"drop_with_shuffled_alpha": whole - others, "drop_with_uniform_alpha": whole - uniform} | figures, said


@contextmanager
def coefficients_replaced(model: Any, given: "Callable[[Tensor], Tensor]") -> Iterator[None]:
    """Let BasisNet mix by other coefficients (B, L, N) than its own, which are handed to `given`."""
    hook = model.mixer.register_forward_hook(lambda module, inputs, own: given(own))
    try:
        yield
    finally:
        hook.remove()


def use_of_bases(alphas: "Tensor") -> Proofs:
    """How coefficients (n, L, N) are spread: their entropy over its limit, and who leads for how many images."""
    import torch

    bases = alphas.shape[-1]
    entropy = torch.special.entr(alphas.double()).sum(-1).mean().item()
    leads = torch.nn.functional.one_hot(alphas.argmax(-1), bases).double().mean(0)  # (L, N): share of images
    figures = {
        "entropy_of_alpha_over_limit": entropy / math.log(bases),
        "share_of_bases_leading_below_1_percent": (leads < 0.01).double().mean().item(),  # of (layer, basis)
    }
    return figures, {"images_led_by_each_basis": [round(share, 3) for share in leads.mean(0).tolist()]}  # over layers


# Reporting ------------------------------------------------------------------------------------------------------------


def report(
    setting: Setting,
    measured: Mapping[str, Sequence[Measured]],
    synthesis: Mapping[str, list[float]],
    runs: Mapping[str, Sequence[str]],
) -> None:
    """Print the table and write the figures that the targets are about; spreads are over rounds and seeds."""
    ratios: dict[str, dict[str, float]] = {}
    notes: dict[str, Any] = {"data": setting.data, "calibrated_on": setting.calibration, "scored_on": setting.test}
    for model, of_seeds in measured.items():
        for key in dict.fromkeys(key for one in of_seeds for key in one.ratios):
            ratios[f"{key}/{model}"] = spread([value for one in of_seeds for value in one.ratios.get(key, ())])
        notes[model] = {"rows": lines_of(of_seeds), "seeds": [one.notes for one in of_seeds], "runs": runs[model]}
    ratios |= {key: spread(values) for key, values in synthesis.items()}
    seeds = len(next(iter(measured.values())))
    name = "adaptive" if setting.data == "shapes" else f"adaptive_{setting.data}"
    write_result(name, seeds, ratios, notes)
    print(markdown(measured))


COLUMNS = ("mIoU", "range", "GMACs", "ms")


def lines_of(of_seeds: Sequence[Measured]) -> dict[str, dict[str, str]]:
    """The lines of one model's table: mIoU over seeds, costs averaged over them."""
    lines = {}
    for name in of_seeds[0].rows:
        found = [one.rows[name] for one in of_seeds]
        scores = [one.miou for one in found]
        gmacs, taken = (statistics.mean(getattr(one, key) for one in found) for key in ("gmacs", "milliseconds"))
        cells = (
            f"{statistics.mean(scores):.2f}",
            f"{min(scores):.2f} to {max(scores):.2f}",
            "–" if math.isnan(gmacs) else f"{gmacs:.3f}",
            f"{taken:.1f}",
        )
        lines[name] = dict(zip(COLUMNS, cells, strict=True))
    return lines


def markdown(measured: Mapping[str, Sequence[Measured]]) -> str:
    """The tables of all models, to be read and to be kept.

    >>> print(markdown({"ranet": [Measured({"exit 1 alone": Figures(50, 0.5, 4)}, {})]}).splitlines()[-1])
    | exit 1 alone | 50.00 | 50.00 to 50.00 | 0.500 | 4.0 |
    """
    lines: list[str] = []
    for model, of_seeds in measured.items():
        seeds = f"{len(of_seeds)} seed{'s' if len(of_seeds) > 1 else ''}"
        lines += ["", f"| {model}, {seeds} | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
        lines += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in lines_of(of_seeds).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
