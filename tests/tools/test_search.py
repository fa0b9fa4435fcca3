"""tools.search on supernets that were not trained: what it finds, keeps, goes on with and refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dance_seg.build import build_model, checkpoint_record, load_run, train
from dance_seg.calibration import calibrated_policy
from dance_seg.checkpoint import save_checkpoint
from dance_seg.cost.macs import count_macs
from dance_seg.early_exit.paths import Walked, path_costs
from dance_seg.found_network import check_folder, judged_rows, track, write_found
from dance_seg.inference import evaluate, predictions
from dance_seg.metrics import confusion_matrix, scores
from dance_seg.part import Part
from dance_seg.recipe import load_recipe, recipe_from_record, save_recipe
from dance_seg.subnet_scores import JudgedSplit, SubnetScores
from dance_seg.supernet.search import Budget
from dance_seg.supernet.storage import Candidate
from datamodules import build_datamodule
from tests.tiny import tiny
from tools import search

ROOT = Path(__file__).parent.parent.parent
FEW = ("--initial", "3", "--iterations", "2", "--children", "2")
MACS = 14e6  # of 10 to 68 million in the whole networks


def write_run(folder, name, *overrides):
    """The run of a supernet whose weights are as they were drawn; statistics and heads are such that images differ."""
    recipe = replace(tiny(*overrides, cache=folder / "cache"), model=Part(name, {"size": "tiny"}), name=name)
    datamodule = build_datamodule(recipe)
    torch.manual_seed(0)
    model = build_model(recipe, len(datamodule.classes))
    checkpoint = {
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "dance_seg": checkpoint_record(recipe, datamodule),
    }
    save_checkpoint(checkpoint, folder / name / "checkpoints" / "step-00000001.ckpt")
    save_recipe(recipe, folder / name / "recipe.yaml")
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: write_run(folder, name) for name in ("multi_stage_supernet", "vit_resnas_supernet", "multi_stage")}


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Call the tool in this process; returns what --json holds."""

    def called(*words, storage="kept.journal", out="found"):
        given = ["search", *map(str, words), "--json", str(tmp_path / "figures.json")]
        given += ["--storage", str(tmp_path / storage), "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", given)
        assert search.main() == 0
        return json.loads((tmp_path / "figures.json").read_text())

    return called


@pytest.fixture
def tracked(monkeypatch):
    """What is told to the tracker."""

    class Tracker:
        def __init__(self):
            self.options, self.rows, self.finished = {}, [], False

        def log_metrics(self, figures, step):
            self.rows.append((step, figures))

        def finish(self):
            self.finished = True

        def columns(self, key):
            return [(step, figures[key]) for step, figures in self.rows if key in figures]

    tracker = Tracker()
    monkeypatch.setattr(
        "dance_seg.build.guarded_wandb_logger", lambda folder, **named: tracker.options.update(named) or tracker
    )
    return tracker


def test_the_network_found_spends_and_scores_what_the_search_said_after_a_reload(runs, call, tmp_path):
    figures = call(runs["multi_stage_supernet"], "--budget-macs", MACS, *FEW, "--control")
    model, record, path = load_run(tmp_path / "found")
    datamodule = build_datamodule(load_recipe(tmp_path / "found" / "recipe.yaml"))
    policy = calibrated_policy(record, model, at=str(path))
    matrix, costs, spent = np.zeros((11, 11), np.int64), path_costs(model, (64, 64)), []
    for one in predictions(model, datamodule, "val", policy=policy):
        matrix += confusion_matrix(one.prediction, one.label, 11)
        spent.append(costs.total(one.exits[0], policy.asked))
    assert np.mean(spent) <= MACS
    assert np.mean(spent) == pytest.approx(figures["best"]["details"]["average_cost"])
    assert scores(matrix).miou == pytest.approx(figures["best"]["score"], abs=1e-9)
    assert len(figures["history"]) == len(figures["control"]["history"]) == 5
    for one in [*figures["history"], *figures["control"]["history"]]:
        assert 0 < one["details"]["average_cost"] <= MACS
        assert 0.975 * MACS <= one["cost"] <= MACS
    page = (tmp_path / "found" / "report.html").read_text()
    assert "The network that was found" in page
    assert "random search" in page.lower()


