"""Find the best network of a trained supernet within a budget: python -m tools.search RUN --budget-macs 1e8.

What is found becomes a run of its own, --out, which evaluate, export and predict take; its recipe.yaml trains it on, or
with start_from=null from scratch. All that was judged is kept in --storage: a search that was stopped goes on when
started again, several processes may share one, and the winner is the same. Judge on a split that you do not report.

--method front needs no budget: it looks for all networks that none beats, by MACs, or with --budget-ms of any number by
milliseconds. --subnet takes out a network that was named, and --trained says how well the supernet ranks networks that
were trained.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.cli import parser, run, write_json

if TYPE_CHECKING:
    from torch import nn

    from dance_seg.recipe import Recipe
    from dance_seg.subnet_scores import JudgedSplit, SubnetScores
    from dance_seg.supernet.search import Budget, Candidate, Evolution, Progress
    from dance_seg.supernet.space import Subnet

METHODS = ("evolution", "random", "front")
PERFORMANCES = ("static", "dynamic")
SPLITS = ("train", "held_out", "val", "test")
SHOWN = 5  # of the best networks


def arguments_parser() -> argparse.ArgumentParser:
    """What the tool takes."""
    made = parser(__doc__ or "", figures=True)
    made.add_argument("run", metavar="RUN", type=Path, help="the run of a supernet, such as runs/shapes_multi_stage")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="such as data.args.root=DIR")
    budget = made.add_mutually_exclusive_group()
    budget.add_argument("--budget-macs", metavar="N", type=float, help="MACs of an image, such as 2e9")
    budget.add_argument(
        "--budget-ms", metavar="N", type=float, help="milliseconds of an image on this machine; for a front any"
    )
    made.add_argument(
        "--performance", choices=PERFORMANCES, help="dynamic lets images stop early; default where there are exits"
    )
    made.add_argument(
        "--method", choices=METHODS, default="evolution", help="random is the control; default: evolution"
    )
    made.add_argument("--initial", metavar="N", type=int, default=48, help="networks drawn at first; default: 48")
    made.add_argument("--iterations", metavar="N", type=int, default=8, help="generations, the first too; default: 8")
    made.add_argument("--children", metavar="N", type=int, default=24, help="networks of each later one; default: 24")
    made.add_argument("--lowest", metavar="P", type=float, default=0.975, help="of the budget to use; default: 0.975")
    made.add_argument("--split", choices=SPLITS, default="val", help="whose images judge; default: val")
    made.add_argument("--images", metavar="N", type=int, help="judge on so many images of the split; default: all")
    made.add_argument("--seed", type=int, default=0, help="of the search; default: 0")
    made.add_argument("--checkpoint", default="best", help="best, last or a path; default: best")
    made.add_argument("--storage", metavar="FILE", type=Path, help="of what was judged; default: in RUN/search")
    made.add_argument("--out", metavar="DIR", type=Path, help="of the network that is found; default: RUN_found")
    made.add_argument("--control", action="store_true", help="also a random search of as many networks")
    made.add_argument("--beside", metavar="RUN", type=Path, nargs="+", default=[], help="other models in the plot")
    made.add_argument("--subnet", metavar="FILE", type=Path, help="JSON of a network's choices: take it out, no search")
    made.add_argument("--trained", metavar="RUN", type=Path, nargs="+", help="runs of found networks, to be ranked")
    return made


def main() -> int:
    """Search, write the network that was found, and print what it came to."""
    arguments = arguments_parser().parse_intermixed_args()
    from dance_seg.build import load_run
    from dance_seg.recipe import recipe_from_record
    from dance_seg.subnet_scores import JudgedSplit
    from dance_seg.supernet.elastic import Supernet
    from datamodules import build_datamodule

    check_asked(arguments)
    model, record, _ = load_run(arguments.run, arguments.checkpoint)
    recipe = recipe_from_record(record["recipe"], overrides=arguments.overrides)
    if not isinstance(model, Supernet):
        raise ValueError(
            f"{arguments.run} trained {recipe.model.name}, a single network; train a supernet, such as "
            "recipes/shapes_multi_stage.yaml"
        )
    named = model.space.subnet(read_choices(arguments.subnet)) if arguments.subnet else None
    split = JudgedSplit(build_datamodule(recipe), arguments.split, arguments.images)
    judge = judge_of(arguments, model, split, [named] if named else [])
    if arguments.trained:
        figures = rank_correlation(arguments, judge, recipe)
    elif named is not None:
        figures = taken_out(arguments, judge, record, named)
    elif arguments.method == "front":
        figures = whole_front(arguments, judge, recipe)
    else:
        figures = best_network(arguments, judge, record, recipe)
    write_json(arguments.json, figures)
    return 0


def check_asked(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together, before anything is loaded."""
    has_budget = arguments.budget_macs is not None or arguments.budget_ms is not None
    needs_budget = not (arguments.trained or arguments.subnet or arguments.method == "front")
    if needs_budget and not has_budget:
        raise ValueError("there is no budget; give --budget-macs, such as 2e9, or --budget-ms")
    if not needs_budget and arguments.performance == "dynamic":
        raise ValueError("dynamic performance is that within a budget; search for one network, or give static")
    if arguments.beside and (arguments.subnet or arguments.trained):
        raise ValueError(
            "--beside shows other models beside what was searched for; leave it out, or --subnet or --trained"
        )
    if arguments.control and not needs_budget:
        raise ValueError(
            "--control is a random search beside one for a single network; leave it out, or --method front, --subnet "
            "or --trained"
        )
    if arguments.control and arguments.method == "random":
        raise ValueError("--control is a random search beside another; leave it out, or --method random")
    if arguments.images is not None and arguments.images < 1:
        raise ValueError(f"--images is {arguments.images}; judge on at least 1")
    if has_budget:
        budget_of(arguments)
    evolution_of(arguments)


