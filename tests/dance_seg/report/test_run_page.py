"""The report of a run: everything that is there, one line for what is not, one file that opens offline."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.report.page import Bars, Panels, render
from dance_seg.report.run_page import costs, plan, predictions, report, write_report
from dance_seg.report.runs import read_run
from tests.browser import screenshot
from tests.run_folders import SIZE, write_run


def text_of(path) -> str:
    """What a reader sees, without tags and styles."""
    html = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_a_finished_slimmed_run_is_shown_whole(tmp_path):
    path = write_report(write_run(tmp_path / "shapes_data_slimming", slimming=True, miou=61.6, gmacs_per_epoch=562))
    assert path == tmp_path / "shapes_data_slimming" / "report.html"
    text = text_of(path)
    for said in (
        "shapes · fpn / resnet18 · data slimming · 12 epochs · seed 0",
        "mIoU 61.60 points best checkpoint, epoch 12; last 61.60",
        "Training 6,744 GMACs",
        "Images dropped 144 10.0 % of 1,440 offered",
        "Parameters 13.1 M",
        "IoU of each class",
        "BatchNorm statistics 6.00 s",
        "validation (not training) 18.0 s",
        "scale 0.75 (160 × 192)",
        "q 0.4",
        "Simplest",
        "Most complex",
        "name: shapes_data_slimming",
        "A Processor @ 2 GHz, 2 cores",
        "torch 2.14.1",
        "c015dfa",
        "2 min 30 s",
    ):
        assert said in text
    assert "Not finished" not in text
    assert not list(path.parent.glob("*.tmp"))


def test_classes_are_ranked_by_their_iou(tmp_path):
    text = text_of(write_report(write_run(tmp_path / "run", classes=("low", "middle"), miou=50.0)))
    # The first class has 15 points more than mIoU, the next 7 more.
    assert "low 65.0 middle 57.0" in text


@pytest.mark.parametrize("missing", ["run.json", "metrics.jsonl", "cost.json", "plan.json", "pictures"])
def test_a_part_that_is_missing_is_left_out_with_a_line_that_says_so(tmp_path, missing):
    folder = write_run(tmp_path / "run", slimming=True)
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = text_of(write_report(folder))
    assert {
        "run.json": "run.json is missing.",
        "metrics.jsonl": "No validation yet.",
        "cost.json": "No cost yet: the ledger is written after each epoch.",
        "plan.json": "No plan yet: it is written when training starts.",
        "pictures": "No pictures yet: they are kept at each validation.",
    }[missing] in text


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    text = text_of(write_report(write_run(tmp_path / "run", epochs_done=0, pictures=False)))
    assert "Not finished: 0 of 12 epochs so far." in text
    assert "Not logged yet: Loss, mIoU, Learning rate." in text
    assert "No data slimming: every image is trained on at full resolution in every epoch." in text


def test_before_the_tail_the_last_validation_is_shown_as_such(tmp_path):
    text = text_of(write_report(write_run(tmp_path / "run", epochs_done=5)))
    assert "last validation, epoch 5" in text
    assert "none may choose the best checkpoint yet" in text


def test_what_files_say_is_never_markup(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    folder = write_run(
        tmp_path / f"{evil}",
        slimming=True,
        classes=(f"{evil}0", f"{evil}1"),
        circumstances={"commit": evil, "processor": evil, "versions": {evil: evil}},
        inference={"uncounted": [evil]},
        model__name=evil,
    )
    for kind in ("image", "label", "prediction"):
        (folder / "pictures" / f"0_scene_0000_{kind}.png").rename(folder / "pictures" / f"0_{evil}_{kind}.png")
    html = write_report(folder).read_text()
    assert evil not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") > 10


def test_the_plan_is_weighed_against_dense_epochs(tmp_path):
    folder = write_run(tmp_path / "run", slimming=True, epochs=2, pictures=False)
    record = json.loads((folder / "plan.json").read_text())
    for epoch in record["epochs"]:
        epoch["pixels"] = 30 * SIZE[0] * SIZE[1]  # of 120 images offered
    (folder / "plan.json").write_text(json.dumps(record))
    run = read_run(folder)
    assert run.plan is not None
    assert (run.plan.pixels, run.plan.dense_pixels) == (60 * SIZE[0] * SIZE[1], 240 * SIZE[0] * SIZE[1])
    (bars,) = [block for block in plan(run).blocks[1].blocks if isinstance(block, Bars)]
    assert [bar.share for bar in bars.bars] == [1.0, 0.25]
    assert bars.note.startswith("−75 %")


def test_overheads_are_part_of_the_cost_and_validation_is_not(tmp_path):
    run = read_run(write_run(tmp_path / "run", slimming=True, epochs=1, seconds_per_epoch=10, pictures=False))
    seconds = costs(run).blocks[0].blocks[0]
    # 9.1 s of steps, 0.4 of scoring, 0.5 of BatchNorm make 10 s; validation has no share in them.
    assert [(bar.name, bar.text) for bar in seconds.bars] == [
        ("training steps", "9.10 s · 91.0 %"),
        ("scoring complexity", "0.4 s · 4.0 %"),
        ("BatchNorm statistics", "0.5 s · 5.0 %"),
        ("validation (not training)", "1.50 s"),
    ]


def test_predictions_say_how_much_is_right(tmp_path):
    folder = write_run(tmp_path / "run")
    label = np.zeros(SIZE, np.uint8)
    label[:, :128] = 255
    prediction = np.zeros(SIZE, np.uint8)
    prediction[:48, 128:] = 1  # a quarter of the half that is scored
    for kind, ids in (("label", label), ("prediction", prediction)):
        picture = Image.frombytes("P", SIZE[::-1], ids.tobytes())
        picture.putpalette(bytes(768))
        picture.save(folder / "pictures" / f"0_scene_0000_{kind}.png")
    first = predictions(read_run(folder)).blocks[0]
    assert isinstance(first, Panels)
    assert first.note == "75.0 % of the scored pixels are right"


def test_a_damaged_picture_is_left_out_with_its_name(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "pictures" / "1_scene_0001_label.png").write_bytes(b"no picture")
    found = predictions(read_run(folder))
    assert "1_scene_0001_label.png: cannot be read as a picture" in found.note
    assert len([block for block in found.blocks if isinstance(block, Panels)]) == 2


def test_large_pictures_and_many_epochs_stay_below_5_mb(tmp_path):
    folder = write_run(tmp_path / "run", slimming=True, epochs=200, classes=tuple(f"class {i}" for i in range(150)))
    random = np.random.default_rng(0)
    for number in range(10):
        noise = random.integers(0, 256, (512, 1024, 3), np.uint8)  # nothing compresses less
        Image.fromarray(noise).save(folder / "pictures" / f"{number}_noise_image.png")
        for kind in ("label", "prediction"):
            picture = Image.frombytes("P", (1024, 512), (noise[..., 0] % 150).tobytes())
            picture.putpalette(bytes(768))
            picture.save(folder / "pictures" / f"{number}_noise_{kind}.png")
    assert write_report(folder).stat().st_size < 5_000_000


def test_a_damaged_run_is_an_error_and_the_old_report_stays(tmp_path):
    folder = write_run(tmp_path / "run")
    before = write_report(folder).read_text()
    (folder / "cost.json").write_text("{")
    with pytest.raises(DataError, match=r"cost.json: not valid JSON"):
        write_report(folder)
    assert (folder / "report.html").read_text() == before


def test_figures_of_wrong_types_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", slimming=True, pictures=False)
    (folder / "cost.json").write_text(
        json.dumps({"training": {"cost/train_gmacs": "much", "cost/pixels": None}, "inference": {"input_size": "big"}})
    )
    (folder / "run.json").write_text(json.dumps({"started": 5, "finished": True, "versions": [], "cores": None}))
    html = render(report(read_run(folder)))
    assert "much" not in html


def test_a_loss_that_was_not_finite_is_said(tmp_path):
    from dance_seg.metrics_file import MetricsFile

    folder = write_run(tmp_path / "run", pictures=False)
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.append(1000, {"train/loss": float("nan"), "epoch": 11})
    metrics.close()
    assert "The loss was not finite at step 1000" in text_of(write_report(folder))


def test_the_page_is_light_in_a_browser_without_a_complaint(tmp_path):
    shown = screenshot(write_report(write_run(tmp_path / "run", slimming=True)), tmp_path)
    assert len(np.unique(shown)) > 50  # not an empty page
    assert np.median(shown) > 200


def test_the_ways_to_execute_a_step_that_were_measured_are_shown_the_fastest_first(tmp_path):
    trials = [
        {"precision": "32-true", "channels_last": False, "compile": False, "milliseconds": 40.0},
        {"precision": "bf16-mixed", "channels_last": True, "compile": False, "milliseconds": 15.5},
        {"precision": "bf16-mixed", "channels_last": True, "compile": True, "milliseconds": None},
    ]
    text = text_of(write_report(write_run(tmp_path / "run", circumstances={"execution": trials}, pictures=False)))
    first = text.index("bf16-mixed, channels last 15.5")
    assert (
        first < text.index("32-true, channels first 40.0") < text.index("bf16-mixed, channels last, compiled not run")
    )


def test_a_report_of_400_images_and_200_epochs_shows_their_losses_and_stays_small(tmp_path):
    folder = write_run(tmp_path / "run", slimming=True, epochs=200, steps_per_epoch=50)
    record = json.loads((folder / "plan.json").read_text())
    names, random = [f"image {i}" for i in range(400)], np.random.default_rng(0)
    record["complexity"] |= {"names": names, "values": random.gamma(6, 0.01, 400).tolist()}
    (folder / "plan.json").write_text(json.dumps(record))
    losses = {"epoch": 199, "names": names, "losses": random.random(400).tolist()}
    (folder / "image_losses.json").write_text(json.dumps(losses))
    path = write_report(folder)
    assert path.read_text().count('class="dot') == 400
    assert path.stat().st_size < 1_000_000
    assert "of 400 images over epoch 200" in text_of(path)
