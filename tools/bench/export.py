"""Whether ONNX files say what their networks say, and how fast onnxruntime is: python -m tools.bench.export.

For each architecture of segmentation-models-pytorch, whole and slimmed to half of its MACs, at 192x256: the share of
pixels that get the same class from the file and from the network, on drawn scenes, some of a size that is padded; and
the milliseconds of one forward, in turns.

A network fresh from its initialisation has logits that hardly differ, and then rounding decides the class. Training
would make them differ, and take far longer than all the rest. So the weights are random and every figure is made like
a trained network's: BatchNorm statistics are estimated on drawn scenes, as after a cut in training, and the last layer
is scaled and shifted so that each class's logit has mean 0 and standard deviation 3 over them. The notes tell the
largest share of pixels whose two best logits are closer than file and network are: those rounding may decide.
"""

import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.cost.latency import interleave
from dance_seg.export import Agreement, OnnxFile, export_onnx
from dance_seg.models.smp import SmpModel
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.normalise import normalise
from datamodules.scenes import CLASSES, PALETTE, render_scene
from tools.bench.common import ratio, spread, write_result
from tools.cli import parser, run


class Family(NamedTuple):
    """An architecture with the encoder it is shown with."""

    arch: str
    encoder_name: str

    def __str__(self) -> str:
        return f"{self.arch}_{self.encoder_name}"


FAMILIES = (
    *(
        Family(arch, "resnet18")
        for arch in (
            "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet",
        )
    ),
    Family("segformer", "mit_b0"),
    Family("dpt", "tu-vit_small_patch16_224"),  # what DPT is made for
)  # fmt: skip
SIZE, PADDED_SIZE = (192, 256), (180, 250)
SCENES = 8  # compared, half of them at a size that is padded
LOGIT_DEVIATION = 3.0
AGREEMENT = 0.9999


class Measured(NamedTuple):
    """What one network showed."""

    agreement: Agreement
    milliseconds: dict[str, list[float]]
    undecided: float  # share of the pixels whose two best logits differ by less than file and network do
    seconds: float  # that the export took, the comparison included


def main() -> int:
    """Measure every family and write the result; exit status 1 when one disagrees."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--runs", type=int, default=7, help="rounds of latency; default 7")
    arguments_parser.add_argument("--only", nargs="+", metavar="ARCH", help="such as fpn segformer; default: all")
    arguments_parser.add_argument("--quick", action="store_true", help="one family, one round: whether it runs")
    arguments = arguments_parser.parse_args()
    known = [family.arch for family in FAMILIES]
    only = ["fpn"] if arguments.quick else arguments.only or known
    unknown = sorted(set(only) - set(known))
    if unknown:
        raise ValueError(f"--only {unknown[0]}: choose of {', '.join(known)}")
    runs = 1 if arguments.quick else arguments.runs
    ratios, agreement, undecided, slow = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for family in (family for family in FAMILIES if family.arch in only):
            for half in (False, True):
                name = f"{family}_half" if half else str(family)
                found = measure(prepared(family, half=half), Path(folder) / f"{name}.onnx", runs)
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
        "pixels compared": f"{SCENES} drawn scenes, half of {PADDED_SIZE[0]}x{PADDED_SIZE[1]}, which is padded",
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


def prepared(family: Family, *, half: bool) -> SmpModel:
    """A network whose figures are made like a trained one's; slimmed to half of its MACs where asked."""
    torch.manual_seed(0)
    model = SmpModel(arch=family.arch, encoder_name=family.encoder_name, num_classes=len(CLASSES)).eval()
    if half:
        slim(model, NetworkSlimming(keep=0.5, importance="magnitude"), input_size=SIZE)
    batches = [normalise(torch.stack([pixels(index) for index in range(start, start + 4)])) for start in (100, 104)]
    reestimate_batch_norm(model, batches)
    spread_logits(model, batches)
    return model.eval()


@torch.no_grad()
def spread_logits(model: SmpModel, batches: Sequence[Tensor]) -> None:
    """Scale and shift the last layer so that the logits of each class have mean 0 and a known deviation."""
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    if last.out_channels != model.num_classes:
        raise ValueError(f"{model.arch}: its last convolution makes {last.out_channels} channels, not classes")
    logits = torch.cat([model.coarse_logits(batch).logits for batch in batches]).transpose(0, 1).flatten(1)
    scale = LOGIT_DEVIATION / logits.std(dim=1)
    last.weight.mul_(scale[:, None, None, None])
    bias = torch.zeros(len(scale)) if last.bias is None else last.bias
    last.bias = nn.Parameter((bias - logits.mean(dim=1)) * scale)


def measure(model: SmpModel, path: Path, runs: int) -> Measured:
    """Export, compare on drawn scenes, and time one forward of both in turns."""
    sizes = [SIZE if index % 2 == 0 else PADDED_SIZE for index in range(SCENES)]
    images = [render_scene(0, index, size).image for index, size in enumerate(sizes)]
    record = {
        "labels": {"classes": list(CLASSES), "palette": [list(color) for color in PALETTE], "table": []},
        "recipe": {"data": {"name": "shapes", "args": {}}, "model": {"name": "smp", "args": {}}},
    }
    start = time.perf_counter()
    agreement = export_onnx(model, path, input_size=SIZE, record=record, images=images, at_least=0.0)
    seconds = time.perf_counter() - start
    file, one = OnnxFile(path, threads=torch.get_num_threads()), pixels(0)[None]
    array = one.numpy()
    with torch.inference_mode():
        sides = {"onnxruntime": lambda: file.logits(array), "eager": lambda: model(normalise(one))}
        times = {side: [1000 * second for second in each] for side, each in interleave(sides, runs, 2).items()}
        best = [
            model(normalise(torch.from_numpy(image).permute(2, 0, 1)[None])).topk(2, dim=1).values for image in images
        ]
    close = sum(int((two[:, 0] - two[:, 1] < agreement.largest_difference).sum()) for two in best)
    return Measured(agreement, times, close / agreement.pixels, seconds)


def pixels(index: int) -> Tensor:
    """A drawn scene as uint8 (3, H, W)."""
    return torch.from_numpy(render_scene(0, index, SIZE).image).permute(2, 0, 1).contiguous()


if __name__ == "__main__":
    run(main)
