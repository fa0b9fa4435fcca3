"""Pairs become samples; some are held out, bad ones are named or left out, the same everywhere."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from dance_seg.errors import DataError
from dance_seg.sample import IGNORE
from datamodules import image_files
from datamodules.label_table import label_table
from datamodules.sources import (
    FileSource,
    Pair,
    audit,
    fingerprint,
    hold_out,
    in_order,
    usable_pairs,
)

TABLE = label_table(("road", "car"), raw_to_train={7: 0, 26: 1}, ignore=[0])


def make_pairs(folder: Path, count: int, size: tuple[int, int] = (6, 8)) -> list[Pair]:
    """Pairs of groups a, b, a, b, ...; image i is filled with i, its label with 7 and one pixel of 26."""
    pairs = []
    for number in range(count):
        label = np.full(size, 7, np.uint8)
        label[0, 0] = 26
        name = f"{'ab'[number % 2]}_{number:03d}"
        image_path, label_path = folder / f"{name}.png", folder / f"{name}_label.png"
        Image.fromarray(np.full((*size, 3), number, np.uint8)).save(image_path)
        Image.fromarray(label).save(label_path)
        pairs.append(Pair(image_path, label_path, name, name[0]))
    return pairs


def names(pairs: list[Pair]) -> list[str]:
    return [pair.name for pair in pairs]


# Samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_holds_the_image_and_train_ids(tmp_path: Path) -> None:
    source = FileSource(make_pairs(tmp_path, 3), TABLE)
    sample = source.load(2)
    assert (len(source), source.names, source.groups) == (3, ("a_000", "b_001", "a_002"), ("a", "b", "a"))
    assert (sample.image == 2).all()
    assert sample.image.shape == (6, 8, 3)
    assert sample.label[0].tolist() == [1] + 7 * [0]
    assert sample.label.dtype == np.uint8


def test_without_a_label_file_every_pixel_is_ignored(tmp_path: Path) -> None:
    pair = make_pairs(tmp_path, 1)[0]._replace(label=None)
    assert (FileSource([pair], TABLE).load(0).label == IGNORE).all()


def test_a_size_mismatch_names_both_files_and_sizes(tmp_path: Path) -> None:
    pair = make_pairs(tmp_path, 1)[0]
    assert pair.label is not None
    Image.fromarray(np.full((3, 4), 7, np.uint8)).save(pair.label)
    with pytest.raises(DataError, match=r"a_000_label\.png has 3 x 4 pixels but its image .*a_000\.png has 6 x 8"):
        FileSource([pair], TABLE).load(0)


def test_a_size_mismatch_that_exif_explains_says_so(tmp_path: Path) -> None:
    pair = make_pairs(tmp_path, 1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 8)).save(pair.image, exif=exif)  # 8 rows of 6, to be shown as 6 rows of 8
    with pytest.raises(DataError, match="EXIF orientation"):
        FileSource([pair], TABLE).load(0)


def test_two_images_of_one_name_are_an_error(tmp_path: Path) -> None:
    pair = make_pairs(tmp_path, 1)[0]
    with pytest.raises(ValueError, match="name of another: a_000"):
        FileSource([pair, pair], TABLE)


def test_the_fingerprint_changes_with_every_file_name_and_the_table(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, 2)
    assert pairs[1].label is not None
    first = fingerprint(pairs, TABLE)
    assert fingerprint(pairs, TABLE) == first
    other = label_table(("road", "car"), raw_to_train={7: 1, 26: 0}, ignore=[0])
    found = {first, fingerprint(pairs, other), fingerprint(pairs[::-1], TABLE), fingerprint(pairs[:1], TABLE)}
    found.add(fingerprint([pairs[0], pairs[1]._replace(group="c")], TABLE))
    found.add(fingerprint([pairs[0], pairs[1]._replace(label=None)], TABLE))
    status = os.stat(pairs[1].label)
    os.utime(pairs[1].label, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    found.add(fingerprint(pairs, TABLE))
    status = os.stat(pairs[0].image)
    pairs[0].image.write_bytes(pairs[0].image.read_bytes() + b"more")
    os.utime(pairs[0].image, ns=(status.st_atime_ns, status.st_mtime_ns))
    found.add(fingerprint(pairs, TABLE))
    assert len(found) == 8
    pairs[0].image.unlink()
    with pytest.raises(DataError, match=r"a_000\.png cannot be read"):
        fingerprint(pairs, TABLE)


# Hold out ---------------------------------------------------------------------------------------------------------


def pairs_of(groups: str) -> list[Pair]:
    return [Pair(Path(f"{i}.png"), None, f"{group}_{i}", group) for i, group in enumerate(groups)]


def test_a_group_groups_or_images_are_held_out_in_order() -> None:
    pairs = pairs_of("aabbc")
    for spec, expected in (
        ("b", ["b_2", "b_3"]),
        (["c", "a"], ["a_0", "a_1", "c_4"]),
        (["b_3", "a_0"], ["a_0", "b_3"]),
        ("a_1", ["a_1"]),
    ):
        kept, held = hold_out(pairs, spec)
        assert names(held) == expected
        assert names(kept) == [name for name in names(pairs) if name not in expected]
    assert hold_out(pairs, None) == (pairs, [])


def test_a_drive_that_yaml_reads_as_a_number_is_still_that_drive() -> None:
    """CamVid's drive 0016E5 arrives as 1600000.0, a city named 2011 as a whole number."""
    pairs = [pair._replace(group={"a": "0006R0", "b": "0016E5", "c": "2011"}[pair.group]) for pair in pairs_of("aabbc")]
    assert names(hold_out(pairs, 1600000.0)[1]) == ["b_2", "b_3"]
    assert names(hold_out(pairs, ["0006R0", 1600000.0])[1]) == ["a_0", "a_1", "b_2", "b_3"]  # type: ignore[list-item]
    assert names(hold_out(pairs, 2011)[1]) == ["c_4"]


