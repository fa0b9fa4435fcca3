"""How training steps are executed on the machine at hand: precision, memory layout, compilation, measured and chosen.

The same change helps one network and harms another: on a CPU with bfloat16 products FPN trains 2.7 times faster in
bfloat16, and DeepLabV3+, whose dilated convolutions have no such kernel, 3 times slower. So with
`trainer.execution: auto` a few true training steps are taken each way, at the sizes that the run's plan will use, and
the fastest is taken whose loss is that of float32. The choice is made once and stands in the run's recipe.yaml.
"""

import copy
import importlib.util
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dance_seg.cost.latency import synchronise
from dance_seg.losses import per_sample_loss, weighted_mean
from dance_seg.recipe import Recipe

SECONDS = 25.0
"""How long the measuring may take; with what is built around it, under 30."""

LARGEST_LOSS_DIFFERENCE = 0.05
"""Of the loss of float32; bfloat16 has 8 bits of precision, and an honest loss differs by a few thousandths."""

HOPELESS = 1.3
"""What takes so much longer than the fastest after a first round is not measured again."""

COMPILE_SECONDS = 60.0
"""What compiling a training step takes at least on a processor."""

COMPILE_GAIN = 0.3
"""The share of a step that compiling can be hoped to save; what it saves indeed is measured."""


Step = Callable[[tuple[int, int], int], float]
"""A training step on so many images (H, W), which returns its loss."""


class Execution(NamedTuple):
    """One way to execute a step; the fields are keys of the trainer's section."""

    precision: str = "32-true"
    channels_last: bool = False
    compile: bool = False

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        return f"{self.precision}, {layout}{', compiled' if self.compile else ''}"


class Work(NamedTuple):
    """Steps of one size: images (H, W), how many a rank has in a batch, and the share of all trained images."""

    size: tuple[int, int]
    images: int
    share: float


@dataclass(frozen=True)
class Trial:
    """What was found of one way to execute a step."""

    execution: Execution
    milliseconds: float | None  # per image, over the sizes as the plan mixes them; None when it was not run to its end
    refused: str = ""  # why it may not be chosen


