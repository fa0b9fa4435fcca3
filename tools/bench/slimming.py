"""What a cut is worth on a clock, what it costs, and on which networks it works: python -m tools.bench.slimming.

Four questions: whether a network of half the MACs runs and trains in half the time, how long a cut takes and how much
memory, how many of SMP's pairs of architecture and encoder can be cut, and how many torch-pruning cuts of the same
pairs under the same check. Each cut of the last two runs in a process of its own, within 60 s and 9 GiB (Linux only).
All of it takes about half an hour on two cores.
"""

import ctypes
import gc
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dance_seg.cost.latency import interleave
from dance_seg.cost.macs import count_macs, count_training_macs
from dance_seg.losses import Loss, per_sample_loss, weighted_mean
from dance_seg.models.smp import SmpModel
from dance_seg.module import make_optimizer
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.options import Optimizer
from tools.bench.common import memory, ratio, spread, write_result
from tools.cli import parser, run


class Unsound(Exception):
    """What is wrong with a network after it was cut."""


class Pair(NamedTuple):
    """A network of segmentation-models-pytorch."""

    arch: str
    encoder_name: str

    def __str__(self) -> str:
        return f"{self.arch} {self.encoder_name}"


ARCHITECTURES = (
    "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet",
    "segformer", "dpt",
)  # fmt: skip
ENCODERS = ("resnet18", "mobilenet_v2", "tu-mobilenetv3_small_100", "efficientnet-b0", "mit_b0")
VISION_TRANSFORMER = "tu-vit_small_patch16_224"  # what DPT is made for, and no other architecture takes
REFUSED = {  # by SMP itself
    Pair("unetplusplus", "mit_b0"),
    Pair("linknet", "mit_b0"),
    *(Pair("dpt", encoder) for encoder in ENCODERS if not encoder.startswith("tu-")),
}
PAIRS = (
    *(pair for arch in ARCHITECTURES for encoder in ENCODERS if (pair := Pair(arch, encoder)) not in REFUSED),
    Pair("dpt", VISION_TRANSFORMER),
)

MODELS = ("deeplabv3plus", "fpn")  # with ResNet-18, timed
NUM_CLASSES = 11
SIZE = (352, 480)  # one image to infer on
TRAINED_SIZE, BATCH_SIZE = (192, 256), 8
SHARES = {"half": 0.5, "quarter": 0.25}  # of the MACs
SCOPES: tuple[Literal["global", "group"], ...] = ("global", "group")
MEASURES: tuple[Literal["magnitude", "bn_scale"], ...] = ("magnitude", "bn_scale")
LIMIT_SECONDS, LIMIT_BYTES = 60.0, 9 << 30
WITHOUT_TORCH_PRUNING = "not measured: torch-pruning is not installed; pip install torch-pruning==1.6.1"

Ratios = dict[str, dict[str, float]]
Notes = dict[str, Any]


