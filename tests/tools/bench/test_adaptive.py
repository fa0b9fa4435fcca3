"""The benchmark of adaptive inference, on a network whose costs can be counted by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dance_seg.calibration import ExitsOfSplit
from dance_seg.early_exit.budget import ExitTable, at_thresholds
from dance_seg.early_exit.paths import PathCosts, path_costs
from dance_seg.early_exit.policy import ExitPolicy, decide
from dance_seg.inference import predict_labels
from dance_seg.models.basisnet import BasisNet
from dance_seg.models.ranet import RANet
from dance_seg.recipe import load_recipe, recipe_record
from dance_seg.sample import Batch, Sample
from tests.dance_seg.early_exit.toy import CLASSES, Toy
from tools.bench import adaptive
from tools.bench.adaptive import Costs, Figures, Measured, Twin

SIZE = (12, 16)
NEVER = ExitPolicy(score="mean", thresholds=(math.inf, math.inf))


class FewImages:
    """The data of a split: images from flat to lively, labels of their brightness."""

    def __init__(self, count=12, size=SIZE, classes=CLASSES):
        random = np.random.default_rng(0)
        self.classes = tuple(str(number) for number in range(classes))
        self.samples = []
        for number in range(count):
            image = (128 + (10 * number) * random.standard_normal((*size, 3))).clip(0, 255).astype(np.uint8)
            self.samples.append(Sample(image, (image[..., 0] // 86 % classes).astype(np.uint8)))

    def evaluation_loader(self, split):
        for number, (image, label) in enumerate(self.samples):
            images = torch.from_numpy(image).permute(2, 0, 1)[None]
            yield Batch(images, torch.from_numpy(label)[None], torch.ones(1), (f"{split}_{number}",))

    def source(self, split):
        return Source(self.samples)


class Source(list):
    def load(self, index):
        return self[index]


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy(light=True).eval()


@pytest.fixture
def some_stay(toy):
    """Thresholds by which a third of the images leaves at each exit."""
    found = adaptive.by_policy(toy, FewImages(), "val", [ExitPolicy(score="mean")])[ExitPolicy(score="mean")]
    first = float(np.sort(found.scores[:, 0])[-4])
    rest = np.sort(found.scores[found.scores[:, 0] < first, 1])
    return ExitPolicy(score="mean", thresholds=(first, float(rest[-4])))


def split_of(scores, right):
    """Two classes, ten pixels of each an image; `right` of each exit: how many of each class are right."""
    matrices = np.array([[[[one, 10 - one], [10 - one, one]] for one in of_image] for of_image in right])
    return ExitsOfSplit(
        tuple(map(str, range(len(scores)))), np.float32(scores), matrices.astype(np.int32), SIZE, ExitPolicy()
    )


# Choosing and judging -------------------------------------------------------------------------------------------------


def test_the_score_that_knows_which_images_are_easy_is_chosen():
    right = [[10, 10], [10, 10], [2, 10], [2, 10]]
    blind = split_of([[0.1, 0], [0.2, 0], [0.8, 0], [0.9, 0]], right)
    knows = split_of([[0.9, 0], [0.8, 0], [0.2, 0], [0.1, 0]], right)
    costs = PathCosts((1.0, 3.0), (0.0, 0.0))
    weighted = ExitPolicy(score="entropy", boundary_weight=0.25)
    policy = adaptive.chosen({ExitPolicy(): blind, weighted: knows}, costs, budget=2.0)
    assert adaptive.unset(policy) == weighted
    assert at_thresholds(knows.table(costs), policy.thresholds).miou == 100
    assert at_thresholds(knows.table(costs), policy.thresholds).average_cost == 2.0


def test_random_exits_of_equal_cost_spend_on_the_last_exit_what_asking_had_cost():
    table = ExitTable(np.full((4, 2), 0.5, np.float32), np.ones((4, 2, 1, 1), int), PathCosts((1.0, 4.0), (1.0, 0.0)))
    # Half leave at the first exit: 0.5 * 2 + 0.5 * (4 + 1) = 3.5 when asked; at random 0.5 * 2 + 0.5 * 4 = 3.
    assert adaptive.shares_of_cost(table, [0.5, 0.5], 3.5) == [0.25, 0.75]
    assert adaptive.shares_of_cost(table, [0.5, 0.5], 3.0) == [0.5, 0.5]
    assert adaptive.shares_of_cost(table, [0.5, 0.5], 9.0) == [0.0, 1.0]
    assert adaptive.shares_of_cost(table, [0.0, 1.0], 9.0) == [0.0, 1.0]


def test_a_static_network_of_equal_time_is_the_best_mixture_of_twins():
    slow, middle, fast = Figures(60, 6, 6), Figures(30, 4, 4), Figures(40, 2, 2)
    mixed = adaptive.static_of_equal_milliseconds([slow, middle, fast], 4)
    assert mixed == Figures(50, 4, 4)  # half-way between fast and slow, although there is a twin of 4 ms
    assert adaptive.static_of_equal_milliseconds([slow, middle, fast], 3).miou == 45
    assert adaptive.static_of_equal_milliseconds([slow, middle, fast], 1) == fast  # none is as fast
    assert adaptive.static_of_equal_milliseconds([slow, middle, fast], 7).miou == 60
    assert adaptive.static_of_equal_milliseconds([Figures(50, 1, 1), slow._replace(miou=45)], 5).miou == 50


def test_every_score_is_tried_and_fitted_where_thresholds_are_chosen(toy):
    policies = adaptive.every_score()
    assert {(policy.score, policy.boundary_weight) for policy in policies} == {
        (score, weight) for score in ("confident", "mean", "entropy", "gain") for weight in (1.0, 0.25)
    }
    found = adaptive.by_policy(toy, FewImages(), "val", policies)
    assert [policy.score for policy in found if policy.lines] == ["gain", "gain"]
    again = adaptive.by_policy(toy, FewImages(), "test", list(found))
    assert again.keys() == found.keys()


def test_rank_correlation_is_that_of_spearman_and_none_where_all_are_alike():
    stats = pytest.importorskip("scipy.stats")
    exits, errors = np.array([0, 2, 1, 0, 2, 1]), np.array([0.1, 0.3, 0.3, 0.2, 0.05, 0.4])
    assert adaptive.spearman(exits, errors) == pytest.approx(stats.spearmanr(exits, errors).statistic, abs=5e-4)
    assert adaptive.spearman(np.zeros(6), errors) is None


def test_the_table_of_a_toy_has_every_line_and_its_figures(toy, monkeypatch):
    monkeypatch.setattr(adaptive, "BUDGET", 0.95)  # the first exit of the toy is most of it
    # Not the score gain, by which images of the calibration split have other scores than any others.
    monkeypatch.setattr(adaptive, "every_score", lambda: [ExitPolicy(score="mean"), ExitPolicy(score="entropy")])
    data, milliseconds = FewImages(), PathCosts((1.0, 2.0, 4.0), (0.1, 0.1, 0.1), "milliseconds")
    found, costs = adaptive.stopping(toy, data, milliseconds, "val", "test")
    assert costs.macs == path_costs(toy, SIZE)
    assert list(found.rows) == [
        "exit 1 alone",
        "exit 2 alone",
        "exit 3 alone",
        "adaptive, 0.95 of the MACs",
        "adaptive, 0.95 of the ms",
        "random exits, as many ms",
    ]
    assert [row.milliseconds for row in found.rows.values()][:3] == pytest.approx([1.1, 2.1, 4.1])
    assert found.rows["exit 3 alone"].gmacs * 1e9 == pytest.approx(costs.macs.full)
    within = found.rows["adaptive, 0.95 of the ms"]
    assert within.milliseconds <= 0.95 * 4.1  # on the images on which thresholds were chosen
    assert found.ratios["budget_error_calibration"] == found.ratios["budget_error_test"]  # the same images here
    assert found.ratios["miou_minus_random"] == [within.miou - found.rows["random exits, as many ms"].miou]
    assert sum(found.notes["leaving"]) == pytest.approx(1, abs=2e-3)
    mious = [row.miou for row in found.rows.values()]
    assert found.ratios["miou_exit_2_minus_exit_1"] == [mious[1] - mious[0]]
    spent = [point[0] for point in found.notes["curve"]]
    assert len(spent) == len(found.ratios["miou_minus_random_on_the_curve"]) == len(adaptive.SWEEP)
    assert spent == sorted(spent)
    assert 1.1 <= spent[0] < spent[-1] <= 4.1


# Time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_the_ways_that_are_timed_are_those_that_images_took(toy, some_stay, batch):
    images, size = adaptive.first_images(toy, FewImages(), "test", 12)
    groups = adaptive.in_batches(images, batch)
    exits = adaptive.exits_taken(toy, groups, size, some_stay)
    assert sorted(exits) == [0] * 4 + [1] * 4 + [2] * 4
    sides = adaptive.sides_of(toy, images, size, some_stay, batch, exits)
    assert sum(weight * len(call.args[1]) for weight, call in sides["paths"]) == pytest.approx(12)
    assert all(len(call.args[1]) == batch for _, call in sides["paths"])
    if batch == 1:
        labels = {exit: [call() for _, call in sides["paths"] if call.args[3] == exit] for exit in range(3)}
        for number, exit in enumerate(exits):
            own = decide(toy, images[number], size, some_stay).labels
            assert torch.equal(own, labels[exit][exits[:number].count(exit)])


def test_a_way_asks_the_heads_that_the_policy_asks_and_goes_no_further(toy):
    images, size = adaptive.first_images(toy, FewImages(), "test", 2)
    adaptive.along(toy, torch.cat(images), size, 1, (False, True, True))
    assert (toy.calls(), toy.head_calls()) == ([2, 2, 0], [0, 2, 0])
    adaptive.along(toy, torch.cat(images), size, 2, (True, False, True))
    assert (toy.calls(), toy.head_calls()) == ([4, 4, 2], [2, 2, 2])


def test_sides_take_turns_within_a_round_and_calls_count_by_their_weight(monkeypatch):
    monkeypatch.setattr(adaptive, "seconds", lambda call: call())
    order = []

    def call(name, value):
        return lambda: order.append(name) or value

    sides = {"a": [(1.0, call("a", 1.0))] * 4, "b": [(0.5, call("b", 3.0))] * 2}
    assert adaptive.in_turns(sides, rounds=2) == {"a": [4.0, 4.0], "b": [3.0, 3.0]}
    assert "".join(order) == "abaaba" * 3
    order.clear()
    adaptive.in_turns({"a": [(1.0, call("a", 1.0))], "b": [(1.0, call("b", 1.0))]}, rounds=2)
    assert "".join(order) == "baabba"


def test_limits_hold_for_a_sound_network(toy, some_stay):
    images, size = adaptive.first_images(toy, FewImages(), "test", 12)
    adaptive.check_limits(toy, adaptive.in_batches(images, 8), size, some_stay)


def test_a_network_whose_heads_run_unasked_is_found_out(toy, some_stay):
    images, size = adaptive.first_images(toy, FewImages(), "test", 12)
    groups, exits = adaptive.in_batches(images, 8), type(toy).exits
    toy.exits = lambda images, wanted=None: exits(toy, images, wanted and (True, *wanted[1:]))
    toy.coarse_logits = lambda images: list(exits(toy, images, (False, False, True)))[-1]
    with pytest.raises(AssertionError, match="other layers"):
        adaptive.check_limits(toy, groups, size, some_stay)


def test_a_network_that_says_something_else_when_it_may_stop_is_found_out(toy, some_stay):
    images, size = adaptive.first_images(toy, FewImages(), "test", 12)
    sound = toy.coarse_logits
    toy.coarse_logits = lambda images: sound(images)._replace(logits=sound(images).logits.flip(1))
    with pytest.raises(AssertionError, match="plain network's"):
        adaptive.check_limits(toy, adaptive.in_batches(images, 8), size, some_stay)


def test_speed_has_a_figure_for_each_round(toy, some_stay):
    costs = Costs(path_costs(toy, SIZE), PathCosts((1, 2, 4), (0, 0, 0)))
    found = adaptive.speeds(toy, FewImages(), "test", some_stay, costs, rounds=2)
    each = ("time_over_measured_path", "time_over_plain", "adaptive_ms", "plain_ms", "time_share_over_macs_share")
    assert {key: len(values) for key, values in found.items()} == {
        "infinite_threshold_over_plain": 4,
        **{f"{name}_batch_{batch}": 2 for batch in (1, 8) for name in each},
        **{f"executed_over_path_macs_batch_{batch}": 1 for batch in (1, 8)},
    }
    # The ways resize logits to full size, and labels are made without.
    assert 0.5 < found["executed_over_path_macs_batch_8"][0] <= 1


def test_a_basis_layer_is_measured_in_both_layouts():
    found = adaptive.grouped_synthesis(rounds=2, sizes=[(8, 4, 6)])
    keys = [f"{way}_synthesis_over_plain/8_at_4x6" for way in ("grouped", "auto")]
    keys += [f"{key}_channels_last" for key in keys]
    assert {key: len(values) for key, values in found.items()} == dict.fromkeys(keys, 2)


@torch.no_grad()
def test_an_ensemble_says_the_mean_of_its_members_probabilities():
    members = [torch.nn.Conv2d(3, CLASSES, 1) for _ in range(2)]
    images = torch.randn(2, 3, 4, 6)
    said = adaptive.mean_of(members)(images).softmax(1)
    assert torch.allclose(said, (members[0](images).softmax(1) + members[1](images).softmax(1)) / 2, atol=1e-6)


def test_an_ensemble_costs_as_much_as_its_members(toy):
    found = Measured({"exit 2 alone": Figures(50, 1, 4)}, {})
    members = [adaptive.way_to(Toy(light=True).eval(), 2) for _ in range(3)]
    adaptive.of_ensemble(found, (toy, FewImages()), members, 2.0, "test")
    row = found.rows["ensemble of 3 full twins"]
    assert row.milliseconds == 6
    assert row.gmacs == pytest.approx(3 * path_costs(toy, SIZE).full / 1e9, rel=0.5)
    assert found.ratios["parameters_over_ensemble"] == [pytest.approx(1 / 3)]
    assert found.ratios["miou_last_minus_ensemble"] == [50 - row.miou]


@torch.no_grad()
def test_the_way_to_an_exit_is_a_network_of_its_own(toy):
    images, size = adaptive.first_images(toy, FewImages(), "test", 2)
    way = adaptive.way_to(toy, 1)
    assert torch.equal(predict_labels(way, images[0], size), adaptive.along(toy, images[0], size, 1, (False,) * 3))
    assert toy.calls()[2] == toy.head_calls()[0] == 0
    assert way(images[0]).shape == (1, CLASSES, *SIZE)


@torch.no_grad()
def test_milliseconds_of_twins_are_on_the_scale_of_the_ways(toy, monkeypatch):
    data, twins = FewImages(), (Twin(0.5), Twin(exit=1))
    fixed = {"whole": [2.0, 2.0], twins[0].row: [1.0, 1.0], twins[1].row: [0.5, 0.5]}
    monkeypatch.setattr(adaptive, "interleave", lambda sides, rounds, warm_up, device: fixed)
    networks = {twins[0]: (toy, data), twins[1]: (adaptive.way_to(toy, 1), data)}
    costs, of_twins = adaptive.all_milliseconds((toy, data), networks, "test", rounds=2)
    assert of_twins == pytest.approx({twins[0]: costs.full / 2, twins[1]: costs.full / 4})


# Proofs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranet():
    torch.manual_seed(0)
    return RANet(CLASSES, size="tiny").eval()


@pytest.fixture(scope="module")
def basisnet():
    torch.manual_seed(0)
    return BasisNet(CLASSES, bases=3, preview_channels=8).eval()


def exits_chosen(model, images, size):
    """Thresholds at the median of each exit, so that half of the images go on."""
    thresholds = []
    for coarse in model.exits(torch.cat(images)):
        thresholds.append(float(ExitPolicy(score="entropy").scores(coarse).median()))
    return ExitPolicy(score="entropy", thresholds=tuple(thresholds[:-1]))


@pytest.mark.parametrize("name", ["ranet", "basisnet"])
@torch.no_grad()
def test_parts_run_for_those_that_are_still_there(name, request):
    model = request.getfixturevalue(name)
    images, size = adaptive.first_images(model, FewImages(size=(64, 64)), "test", 6)
    policy = exits_chosen(model, images, size)
    groups = adaptive.in_batches(images, 4)
    exits = adaptive.exits_taken(model, groups, size, policy)
    assert 0 < exits.count(0) < 6
    ran = adaptive.check_parts(model, groups, size, policy, exits)
    assert ran[:2] == [6, 6 - exits.count(0)]
    with pytest.raises(AssertionError, match="still there"):
        adaptive.check_parts(model, groups, size, policy, [0] * 6)


def test_fusion_blocks_see_zeros_while_asked_to(ranet):
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = [coarse.logits for coarse in ranet.exits(images)]
        with adaptive.coarse_features_zeroed(ranet):
            without = [coarse.logits for coarse in ranet.exits(images)]
        after = [coarse.logits for coarse in ranet.exits(images)]
    assert torch.equal(before[0], without[0])  # the coarsest sub-network has nothing coarser
    assert not torch.allclose(before[1], without[1])
    assert not torch.allclose(before[2], without[2])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_specialist_mixes_by_the_coefficients_given(basisnet):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        own, alphas = basisnet(images), basisnet.coefficients(images)
        with adaptive.coefficients_replaced(basisnet, lambda found: alphas):
            assert torch.equal(basisnet(images), own)
        with adaptive.coefficients_replaced(basisnet, lambda found: torch.full_like(found, 1 / 3)):
            uniform = basisnet(images)
        with adaptive.coefficients_replaced(
            basisnet, lambda found: torch.zeros_like(found).index_fill(2, torch.tensor(1), 1)
        ):
            second = basisnet(images)
        assert torch.equal(basisnet(images), own)
    assert not torch.allclose(uniform, second)


def test_the_use_of_bases_is_counted_by_hand():
    # One layer of two bases over two images: each leads once. The other layer: the first one always, alone.
    alphas = torch.tensor([[[0.75, 0.25], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]])
    figures, said = adaptive.use_of_bases(alphas)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert figures["entropy_of_alpha_over_limit"] == pytest.approx(entropy / 2 / math.log(2))
    assert figures["share_of_bases_leading_below_1_percent"] == 0.25
    assert said["images_led_by_each_basis"] == [0.75, 0.25]


def test_proofs_of_either_network_are_figures(ranet, basisnet):
    data = FewImages(count=3, size=(64, 64))
    drops, _ = adaptive.proofs(ranet, data, "test")
    assert list(drops) == [f"drop_without_coarse_features_exit_{exit}" for exit in (2, 3)]
    figures, said = adaptive.proofs(basisnet, data, "test")
    assert {"drop_with_shuffled_alpha", "drop_with_uniform_alpha", "entropy_of_alpha_over_limit"} <= set(figures)
    assert len(said["images_led_by_each_basis"]) == 3
    assert adaptive.proofs(Toy(), data, "test") == ({}, {})


# Recipes and report ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["shapes", "camvid"])
@pytest.mark.parametrize("model", ["ranet", "basisnet"])
def test_a_twin_is_trained_as_the_network_with_exits_is(tmp_path, data, model):
    record = recipe_record(load_recipe(f"recipes/{data}_{model}.yaml"))
    path = adaptive.write_twin(record, tmp_path / "twin.yaml")
    twin = recipe_record(load_recipe(path))
    same = record.keys() - {"model", "early_exit", "name"}
    assert {key: twin[key] for key in same} == {key: record[key] for key in same}
    assert twin["early_exit"] is None
    expected = {
        "ranet": {"name": "ranet", "args": {**record["model"]["args"], "exits": "last"}},
        "basisnet": {"name": "smp", "args": {"arch": "fpn", "encoder_name": "resnet18"}},
    }
    assert twin["model"] == expected[model]


def test_twins_are_trained_for_their_exit_or_at_their_resolution(tmp_path, monkeypatch):
    given, seeds = {}, {}

    def noted(row, recipe_path, seed, overrides, runs):
        given[row] = recipe_record(load_recipe(recipe_path, overrides))
        seeds[row] = [seed]
        return SimpleNamespace(folder=runs / row)

    monkeypatch.setattr(adaptive, "trained", noted)
    fetched = tmp_path / "weights.safetensors"
    monkeypatch.setattr(adaptive, "fetch", lambda path: fetched)
    setting = adaptive.setting_of(None, tmp_path, ["trainer.max_epochs=3"])
    folders = adaptive.trained_runs("ranet", 0, setting) | adaptive.trained_runs("basisnet", 0, setting)
    assert folders[Twin(exit=1)] == tmp_path / "ranet_twin_exit_2"
    assert given["ranet"]["early_exit"]["weights"] == [0.5, 0.5, 1.0]
    assert given["ranet_twin_exit_2"]["early_exit"]["weights"] == [0.0, 1.0, 1e-9]
    assert given["ranet_twin_exit_1"]["early_exit"]["weights"] == [1.0, 0.0, 1e-9]
    assert given["basisnet_twin_50"]["data"]["args"]["resolution"] == 0.5
    assert all(record["trainer"]["max_epochs"] == 3 for record in given.values())
    assert len(given) == 2 + 4 + 4 + 3
    on_camvid = adaptive.trained_runs("basisnet", 0, setting._replace(data="camvid"))
    assert not [twin for twin in on_camvid if twin is not None and twin.copy]  # an ensemble of drawn scenes only
    begun = given["basisnet"]["model"]["args"]
    assert begun["encoder_weights"] == begun["preview_weights"] == str(fetched)
    assert given["basisnet_twin_67"]["model"]["args"]["encoder_weights"] == str(fetched)
    assert "encoder_weights" not in given["ranet"]["model"]["args"]
    assert adaptive.pretrained(["model.args.encoder_name=resnet18"]) == []
    assert sorted(seeds["basisnet_twin_100_copy_2"]) == [2000]


def test_smaller_twins_see_as_much_of_the_image():
    assert adaptive.at_scale({"crop": [128, 192]}, 1.0) == ["data.args.resolution=1", "data.args.crop=[128,192]"]
    assert adaptive.at_scale({"crop": [192, 256], "resolution": 0.5334}, 0.6667) == [
        "data.args.resolution=0.3556",
        "data.args.crop=[128,192]",
    ]


def test_overrides_of_exits_stay_away_from_twins_and_counts_of_images_reach_the_measurement(tmp_path):
    given = ["model.args.size=small", "trainer.max_epochs=2", "early_exit.weights=[1,1,1]", "data.args.num_test=5"]
    setting = adaptive.setting_of(None, tmp_path, given)
    assert setting.with_exits == ["model.args.size=small", "early_exit.weights=[1,1,1]"]
    assert setting.common == ["tracking.wandb=disabled", "trainer.max_epochs=2", "data.args.num_test=5"]
    assert setting.measured_on == ["data.args.num_val=960", "data.args.num_test=640", "data.args.num_test=5"]
    camvid = adaptive.setting_of(tmp_path, tmp_path, [])
    assert (camvid.data, camvid.calibration, camvid.test) == ("camvid", "val", "held_out")
    with pytest.raises(ValueError, match="no such folder"):
        adaptive.setting_of(tmp_path / "nowhere", tmp_path, [])


def test_the_report_holds_spreads_over_rounds_and_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = Measured({"exit 1 alone": Figures(50, 1, 4)}, {"time": [1.0, 1.2]}, {"leaving": [1.0]})
    second = Measured({"exit 1 alone": Figures(52, 1, 4)}, {"time": [0.9, 1.1]}, {"leaving": [1.0]})
    setting = adaptive.setting_of(None, tmp_path, [])
    adaptive.report(
        setting, {"ranet": [first, second]}, {"auto_synthesis_over_plain/8_at_4x6": [2.0]}, {"ranet": ["a", "b"]}
    )
    written = json.loads((tmp_path / "runs/bench/adaptive.json").read_text())
    assert written["ratios"]["time/ranet"] == pytest.approx({"median": 1.05, "min": 0.9, "max": 1.2})
    assert written["ratios"]["auto_synthesis_over_plain/8_at_4x6"]["median"] == 2
    assert written["notes"]["ranet"]["runs"] == ["a", "b"]
    assert "| exit 1 alone | 51.00 | 50.00 to 52.00 | 1.000 | 4.0 |" in capsys.readouterr().out