def depthwise_in_float32(model: nn.Module) -> nn.Module:
    """Let a model's depthwise convolutions compute in float32 on a CPU, whatever autocast says; returns the model.

    Their backward in bfloat16 is a fallback of torch's CPU library: of 5x5 kernels it takes four times as long as in
    float32, and longer than all else of the layer.

    >>> convolution = depthwise_in_float32(nn.Conv2d(8, 8, 3, groups=8))
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     convolution(torch.zeros(1, 8, 4, 4)).dtype
    torch.float32
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module._conv_forward = MethodType(_in_float32_on_a_cpu, module)  # type: ignore[method-assign]
    return model


def _in_float32_on_a_cpu(module: nn.Conv2d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if images.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nn.Conv2d._conv_forward(module, images, weight, bias)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return nn.Conv2d._conv_forward(module, images.float(), weight.float(), bias)


def workload(sizes: Sequence[tuple[int, int]], images_per_batch: Sequence[int], paid: Sequence[int]) -> list[Work]:
    """The sizes a plan uses, with the share of the images it pays for at each.

    >>> workload([(32, 64), (64, 128)], [8, 4], [0, 12])
    [Work(size=(64, 128), images=4, share=1.0)]
    """
    total = sum(paid)
    return [
        Work(size, images, count / total)
        for size, images, count in zip(sizes, images_per_batch, paid, strict=True)
        if count
    ]


def candidates(device: torch.device) -> list[Execution]:
    """The ways worth trying on a device; the first is the reference, float32 as it is."""
    precisions = ["32-true"]
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported()):
        precisions.append("bf16-mixed")
    return [Execution(precision, channels_last) for precision in precisions for channels_last in (False, True)]


def choose(
    recipe: Recipe, model: nn.Module, work: Sequence[Work], num_classes: int, *, steps: int, seconds: float = SECONDS
) -> tuple[Execution, list[Trial]]:
    """The fastest safe execution of a recipe's training step, and what was measured of each; `steps` are those to come.

    The model and torch's random numbers are left as they are. Where not even one round fits into the time, the
    recipe's own way is kept. Safe is what gives a finite loss within 5 % of float32's on the same batch.
    """
    options, device = recipe.trainer, training_device(recipe.trainer.accelerator)
    given = Execution(options.precision, options.channels_last, options.compile)
    with _as_in_training(options.deterministic):
        trials = measure(
            {each: _step(recipe, model, each, device, num_classes) for each in candidates(device)}, work, seconds
        )
        safe = [trial for trial in trials if trial.milliseconds is not None and not trial.refused]
        if not safe:
            return given, trials
        fastest = min(safe, key=_milliseconds)
        if compiling_may_repay(_milliseconds(fastest), work, steps, cuts=_cuts(recipe), device=device):
            both = (fastest.execution, fastest.execution._replace(compile=True))
            steps_of = {each: _step(recipe, model, each, device, num_classes) for each in both}
            try:
                with _interrupted_after(5 * COMPILE_SECONDS):
                    plain, compiled = measure(steps_of, work, 2 * COMPILE_SECONDS)
            except TimeoutError as error:
                plain, compiled = fastest, Trial(both[1], None, str(error))
            trials.append(compiled)
            if _milliseconds(compiled) < 0.95 * _milliseconds(plain):
                fastest = compiled
    return fastest.execution, trials


def measure(
    steps: dict[Execution, Step], work: Sequence[Work], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[Trial]:
    """Milliseconds per image of each way, the ways taking turns, within a time; the first is the reference.

    A step is called with a size and a number of images and returns its loss. A way whose loss is not finite, differs
    from the reference's, or that raises, is refused. The first step of a way and a size is warm-up; where that alone
    takes long, fewer images are taken than the plan has in a batch, or of one size only.
    """
    end = clock() + seconds
    refused = dict.fromkeys(steps, "")
    reference: dict[Work, float] = {}
    images, work = _affordable(next(iter(steps.values())), work, seconds / (3 * len(steps)), clock)
    taken: dict[Execution, dict[Work, list[float]]] = {each: {one: [] for one in work} for each in steps}
    for each in steps:  # warm-up, and whether the way is safe
        for one in work:
            if clock() > end:
                refused[each] = refused[each] or "there was no time to try it"
            if refused[each]:
                break
            try:
                loss = steps[each](one.size, images[one])
            except (RuntimeError, NotImplementedError) as error:
                refused[each] = f"it failed: {str(error).strip().splitlines()[0][:200]}"
                break
            reference.setdefault(one, loss)
            if not math.isfinite(loss):
                refused[each] = "its loss is not finite"
            elif abs(loss - reference[one]) > LARGEST_LOSS_DIFFERENCE * abs(reference[one]):
                refused[each] = f"its loss is {loss:.4g} where float32's is {reference[one]:.4g}"
    running = [each for each in steps if not refused[each]]
    rounds = 0
    while running and rounds < 10 and (rounds == 0 or clock() < end):
        for each in list(running):
            for one in work:
                began = clock()
                if began > end + seconds / 5:  # a first round may end a little late; a figure of half a round is none
                    taken[each] = {other: [] for other in work}
                    break
                steps[each](one.size, images[one])
                taken[each][one].append(1000 * (clock() - began) / images[one])
        rounds += 1
        means = {each: mean for each in running if (mean := _mean(taken[each])) is not None}
        if means:
            fastest = min(means.values())
            running = [each for each in running if means.get(each, math.inf) <= HOPELESS * fastest]
    for each in steps:
        if _mean(taken[each]) is None:
            refused[each] = refused[each] or "there was no time to measure it"
    return [Trial(each, None if refused[each] else _mean(taken[each]), refused[each]) for each in steps]


def training_device(accelerator: str) -> torch.device:
    """The device that a recipe's accelerator means on this machine."""
    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compiling_may_repay(
    milliseconds: float, work: Sequence[Work], steps: int, *, cuts: int = 0, device: torch.device
) -> bool:
    """Whether there is a compiler, and steps enough for it to earn what each compilation costs, twice over.

    A network that is cut is compiled anew after each cut.
    """
    if not has_compiler(device):
        return False
    images = sum(one.share * one.images for one in work)
    hoped = COMPILE_GAIN * steps * images * milliseconds / 1000
    return hoped > 2 * COMPILE_SECONDS * (1 + cuts)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler for a processor, Triton for a GPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def described(chosen: Execution, trials: Sequence[Trial]) -> str:
    """What was found, for a person: each way with its time over the first's.

    >>> first, second = Execution(), Execution("bf16-mixed")
    >>> print(described(second, [Trial(first, 100.0), Trial(second, 40.0)]))
    execution: bf16-mixed, channels first, of these ways to take a training step on this machine:
        100.0 ms an image  32-true, channels first
         40.0 ms an image  bf16-mixed, channels first  <- chosen
    """
    lines = [f"execution: {chosen}, of these ways to take a training step on this machine:"]
    for trial in trials:
        took = "     not measured" if trial.milliseconds is None else f"{trial.milliseconds:7.1f} ms an image"
        why = f"  ({trial.refused})" if trial.refused else ""
        lines.append(f"  {took}  {trial.execution}{why}{'  <- chosen' if trial.execution == chosen else ''}")
    return "\n".join(lines)