def read_choices(path: Path) -> dict[str, Any]:
    """A network's choices from a JSON file. Raises ValueError, naming the file, for anything else."""
    from dance_seg.plain_data import read_object

    found = read_object(path)
    if not found:
        raise ValueError(f"{path}: holds no choices; write a value for each, as `subnet` in what --json writes")
    return found


def budget_of(arguments: argparse.Namespace) -> "Budget":
    """The budget, without a limit where there is none. Raises ValueError for one that is no positive number."""
    from dance_seg.supernet.search import Budget

    if arguments.budget_ms is not None:
        return Budget(arguments.budget_ms, "ms")
    return Budget(1e18 if arguments.budget_macs is None else arguments.budget_macs)


def evolution_of(arguments: argparse.Namespace) -> "Evolution":
    """The options of the search: half of the children by mutation, half by crossing, of half as many parents."""
    from dance_seg.supernet.search import Evolution

    crossover = arguments.children // 2
    return Evolution(
        initial=arguments.initial,
        iterations=arguments.iterations,
        parents=max(1, crossover),
        mutation=arguments.children - crossover,
        crossover=crossover,
        lowest=arguments.lowest,
    )


def judge_of(
    arguments: argparse.Namespace, model: "nn.Module", split: "JudgedSplit", named: "Sequence[Subnet]"
) -> "SubnetScores":
    """Scores and costs of the supernet's networks, in the budget's unit, which those that are named surely have."""
    from dance_seg.early_exit.exits import ExitNetwork
    from dance_seg.subnet_scores import Performance, SubnetScores, latency_table

    budget = budget_of(arguments)
    table = None
    if budget.unit == "ms":
        path = arguments.run / "search" / "latency.json"
        table = latency_table(model, split.size, path, print, device=split.device, named=named)
    dynamic = isinstance(model, ExitNetwork) and not (arguments.subnet or arguments.trained)
    default: Performance = "dynamic" if dynamic and arguments.method != "front" else "static"
    return SubnetScores(model, split, budget, arguments.performance or default, table=table)


# What it does ---------------------------------------------------------------------------------------------------------


