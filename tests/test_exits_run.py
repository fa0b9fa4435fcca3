"""A run of a network with exits: trained, calibrated, scored by its thresholds, continued in the middle of an epoch."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dance_seg.build import build_model, load_run, train
from dance_seg.calibration import (
    ExitsOfSplit,
    calibrate,
    calibrated_policy,
    curves,
    exits_of_split,
    fixed_exit,
    path_milliseconds,
    refuse_overlap,
    write_calibration,
)
from dance_seg.checkpoint import load_checkpoint, save_checkpoint
from dance_seg.early_exit.budget import at_thresholds
from dance_seg.early_exit.exits import ExitNetwork
from dance_seg.early_exit.paths import PathCosts, path_costs
from dance_seg.early_exit.policy import ExitPolicy
from dance_seg.errors import CheckpointError
from dance_seg.export import export_safetensors
from dance_seg.inference import Protocol, evaluate, predictions
from dance_seg.metrics import confusion_matrix, scores
from dance_seg.part import Part
from dance_seg.predict import load_predictor
from dance_seg.recipe import recipe_from_record
from dance_seg.tracking import read_metrics
from datamodules import build_datamodule
from tests.dance_seg.early_exit.test_budget import random_table
from tests.dance_seg.early_exit.toy import Toy
from tests.tiny import tiny
from tools.calibrate import some_of_each_exit, static_network, track
from tools.evaluate import exits_record

CUTS = (
    "network_slimming.start=0.2",
    "network_slimming.end=0.6",
    "network_slimming.cuts=1",
    "network_slimming.keep=0.7",
    "network_slimming.importance=taylor",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exits")
    recipe = tiny("data.args.num_val=6", "early_exit.weights=[0.5,1,1]", cache=folder / "cache")
    recipe = replace(recipe, model=Part("ranet", {"size": "tiny"}))
    datamodule = build_datamodule(recipe)
    return train(recipe, datamodule, folder / "run"), datamodule


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Milliseconds are not what these tests are about."""
    monkeypatch.setattr("dance_seg.calibration.path_milliseconds", partial(path_milliseconds, rounds=2))


@pytest.fixture
def network(trained):
    model, record, path = load_run(trained[0])
    assert isinstance(model, ExitNetwork)
    return model, record, path


def miou_of(found, num_classes):
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for one in found:
        matrix += confusion_matrix(one.prediction, one.label, num_classes)
    return scores(matrix).miou


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        Part("ranet", {"size": "tiny"}),
        Part("basisnet", {"arch": "fpn", "encoder_name": "resnet18", "bases": 2}),
    ],
    ids=["ranet", "basisnet"],
)
def test_it_trains_with_both_halves_and_every_exit_still_answers(model, tmp_path):
    recipe = replace(tiny(*CUTS, slim=True, cache=tmp_path / "cache"), model=model)
    datamodule = build_datamodule(recipe)
    folder = train(recipe, datamodule, tmp_path / "run")
    network, _, _ = load_run(folder, "last")
    cut = json.loads((folder / "widths.json").read_text())["cuts"][-1]
    assert 0.6 < cut["macs"] < 0.71  # as near to 0.7 as whole channels come
    whole = path_costs(build_model(recipe, num_classes=11), (64, 64))
    assert path_costs(network, (64, 64)).full == pytest.approx(cut["macs"] * whole.full, rel=0.01)
    calibration, _ = calibrate(network, datamodule, budget=0.8, split="val", policy=ExitPolicy(score="mean"))
    found = list(predictions(network, datamodule, "val", policy=calibration.policy))
    assert miou_of(found, 11) == pytest.approx(calibration.achieved["miou"], abs=1e-9)