def main() -> int:
    """Measure all four and write the result."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--runs", type=int, default=15, help="rounds; default 15")
    arguments_parser.add_argument(
        "--quick", action="store_true", help="one round, small images, two pairs: whether it runs, not how fast"
    )
    arguments = arguments_parser.parse_args()
    runs, quick = (1, True) if arguments.quick else (arguments.runs, False)
    ratios: Ratios = {}
    notes: Notes = {
        "threads": torch.get_num_threads(),
        "segmentation_models_pytorch": version("segmentation-models-pytorch"),
        "torch_pruning": torch_pruning_version() or "none",
    }
    for measured in (
        latency(MODELS[-1:] if quick else MODELS, (96, 128) if quick else SIZE, runs),
        step(MODELS[-1:] if quick else MODELS, (64, 96) if quick else TRAINED_SIZE, 2 if quick else BATCH_SIZE, runs),
        cuts((Pair("fpn", "resnet18"),), (96, 128), runs) if quick else cuts(largest_pairs(), SIZE, min(runs, 5)),
        coverage((Pair("fpn", "resnet18"), Pair("segformer", "mit_b0")) if quick else PAIRS),
    ):
        ratios |= measured[0]
        notes |= measured[1]
    write_result("slimming_quick" if quick else "slimming", runs, ratios, notes)
    return 0


# The clock -----------------------------------------------------------------------------------------------------------


def latency(models: Sequence[str], size: tuple[int, int], runs: int) -> tuple[Ratios, Notes]:
    """`latency_over_macs_*`: how much longer a cut network takes than its MACs promise; 1 is perfect.

    One image, float32, channels_last, eager. The ranking over the whole network is what counts, that within each group
    is noted.
    """
    ratios: Ratios = {}
    notes: Notes = {}
    images = torch.randn(1, 3, *size).contiguous(memory_format=torch.channels_last)
    for arch in models:
        dense = build(Pair(arch, "resnet18")).eval()
        networks = {"dense": dense}
        for way in SCOPES:
            for name, keep in SHARES.items():
                networks[f"{name}/{way}"] = slimmed = deepcopy(dense)
                slim(slimmed, to_share(keep, way), input_size=size)
        macs = {name: count_macs(network, size).macs for name, network in networks.items()}
        times = interleave({name: inference(network, images) for name, network in networks.items()}, runs, warm_up=2)
        for name in networks.keys() - {"dense"}:
            share, scope = name.split("/")
            found = over(ratio(times[name], times["dense"]), macs[name] / macs["dense"])
            if scope == "global":
                ratios[f"latency_over_macs_{share}/{arch}"] = found
            else:
                notes[f"latency_over_macs_{share}/{arch} by group"] = round(found["median"], 3)
        notes[f"milliseconds/{arch}"] = {name: round(1e3 * statistics.median(t), 1) for name, t in times.items()}
    return dict(sorted(ratios.items())), dict(sorted(notes.items()))


def step(models: Sequence[str], size: tuple[int, int], batch_size: int, runs: int) -> tuple[Ratios, Notes]:
    """`step_gain_over_macs_gain`: how much of what the MACs promise a training step gains by a cut; 1 is perfect.

    Forward, the loss, backward and AdamW's step, at half the MACs of one forward; the quarter is noted.
    """
    ratios: Ratios = {}
    notes: Notes = {}
    images = torch.randn(batch_size, 3, *size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, NUM_CLASSES, (batch_size, *size))
    for arch in models:
        dense = build(Pair(arch, "resnet18"))
        steps, macs = {}, {}
        for name, keep in {"dense": None, **SHARES}.items():
            model = deepcopy(dense).train()
            optimizer = make_optimizer(model, Optimizer(name="adamw", lr=1e-4))
            steps[name] = training_step(model, optimizer, images, labels)
            steps[name]()  # so that there are momenta to cut
            if keep is not None:
                slim(model, to_share(keep), input_size=size, optimizers=[optimizer])
            macs[name] = count_training_macs(model, size, batch=batch_size).macs
        times = interleave(steps, runs)
        gains = {
            name: over(ratio(times["dense"], times[name]), macs["dense"] / macs[name]) for name in ("half", "quarter")
        }
        ratios[f"step_gain_over_macs_gain/{arch}"] = gains["half"]
        notes[f"step_gain_over_macs_gain/{arch} at a quarter"] = round(gains["quarter"]["median"], 3)
        notes[f"step_milliseconds/{arch}"] = {name: round(1e3 * statistics.median(t), 1) for name, t in times.items()}
    return ratios, notes


def build(pair: Pair, num_classes: int = NUM_CLASSES) -> SmpModel:
    """A network with the same random weights each time, laid out as training lays it out."""
    torch.manual_seed(0)
    model = SmpModel(**pair._asdict(), num_classes=num_classes)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_share(keep: float, scope: Literal["global", "group"] = "global") -> NetworkSlimming:
    """Cut to a share of the MACs, by magnitude since the weights are random."""
    return NetworkSlimming(keep=keep, of="macs", importance="magnitude", scope=scope)


def inference(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Two forwards, so that one of three has its own memory in the cache."""

    def forward() -> None:
        with torch.inference_mode():
            model(images)
            model(images)

    return forward


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    """Forward, loss, backward and the optimiser's step, as the training module makes them."""
    options, weights = Loss(), torch.ones(len(images))

    def train() -> None:
        optimizer.zero_grad()
        weighted_mean(per_sample_loss(model(images), labels, options), weights).backward()
        optimizer.step()

    return train


def over(figures: dict[str, float], divisor: float) -> dict[str, float]:
    """Each figure over a number.

    >>> over({"median": 3.0}, 2.0)
    {'median': 1.5}
    """
    return {key: value / divisor for key, value in figures.items()}


# The price of a cut --------------------------------------------------------------------------------------------------


def largest_pairs() -> tuple[Pair, ...]:
    """DeepLabV3+ with ResNet-50, and every architecture with ResNet-18 or what it takes instead."""
    with_resnet = (Pair(arch, "resnet18") for arch in ARCHITECTURES)
    rest = (pair if pair not in REFUSED else Pair(pair.arch, VISION_TRANSFORMER) for pair in with_resnet)
    return (Pair("deeplabv3plus", "resnet50"), *rest)


class CutCost(NamedTuple):
    """What one cut took, in a process of its own."""

    seconds: float
    grown: int  # bytes: how far memory rose above what the process held before
    held: int  # bytes: of the model, and of gradients and momenta where there are any


