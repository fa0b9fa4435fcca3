import os
import pickle
import subprocess
import sys
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dance_seg.randomness import generator
from dance_seg.sample import IGNORE, Draw, Sample
from datamodules import image_files, transforms
from datamodules.transforms import (
    Augmentation,
    EvaluationImages,
    TrainingImages,
    Window,
    cut,
    draw_window,
    make_batch,
    resize,
    worker_init,
)

STILL = Augmentation(random_scale=(1.0, 1.0), flip=0.0)


@dataclass
class Listed:
    samples: list
    fingerprint: str = "one"

    @property
    def names(self):
        return [f"{index}.png" for index in range(len(self.samples))]

    def __len__(self):
        return len(self.samples)

    def load(self, index):
        return self.samples[index]


def noise(height, width, seed=0, classes=11):
    draw = np.random.default_rng(seed)
    image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample(image, draw.integers(0, classes, (height, width), dtype=np.uint8))


def coordinates(height, width):
    """Red and blue hold 4 x the row, green 4 x the column, the label the column; at most 63 of each."""
    rows, columns = np.indices((height, width)).astype(np.uint8)
    return Sample(np.stack([4 * rows, 4 * columns, 4 * rows], axis=2), columns.copy())


def cut_out(sample, window, size):
    image, label = np.full((*size, 3), 77, np.uint8), np.full(size, 77, np.uint8)
    cut(sample, window, image, label)
    return image, label


def many_windows(shape, crop, augmentation, count=2000):
    return [draw_window(shape, crop, augmentation, generator(0, index)) for index in range(count)]


# Which part of the image ------------------------------------------------------------------------------------------


def test_a_window_is_the_crop_divided_by_a_factor_drawn_evenly():
    """crop 400x200 at factors 0.5 to 2: heights 800 down to 200, and half the factors lie below 1.25."""
    windows = many_windows((1000, 1000), (400, 200), Augmentation())
    heights = np.array([window.height for window in windows])
    assert heights.min() >= 200
    assert heights.max() <= 800
    factors = 400 / heights
    assert np.histogram(factors, 3, (0.5, 2.0))[0] == pytest.approx(2000 / 3, abs=90)  # four standard deviations
    assert all(abs(window.height - 2 * window.width) <= 2 for window in windows)


def test_windows_lie_anywhere_in_the_image_and_reach_all_its_edges():
    windows = many_windows((20, 30), (16, 24), STILL)
    assert {window.top for window in windows} == set(range(5))
    assert {window.left for window in windows} == set(range(7))


def test_an_image_smaller_than_the_window_lies_anywhere_in_it():
    windows = many_windows((12, 30), (16, 24), STILL)
    assert {window.top for window in windows} == set(range(-4, 1))
    assert {window.left for window in windows} == set(range(7))


def test_flips_come_with_their_probability():
    for probability in (0.0, 0.5, 1.0):
        windows = many_windows((20, 30), (16, 24), Augmentation(flip=probability))
        assert np.mean([window.flip for window in windows]) == pytest.approx(probability, abs=0.05)


# What it looks like -----------------------------------------------------------------------------------------------


def test_a_window_of_the_crops_own_size_is_copied_unchanged():
    sample = noise(30, 40)
    image, label = cut_out(sample, Window(3, 5, 20, 25), (20, 25))
    np.testing.assert_array_equal(image, sample.image[3:23, 5:30])
    np.testing.assert_array_equal(label, sample.label[3:23, 5:30])


def test_a_flip_mirrors_image_and_label():
    sample = noise(30, 40)
    image, label = cut_out(sample, Window(0, 0, 30, 40, flip=True), (30, 40))
    np.testing.assert_array_equal(image, sample.image[:, ::-1])
    np.testing.assert_array_equal(label, sample.label[:, ::-1])


def test_the_source_is_not_changed_and_may_be_read_only():
    sample = noise(64, 96)
    before = Sample(sample.image.copy(), sample.label.copy())
    sample.image.flags.writeable = sample.label.flags.writeable = False
    for window in (Window(0, 0, 64, 96, True), Window(3, 5, 40, 50, True), Window(-20, -30, 128, 192, True)):
        cut_out(sample, window, (64, 96))
    np.testing.assert_array_equal(sample.image, before.image)
    np.testing.assert_array_equal(sample.label, before.label)


