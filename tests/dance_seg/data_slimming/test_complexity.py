import inspect
import os
from pathlib import Path
from typing import get_args, get_type_hints

import cv2
import numpy as np
import pytest

from dance_seg.data_slimming import complexity as measures
from dance_seg.data_slimming.complexity import (
    MEASURES,
    check_measure,
    classes_in,
    complexity,
    entropy,
    jpeg_bytes,
    label_boundary_density,
    quantiles,
    reference_image,
    spatial_information,
)
from dance_seg.data_slimming.plan import DataSlimming
from dance_seg.sample import Sample


def noise(height, width, seed=0, smooth=0.0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(pixels, (0, 0), smooth) if smooth else pixels


def gradient_in_numpy(image):
    """G by the definition in METHODS' words, in float64: Y in [0, 1], Sobel by its nine taps, border by reflection."""
    y = (0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]) / 255
    height, width = y.shape
    padded = np.pad(y, 1, mode="reflect")
    kernel = np.outer([1, 2, 1], [-1, 0, 1])

    def correlate(weights):
        return sum(weights[i, j] * padded[i : i + height, j : j + width] for i in range(3) for j in range(3))

    return np.sqrt(correlate(kernel) ** 2 + correlate(kernel.T) ** 2)


@pytest.mark.parametrize("size", [(360, 480), (517, 333), (1024, 2048), (3, 5), (1, 9), (9, 1), (2, 2)])
@pytest.mark.parametrize("smooth", [0.0, 3.0])
def test_spatial_information_equals_the_formula_in_numpy(size, smooth):
    image = noise(*size, smooth=smooth)
    gradient = gradient_in_numpy(image)
    assert spatial_information(image) == pytest.approx(gradient.mean(), rel=1e-6, abs=1e-12)
    assert spatial_information(image, "rms") == pytest.approx(np.sqrt((gradient**2).mean()), rel=1e-6, abs=1e-12)
    assert spatial_information(image, "std") == pytest.approx(gradient.std(), rel=1e-6, abs=1e-12)


def test_faint_edges_are_as_exact_as_strong_ones():
    """One blue level on grey 100: float32 in [0, 1] would be wrong by more than 1e-5."""
    image = np.full((360, 480, 3), 100, np.uint8)
    image[:, ::7, 2] += 1
    assert spatial_information(image) == pytest.approx(gradient_in_numpy(image).mean(), rel=1e-7)


def test_the_same_image_scores_the_same_to_the_last_bit_wherever_it_lies_in_memory():
    image = noise(300, 411)
    scores, kept = set(), []
    for offset in range(0, 128, 7):
        memory = np.empty(image.nbytes + 4096, np.uint8)
        kept.append((memory, np.empty(offset * 50 + 1)))  # what is allocated next lies elsewhere too
        moved = memory[offset : offset + image.nbytes].reshape(image.shape)
        moved[:] = image
        for statistic in ("mean", "rms", "std"):
            scores.add(spatial_information(moved, statistic))
        scores.add(complexity("spatial_information", Sample(moved, moved[..., 0]), ""))
    assert len(scores) == 4


def test_one_bright_pixel_by_hand():
    """White on black in the middle of 5x5: G is 2 at the 4 sides, sqrt 2 at the 4 corners, 0 at the pixel itself."""
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 2] = 255
    assert spatial_information(image) == pytest.approx((4 * 2 + 4 * np.sqrt(2)) / 25, rel=1e-6)


def test_the_border_reflects_and_adds_no_edge():
    """A ramp across of one level per pixel: G = 8 / 255 inside, 0 in the two columns whose neighbours mirror."""
    ramp = np.repeat(np.arange(10, dtype=np.uint8)[None, :, None], 7, axis=0).repeat(3, axis=2)
    assert spatial_information(ramp) == pytest.approx(8 / 255 * 8 / 10, rel=1e-6)