def cuts(pairs: Sequence[Pair], size: tuple[int, int], runs: int) -> tuple[Ratios, Notes]:
    """`cut_seconds` and `cut_memory_over_model` of the first pair, and the worst of all others."""
    first, *others = pairs
    name = "_".join(first)
    found = [finished(first, in_process(cut_cost, first, size, False)) for _ in range(runs)]
    training = finished(first, in_process(cut_cost, first, size, True))
    ratios = {
        f"cut_seconds/{name}": spread([cost.seconds for cost in found]),
        f"cut_memory_over_model/{name}": spread([cost.grown / cost.held for cost in found]),
    }
    notes: Notes = {
        f"cut_memory_over_model/{name} while training": f"{training.grown / training.held:.2f} of model, gradients "
        "and AdamW's momenta"
    }
    each = {pair: finished(pair, in_process(cut_cost, pair, size, False)) for pair in others}
    if each:
        ratios["cut_seconds_worst"] = spread([max(cost.seconds for cost in each.values())])
        ratios["cut_gib_worst"] = spread([max(cost.grown for cost in each.values()) / 2**30])
    for pair, cost in each.items():
        notes[f"cut/{pair}"] = f"{cost.seconds:.2f} s, {cost.grown / cost.held:.2f} of the model's memory"
    return ratios, notes


def finished(pair: Pair, outcome: "tuple[Any, str | None]") -> Any:
    """What a process made. Raises ValueError when it did not finish."""
    made, fault = outcome
    if fault is not None:
        raise ValueError(f"{pair} could not be cut: {fault}")
    return made


