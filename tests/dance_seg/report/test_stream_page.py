"""The page of a stream: a timeline, sample frames side by side, totals and costs, in one file that opens offline."""

import json
import re
import shutil

import numpy as np
import pytest

from dance_seg.errors import DataError
from dance_seg.metrics_file import MetricsFile
from dance_seg.report.charts import LEFT
from dance_seg.report.page import Panels
from dance_seg.report.stream_page import read_stream_run, samples, write_stream_report
from dance_seg.report.timeline import MOST_MARKS, Timeline, accuracy_chart, cost_chart, stride_chart
from tests.browser import screenshot
from tests.stream_folders import CUTS, write_samples, write_stream_run


def text_of(path) -> str:
    html = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def three_key_frames(**changes) -> Timeline:
    """100 frames; key frames 0, 16 and 80; NaN where no teacher was asked."""
    made = {
        "frames": np.arange(100.0),
        "accuracy": np.full(100, 70.0),
        "key_frames": np.array([0.0, 16.0, 80.0]),
        "before": np.array([10.0, 50.0, 70.0]),
        "after": np.array([60.0, 75.0, 70.0]),
        "strides": np.array([16.0, 64.0, 32.0]),
        "cuts": (40,),
        "threshold": 80.0,
    }
    return Timeline(**{**made, **changes})


def test_a_followed_stream_is_shown_whole(tmp_path):
    path = write_stream_report(write_stream_run(tmp_path / "video_shapes"))
    assert path == tmp_path / "video_shapes" / "report.html"
    text = text_of(path)
    for said in (
        "a film · student jitnet · teacher oracle · method online · seed 0",
        "mIoU against the teacher 84.50 points 360 frames, before any update",
        "mIoU against ground truth 71.25 points the teacher 78.50",
        "cheaper measured milliseconds; 12.5 in MACs",
        "Temporal stability 81.5 points",
        "Accuracy against the teacher",
        "threshold 80",
        "scene cut at frame 120",
        "frames to the next key frame",
        "Cost so far",
        "Frame 0: key frame",
        "ground truth",
        "student, every frame 360 7.00 7.50",
        "seconds, by the cost model",
        "IoU of each class",
        "mIoU 84.5 71.2 78.5",
        "name: video_shapes",
        "2 min 30 s",
    ):
        assert said in text, said
    assert "Not finished" not in text


def test_the_timeline_marks_every_key_frame_and_every_cut_at_its_place():
    line = three_key_frames()
    stride, accuracy = str(stride_chart(line)), str(accuracy_chart(line))
    # From 48 to 1066 over frames 0 to 99: frame 80 lies at 48 + 80 / 99 * 1018.
    assert f'x1="{LEFT + 80 / 99 * (1080 - 14 - LEFT):.1f}"' in stride
    assert stride.count('class="curve series-1"') == 3  # one mark for each key frame
    for drawing in (stride, accuracy):
        assert drawing.count("scene cut at frame 40") == 1
    assert accuracy.count('class="hollow series-1"') == accuracy.count('class="point series-2"') == 3
    assert accuracy.count('class="whisker series-2"') == 2  # the third key frame took no update


def test_the_stride_is_a_staircase_on_a_scale_of_doublings():
    drawing = str(stride_chart(three_key_frames()))
    points = re.search(r'<polyline class="curve series-0" points="([^"]+)"', drawing)[1]
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights[0] == heights[1]
    assert heights[2] == heights[3]
    assert heights[4] == heights[5]
    # 16 -> 64 are two doublings up, 64 -> 32 one down.
    assert heights[0] - heights[2] == pytest.approx(2 * (heights[4] - heights[2]), abs=0.2)
    assert [text for text in re.findall(r">(\d+)</text>", drawing) if int(text) in (8, 16, 32, 64)][-4:] == [
        "8", "16", "32", "64",
    ]  # fmt: skip


def test_what_nobody_knows_is_left_out_of_the_charts():
    unknown = np.full(100, np.nan)
    line = three_key_frames(accuracy=unknown, before=unknown[:3], after=unknown[:3], threshold=float("nan"), cuts=())
    assert accuracy_chart(line) == ""
    assert cost_chart(line) == ""
    assert "nan" not in str(stride_chart(line)).lower()


