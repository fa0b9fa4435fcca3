"""The benchmark of online distillation, on a stream of a few frames with a teacher of one convolution."""

import json
import sys
from pathlib import Path

import pytest
import torch

from dance_seg.distillation.teacher import NetworkTeacher
from dance_seg.teachers import build_student
from datamodules.video import build_source
from tests.streams import tiny_stream
from tools.bench import distill

FRAMES = 20


@pytest.fixture(scope="module")
def setting():
    recipe = tiny_stream(f"data.args.num_frames={FRAMES}", "data.args.cuts=[10]")
    source = build_source(recipe)
    torch.manual_seed(0)
    teacher = NetworkTeacher(torch.nn.Conv2d(3, 11, 1), source.classes, device="cpu")
    student, _, _ = build_student(recipe, source.classes)
    empty = distill.Setting(source, [], teacher, student, recipe.distillation, [], {}, recipe.seed)
    return distill.recorded(empty, source)


@pytest.fixture(scope="module")
def rows(setting):
    return distill.table(setting)


def test_every_method_follows_the_same_frames_and_the_teacher_agrees_with_itself(rows):
    assert list(rows) == list(distill.METHODS)
    assert rows["teacher on every frame"]["miou_vs_teacher"] == 100
    assert rows["teacher on every frame"]["times_cheaper_macs"] == 1
    assert all(row["miou_vs_truth_all"] is not None for row in rows.values())


def test_the_mask_is_held_between_the_key_frames_of_the_online_run(rows):
    online, hold = rows["online, geometric"], rows["last mask held"]
    assert hold["asked"] == online["asked"]
    assert hold["teacher_fraction"] == online["teacher_fraction"] == len(online["asked"]) / FRAMES
    # Held masks cost nothing but the teacher.
    assert hold["times_cheaper_macs"] == FRAMES / len(online["asked"])


def test_all_methods_begin_with_the_same_weights_and_leave_them_as_they_are(setting):
    before = [weight.clone() for weight in setting.student.parameters()]
    first = distill.followed_row(setting, setting.options)
    again = distill.followed_row(setting, setting.options)
    assert first["miou_vs_teacher"] == again["miou_vs_teacher"]
    assert all(torch.equal(a, b) for a, b in zip(before, setting.student.parameters(), strict=True))


def test_the_offline_student_and_all_others_are_compared_on_what_it_did_not_learn_from(rows):
    offline = rows["student trained offline"]
    assert offline["miou_vs_teacher"] == offline["miou_vs_teacher_rest"]
    assert all(row["miou_vs_teacher_rest"] is not None for row in rows.values())


def test_a_key_frame_of_eight_updates_is_measured_beside_its_parts(setting):
    found = distill.speed(setting, (64, 64), runs=1)
    assert set(found) == {"student_vs_teacher_ms", "key_frame_overhead"}
    assert all(value["median"] > 0 for value in found.values())


def test_the_table_has_a_line_for_each_method(rows):
    lines = distill.markdown("A stream", rows).splitlines()
    assert len(lines) == 4 + len(rows)
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_what_became_of_each_cut_stands_in_the_row_of_its_method(setting, rows):
    (found,) = rows["online, geometric"]["after_cuts"]
    assert found.cut == 10
    assert 0 <= found.accuracy_before < setting.options.threshold
    assert found.key_frames >= 1
    assert rows["frozen student"]["after_cuts"] == []  # it has no key frames


def test_recovery_from_a_cut_is_counted_to_the_next_one():
    """Below the threshold before each; back at once, at the third key frame, never, and a scene that nobody saw."""
    lessons = [(0, 0.1, 0.2), (10, 0.3, 0.8), (20, 0.4, 0.5), (24, 0.5, 0.6), (28, 0.6, 0.9), (33, 0.2, 0.7)]
    found = distill.after_cuts([10, 20, 30, 40], lessons, 0.8)
    assert found == [(10, 0.3, 1), (20, 0.4, 3), (30, 0.2, 2)]
    ratios = distill.at_cuts(found, 0.8)
    assert ratios["accuracy_before_over_threshold_at_cut"]["max"] == 0.5
    assert ratios["key_frames_to_recover"]["max"] == 3
    assert distill.after_cuts([], lessons, 0.8) == []
    assert distill.at_cuts([], 0.8) == {}


def test_the_benchmark_writes_its_ratios_and_its_table(setting, rows, tmp_path, monkeypatch, capsys):
    """With a teacher that is not trained, and the rows that are there already."""
    monkeypatch.setattr(distill, "prepared", lambda *given: setting)
    monkeypatch.setattr(distill, "table", lambda setting: dict(rows))
    (tmp_path / "recipes").symlink_to(Path(distill.__file__).parents[2] / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill", "--quick", "data.args.num_frames=20"])
    assert distill.main() == 0
    written = json.loads((tmp_path / "runs/bench/distill.json").read_text())
    assert written["ratios"].keys() == {
        "teacher_miou_vs_truth",
        "cost_ratio",
        "miou_vs_teacher",
        "cost_ratio_low_threshold",
        "miou_vs_teacher_low_threshold",
        "accuracy_before_over_threshold_at_cut",
        "key_frames_to_recover",
        "accuracy_before_over_threshold_at_cut_low_threshold",
        "key_frames_to_recover_low_threshold",
        "student_vs_teacher_ms",
        "key_frame_overhead",
        "stationary_teacher_fraction",
    }
    assert written["ratios"]["teacher_miou_vs_truth"]["median"] == rows["teacher on every frame"]["miou_vs_truth_all"]
    assert written["notes"].keys() > {*rows, "online, geometric, threshold 0.87", "quick"}
    assert (tmp_path / "runs/bench/distill.md").read_text().count("\n|") == 2 + len(rows) + 1
    assert "CamVid's clip is left out: data/camvid is no folder" in capsys.readouterr().out


def test_the_clip_is_measured_too_where_its_data_is(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(distill, "measure", lambda result, name, recipe, teacher, _: measured.append((result, recipe)))
    (tmp_path / "recipes").symlink_to(Path(distill.__file__).parents[2] / "recipes")
    (tmp_path / "data" / "camvid").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill", "--quick", "data.args.num_frames=20"])
    assert distill.main() == 0
    assert [(result, recipe.data.name) for result, recipe in measured] == [
        ("distill", "video_shapes"),
        ("distill-camvid", "video_camvid"),
    ]
    assert measured[1][1].data.args["root"] == "data/camvid"