@pytest.mark.slow
def test_every_judged_network_spends_at_most_the_budget_when_its_images_walk_through_it(runs, call):
    figures = call(runs["multi_stage_supernet"], "--budget-macs", MACS, *FEW)
    model, record, _ = load_run(runs["multi_stage_supernet"])
    datamodule = build_datamodule(recipe_from_record(record["recipe"]))
    judge = SubnetScores(model, JudgedSplit(datamodule, "val"), Budget(MACS), "dynamic")
    for one in figures["history"]:
        network = judge.network(model.space.subnet(one["subnet"]))
        thresholds = [float("inf") if each is None else each for each in one["details"]["thresholds"]]
        policy, costs = replace(judge.policy, thresholds=tuple(thresholds)), path_costs(network, (64, 64))
        walked = [each.exits[0] for each in predictions(network, datamodule, "val", policy=policy)]
        assert costs.average(walked, policy.asked) == pytest.approx(one["details"]["average_cost"])
        assert costs.average(walked, policy.asked) <= MACS


@pytest.mark.slow
def test_a_found_network_is_trained_on_from_its_weights(runs, call, tmp_path, monkeypatch):
    call(runs["vit_resnas_supernet"], "--budget-macs", 25e6, "--initial", "2", "--iterations", "1", "--lowest", "0.5")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(tmp_path / "found" / "recipe.yaml", ["trainer.max_epochs=1", "optimizer.lr=1e-12"])
    assert recipe.model.name == "vit_resnas"
    train(recipe, build_datamodule(recipe), tmp_path / recipe.name)
    before, after = (load_run(tmp_path / name)[0] for name in ("found", "found_trained"))
    for name, weight in after.named_parameters():
        torch.testing.assert_close(weight, before.get_parameter(name))


@pytest.mark.slow
def test_static_performance_is_that_of_the_whole_network(runs, call, tmp_path):
    figures = call(runs["multi_stage_supernet"], "--budget-macs", 30e6, *FEW, "--performance", "static")
    model, record, path = load_run(tmp_path / "found")
    assert calibrated_policy(record, model, at=str(path)) is None
    assert figures["best"]["cost"] == count_macs(model, (64, 64)).macs <= 30e6
    datamodule = build_datamodule(load_recipe(tmp_path / "found" / "recipe.yaml"))
    assert evaluate(model, datamodule, "val").miou == pytest.approx(figures["best"]["score"], abs=1e-9)


@pytest.mark.slow
def test_a_search_that_was_broken_off_goes_on_and_ends_the_same(runs, call, monkeypatch):
    words = (runs["multi_stage_supernet"], "--budget-macs", MACS, *FEW)
    undisturbed = call(*words, storage="undisturbed.journal")
    score, judged = SubnetScores.score, []

    def stops(self, subnet):
        judged.append(subnet)
        if len(judged) == 4:
            raise KeyboardInterrupt
        return score(self, subnet)

    monkeypatch.setattr(SubnetScores, "score", stops)
    with pytest.raises(KeyboardInterrupt):
        call(*words)
    assert call(*words) == undisturbed
    assert len(judged) == 6  # three before, the one that was broken off, and two again