def best_network(
    arguments: argparse.Namespace, judge: "SubnetScores", record: dict[str, Any], recipe: "Recipe"
) -> dict[str, Any]:
    """Search for one network within the budget, and write it as a run."""
    from dance_seg.found_network import check_folder, judged_rows, search_figures, track, write_found
    from dance_seg.report.run_page import write_report
    from dance_seg.supernet.search import evolve, random_search

    out = arguments.out or arguments.run.with_name(f"{arguments.run.name}_found")
    about = judge.about() | {"budget": str(judge.budget), "method": arguments.method, "seed": arguments.seed}
    check_folder(out, about)
    check_in_reach(judge, arguments.lowest)

    def search(method: str) -> Any:
        name = f"{method}_{judge.performance}_{judge.budget.limit:g}{judge.budget.unit}_seed{arguments.seed}.journal"
        given = arguments.storage
        if given is not None and method != arguments.method:
            given = given.with_name(f"{given.stem}_{method}{given.suffix}")
        with shown_progress(f"{method} search") as progress:
            return (evolve if method == "evolution" else random_search)(
                judge.model.space,
                judge.cost,
                judge.score,
                judge.budget,
                evolution_of(arguments),
                seed=arguments.seed,
                storage=given or arguments.run / "search" / name,
                about=judge.about(),
                progress=progress,
            )

    # The control first: where its storage is of another search, that is said before anything was spent.
    control = search_figures(search("random"), judge) if arguments.control else None
    found = search(arguments.method)
    figures = search_figures(found, judge) | {"about": about}
    if control is not None:
        figures["control"] = control
    figures["beside"] = [*ends_of(judge), *beside(judge, arguments.beside)]
    network = write_found(out, record, judge, found.best.subnet, figures)
    track(recipe, out, judged_rows(found.history))
    write_report(out)
    print_best(found.history, judge)
    print(f"best: {found.best.subnet}")
    if found.note:
        print(found.note)
    if judge.table is not None:
        figures["measured_ms"] = measured = measured_ms(judge, network, out)
        over = ", more than the budget" if measured > judge.budget.limit else ""
        print(f"measured {measured:.4g} ms{over}; by the latency table {found.best.cost:.4g}, {judge.budget} allowed")
    if control is not None:
        of_random = control["best"]["score"]
        print(f"random search, as many networks: {of_random:.2f}; the search {found.best.score - of_random:+.2f}")
    print(f"{out} holds the network, {out}/report.html the search; to train it on: tools.train {out}/recipe.yaml")
    return figures


def measured_ms(judge: "SubnetScores", network: "nn.Module", folder: Path) -> float:
    """What an image takes in the network that was found, measured: on average where images leave early."""
    from dance_seg.plain_data import read_object

    if judge.performance == "dynamic":
        return float(read_object(folder / "calibration.json")["achieved"]["milliseconds"])
    return judge.cost_of_other(network)


def check_in_reach(judge: "SubnetScores", lowest: float) -> None:
    """Raise ValueError for a budget below what the smallest network can spend, or above what the largest one does."""
    space, unit = judge.model.space, judge.unit
    dynamic = judge.performance == "dynamic"
    least = judge.path_costs(space.smallest).cheapest if dynamic else judge.whole_cost(space.smallest)
    most = judge.whole_cost(space.largest)
    if not least <= judge.budget.limit or most < lowest * judge.budget.limit:
        way = ", every image leaving at the first exit" if dynamic else ""
        raise ValueError(
            f"the budget is {judge.budget}, and the networks of this space cost from {least:.6g} (the smallest{way}) "
            f"to {most:.6g} {unit} (the largest): give a budget between, or a smaller --lowest"
        )


def whole_front(arguments: argparse.Namespace, judge: "SubnetScores", recipe: "Recipe") -> dict[str, Any]:
    """Search for all networks that none beats in both score and cost; the supernet's report shows them."""
    from dance_seg.found_network import SEARCH, judged_rows, track
    from dance_seg.machine import write_text
    from dance_seg.report.run_page import write_report
    from dance_seg.supernet.front import Front, front

    options = Front(population=arguments.children, generations=arguments.iterations)
    storage = arguments.storage or arguments.run / "search" / f"front_{judge.unit}_seed{arguments.seed}.journal"
    with shown_progress("front") as progress:
        found = front(
            judge.model.space,
            judge.cost,
            judge.score,
            options,
            seed=arguments.seed,
            storage=storage,
            about=judge.about(),
            progress=progress,
        )
    figures = {
        "about": judge.about() | {"method": "front", "seed": arguments.seed},
        "unit": judge.unit,
        "front": [one.as_record() for one in found.front],
        "history": [one.as_record() for one in found.history],
        "beside": [*ends_of(judge), *beside(judge, arguments.beside)],
    }
    write_text(arguments.run / SEARCH, json.dumps(figures, indent=1) + "\n")
    front_rows = [{"search/front_score": one.score, "search/front_cost": one.cost} for one in found.front]
    track(recipe, arguments.run, judged_rows(found.history), front_rows)
    write_report(arguments.run)
    print_best(found.front, judge)
    print(f"{arguments.run}/report.html shows the front of {len(found.front)} among {len(found.history)} networks")
    return figures


