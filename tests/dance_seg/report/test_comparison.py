"""Runs side by side: the right figures, honest ratios, and what makes rows hard to compare said aloud."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from dance_seg.metrics_file import MetricsFile
from dance_seg.report.comparison import Comparison, Row, compare_runs, row_name
from dance_seg.report.comparison_page import comparison_page
from dance_seg.report.page import Chart, Panels, render
from dance_seg.report.runs import read_run
from tests.browser import screenshot
from tests.run_folders import write_run


def pair(tmp_path, **changes) -> list[Path]:
    """A dense run of 1200 GMACs and 120 s and a slimmed one of 600 GMACs and 90 s, 0.5 points lower."""
    dense = write_run(tmp_path / "dense", miou=60.0, gmacs_per_epoch=100, seconds_per_epoch=10)
    slimmed = {"miou": 59.5, "gmacs_per_epoch": 50, "seconds_per_epoch": 7.5, "slimming": True}
    return [dense, write_run(tmp_path / "slimmed", **{**slimmed, **changes})]


def figures(comparison: Comparison, row: int) -> dict:
    return comparison.as_record()["rows"][row]["figures"]


def test_scores_are_compared_by_difference_and_costs_by_ratio(tmp_path):
    comparison = compare_runs(pair(tmp_path))
    slimmed = figures(comparison, 1)
    assert slimmed["val/miou_best"]["mean"] == 59.5
    assert slimmed["val/miou_best"]["difference"] == -0.5
    assert slimmed["cost/train_gmacs"]["ratio"] == 0.5
    assert slimmed["cost/train_seconds"]["ratio"] == 0.75
    assert slimmed["cost/images_paid"]["ratio"] == 0.9
    assert slimmed["cost/images_dropped"] == {
        "mean": 144,
        "std": None,
        "values": [144],
        "ratio": None,
        "difference": 144,
        "interval": None,
    }
    assert slimmed["inference/gmacs"]["ratio"] == 1.0
    assert "inference/latency_p50_ms" not in slimmed


def test_latency_is_a_column_when_it_was_measured(tmp_path):
    fast = {"latency_ms": {"p50_ms": 5.0, "p90_ms": 6.0, "batch": 1, "threads": 2, "runs": 50}}
    slow = {"latency_ms": {"p50_ms": 20.0, "p90_ms": 21.0, "batch": 1, "threads": 2, "runs": 20}}
    folders = [
        write_run(tmp_path / "a", inference=slow),
        write_run(tmp_path / "b", inference=fast, seed=1, model__name="x"),
    ]
    comparison = compare_runs(folders)
    assert figures(comparison, 1)["inference/latency_p50_ms"]["ratio"] == 0.25
    assert not [note for note in comparison.notes if "latency" in note]


def test_latency_under_other_conditions_is_pointed_out(tmp_path):
    one, eight = ({"latency_ms": {"p50_ms": 5.0, "batch": batch}} for batch in (1, 8))
    folders = [
        write_run(tmp_path / "a", inference=one),
        write_run(tmp_path / "b", inference=eight, seed=1, model__name="x"),
    ]
    assert "Rows measured latency under different conditions: a: batch 1; b: batch 8." in compare_runs(folders).notes


def test_the_table_is_aligned_and_names_the_baseline(tmp_path):
    lines = compare_runs(pair(tmp_path)).as_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("Training cost"))
    head, _, dense, slimmed = lines[start : start + 4]
    # Figures end where their heading ends.
    assert (
        head.index("GMACs") + len("GMACs") == dense.index("1,200") + len("1,200") == slimmed.index("600") + len("600")
    )
    assert dense.startswith("dense, baseline ")
    assert "600  0.50x" in slimmed
    assert not [line for line in lines if line != line.rstrip()]


def test_markdown_holds_the_same_figures(tmp_path):
    markdown = compare_runs(pair(tmp_path)).as_markdown()
    assert "| slimmed | 59.50 @12 (−0.50) | 59.50 (−0.50) | 84.50 (−0.50) |" in markdown
    assert "| dense, baseline | 1,200 | 120 |" in markdown
    for table in re.split(r"\n\n", markdown)[:3]:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_record_is_json_that_every_reader_takes(tmp_path):
    json.dumps(compare_runs(pair(tmp_path)).as_record(), allow_nan=False)


def test_runs_that_differ_only_in_the_seed_are_one_row_with_its_spread(tmp_path):
    seeds = [write_run(tmp_path / f"camvid_seed{seed}", seed=seed, miou=60.0 + seed) for seed in range(3)]
    other = write_run(tmp_path / "other", optimizer__lr=0.1)
    comparison = compare_runs([*seeds, other])
    assert [row.label for row in comparison.rows] == ["camvid (3 seeds)", "other"]
    spread = figures(comparison, 0)["val/miou_best"]
    assert spread["values"] == [60, 61, 62]
    assert (spread["mean"], spread["std"]) == (61, 1)  # of a sample: sqrt((1 + 0 + 1) / 2)
    assert "61.00 ± 1.00" in comparison.as_text()
    assert "1,200 ± " not in comparison.as_text()  # what is counted is the same for every seed


def test_where_runs_are_kept_and_watched_does_not_divide_a_row(tmp_path):
    folders = [
        write_run(tmp_path / "a", seed=0, data__args__workers=0, tracking__wandb="offline", data__args__root="/one"),
        write_run(tmp_path / "b", seed=1, data__args__workers=4, tracking__wandb="online", data__args__root="/two"),
    ]
    comparison = compare_runs(folders)
    assert len(comparison.rows) == 1
    assert comparison.rows[0].name == "a"  # the names have nothing in common


@pytest.mark.parametrize("change", [{"model__name": "fast"}, {"trainer__max_epochs": 24}, {"slimming": True}])
def test_another_recipe_is_another_row(tmp_path, change):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, **change)]
    assert len(compare_runs(folders).rows) == 2


def test_other_hardware_is_another_row_a_note_and_no_ratio_of_seconds(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, circumstances={"accelerator": "A GPU"})]
    comparison = compare_runs(folders)
    assert (
        "Rows ran on different hardware, their seconds cannot be compared: a: A Processor @ 2 GHz, 2 cores; b: A GPU."
        in (comparison.notes)
    )
    assert figures(comparison, 1)["cost/train_seconds"]["ratio"] is None
    assert figures(comparison, 1)["cost/train_gmacs"]["ratio"] == 1.0


def test_an_accelerator_that_was_not_used_is_not_the_hardware(tmp_path):
    folders = [
        write_run(tmp_path / "a"),
        write_run(
            tmp_path / "b", circumstances={"accelerator": "A GPU"}, trainer__accelerator="cpu", optimizer__lr=0.1
        ),
    ]
    assert not [note for note in compare_runs(folders).notes if "hardware" in note]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainer__precision": "bf16-mixed"}, "different precision: a: 32-true; b: bf16-mixed"),
        ({"epochs": 24}, "different numbers of epochs: a: 12; b: 24"),
        ({"circumstances": {"commit": "abc", "processor": "P"}}, "different commits: a: c015dfa; b: abc"),
        ({"data__name": "camvid"}, "different data sets: a: shapes; b: camvid"),
        ({"data__args__hold_out": "0001TP"}, "scored on different data, their scores cannot be compared"),
        ({"data__args__root": "/b", "optimizer__lr": 1}, "different folders"),
        ({"inference": {"input_size": [64, 64]}, "optimizer__lr": 1}, "inference at different input sizes"),
        ({"inference": {"uncounted": ["aten::erf"]}, "optimizer__lr": 1}, "b: not counted in its GMACs: aten::erf"),
        ({"circumstances": {"versions": {"torch": "1"}}, "optimizer__lr": 1}, "different versions"),
        ({"circumstances": {"commit": "abc+"}, "optimizer__lr": 1}, "changes that are in no commit: b"),
    ],
)
def test_what_makes_rows_hard_to_compare_is_said(tmp_path, change, said):
    folders = [
        write_run(tmp_path / "a", data__args__root="/a"),
        write_run(tmp_path / "b", **{"data__args__root": "/a", **change}),
    ]
    assert any(said in note for note in compare_runs(folders).notes)


def test_rows_that_differ_only_in_the_method_get_no_such_note(tmp_path):
    assert compare_runs(pair(tmp_path)).notes == (
        "Each row is one seed; a difference of a point or two may be chance.",
    )


def test_scores_on_different_data_are_not_subtracted(tmp_path):
    comparison = compare_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", data__name="camvid")])
    assert figures(comparison, 1)["val/miou_best"]["difference"] is None
    assert not comparison.same_validation_data


def test_an_unfinished_run_is_marked_and_has_no_ratio_of_training(tmp_path):
    comparison = compare_runs(pair(tmp_path, epochs_done=5))
    assert "slimmed (unfinished: epoch 5 of 12)" in comparison.as_text()
    assert figures(comparison, 1)["cost/train_gmacs"]["mean"] == 250
    assert figures(comparison, 1)["cost/train_gmacs"]["ratio"] is None
    assert figures(comparison, 1)["inference/gmacs"]["ratio"] == 1.0
    assert "val/miou_best" not in figures(comparison, 1)  # no validation may choose before the tail
    assert any(note.startswith("Unfinished: slimmed;") for note in comparison.notes)


def test_an_unfinished_run_never_joins_the_seeds_of_a_finished_one(tmp_path):
    folders = [write_run(tmp_path / "a0"), write_run(tmp_path / "a1", seed=1, epochs_done=5)]
    assert len(compare_runs(folders).rows) == 2


def test_the_baseline_may_be_any_run_of_a_row_or_another(tmp_path):
    dense, slimmed = pair(tmp_path)
    assert compare_runs([dense, slimmed], baseline=slimmed).baseline == 1
    comparison = compare_runs([slimmed], baseline=dense)
    assert [row.name for row in comparison.rows] == ["dense", "slimmed"]
    assert figures(comparison, 1)["cost/train_gmacs"]["ratio"] == 0.5


def test_a_folder_given_twice_counts_once(tmp_path):
    dense, slimmed = pair(tmp_path)
    assert len(compare_runs([dense, slimmed, dense, tmp_path / "slimmed" / ".." / "dense"]).rows) == 2


def test_one_seed_twice_is_no_spread(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a_1", "a_2")]
    assert any("holds seed 0 more than once" in note for note in compare_runs(folders).notes)


def test_rows_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / "one" / "run"), write_run(tmp_path / "two" / "run", optimizer__lr=0.1)]
    assert [row.name for row in compare_runs(folders).rows] == [str(folder) for folder in folders]


def test_the_recipes_differences_are_listed(tmp_path):
    folders = [*pair(tmp_path), write_run(tmp_path / "other", optimizer__lr=0.1, optimizer__warm_up=0.2, seed=7)]
    assert compare_runs(folders).differences == (
        "slimmed: data_slimming off → on",
        "other: optimizer.lr 0.001 → 0.1, optimizer.warm_up off → 0.2",
    )


def test_unknown_folders_and_no_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such run"):
        compare_runs([write_run(tmp_path / "a"), tmp_path / "b"])
    with pytest.raises(ValueError, match="no run to compare"):
        compare_runs([])


def test_a_name_cannot_break_a_markdown_table(tmp_path):
    folders = [write_run(tmp_path / "a|b<script>"), write_run(tmp_path / "c", optimizer__lr=1)]
    markdown = compare_runs(folders).as_markdown()
    assert "a\\|b&lt;script&gt;" in markdown
    assert "<script>" not in markdown


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (["camvid_dense_seed0", "camvid_dense_seed1"], "camvid_dense"),
        (["run_s1", "run_s12"], "run"),
        (["a-0", "a-1"], "a"),
        (["a", "a"], "a"),
        (["x", "y"], "x"),
    ],
)
def test_the_name_of_a_row_is_what_its_runs_share(tmp_path, names, common):
    runs = tuple(read_run(write_run(tmp_path / str(i) / name, pictures=False)) for i, name in enumerate(names))
    assert row_name(runs) == common


def test_a_row_without_a_figure_shows_a_dash(tmp_path):
    folder = write_run(tmp_path / "b", optimizer__lr=0.1)
    (folder / "cost.json").unlink()
    comparison = compare_runs([write_run(tmp_path / "a"), folder])
    assert comparison.cell(comparison.rows[1], comparison.columns[3]) == ("–", "")
    comparison.as_text()
    render(comparison_page(comparison))


# Intervals and Pareto fronts ------------------------------------------------------------------------------------------


def seeds(tmp_path, name: str, mious: list[float], **changes) -> list[Path]:
    """Runs of one recipe with these mIoUs, one for each seed."""
    return [
        write_run(tmp_path / f"{name}_seed{seed}", seed=seed, miou=miou, pictures=False, **changes)
        for seed, miou in enumerate(mious)
    ]


def test_a_difference_has_an_interval_from_the_pairs_of_one_seed(tmp_path):
    folders = seeds(tmp_path, "a", [60.0, 62.0, 64.0]) + seeds(tmp_path, "b", [61.0, 63.5, 64.5], optimizer__lr=0.1)
    found = figures(compare_runs(folders), 1)["val/miou_best"]["interval"]
    # Differences 1, 1.5, 0.5: mean 1, standard deviation 0.5, and t with two degrees of freedom is 4.303.
    half = 4.303 * 0.5 / math.sqrt(3)
    assert found == {"low": pytest.approx(1 - half), "high": pytest.approx(1 + half), "pairs": 3}
    assert "+1.00 [−0.24, +2.24]" in compare_runs(folders).as_text()
    assert "(+1.00 [−0.24, +2.24])" in compare_runs(folders).as_markdown()


def test_a_ratio_of_measured_seconds_has_an_interval_and_a_counted_one_shows_none(tmp_path):
    folders = seeds(tmp_path, "a", [60.0, 61.0], seconds_per_epoch=10, gmacs_per_epoch=100)
    folders += [
        write_run(tmp_path / f"b_seed{s}", seed=s, pictures=False, optimizer__lr=0.1, gmacs_per_epoch=50,
                  seconds_per_epoch=(5, 6)[s]) for s in range(2)
    ]  # fmt: skip
    comparison = compare_runs(folders)
    seconds = figures(comparison, 1)["cost/train_seconds"]["interval"]
    assert seconds["pairs"] == 2
    # Ratios 0.5 and 0.6: the geometric mean lies in the middle of the interval's logarithms.
    assert math.sqrt(seconds["low"] * seconds["high"]) == pytest.approx(math.sqrt(0.5 * 0.6))
    gmacs = figures(comparison, 1)["cost/train_gmacs"]["interval"]
    assert (gmacs["low"], gmacs["high"]) == pytest.approx((0.5, 0.5))
    assert comparison.cell(comparison.rows[1], comparison.columns[3]) == ("600", "0.50x")
    assert any(note.startswith("Brackets: 95 % intervals of Student's t") for note in comparison.all_notes())


@pytest.mark.parametrize("other", [[61.0], [61.0, 62.0, 63.0]])
def test_rows_of_other_seeds_have_no_interval(tmp_path, other):
    folders = seeds(tmp_path, "a", [60.0, 61.0]) + seeds(tmp_path, "b", other, optimizer__lr=0.1)
    comparison = compare_runs(folders)
    assert figures(comparison, 1)["val/miou_best"]["interval"] is None
    assert not any("Student" in note for note in comparison.all_notes())


def test_one_run_in_a_row_never_has_an_interval(tmp_path):
    comparison = compare_runs(pair(tmp_path))
    assert not [figure for figure in figures(comparison, 1).values() if figure["interval"]]
    assert "[" not in comparison.as_text()


def test_a_seed_that_is_there_twice_pairs_with_nothing(tmp_path):
    folders = [
        write_run(tmp_path / f"{name}_{number}", seed=seed, pictures=False, optimizer__lr=lr)
        for name, lr in (("a", 0.1), ("b", 0.2))
        for number, seed in enumerate((0, 0, 1))
    ]
    assert figures(compare_runs(folders), 1)["val/miou_best"]["interval"] is None


def four_rows(tmp_path) -> Comparison:
    """Dense, cheap and worse, dearer than cheap and worse than both, and unfinished."""
    rows = {"dense": (60.0, 100), "cheap": (58.0, 40), "bad": (57.0, 70)}
    folders = [
        write_run(tmp_path / name, miou=miou, gmacs_per_epoch=gmacs, optimizer__lr=i, pictures=False)
        for i, (name, (miou, gmacs)) in enumerate(rows.items())
    ]
    half = {"epochs_done": 6, "optimizer__lr": 9, "trainer__choose_from": 0.0, "miou": 70.0, "gmacs_per_epoch": 10}
    return compare_runs([*folders, write_run(tmp_path / "half", **half, pictures=False)])


def test_the_pareto_front_is_told_and_who_is_dominated_by_whom(tmp_path):
    comparison = four_rows(tmp_path)
    fronts = comparison.as_record()["fronts"]
    assert list(fronts) == ["cost/train_gmacs"]  # the seconds and the inference of all are the same
    assert fronts["cost/train_gmacs"] == {
        "score": "val/miou_best",
        "front": ["cheap", "dense"],
        "dominated_by": {"dense": [], "cheap": [], "bad": ["cheap"]},
    }
    said = "mIoU best against training GMACs: cheap, dense; dominated: bad (by cheap)"
    assert f"* {said}\n" in comparison.as_text()
    assert f"- {said}\n" in comparison.as_markdown()


def test_the_front_is_drawn_and_what_it_dominates_is_hollow(tmp_path):
    chart = next(b for b in sections(four_rows(tmp_path))["Score against cost"].blocks if isinstance(b, Chart))
    assert chart.svg.count('class="front"') == 1
    assert chart.svg.count('class="hollow') == 1
    assert chart.note == "Dominated: bad (by cheap)."


def test_scores_on_different_data_have_no_front(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", data__name="camvid", gmacs_per_epoch=10)]
    assert compare_runs(folders).fronts() == []


def test_a_clock_on_other_hardware_is_on_no_front(tmp_path):
    folders = [write_run(tmp_path / "a", pictures=False)]
    folders += [
        write_run(
            tmp_path / name, seconds_per_epoch=seconds, optimizer__lr=seconds, pictures=False, circumstances=facts
        )
        for name, seconds, facts in (("b", 5, {}), ("c", 1, {"accelerator": "A GPU"}))
    ]
    (front,) = compare_runs(folders).fronts()
    assert (front.cost.key, set(front.points)) == ("cost/train_seconds", {"a", "b"})


@pytest.mark.parametrize(
    ("change", "respect", "said"),
    [
        ({"trainer__precision": "bf16-mixed"}, "precision", "different precision"),
        ({"trainer__channels_last": True}, "memory layout", "with and without trainer.channels_last"),
        ({"trainer__compile": True}, "compilation", "with and without trainer.compile"),
        ({"data__args__batch_size": 16}, "batch size", "different numbers of images for a step: a: 8; b: 16"),
        ({"trainer__accumulate": 2}, "batch size", "different numbers of images for a step: a: 8; b: 16"),
        ({"circumstances": {"commit": "abc"}}, "commit", "different commits"),
        ({"trainer__threads": 2}, "hardware", "different hardware"),
        ({"circumstances": {"accelerator": "A GPU"}, "optimizer__lr": 1}, "hardware", "different hardware"),
    ],
)
def test_rows_that_ran_differently_are_warned_of_first(tmp_path, change, respect, said):
    base = {"trainer__channels_last": False, "trainer__compile": False}
    folders = [write_run(tmp_path / "a", **base), write_run(tmp_path / "b", **{**base, "optimizer__lr": 5, **change})]
    comparison = compare_runs(folders)
    assert comparison.ran_differently == (respect,)
    assert comparison.as_record()["ran_differently"] == [respect]
    first, *others = comparison.all_notes()
    assert first == f"WARNING: rows ran differently ({respect}); part of a ratio may come from that."
    assert any(said in note for note in others)
    assert f"The rows ran differently ({respect})" in comparison_page(comparison).warning


def test_what_the_cost_tool_measured_of_a_batch_has_its_columns(tmp_path):
    one = {"batch": 1, "images_per_second": 20.0, "peak_memory": {"total_bytes": 200_000_000}}
    many = {"batch": 8, "images_per_second": 40.0}
    half = {**one, "images_per_second": 40.0, "peak_memory": {"total_bytes": 50_000_000}}
    folders = [
        write_run(tmp_path / "a", inference={"batches": [one, many]}, pictures=False),
        write_run(tmp_path / "b", inference={"batches": [half]}, optimizer__lr=1, pictures=False),
    ]
    comparison = compare_runs(folders)
    assert figures(comparison, 1)["inference/images_per_second"]["ratio"] == 2.0
    assert figures(comparison, 1)["inference/peak_memory_bytes"]["ratio"] == 0.25
    assert "200 MB" in comparison.as_text()


# The page -----------------------------------------------------------------------------------------------------------


def sections(comparison: Comparison) -> dict:
    return {section.title: section for section in comparison_page(comparison).sections}


def test_the_page_of_two_rows_says_first_what_was_saved(tmp_path):
    page = comparison_page(compare_runs(pair(tmp_path)))
    said = {card.label: f"{card.value} {card.note}" for card in page.cards}
    assert said["mIoU, best"] == "−0.50 60.00 → 59.50"
    assert said["Training GMACs"] == "−50 % 1,200 → 600"
    assert said["Training time"] == "−25 % 2 min 0 s → 90.0 s"
    assert said["Images dropped"] == "144 the baseline 0"


def test_every_row_predicts_the_same_images_side_by_side(tmp_path):
    section = sections(compare_runs(pair(tmp_path)))["The same images, predicted by each"]
    rows = [block for block in section.blocks if isinstance(block, Panels)]
    assert [row.title for row in rows] == ["scene_0000", "scene_0001", "scene_0002"]
    assert [panel.title for panel in rows[0].panels[:4]] == ["image", "dense", "slimmed", "label"]
    assert rows[0].columns == 3


def test_images_of_another_data_set_with_the_same_names_are_not_set_side_by_side(tmp_path):
    folders = pair(tmp_path)
    for number in range(3):
        label = folders[1] / "pictures" / f"{number}_scene_{number:04d}_label.png"
        label.write_bytes((folders[1] / "pictures" / f"{number}_scene_{number:04d}_prediction.png").read_bytes())
    section = sections(compare_runs(folders))["The same images, predicted by each"]
    assert section.blocks == ()
    assert section.note == "The runs have no validation picture in common."


def test_scores_are_drawn_against_epochs_and_against_what_had_been_spent(tmp_path):
    from dance_seg.report.comparison_page import score_against

    folder = write_run(tmp_path / "run", epochs=3, seconds_per_epoch=5, miou=60)
    run = read_run(folder)
    assert score_against(run, "")[0] == [1, 2, 3]
    assert score_against(run, "cost/train_seconds")[0] == [5, 10, 15]
    assert score_against(run, "cost/train_seconds")[1][-1] == 60


def test_a_validation_whose_cost_is_not_known_is_not_drawn_against_cost(tmp_path):
    from dance_seg.report.comparison_page import score_against

    folder = write_run(tmp_path / "run", epochs=3, epochs_done=2)
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.append(1000, {"val/miou": 70.0, "epoch": 2})
    metrics.close()
    assert score_against(read_run(folder), "cost/train_gmacs")[0] == [100, 200]


def test_a_cost_that_is_the_same_for_all_rows_is_no_trade(tmp_path):
    charts = sections(compare_runs(pair(tmp_path)))["Score against cost"].blocks
    titles = [block.title for block in charts if isinstance(block, Chart)]
    assert titles == ["Training cost: GMACs", "Training cost: seconds"]


def test_a_page_of_many_rows_and_seeds_can_be_drawn(tmp_path):
    folders = [write_run(tmp_path / f"lr{i}_seed{s}", seed=s, optimizer__lr=i) for i in range(10) for s in range(2)]
    folders += [
        write_run(tmp_path / "begun", epochs_done=0, pictures=False),
        write_run(tmp_path / "half", epochs_done=6),
    ]
    comparison = compare_runs(folders)
    html = render(comparison_page(comparison))
    assert len(comparison.rows) == 12
    assert len(html) < 5_000_000
    assert "half (unfinished: epoch 6 of 12)" in html


def test_a_page_of_one_run_that_has_nothing_can_be_drawn(tmp_path):
    html = render(comparison_page(compare_runs([write_run(tmp_path / "begun", epochs_done=0, pictures=False)])))
    for said in ("No run has pictures yet.", "No validation yet.", "No row has data slimming."):
        assert said in html


def test_names_on_the_page_are_text(tmp_path):
    folders = [write_run(tmp_path / "<script>alert(1)"), write_run(tmp_path / "b", optimizer__lr="<script>")]
    assert "<script" not in render(comparison_page(compare_runs(folders)))


def test_the_spread_of_one_run_is_unknown_not_zero(tmp_path):
    row = Row("a", (read_run(write_run(tmp_path / "a")),))
    assert row.figures["val/miou_best"].std is None
    assert math.isclose(row.figures["val/miou_best"].mean, 60.0)


def test_the_page_is_dark_in_a_browser_that_asks_for_it(tmp_path):
    page = tmp_path / "compare.html"
    page.write_text(render(comparison_page(compare_runs(pair(tmp_path)))))
    shown = screenshot(page, tmp_path, dark=True)
    assert len(np.unique(shown)) > 50
    assert np.median(shown) < 60
