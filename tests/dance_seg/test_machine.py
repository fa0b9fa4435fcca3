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
