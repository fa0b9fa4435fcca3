import numpy as np
import pytest

from dance_seg.data_slimming.adaptive import AdaptiveResolution, quantile_among, scale_of
from dance_seg.data_slimming.complexity import complexity, quantiles
from dance_seg.data_slimming.plan import DataSlimming
from dance_seg.recipe import adaptive_of, recipe_record
from dance_seg.sample import Sample
from tests.tiny import tiny

FLAT = np.full((64, 64, 3), 90, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
EDGE = np.zeros((64, 64, 3), np.uint8)
EDGE[:, 32:] = 255
OPTIONS = DataSlimming(scales=(0.5, 0.75, 1.0), quantiles=(0.4, 0.8), inference="adaptive")


def test_a_training_image_has_the_quantile_it_trained_with():
    values = np.array([30.0, 10.0, 20.0, 10.0])
    assert [quantile_among(value, np.sort(values)) for value in values] == quantiles(values).tolist()


def test_the_more_complex_an_image_the_larger_it_is_shown():
    label = np.zeros((64, 64), np.uint8)
    trained_on = [complexity("spatial_information", Sample(image, label), "") for image in (NOISE, FLAT, EDGE)]
    adaptive = AdaptiveResolution(OPTIONS, np.array(trained_on))  # quantiles 5/6, 1/6 and 3/6
    assert [adaptive.scale(image, "a.png") for image in (NOISE, FLAT, EDGE)] == [1.0, 0.5, 0.75]
    scales = [scale_of(quantile, OPTIONS) for quantile in np.linspace(0, 1, 21)]
    assert scales == sorted(scales)


def test_what_is_simpler_or_more_complex_than_all_of_training_has_an_end_of_the_scales():
    assert AdaptiveResolution(OPTIONS, np.array([1e6])).scale(NOISE, "a.png") == 0.5
    assert AdaptiveResolution(OPTIONS, np.array([-1.0])).scale(FLAT, "a.png") == 1.0


def test_the_random_control_looks_at_the_name_alone():
    adaptive = AdaptiveResolution(DataSlimming(measure="random", inference="adaptive"), np.linspace(0, 1, 101), seed=3)
    names = [f"{number}.png" for number in range(200)]
    scales = [adaptive.scale(FLAT, name) for name in names]
    assert scales == [adaptive.scale(NOISE, name) for name in names]
    assert {scale: round(scales.count(scale) / 200, 1) for scale in set(scales)} == {0.5: 0.4, 0.75: 0.4, 1.0: 0.2}


def test_labels_cannot_say_how_complex_an_image_is_at_inference():
    with pytest.raises(ValueError, match="no labels at inference"):
        DataSlimming(measure="label_boundary_density", inference="adaptive")


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_without_the_complexity_of_training_there_is_no_quantile(values):
    with pytest.raises(ValueError, match="complexity of the training images"):
        AdaptiveResolution(OPTIONS, np.array(values))


def test_a_checkpoint_record_says_how_its_network_infers():
    recipe = recipe_record(tiny("data_slimming.inference=adaptive", slim=True))
    adaptive = adaptive_of({"recipe": recipe, "complexity": [3.0, 1.0]})
    assert adaptive.complexity.tolist() == [1.0, 3.0]
    assert adaptive_of({"recipe": recipe_record(tiny(slim=True)), "complexity": [1.0]}) is None
    assert adaptive_of({"recipe": recipe_record(tiny()), "complexity": None}) is None
    with pytest.raises(ValueError, match="inference=full"):
        adaptive_of({"recipe": recipe, "complexity": None})