def test_every_exit_is_scored_and_the_last_one_is_the_score(trained, network):
    folder, datamodule = trained
    last = [row for row in read_metrics(folder / "metrics.jsonl") if "val/miou" in row][-1]
    model = load_run(folder, "last")[0]
    for exit in range(2):
        found = list(predictions(model, datamodule, "val", policy=fixed_exit(3, exit)))
        assert miou_of(found, 11) == pytest.approx(last[f"val/miou/exit_{exit + 1}"], abs=1e-9)
        assert {one.exits for one in found} == {(exit,)}
    assert evaluate(model, datamodule, "val").miou == pytest.approx(last["val/miou"], abs=1e-9)
    assert {"train/loss/exit_1", "train/loss/exit_3"} <= set().union(*read_metrics(folder / "metrics.jsonl"))


def test_thresholds_meet_the_budget_and_score_what_the_table_said(trained, network):
    _, datamodule = trained
    model, _, _ = network
    # An untrained network is sure of nothing: the score that tells images apart most finely.
    calibration, _ = calibrate(model, datamodule, budget=0.7, split="val", policy=ExitPolicy(score="mean"))
    costs = path_costs(model, (64, 64))
    found = list(predictions(model, datamodule, "val", policy=calibration.policy))
    spent = [costs.total(one.exits[0], calibration.policy.asked) for one in found]
    assert np.mean(spent) == pytest.approx(calibration.achieved["macs"])
    assert np.mean(spent) <= 0.7 * costs.full * (1 + 1e-9)
    assert miou_of(found, 11) == pytest.approx(calibration.achieved["miou"], abs=1e-9)


def test_by_a_fitted_score_too_the_figures_are_those_of_running_it(trained, network):
    """Where lines were fitted to the images, the policy knows them better than others, for which the budget is."""
    _, datamodule = trained
    calibration, split = calibrate(network[0], datamodule, budget=0.7, split="val", policy=ExitPolicy(score="gain"))
    costs, achieved = path_costs(network[0], (64, 64)), calibration.achieved
    found = list(predictions(network[0], datamodule, "val", policy=calibration.policy))
    spent = [costs.total(one.exits[0], calibration.policy.asked) for one in found]
    assert np.mean(spent) == pytest.approx(achieved["macs"])
    assert achieved["macs_share"] == pytest.approx(achieved["macs"] / costs.full)
    assert miou_of(found, 11) == pytest.approx(achieved["miou"], abs=1e-9)
    assert achieved["expected"]["macs_share"] <= 0.7
    others = at_thresholds(split.table(costs), calibration.policy.thresholds)
    assert achieved["expected"]["miou"] == others.miou


@pytest.mark.parametrize("how", ["direct", "geometric"])
@pytest.mark.parametrize("unit", ["macs", "milliseconds"])
def test_a_budget_is_spent_to_97_percent_in_either_unit(network, monkeypatch, unit, how):
    table, model = random_table(images=200), network[0]
    found = ExitsOfSplit(tuple(map(str, range(200))), table.scores, table.matrices, (64, 64), ExitPolicy())
    monkeypatch.setattr("dance_seg.calibration.exits_of_split", lambda *_: [found])
    monkeypatch.setattr("dance_seg.calibration.path_milliseconds", lambda *_: PathCosts((1.0, 2.0, 4.0), (0.1,) * 3))
    datamodule = SimpleNamespace(resolution=1.0)
    calibration, _ = calibrate(model, datamodule, budget=0.6, split="val", unit=unit, how=how)
    assert 0.97 * 0.6 <= calibration.achieved[f"{unit}_share"] <= 0.6


def test_an_answer_comes_by_the_deadline(trained, network):
    folder, datamodule = trained
    image = datamodule.source("val").load(0).image
    by_exit = {
        exit: next(predictions(network[0], datamodule, "val", policy=fixed_exit(3, exit))).prediction for exit in (0, 2)
    }
    assert (load_predictor(folder, deadline_ms=0)(image) == by_exit[0]).all()
    assert (load_predictor(folder, deadline_ms=1e6)(image) == by_exit[2]).all()
    assert (by_exit[0] != by_exit[2]).any()
    with pytest.raises(ValueError, match="deadline_ms is -1"):
        load_predictor(folder, deadline_ms=-1)
    with pytest.raises(ValueError, match="networks that run by torch"):
        load_predictor("network.onnx", deadline_ms=5)


