"""Importing dance_seg and asking a tool for help load nothing that takes long."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# Each tool is asked in turn within one fresh process; what a heavy library costs is not measured here.
ASK = """
import runpy, sys
HEAVY = ("torch", "torchvision", "pytorch_lightning", "lightning", "wandb", "segmentation_models_pytorch", "timm",
         "albumentations", "matplotlib", "scipy", "onnxruntime", "onnx")
import dance_seg
loaded = lambda: sorted(set(HEAVY) & set(sys.modules))
found = {"import dance_seg": loaded()}
from tools.__main__ import verbs
for verb in verbs():
    sys.argv = [verb, "--help"]
    before = loaded()
    try:
        runpy.run_module(f"tools.{verb}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, verb
    found[verb] = sorted(set(loaded()) - set(before))
assert len(found) > 8, found
wrong = {who: names for who, names in found.items() if names}
sys.exit(f"loaded without need: {wrong}" if wrong else 0)
"""


def test_nothing_heavy_is_loaded_before_it_is_used():
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
