"""An offline run of Weights & Biases, read back, is the run: every metric, the recipe, what it came to."""

import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest

from dance_seg.build import train
from dance_seg.errors import DataError
from dance_seg.metrics_file import read_metrics
from dance_seg.report.comparison import compare_runs
from dance_seg.report.comparison_page import comparison_page
from dance_seg.report.offline_run import BLOCK, HEADER, _continued, _records, is_offline_run, read_offline_run
from dance_seg.report.page import render
from dance_seg.report.rows import essential
from dance_seg.report.runs import read_run
from datamodules import build_datamodule
from tests.run_folders import write_run
from tests.tiny import tiny
from tools.fuzz.run_readers import field, items


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A whole tiny run with an offline tracker; its run folder and the folder of its offline run."""
    import wandb

    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE")
        patch.setenv("NETRC", str(folder / "no.netrc"))
        options = ("trainer.max_epochs=2", "tracking.wandb=offline", "tracking.artifacts=true", "seed=3")
        recipe = tiny(*options, "name=tiny_seed3", slim=True, cache=folder / "cache")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(recipe, build_datamodule(recipe), folder / "run")
        wandb.teardown()  # what finishing has handed over is then written
    assert not [str(warning.message) for warning in caught if "Weights & Biases" in str(warning.message)]
    (offline,) = (folder / "run" / "wandb").glob("offline-run-*")
    return folder / "run", offline


def test_every_metric_is_found_with_its_step_and_value(tracked):
    folder, offline = tracked
    found = read_offline_run(offline)
    expected = read_metrics(folder / "metrics.jsonl")
    kept = {(row["step"], frozenset(row)): row for row in found.rows}
    assert len(expected) > 10
    for row in expected:
        metrics = {key: value for key, value in row.items() if key != "time"}
        assert kept[row["step"], frozenset(metrics)] == pytest.approx(metrics)


def test_scores_costs_and_recipe_are_those_of_the_run_folder(tracked):
    folder, offline = tracked
    ours, theirs = read_run(folder), read_offline_run(offline)
    assert theirs.finished
    assert theirs.name == "tiny_seed3"
    assert essential(theirs) == essential(ours)
    assert (theirs.best, theirs.last) == (ours.best, ours.last)
    assert list(theirs.last.iou) == list(ours.last.iou)  # classes in the order of their ids
    assert theirs.training.keys() == {key for key in ours.training if isinstance(ours.training[key], float | int)}
    assert theirs.training["cost/train_gmacs"] == pytest.approx(ours.training["cost/train_gmacs"])
    assert theirs.inference == ours.inference
    for fact in ("run_id", "commit", "processor", "cores", "accelerator", "versions", "classes"):
        assert theirs.circumstances[fact] == ours.circumstances[fact]


def test_an_offline_run_and_its_run_folder_are_one_run(tracked):
    folder, offline = tracked
    assert len(compare_runs([folder, offline]).rows) == 1
    assert len(compare_runs([offline, folder]).rows[0].runs) == 1


def test_offline_runs_and_run_folders_stand_side_by_side(tracked, tmp_path):
    _, offline = tracked
    shutil.copytree(offline, tmp_path / offline.name)  # alone, without its run folder
    other = write_run(tmp_path / "other")
    comparison = compare_runs([other, tmp_path / offline.name])
    assert [row.name for row in comparison.rows] == ["other", "tiny_seed3"]
    assert "val/miou_last" in comparison.rows[1].figures
    render(comparison_page(comparison))
    assert compare_runs([other, next((tmp_path / offline.name).glob("*.wandb"))]).rows[1].name == "tiny_seed3"


def test_the_checkpoints_are_kept_as_a_model(tracked):
    _, offline = tracked
    kept = next(offline.glob("*.wandb")).read_bytes()
    for word in (b"best.ckpt", b"last.ckpt", b"step-0000"):
        assert word in kept


def test_group_tags_and_the_highest_score_are_in_the_file(tracked):
    _, offline = tracked
    kept = next(offline.glob("*.wandb")).read_bytes()
    for word in (b"data_slimming", b"shapes", b"fpn", b"resnet18"):
        assert field(10, word) in kept  # a tag of the run's record
    assert field(6, b"tiny") in kept  # its group: the name without the seed
    summaries = [record for record in _records(next(offline.glob("*.wandb"))) if b'"max":' in record]
    assert summaries
    assert all(b"val/miou" in record for record in summaries)


# The file's format ----------------------------------------------------------------------------------------------------


def run_record(run_id: str, **config: Any) -> bytes:
    return field(17, field(1, run_id.encode()) + field(4, items(5, **config)[2:]))


def chunk(kind: int, body: bytes) -> bytes:
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + body), len(body), kind) + body


def write_file(folder: Path, *records: bytes, run_id: str = "abc") -> Path:
    """A .wandb file by the book of LevelDB's log: records divided where a block ends."""
    folder.mkdir(parents=True)
    data = HEADER
    for record in records:
        first = True
        while True:
            left = BLOCK - len(data) % BLOCK
            if left < 7:
                data, left = data + bytes(left), BLOCK
            body, record = record[: left - 7], record[left - 7 :]
            data += chunk((1 if first else 4) if not record else (2 if first else 3), body)
            first = False
            if not record:
                break
    path = folder / f"run-{run_id}.wandb"
    path.write_bytes(data)
    return path


