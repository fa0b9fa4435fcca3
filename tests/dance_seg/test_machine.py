"""A file is written whole or not at all."""

import pytest

from dance_seg.machine import write_text


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    write_text(path, "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_names_that_are_no_text_can_be_written(tmp_path):
    assert write_text(tmp_path / "a.html", "caf\udce9").read_bytes() == b"caf?"


@pytest.mark.parametrize(
    ("value", "text"),
    [(999.6, "1,000"), (99.95, "100.0"), (1e-5, "1e-05"), (-12.345, "-12.3"), (0.5, "0.5"), (5, "5.00")],
)
def test_figures_have_three_digits_that_matter(value, text):
    assert figure_text(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(119.99, "120 s"), (3599.4, "59 min 59 s"), (3599.7, "1 h 0 min")])
def test_times_are_said_as_people_say_them(seconds, text):
    assert seconds_text(seconds) == text


def test_a_change_is_a_percentage():
    assert [change_text(ratio) for ratio in (0.5, 2.0, 1.0, 0.985, 0.9996)] == [
        "−50 %",
        "+100 %",
        "±0 %",
        "−1.5 %",
        "±0 %",
    ]


def test_a_long_list_is_counted():
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"
