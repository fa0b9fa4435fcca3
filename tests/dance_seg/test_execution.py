import copy
import math
import threading

import pytest
import torch
from torch import nn

from dance_seg import build, execution
from dance_seg.build import train
from dance_seg.execution import (
    Execution,
    Trial,
    Work,
    choose,
    compiling_may_repay,
    depthwise_in_float32,
    described,
    measure,
    workload,
)
from dance_seg.recipe import load_recipe
from datamodules import build_datamodule
from tests.tiny import tiny

FIRST, SECOND, THIRD = Execution(), Execution("bf16-mixed"), Execution("bf16-mixed", True)
SMALL, LARGE = Work((32, 32), 8, 0.75), Work((64, 64), 8, 0.25)
ALONE = Work((32, 32), 8, 1.0)


class Clock:
    """Time that passes only in steps, which take so many seconds an image."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def step(self, seconds_per_image, loss=1.0):
        calls = []

        def step(size, images):
            calls.append((size, images))
            self.now += images * (seconds_per_image[size] if isinstance(seconds_per_image, dict) else seconds_per_image)
            if isinstance(loss, Exception):
                raise loss
            return loss

        step.calls = calls
        return step


def test_the_plan_says_how_much_each_size_counts():
    assert workload([(32, 32), (48, 48), (64, 64)], [8, 8, 4], [30, 0, 10]) == [SMALL, Work((64, 64), 4, 0.25)]


def test_each_way_has_the_time_of_the_sizes_as_the_plan_mixes_them():
    clock = Clock()
    steps = {
        FIRST: clock.step({(32, 32): 0.001, (64, 64): 0.004}),
        SECOND: clock.step({(32, 32): 0.002, (64, 64): 0.0}),
    }
    found = measure(steps, [SMALL, LARGE], seconds=10, clock=clock)
    assert [trial.milliseconds for trial in found] == pytest.approx([0.75 * 1 + 0.25 * 4, 0.75 * 2])


@pytest.mark.parametrize("loss", [1.06, 0.94, math.nan, math.inf, RuntimeError("no kernel for this layout\nmore")])
def test_a_way_with_another_loss_than_float32_is_refused(loss):
    clock = Clock()
    first, second = measure({FIRST: clock.step(0.01), SECOND: clock.step(0.001, loss)}, [ALONE], 10, clock)
    assert first.milliseconds == pytest.approx(10)
    assert not first.refused
    assert second.milliseconds is None
    assert second.refused


def test_a_loss_within_a_few_hundredths_is_not_refused():
    clock = Clock()
    assert measure({FIRST: clock.step(0.01), SECOND: clock.step(0.001, 1.04)}, [SMALL], 10, clock)[1].refused == ""


def test_a_way_that_is_far_behind_is_measured_once():
    clock = Clock()
    slow, fast = clock.step(0.02), clock.step(0.01)
    measure({FIRST: slow, SECOND: fast}, [SMALL], 10, clock)
    assert len(slow.calls) == 2 + 1 + 1  # two to see what is affordable, a warm-up, one round
    assert len(fast.calls) == 1 + 10


def test_large_steps_are_taken_with_fewer_images_so_that_the_time_is_kept():
    clock = Clock()
    steps = {way: clock.step(1.0) for way in (FIRST, SECOND, THIRD)}
    found = measure(steps, [ALONE], 36, clock)
    assert {images for step in steps.values() for _, images in step.calls} == {2, 4}  # a third of 36 s each, thrice
    assert [trial.milliseconds for trial in found] == [1000] * 3
    assert clock.now <= 36 * 1.2


def test_where_all_sizes_would_take_too_long_the_heaviest_speaks_for_them():
    clock = Clock()
    steps = {FIRST: clock.step({(32, 32): 0.5, (64, 64): 2.0}), SECOND: clock.step({(32, 32): 0.5, (64, 64): 1.0})}
    found = measure(steps, [SMALL, LARGE], 24, clock)  # 4 s a way: less than the 5 s of two images of both sizes
    assert [trial.milliseconds for trial in found] == [2000, 1000]


def test_no_figure_is_given_where_there_was_no_time():
    clock = Clock()
    found = measure({FIRST: clock.step(1.0), SECOND: clock.step(1.0)}, [SMALL, LARGE], 3, clock)
    assert all(trial.milliseconds is None for trial in found)
    assert all("no time" in trial.refused for trial in found)


def test_choosing_leaves_the_model_and_the_random_numbers_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    before, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    deterministic = torch.are_deterministic_algorithms_enabled()  # a Trainer of another test may have set it
    recipe = tiny("trainer.execution=auto", "trainer.precision=32-true")
    chosen, trials = choose(recipe, model, [Work((16, 16), 4, 1.0)], 4, steps=10, seconds=3)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert chosen in [trial.execution for trial in trials]
    assert not chosen.compile
    assert torch.are_deterministic_algorithms_enabled() == deterministic


def test_where_nothing_could_be_measured_the_recipe_is_kept(monkeypatch):
    monkeypatch.setattr(execution, "measure", lambda steps, *rest: [Trial(each, None, "no time") for each in steps])
    recipe = tiny("trainer.execution=auto", "trainer.precision=bf16-mixed", "trainer.channels_last=false")
    assert choose(recipe, nn.Conv2d(3, 4, 1), [SMALL], 4, steps=10)[0] == Execution("bf16-mixed", False)


def test_compiling_is_tried_only_where_the_steps_to_come_repay_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(execution, "has_compiler", lambda device: True)
    # 1000 steps of 8 images of 50 ms are 400 s, of which 0.3 may be saved: 120 s, twice the 60 s of one compilation
    assert compiling_may_repay(51, [ALONE], 1000, device=cpu)
    assert not compiling_may_repay(49, [ALONE], 1000, device=cpu)
    assert not compiling_may_repay(51, [ALONE], 1000, cuts=1, device=cpu)
    monkeypatch.setattr(execution, "has_compiler", lambda device: False)
    assert not compiling_may_repay(51, [ALONE], 1000, device=cpu)


def test_a_compiler_that_does_not_end_is_interrupted(monkeypatch):
    measured = execution.measure

    def endless(steps, work, seconds):
        if any(each.compile for each in steps):
            threading.Event().wait(30)
        return measured({FIRST: lambda size, images: 1.0}, work, seconds)

    monkeypatch.setattr(execution, "measure", endless)
    monkeypatch.setattr(execution, "compiling_may_repay", lambda *given, **named: True)
    monkeypatch.setattr(execution, "COMPILE_SECONDS", 0.02)
    chosen, trials = choose(tiny("trainer.execution=auto"), nn.Conv2d(3, 4, 1), [ALONE], 4, steps=10)
    assert chosen == FIRST
    assert trials[-1].execution.compile
    assert "took over" in trials[-1].refused


def test_what_was_refused_is_said_with_its_reason():
    assert "(it failed: x)" in described(FIRST, [Trial(FIRST, 1.0), Trial(SECOND, None, "it failed: x")])


def test_a_run_chooses_once_writes_it_down_and_resumes_with_it(tmp_path, monkeypatch):
    calls = []

    def chosen(recipe, model, work, num_classes, *, steps):
        calls.append((work, steps))
        return Execution("bf16-mixed", False), [Trial(Execution("bf16-mixed", False), 1.0)]

    monkeypatch.setattr(execution, "choose", chosen)
    recipe = tiny("trainer.execution=auto", "trainer.max_epochs=1", cache=tmp_path / "cache")
    folder = train(recipe, build_datamodule(recipe), tmp_path / "run")
    written = load_recipe(folder / "recipe.yaml").trainer
    assert (written.execution, written.precision, written.channels_last) == ("auto", "bf16-mixed", False)
    assert calls == [([Work((64, 64), 4, 1.0)], 3)]
    train(recipe, build_datamodule(recipe), folder)  # finished: nothing to do, and nothing to choose
    assert len(calls) == 1


def test_another_rank_waits_for_the_choice_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "MEASURING_SECONDS", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    recipe = tiny("trainer.execution=auto", cache=tmp_path / "cache")
    with pytest.raises(TimeoutError, match="rank 0"):
        train(recipe, build_datamodule(recipe), tmp_path / "run")


# Depthwise convolutions ---------------------------------------------------------------------------------------------


def separable():
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, groups=2))


def test_under_autocast_depthwise_convolutions_alone_compute_in_float32():
    model, images = separable(), torch.randn(2, 8, 8, 8)
    plain = copy.deepcopy(model)
    depthwise_in_float32(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert [layer(given).dtype for layer, given in zip(model, (images, images, images[:, :4]), strict=True)] == [
            torch.float32,
            torch.bfloat16,
            torch.bfloat16,
        ]
        assert plain[0](images).dtype == torch.bfloat16
        made = model[0](images.bfloat16())
    expected = plain[0](images.bfloat16().float())
    made.sum().backward()
    expected.sum().backward()
    assert torch.equal(made, expected)
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)


def test_a_copy_computes_with_its_own_weights():
    model = depthwise_in_float32(separable())
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied[0].weight)
    nn.init.zeros_(copied[0].bias)
    images = torch.randn(1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert copied[0](images).abs().max() == 0
        assert model[0](images).abs().max() > 0


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("32-true", torch.bfloat16)])
def test_a_run_in_bfloat16_trains_so(tmp_path, precision, dtype):
    changes = ("model.args.encoder_name=mobilenet_v2", f"trainer.precision={precision}")
    recipe = tiny(*changes, cache=tmp_path / "cache")
    data = build_datamodule(recipe)
    module = build.build_module(recipe, build.build_model(recipe, len(data.classes)), data)
    layer = next(one for one in module.model.modules() if isinstance(one, nn.Conv2d) and one.groups > 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.zeros(1, layer.in_channels, 8, 8)).dtype == dtype
