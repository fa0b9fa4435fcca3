"""A run of a supernet: trained, continued in the middle of an epoch, paid for network by network."""

import shutil
from dataclasses import replace

import pytest
import torch

from dance_seg.build import build_model, build_module, train
from dance_seg.checkpoint import load_checkpoint, newest_valid
from dance_seg.models.multi_stage import MultiStageSupernet
from dance_seg.part import Part
from dance_seg.recipe import save_recipe
from dance_seg.supernet.macs import SubnetMacs
from dance_seg.supernet.sampling import Sampling, subnets_of_step
from datamodules import build_datamodule
from tests.test_resume import assert_same, final, keeping_checkpoints
from tests.tiny import tiny

# Three steps an epoch: kernels open at the second step, widths in the middle of the second epoch of two.
SUPERNET = (
    "supernet.drawn=1",
    "supernet.distillation=1.0",
    "supernet.phases=[kernel,width]",
    "supernet.start=0.1",
    "supernet.end=0.8",
    "data.args.num_train=12",
    "trainer.max_epochs=2",
    "trainer.ema=0.9",
    "trainer.save_every_minutes=0",
)


def supernet_recipe(*overrides, cache, name="multi_stage_supernet"):
    recipe = tiny(*SUPERNET, *overrides, cache=cache)
    return replace(recipe, model=Part(name, {"size": "tiny"}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipe, the run, and all the checkpoints that it wrote."""
    folder = tmp_path_factory.mktemp("supernet")
    return keeping_checkpoints(supernet_recipe(cache=folder / "cache"), folder)


def steps_of(recipe):
    """The networks of each of the six steps, each at its progress."""
    space = build_model(recipe, 11).space
    return [subnets_of_step(space, recipe.supernet, recipe.seed, step, step / 6) for step in range(6)]


def test_the_ledger_holds_the_macs_of_every_network_that_ran(trained):
    recipe, folder, _ = trained
    macs = SubnetMacs(MultiStageSupernet(11, "tiny"))
    each = [[macs.training(subnet, (64, 64), images=4) for subnet in subnets] for subnets in steps_of(recipe)]
    assert [len(of_step) for of_step in each].count(3) > 2
    ledger = final(folder)["callbacks"]["CostLedger"]
    assert ledger["forward_macs"] == sum(one.forward for of_step in each for one in of_step)
    assert ledger["backward_macs"] == sum(one.backward for of_step in each for one in of_step)


def test_resuming_ends_with_the_same_weights_before_and_after_channels_were_sorted(trained, tmp_path):
    recipe, folder, kept = trained
    told = {path: load_checkpoint(path)["kinds_sorted"] for path in kept}
    before, after = (max(p for p in kept if not told[p]), min(p for p in kept if told[p]))
    assert before.name < after.name < kept[-1].name
    for path in (before, after):
        target = tmp_path / path.stem
        (target / "checkpoints").mkdir(parents=True)
        shutil.copy(path, target / "checkpoints")
        save_recipe(recipe, target / "recipe.yaml")
        train(recipe, build_datamodule(recipe), target)
        assert_same(final(folder), final(target))


def test_sorting_channels_leaves_the_largest_network_and_its_average_as_they_are(tmp_path):
    recipe = supernet_recipe(cache=tmp_path)
    datamodule = build_datamodule(recipe)
    torch.manual_seed(0)
    module = build_module(recipe, build_model(recipe, len(datamodule.classes)), datamodule)
    for layer in module.model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight)
    module.optimizers = lambda use_pl_optimizer: torch.optim.AdamW(module.model.parameters())
    module.average.follow(module.model)
    images = torch.randn(1, 3, 64, 64)
    models = (module.model.eval(), module.average.model.eval())
    smallest = module.model.space.smallest
    with torch.no_grad():
        before = [model(images) for model in models]
        small = module.model.extract(smallest)(images)
        module._sort_channels("width")
        for model, logits in zip(models, before, strict=True):
            torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(module.model.extract(smallest)(images), small, atol=1e-4)
    assert module.kinds_sorted == ["width"]


@pytest.mark.slow
def test_networks_that_share_a_pass_train_and_cost_what_the_largest_does(tmp_path):
    changes = ["supernet.method=multi_architectural", "supernet.distillation=0", "supernet.phases=[mlp]"]
    recipe = supernet_recipe(*changes, "supernet.drawn=2", cache=tmp_path / "cache", name="vit_resnas_supernet")
    train(recipe, build_datamodule(recipe), tmp_path / "run")
    _, checkpoint = newest_valid(tmp_path / "run" / "checkpoints", "step-*.ckpt")
    macs = SubnetMacs(build_model(recipe, 11))
    largest = macs.training(macs.model.space.largest, (64, 64), images=4)
    ledger = checkpoint["callbacks"]["CostLedger"]
    assert ledger["forward_macs"] == pytest.approx(6 * largest.forward, rel=1e-3)
    assert ledger["backward_macs"] == pytest.approx(6 * largest.backward, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["network_slimming.keep=0.5", "network_slimming.end=0.5"], "network_slimming has no place beside supernet"),
        (["trainer.compile=true"], "trainer.compile and trainer.execution=auto have no place beside supernet"),
        (["trainer.execution=auto"], "trainer.compile and trainer.execution=auto have no place beside supernet"),
        (["supernet.method=single", "supernet.distillation=0", "trainer.devices=2"], "set trainer.devices=1"),
        (
            ["supernet.method=multi_architectural", "supernet.distillation=0"],
            r"3 networks share a batch of 4 images .* set supernet.drawn=0, or data.args.batch_size to 3",
        ),
        (["supernet.method=sandwitch"], "supernet.method"),
    ],
)
def test_what_does_not_go_with_many_networks_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(*SUPERNET, *changes)


def test_a_single_network_is_no_supernet_and_phases_must_open_something(tmp_path):
    recipe = tiny(*SUPERNET, cache=tmp_path)
    datamodule = build_datamodule(recipe)
    with pytest.raises(ValueError, match="the model is a single network; name a model that holds many"):
        build_module(recipe, build_model(recipe, 11), datamodule)
    several = supernet_recipe("supernet.phases=[heads]", cache=tmp_path)
    with pytest.raises(ValueError, match="names 'heads', and no choice of this search space ends so"):
        build_module(several, build_model(several, 11), datamodule)
    synchronised = supernet_recipe("trainer.sync_batchnorm=true", cache=tmp_path)
    with pytest.raises(ValueError, match="those of multi_stage_supernet run at several widths; set it to false"):
        build_module(synchronised, build_model(synchronised, 11), datamodule)
    alone = replace(several, supernet=Sampling(method="multi_architectural", phases=("kernel",)))
    with pytest.raises(ValueError, match="this model runs one network at a time"):
        build_module(alone, build_model(alone, 11), datamodule)
