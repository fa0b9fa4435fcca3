"""Nothing outside a data set's root is ever named, and what is listed is what is there."""

from pathlib import Path

import pytest

from dance_seg.errors import DataError
from datamodules.listing import data_root, inside, list_files, list_folders, read_lines, what_is_there


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    "line", ["../x.png", "a/../../x.png", "a/../x.png", "/etc/passwd", "a\0.png", "..\\x.png", "C:\\x.png", ""]
)
def test_a_listed_path_that_leads_out_of_the_root_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match="leads out of"):
        inside(tmp_path, line, tmp_path / "train.txt")


def test_a_listed_path_inside_the_root_is_taken_with_either_slash(tmp_path: Path) -> None:
    assert inside(tmp_path, "a\\b.png", tmp_path / "train.txt") == tmp_path / "a" / "b.png"


def test_links_that_lead_out_of_the_root_are_refused_and_others_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", touch(tmp_path / "outside" / "secret.png")
    touch(root / "real" / "a.png")
    (root / "real" / "b.png").symlink_to(root / "real" / "a.png")
    assert list(list_files(root / "real", root, (".png",))) == ["a", "b"]
    (root / "real" / "c.png").symlink_to(outside)
    (root / "linked").symlink_to(outside.parent)
    for read in (
        lambda: list_files(root / "real", root, (".png",)),
        lambda: list_files(root / "linked", root, (".png",)),
        lambda: list_folders(root, root),
        lambda: inside(root, "linked/secret.png", root / "train.txt"),
    ):
        with pytest.raises(DataError, match="link that leads out of"):
            read()


def test_a_root_that_is_a_link_itself_is_fine(tmp_path: Path) -> None:
    touch(tmp_path / "disk" / "x" / "a.png")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    root = data_root(tmp_path / "data", "x")
    assert list(list_files(root / "x", root, (".png",))) == ["a"]


def test_a_folder_that_is_a_link_is_refused_when_searching_below(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "again").symlink_to(tmp_path / "x")
    with pytest.raises(DataError, match="link to a folder"):
        list_files(tmp_path / "x", tmp_path, (".png",), recurse=True)


def test_files_are_listed_by_name_and_hidden_ones_are_not(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.v2.jpg", "._b.png", "note.txt", "below/c.png"):
        touch(tmp_path / name)
    assert list(list_files(tmp_path, tmp_path, (".png", ".jpg"))) == ["a.v2", "b"]
    assert list(list_files(tmp_path, tmp_path, (".png", ".jpg"), recurse=True)) == ["a.v2", "b", "below/c"]
    assert what_is_there(tmp_path / "below") == "1 .png"


def test_two_files_of_one_name_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    touch(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="differ only in their suffix"):
        list_files(tmp_path, tmp_path, (".png", ".jpg"))


def test_a_root_that_is_no_folder_is_an_error_that_says_what_belongs_there(tmp_path: Path) -> None:
    for root, reason in ((tmp_path / "none", "is missing"), (touch(tmp_path / "file"), "is a file")):
        with pytest.raises(DataError, match=rf"{reason}.*data\.args\.root.*images/"):
            data_root(root, "images/")
    with pytest.raises(DataError, match="is no path"):
        data_root("a\0b", "images/")


def test_lines_carry_their_numbers_and_a_binary_file_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\n\n# two\n three \n", encoding="utf-8")
    assert read_lines(path) == [(1, "one"), (4, "three")]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file"):
        read_lines(path)