@pytest.mark.slow
def test_a_search_killed_at_a_random_moment_and_started_again_ends_the_same(runs, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(name):
        given = [
            "--storage",
            tmp_path / f"{name}.journal",
            "--out",
            tmp_path / name,
            "--json",
            tmp_path / f"{name}.json",
        ]
        few = ["--initial", "8", "--iterations", "4", "--children", "6"]
        words = [runs["multi_stage_supernet"], "--budget-macs", MACS, *few, *given]
        return [sys.executable, "-m", "tools.search", *map(str, words)]

    subprocess.run(command("undisturbed"), env=environment, check=True, timeout=300, capture_output=True)
    process = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, deadline = tmp_path / "killed.journal", time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 20) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    # Two processes go on together.
    both = [subprocess.Popen(command("killed"), env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [one.wait(timeout=300) for one in both] == [0, 0]
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("undisturbed", "killed"))
    assert one == other


@pytest.mark.slow
def test_milliseconds_come_from_one_table_that_is_kept(runs, call, capsys, monkeypatch):
    monkeypatch.setattr("dance_seg.subnet_scores.PATIENCE", 3)
    run = runs["vit_resnas_supernet"]
    words = (run, "--initial", "2", "--iterations", "1", "--lowest", "0")
    figures = call(*words, "--budget-ms", 1e4)
    assert "parts measured; sums are off by" in capsys.readouterr().out
    table = run / "search" / "latency.json"
    written = table.read_text()
    again = call(*words, "--budget-ms", 1e4, storage="again.journal", out="again")
    assert table.read_text() == written
    assert [one["cost"] for one in again["history"]] == [one["cost"] for one in figures["history"]]
    assert figures["unit"] == "ms"


def test_milliseconds_of_the_ways_through_a_network_add_up(runs, monkeypatch):
    """The whole way without other heads is the whole network, and ways that go farther take longer."""
    monkeypatch.setattr("dance_seg.subnet_scores.parts_of", lambda network, size, whole: _counted(network))
    model, _, _ = load_run(runs["multi_stage_supernet"])
    datamodule = build_datamodule(load_recipe(runs["multi_stage_supernet"] / "recipe.yaml"))
    judge = SubnetScores(model, JudgedSplit(datamodule, "val"), Budget(1.0, "ms"), "static", table=_OfCounts())
    costs = judge.path_costs(model.space.largest)
    whole = Walked(model.extract(model.space.largest), 2, (False, False, True), to_full_size=False)
    assert costs.full == count_macs(whole, (64, 64)).macs
    assert list(costs.trunk) == sorted(costs.trunk)
    assert costs.unit == "ms"


class _OfCounts:
    """A latency table by which a MAC takes a millisecond."""

    def __init__(self):
        self.parts = {"MAC": 1.0}

    def milliseconds(self, parts):
        return parts["MAC"]


def _counted(network):
    return {"MAC": count_macs(network, (64, 64)).macs}


@pytest.mark.slow
def test_the_whole_front_stands_in_the_supernets_report(runs, call, tracked):
    run = runs["multi_stage_supernet"]
    figures = call(run, "--method", "front", "--children", "3", "--iterations", "2", "--beside", runs["multi_stage"])
    costs, mious = ([one[key] for one in figures["front"]] for key in ("cost", "score"))
    assert costs == sorted(costs)
    assert mious == sorted(mious)
    assert tracked.columns("search/front_cost") == list(enumerate(costs))
    assert tracked.columns("search/front_score") == list(enumerate(mious))
    assert tracked.columns("search/score") == [(step, one["score"]) for step, one in enumerate(figures["history"])]
    assert [one["name"] for one in figures["beside"]] == ["largest", "smallest", "multi_stage"]
    assert "mIoU against GMACs" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_network_that_is_named_is_taken_out_and_ranked(runs, call, tmp_path, tracked):
    run, folders = runs["multi_stage_supernet"], []
    space = build_model(load_recipe(run / "recipe.yaml"), 11).space
    for name, subnet in (("largest", space.largest), ("smallest", space.smallest)):
        (tmp_path / "subnet.json").write_text(json.dumps(subnet.as_record()))
        figures = call(run, "--subnet", tmp_path / "subnet.json", out=name)
        assert load_run(tmp_path / name)[0].active == subnet
        folders.append(tmp_path / name)
    ranked = call(run, "--trained", *folders)
    assert [row["supernet"] for row in ranked["networks"]] == [row["trained"] for row in ranked["networks"]]
    assert tracked.columns("search/rank/trained") == [(n, row["trained"]) for n, row in enumerate(ranked["networks"])]
    assert tracked.columns("search/rank/kendall_tau") == [(0, ranked["kendall_tau"])]
    assert ranked["networks"][1]["supernet"] == figures["best"]["score"]
    assert ranked["kendall_tau"] in (1.0, pytest.approx(1.0)) or ranked["networks"][0] == ranked["networks"][1]


@pytest.mark.parametrize("broken", ["write_text", "save_recipe"])
def test_after_a_kill_while_a_network_is_written_the_same_search_writes_it(runs, tmp_path, monkeypatch, broken):
    model, record, _ = load_run(runs["vit_resnas_supernet"])
    datamodule = build_datamodule(recipe_from_record(record["recipe"]))
    judge = SubnetScores(model, JudgedSplit(datamodule, "val", 1), Budget(1e9), "static")
    about, folder = {"seed": 0}, tmp_path / "found"

    def killed(*_):
        (folder / "any.123.tmp").write_text("half")
        raise KeyboardInterrupt

    def write():
        check_folder(folder, about)
        write_found(folder, record, judge, model.space.smallest, {"about": about})

    with monkeypatch.context() as patch:
        folder.mkdir()
        patch.setattr(f"dance_seg.found_network.{broken}", killed)
        with pytest.raises(KeyboardInterrupt):
            write()
    write()
    assert load_run(folder)[1]["recipe"]["model"]["args"]["subnet"] == model.space.smallest.as_record()
    with pytest.raises(ValueError, match="holds what another search found"):
        check_folder(folder, {"seed": 1})


def test_every_judged_network_goes_to_the_tracker_with_the_best_so_far(runs, tmp_path, tracked):
    recipe = load_recipe(runs["multi_stage_supernet"] / "recipe.yaml")
    smallest = build_model(recipe, 11).space.smallest
    history = [Candidate(0, number, smallest, 5.0, score) for number, score in enumerate((3.0, 2.0, 4.0))]
    track(recipe, tmp_path, judged_rows(history))
    assert tracked.columns("search/best") == [(0, 3.0), (1, 3.0), (2, 4.0)]
    assert tracked.columns("search/score") == [(0, 3.0), (1, 2.0), (2, 4.0)]
    assert tracked.finished
    assert tracked.options["name"] == tmp_path.name
    assert "search" in tracked.options["tags"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is no budget; give --budget-macs, such as 2e9, or --budget-ms"),
        (("--budget-macs", "0"), "the budget is 0.0 MACs: give a positive number"),
        (("--budget-macs", "1e8", "--initial", "0"), "initial is 0; it must be at least 1"),
        (("--budget-macs", "1e8", "--images", "0"), "--images is 0"),
        (("--method", "front", "--performance", "dynamic"), "dynamic performance is that within a budget"),
        (("--subnet", "one.json", "--beside", "runs/other"), "--beside shows other models beside what was searched"),
        (("--trained", "one", "two", "--beside", "runs/other"), "--beside shows other models beside what was searched"),
        (("--method", "front", "--control"), "--control is a random search beside one for a single network"),
        (("--budget-macs", "1e8", "--method", "random", "--control"), "--control is a random search beside another"),
        (("--subnet", "one.json", "--control"), "--control is a random search beside one for a single network"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(runs, call, words, said):
    with pytest.raises(ValueError, match=said):
        call(runs["multi_stage_supernet"], *words)


def test_other_networks_storages_and_folders_are_refused(runs, call, tmp_path):
    run = runs["multi_stage_supernet"]
    with pytest.raises(ValueError, match=r"trained multi_stage, a single network; train a supernet"):
        call(runs["multi_stage"], "--budget-macs", "1e8")
    with pytest.raises(ValueError, match="has one exit, where no image can stop early"):
        call(runs["vit_resnas_supernet"], "--budget-macs", "1e8", "--performance", "dynamic")
    call(run, "--budget-macs", MACS, "--initial", "1", "--iterations", "1")
    with pytest.raises(ValueError, match="belongs to another search: seed is 0 there and 1 here"):
        call(run, "--budget-macs", MACS, "--seed", "1", out="other")
    with pytest.raises(ValueError, match=r"holds what another search found \(budget is '1.4e\+07 MACs' there"):
        call(run, "--budget-macs", 2 * MACS, storage="other.journal")
    (tmp_path / "subnet.json").write_text('{"resolution": 0.3}')
    with pytest.raises(ValueError, match=r"resolution is 0.3; choose one of 0.5, 0.75, 1|is missing"):
        call(run, "--subnet", tmp_path / "subnet.json", out="named")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a network that was found; name another --out"):
        call(run, "--budget-macs", MACS, out="mine")
    with pytest.raises(
        ValueError, match=r"cost from \d\S* \(the smallest, every image leaving at the first exit\) to \d"
    ):
        call(run, "--budget-macs", 10, storage="cheap.journal", out="cheap")
    assert not (tmp_path / "cheap.journal").exists()
    with pytest.raises(ValueError, match=r"\(the largest\): give a budget between, or a smaller --lowest"):
        call(run, "--budget-macs", 1e12, storage="dear.journal", out="dear")
    with pytest.raises(ValueError, match="trained no network of a supernet"):
        call(run, "--trained", runs["multi_stage"], runs["multi_stage"])
