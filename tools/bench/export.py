"""Whether ONNX files say what their networks say, and how fast onnxruntime is: python -m tools.bench.export.

For each architecture of segmentation-models-pytorch and each of this project's own, whole and slimmed to half of its
MACs, at 192x256: the share of pixels that get the same class from the file and from the network, on drawn scenes, some
of a size that is padded; and the milliseconds of one forward, in turns. A network with exits is a file per exit, of one
size: its share is that of the exit that agrees least, its milliseconds are those to the last exit.

A network fresh from its initialisation has logits that hardly differ, and then rounding decides the class. Training
would make them differ, and take far longer than all the rest. So the weights are random and every figure is made like
a trained network's: BatchNorm statistics are estimated on drawn scenes, as after a cut in training, and the layer that
makes the logits is scaled and shifted so that each class's logit has mean 0 and standard deviation 3 over them. The
notes tell the largest share of pixels whose two best logits are closer than file and network are: those rounding may
decide.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.cost.latency import interleave
from dance_seg.early_exit.exits import ExitNetwork, outputs_of
from dance_seg.export import Agreement, OnnxFile, export_onnx
from dance_seg.export_exits import StagesOnnx, export_stages
from dance_seg.models import MODELS
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.normalise import normalise
from datamodules.scenes import CLASSES, PALETTE, render_scene
from tools.bench.common import ratio, spread, write_result
from tools.cli import parser, run


class Family(NamedTuple):
    """A network as a recipe names it."""

    model: str
    args: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.args['arch']}_{self.args['encoder_name']}" if self.model == "smp" else self.model


def smp(arch: str, encoder_name: str) -> Family:
    """An architecture of segmentation-models-pytorch with the encoder it is shown with."""
    return Family("smp", {"arch": arch, "encoder_name": encoder_name})


FAMILIES = (
    *(
        smp(arch, "resnet18")
        for arch in (
            "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet",
        )
    ),
    smp("segformer", "mit_b0"),
    smp("dpt", "tu-vit_small_patch16_224"),  # what DPT is made for
    Family("jitnet", {"width": 0.5, "head_stride": 4}),
    Family("vit_resnas", {"size": "tiny"}),
    Family("smp_exits", {"arch": "fpn", "encoder_name": "resnet18"}),
    Family("ranet", {"size": "tiny"}),
    Family("basisnet", {"arch": "fpn", "encoder_name": "resnet18", "bases": 4}),
    Family("multi_stage", {"size": "tiny"}),
)  # fmt: skip
SIZE, PADDED_SIZE = (192, 256), (180, 250)
SCENES = 8  # compared, half of them at a size that is padded
LOGIT_DEVIATION = 3.0
AGREEMENT = 0.9999


class Measured(NamedTuple):
    """What one network showed."""

    agreement: Agreement  # of the exit that agrees least
    milliseconds: dict[str, list[float]]
    undecided: float  # share of the pixels whose two best logits differ by less than file and network do
    seconds: float  # that the export took, the comparison included


def main() -> int:
    """Measure every family and write the result; exit status 1 when one disagrees."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--runs", type=int, default=7, help="rounds of latency; default 7")
    arguments_parser.add_argument("--only", nargs="+", metavar="NAME", help="such as fpn_resnet18 ranet; default: all")
    arguments_parser.add_argument("--quick", action="store_true", help="one family, one round: whether it runs")
    arguments = arguments_parser.parse_args()
    known = [str(family) for family in FAMILIES]
    only = ["fpn_resnet18"] if arguments.quick else arguments.only or known
    unknown = sorted(set(only) - set(known))
    if unknown:
        raise ValueError(f"--only {unknown[0]}: choose of {', '.join(known)}")
    runs = 1 if arguments.quick else arguments.runs
    ratios, agreement, undecided, slow = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for family in (family for family in FAMILIES if str(family) in only):
            for half in (False, True):
                name = f"{family}_half" if half else str(family)
                found = measure(prepared(family, half=half), Path(folder) / name, runs)
                ratios[f"onnx_argmax_agreement/{name}"] = spread([found.agreement.argmax])
                times = found.milliseconds
                ratios[f"onnxruntime_vs_eager_ms/{name}"] = ratio(times["onnxruntime"], times["eager"])
                undecided[name] = found.undecided
                slow[name] = found.seconds
                agreement[name] = found.agreement.argmax
                print(f"{name}: {found.agreement}", flush=True)
    low = [name for name, share in agreement.items() if share < AGREEMENT]
    lowest = min(agreement, key=lambda name: agreement[name])
    largest = max(undecided, key=lambda name: undecided[name])
    notes = {
        "lowest agreement": f"{agreement[lowest]:.6f} ({lowest})",
        "onnxruntime_vs_eager_ms": "milliseconds of onnxruntime over those of torch: below 1 onnxruntime is faster",
        "size": list(SIZE),
        "pixels compared": f"{SCENES} drawn scenes, half of {PADDED_SIZE[0]}x{PADDED_SIZE[1]}, which is padded; "
        "for networks with exits all of one size",
        "networks": "random weights, BatchNorm statistics of drawn scenes, logits of mean 0 and standard deviation 3",
        "undecided": f"at most {undecided[largest]:.2g} of the pixels ({largest}) have their two best logits closer "
        "than file and network are",
        "seconds of an export": f"{min(slow.values()):.0f} to {max(slow.values()):.0f}",
        "threads": torch.get_num_threads(),
        "versions": {library: version(library) for library in ("onnx", "onnxscript", "onnxruntime")},
    }
    write_result("export_quick" if arguments.quick or arguments.only else "export", runs, ratios, notes)
    if low:
        print(f"below {AGREEMENT:g}: {', '.join(low)}")
    return 1 if low else 0


