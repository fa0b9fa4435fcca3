"""Training that begins with the weights of another run."""

from dataclasses import replace

import pytest
import torch

from dance_seg.build import build_model, load_run, take_weights, train
from dance_seg.part import Part
from datamodules import build_datamodule
from tests.tiny import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    recipe = tiny("trainer.max_epochs=1", cache=folder / "cache")
    return train(recipe, build_datamodule(recipe), folder / "run"), folder / "cache"


def test_a_network_takes_what_fits_and_keeps_its_own_rest(run):
    folder, _ = run
    given = load_run(folder)[0].state_dict()
    other = build_model(tiny(), 5)  # another number of classes: its head is its own
    own = {name: value.clone() for name, value in other.state_dict().items()}
    said = take_weights(other, str(folder))
    assert "not network.segmentation_head.0.weight" in said or "not network.segmentation_head.0.bias" in said
    for name, value in other.state_dict().items():
        assert torch.equal(value, given[name] if given[name].shape == value.shape else own[name]), name


def test_training_starts_where_the_run_ended(run, tmp_path):
    folder, cache = run
    recipe = tiny(f"start_from={folder}", "trainer.max_epochs=1", "optimizer.lr=1e-12", "seed=4", cache=cache)
    datamodule = build_datamodule(recipe)
    done = train(recipe, datamodule, tmp_path / "second")
    first, second = (dict(load_run(one)[0].named_parameters()) for one in (folder, done))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_a_run_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"start_from: runs/gone: no such run"):
        take_weights(build_model(tiny(), 11), "runs/gone")


def test_a_run_of_another_model_is_refused(run):
    folder, _ = run
    other = build_model(replace(tiny(), model=Part("jitnet", {"width": 0.25})), 11)
    with pytest.raises(ValueError, match="start_from: only 0% of this network's weights fit"):
        take_weights(other, str(folder))
