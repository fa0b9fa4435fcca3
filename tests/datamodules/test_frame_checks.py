"""Bad, resized and repeated frames meet the policy that the recipe states, in words."""

import logging
from collections import Counter

import numpy as np
import pytest

from dance_seg.errors import DataError
from dance_seg.sample import Frame
from datamodules import frame_checks
from datamodules.frame_checks import FrameChecks, Unreadable, checked, is_empty


def picture(seed: int, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def frame(index: int, image: np.ndarray | None = None, label: np.ndarray | None = None) -> Frame:
    return Frame(index, index / 25, picture(index) if image is None else image, label)


def use(found, start=0, **checks):
    problems: Counter[str] = Counter()
    shown = list(checked(found, FrameChecks(**checks), start=start, problems=problems, name="film.mp4"))
    return shown, dict(problems)


BLACK = np.zeros((20, 24, 3), np.uint8)


def test_good_frames_pass_as_they_are() -> None:
    found = [frame(index) for index in range(4)]
    shown, problems = use(found)
    assert [id(one) for one in shown] == [id(one) for one in found]
    assert problems == {}


def test_bad_frames_are_left_out_and_those_that_follow_keep_their_index(caplog) -> None:
    found = [frame(0), Unreadable(1, "film.mp4: frame 1 is damaged"), frame(2, BLACK), frame(3, BLACK), frame(4)]
    with caplog.at_level(logging.WARNING):
        shown, problems = use(found)
    assert [one.index for one in shown] == [0, 4]
    assert problems == {"unreadable": 1, "empty": 2}
    assert [record.message for record in caplog.records] == [
        "film.mp4: frame 1 is damaged; left out",
        "film.mp4: frame 2 is empty, all of the colour (0, 0, 0); left out",  # the second one is counted only
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Unreadable(1, "film.mp4: frame 1 is damaged"), "film.mp4: frame 1 is damaged; data.args.bad_frames=skip"),
        (frame(1, BLACK), r"film.mp4: frame 1 is empty, all of the colour \(0, 0, 0\); data.args.bad_frames=skip"),
    ],
)
def test_stop_ends_the_stream_at_a_bad_frame_after_showing_what_came_before(bad, message) -> None:
    shown = checked(
        [frame(0), bad, frame(2)], FrameChecks(bad_frames="stop"), start=0, problems=Counter(), name="film.mp4"
    )
    assert next(shown).index == 0
    with pytest.raises(DataError, match=message):
        next(shown)


def test_a_video_without_one_good_frame_is_an_error() -> None:
    with pytest.raises(DataError, match="frame 0 is damaged; none of its frames can be used"):
        use([Unreadable(0, "film.mp4: frame 0 is damaged"), frame(1, BLACK)])


def test_bad_frames_without_end_end_the_stream(monkeypatch) -> None:
    monkeypatch.setattr(frame_checks, "MOST_IN_A_ROW", 5)
    found = [frame(0), *(frame(index, BLACK) for index in range(1, 5)), frame(5)]
    assert len(use(found)[0]) == 2  # four in a row
    with pytest.raises(DataError, match="the last of 5 bad frames in a row"):
        use([*found[:5], frame(5, BLACK), frame(6)])


def test_a_frame_of_another_size_becomes_as_large_as_the_first_with_its_label(caplog) -> None:
    label = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3), 20, 0), 16, 1)  # 40 x 48
    found = [frame(0), frame(1, picture(1, (40, 48)), label), frame(2, picture(2, (40, 48)))]
    with caplog.at_level(logging.WARNING):
        shown, problems = use(found)
    assert {one.image.shape for one in shown} == {(20, 24, 3)}
    assert (shown[1].label == label[::2, ::2]).all()
    np.testing.assert_allclose(shown[1].image, found[1].image.reshape(20, 2, 24, 2, 3).mean((1, 3)), atol=0.51)
    assert problems == {"changed size": 2}
    assert len(caplog.records) == 1
    assert "frame 1 is 40x48 and the first was 20x24" in caplog.text
    with pytest.raises(DataError, match=r"frame 1 is 40x48 and the first was 20x24; data.args.changed_size=resize"):
        use(found, changed_size="stop")


def test_repeated_frames_are_kept_or_left_out_as_asked() -> None:
    found = [frame(0), frame(1, picture(0)), frame(2, picture(0)), frame(3), frame(4, picture(0))]
    assert [one.index for one in use(found)[0]] == [0, 1, 2, 3, 4]
    shown, problems = use(found, repeated="skip")
    assert [one.index for one in shown] == [0, 3, 4]
    assert problems == {"repeated": 2}


def test_a_start_in_the_middle_shows_what_the_whole_stream_shows_from_there() -> None:
    """The first frame is seen for its size and the one before the start for what repeats it; neither is shown."""
    found = [frame(0), frame(1, BLACK), frame(2, picture(2, (40, 48))), frame(3, picture(2, (40, 48))), frame(4)]
    whole, _ = use(found, repeated="skip")
    shown, problems = use(found, start=3, repeated="skip")
    assert [one.index for one in shown] == [one.index for one in whole if one.index >= 3] == [4]
    assert problems == {"changed size": 1, "repeated": 1}


def test_bad_frames_before_the_start_do_not_stop_a_resumed_stream() -> None:
    assert [one.index for one in use([frame(0), frame(1, BLACK), frame(2)], start=2, bad_frames="stop")[0]] == [2]


@pytest.mark.parametrize("place", [(0, 0), (7, 11), (19, 23)])
def test_one_other_pixel_makes_a_frame_that_is_not_empty(place) -> None:
    image = BLACK.copy()
    assert is_empty(image)
    image[place] = (0, 0, 1)
    assert not is_empty(image)


@pytest.mark.parametrize("name", ["bad_frames", "changed_size", "repeated"])
def test_another_policy_is_refused_in_words(name) -> None:
    with pytest.raises(ValueError, match=f"data.args.{name} is 'ignore'; choose "):
        FrameChecks(**{name: "ignore"})