def prepared(family: Family, *, half: bool) -> nn.Module:
    """A network whose figures are made like a trained one's; slimmed to half of its MACs where asked."""
    torch.manual_seed(0)
    model = MODELS[family.model](num_classes=len(CLASSES), **family.args).eval()
    if half:
        slim(model, NetworkSlimming(keep=0.5, importance="magnitude"), input_size=SIZE)
    batches = [normalise(torch.stack([pixels(index) for index in range(start, start + 4)])) for start in (100, 104)]
    reestimate_batch_norm(model, batches)
    for exit in range(model.num_exits if isinstance(model, ExitNetwork) else 1):
        spread_logits(model, batches, exit)  # in turn, since a later exit may read an earlier one's logits
    return model.eval()


@torch.no_grad()
def spread_logits(model: nn.Module, batches: Sequence[Tensor], exit: int = 0) -> None:
    """Scale and shift the layer that makes an exit's logits so that those of each class have mean 0 and a deviation."""
    last, made = logits_layer(model, batches, exit)
    logits = torch.cat(made).movedim(1 if isinstance(last, nn.Conv2d) else -1, 0).flatten(1)
    scale = LOGIT_DEVIATION / logits.std(dim=1)
    last.weight.mul_(scale.reshape(-1, *[1] * (last.weight.dim() - 1)))
    bias = torch.zeros(len(scale)) if last.bias is None else last.bias
    last.bias = nn.Parameter((bias - logits.mean(dim=1)) * scale)


def logits_layer(model: nn.Module, batches: Sequence[Tensor], exit: int) -> tuple[nn.Conv2d | nn.Linear, list[Tensor]]:
    """The layer that makes an exit's logits, the last one to run that has an output per class, and what it gives.

    Raises ValueError for a network that has none.
    """
    ran: list[tuple[nn.Conv2d | nn.Linear, Tensor]] = []

    def note(layer: nn.Conv2d | nn.Linear, _: Any, output: Tensor) -> None:
        ran.append((layer, output))

    layers = [each for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers if layer.weight.shape[0] == len(CLASSES)]
    found = []
    for batch in batches:
        ran.clear()
        if isinstance(model, ExitNetwork):
            walk = model.exits(batch)
            for _ in range(exit + 1):
                next(walk)
        else:
            model(batch)
        if not ran:
            raise ValueError(f"{type(model).__name__}: no layer makes an output for each class")
        found.append(ran[-1])
    for hook in hooks:
        hook.remove()
    return found[0][0], [output for _, output in found]


def measure(model: nn.Module, path: Path, runs: int) -> Measured:
    """Export, compare on drawn scenes, and time one forward of both in turns."""
    sizes = [SIZE if index % 2 == 0 or isinstance(model, ExitNetwork) else PADDED_SIZE for index in range(SCENES)]
    images = [render_scene(0, index, size).image for index, size in enumerate(sizes)]
    start = time.perf_counter()
    agreement = exported(model, path, images)
    seconds = time.perf_counter() - start
    one = pixels(0)[None]  # drawn before the clock runs
    sides = {"onnxruntime": forward_of_file(model, path, one), "eager": lambda: model(normalise(one))}
    with torch.inference_mode():
        times = {side: [1000 * second for second in each] for side, each in interleave(sides, runs, 2).items()}
    return Measured(agreement, times, undecided(model, images, agreement.largest_difference), seconds)


def exported(model: nn.Module, path: Path, images: Sequence[np.ndarray]) -> Agreement:
    """Write a network to a file, or to a folder where it has exits; how well it agrees, at the exit that does least."""
    record = {
        "labels": {"classes": list(CLASSES), "palette": [list(color) for color in PALETTE], "table": []},
        "recipe": {"data": {"name": "shapes", "args": {}}, "model": {"name": "smp", "args": {}}},
    }
    if not isinstance(model, ExitNetwork):
        return export_onnx(model, path, input_size=SIZE, record=record, images=images, at_least=0.0)
    exits = export_stages(model, path, size=SIZE, record=record, images=images, at_least=0.0)
    return min(exits, key=lambda each: each.argmax)


def forward_of_file(model: nn.Module, path: Path, images: Tensor) -> Callable[[], Any]:
    """Images uint8 (N, 3, H, W) through what a network was exported to, to its last exit."""
    threads = torch.get_num_threads()
    if not isinstance(model, ExitNetwork):
        return partial(OnnxFile(path, threads=threads).logits, images.numpy())
    stages, only_last = StagesOnnx(path, threads=threads), [False] * (model.num_exits - 1) + [True]
    return lambda: list(stages.exits(normalise(images), only_last))


@torch.inference_mode()
def undecided(model: nn.Module, images: Sequence[np.ndarray], difference: float) -> float:
    """The share of the logits' places whose two best classes differ by less; of the exit with the most."""
    close: dict[int, int] = {}
    places: dict[int, int] = {}
    for image in images:
        made = outputs_of(model, normalise(torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()))
        every = [coarse.logits for coarse in made] if isinstance(made, list) else [made]
        for exit, logits in enumerate(every):
            two = logits.topk(2, dim=1).values
            margin = two[:, 0] - two[:, 1]
            close[exit] = close.get(exit, 0) + int((margin < difference).sum())
            places[exit] = places.get(exit, 0) + margin.numel()
    return max(close[exit] / places[exit] for exit in close)


def pixels(index: int) -> Tensor:
    """A drawn scene as uint8 (3, H, W)."""
    return torch.from_numpy(render_scene(0, index, SIZE).image).permute(2, 0, 1).contiguous()


if __name__ == "__main__":
    run(main)
