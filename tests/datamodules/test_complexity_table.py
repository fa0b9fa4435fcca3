import json
import logging
import multiprocessing
from dataclasses import dataclass, field

import numpy as np
import pytest

from dance_seg.data_slimming import complexity as measures
from dance_seg.data_slimming.complexity import random, spatial_information
from dance_seg.sample import Sample
from datamodules import complexity_table as module
from datamodules.complexity_table import complexity_table


@dataclass
class Listed:
    """A source of samples held in a list, which counts how often it is asked."""

    samples: list
    fingerprint: str = "one"
    loads: list = field(default_factory=list)

    @property
    def names(self):
        return [f"{index}.png" for index in range(len(self.samples))]

    def __len__(self):
        return len(self.samples)

    def load(self, index):
        self.loads.append(index)
        return self.samples[index]


def listed(count=5, size=(256, 256), **how):
    draw = np.random.default_rng(0)
    samples = [
        Sample(
            draw.integers(0, min(256, 40 * (i + 1)), (*size, 3), dtype=np.uint8),
            draw.integers(0, 3, size, dtype=np.uint8),
        )
        for i in range(count)
    ]
    return Listed(samples, **how)


def table_of(source, folder, measure="spatial_information", **options):
    return complexity_table(source, measure, folder=folder, progress=False, **options)


def the_file(folder):
    (path,) = folder.glob("*.json")
    return path


def test_values_are_the_measure_of_each_image_in_order(tmp_path):
    source = listed()
    table = table_of(source, tmp_path)
    assert table.names == tuple(source.names)
    assert table.values == pytest.approx([spatial_information(sample.image) for sample in source.samples])
    assert not table.from_cache


def test_the_second_call_reads_the_same_table_and_loads_no_image(tmp_path):
    first = table_of(listed(), tmp_path)
    source = listed()
    second = table_of(source, tmp_path)
    assert source.loads == []
    assert second.from_cache
    assert second.values.tobytes() == first.values.tobytes()
    np.testing.assert_array_equal(second.classes_present, first.classes_present)
    assert (second.seconds_decoding, second.seconds_scoring) == (first.seconds_decoding, first.seconds_scoring)


def test_the_classes_of_each_image_are_kept_with_it(tmp_path):
    """Classes 0 and 2, then 5 alone, then nothing but ignored pixels; 5 is the highest, so C is 6."""
    labels = [np.array([[0, 2]], np.uint8), np.array([[5, 255]], np.uint8), np.array([[255, 255]], np.uint8)]
    source = Listed([Sample(np.zeros((1, 2, 3), np.uint8), label) for label in labels])
    expected = np.zeros((3, 6), bool)
    expected[0, [0, 2]] = expected[1, 5] = True
    for _ in range(2):
        np.testing.assert_array_equal(table_of(source, tmp_path).classes_present, expected)


def test_a_source_without_classes_or_images_gives_an_empty_table(tmp_path):
    assert table_of(Listed([]), tmp_path).classes_present.shape == (0, 0)
    assert table_of(Listed([]), tmp_path).values.shape == (0,)


@pytest.mark.parametrize("change", ["files", "names", "measure", "options", "version"])
def test_a_table_of_something_else_is_not_used(tmp_path, monkeypatch, change):
    table_of(listed(), tmp_path, "random", seed=0)
    source, measure, options = listed(), "random", {"seed": 0}
    if change == "files":
        source = listed(fingerprint="other")
    elif change == "names":
        source = listed(count=4)
    elif change == "measure":
        measure, options = "entropy", {}
    elif change == "options":
        options = {"seed": 1}
    else:
        monkeypatch.setattr(module, "VERSION", measures.VERSION + 1)
    assert not table_of(source, tmp_path, measure, **options).from_cache
    monkeypatch.undo()
    assert table_of(listed(), tmp_path, "random", seed=0).from_cache  # and has not been overwritten


def damage_value(content):
    content["values"][0] += 1


def damage_names(content):
    content["names"].reverse()


def damage_class(content):
    content["classes"][0].append(7)


def drop_checksum(content):
    del content["sha256"]


@pytest.mark.parametrize("damage", [damage_value, damage_names, damage_class, drop_checksum])
def test_a_changed_table_is_reported_and_made_anew(tmp_path, caplog, damage):
    good = table_of(listed(), tmp_path)
    content = json.loads(the_file(tmp_path).read_text())
    damage(content)
    the_file(tmp_path).write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        again = table_of(listed(), tmp_path)
    assert "is not used" in caplog.text
    assert not again.from_cache
    assert again.values.tolist() == good.values.tolist()
    assert table_of(listed(), tmp_path).from_cache


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"sha256": 1}'])
def test_a_file_that_is_no_table_is_reported_and_replaced(tmp_path, caplog, content):
    table_of(listed(), tmp_path)
    the_file(tmp_path).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert not table_of(listed(), tmp_path).from_cache
    assert "is not used" in caplog.text
    assert table_of(listed(), tmp_path).from_cache


def test_every_flipped_bit_of_a_table_is_noticed_or_harmless(tmp_path):
    expected = table_of(listed(count=2), tmp_path)
    path = the_file(tmp_path)
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        table = table_of(listed(count=2), tmp_path)
        assert table.values.tolist() == expected.values.tolist()
        np.testing.assert_array_equal(table.classes_present, expected.classes_present)


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with caplog.at_level(logging.WARNING):
        table = table_of(listed(), in_the_way / "folder")
    assert "cannot be kept" in caplog.text
    assert len(table.values) == 5


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, caplog, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        table_of(listed(), tmp_path)
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_pass_that_is_broken_off_leaves_no_table(tmp_path):
    class Broken(Listed):
        def load(self, index):
            if index == 3:
                raise ValueError("3.png is damaged")
            return super().load(index)

    with pytest.raises(ValueError, match="is damaged"):
        table_of(Broken(listed().samples), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_below_the_reference_size_are_counted_in_one_warning(tmp_path, caplog):
    source = Listed([*listed(2, size=(255, 400)).samples, *listed(1, size=(256, 400)).samples])
    with caplog.at_level(logging.WARNING):
        table_of(source, tmp_path)
    assert len(caplog.records) == 1
    assert "2 of 3 images are smaller than the reference size (short side 256)" in caplog.text


def test_no_warning_where_all_images_are_large_enough(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        table_of(listed(), tmp_path)
    assert caplog.records == []


def test_an_unknown_measure_or_option_is_refused_before_any_image_is_loaded(tmp_path):
    source = listed()
    with pytest.raises(ValueError, match="choose one of"):
        table_of(source, tmp_path, "sobel")
    with pytest.raises(ValueError, match="takes no option 'seed'"):
        table_of(source, tmp_path, "entropy", seed=1)
    assert source.loads == []


def test_the_random_control_is_scored_by_name(tmp_path):
    table = table_of(listed(), tmp_path, "random", seed=3)
    assert table.values.tolist() == [random(name, seed=3) for name in listed().names]


def score_in_another_process(folder):
    table_of(listed(count=20), folder)


def test_two_processes_may_make_the_same_table_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=score_in_another_process, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    source = listed(count=20)
    assert table_of(source, tmp_path).from_cache


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_demand(tmp_path, monkeypatch, progress):
    shown = []

    def with_progress(items, count, what, progress):
        shown.append((count, what, progress))
        return items

    monkeypatch.setattr(module, "with_progress", with_progress)
    complexity_table(listed(), "entropy", folder=tmp_path, progress=progress)
    assert shown == [(5, "scoring entropy", progress)]
