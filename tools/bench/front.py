"""Networks found in a supernet beside dense and slimmed ones, on CamVid: python -m tools.bench.front --root DIR.

Trains what is not there yet: a multi-stage supernet, and of the four rows the dense network and that of both halves.
Searches the supernet for three budgets, judging on val, and scores all on the drive held out: found networks by the
thresholds of their exits, the others whole. Milliseconds are measured, all networks taking turns; of a network that
stops early, its whole time by the share of it that its images take on average. Writes runs/bench/front.json and the
plot beside it, front.svg.

FPN of the four rows begins with an encoder trained on ImageNet, the supernet with random weights. Overrides apply to
the supernet.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dance_seg.cost.latency import interleave
from tools.bench.adaptive import ON_CAMVID
from tools.bench.common import ratio, spread, write_result
from tools.bench.four_rows import SLIMMED, SMALL, trained
from tools.cli import parser, run
from tools.fetch_weights import WEIGHTS, fetch

if TYPE_CHECKING:
    from torch import nn

    from dance_seg.early_exit.policy import ExitPolicy
    from datamodules.base import SegmentationDataModule

SUPERNET = "recipes/camvid_multi_stage.yaml"
SHORT = ("trainer.max_epochs=60", "trainer.validate_every=20")
BUDGETS = (0.15, 0.35, 0.7)  # of the MACs of the largest network
SEARCHED, SCORED = "val", "held_out"
SEARCH = {"initial": 16, "iterations": 4, "parents": 4, "mutation": 4, "crossover": 4}
ROUNDS = 30


class Network(NamedTuple):
    """A network to be scored; with a policy it stops early."""

    name: str
    model: Any  # an nn.Module with coarse logits
    policy: "ExitPolicy | None" = None
    said: str = ""  # of the search


class Point(NamedTuple):
    """Where a network stands in the plot."""

    name: str
    miou: float  # points, on the split that is scored
    milliseconds: float  # an image, on average
    gmacs: float  # an image, on average
    said: str = ""


def main() -> int:
    """Train, search, score and draw."""
    arguments_parser = parser(__doc__ or "")
    arguments_parser.add_argument("--root", type=Path, required=True, help="CamVid, with train/ and trainannot/")
    arguments_parser.add_argument("--seed", type=int, default=0)
    arguments_parser.add_argument("--runs", type=Path, default=Path("runs/front"), help="where runs are kept")
    arguments_parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the supernet")
    arguments = arguments_parser.parse_intermixed_args()
    if not arguments.root.is_dir():
        raise ValueError(f"--root {arguments.root}: no such folder; give CamVid's, with train/ and trainannot/")
    root, seed, runs = f"data.args.root={arguments.root.resolve()}", arguments.seed, arguments.runs
    given = [*ON_CAMVID, root, *SHORT, *arguments.overrides]
    supernet = trained("multi_stage", SUPERNET, seed, given, runs).folder
    of_rows = [*SMALL, root, f"model.args.encoder_weights={fetch(WEIGHTS)}"]
    rows = {
        "FPN, dense": trained("dense", "recipes/camvid_dense.yaml", seed, of_rows, runs).folder,
        "FPN, DANCE": trained("dance", "recipes/camvid_dance.yaml", seed, [*SLIMMED["dance"], *of_rows], runs).folder,
    }
    networks, data = found_networks(supernet, seed)
    networks += [Network(name, loaded(folder)) for name, folder in rows.items()]
    points = placed(networks, data)
    report(points, {"supernet": supernet.name, **{name: folder.name for name, folder in rows.items()}})
    return 0


def loaded(folder: Path) -> "nn.Module":
    """The network of a run at its last epoch: the best would be chosen on what is reported."""
    from dance_seg.build import load_run

    return load_run(folder, "last")[0]


def found_networks(
    folder: Path, seed: int, budgets: Sequence[float] = BUDGETS, search: Mapping[str, int] = SEARCH
) -> "tuple[list[Network], SegmentationDataModule]":
    """The largest network of a supernet and the best for each budget, with its thresholds; and the supernet's data."""
    from dance_seg.build import load_run
    from dance_seg.early_exit.policy import ExitPolicy
    from dance_seg.recipe import recipe_from_record
    from dance_seg.subnet_scores import JudgedSplit, SubnetScores
    from dance_seg.supernet.search import Budget, Evolution, evolve
    from datamodules import build_datamodule

    model: Any
    model, record, _ = load_run(folder, "last")
    data = build_datamodule(recipe_from_record(record["recipe"]))
    judge = SubnetScores(model, JudgedSplit(data, SEARCHED), Budget(1.0), "dynamic")
    largest = model.space.largest
    networks = [Network("multi-stage, the largest", judge.network(largest))]
    full = judge.whole_cost(largest)
    for share in budgets:
        own = judge.within(Budget(share * full))
        best = evolve(model.space, own.cost, own.score, own.budget, Evolution(**search), seed=seed).best
        thresholds = [float("inf") if one is None else one for one in best.details["thresholds"]]
        said = f"{best.score:.1f} on {SEARCHED}; resolution {best.subnet['resolution']:g}, thresholds {thresholds}"
        policy = ExitPolicy(**{**vars(judge.policy), "thresholds": tuple(thresholds)})
        networks.append(Network(f"multi-stage within {share:g} of the MACs", judge.network(best.subnet), policy, said))
    return networks, data