def _affordable(
    step: Step, work: Sequence[Work], seconds: float, clock: Callable[[], float]
) -> tuple[dict[Work, int], Sequence[Work]]:
    """As many images of each size, up to the plan's, as steps of all sizes take together in about so many seconds.

    Two images at least, for BatchNorm; where even that takes longer, only the size that most of the training's pixels
    have is left.
    """
    per_image: dict[Work, float] = {}
    for one in work:
        step(one.size, 2)
        began = clock()
        step(one.size, 2)
        per_image[one] = (clock() - began) / 2
    if 2 * sum(per_image.values()) > seconds:
        work = [max(work, key=lambda one: one.share * one.size[0] * one.size[1])]
    each = seconds / len(work)
    return {one: max(2, min(one.images, int(each / max(per_image[one], 1e-9)))) for one in work}, work


def _step(recipe: Recipe, model: nn.Module, execution: Execution, device: torch.device, num_classes: int) -> Step:
    """A training step of a copy of the model: forward, loss, backward, optimiser; returns the loss.

    Copied at the first call, so that ways are not all in memory before they are tried.
    """
    from dance_seg.module import make_optimizer

    kept: dict[str, Any] = {}
    layout = torch.channels_last if execution.channels_last else torch.contiguous_format
    batches: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def step(size: tuple[int, int], images: int) -> float:
        if not kept:
            network = copy.deepcopy(model).train().to(device).to(memory_format=layout)  # type: ignore[call-overload]
            if execution.precision == "bf16-mixed":
                network = depthwise_in_float32(network)
            if execution.compile:
                network.compile(dynamic=True)
            kept["network"], kept["optimizer"] = network, make_optimizer(network, recipe.optimizer)
            for group in kept["optimizer"].param_groups:
                group["lr"] = 0.0  # the weights stay, so that every way has the loss of the same network
        if (images, *size) not in batches:
            numbers = torch.Generator().manual_seed(0)
            batches[(images, *size)] = (
                torch.randn((images, 3, *size), generator=numbers).to(device),
                torch.randint(0, num_classes, (images, *size), generator=numbers).to(device),
            )
        given, labels = batches[(images, *size)]
        torch.manual_seed(0)  # the same dropout for every way
        dtype = torch.bfloat16 if execution.precision == "bf16-mixed" else None
        kept["optimizer"].zero_grad()
        with torch.enable_grad():
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                losses = per_sample_loss(kept["network"](given), labels, recipe.loss)
                loss = weighted_mean(losses, torch.ones_like(losses))
            loss.backward()
        kept["optimizer"].step()
        synchronise(device)
        return loss.item()

    return step


@contextmanager
def _as_in_training(deterministic: bool) -> Iterator[None]:
    """Torch's algorithms as the run will have them, and its random numbers as they were."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside when it takes longer; a compiler may take any time, and nobody waits for ever.

    Where a program cannot be interrupted by an alarm (Windows, a thread beside the main one) it takes what it takes.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"compiling took over {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _cuts(recipe: Recipe) -> int:
    return recipe.network_slimming.cuts if recipe.network_slimming is not None else 0


def _milliseconds(trial: Trial) -> float:
    return math.inf if trial.milliseconds is None else trial.milliseconds


def _mean(taken: dict[Work, list[float]]) -> float | None:
    """The plan's mean of each size's median; None unless every size was measured."""
    if not all(taken.values()):
        return None
    total = sum(one.share for one in taken)
    return sum(one.share * sorted(times)[len(times) // 2] for one, times in taken.items()) / total