@pytest.mark.parametrize("score", ["entropy", "gain"])
def test_a_calibrated_checkpoint_keeps_its_thresholds_and_its_weights(trained, network, tmp_path, score):
    folder, datamodule = trained
    model, _, path = network
    calibration, _ = calibrate(model, datamodule, budget=0.6, split="val", policy=ExitPolicy(score=score))
    assert bool(calibration.policy.lines) == (score == "gain")
    copied = tmp_path / "calibrated.ckpt"
    save_checkpoint(load_checkpoint(path), copied)
    write_calibration(copied, calibration)
    again, record, _ = load_run(folder, str(copied))
    assert calibrated_policy(record, again, at="here") == calibration.policy
    before, after = load_checkpoint(path), load_checkpoint(copied)
    assert before["state_dict"].keys() == after["state_dict"].keys()
    assert all(torch.equal(before["state_dict"][name], after["state_dict"][name]) for name in before["state_dict"])


def test_a_budget_may_be_a_cost(trained, network):
    model, datamodule = network[0], trained[1]
    full, policy = path_costs(model, (64, 64)).full, ExitPolicy(score="mean")
    shares = {}
    for budget in (0.7 * full, 5 * full):
        calibration, _ = calibrate(model, datamodule, budget=budget, is_share=False, split="val", policy=policy)
        shares[budget] = calibration.budget
    assert list(shares.values()) == [pytest.approx(0.7), 1.0]


def test_nobody_scores_on_the_images_that_thresholds_were_chosen_on(trained, network):
    _, datamodule = trained
    model, record, _ = network
    calibration, _ = calibrate(model, datamodule, budget=1.0, split="val")
    record = {**record, "exits": calibration.as_record()}
    refuse_overlap(record, datamodule, "test")
    with pytest.raises(ValueError, match=r"6 images of val, such as .* were used to calibrate"):
        refuse_overlap(record, datamodule, "val")


def test_a_split_that_shapes_does_not_have_is_refused(trained):
    with pytest.raises(ValueError, match="shapes has no split 'held_out'; choose one of train, val, test"):
        trained[1].source("held_out")


def test_images_of_other_parts_may_have_the_same_names(trained, network, monkeypatch):
    _, datamodule = trained
    record = {**network[1], "exits": {"split": "val", "names": datamodule.source("test").names}}
    refuse_overlap(record, datamodule, "test")
    monkeypatch.setattr(datamodule, "parts", lambda split: frozenset({"val", split}))  # as of trainval
    with pytest.raises(ValueError, match="2 images of test"):
        refuse_overlap(record, datamodule, "test")


def test_smaller_images_cost_less_in_calibration_and_evaluation(trained, network, monkeypatch):
    _, datamodule = trained
    model = network[0]
    monkeypatch.setattr(datamodule, "adaptive", HalfOfEveryOther(datamodule.source("val").names))
    calibration, found = calibrate(model, datamodule, budget=0.6, split="val", policy=ExitPolicy(score="mean"))
    small = path_costs(model, (32, 32)).full / path_costs(model, (64, 64)).full
    assert found.prices == pytest.approx((1, small, 1, small, 1, small))
    full = path_costs(model, (64, 64))
    assert calibration.mean_price == pytest.approx((1 + small) / 2)
    for unit in ("macs", "milliseconds"):
        whole = calibration.achieved[unit] / calibration.achieved[f"{unit}_share"]
        assert calibration.mean_price * calibration.costs[unit].full == pytest.approx(whole)
    left = list(predictions(model, datamodule, "val", policy=calibration.policy))
    assert [one.seen for one in left] == [(64, 64), (32, 32)] * 3
    costs = [full.total(one.exits[0], calibration.policy.asked) * p for one, p in zip(left, found.prices, strict=True)]
    assert np.mean(costs) == pytest.approx(calibration.achieved["macs"])
    assert np.mean(costs) <= 0.6 * full.full * np.mean(found.prices)
    taken = [(one.seen, one.exits) for one in left]
    assert exits_record(model, taken, calibration.policy, None)["gmacs"] == pytest.approx(np.mean(costs) / 1e9)