def test_every_pixel_of_the_output_is_written():
    sample = Sample(np.zeros((33, 47, 3), np.uint8), np.zeros((33, 47), np.uint8))
    for index in range(200):
        augmentation = Augmentation(random_scale=(0.2, 4.0))
        window = draw_window((33, 47), (40, 40), augmentation, generator(0, index))
        image, label = cut_out(sample, window, (32, 32))
        assert image.max() == 0
        assert set(np.unique(label)) <= {0, IGNORE}


@pytest.mark.parametrize("factor", [0.23, 0.37, 0.6, 0.75, 0.9, 1.0, 1.3, 1.7, 2.0, 3.1])
@pytest.mark.parametrize("flip", [False, True])
def test_image_and_label_stay_aligned_by_pixel_centres(factor, flip):
    """Image and label both hold the column: nearest is off by up to half a source pixel, and on average by nothing."""
    size = (round(60 * factor), round(63 * factor))
    image, label = cut_out(coordinates(60, 63), Window(0, 0, 60, 63, flip), size)
    difference = (image[..., 1] / 4 - label)[:, 2:-2]
    assert np.abs(difference).max() <= 0.7
    assert abs(difference.mean()) < 0.1


def test_rows_and_columns_of_a_shifted_window_land_where_they_belong():
    """Output pixel k is centred on source coordinate start + (k + 0.5) x length / size - 0.5."""
    image, label = cut_out(coordinates(60, 63), Window(20, 11, 30, 45), (48, 72))
    rows = 20 + (np.arange(48) + 0.5) * 30 / 48 - 0.5
    columns = 11 + (np.arange(72) + 0.5) * 45 / 72 - 0.5
    inner = (slice(2, -2), slice(2, -2))
    assert np.abs(image[..., 0] / 4 - rows[:, None])[inner].max() <= 0.2
    assert np.abs(image[..., 1] / 4 - columns[None])[inner].max() <= 0.2
    assert np.abs(label - columns[None])[inner].max() <= 0.51


def test_beyond_the_image_the_label_is_ignore_and_the_image_its_reflection():
    sample = noise(6, 8)
    image, label = cut_out(sample, Window(-2, -3, 10, 14), (10, 14))
    np.testing.assert_array_equal(image, np.pad(sample.image, ((2, 2), (3, 3), (0, 0)), mode="reflect"))
    expected = np.full((10, 14), IGNORE, np.uint8)
    expected[2:8, 3:11] = sample.label
    np.testing.assert_array_equal(label, expected)


def test_an_image_of_one_pixel_fills_a_large_window():
    sample = Sample(np.array([[[1, 2, 3]]], np.uint8), np.array([[4]], np.uint8))
    image, label = cut_out(sample, Window(-3, -7, 16, 16, True), (8, 8))
    assert (image == (1, 2, 3)).all()
    assert sorted(np.unique(label)) == [4, IGNORE]


def test_reducing_by_whole_factors_averages_areas():
    for factor in (2, 3, 4):
        sample = noise(12 * factor, 20 * factor)
        image, label = cut_out(sample, Window(0, 0, 12 * factor, 20 * factor), (12, 20))
        means = sample.image.reshape(12, factor, 20, factor, 3).mean(axis=(1, 3))
        assert np.abs(image - means).max() <= 0.51
        middle = (factor - 1) // 2
        np.testing.assert_array_equal(label, cv2.resize(sample.label, (20, 12), interpolation=cv2.INTER_NEAREST_EXACT))
        if factor % 2:
            np.testing.assert_array_equal(label, sample.label[middle::factor, middle::factor])


