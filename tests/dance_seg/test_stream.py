"""A stream in a run folder: what is written, what goes on after an interruption, what is refused."""

import json
import os
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import dance_seg.build
import dance_seg.distillation.scores
import dance_seg.stream
from dance_seg.build import build_model
from dance_seg.checkpoint import newest_valid, save_checkpoint
from dance_seg.distillation.learning import attempt, images_of
from dance_seg.distillation.online import Asked, Followed, TeacherError
from dance_seg.distillation.state import StreamState
from dance_seg.distillation.teacher import OracleTeacher, Teaching
from dance_seg.errors import DataError
from dance_seg.network_slimming.schedule import NetworkSlimming
from dance_seg.network_slimming.slim import slim
from dance_seg.network_slimming.structure import structure_record
from dance_seg.part import Part
from dance_seg.predict import load_predictor
from dance_seg.sample import Frame
from dance_seg.stream import follow_stream, known_by_now, seconds_alone
from dance_seg.stream_pictures import MOST_EVENTS, Film, SampleFrames
from dance_seg.teachers import build_student, build_teacher, palette_of, recipe_hash, teacher_recipe, trained
from datamodules.paced import paced
from datamodules.scenes import CLASSES
from datamodules.video import build_source
from tests.dance_seg.distillation import streams as squares
from tests.exported import SMALL, small_record
from tests.streams import FRAMES, rows_of, tiny_stream
from tests.tiny import tiny


def follow(recipe, folder, **given):
    return follow_stream(recipe, build_source(recipe), folder, progress=False, say=lambda line: None, **given)


def read(folder, name):
    return json.loads((folder / name).read_text())