def test_the_tracker_gets_curve_shares_thresholds_and_pictures(trained, network, monkeypatch):
    folder, datamodule = trained
    calibration, found = calibrate(network[0], datamodule, budget=0.7, split="val", policy=ExitPolicy(score="mean"))
    figures = calibration.as_record() | {"curves": curves(found, calibration.costs, "direct")}
    shown = some_of_each_exit(network[0], datamodule, calibration)
    logged, images = [], {}

    class Tracker:
        def log_metrics(self, metrics, step):
            logged.append(metrics)

        def log_images(self, key, own, masks, classes, step):
            images[key] = len(own)

        def finish(self):
            logged.append("finished")

    monkeypatch.setattr("dance_seg.build.tracker_of", lambda recipe, folder, tag: Tracker())
    track(None, folder, figures, shown, datamodule.classes)
    *points, chosen, last = logged
    assert last == "finished"
    assert sum("exits/macs/miou" in point for point in points) == len(figures["curves"]["macs"])
    assert chosen["exits/miou"] == calibration.achieved["miou"]
    assert [chosen[f"exits/leaving/exit_{exit}"] for exit in (1, 2, 3)] == calibration.achieved["exits"]
    assert (
        sum(images.values()) == len(shown) == sum(min(4, round(6 * share)) for share in calibration.achieved["exits"])
    )


class HalfOfEveryOther:
    """An adaptive resolution that halves every second image."""

    def __init__(self, names):
        self.names = list(names)

    def scale(self, image, name):
        return 0.5 if self.names.index(name) % 2 else 1.0


def test_a_budget_that_no_thresholds_meet_is_refused_with_the_limits(trained, network):
    model = network[0]
    least = path_costs(model, (64, 64)).cheapest / path_costs(model, (64, 64)).full
    for budget in (least - 0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match=f"costs {least:.3f} of it in MACs: give a share from"):
            calibrate(model, trained[1], budget=budget, split="val")


@pytest.mark.parametrize("damage", [5, {"policy": {}}, {}, {"policy": ExitPolicy(thresholds=(0.5,)).as_record()}])
def test_a_damaged_policy_is_refused(network, damage):
    model, record, path = network
    with pytest.raises(CheckpointError, match="its exit policy is damaged"):
        calibrated_policy({**record, "exits": damage}, model, at=str(path))


def test_exits_go_with_whole_images_alone(trained, network):
    with pytest.raises(ValueError, match="whole images seen once"):
        next(predictions(network[0], trained[1], "val", Protocol(flip=True), fixed_exit(3, 0)))
    with pytest.raises(ValueError, match="exit 4 does not exist; the network has 3"):
        fixed_exit(3, 3)


def test_tiles_stop_apart_and_a_tile_as_large_as_the_image_is_the_image(trained, network):
    _, datamodule = trained
    model = network[0]
    policy = ExitPolicy(score="mean", thresholds=(0.3, math.inf))
    whole = list(predictions(model, datamodule, "val", policy=policy))
    for one, other in zip(whole, predictions(model, datamodule, "val", policy=policy, tile=(64, 64)), strict=True):
        assert np.array_equal(one.prediction, other.prediction)
        assert one.exits == other.exits
    assert {len(one.exits) for one in predictions(model, datamodule, "val", policy=policy, tile=(32, 32))} == {4}
    with pytest.raises(ValueError, match="tiles stop by a policy"):
        next(predictions(model, datamodule, "val", tile=(32, 32)))


def test_predictions_of_a_file_stop_where_the_checkpoint_says(trained, network, tmp_path):
    folder, datamodule = trained
    model, record, path = network
    calibration, _ = calibrate(model, datamodule, budget=0.3, split="val", policy=ExitPolicy(score="mean"))
    assert 0 < calibration.achieved["exits"][0] < 1
    copied = tmp_path / "calibrated.ckpt"
    save_checkpoint(load_checkpoint(path), copied)
    write_calibration(copied, calibration)
    model, record, _ = load_run(folder, str(copied))
    exported = tmp_path / "network.safetensors"
    export_safetensors(model, exported, record=record)
    for file in (copied, exported):
        predictor = load_predictor(file)
        for index, one in enumerate(predictions(model, datamodule, "val", policy=calibration.policy)):
            assert np.array_equal(predictor(datamodule.source("val").load(index).image), one.prediction)