@pytest.mark.parametrize("factor", [1.3, 1.5, 1.7, 1.9, 2.3, 2.7, 3.5])
def test_reducing_by_other_factors_is_nearer_to_averaged_areas_than_interpolation_is(factor):
    """Noise is the hardest case: plain bilinear interpolation keeps more of it than there is room for."""
    sample = noise(400, 600)
    size = (round(400 / factor), round(600 / factor))
    image, _ = cut_out(sample, Window(0, 0, 400, 600), size)
    areas = cv2.resize(sample.image, size[::-1], interpolation=cv2.INTER_AREA).astype(float)
    aliased = cv2.resize(sample.image, size[::-1], interpolation=cv2.INTER_LINEAR)
    assert image.std() < 0.9 * aliased.std()
    assert np.abs(image - areas).mean() < np.abs(aliased - areas).mean()


def test_both_sides_may_be_resized_differently():
    """To a multiple of the stride: 50x60 to 16x24 reduces by 3.125 and 2.5, so areas of 2x2 are averaged first."""
    sample = coordinates(50, 60)
    image, label = np.empty((16, 24, 3), np.uint8), np.empty((16, 24), np.uint8)
    resize(sample.image, sample.label, image, label)
    rows, columns = ((np.arange(size) + 0.5) * factor - 0.5 for size, factor in ((16, 3.125), (24, 2.5)))
    assert np.abs(image[..., 0] / 4 - rows[:, None])[1:-1].max() < 0.3
    assert np.abs(image[..., 1] / 4 - columns[None])[:, 1:-1].max() < 0.3
    assert np.abs(label - columns[None]).max() <= 0.51


def test_labels_are_never_mixed():
    label = np.random.default_rng(0).choice(np.array([0, 10, IGNORE], np.uint8), (90, 120))
    sample = Sample(np.zeros((90, 120, 3), np.uint8), label)
    for index in range(50):
        window = draw_window((90, 120), (90, 120), Augmentation(), generator(1, index))
        assert set(np.unique(cut_out(sample, window, (64, 96))[1])) <= {0, 10, IGNORE}


def test_the_result_depends_neither_on_memory_nor_on_threads():
    """The same to the last bit in a worker without threads and in the main process, and after a restart."""
    sample = noise(180, 240)
    threads = cv2.getNumThreads()
    try:
        for index in range(12):
            window = draw_window((180, 240), (160, 224), Augmentation(random_scale=(0.3, 3.0)), generator(3, index))
            results = set()
            for offset, num_threads in ((0, 0), (1, 1), (7, 2), (16, 4)):
                cv2.setNumThreads(num_threads)
                memory = np.empty(4 * 180 * 240 + 64, np.uint8)[offset:]
                image = memory[: 3 * 180 * 240].reshape(180, 240, 3)
                label = memory[3 * 180 * 240 : 4 * 180 * 240].reshape(180, 240)
                image[:], label[:] = sample
                results.add(b"".join(out.tobytes() for out in cut_out(Sample(image, label), window, (128, 160))))
            assert len(results) == 1
    finally:
        cv2.setNumThreads(threads)


# Batches ----------------------------------------------------------------------------------------------------------


def draws_of(*indices, size=(64, 96), **how):
    return [Draw(index, size, **how) for index in indices]


def test_a_batch_has_the_draws_size_weights_names_and_memory_format():
    source = Listed([noise(80, 120, seed) for seed in range(4)])
    draws = [Draw(2, (64, 96), weight=1.5, progress=0.25), Draw(0, (64, 96), weight=0.5, progress=0.25)]
    batch = make_batch(source, draws, (64, 96), Augmentation(), seed=0)
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.images.dtype == batch.labels.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.shape == (2, 64, 96)
    assert batch.weights.tolist() == [1.5, 0.5]
    assert batch.names == ("2.png", "0.png")
    assert (batch.progress, batch.decodes) == (0.25, 0)


def test_images_of_many_sizes_form_one_batch():
    sizes = [(80, 120), (300, 20), (64, 96), (9, 7), (500, 700)]
    source = Listed([noise(*size) for size in sizes])
    batch = make_batch(source, draws_of(*range(5)), (64, 96), Augmentation(), seed=0)
    assert batch.images.shape == (5, 3, 64, 96)