def cut_cost(pair: Pair, size: tuple[int, int], training: bool) -> CutCost:
    """Cut a network to half its MACs; with `training` it has gradients, and AdamW its momenta."""
    model = build(pair)
    tensors: list[Tensor] = list(model.state_dict().values())
    optimizers = []
    if training:
        optimizers.append(make_optimizer(model, Optimizer(name="adamw", lr=1e-4)))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizers[0].step()
        momenta = [value for state in optimizers[0].state.values() for value in state.values()]
        tensors += [*momenta, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
    held = sum(tensor.nbytes for tensor in tensors)
    del tensors
    forget_memory()
    before, began = memory("VmRSS"), time.perf_counter()
    slim(model, to_share(0.5), input_size=size, optimizers=optimizers)
    return CutCost(time.perf_counter() - began, memory("VmHWM") - before, held)


def forget_memory() -> None:
    """Give back to the system what was freed, and let the peak of this process begin anew, where it allows that."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# Coverage ------------------------------------------------------------------------------------------------------------


def trial_size(model: SmpModel) -> tuple[int, int]:
    """A size at which the deepest features have more than one row and column, so that no dimension looks like none."""
    return 3 * model.minimum_size, 2 * model.minimum_size


def enliven(model: nn.Module, images: Tensor) -> None:
    """Give a fresh network norms and biases as training leaves them, in place, and statistics of these images.

    Fresh norms are all alike: they rank no channel, and hide what happens to a channel that is not zero on its own.
    """
    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm)
            for name, parameter in module.named_parameters(recurse=False):
                if norm and name == "weight":
                    parameter.uniform_(0.5, 1.5)
                elif name == "bias":
                    parameter.normal_(0.0, 0.2)
            if isinstance(module, _BatchNorm):
                module.momentum = 1.0
        model.train()(images)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 0.1


def fault_after_cut(model: nn.Module, images: Tensor, shape: torch.Size, parameters: int) -> str | None:
    """What is wrong with a network that was cut; None when it is sound.

    Sound is: outputs have the shape they had, finite; a backward pass in training mode gives every parameter that is
    learnt a finite gradient; there are fewer parameters than before. The model's gradients are replaced.
    """
    try:
        with torch.no_grad():
            made = model.eval()(images)
        if made.shape != shape:
            return f"outputs are {tuple(made.shape)} instead of {tuple(shape)}"
        if not made.isfinite().all():
            return "outputs are not finite"
        model.train().zero_grad()
        model(images).square().mean().backward()
    except Exception as error:  # whatever a network raises
        return describe(error)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            return f"{name} gets {'no' if parameter.grad is None else 'an infinite'} gradient"
    left = sum(parameter.numel() for parameter in model.parameters())
    return None if left < parameters else f"has {left} parameters and had {parameters}"


def coverage(pairs: Sequence[Pair]) -> tuple[Ratios, Notes]:
    """`coverage` and `coverage_torch_pruning`: the share of pairs that are sound after half their channels are cut.

    Of ours the measure of importance by which fewer pairs pass counts, of torch-pruning's the one by which more do.
    """
    sides: dict[str, Callable[..., float]] = {"ours": cut_by_slim}
    if torch_pruning_version():
        sides["torch-pruning"] = cut_by_torch_pruning
    passed = {(side, measure): 0 for side in sides for measure in MEASURES}
    by_either = dict.fromkeys(sides, 0)
    notes: Notes = {}
    for pair in pairs:
        told, sound = [], set()
        for side, measure in passed:
            left, fault = in_process(sides[side], pair, measure)
            if fault is None:
                passed[side, measure] += 1
                sound.add(side)
            told.append(f"{side} by {measure}: {f'{left:.0%} of parameters left' if fault is None else fault}")
        for side in sound:
            by_either[side] += 1
        notes[f"coverage/{pair}"] = "; ".join(told)
        print(f"  {pair}: {notes[f'coverage/{pair}']}", flush=True)
    ratios = {"coverage": spread([min(passed["ours", measure] for measure in MEASURES) / len(pairs)])}
    if "torch-pruning" in sides:
        best = max(passed["torch-pruning", measure] for measure in MEASURES)
        ratios["coverage_torch_pruning"] = spread([best / len(pairs)])
    else:
        notes["coverage_torch_pruning"] = WITHOUT_TORCH_PRUNING
    counts = {f"{side} by {measure}": count for (side, measure), count in passed.items()}
    counts |= {f"{side} by either": count for side, count in by_either.items()}
    return ratios, {"pairs": len(pairs), "pairs_passed": counts, **notes}


def cut_by_slim(pair: Pair, measure: Literal["magnitude", "bn_scale"]) -> float:
    """Cut half of a network's channels; the share of parameters left. Raises Unsound with what is wrong after."""
    model = build(pair)
    options = NetworkSlimming(keep=0.5, of="channels", importance=measure)
    return checked_after(model, lambda images: slim(model, options, input_size=trial_size(model)))


def cut_by_torch_pruning(pair: Pair, measure: Literal["magnitude", "bn_scale"]) -> float:
    """The same by torch-pruning, as its documentation uses it. Raises Unsound with what is wrong after."""
    import torch_pruning

    pruners = {
        "magnitude": (torch_pruning.pruner.MagnitudePruner, torch_pruning.importance.MagnitudeImportance),
        "bn_scale": (torch_pruning.pruner.BNScalePruner, torch_pruning.importance.BNScaleImportance),
    }
    model = build(pair)
    network: Any = model.network
    head = [layer for layer in network.segmentation_head.modules() if isinstance(layer, nn.Conv2d)]
    # The attention of vision transformers must be told to it, and to the module after the cut.
    attention: list[Any] = [layer for layer in model.modules() if hasattr(layer, "qkv") and hasattr(layer, "num_heads")]

    def cut(images: Tensor) -> None:
        make, score = pruners[measure]
        pruner = make(
            network,
            images,
            importance=score(),
            pruning_ratio=0.5,
            round_to=8,
            ignored_layers=head[-1:],
            num_heads={layer.qkv: layer.num_heads for layer in attention},
        )
        pruner.step()
        for layer in attention:
            layer.num_heads = pruner.num_heads[layer.qkv]
            layer.head_dim = layer.qkv.out_features // (3 * layer.num_heads)

    return checked_after(model, cut)


def checked_after(model: SmpModel, cut: Callable[[Tensor], object]) -> float:
    """Cut a network and check it; the share of parameters left. Raises Unsound with what is wrong."""
    images = torch.randn(2, 3, *trial_size(model))
    enliven(model, images)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        shape = model.eval()(images).shape
    cut(images)
    fault = fault_after_cut(model, images, shape, parameters)
    if fault is not None:
        raise Unsound(fault)
    return sum(parameter.numel() for parameter in model.parameters()) / parameters


def torch_pruning_version() -> str | None:
    """The version of torch-pruning, which only this benchmark needs; None where it is not installed."""
    try:
        return version("torch-pruning")
    except PackageNotFoundError:
        return None


# Processes -----------------------------------------------------------------------------------------------------------


def in_process(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """(result, None) of a call in a process of its own, or (None, why) when it fails or goes beyond the limits."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["segmentation_models_pytorch", "torch_pruning", "dance_seg.module"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, call, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT_SECONDS) else (None, f"takes over {LIMIT_SECONDS:g} s")
    except EOFError:
        return None, "its process was killed"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _answer(sender: Connection, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    try:
        sender.send((call(*arguments), None))
    except Exception as error:  # whatever a network or a library raises
        sender.send((None, describe(error)))


def describe(error: Exception) -> str:
    """An error in one short line.

    >>> describe(RuntimeError("no such shape"))
    'RuntimeError: no such shape'
    """
    first = (str(error).splitlines() or [""])[0]
    return (first if isinstance(error, Unsound) else f"{type(error).__name__}: {first}")[:120]


if __name__ == "__main__":
    run(main)