def test_the_table_counts_every_exit_of_every_image(trained, network):
    _, datamodule = trained
    (found,) = exits_of_split(network[0], datamodule, "val", ExitPolicy())
    assert found.names == tuple(datamodule.source("val").names)
    labelled = [(datamodule.source("val").load(index).label != 255).sum() for index in range(6)]
    assert (found.matrices.sum(axis=(2, 3)) == np.array(labelled)[:, None]).all()


def test_the_ways_of_a_network_are_timed_each():
    costs = path_milliseconds(Toy().eval(), (9, 12), ExitPolicy(), rounds=3)
    assert costs.unit == "milliseconds"
    assert len(costs.trunk) == len(costs.heads) == 3
    assert all(value >= 0 for value in (*costs.trunk, *costs.heads))
    assert costs.full > 0


def test_a_way_is_timed_with_the_scores_of_the_exits_it_asks(monkeypatch):
    asked, scored_by = [], ExitPolicy.scores

    def scores(self, coarse, size=None, exit=0):
        asked.append(exit)
        return scored_by(self, coarse, size, exit)

    monkeypatch.setattr(ExitPolicy, "scores", scores)
    path_milliseconds(Toy().eval(), (9, 12), ExitPolicy(), rounds=2)
    # Two ways end at exits that are asked, and two go on from them; at the last exit nobody asks.
    assert asked.count(0) == asked.count(1) > 0
    assert set(asked) == {0, 1}


def test_a_static_network_beside_is_seen_as_the_command_says(trained):
    folder, datamodule = trained
    found = static_network(folder, "val", ["data.args.num_val=2"])
    model, record, _ = load_run(folder)
    fewer = build_datamodule(recipe_from_record(record["recipe"], ["data.args.num_val=2"]))
    assert found["miou"] == pytest.approx(evaluate(model, fewer, "val").miou, abs=1e-9)
    assert found["miou"] != pytest.approx(evaluate(model, datamodule, "val").miou, abs=1e-9)
    assert found["macs"] == path_costs(model, (64, 64)).full


@pytest.mark.slow  # the commands of the README are run in any case
def test_the_tools_calibrate_evaluate_and_refuse(trained, tmp_path):
    folder, _ = trained

    def call(verb, *arguments):
        command = [sys.executable, "-m", f"tools.{verb}", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    figures = tmp_path / "figures.json"
    done = call("calibrate", "--budget", "0.7", "--json", str(figures), "--beside", str(folder))
    assert done.returncode == 0, done.stderr
    assert "calibrated on val: 6 images, score mean" in done.stdout  # too few for the score gain
    achieved = json.loads(figures.read_text())["achieved"]
    assert achieved["macs_share"] <= 0.7
    expected = achieved["expected"]
    said = f"6 other images are expected to spend {expected['macs_share']:.3f} +- "
    assert f"{said}{expected['macs_share_deviation']:.3f} of the macs" in done.stdout
    written = json.loads((folder / "calibration.json").read_text())
    assert written["curves"]["macs"]
    assert written["epochs"] == 3
    (beside,) = written["beside"]
    assert beside["miou"] == pytest.approx(written["achieved"]["miou_of_exits"][-1])
    assert beside["macs"] == written["costs"]["macs"]["trunk"][-1] + written["costs"]["macs"]["heads"][-1]
    assert beside["milliseconds"] > 0
    assert list((folder / "pictures").glob("exit_*.png"))
    done = call("evaluate", "--split", "test", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    assert "left at exit 1" in done.stdout
    assert sum(json.loads(figures.read_text())["exits"]["shares"]) == pytest.approx(1)
    done = call("evaluate")
    assert done.returncode == 2
    assert "were used to calibrate" in done.stderr
    done = call("evaluate", "--exit", "last")
    assert done.returncode == 0, done.stderr