def weights_of(folder):
    return newest_valid(folder / "checkpoints", "step-*.ckpt")[1]["state_dict"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run folder of the whole tiny stream, with its film."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    return follow(tiny_stream(), folder, overlay=folder.parent / "film.mp4")


def assert_same_run(one, other):
    assert rows_of(one) == rows_of(other)
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read(one, "scores.json") == read(other, "scores.json")
    pictures = [{p.name: p.read_bytes() for p in (run / "pictures").iterdir()} for run in (one, other)]
    assert pictures[0] == pictures[1]


def test_a_stream_leaves_a_row_for_each_frame_and_its_totals(undisturbed):
    rows, scores, costs = rows_of(undisturbed), read(undisturbed, "scores.json"), read(undisturbed, "cost.json")
    assert [row["step"] for row in rows] == list(range(FRAMES))
    assert scores["frames"] == scores["frames_against_teacher"] == scores["frames_against_truth"] == FRAMES
    assert scores["key_frames"] == sum(row["stream/key_frame"] for row in rows)
    assert scores["updates"] == sum(row["stream/updates"] for row in rows) > 0
    assert [row["step"] for row in rows if row["stream/cut"]] == [22]
    assert costs["stream"]["counts"] == {
        "student": FRAMES, "teacher": scores["key_frames"], "updates": scores["updates"],
    }  # fmt: skip
    assert costs["stream"]["gmacs"]["teacher_every_frame"] == FRAMES
    assert costs["inference"]["input_size"] == [64, 64]
    assert costs["stream"]["model"]["seconds"] > 0
    assert read(undisturbed, "run.json")["finished"]
    assert (undisturbed / "recipe.yaml").is_file()


def test_the_first_frame_and_the_cut_are_among_the_sample_frames(undisturbed):
    names = {path.name for path in (undisturbed / "pictures").iterdir()}
    for index in (0, 22):
        assert {f"{index:06d}_{kind}.png" for kind in ("image", "student", "teacher", "truth")} <= names


@pytest.mark.parametrize("at", [1, 23])
def test_a_stream_that_goes_on_ends_as_an_undisturbed_one(tmp_path, undisturbed, at):
    follow(tiny_stream(), tmp_path / "run", stop_after=at)
    assert "finished" not in read(tmp_path / "run", "run.json")
    assert len(rows_of(tmp_path / "run")) == at
    follow(tiny_stream(), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("forgotten", ["next_key_frame", "optimizer"])
def test_a_stream_that_goes_on_without_all_of_its_state_would_end_otherwise(
    tmp_path, undisturbed, monkeypatch, forgotten
):
    """The control: the state comes back but for when the teacher is asked next, or but for the momentum."""
    follow(tiny_stream(), tmp_path / "run", stop_after=23)
    restore = StreamState.restore

    def forgetful(self, record):
        known = {name: value for name, value in record.items() if name != forgotten}
        restore(self, {**self.record(), **known})

    monkeypatch.setattr(StreamState, "restore", forgetful)
    follow(tiny_stream(), tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", undisturbed)


def test_frames_past_the_newest_whole_checkpoint_are_followed_again(tmp_path, undisturbed):
    for stop in (9, 10):
        follow(tiny_stream(), tmp_path / "run", stop_after=stop)
    (tmp_path / "run" / "checkpoints" / "step-00000019.ckpt").write_bytes(b"killed while writing")
    with pytest.warns(UserWarning, match="damaged"):
        follow(tiny_stream(), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_signal_ends_it_after_the_frame_at_hand(tmp_path, undisturbed):
    recipe = tiny_stream()
    oracle = build_teacher(recipe, build_source(recipe))

    class Interrupted(OracleTeacher):
        def __call__(self, frame):
            if frame.index == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return oracle(frame)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        follow(recipe, tmp_path / "run", teacher=Interrupted(oracle.classes, macs=10**9))
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(rows_of(tmp_path / "run")) == 6
    follow(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_teacher_that_fails_stops_it_with_the_state_saved(tmp_path):
    recipe = tiny_stream("distillation.teacher_failure=stop", "distillation.score_every_frame=false")
    oracle = build_teacher(recipe, build_source(recipe))

    class Failing(OracleTeacher):
        def __call__(self, frame):
            if frame.index >= 8:
                raise RuntimeError("out of memory")
            return oracle(frame)

    with pytest.raises(TeacherError, match=r"out of memory.*state after \d+ frames is saved in"):
        follow(recipe, tmp_path / "run", teacher=Failing(oracle.classes, macs=10**9))
    stopped = len(rows_of(tmp_path / "run"))
    assert 8 <= stopped < FRAMES
    follow(recipe, tmp_path / "whole")
    follow(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_video_that_cannot_be_read_on_stops_it_with_the_state_saved(tmp_path):
    recipe, source = tiny_stream(), build_source(tiny_stream())
    whole = source.frames

    def frames(start=0):
        for frame in whole(start):
            if frame.index == 12:
                raise DataError("film.mp4: frame 12 cannot be decoded")
            yield frame

    source.frames = frames
    with pytest.raises(DataError, match=r"frame 12 cannot be decoded \(the state after 12 frames is saved"):
        follow_stream(recipe, source, tmp_path / "run", progress=False)
    assert newest_valid(tmp_path / "run" / "checkpoints")[1]["global_step"] == 12


SHORT = ("data.args.num_frames=6", "data.args.cuts=null", "distillation.score_every_frame=false")


def source_of(recipe, between):
    """The recipe's video, its frames drawn beforehand and handed on by the generator `between(frames)`."""
    source = build_source(recipe)
    drawn = list(source.frames())
    source.frames = lambda start=0: between(drawn[start:])
    return source


def test_a_stream_stopped_exactly_at_its_end_is_finished_by_the_next_call(tmp_path):
    recipe = tiny_stream(*SHORT)
    follow(recipe, tmp_path / "run", stop_after=6)
    assert "finished" not in read(tmp_path / "run", "run.json")
    follow(recipe, tmp_path / "run")
    costs = read(tmp_path / "run", "cost.json")
    assert read(tmp_path / "run", "run.json")["finished"]
    assert (costs["stream"]["model"]["seconds"] > 0, costs["inference"]["input_size"]) == (True, [64, 64])
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(6))


def test_a_camera_that_stands_still_stops_it_with_the_state_saved(tmp_path):
    recipe, again = tiny_stream(*SHORT), threading.Event()

    def stalling(frames):
        yield from frames[:3]
        again.wait(20)

    with pytest.raises(DataError, match=r"within 0.5 s after 3 frames \(the state after 3 frames is saved"):
        follow_stream(
            recipe,
            source_of(recipe, stalling),
            tmp_path / "run",
            pace=lambda frames: paced(frames, timeout=0.5),
            progress=False,
        )
    again.set()
    assert newest_valid(tmp_path / "run" / "checkpoints")[1]["global_step"] == 3


def test_a_source_that_fails_in_its_own_way_stops_it_with_the_state_saved(tmp_path):
    recipe = tiny_stream(*SHORT)

    def failing(frames):
        yield from frames[:3]
        raise OSError("the cable is out")

    with pytest.raises(DataError, match=r"OSError: the cable is out \(the state after 3 frames is saved"):
        follow_stream(recipe, source_of(recipe, failing), tmp_path / "run", progress=False)
    assert newest_valid(tmp_path / "run" / "checkpoints")[1]["global_step"] == 3


@pytest.mark.parametrize("real_time", [False, True])
def test_the_source_is_closed_whatever_goes_wrong(tmp_path, real_time):
    closed, method = [], "hold" if real_time else "online"
    recipe = tiny_stream(*SHORT, f"distillation.method={method}", "distillation.learning_rate=1e30")

    def noted(frames):
        try:
            yield from frames
        finally:
            closed.append(True)

    pace = paced if real_time else None
    with pytest.raises(ValueError, match="only online runs in real time" if real_time else "finite"):
        follow_stream(recipe, source_of(recipe, noted), tmp_path / "run", pace=pace, progress=False)
    assert closed == [True]
    assert "frames" not in {thread.name for thread in threading.enumerate()}


def test_a_film_that_cannot_be_put_in_its_place_keeps_nothing_else_open(tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setattr(dance_seg.stream, "guarded_wandb_logger", lambda folder, **options: tracker)
    monkeypatch.setattr(Film, "close", lambda self: Path("/nowhere/film.mp4").touch())
    with pytest.raises(OSError, match="nowhere"):
        follow(tiny_stream(*SHORT), tmp_path / "run", stop_after=1, overlay=tmp_path / "film.mp4")
    assert tracker.finished


class EveryOther:
    """A pace that drops every other frame, or all but every so many."""

    delay = 0.5

    def __init__(self, frames, longest_delay=0.5, every=2):
        self.frames, self.dropped, self.longest_delay, self.every = frames, 0, longest_delay, every

    def __iter__(self):
        for frame in self.frames:
            if frame.index % self.every:
                self.dropped += 1
            else:
                yield frame

    def close(self):
        pass


def test_what_was_dropped_late_and_left_out_before_an_interruption_still_counts(tmp_path):
    recipe, source = tiny_stream(*SHORT), build_source(tiny_stream(*SHORT))
    whole = source.frames

    def frames(start=0):
        source.problems = Counter(unreadable=2)
        return whole(start)

    source.frames = frames
    for stop, longest in ((2, 0.75), (None, 0.5)):
        pace = partial(EveryOther, longest_delay=longest)
        follow_stream(recipe, source, tmp_path / "run", pace=pace, stop_after=stop, progress=False)
    scores, rows = read(tmp_path / "run", "scores.json"), rows_of(tmp_path / "run")
    assert scores["problems"] == {"unreadable": 4}
    assert scores["real_time"] == {"dropped": 3, "longest_delay": 0.75}
    assert [(row["step"], row["stream/dropped"]) for row in rows] == [(0, 0), (2, 1), (4, 2)]


def test_rows_and_pictures_of_a_run_that_was_killed_before_its_first_checkpoint_are_given_up(tmp_path, monkeypatch):
    recipe = tiny_stream(*SHORT)
    with monkeypatch.context() as killed:
        killed.setattr(dance_seg.stream.StreamRunFiles, "save", lambda self: os.stat("/nowhere"))
        with pytest.raises(OSError, match="nowhere"):
            follow(recipe, tmp_path / "run", stop_after=4)
    assert len(rows_of(tmp_path / "run")) == 4
    (tmp_path / "run" / "pictures" / "000003_image.png").touch()
    follow(recipe, tmp_path / "run", pace=EveryOther)
    assert not (tmp_path / "run" / "pictures" / "000003_image.png").exists()
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 2, 4]


def test_leaving_out_what_was_followed_before_is_no_stalling(tmp_path):
    recipe = tiny_stream(*SHORT)

    def skipping(frames):
        if len(frames) < 6:
            time.sleep(1)
        yield from frames

    def call(stop):
        return follow_stream(
            recipe,
            source_of(recipe, skipping),
            tmp_path / "run",
            pace=lambda frames: paced(frames, timeout=0.6),
            stop_after=stop,
            progress=False,
        )

    call(2)
    call(None)
    assert read(tmp_path / "run", "run.json")["finished"]


def test_weights_that_are_no_numbers_are_not_saved_over_good_ones(tmp_path):
    recipe = tiny_stream("distillation.learning_rate=1e30", "trainer.save_every_minutes=1000")
    with pytest.raises(ValueError, match=r"finite"):
        follow(recipe, tmp_path / "run")
    assert newest_valid(tmp_path / "run" / "checkpoints") is None


def test_a_finished_stream_is_not_followed_again(undisturbed):
    said = []
    before = (undisturbed / "metrics.jsonl").read_bytes()
    recipe = tiny_stream()
    follow_stream(recipe, build_source(recipe), undisturbed, progress=False, say=said.append)
    assert "is finished; give another name=" in said[0]
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_a_run_of_another_recipe_is_refused(undisturbed):
    with pytest.raises(ValueError, match=r"another recipe .*distillation.threshold: 0.5 / 0.6"):
        follow(tiny_stream("distillation.threshold=0.6"), undisturbed)


def test_classes_of_teacher_and_video_that_differ_are_refused(tmp_path):
    recipe = tiny_stream()
    with pytest.raises(ValueError, match="the teacher alone has Bus"):
        follow(recipe, tmp_path / "run", teacher=OracleTeacher(("Bus", "Road")))
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_distillation_follows_nothing(tmp_path):
    with pytest.raises(ValueError, match="no section distillation"):
        follow_stream(tiny(), build_source(tiny_stream()), tmp_path / "run")


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (Part("orakel"), "teacher.name is 'orakel'; choose one of"),
        (Part("oracle", {"nois": 1}), "did you mean 'noise'"),
        (Part("train", {"recipe": "recipes/shapes_dense.yaml"}), "nothing here can build its data"),
        (Part("checkpoint", {"run": "runs/no_such_run"}), "no such run"),
        (Part("recorded", {"folder": "/nowhere"}), "/nowhere"),
    ],
    ids=lambda value: value.name if isinstance(value, Part) else "",
)
def test_a_teacher_that_cannot_be_had_is_said(teacher, said):
    recipe = tiny_stream(teacher=teacher)
    with pytest.raises(ValueError, match=said):
        build_teacher(recipe, build_source(recipe))


def test_a_video_without_ground_truth_takes_the_classes_and_colours_of_its_teacher(undisturbed):
    class Film:
        name, label_table, frames_per_second, num_frames, classes, palette = "film", None, 25.0, None, (), ()

    recipe = tiny_stream(teacher=Part("oracle", {"classes": ["road", "car"]}))
    teacher = build_teacher(recipe, Film())
    assert teacher.classes == ("road", "car")
    assert len(set(palette_of(Film(), teacher))) == 2
    recipe = tiny_stream(teacher=Part("checkpoint", {"run": str(undisturbed)}))
    teacher = build_teacher(recipe, Film())
    drawn = build_source(tiny_stream())
    assert (teacher.classes, palette_of(Film(), teacher)) == (drawn.classes, drawn.palette)


def test_what_was_followed_can_be_predicted_with_and_be_a_student_again(undisturbed):
    predictor = load_predictor(undisturbed)
    frame = next(build_source(tiny_stream()).frames(FRAMES - 1))
    labels = predictor(frame.image)
    assert labels.shape == (64, 64)
    recipe = tiny_stream(model=Part("checkpoint", {"run": str(undisturbed)}))
    classes = build_source(recipe).classes
    student, rebuilt, structure = build_student(recipe, classes)
    assert all(
        torch.equal(student.state_dict()[k.removeprefix("model.")], v) for k, v in weights_of(undisturbed).items()
    )
    assert (rebuilt.model.name, structure) == ("jitnet", None)
    warm, _, _ = build_student(tiny_stream(f"distillation.warm_start={undisturbed}"), classes)
    assert torch.equal(warm.stem[0][0].weight, student.stem[0][0].weight)


def test_a_student_of_other_classes_is_refused_by_their_names(undisturbed):
    """As many in another order too; a start of more classes gives all but its last layer."""
    classes = build_source(tiny_stream()).classes
    checkpoint = tiny_stream(model=Part("checkpoint", {"run": str(undisturbed)}))
    warm = tiny_stream(f"distillation.warm_start={undisturbed}")
    with pytest.raises(ValueError, match=r"^model\.args\.run .*undisturbed.* the same classes in another order"):
        build_student(checkpoint, classes[::-1])
    with pytest.raises(ValueError, match=r"^model\.args\.run .* the student alone has"):
        build_student(checkpoint, classes[:5])
    with pytest.raises(
        ValueError, match=r"^distillation\.warm_start .*undisturbed.* the same classes in another order"
    ):
        build_student(warm, classes[::-1])
    assert build_student(warm, classes[:5])[0].num_classes == 5


def slimmed_run(folder):
    """The checkpoint of a network that was cut to about half, of no training."""
    model = build_model(tiny(*SMALL), len(CLASSES))
    slim(model, NetworkSlimming(keep=0.5, importance="magnitude"), input_size=(64, 64))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    record = {"dance_seg": small_record(), "structure": structure_record(model), "state_dict": state}
    save_checkpoint(record, folder / "checkpoints" / "best.ckpt")
    return folder


@pytest.mark.parametrize("kind", [pytest.param("smp", marks=pytest.mark.slow), "slimmed"])
def test_any_network_can_be_the_student_go_on_and_be_loaded_again(tmp_path, kind):
    slimmed = kind == "slimmed"
    model = Part("checkpoint", {"run": str(slimmed_run(tmp_path / "other"))}) if slimmed else tiny(*SMALL).model
    recipe = tiny_stream("data.args.num_frames=6", "data.args.cuts=[]", "distillation.learning_rate=0.001", model=model)
    first = build_student(recipe, CLASSES)[0].state_dict()
    follow(recipe, tmp_path / "whole")
    follow(recipe, tmp_path / "run", stop_after=3)
    follow(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")

    learnt = {name.removeprefix("model."): tensor for name, tensor in weights_of(tmp_path / "run").items()}
    assert {name: tensor.shape for name, tensor in learnt.items()} == {n: tensor.shape for n, tensor in first.items()}
    assert any(not torch.equal(learnt[name], first[name]) for name in first)
    again, rebuilt, structure = build_student(
        tiny_stream(model=Part("checkpoint", {"run": str(tmp_path / "run")})), CLASSES
    )
    assert all(torch.equal(tensor, learnt[name]) for name, tensor in again.state_dict().items())
    assert (rebuilt.model.name, structure is not None) == ("smp", slimmed)
    assert load_predictor(tmp_path / "run")(np.zeros((64, 64, 3), np.uint8)).shape == (64, 64)


def test_a_film_shows_every_frame_and_one_of_a_run_that_goes_on_is_another(tmp_path, undisturbed):
    film = cv2.VideoCapture(str(undisturbed.parent / "film.mp4"))
    assert int(film.get(cv2.CAP_PROP_FRAME_COUNT)) == FRAMES
    assert film.get(cv2.CAP_PROP_FPS) == 25
    follow(tiny_stream(), tmp_path / "run", stop_after=24, overlay=tmp_path / "film.mp4")
    follow(tiny_stream(), tmp_path / "run", overlay=tmp_path / "film.mp4")
    rest = cv2.VideoCapture(str(tmp_path / "film_from_000024.mp4"))
    assert int(rest.get(cv2.CAP_PROP_FRAME_COUNT)) == FRAMES - 24
    assert sorted(path.suffix for path in tmp_path.glob("*.mp4")) == [".mp4", ".mp4"]


def test_baselines_run_in_the_same_runner(tmp_path):
    found = {}
    for method in ("teacher", "frozen", "hold", "offline"):
        follow(tiny_stream(f"distillation.method={method}"), tmp_path / method)
        found[method] = read(tmp_path / method, "scores.json")
    assert found["teacher"]["against_teacher"]["miou"] == 100
    assert found["frozen"]["key_frames"] == found["frozen"]["updates"] == found["hold"]["updates"] == 0
    assert found["hold"]["key_frames"] > 0
    assert found["offline"]["frames_against_teacher"] == FRAMES - round(0.2 * FRAMES)


@pytest.mark.parametrize(
    ("labels", "learning_rate", "measured"),
    [
        ("truth", 0.002, {"student", "teacher", "updates"}),
        ("truth", 1e30, {"student", "teacher"}),  # the weights diverge
        ("own", 0.002, {"student", "teacher"}),  # nothing to learn
        ("none", 0.002, {"student"}),
        ("no class", 0.002, {"student"}),
    ],
)
def test_what_the_last_frame_cannot_tell_of_the_costs_is_left_out(labels, learning_rate, measured):
    frame = squares.frame_at(0)
    state = StreamState.start(squares.student(), squares.CLASSES, squares.options(learning_rate=learning_rate))

    def teacher(frame):
        if labels == "none":
            raise RuntimeError("out of memory")
        own = attempt(state.student, images_of(state.student, frame, state.options), squares.SIZE, gradients=False)
        return Teaching({"truth": frame.label, "own": own.labels, "no class": np.full_like(frame.label, 9)}[labels])

    found = seconds_alone(state, teacher, frame, runs=1)
    assert found.keys() == measured
    assert all(value > 0 for value in found.values())


def test_in_real_time_what_was_dropped_and_late_is_told(tmp_path):
    recipe = tiny_stream("distillation.score_every_frame=false", "data.args.frames_per_second=200")
    follow(recipe, tmp_path / "run", pace=lambda frames: paced(frames, queue=2))
    scores, rows = read(tmp_path / "run", "scores.json"), rows_of(tmp_path / "run")
    assert scores["real_time"]["dropped"] == FRAMES - len(rows)
    assert scores["real_time"]["longest_delay"] >= 0
    assert all("stream/delay_ms" in row for row in rows)


undropped = partial(EveryOther, every=1)


class Noting(OracleTeacher):
    """Notes the frames that it is asked of, and answers when frame `until` comes."""

    def __init__(self, recipe):
        self.oracle, self.asked, self.until, self.comes = (
            build_teacher(recipe, build_source(recipe)),
            [],
            0,
            threading.Event(),
        )
        super().__init__(self.oracle.classes, macs=10**9)

    def __call__(self, frame):
        self.asked.append(frame.index)
        assert self.comes.wait(20)
        return self.oracle(frame)

    def pace(self, frames):
        return undropped(map(self.passing, frames))

    def passing(self, frame):
        if frame.index == self.until:
            self.comes.set()
        return frame


def test_in_real_time_a_stream_that_goes_on_keeps_weights_stride_and_scores(tmp_path):
    """What frame 0 taught is finished when the first call ends, and the next key frame is a stride of 4 later."""
    recipe = tiny_stream(*SHORT, "distillation.threshold=0.99")
    teacher = Noting(recipe)
    teacher.until = 2
    follow(recipe, tmp_path / "run", teacher=teacher, pace=teacher.pace, stop_after=3)
    first, scores = weights_of(tmp_path / "run"), read(tmp_path / "run", "scores.json")
    assert (scores["key_frames"], scores["updates"], scores["frames_against_teacher"]) == (1, 3, 1)
    assert read(tmp_path / "run", "cost.json")["stream"]["counts"] == {"student": 3, "teacher": 1, "updates": 3}
    assert not (tmp_path / "run" / "pictures").exists()  # a key frame is a sample when its labels are there
    follow(recipe, tmp_path / "run", teacher=teacher, pace=teacher.pace, stop_after=1)
    assert teacher.asked == [0]
    assert all(torch.equal(first[name], weight) for name, weight in weights_of(tmp_path / "run").items())
    follow(recipe, tmp_path / "run", teacher=teacher, pace=teacher.pace, stop_after=2)
    assert teacher.asked == [0, 4]
    assert read(tmp_path / "run", "scores.json")["updates"] == 6
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(6))


def test_in_real_time_updates_that_diverge_end_it_and_are_not_saved(tmp_path):
    recipe = tiny_stream(*SHORT, "distillation.learning_rate=1e30")
    with pytest.raises(ValueError, match=r"frame 0: .*finite.*distillation\.learning_rate is 1e\+30"):
        follow(recipe, tmp_path / "run", pace=undropped, stop_after=1)
    assert newest_valid(tmp_path / "run" / "checkpoints") is None


def test_costs_are_counted_on_a_copy_that_no_other_thread_teaches(tmp_path, monkeypatch):
    made, counted, build = [], [], dance_seg.stream.build_student
    monkeypatch.setattr(dance_seg.stream, "build_student", lambda *given: made.append(build(*given)) or made[0])
    for module in (dance_seg.stream, dance_seg.distillation.scores):
        count = partial(lambda count, model, size: counted.append(model) or count(model, size), module.count_macs)
        monkeypatch.setattr(module, "count_macs", count)
    follow(tiny_stream(*SHORT), tmp_path / "run", pace=undropped, stop_after=1)
    assert len(counted) == 2
    assert all(model is not made[0][0] for model in counted)


class Tracker:
    """Keeps what it is told."""

    def __init__(self):
        self.rows, self.pictures, self.finished = [], [], False

    def log_metrics(self, row, step):
        self.rows.append((step, row))

    def log_images(self, key, images, masks, classes, step):
        self.pictures.append((key, step, sorted(masks)))

    def finish(self):
        self.finished = True


def test_the_tracker_sees_accuracy_stride_and_cost_and_is_ended(tmp_path, monkeypatch):
    tracker, given = Tracker(), {}

    def made(folder, **options):
        given.update(options)
        return tracker

    monkeypatch.setattr(dance_seg.stream, "guarded_wandb_logger", made)
    follow(tiny_stream("trainer.log_every=10"), tmp_path / "run")
    keys = {row["step"] for row in rows_of(tmp_path / "run") if row["stream/key_frame"]}
    assert {step for step, _ in tracker.rows} == keys | set(range(0, FRAMES, 10))
    _, row = tracker.rows[-1]
    assert {"stream/accuracy", "stream/stride", "cost/times_cheaper"} <= row.keys()
    assert tracker.pictures[0] == ("stream/samples", 0, ["student", "teacher", "truth"])
    assert tracker.finished
    assert given["tags"][0] == "online"  # "distillation" is added by the section of that name


# Teachers that are trained -----------------------------------------------------------------------------------------


def test_a_teacher_is_trained_once_for_each_recipe(tmp_path, monkeypatch):
    calls = []

    def train(recipe, datamodule, folder):
        calls.append((recipe.name, datamodule))
        folder.mkdir(parents=True)
        (folder / "run.json").write_text('{"finished": "now"}')

    monkeypatch.setattr(dance_seg.build, "train", train)
    one = trained(tiny(), tmp_path, lambda recipe: "data")
    assert trained(tiny("data.args.workers=2", "name=other"), tmp_path, lambda recipe: "data").name != one.name
    assert trained(tiny("data.args.workers=2"), tmp_path, lambda recipe: "data") == one
    assert calls == [(one.name, "data"), ("other-" + recipe_hash(tiny()), "data")]
    assert trained(tiny("trainer.max_epochs=2"), tmp_path, lambda recipe: "data") != one


def test_a_teacher_of_the_same_data_set_reads_where_the_video_is(tmp_path):
    stream = tiny_stream("tracking.wandb=offline", data=Part("video_camvid", {"root": "/there"}))
    made = teacher_recipe("recipes/camvid_dense.yaml", ["data.args.hold_out='0016E5'"], stream)
    assert (made.data.args["root"], made.data.args["hold_out"], made.tracking.wandb) == ("/there", "0016E5", "offline")
    kept = teacher_recipe("recipes/camvid_dense.yaml", ["data.args.root=/elsewhere"], stream)
    assert kept.data.args["root"] == "/elsewhere"
    assert "root" not in teacher_recipe("recipes/shapes_dense.yaml", [], stream).data.args


# Sample frames -----------------------------------------------------------------------------------------------------


def followed_frame(index, *, key_frame=False, cut=False, updates=0):
    blank = np.zeros((2, 2), np.uint8)
    frame = Frame(index, 0.0, np.zeros((2, 2, 3), np.uint8), None, cut)
    before = 0.5 if key_frame else None
    teaching = Teaching(blank) if key_frame else None
    return Followed(frame, blank, blank, teaching, key_frame, updates, before, before, 8, {})


def test_in_real_time_a_sample_is_the_key_frame_itself_with_the_labels_that_came_back_for_it():
    came_back, asked = followed_frame(9, key_frame=True, updates=2), followed_frame(3)
    labels = came_back.teaching.labels
    sample, of_teacher = known_by_now(came_back._replace(asked=Asked(asked.frame, asked.prediction)))
    assert (sample.frame.index, sample.prediction is asked.prediction, of_teacher is labels) == (3, True, True)
    assert known_by_now(followed_frame(3)._replace(key_frame=True)) == (None, None)  # its labels are not there yet
    assert known_by_now(followed_frame(4)) == (None, None)
    cut = followed_frame(5, cut=True)
    assert known_by_now(cut) == (cut, None)


def test_cuts_and_the_two_key_frames_after_them_are_kept_and_their_number_is_bounded(tmp_path):
    samples = SampleFrames(tmp_path, [(0, 0, 0)], 10_000)
    kept = [
        index
        for index in range(10_000)
        if samples.wants(followed_frame(index, key_frame=index % 8 == 0, cut=index % 500 == 3))
    ]
    assert kept[:4] == [0, 3, 8, 16]  # the first, the first cut, two key frames
    assert 503 in kept
    assert sum(index % 500 == 3 for index in kept) == MOST_EVENTS
    assert len(kept) < 30


def test_where_nobody_knows_cuts_a_loss_of_accuracy_is_kept(tmp_path):
    samples = SampleFrames(tmp_path, [(0, 0, 0)], None)
    samples.wants(followed_frame(0, key_frame=True, cut=None))
    assert not samples.wants(followed_frame(16, key_frame=True, cut=None))  # still right
    assert samples.wants(followed_frame(32, key_frame=True, cut=None, updates=3))  # no longer
    assert not samples.wants(followed_frame(33, cut=None))