def taken_out(
    arguments: argparse.Namespace, judge: "SubnetScores", record: dict[str, Any], subnet: "Subnet"
) -> dict[str, Any]:
    """Write a network that was named as a run."""
    from dance_seg.found_network import check_folder, write_found
    from dance_seg.report.run_page import write_report
    from dance_seg.supernet.storage import Candidate

    out = arguments.out or arguments.run.with_name(f"{arguments.run.name}_found")
    about = judge.about() | {"method": "named", "subnet": subnet.as_record()}
    check_folder(out, about)
    one = Candidate(0, 0, subnet, judge.whole_cost(subnet), judge.miou(subnet))
    best = one.as_record()
    figures = {"about": about, "unit": judge.unit, "best": best, "history": [best], "beside": ends_of(judge)}
    write_found(out, record, judge, subnet, figures)
    write_report(out)
    print_best([one], judge)
    print(f"{out} holds the network; to train it on: tools.train {out}/recipe.yaml")
    return figures


def rank_correlation(arguments: argparse.Namespace, judge: "SubnetScores", recipe: "Recipe") -> dict[str, Any]:
    """How the supernet's scores of networks go with those after training, on the same images."""
    from dance_seg.build import load_run
    from dance_seg.found_network import track
    from dance_seg.supernet.search import kendall_tau
    from dance_seg.supernet.space import named_subnet

    folders: Sequence[Path] = arguments.trained
    if len(folders) < 2:
        raise ValueError("a rank correlation needs at least 2 runs; give more to --trained")
    rows: list[dict[str, Any]] = []
    for folder in folders:
        network, record, _ = load_run(folder)
        choices = record["recipe"]["model"]["args"].get("subnet")
        if choices is None:
            raise ValueError(f"{folder} trained no network of a supernet (its recipe has no model.args.subnet)")
        try:
            subnet = named_subnet(judge.model.space, choices)
        except ValueError as error:
            raise ValueError(f"{folder}: of another search space: {error}") from None
        rows.append({"run": str(folder), "supernet": judge.miou(subnet), "trained": judge.split.miou(network)})
    tau = kendall_tau([row["supernet"] for row in rows], [row["trained"] for row in rows])
    pairs = [{f"search/rank/{key}": float(row[key]) for key in ("supernet", "trained")} for row in rows]
    track(recipe, arguments.run, pairs, [{"search/rank/kendall_tau": tau}])
    print("  supernet  trained  run")
    for row in rows:
        print(f"  {row['supernet']:8.2f}  {row['trained']:7.2f}  {row['run']}")
    print(f"Kendall's tau of {len(rows)} networks: {tau:.2f}")
    return {"about": judge.about(), "networks": rows, "kendall_tau": tau}


# Beside it ------------------------------------------------------------------------------------------------------------


def ends_of(judge: "SubnetScores") -> list[dict[str, Any]]:
    """The largest and the smallest network: mIoU and cost of all of each."""
    space = judge.model.space
    return [
        {"name": name, "score": judge.miou(subnet), "cost": judge.whole_cost(subnet)}
        for name, subnet in (("largest", space.largest), ("smallest", space.smallest))
    ]


def beside(judge: "SubnetScores", folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The networks of other runs on the same images, with what one image costs."""
    from dance_seg.build import load_run

    found = []
    for folder in folders:
        network = load_run(folder)[0]
        found.append({"name": folder.name, "score": judge.split.miou(network), "cost": judge.cost_of_other(network)})
    return found


@contextmanager
def shown_progress(what: str) -> "Iterator[Callable[[Progress], None]]":
    """A progress bar of judged networks, with the best score so far."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="network") as bar:

        def show(progress: "Progress") -> None:
            bar.total = progress.total
            bar.update(progress.done - bar.n)
            if progress.best is not None:
                bar.set_postfix_str(f"best {progress.best.score:.2f}")

        yield show


def print_best(candidates: "Sequence[Candidate]", judge: "SubnetScores") -> None:
    """The best networks by score, and how many were drawn that could not be judged."""
    from dance_seg.supernet.search import rank

    if judge.left_out:
        print(f"{len(judge.left_out)} networks that were drawn have parts that were not timed, and were left out")

    print(f"{judge.performance} performance on {len(judge.split.names)} images of {judge.split.split}")
    print(f"  {'mIoU':>6}  {judge.unit:>10}  generation, number")
    for one in sorted(candidates, key=rank)[:SHOWN]:
        print(f"  {one.score:6.2f}  {one.cost:10.4g}  {one.generation}, {one.number}")


if __name__ == "__main__":
    run(main)
