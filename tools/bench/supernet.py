"""Supernets and search: python -m tools.bench.supernet [key=value ...].

Speed: a step of four networks in one pass against one of the largest alone, judging candidates from cached tables and a
whole search on these, the MACs of judging a network, milliseconds over MACs of networks taken out, and how far sums of
a latency table are off. What training comes to, on drawn scenes: several networks a step against one, residual
reduction against none, statistics of a network's own against inherited ones, search against random search of as many
networks, stopping early against the best static network of as many MACs, and Kendall's tau between scores with
inherited weights and after training from scratch. Runs that are there already are not trained again.

--quick shows that it all works, in minutes, and measures nothing: two epochs of a few scenes. Overrides apply to every
run.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dance_seg.cost.latency import interleave
from tools.bench.common import ratio, spread, write_result
from tools.bench.four_rows import trained
from tools.cli import parser, run

if TYPE_CHECKING:
    from torch import nn

    from dance_seg.early_exit.budget import ExitTable
    from dance_seg.subnet_scores import JudgedSplit, SubnetScores
    from dance_seg.supernet.search import Budget, Evolution
    from dance_seg.supernet.space import Subnet

MULTI_STAGE, VIT_RESNAS = "recipes/shapes_multi_stage.yaml", "recipes/shapes_vit_resnas.yaml"
CROP = (128, 192)
LARGE = (360, 480)  # where networks taken out are timed
BATCH = 8
NETWORKS = 4  # that share a step
BUDGET = 0.4  # of the largest network's MACs
QUICK = (
    "trainer.max_epochs=2",
    "trainer.validate_every=2",
    "data.args.num_train=8",
    "data.args.num_val=4",
    "data.args.statistics_images=4",
)


@dataclass(frozen=True)
class Extent:
    """How much is trained, searched and measured."""

    rounds: int = 30  # of steps that take turns
    networks: int = 8  # that are judged, timed and trained from scratch
    retrained_epochs: int = 12
    searches: int = 3  # seeds of the search, for each supernet
    initial: int = 24
    iterations: int = 5
    children: int = 12
    candidates: int = 1000  # judged from cached tables
    table_limit_s: float = 0.3  # for each network that a latency table takes parts from
    overrides: tuple[str, ...] = ()

    @property
    def evolution(self) -> "Evolution":
        """The options of each search."""
        from dance_seg.supernet.search import Evolution

        half = self.children // 2
        return Evolution(initial=self.initial, iterations=self.iterations, parents=half, mutation=half, crossover=half)


SHORT = Extent(3, 3, 1, 1, 3, 2, 2, 50, 0.0, QUICK)


def main() -> int:
    """Train what is not there yet, and write runs/bench/supernet.json."""
    arguments_parser = parser(__doc__ or "")
    arguments_parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs; default: 0")
    arguments_parser.add_argument("--quick", action="store_true", help="whether it works, without meaning")
    arguments_parser.add_argument("--runs", type=Path, default=Path("runs/supernet"), help="where runs are kept")
    arguments_parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    arguments = arguments_parser.parse_intermixed_args()
    extent = SHORT if arguments.quick else Extent()
    given = ["tracking.wandb=disabled", *extent.overrides, *arguments.overrides]
    ratios: dict[str, list[float]] = {}
    notes: dict[str, Any] = {}

    def take(found: dict[str, list[float]]) -> None:
        for key, values in found.items():
            ratios.setdefault(key, []).extend(values)

    take(steps(extent))
    take(latency_over_macs(extent))
    take(latency_table_error(extent))
    for seed in arguments.seeds:  # seed by seed, so that an early stop leaves whole comparisons
        supernet = trained("multi_stage", MULTI_STAGE, seed, given, arguments.runs).folder
        found, said = of_multi_stage(supernet, seed, given, arguments.runs, extent)
        take(found)
        notes[f"multi_stage, seed {seed}"] = said
        found, said = of_vit_resnas(seed, given, arguments.runs, extent)
        take(found)
        notes[f"vit_resnas, seed {seed}"] = said
    name = "supernet_quick" if arguments.quick else "supernet"
    write_result(name, len(arguments.seeds), {key: spread(values) for key, values in ratios.items()}, notes)
    return 0


# Speed of training ----------------------------------------------------------------------------------------------------


def steps(extent: Extent) -> dict[str, list[float]]:
    """A step of several networks in one pass over one of the largest alone: seconds round by round, and peak bytes."""
    import torch

    from dance_seg.cost.memory import LiveTensors
    from dance_seg.models.vit_resnas import VitResNas
    from dance_seg.supernet.sampling import Sampling, subnets_of_step

    torch.manual_seed(0)
    model = VitResNas(num_classes=11).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.randn(BATCH, 3, *CROP), torch.randint(0, 11, (BATCH, *CROP))
    options = Sampling(method="multi_architectural", drawn=NETWORKS - 2, phases=(), start=0.0, end=0.0)
    drawn = (subnets_of_step(model.space, options, 0, step, 1.0) for step in range(10_000))

    def several() -> None:
        step(model, optimizer, images, labels, next(drawn))

    def largest() -> None:
        step(model, optimizer, images, labels, (model.space.largest,))

    times = interleave({"several": several, "largest": largest}, extent.rounds, warm_up=2)
    peaks = []
    for call in (several, largest):
        with LiveTensors() as live:
            call()
        peaks.append(float(live.peak_bytes))
    return {
        "multi_arch_step_over_largest": [a / b for a, b in zip(times["several"], times["largest"], strict=True)],
        "memory_over_largest": [peaks[0] / peaks[1]],
    }


def step(model: "nn.Module", optimizer: Any, images: Any, labels: Any, subnets: "Sequence[Subnet]") -> None:
    """One training step of networks that share a pass."""
    from dance_seg.losses import Loss, per_sample_loss
    from dance_seg.supernet.learning import losses_of_subnets
    from dance_seg.supernet.sampling import Sampling

    options = Sampling(method="multi_architectural")
    losses, ran = losses_of_subnets(
        model, images, labels, subnets, options, lambda logits: per_sample_loss(logits, labels, Loss())
    )
    assert len(ran) == len(subnets)
    losses.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# The convolutional supernet -------------------------------------------------------------------------------------------


def of_multi_stage(
    folder: Path, seed: int, overrides: Sequence[str], runs: Path, extent: Extent
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Judging, searching, statistics, ranks and milliseconds of a trained supernet."""
    model, split = loaded(folder)
    judge = judge_of(model, split, "dynamic")
    networks = spread_out(model, split.size, extent.networks, seed)
    whole = judge_of(model, split, "static")
    passes = evaluation_over_pass(whole, networks) | evaluation_over_pass(judge, networks)
    inherited = [split.miou(model.extract(subnet)) for subnet in networks]
    own = [whole.miou(subnet) for subnet in networks]
    retrained = [split.miou(load(from_scratch(folder, subnet, seed, overrides, runs, extent))) for subnet in networks]
    from dance_seg.supernet.search import kendall_tau

    found = {
        **judging(judge, networks, extent),
        **passes,
        "miou_own_minus_inherited_statistics": [a - b for a, b in zip(own, inherited, strict=True)],
        "kendall_tau": [kendall_tau(own, retrained)],
        **searched("multi_stage", whole, judge, seed, extent),
    }
    said = {
        "supernet": folder.name,
        "largest_miou": round(whole.miou(model.space.largest), 2),
        "gmacs": [round(whole.whole_cost(subnet) / 1e9, 4) for subnet in networks],
        "miou_with_weights_of_the_supernet": [round(miou, 2) for miou in own],
        "miou_from_scratch": [round(miou, 2) for miou in retrained],
    }
    return found, said


