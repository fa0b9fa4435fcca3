"""A run that learns from another's soft labels: its loss by hand, its cost, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from dance_seg.build import build_model, build_module, load_run, train
from dance_seg.cost.macs import count_macs
from dance_seg.losses import Loss, SoftLabels, per_sample_loss, soft_label_loss
from dance_seg.module import SegmentationModule
from dance_seg.part import Part
from dance_seg.sample import Batch
from datamodules import build_datamodule
from tests.dance_seg.early_exit.toy import CLASSES, Toy
from tests.tiny import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    recipe = tiny("trainer.max_epochs=1", cache=folder / "cache")
    return train(recipe, build_datamodule(recipe), folder / "run"), folder / "cache"


@pytest.mark.parametrize("model", [torch.nn.Conv2d(3, CLASSES, 1), Toy()], ids=["one exit", "three exits"])
def test_the_loss_adds_the_distance_from_the_teacher_at_every_exit(model, monkeypatch):
    torch.manual_seed(0)
    by_whom = torch.nn.Conv2d(3, CLASSES, 1)
    module = SegmentationModule(
        model, classes=["a"] * CLASSES, soft_labels=SoftLabels(teacher="x", weight=0.5, temperature=3), teacher=by_whom
    )
    for name in ("log", "log_dict", "_learning_rate"):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: 0.0)
    images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))
    loss = module.training_step(Batch(images, labels, torch.tensor([1.0, 2.0]), ("a", "b")), 0)
    exits = model(images).logits if isinstance(model, Toy) else (model(images),)
    hard = sum(per_sample_loss(logits, labels, Loss()) for logits in exits)
    soft = sum(soft_label_loss(logits, by_whom(images), labels, 3) for logits in exits) / len(exits)
    expected = ((hard + 0.5 * soft) * torch.tensor([1.0, 2.0])).sum() / 2
    assert torch.allclose(loss, expected)
    loss.backward()
    assert all(parameter.grad is None for parameter in by_whom.parameters())
    assert not any("teacher" in name for name in module.state_dict())


def test_a_taught_run_pays_for_its_teacher(teacher, tmp_path):
    folder, cache = teacher
    recipe = tiny(f"soft_labels.teacher={folder}", "trainer.max_epochs=1", "seed=1", cache=cache)
    datamodule = build_datamodule(recipe)
    done = train(recipe, datamodule, tmp_path / "taught")
    spent = json.loads((done / "cost.json").read_text())["training"]
    each = count_macs(load_run(folder)[0], (64, 64)).macs
    assert spent["cost/teacher_gmacs"] * 1e9 == pytest.approx(each * spent["cost/images_paid"])
    parts = sum(spent[f"cost/{kind}_gmacs"] for kind in ("forward", "backward", "teacher", "batch_norm"))
    assert spent["cost/train_gmacs"] == pytest.approx(parts)


def test_teachers_that_cannot_teach_are_refused(teacher):
    folder, cache = teacher
    recipe = tiny("soft_labels.teacher=runs/nobody", cache=cache)
    datamodule = build_datamodule(recipe)
    with pytest.raises(ValueError, match=r"soft_labels\.teacher: runs/nobody: no such run"):
        build_module(recipe, build_model(recipe, 11), datamodule)
    recipe = replace(recipe, soft_labels=SoftLabels(teacher=str(folder)))
    other = build_datamodule(replace(recipe, data=Part("shapes", {**recipe.data.args})))
    other.label_table = replace(datamodule.label_table, classes=(*datamodule.classes[:-1], "horse"))
    with pytest.raises(ValueError, match=r"tells .* apart; the data has .*horse"):
        build_module(recipe, build_model(recipe, 11), other)
    with pytest.raises(ValueError, match=r"soft_labels\.weight is 0"):
        SoftLabels(teacher="x", weight=0)
