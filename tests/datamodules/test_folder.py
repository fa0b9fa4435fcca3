"""A user's own folder is read by classes.yaml alone, and every mistake in it is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.sample import IGNORE
from datamodules.folder import folder_split, read_classes
from datamodules.scenes import render_scene
from datamodules.sources import FileSource, Pair
from tools.make_shapes import write_layout


def save_pair(root: Path, name: str, ids: tuple[int, ...] = (0, 1, 255)) -> None:
    image, mask = root / "images" / f"{name}.jpg", root / "masks" / f"{name}.png"
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (len(ids), 1)).save(image)
    Image.fromarray(np.array([ids], np.uint8)).save(mask)


def make(root: Path, *names: str, yaml: str = "classes: [road, car]") -> Path:
    for name in names:
        save_pair(root, name)
    (root / "classes.yaml").write_text(yaml)
    return root


def names(pairs: list[Pair]) -> list[str]:
    return [pair.name for pair in pairs]


# Splits -----------------------------------------------------------------------------------------------------------


def test_folders_named_after_splits_are_the_splits(tmp_path: Path) -> None:
    make(tmp_path, "train/a", "train/b", "val/c", "test/d")
    for split, expected in (("train", ["a", "b"]), ("val", ["c"]), ("test", ["d"]), ("trainval", ["a", "b", "c"])):
        assert names(folder_split(tmp_path, split)[0]) == expected


def test_lists_say_which_images_belong_to_a_split(tmp_path: Path) -> None:
    make(tmp_path, "a", "b", "c.1", "my image")
    (tmp_path / "train.txt").write_text("a.jpg\nimages/b.jpg masks/b.png\n")
    (tmp_path / "val.txt").write_text("c.1\nmy image.jpg\n")
    assert names(folder_split(tmp_path, "train")[0]) == ["a", "b"]
    assert names(folder_split(tmp_path, "val")[0]) == ["c.1", "my image"]
    with pytest.raises(DataError, match=r"test\.txt is missing"):
        folder_split(tmp_path, "test")
    (tmp_path / "val.txt").write_text("a\nbb\n")
    with pytest.raises(DataError, match=r"val\.txt, line 2: images/ has no 'bb'; did you mean 'b'"):
        folder_split(tmp_path, "val")
    (tmp_path / "val.txt").write_text("../../etc/passwd\n")
    with pytest.raises(DataError, match="images/ has no"):
        folder_split(tmp_path, "val")


def test_without_folders_and_lists_a_fraction_by_hash_is_val(tmp_path: Path) -> None:
    make(tmp_path, *(f"i{number}" for number in range(20)))
    train, val = (folder_split(tmp_path, split, val_fraction=0.25)[0] for split in ("train", "val"))
    assert (len(train), len(val)) == (15, 5)
    assert sorted(names(train) + names(val)) == sorted(names(folder_split(tmp_path, "trainval")[0]))
    with pytest.raises(DataError, match="no split test"):
        folder_split(tmp_path, "test")
    with pytest.raises(ValueError, match=r"data\.args\.val_fraction is 1\.5"):
        folder_split(tmp_path, "train", val_fraction=1.5)


def test_folders_below_are_searched_and_are_the_groups(tmp_path: Path) -> None:
    make(tmp_path, "train/x/a", "train/x/y/b", "train/c")
    pairs, _ = folder_split(tmp_path, "train")
    assert [(pair.name, pair.group) for pair in pairs] == [("c", ""), ("x/a", "x"), ("x/y/b", "x/y")]


def test_unpaired_files_are_listed(tmp_path: Path) -> None:
    make(tmp_path, "train/a", "train/b", "train/c")
    (tmp_path / "masks" / "train" / "a.png").unlink()
    (tmp_path / "images" / "train" / "c.jpg").unlink()
    with pytest.raises(DataError, match="1 images have no mask: a; 1 masks have no image: c"):
        folder_split(tmp_path, "train")


def test_missing_and_empty_folders_say_what_is_there(tmp_path: Path) -> None:
    make(tmp_path, "train/a")
    with pytest.raises(DataError, match=r"images/val is missing \(there: 1 folders\)"):
        folder_split(tmp_path, "val")
    (tmp_path / "images" / "train" / "a.jpg").rename(tmp_path / "images" / "train" / "a.tif")
    with pytest.raises(DataError, match=r"holds no \.png or \.jpg or \.jpeg but 1 \.tif"):
        folder_split(tmp_path, "train")
    (tmp_path / "masks").rename(tmp_path / "labels")
    with pytest.raises(DataError, match="masks is missing"):
        folder_split(tmp_path, "train")
    with pytest.raises(ValueError, match="choose one of train, val, trainval, test"):
        folder_split(tmp_path, "valid")


def test_images_beside_folders_of_splits_are_not_silently_left_out(tmp_path: Path) -> None:
    make(tmp_path, "train/a", "val/b", "c")
    with pytest.raises(DataError, match="1 images beside them: c"):
        folder_split(tmp_path, "train")


# classes.yaml -----------------------------------------------------------------------------------------------------


def test_by_default_the_raw_id_is_the_class_and_255_is_ignored(tmp_path: Path) -> None:
    pairs, table = folder_split(make(tmp_path, "train/a"), "train")
    assert FileSource(pairs, table).load(0).label.tolist() == [[0, 1, IGNORE]]
    assert (table.classes, table.allowed) == (("road", "car"), (0, 1, 255))


def test_labels_and_ignore_say_what_each_raw_id_means(tmp_path: Path) -> None:
    text = """
        classes: [road, car]
        colors: [[128, 64, 128], [0, 0, 142]]
        labels: {10: car, 20: road, 21: road, 0: ignore}
        ignore: [99]
    """
    save_pair(tmp_path, "train/a", (10, 20, 21, 0, 99))
    pairs, table = folder_split(make(tmp_path, yaml=text), "train")
    assert FileSource(pairs, table).load(0).label.tolist() == [[1, 0, 0, IGNORE, IGNORE]]
    assert table.allowed == (0, 10, 20, 21, 99)
    assert table.palette == ((128, 64, 128), (0, 0, 142))


def test_255_may_be_a_class(tmp_path: Path) -> None:
    make(tmp_path, yaml="classes: [background, thing]\nlabels: {0: background, 255: thing}")
    assert read_classes(tmp_path / "classes.yaml", tmp_path).table[255] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds missing; expected keys"),
        ("[road, car]", r"expected keys, first of all 'classes: \[road, car, sky\]'"),
        ("class: [road, car]", "no key 'class'; did you mean 'classes'"),
        ("colors: []", "classes is missing"),
        ("classes: road", "classes is 'road'; expected a list"),
        ("classes: [road]", "2 to 254 names, background among them"),
        ("classes: [road, yes]", r"classes\[1\], line 1: yes means something else.*'yes' where it is a name"),
        ("classes: [road, true]", r"classes\[1\] is True; expected a name.*put it in quotes"),
        ("classes: [a, b]\nclasses: [b, a]", "the key classes is given twice"),
        ("classes: [road, 3]", r"classes\[1\] is 3"),
        ("classes: [road, ignore]", r"classes\[1\] is 'ignore'"),
        ("classes: [road, road]", "'road' a second time"),
        (f"classes: [{', '.join(f'c{i}' for i in range(255))}]", "2 to 254 names"),
        ("classes: [a, b]\ncolors: [[0, 0, 0]]", "colors is .*expected 2 of them"),
        ("classes: [a, b]\ncolors: [[0, 0, 0], [0, 0, 256]]", r"colors\[1\] is \[0, 0, 256\]"),
        ("classes: [a, b]\ncolors: [[0, 0, 0], red]", r"colors\[1\] is 'red'"),
        ("classes: [a, b]\nlabels: [a, b]", "labels is .*expected raw ids"),
        ("classes: [a, b]\nlabels: {0: a, 1: c}", r"labels\[1\] is 'c'.*Choose a class or 'ignore': a, b"),
        ("classes: [road, car]\nlabels: {0: road, 1: cars}", "did you mean 'car'"),
        ("classes: [a, b]\nlabels: {0: a, 256: b}", "labels has the key 256"),
        ("classes: [a, b]\nlabels: {0: a, one: b}", "labels has the key 'one'"),
        ("classes: [a, b]\nlabels: {0: a}", "no raw id is mapped to the class 'b'"),
        ("classes: [a, b]\nignore: 255", "ignore is 255; expected a list"),
        ("classes: [a, b]\nignore: [300]", "ignore is .*0 to 255"),
        ("classes: [a, b]\nignore: [1]", "raw id 1 is both"),
        ("classes: [a, b]\nlabels: {0: a, 1: b}\nignore: [1]", "raw id 1 is both"),
        ("classes: [a, b", "not valid YAML"),
        ("classes: !!python/object/apply:os.system ['true']", "classes, line 1: YAML tags"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nclasses: [*b, *b]", "a, line 1: YAML aliases"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_fault_in_classes_yaml_names_key_value_and_choices(tmp_path: Path, text: str, reason: str) -> None:
    path = make(tmp_path, yaml=text) / "classes.yaml"
    with pytest.raises(DataError, match=reason) as raised:
        read_classes(path, tmp_path)
    assert str(raised.value).startswith(str(path))


def test_a_yaml_whose_aliases_expand_without_end_is_refused_in_a_short_message(tmp_path: Path) -> None:
    lines = [
        "classes: [&x0 [lol, lol]" + "".join(f", &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 30)) + "]"
    ]
    with pytest.raises(DataError, match=r"classes\[0\], line 1: YAML aliases") as raised:
        read_classes(make(tmp_path, yaml="\n".join(lines)) / "classes.yaml", tmp_path)
    assert len(str(raised.value)) < 500


def test_a_missing_binary_or_huge_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    with pytest.raises(DataError, match="it names the classes"):
        read_classes(path, tmp_path)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="cannot be read as YAML"):
        read_classes(path, tmp_path)
    path.write_text("classes: [a, b] #" + "x" * 1_000_001)
    with pytest.raises(DataError, match="larger than"):
        read_classes(path, tmp_path)


def test_scenes_written_in_this_layout_come_back_as_drawn(tmp_path: Path) -> None:
    write_layout("folder", tmp_path / "data", 8, seed=3, size=(32, 48))
    drawn = [render_scene(3, index, (32, 48)) for index in range(8)]
    read = [
        source.load(index)
        for split in ("train", "val")
        for source in [FileSource(*folder_split(tmp_path / "data", split))]
        for index in range(len(source))
    ]
    assert len(read) == 8
    assert {sample.image.tobytes() for sample in read} == {sample.image.tobytes() for sample in drawn}
    assert {sample.label.tobytes() for sample in read} == {sample.label.tobytes() for sample in drawn}