def loaded(folder: Path) -> "tuple[Any, JudgedSplit]":
    """The supernet of a run at its last epoch, and the validation images that judge its networks."""
    from dance_seg.build import load_run
    from dance_seg.recipe import recipe_from_record
    from dance_seg.subnet_scores import JudgedSplit
    from datamodules import build_datamodule

    model, record, _ = load_run(folder, "last")
    return model, JudgedSplit(build_datamodule(recipe_from_record(record["recipe"])), "val")


def load(folder: Path) -> "nn.Module":
    """The network of a run at its last epoch."""
    from dance_seg.build import load_run

    return load_run(folder, "last")[0]


def judge_of(model: "nn.Module", split: "JudgedSplit", performance: Any) -> "SubnetScores":
    """Scores within the budget, costs in MACs."""
    from dance_seg.cost.macs import count_macs
    from dance_seg.subnet_scores import SubnetScores
    from dance_seg.supernet.search import Budget

    return SubnetScores(model, split, Budget(BUDGET * count_macs(model, split.size).macs), performance)


def spread_out(model: Any, size: tuple[int, int], count: int, seed: int) -> "list[Subnet]":
    """Networks whose MACs for images (H, W) are spread evenly over the ranks of many drawn ones."""
    from dance_seg.randomness import Stream, generator
    from dance_seg.supernet.macs import SubnetMacs

    random, macs = generator(seed, Stream.SEARCH), SubnetMacs(model)
    drawn = sorted(
        {model.space.sample(random) for _ in range(20 * count)}, key=lambda subnet: macs.inference(subnet, size)
    )
    return [drawn[round(place * (len(drawn) - 1) / (count - 1))] for place in range(count)]


