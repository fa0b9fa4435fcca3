"""What a run folder holds is read as it was meant, whole or not."""

import json
import shutil
from pathlib import Path

import pytest

from dance_seg.errors import DataError
from dance_seg.metrics_file import MetricsFile
from dance_seg.report.runs import flat, read_run
from tests.run_folders import CLASSES, write_run


def with_scores(folder: Path, scores: list[float | None], *, epochs: int = 10, **changes) -> Path:
    """A run with these mIoUs, one after each epoch."""
    write_run(folder, epochs=epochs, epochs_done=0, pictures=False, **changes)
    metrics = MetricsFile(folder / "metrics.jsonl")
    for epoch, miou in enumerate(scores):
        metrics.append(10 * epoch, {"val/miou": float("nan") if miou is None else miou, "epoch": epoch})
    metrics.close()
    return folder


def test_a_finished_run_is_read_whole(tmp_path):
    run = read_run(write_run(tmp_path / "one", slimming=True, seed=3, miou=60.0, gmacs_per_epoch=100))
    assert (run.name, run.seed, run.finished, run.max_epochs, run.epochs_done) == ("one", 3, True, 12, 12)
    assert run.training["cost/train_gmacs"] == 1200
    assert run.inference["parameters"] == 13_050_000
    assert run.last is not None
    assert (run.last.epoch, run.last.miou, run.last.pixel_accuracy) == (12, 60.0, 85.0)
    assert list(run.last.iou) == list(CLASSES)
    assert len(run.validations) == 12
    assert run.plan is not None
    assert len(run.plan.epochs) == 12
    assert run.plan.sizes == ((96, 128), (160, 192), (192, 256))
    assert (len(run.pictures), len(run.simplest), len(run.most_complex)) == (3, 4, 4)


def test_best_is_the_highest_score_of_those_that_may_choose_not_of_all(tmp_path):
    # choose_from 0.8 of 10 epochs: the validations after 8, 9 and 10 epochs may choose.
    scores: list[float | None] = [10, 20, 99, 40, 50, 60, 70, 71, 73, 72]
    run = read_run(with_scores(tmp_path / "run", scores))
    assert run.best is not None
    assert run.last is not None
    assert (run.best.miou, run.best.epoch) == (73, 9)
    assert (run.last.miou, run.last.epoch) == (72, 10)


def test_the_first_of_equal_scores_is_the_best_since_its_checkpoint_was_kept(tmp_path):
    run = read_run(with_scores(tmp_path / "run", [0, 0, 0, 0, 0, 0, 0, 70, 70, 70]))
    assert run.best is not None
    assert run.best.epoch == 9  # the eighth began before 0.8 of the epochs


def test_before_the_tail_there_is_no_best(tmp_path):
    run = read_run(with_scores(tmp_path / "run", [10, 20, 30, 40, 50, 60, 70]))
    assert run.best is None
    assert run.last is not None
    assert (run.last.miou, run.epochs_done) == (70, 7)


def test_a_score_that_is_no_number_is_no_validation(tmp_path):
    run = read_run(with_scores(tmp_path / "run", [10, None], epochs=2))
    assert [validation.miou for validation in run.validations] == [10]


def test_rows_superseded_by_a_resumed_run_do_not_count(tmp_path):
    folder = with_scores(tmp_path / "run", [10, 20, 30], epochs=3)
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.mark_resumed(5)
    metrics.append(10, {"val/miou": 25.0, "epoch": 1})
    metrics.close()
    assert [validation.miou for validation in read_run(folder).validations] == [10, 25]


def test_what_was_spent_is_known_after_each_epoch(tmp_path):
    run = read_run(write_run(tmp_path / "run", epochs=4, gmacs_per_epoch=7.0, pictures=False))
    assert {epoch: spent["cost/train_gmacs"] for epoch, spent in run.spent.items()} == {1: 7, 2: 14, 3: 21, 4: 28}