def placed(networks: Sequence[Network], data: "SegmentationDataModule", rounds: int = ROUNDS) -> list[Point]:
    """Score and time all networks on the same images."""
    import torch

    from dance_seg.cost.macs import count_macs

    images = next(iter(data.evaluation_loader(SCORED))).images
    size = (images.shape[-2], images.shape[-1])
    shown = torch.zeros(1, 3, *size).to(memory_format=torch.channels_last)
    sides = {}
    for network in networks:
        network.model.cpu().eval().to(memory_format=torch.channels_last)
        sides[network.name] = partial(network.model.coarse_logits, shown)
    with torch.inference_mode():
        times = interleave(sides, rounds, warm_up=5)
    points = []
    for network in networks:
        miou, macs_share, time_share = scored(network, data, size)
        milliseconds = 1000 * ratio(times[network.name], [1.0] * rounds)["median"]
        gmacs = count_macs(network.model, size).macs / 1e9
        points.append(Point(network.name, miou, time_share * milliseconds, macs_share * gmacs, network.said))
    return points


def scored(network: Network, data: "SegmentationDataModule", size: tuple[int, int]) -> tuple[float, float, float]:
    """The mIoU in points, and the shares of the whole network's MACs and milliseconds that an image takes."""
    import numpy as np

    from dance_seg.calibration import costs_of_ways
    from dance_seg.early_exit.exits import ExitNetwork
    from dance_seg.inference import predictions
    from dance_seg.metrics import confusion_matrix, scores

    classes = len(data.classes)
    matrix, exits = np.zeros((classes, classes), np.int64), list[int]()
    for found in predictions(network.model, data, SCORED, policy=network.policy):
        matrix += confusion_matrix(found.prediction, found.label, classes)
        exits += found.exits
    if network.policy is None:
        return scores(matrix).miou, 1.0, 1.0
    assert isinstance(network.model, ExitNetwork)
    shares = [
        costs.average(exits, network.policy.asked) / costs.full
        for costs in costs_of_ways(network.model, size, network.policy).values()
    ]
    return scores(matrix).miou, shares[0], shares[1]


def report(points: Sequence[Point], runs: Mapping[str, str]) -> None:
    """Write the figures, and the plot of mIoU against milliseconds."""
    dense = next(point for point in points if point.name == "FPN, dense")
    ratios = {f"ms_over_dense/{point.name}": spread([point.milliseconds / dense.milliseconds]) for point in points}
    ratios |= {f"miou_minus_dense/{point.name}": spread([point.miou - dense.miou]) for point in points}
    lines = {
        point.name: f"mIoU {point.miou:.1f}, {point.milliseconds:.1f} ms, {point.gmacs:.3f} GMACs; {point.said}"
        for point in points
    }
    plot = write_result("front", 1, ratios, {**lines, "runs": dict(runs)}).with_suffix(".svg")
    plot.write_text(plot_of(points))
    print(f"the plot: {plot}")


def plot_of(points: Sequence[Point]) -> str:
    """An SVG file of mIoU against milliseconds, with the stairs of what none beats.

    Numbers name networks found in the supernet, by the share of its largest network's MACs that they were searched for.
    """
    from dance_seg.report.charts import Mark, scatter
    from dance_seg.report.page import picture

    marks = [
        Mark(point.milliseconds, point.miou, short(point.name), series=int(point.name.startswith("FPN")))
        for point in points
    ]
    drawing = scatter(
        marks,
        title="mIoU against milliseconds",
        x_label="ms of an image, on average",
        y_label=f"mIoU on {SCORED}",
        front=front_of(points),
    )
    return picture(drawing)


def short(name: str) -> str:
    """What a point is called in the plot, where names as long as those of the table cover each other.

    >>> short("multi-stage within 0.35 of the MACs"), short("FPN, dense")
    ('0.35', 'FPN, dense')
    """
    return name.removeprefix("multi-stage, the ").removeprefix("multi-stage within ").removesuffix(" of the MACs")


def front_of(points: Sequence[Point]) -> list[tuple[float, float]]:
    """The points that none beats in both, by cost.

    >>> front_of([Point("a", 50, 4, 1), Point("b", 40, 5, 1), Point("c", 30, 2, 1)])
    [(2, 30), (4, 50)]
    """
    kept: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda one: (one.milliseconds, -one.miou)):
        if not kept or point.miou > kept[-1][1]:
            kept.append((point.milliseconds, point.miou))
    return kept


if __name__ == "__main__":
    run(main)