def judging(judge: "SubnetScores", networks: "Sequence[Subnet]", extent: Extent) -> dict[str, list[float]]:
    """Milliseconds of judging and of choosing thresholds from cached tables, and seconds of a whole search on these."""
    import numpy as np

    from dance_seg.randomness import Stream, generator
    from dance_seg.supernet.search import Budget, judge_dynamic

    tables = [judge.exit_table(subnet) for subnet in networks]
    random = generator(0, Stream.SEARCH)
    candidates = [
        (tables[int(random.integers(len(tables)))], random.random(tables[0].num_exits - 1).tolist())
        for _ in range(extent.candidates)
    ]
    judged, solved = [], []
    for table, thresholds in candidates:
        began = time.perf_counter()
        judge_dynamic(table, thresholds=thresholds)
        judged.append(1000 * (time.perf_counter() - began))
    for table in tables:
        budget = Budget((table.costs.cheapest + table.costs.full) / 2)
        began = time.perf_counter()
        judge_dynamic(table, budget)
        solved.append(1000 * (time.perf_counter() - began))
    began = time.perf_counter()
    num_judged = cached_search(tables, judge.budget, extent.candidates)
    return {
        "candidate_ms": judged,
        "candidate_ms_of_99_percent": [np.quantile(judged, 0.99).item()],
        "solve_ms": solved,
        "search_seconds/cached": [time.perf_counter() - began],
        "search_candidates/cached": [float(num_judged)],
    }