def test_ten_thousand_frames_are_a_chart_of_bounded_size():
    count = 10_000
    line = three_key_frames(
        frames=np.arange(float(count)),
        accuracy=np.linspace(0, 100, count),
        key_frames=np.arange(0.0, count, 8),
        before=np.full(count // 8, 60.0),
        after=np.full(count // 8, 90.0),
        strides=np.full(count // 8, 8.0),
        times_cheaper={"milliseconds": np.linspace(1, 4, count)},
    )
    drawings = [accuracy_chart(line), stride_chart(line), cost_chart(line)]
    assert sum(map(len, drawings)) < 600_000
    assert drawings[0].count("hollow series-1") <= MOST_MARKS


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("metrics.jsonl", "No frame was followed yet."),
        ("scores.json", "No scores yet"),
        ("cost.json", "No cost yet"),
        ("pictures", "No pictures yet"),
        ("run.json", "run.json is missing."),
    ],
)
def test_a_part_that_is_missing_is_left_out_with_a_line_that_says_so(tmp_path, missing, said):
    path = write_stream_run(tmp_path / "run") / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in text_of(write_stream_report(tmp_path / "run"))


def test_an_unfinished_stream_without_ground_truth_says_so(tmp_path):
    folder = write_stream_run(tmp_path / "run", frames=100, finished=False, truth=False)
    text = text_of(write_stream_report(folder))
    assert "Not finished: 100 frames so far." in text
    assert "ground truth" not in text.replace("student, teacher as truth", "")


def test_what_a_stream_had_to_cope_with_is_told(tmp_path):
    folder = write_stream_run(tmp_path / "run")
    scores = json.loads((folder / "scores.json").read_text())
    assert "had to cope with" not in text_of(write_stream_report(folder))
    scores |= {"late": 5, "passed_over": 2, "teacher_failures": 4, "problems": {"unreadable": 3}}
    scores["real_time"] = {"dropped": 7, "longest_delay": 0.25}
    (folder / "scores.json").write_text(json.dumps(scores))
    text = text_of(write_stream_report(folder))
    for said in (
        "7 frames were dropped, and the longest delay was 0.25 s",
        "key frames came 5 frames late in all",
        "2 frames came again or out of order",
        "frames left out or changed: 3 unreadable",
        "the teacher failed 4 times",
    ):
        assert said in text, said


def test_a_miou_says_which_classes_it_is_over_where_that_matters(tmp_path):
    folder = write_stream_run(tmp_path / "run")
    assert "foreground 8" not in text_of(write_stream_report(folder))
    scores = json.loads((folder / "scores.json").read_text())
    scores["against_teacher"]["miou_foreground"] = 80.0
    (folder / "scores.json").write_text(json.dumps(scores))
    text = text_of(write_stream_report(folder))
    assert "84.50 points 360 frames, before any update; over all classes, 80.00 over the foreground" in text
    assert "mIoU, foreground 80.0 – –" in text


def test_a_sample_says_what_happened_on_its_frame(tmp_path):
    folder = write_stream_run(tmp_path / "run", pictures=0)
    write_samples(folder / "pictures", [0, CUTS[0]], truth=False)
    first, second = [block for block in samples(read_stream_run(folder)).blocks if isinstance(block, Panels)]
    assert first.title == "Frame 0: key frame"
    assert re.fullmatch(r"accuracy [\d.]+ before, 92.0 after 8 updates; then a stride of 8", first.note)
    assert second.title.startswith("Frame 120: scene cut")
    assert [panel.title.split(" (")[0] for panel in first.panels] == ["frame", "student", "teacher", "errors"]


def write_real_time_rows(folder):
    """Ten frames: 0 is asked and comes back before frame 4, which is asked and comes back before 7; 8 never does.

    Strides are decided when a key frame comes back: 8 at first, 16 after frame 0, 32 after frame 4.
    """
    (folder / "metrics.jsonl").unlink()
    metrics, stride = MetricsFile(folder / "metrics.jsonl"), 8
    for frame in range(10):
        row = {"stream/key_frame": int(frame in (0, 4, 8)), "stream/updates": 0, "stream/cut": int(frame == 4)}
        if frame in (4, 7):
            taught, stride = {4: (0, 16), 7: (4, 32)}[frame]
            figures = {"taught": taught, "updates": 3, "accuracy": 20.0 + taught, "accuracy_before": 21.0 + taught}
            row |= {f"stream/{name}": value for name, value in figures.items()}
            row["stream/accuracy_after"] = 90.0 + taught
        metrics.append(frame, {**row, "stream/stride": stride})
    metrics.close()


def test_in_real_time_what_a_key_frame_taught_stands_at_the_key_frame_itself(tmp_path):
    folder = write_stream_run(tmp_path / "run", pictures=0)
    write_real_time_rows(folder)
    line = read_stream_run(folder).timeline
    assert line.frames.tolist() == list(range(10))
    assert line.key_frames.tolist() == [0, 4, 8]
    for found, expected in (
        (line.before, [21, 25, np.nan]),
        (line.after, [90, 94, np.nan]),
        (line.strides, [16, 32, np.nan]),
        (line.accuracy[:5], [20, np.nan, np.nan, np.nan, 24]),
    ):
        np.testing.assert_array_equal(found, expected)
    assert stride_chart(line)
    write_samples(folder / "pictures", [4, 7], truth=False)
    key_frame, other = [block for block in samples(read_stream_run(folder)).blocks if isinstance(block, Panels)]
    assert (key_frame.title, other.title) == ("Frame 4: scene cut, key frame", "Frame 7")
    assert (key_frame.note, other.note) == ("accuracy 25.0 before, 94.0 after 3 updates; then a stride of 32", "")


def test_many_large_sample_frames_stay_below_5_mb(tmp_path):
    folder = write_stream_run(tmp_path / "run", frames=1000, pictures=0)
    write_samples(folder / "pictures", list(range(0, 1000, 60)), shape=(240, 320))
    assert write_stream_report(folder).stat().st_size < 5_000_000


def test_a_damaged_picture_is_left_out_and_a_damaged_record_is_an_error(tmp_path):
    folder = write_stream_run(tmp_path / "run")
    (folder / "pictures" / "000000_teacher.png").write_bytes(b"no picture")
    assert "000000_teacher.png: cannot be read" in text_of(write_stream_report(folder))
    (folder / "scores.json").write_text("[")
    with pytest.raises(DataError, match=r"scores.json: not valid JSON"):
        write_stream_report(folder)


def test_what_files_say_is_never_markup(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    folder = write_stream_run(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "source": evil, "classes": [evil] * 8}))
    html = write_stream_report(folder).read_text()
    assert evil not in html
    assert "&lt;img src=x" in html


def test_the_page_is_shown_by_a_browser_without_a_complaint(tmp_path):
    shown = screenshot(write_stream_report(write_stream_run(tmp_path / "run")), tmp_path)
    assert len(np.unique(shown)) > 50  # not an empty page
    assert np.median(shown) > 200