def test_a_text_file_of_names_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_text("# for choosing\nb\n\n/elsewhere/train/a_1.png /elsewhere/trainannot/a_1.png\n")
    assert names(hold_out(pairs_of("aabbc"), str(path))[1]) == ["a_1", "b_2", "b_3"]


def test_a_fraction_is_exact_and_does_not_depend_on_order_or_chance() -> None:
    pairs = pairs_of("a" * 50)
    held = hold_out(pairs, 0.2)[1]
    assert len(held) == 10
    assert set(held) == set(hold_out(pairs[::-1], 0.2)[1])
    assert set(held) < set(hold_out(pairs, 0.4)[1])  # hashes do not change with the fraction
    assert len(hold_out(pairs, 0.001)[1]) == 1
    assert len(hold_out(pairs, 0.999)[0]) == 1


def test_a_fraction_changes_little_when_images_are_added() -> None:
    before = set(hold_out(pairs_of("a" * 100), 0.2)[1])
    after = set(hold_out(pairs_of("a" * 110), 0.2)[1])
    assert len(before & after) >= 16


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("d", r"names 'd', neither a group nor an image.*groups found: a \(2 images\), b \(2 images\), c \(1 images\)"),
        (["a_9"], "did you mean 'a_"),
        (["a", "b", "c"], "takes away all 5 images"),
        ([], "takes away nothing"),
        (0.0, "between 0 and 1"),
        (1, "between 0 and 1"),
        (-0.5, "between 0 and 1"),
        (float("nan"), "between 0 and 1"),
        (True, "a fraction"),
        ({"a": 1}, "a fraction"),
        ("none.txt", r"none\.txt cannot be read"),
    ],
)
def test_what_cannot_be_held_out_is_an_error_that_names_the_choices(spec: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hold_out(pairs_of("aabbc"), spec)


# Quarantine -------------------------------------------------------------------------------------------------------


def spoil(pairs: list[Pair]) -> None:
    """Pair 1: image cut off; pair 3: id 9; pair 5: label missing; pair 7: sizes differ."""
    labels = [Path(str(pair.label)) for pair in pairs]
    pairs[1].image.write_bytes(pairs[1].image.read_bytes()[:50])
    Image.fromarray(np.full((6, 8), 9, np.uint8)).save(labels[3])
    labels[5].unlink()
    Image.fromarray(np.full((6, 9), 7, np.uint8)).save(labels[7])


def test_an_audit_names_each_bad_file_and_its_reason(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, 10)
    assert audit(pairs, TABLE, progress=False) == []
    spoil(pairs)
    bad = audit(pairs, TABLE, progress=False)
    assert [file.path for file in bad] == [pairs[1].image, *(pairs[i].label for i in (3, 5, 7))]
    for file, reason in zip(bad, ("cut off", "raw id 9", "is missing", "6 x 9"), strict=True):
        assert reason in file.reason
        assert file.reason.startswith(str(file.path))


def test_a_shallow_audit_reads_headers_and_decodes_nothing(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, 10)
    spoil(pairs)
    before = image_files.decodes()
    assert [file.path for file in audit(pairs, TABLE, deep=False, progress=False)] == [pairs[5].label, pairs[7].label]
    assert image_files.decodes() == before


def test_quarantine_leaves_bad_pairs_out_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = make_pairs(tmp_path, 10)
    spoil(pairs)
    with caplog.at_level(logging.WARNING):
        usable = usable_pairs(pairs, TABLE, "quarantine", 0.4, progress=False)
    assert usable == [pairs[i] for i in (0, 2, 4, 6, 8, 9)]
    assert "4 of 10 pairs left out" in caplog.text
    assert "raw id 9" in caplog.text


def test_more_bad_files_than_the_cap_allows_are_an_error_that_lists_them(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, 10)
    spoil(pairs)
    with pytest.raises(DataError, match=r"4 of 10 pairs cannot be used, more than the 3 .*=0\.39.*cut off.*raw id 9"):
        usable_pairs(pairs, TABLE, "quarantine", 0.39, progress=False)


def test_one_bad_file_is_allowed_in_a_small_set_unless_the_cap_is_zero(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, 3)
    pairs[1].image.write_bytes(b"")
    assert len(usable_pairs(pairs, TABLE, "quarantine", progress=False)) == 2
    with pytest.raises(DataError, match="more than the 0"):
        usable_pairs(pairs, TABLE, "quarantine", 0.0, progress=False)


def test_policy_error_looks_at_nothing_until_a_file_is_read(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, 2)
    pairs[1].image.write_bytes(b"")
    before = image_files.decodes()
    assert usable_pairs(pairs, TABLE) == pairs
    assert image_files.decodes() == before
    with pytest.raises(DataError, match="is empty"):
        FileSource(pairs, TABLE).load(1)


def test_an_audit_is_kept_until_a_file_changes(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, 8)
    pairs[1].image.write_bytes(b"no picture")
    kept = tmp_path / "cache"

    def usable() -> tuple[list[Pair], int]:
        before = image_files.decodes()
        found = usable_pairs(pairs, TABLE, "quarantine", 0.2, folder=kept, progress=False)
        return found, image_files.decodes() - before

    assert usable() == (pairs[:1] + pairs[2:], 14)
    assert usable() == (pairs[:1] + pairs[2:], 0)
    Image.fromarray(np.full((6, 8, 3), 1, np.uint8)).save(pairs[1].image)
    assert usable() == (pairs, 16)


def test_a_kept_audit_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, 3)
    for _ in range(2):
        assert usable_pairs(pairs, TABLE, "quarantine", folder=tmp_path / "cache", progress=False) == pairs
        (kept,) = (tmp_path / "cache" / "audits").glob("*")
        kept.write_text('{"version": 1')