def test_what_a_draw_shows_does_not_depend_on_its_companions():
    source = Listed([noise(80, 120, seed) for seed in range(4)])
    augmentation = Augmentation(color=0.5)
    together = make_batch(source, draws_of(0, 1, 2, 3), (64, 96), augmentation, seed=5)
    for index in range(4):
        alone = make_batch(source, draws_of(index), (64, 96), augmentation, seed=5)
        assert torch.equal(alone.images[0], together.images[index])
        assert torch.equal(alone.labels[0], together.labels[index])


def test_a_batch_is_the_same_with_any_number_of_threads(monkeypatch):
    source = Listed([noise(80, 120, seed) for seed in range(7)])
    batches = []
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(transforms, "num_threads", lambda threads=threads: threads)
        batches.append(make_batch(source, draws_of(*range(7)), (64, 96), Augmentation(), seed=5))
    for batch in batches[1:]:
        assert torch.equal(batch.images, batches[0].images)
        assert torch.equal(batch.labels, batches[0].labels)


@pytest.mark.parametrize("bad", [0, 1, 4])
def test_an_image_that_cannot_be_loaded_is_an_error_in_whichever_thread_it_is(monkeypatch, bad):
    class Broken(Listed):
        def load(self, index):
            if index == bad:
                raise ValueError(f"{index}.png is damaged")
            return super().load(index)

    monkeypatch.setattr(transforms, "num_threads", lambda: 3)
    with pytest.raises(ValueError, match=f"{bad}.png is damaged"):
        make_batch(Broken([noise(80, 120)] * 5), draws_of(*range(5)), (64, 96), Augmentation(), seed=5)


@pytest.mark.parametrize("other", [{"epoch": 1}, {"occurrence": 1}, {"seed": 1}])
def test_another_epoch_occurrence_or_seed_shows_another_part(other):
    source = Listed([noise(80, 120)])
    seed = other.pop("seed", 0)
    first = make_batch(source, draws_of(0), (64, 96), Augmentation(), seed=0)
    second = make_batch(source, draws_of(0, **other), (64, 96), Augmentation(), seed=seed)
    assert not torch.equal(first.images, second.images)


def test_a_downsampled_draw_shows_the_same_part_of_the_image():
    """At half the size the same window: the size changes what is paid for, not what is looked at.

    Coordinates agree to one source pixel: at reductions by 3 to 4, up to one is cut off at an edge.
    """
    source = Listed([coordinates(60, 63)])
    for epoch in range(20):
        full = make_batch(source, draws_of(0, size=(16, 24), epoch=epoch), (16, 24), Augmentation(), 0)
        half = make_batch(source, draws_of(0, size=(8, 12), epoch=epoch), (16, 24), Augmentation(), 0)
        means = full.images[0].float().view(3, 8, 2, 12, 2).mean((2, 4))
        assert ((half.images[0].float() - means) / 4).abs()[:, 1:-1, 1:-1].max() <= 1.1


def test_draws_of_different_sizes_are_refused():
    source = Listed([noise(80, 120)])
    with pytest.raises(ValueError, match="one size"):
        make_batch(source, [Draw(0, (64, 96)), Draw(0, (32, 64))], (64, 96), STILL, 0)


def test_a_batch_counts_the_files_decoded_for_it(monkeypatch):
    class Decoding(Listed):
        def load(self, index):
            image_files._count_decode()
            return super().load(index)

    source = Decoding([noise(80, 120)] * 3)
    assert make_batch(source, draws_of(0, 1, 2), (64, 96), STILL, 0).decodes == 3
    assert EvaluationImages(source)[0].decodes == 1


def as_it_is(batch):
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_same_batches_with_and_without_workers(workers):
    source = Listed([noise(80, 120, seed) for seed in range(8)])
    images = TrainingImages(source, (64, 96), Augmentation(color=0.3), seed=3)
    batches = [draws_of(0, 3, 5), draws_of(7, 1, size=(32, 64), epoch=1)]
    loader = DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=as_it_is,
        num_workers=workers,
        worker_init_fn=worker_init if workers else None,
    )
    for draws, batch in zip(batches, loader, strict=True):
        expected = make_batch(source, draws, (64, 96), images.augmentation, 3)
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.labels, expected.labels)
        assert batch.names == expected.names
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_training_images_survive_pickling_and_keep_no_state():
    images = TrainingImages(Listed([noise(80, 120)]), (64, 96), Augmentation(color=0.3), seed=3)
    first = images[Draw(0, (64, 96))]
    again = pickle.loads(pickle.dumps(images))[Draw(0, (64, 96))]
    assert torch.equal(first.images, again.images)
    assert len(images) == 1