def cached_search(tables: "Sequence[ExitTable]", budget: "Budget", candidates: int) -> int:
    """Search for a network of a fixed set and thresholds of its exits, by its table; returns how many were judged."""
    import numpy as np

    from dance_seg.supernet.search import Dynamic, Evolution, Scored, evolve, judge_dynamic
    from dance_seg.supernet.space import SearchSpace, Subnet, Value

    exits = range(tables[0].num_exits - 1)
    shares = tuple(step / 100 for step in range(101))
    thresholds: dict[str, tuple[Value, ...]] = {f"exit{exit}.share": shares for exit in exits}
    space = SearchSpace({"network": tuple(range(len(tables))), **thresholds})

    def dynamic(candidate: Subnet) -> Dynamic:
        table = tables[int(candidate["network"])]
        chosen = [float(np.quantile(table.scores[:, exit], 1 - candidate[f"exit{exit}.share"])) for exit in exits]
        return judge_dynamic(table, thresholds=chosen)

    def cost(candidate: Subnet) -> float:
        return dynamic(candidate).average_cost

    def score(candidate: Subnet) -> Scored:
        return dynamic(candidate).as_scored()

    children = max(1, candidates // 20)
    options = Evolution(
        initial=candidates - 16 * children, iterations=9, parents=children, mutation=children, crossover=children,
        lowest=0.0,
    )  # fmt: skip
    return len(evolve(space, cost, score, budget, options).history)


def evaluation_over_pass(judge: "SubnetScores", networks: "Sequence[Subnet]") -> dict[str, list[float]]:
    """The MACs that judging networks runs over those of their plain pass over the images; statistics beforehand apart.

    Both together are all that a score takes; a dynamic one asks every head. Networks must not have been judged before.
    """
    from dance_seg.cost.macs import OperationCounter

    evaluation, recalibration = list[float](), list[float]()
    for subnet in networks:
        judge.cost(subnet)  # counts operations itself, once
        one_pass = len(judge.split.names) * judge.whole_cost(subnet)
        with OperationCounter() as built:
            judge.network(subnet)
        with OperationCounter() as scored:
            judge.score(subnet)
        recalibration.append(built.macs["forward"].total() / one_pass)
        evaluation.append(scored.macs["forward"].total() / one_pass - recalibration[-1])
    return {
        f"evaluation_over_pass/{judge.performance}": evaluation,
        f"recalibration_over_pass/{judge.performance}": recalibration,
    }


def from_scratch(
    folder: Path, subnet: "Subnet", seed: int, overrides: Sequence[str], runs: Path, extent: Extent
) -> Path:
    """The run of one network of the supernet, trained from scratch for a short while."""
    import hashlib

    from dance_seg.found_network import recipe_of_network
    from dance_seg.recipe import load_recipe, save_recipe

    name = f"network_{hashlib.sha256(str(subnet).encode()).hexdigest()[:8]}"
    recipe = recipe_of_network(load_recipe(folder / "recipe.yaml"), subnet, folder)
    path = runs / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_recipe(replace(recipe, start_from=None, name=name), path)
    epochs = extent.retrained_epochs
    short = [*overrides, f"trainer.max_epochs={epochs}", f"trainer.validate_every={epochs}"]
    return trained(name, str(path), seed, short, runs).folder


def searched(
    name: str, static: "SubnetScores", dynamic: "SubnetScores | None", seed: int, extent: Extent
) -> dict[str, list[float]]:
    """Searches against random ones of as many networks, and dynamic against static performance within the budget.

    The former for dynamic performance where the supernet has it.
    """
    from dance_seg.supernet.search import evolve, random_search

    seeds = range(100 * seed, 100 * seed + extent.searches)

    def best(find: Any, judge: "SubnetScores") -> list[float]:
        given = judge.model.space, judge.cost, judge.score, judge.budget, extent.evolution
        return [find(*given, seed=each).best.score for each in seeds]

    of_search, of_chance = best(evolve, dynamic or static), best(random_search, dynamic or static)
    found = {f"search_minus_random/{name}": [a - b for a, b in zip(of_search, of_chance, strict=True)]}
    if dynamic is not None:
        of_static = best(evolve, static)
        found[f"dynamic_minus_static/{name}"] = [a - b for a, b in zip(of_search, of_static, strict=True)]
    return found


def latency_table_error(extent: Extent) -> dict[str, list[float]]:
    """How far a latency table's sums are off for whole networks that it was not corrected by: absolute, over these.

    Weights do not matter, and sums are for images large enough that the time goes to layers: CamVid's size.
    """
    from dance_seg.models.multi_stage import MultiStageSupernet
    from dance_seg.models.vit_resnas import VitResNas
    from dance_seg.subnet_scores import latency_table, measured_whole
    from dance_seg.supernet.latency_table import check

    found = {}
    models: dict[str, Any] = {"multi_stage": MultiStageSupernet(11, "tiny"), "vit_resnas": VitResNas(11)}
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "latency.json"
            table = latency_table(model.eval(), LARGE, path, lambda said: None, extent.table_limit_s)
        networks = [model.extract(subnet).eval() for subnet in spread_out(model, LARGE, extent.networks, seed=0)]
        checked = check(table, networks, whole=measured_whole(model), time_limit_s=3 * extent.table_limit_s)
        found[f"latency_table_error/{name}"] = [abs(one.relative_error) for one in checked]
    return found


def latency_over_macs(extent: Extent) -> dict[str, list[float]]:
    """Milliseconds per MAC of networks taken out, over those of the largest; all take turns on one image.

    Up to the logits as the network makes them, since labels are made of these. Weights do not matter, and small images
    would measure Python: CamVid's size.
    """
    import torch

    from dance_seg.models.multi_stage import MultiStageSupernet
    from dance_seg.models.vit_resnas import VitResNas

    found = {}
    images = torch.randn(1, 3, *LARGE).to(memory_format=torch.channels_last)
    models: dict[str, Any] = {"multi_stage": MultiStageSupernet(11, "small"), "vit_resnas": VitResNas(11)}
    for name, model in models.items():
        every = [model.space.largest, *spread_out(model, LARGE, extent.networks, seed=0)]
        networks = [model.extract(subnet).eval().to(memory_format=torch.channels_last) for subnet in every]
        sides = {str(place): partial(network.coarse_logits, images) for place, network in enumerate(networks)}
        with torch.inference_mode():
            times = interleave(sides, extent.rounds, warm_up=3)
        costs = [coarse_macs(network, LARGE) for network in networks]
        found[f"subnet_latency_over_macs/{name}"] = [
            ratio(times[str(place)], times["0"])["median"] * costs[0] / costs[place] for place in range(1, len(every))
        ]
    return found


def coarse_macs(network: Any, size: tuple[int, int]) -> int:
    """The MACs of one image up to the logits as the network makes them."""
    from torch import nn

    from dance_seg.cost.macs import count_macs

    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Any) -> Any:
            return self.network.coarse_logits(images).logits

    return count_macs(Coarse(), size).macs