@pytest.mark.parametrize("measure", ["spatial_information", "entropy"])
def test_a_flat_image_has_complexity_zero_exactly(measure):
    for seed in range(20):
        random = np.random.default_rng(seed)
        height, width = random.integers(1, 700, 2)
        image = np.broadcast_to(random.integers(0, 256, 3, dtype=np.uint8), (height, width, 3)).copy()
        if measure == "spatial_information":
            assert spatial_information(image) == 0
        assert complexity(measure, Sample(image, image[..., 0]), "") == 0


@pytest.mark.parametrize("measure", ["spatial_information", "entropy", "jpeg_bytes"])
def test_complexity_grows_with_added_texture(measure):
    texture = np.random.default_rng(0).normal(0, 1, (256, 320, 1))
    scores = []
    for strength in (0, 2, 5, 10, 20, 40):
        image = np.clip(128 + strength * texture, 0, 255).astype(np.uint8).repeat(3, axis=2)
        scores.append(complexity(measure, Sample(image, image[..., 0]), ""))
    assert scores == sorted(set(scores))


@pytest.mark.parametrize("size", [(384, 512), (512, 683), (768, 1024)])
def test_storing_an_image_at_another_resolution_changes_its_complexity_by_less_than_five_percent(size):
    """A scene whose detail survives at the reference size: what finer pixels alone can show is lost to both."""
    scene = np.zeros((1024, 1365, 3))
    for seed, cell in ((1, 32), (2, 64), (3, 128)):
        grid = np.random.default_rng(seed).uniform(0, 80, (1024 // cell + 1, 1365 // cell + 1, 3))
        scene += cv2.resize(grid, (1365, 1024), interpolation=cv2.INTER_CUBIC)
    scene = np.clip(scene, 0, 255).astype(np.uint8)
    label = np.zeros(scene.shape[:2], np.uint8)
    stored = cv2.resize(scene, size[::-1], interpolation=cv2.INTER_AREA)
    original = complexity("spatial_information", Sample(scene, label), "")
    assert complexity("spatial_information", Sample(stored, label), "") == pytest.approx(original, rel=0.05)
    assert spatial_information(stored) < 0.8 * spatial_information(reference_image(scene))  # not so without the size


def test_the_reference_size_is_reached_from_above_only():
    assert reference_image(noise(1024, 2048)).shape == (256, 512, 3)
    assert reference_image(noise(480, 360)).shape == (341, 256, 3)
    small = noise(255, 900)
    assert reference_image(small) is small


def test_the_reference_image_averages_areas():
    image = noise(512, 1024)
    means = image.reshape(256, 2, 512, 2, 3).mean(axis=(1, 3))
    assert np.abs(reference_image(image) - means).max() <= 0.5


def test_entropy_by_hand():
    """Four grey levels, equally often: 2 bits. Probabilities 1/2, 1/4, 1/4: 1.5 bits."""
    grey = np.array([[0, 50, 100, 200]], np.uint8)
    assert entropy(grey[..., None].repeat(3, 2)) == pytest.approx(2)
    grey = np.array([[0, 0, 100, 200]], np.uint8)
    assert entropy(grey[..., None].repeat(3, 2)) == pytest.approx(1.5)


def test_jpeg_bytes_rise_with_quality_and_refuse_a_wrong_one():
    image = noise(64, 64, smooth=1.0)
    assert 0 < jpeg_bytes(image, 50) < jpeg_bytes(image, 90)
    assert jpeg_bytes(image) == jpeg_bytes(image)
    with pytest.raises(ValueError, match="quality is 0"):
        jpeg_bytes(image, 0)


def test_label_boundary_density_counts_pairs_and_leaves_out_ignored_pixels():
    """3x3 with one other pixel in the middle: 4 of 12 pairs differ. With an ignored corner 2 pairs fall away."""
    label = np.zeros((3, 3), np.uint8)
    label[1, 1] = 4
    assert label_boundary_density(label) == pytest.approx(4 / 12)
    label[0, 0] = 255
    assert label_boundary_density(label) == pytest.approx(4 / 10)
    assert label_boundary_density(np.full((5, 5), 255, np.uint8)) == 0


def test_random_depends_on_name_and_seed_alone_and_is_spread_evenly():
    scores = np.array([measures.random(f"{i}.png") for i in range(4000)])
    assert measures.random("1.png") == scores[1]
    assert measures.random("1.png", seed=1) != scores[1]
    assert ((scores >= 0) & (scores < 1)).all()
    assert np.histogram(scores, 4, (0, 1))[0] == pytest.approx(1000, abs=120)  # four standard deviations


def test_every_measure_scores_a_sample_at_the_reference_size():
    """A label whose pixels alternate: 1 at its own size, 0 once every second pixel is taken."""
    image = noise(512, 512, smooth=2.0)
    alternating = (np.indices((512, 512)).sum(axis=0) % 2).astype(np.uint8)
    for measure in MEASURES:
        assert np.isfinite(complexity(measure, Sample(image, alternating), "a.png"))
    assert label_boundary_density(alternating) == 1
    assert complexity("label_boundary_density", Sample(image, alternating), "") == 0
    assert complexity("jpeg_bytes", Sample(image, alternating), "") == jpeg_bytes(reference_image(image))


def test_the_measures_are_those_a_recipe_may_name():
    assert set(MEASURES) == set(get_args(get_type_hints(DataSlimming)["measure"]))


def test_unknown_measures_and_options_are_refused_with_the_choice():
    with pytest.raises(ValueError, match="'sobel'; choose one of spatial_information, entropy"):
        check_measure("sobel", {})
    with pytest.raises(ValueError, match="spatial_information takes no option 'seed'; it takes: statistic"):
        check_measure("spatial_information", {"seed": 1})
    for measure, entry in MEASURES.items():
        check_measure(measure, dict.fromkeys(list(inspect.signature(entry.function).parameters)[1:], 0))


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_spatial_information_refuses_what_is_not_an_image(image):
    with pytest.raises(ValueError, match="RGB uint8 image"):
        spatial_information(image)


def test_spatial_information_refuses_an_unknown_statistic():
    with pytest.raises(ValueError, match="statistic is 'median'; choose mean, rms or std"):
        spatial_information(noise(4, 4), "median")


def test_quantiles_are_mean_ranks_minus_one_half_over_n():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).integers(0, 30, 200).astype(float)
    expected = (scipy_stats.rankdata(values, method="average") - 0.5) / 200
    np.testing.assert_allclose(quantiles(values), expected, rtol=1e-12)


def test_a_share_q_of_distinct_images_lies_below_the_quantile_q():
    values = np.random.default_rng(0).permutation(100).astype(float)
    for q in (0.1, 0.4, 0.8):
        assert (quantiles(values) < q).sum() == 100 * q


def test_quantiles_of_equal_values_of_one_and_of_none():
    assert quantiles(np.full(7, 3.0)).tolist() == [0.5] * 7
    assert quantiles(np.array([2.0])).tolist() == [0.5]
    assert quantiles(np.array([])).size == 0
    with pytest.raises(ValueError, match="image 1 is nan"):
        quantiles(np.array([1.0, np.nan]))


def test_classes_in_a_label_leave_out_ignore():
    assert classes_in(np.array([[7, 0, 255], [7, 254, 0]], np.uint8)).tolist() == [0, 7, 254]
    assert classes_in(np.full((2, 2), 255, np.uint8)).size == 0


@pytest.mark.data
def test_values_equal_numpy_on_real_images():
    for path in sorted(Path(os.environ["DANCE_SEG_CAMVID"], "train").glob("*.png"))[::40]:
        image = cv2.imread(str(path))[..., ::-1].copy()
        assert spatial_information(image) == pytest.approx(gradient_in_numpy(image).mean(), rel=1e-6)