# Colours ----------------------------------------------------------------------------------------------------------


def test_colors_change_the_image_alone_and_only_when_asked_for():
    source = Listed([noise(80, 120)])
    plain = make_batch(source, draws_of(0), (64, 96), Augmentation(), 0)
    colored = make_batch(source, draws_of(0), (64, 96), Augmentation(color=1.0), 0)
    assert torch.equal(plain.labels, colored.labels)
    assert not torch.equal(plain.images, colored.images)
    assert colored.images.is_contiguous(memory_format=torch.channels_last)


def test_stronger_colors_change_more():
    source = Listed([noise(80, 120)])
    plain = make_batch(source, draws_of(0), (64, 96), STILL, 0).images.float()
    changes = []
    for strength in (0.1, 0.4, 1.0):
        augmentation = Augmentation(random_scale=(1.0, 1.0), flip=0.0, color=strength)
        changed = [make_batch(source, draws_of(0, epoch=e), (64, 96), augmentation, 0).images for e in range(10)]
        plains = [make_batch(source, draws_of(0, epoch=e), (64, 96), STILL, 0).images for e in range(10)]
        pairs = zip(changed, plains, strict=True)
        changes.append(np.mean([(one.float() - other.float()).abs().mean() for one, other in pairs]))
    assert changes == sorted(changes)
    assert changes[0] > 0
    assert plain.shape == (1, 3, 64, 96)


def test_albumentations_is_imported_late_and_does_not_ask_the_network():
    script = """
import sys
import urllib.request
import datamodules.transforms as transforms
assert "albumentations" not in sys.modules
asked = []
urllib.request.OpenerDirector.open = lambda *args, **how: asked.append(args) or 1 / 0
transforms._color_jitter(0.5)
assert "albumentations" in sys.modules
assert not asked, asked
"""
    without = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=without)
    assert done.returncode == 0, done.stderr


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_scale": (2.0, 0.5)}, "random_scale is"),
        ({"random_scale": (0.0, 1.0)}, "above 0"),
        ({"random_scale": (0.5, float("inf"))}, "two numbers"),
        ({"random_scale": (0.5, 1.0, 2.0)}, "two numbers"),
        ({"flip": 1.5}, "flip is 1.5; a number from 0 to 1"),
        ({"color": -0.1}, "color is -0.1"),
        ({"flip": float("nan")}, "flip is nan"),
    ],
)
def test_options_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


# Whole images -----------------------------------------------------------------------------------------------------


def test_evaluation_images_are_whole_and_unchanged():
    source = Listed([noise(30, 40), noise(50, 20)])
    images = EvaluationImages(source)
    assert len(images) == 2
    batch = images[1]
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0).numpy(), source.samples[1].image)
    np.testing.assert_array_equal(batch.labels[0].numpy(), source.samples[1].label)
    assert batch.names == ("1.png",)
    assert batch.weights.tolist() == [1.0]
    batch.images.zero_()
    assert source.samples[1].image.any()  # the source keeps its pixels
    with pytest.raises(IndexError):
        images[2]


def test_evaluation_at_half_the_resolution_keeps_the_labels_size():
    sample = noise(30, 40)
    batch = EvaluationImages(Listed([sample]), resolution=0.5)[0]
    assert batch.images.shape == (1, 3, 15, 20)
    assert batch.labels.shape == (1, 30, 40)
    means = sample.image.reshape(15, 2, 20, 2, 3).mean(axis=(1, 3))
    assert np.abs(batch.images[0].permute(1, 2, 0).numpy() - means).max() <= 0.51
    with pytest.raises(ValueError, match="resolution is 0"):
        EvaluationImages(Listed([sample]), resolution=0)