def test_an_unknown_policy_or_cap_is_an_error() -> None:
    with pytest.raises(ValueError, match="choose error or quarantine"):
        usable_pairs([], TABLE, "ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bad_files_cap is 2"):
        usable_pairs([], TABLE, "quarantine", 2)


# Work in threads --------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_few_are_held(tmp_path: Path) -> None:
    started = []

    def note(index: int) -> int:
        started.append(index)
        return index

    work = in_order(note, 100, threads=2)
    assert next(work) == 0
    assert len(started) <= 4
    assert list(work) == list(range(1, 100))


def test_an_error_in_a_thread_is_raised_at_its_place_and_stops_the_work() -> None:
    started = []

    def fail_at_five(index: int) -> int:
        started.append(index)
        if index == 5:
            raise DataError("five")
        return index

    work = in_order(fail_at_five, 1000, threads=2)
    assert [next(work) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="five"):
        next(work)
    assert len(started) < 20
    assert threading.active_count() < 20


# Real files -------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif("DANCE_SEG_CAMVID" not in os.environ, reason="DANCE_SEG_CAMVID is not set")
def test_camvid_decodes_as_opencv_and_pillow_say() -> None:
    from datamodules.camvid import camvid_split

    pairs, table = camvid_split(os.environ["DANCE_SEG_CAMVID"], "val")
    source = FileSource(pairs, table)
    for index in (0, 50, 100):
        sample = source.load(index)
        assert pairs[index].label is not None
        raw = np.array(Image.open(str(pairs[index].label)))
        np.testing.assert_array_equal(sample.image[..., ::-1], cv2.imread(str(pairs[index].image)))
        np.testing.assert_array_equal(sample.label, np.where(raw == 11, IGNORE, raw))