# The transformer ------------------------------------------------------------------------------------------------------


def of_vit_resnas(
    seed: int, overrides: Sequence[str], runs: Path, extent: Extent
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Several networks a step against one, at equal steps, search, and residual reduction against none."""
    folders = {
        method: trained(
            f"vit_resnas_{method}", VIT_RESNAS, seed, [*overrides, f"supernet.method={method}"], runs
        ).folder
        for method in ("multi_architectural", "single")
    }
    mious: dict[str, list[float]] = {}
    judges = {}
    for method, folder in folders.items():
        model, split = loaded(folder)
        judges[method] = judge_of(model, split, "static")
        networks = spread_out(model, split.size, extent.networks, seed)
        mious[method] = [judges[method].miou(subnet) for subnet in networks]
    judge = judges["multi_architectural"]
    several, single = mious.values()
    with_skip, without = (
        trained(
            f"vit_resnas_skip_{skip}",
            VIT_RESNAS,
            seed,
            [*overrides, "supernet=null", f"model.args.residual_reduction={skip}"],
            runs,
        )
        for skip in ("true", "false")
    )
    found = {
        "miou_several_minus_single": [statistics.mean(several) - statistics.mean(single)],
        "miou_with_minus_without_skip": [with_skip.miou - without.miou],
        **searched("vit_resnas", judge, None, seed, extent),
    }
    said = {
        **{f"mious_{method}": [round(miou, 2) for miou in found] for method, found in mious.items()},
        "gmacs": [round(judge.whole_cost(subnet) / 1e9, 4) for subnet in networks],
        "miou_with_skip": round(with_skip.miou, 2),
        "miou_without_skip": round(without.miou, 2),
        "steps_passed_over_with_skip": passed_over(with_skip.folder),
        "steps_passed_over_without_skip": passed_over(without.folder),
        "runs": {method: folder.name for method, folder in folders.items()},
    }
    return found, said


def passed_over(folder: Path) -> int:
    """How many steps of a run changed nothing, since their loss or gradients were not finite."""
    from dance_seg.build import load_run
    from dance_seg.checkpoint import load_checkpoint

    callbacks = load_checkpoint(load_run(folder, "last")[2])["callbacks"]
    return int(callbacks["FiniteSteps"]["passed_over"])


if __name__ == "__main__":
    run(main)