def test_a_training_curve_is_over_epochs_by_progress(tmp_path):
    run = read_run(write_run(tmp_path / "run", epochs=2, steps_per_epoch=10, pictures=False))
    epochs, values = run.curve("train/lr")
    assert epochs == [0.0, 0.5, 1.0, 1.5]
    assert values[0] == 1e-3


def test_charges_are_by_kind_with_the_steps_first_and_validation_last(tmp_path):
    run = read_run(write_run(tmp_path / "run", slimming=True, pictures=False, seconds_per_epoch=10))
    assert list(run.charges) == ["step", "forward", "backward", "scoring", "batch_norm", "validation"]
    assert run.charges["batch_norm"] == {"seconds": 6.0, "gmacs": 2.0}
    spent = [figures.get("seconds", 0.0) for kind, figures in run.charges.items() if kind != "validation"]
    assert sum(spent) == pytest.approx(run.training["cost/train_seconds"])


def test_a_recipe_alone_is_a_run_that_has_just_begun(tmp_path):
    folder = write_run(tmp_path / "run", pictures=False)
    for path in folder.iterdir():
        if path.name != "recipe.yaml":
            path.unlink()
    run = read_run(folder)
    assert (run.finished, run.epochs_done, run.validations, run.pictures, run.plan) == (False, 0, (), (), None)
    assert dict(run.training) == {}


def test_an_unknown_folder_is_refused_with_the_runs_beside_it(tmp_path):
    write_run(tmp_path / "camvid_dense", pictures=False)
    with pytest.raises(ValueError, match=r"camvid_dens: no such run; there are: .*camvid_dense"):
        read_run(tmp_path / "camvid_dens")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no run \(there is no recipe.yaml\)"):
        read_run(tmp_path / "empty")


@pytest.mark.parametrize("name", ["cost.json", "run.json", "plan.json"])
@pytest.mark.parametrize("text", ['{"training": ', "[1, 2]", "[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, name, text):
    folder = write_run(tmp_path / "run", pictures=False)
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=rf"^{folder / name}: "):
        read_run(folder)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: &x [1]\nb: *x\n", "a: [", "a: !!python/object:os.x {}\n"])
def test_a_recipe_that_is_none_is_named(tmp_path, text):
    folder = write_run(tmp_path / "run", pictures=False)
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(DataError, match=r"recipe.yaml: "):
        read_run(folder)


def test_bytes_that_are_no_text_are_named(tmp_path):
    folder = write_run(tmp_path / "run", pictures=False)
    (folder / "run.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"run.json: not a UTF-8 text"):
        read_run(folder)


def test_pictures_come_in_the_order_of_their_numbers_and_only_with_label_and_prediction(tmp_path):
    folder = write_run(tmp_path / "run")
    pictures = folder / "pictures"
    for kind in ("image", "label", "prediction"):
        shutil.copy(pictures / f"0_scene_0000_{kind}.png", pictures / f"10_a_b_image_{kind}.png")
    (pictures / "1_scene_0001_label.png").unlink()
    assert [(p.number, p.name) for p in read_run(folder).pictures] == [
        (0, "scene_0000"),
        (2, "scene_0002"),
        (10, "a_b_image"),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"scales": None},
        {"sizes": [[1, 2]]},
        {"epochs": [{"pixels": 3}]},
        {"epochs": 3},
        {"complexity": {"values": ["a"]}},
    ],
)
def test_a_plan_that_is_none_is_named(tmp_path, change):
    folder = write_run(tmp_path / "run", slimming=True, pictures=False)
    record = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(DataError, match=r"plan.json: .*move it away to go on without it"):
        read_run(folder)


def test_wrong_types_in_a_file_do_not_stop_the_reader(tmp_path):
    folder = write_run(tmp_path / "run", pictures=False)
    (folder / "cost.json").write_text(json.dumps({"training": [1], "inference": "fast"}))
    assert dict(read_run(folder).training) == {}


def test_a_list_is_one_value_of_a_flat_record():
    assert flat({"a": {"b": [1, {"c": 2}]}}) == {"a.b": [1, {"c": 2}]}