def small(folder: Path, *steps: int, run_id: str = "abc", epochs: int = 2) -> Path:
    rows = [items(2, **{"trainer__global_step": step, "train__loss": step / 10, "epoch": 0}) for step in steps]
    return write_file(
        folder, run_record(run_id, name="a"), items(5, trainer={"max_epochs": epochs}), *rows, run_id=run_id
    )


def test_a_record_longer_than_blocks_is_read_whole(tmp_path):
    long = "x" * (3 * BLOCK)
    path = write_file(tmp_path / "o", *(items(5, **{f"key{i}": "y" * i}) for i in range(300)), items(5, text=long))
    recipe = read_offline_run(path).recipe
    assert recipe["text"] == long
    assert [len(recipe[f"key{i}"]) for i in range(300)] == list(range(300))


def test_records_that_end_anywhere_in_a_block_are_read(tmp_path):
    for room in range(16):  # of 0 to 15 bytes before the block ends
        name = f"{room:02}"
        filler = BLOCK - len(HEADER) - 7 - len(items(5, text="")) - room
        length = filler - 6  # two lengths take two more bytes each, and the quotes are counted above
        path = write_file(tmp_path / name, items(5, text="z" * length), items(2, loss=room))
        assert read_offline_run(path).rows == [{"step": 0, "loss": room}]


def test_what_a_killed_run_left_unfinished_is_left_out(tmp_path):
    path = small(tmp_path / "o", 1, 2, 3)
    whole = path.read_bytes()
    for cut in (1, 5, 12):
        path.write_bytes(whole[:-cut])
        assert [row["step"] for row in read_offline_run(path).rows] == [1, 2]
    path.write_bytes(whole + bytes(100))  # room that a file system had set aside
    assert [row["step"] for row in read_offline_run(path).rows] == [1, 2, 3]


def test_a_file_damaged_in_its_middle_is_an_error_that_names_it(tmp_path):
    path = small(tmp_path / "o", 1, 2, 3)
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"run-abc\.wandb: damaged at byte \d+; compare the run folder itself"):
        read_offline_run(path)


@pytest.mark.parametrize("data", [b"", b"no run", b":W&B\xe1\xbe\x07" + bytes(20), b"PK\x03\x04" * 10])
def test_a_file_of_another_format_is_refused(tmp_path, data):
    path = tmp_path / "run-abc.wandb"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"no \.wandb file of the known format .*wandb sync"):
        read_offline_run(path)


def test_a_record_that_is_no_message_is_refused(tmp_path):
    path = write_file(tmp_path / "o", b"\x12\xff\xff\xff\xff\x0f")
    with pytest.raises(DataError, match="not a run of Weights & Biases that can be read"):
        read_offline_run(path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds 0 files run-ID\.wandb"):
        read_offline_run(tmp_path)
    assert not is_offline_run(tmp_path)


def test_values_that_are_not_finite_are_null_and_named_as_in_the_metrics(tmp_path):
    path = write_file(tmp_path / "o", items(2, loss=float("nan"), other=1.5))
    assert read_offline_run(path).rows == [{"step": 0, "loss": None, "other": 1.5, "not_finite": {"loss": "nan"}}]


def test_a_resumed_run_is_one_run_and_what_it_did_again_counts_once(tmp_path):
    first = small(tmp_path / "offline-run-20260101_000000-abc", 0, 10, 20, 30).parent
    second = small(tmp_path / "offline-run-20260101_000100-abc", 20, 30, 40).parent
    comparison = compare_runs([second, first])
    (row,) = comparison.rows
    (run,) = row.runs
    assert [found["step"] for found in run.rows] == [0, 10, 20, 30, 40]


def test_rows_past_the_place_where_a_run_was_resumed_are_superseded():
    before = [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}, {"step": 3, "val": 9.0}, {"step": 5, "loss": 5.0}]
    after = [{"step": 3, "loss": 30.0}, {"step": 4, "loss": 40.0}]
    assert _continued(before, after) == [
        {"step": 1, "loss": 1.0},
        {"step": 3, "loss": 30.0},
        {"step": 3, "val": 9.0},
        {"step": 4, "loss": 40.0},
    ]


def test_a_run_that_has_not_come_to_its_last_epoch_is_unfinished(tmp_path):
    rows = [items(2, **{"trainer__global_step": e, "cost__train_gmacs": 5.0 * (e + 1), "epoch": e}) for e in range(3)]
    begun = write_file(tmp_path / "a", items(5, trainer={"max_epochs": 4}), *rows)
    whole = write_file(tmp_path / "b", items(5, trainer={"max_epochs": 3}), *rows)
    assert not read_offline_run(begun).finished
    assert read_offline_run(begun).epochs_done == 3
    assert read_offline_run(whole).finished
    assert read_offline_run(whole).training == {"cost/train_gmacs": 15.0}
