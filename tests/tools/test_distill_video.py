"""distill_video from a recipe to its page: a teacher trained once, the totals of the files, mistakes said."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tools.distill_video as tool
from tests.streams import FRAMES, TINY_STREAM, write_film
from tests.tiny import TINY

SMALL = ("trainer.max_epochs=1", "data.args.num_train=4", "data.args.num_val=1")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "street.yaml"
    path.write_text(TINY_STREAM)
    return path


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["distill_video", *map(str, words), "--no-progress"])
    return tool.main()


def test_a_recipe_becomes_totals_a_film_and_a_page(tmp_path, monkeypatch, capsys, recipe):
    given = ("--runs", tmp_path / "runs", "--json", tmp_path / "totals.json", "--overlay", tmp_path / "film.mp4")
    assert call(monkeypatch, recipe, *given) == 0
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "totals.json").read_text())
    scores, costs = figures["scores"], figures["stream"]
    assert scores == json.loads((tmp_path / "runs" / "street" / "scores.json").read_text())
    assert f"mIoU {scores['against_teacher']['miou']:6.2f}  student against teacher ({FRAMES} frames)" in printed
    assert f"mIoU {scores['against_truth']['miou']:6.2f}  student against ground truth" in printed
    assert f"{FRAMES} frames, the teacher on {scores['key_frames']} (" in printed
    assert f"by the cost model {costs['model']['seconds']:.2f} s" in printed
    assert f": {costs['times_cheaper']['macs']:.3g} times cheaper than the teacher on every frame" in printed
    page = (tmp_path / "runs" / "street" / "report.html").read_text()
    assert "Accuracy against the teacher" in page
    assert "scene cut at frame 22" in page
    assert (tmp_path / "film.mp4").stat().st_size > 0
    assert call(monkeypatch, recipe, "--runs", tmp_path / "runs") == 0
    assert "is finished" in capsys.readouterr().out


def test_a_teacher_is_trained_once_and_used_again(tmp_path, monkeypatch, capsys, recipe):
    (tmp_path / "shapes.yaml").write_text(TINY)
    monkeypatch.setenv("DANCE_SEG_CACHE", str(tmp_path / "cache"))
    text = TINY_STREAM.replace(
        "teacher: {name: oracle, args: {noise: 0.02, macs: 1000000000}}",
        f"teacher: {{name: train, args: {{recipe: {tmp_path / 'shapes.yaml'}, overrides: [{', '.join(SMALL)}]}}}}",
    )
    recipe.write_text(text)
    call(monkeypatch, recipe, "--runs", tmp_path / "runs", "--frames", 3)
    (teacher,) = (tmp_path / "runs" / "teachers").iterdir()
    metrics = (teacher / "metrics.jsonl").read_bytes()
    assert json.loads((teacher / "run.json").read_text())["finished"]
    call(monkeypatch, recipe, "--runs", tmp_path / "runs", "--frames", 2)
    assert (teacher / "metrics.jsonl").read_bytes() == metrics
    scores = json.loads((tmp_path / "runs" / "street" / "scores.json").read_text())
    assert scores["frames"] == 5
    assert scores["teacher_against_truth"]["miou"] > 0
    assert "GMACs  student" in capsys.readouterr().out


def held_by(process, metrics):
    """(frames done, bytes held) of a stream, ten times a second, until it ends."""
    seen, size = [], 0
    while process.poll() is None:
        if metrics.exists() and (now := metrics.stat().st_size) > size:
            size = now
            with metrics.open("rb") as file:
                file.seek(max(0, size - 10_000))
                lines = file.read().splitlines()  # the first and the last may be cut
            status = Path(f"/proc/{process.pid}/status").read_text()
            held = [1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
            seen += [(json.loads(line)["stream/frame"], *held) for line in lines[1:-1][-1:] if held]
        time.sleep(0.1)
    return seen


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_flat_over_ten_thousand_frames(tmp_path, recipe):
    words = ("data.args.num_frames=10000", "data.args.cuts=null", "data.args.scene_frames=500", "--no-progress")
    command = [sys.executable, "-m", "tools.distill_video", recipe, *words, "--runs", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        seen = held_by(process, tmp_path / "street" / "metrics.jsonl")
    assert process.returncode == 0
    early = max(held for frame, held in seen if 1000 <= frame < 3000)
    late = max(held for frame, held in seen if frame >= 8000)
    assert late - early < 8 << 20, (early, late)


def test_a_camera_stops_after_so_many_frames_and_shows_its_delay(tmp_path, monkeypatch, capsys, recipe):
    options = ("distillation.score_every_frame=false", "data.args.frames_per_second=100", "--frames", 4)
    call(monkeypatch, recipe, *options, "--real-time", "--queue", 2, "--runs", tmp_path)
    assert "frames were dropped, and the longest delay was" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--queue", 0), "--queue is 0; at least 1"),
        (("--policy", "wait"), "--policy is 'wait'; choose drop_oldest or drop_newest"),
        (("--frames", 0), "--frames is 0; at least 1"),
        (("distillation.method=hold",), "only online runs in real time"),
    ],
)
def test_what_cannot_be_is_refused_before_a_teacher_is_trained(tmp_path, monkeypatch, recipe, words, said):
    monkeypatch.setattr("dance_seg.teachers.build_teacher", lambda *_, **__: pytest.fail("a teacher was built"))
    with pytest.raises(ValueError, match=said):
        call(monkeypatch, recipe, *words, "--real-time", "--runs", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_totals_say_over_which_classes_and_what_came_in_the_way():
    scores = {
        "frames": 10, "frames_against_teacher": 10, "key_frames": 1, "teacher_fraction": 0.1, "updates": 2,
        "against_teacher": {"miou": 84.5, "miou_foreground": 80.0}, "passed_over": 2, "late": 3,
    }  # fmt: skip
    lines = tool.described({"scores": scores, "stream": {}})
    assert lines[0] == "mIoU  84.50  student against teacher (10 frames), over all classes; 80.00 over the foreground"
    assert lines[-2].startswith("key frames came 3 frames late")
    assert lines[-1].startswith("2 frames came again")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TINY, "no section distillation"),
        (TINY_STREAM.replace("teacher:", "# teacher:"), "there is no teacher"),
        (TINY_STREAM.replace("video_shapes", "shapes"), "choose one of video_shapes"),
        (TINY_STREAM.replace("distillation:", "# distillation:"), "a video, and there is no section distillation"),
        (f"{TINY}\nteacher: {{name: oracle}}\n", "no section distillation that would ask it"),
        (TINY_STREAM.replace("video_shapes", "video_shapez"), "choose one of video_camvid"),
        (TINY_STREAM.replace("oracle", "orakle"), "teacher.name is 'orakle'"),
        (TINY_STREAM.replace("noise: 0.02", "noise: 2"), "teacher.noise is 2"),
        (TINY_STREAM + "network_slimming: {}\n", "network_slimming has no place beside distillation"),
    ],
    ids=[
        "no distillation",
        "no teacher",
        "no video",
        "only a video",
        "only a teacher",
        "unknown video",
        "unknown teacher",
        "bad teacher",
        "slimming",
    ],
)
def test_a_recipe_that_cannot_be_followed_is_said(tmp_path, monkeypatch, recipe, text, said):
    recipe.write_text(text)
    with pytest.raises(ValueError, match=said):
        call(monkeypatch, recipe, "--runs", tmp_path)


def test_a_video_that_is_missing_or_none_and_a_teacher_of_other_classes_are_said(tmp_path, monkeypatch, recipe):
    film = tmp_path / "film.mp4"
    at = "data: {name: video_file, args: {path: " + str(film) + "}}"
    text = "\n".join([at, *TINY_STREAM.strip().splitlines()[1:]])
    recipe.write_text(text.replace("noise: 0.02", "noise: 0.02, classes: [road, car]"))
    with pytest.raises(ValueError, match=r"film.mp4"):
        call(monkeypatch, recipe, "--runs", tmp_path)
    film.write_bytes(b"no film")
    with pytest.raises(ValueError, match=r"film.mp4"):
        call(monkeypatch, recipe, "--runs", tmp_path)
    write_film(film, frames=4)
    recipe.write_text(text)  # nobody says which classes
    with pytest.raises(ValueError, match=r"teacher.args.classes is missing"):
        call(monkeypatch, recipe, "--runs", tmp_path)
