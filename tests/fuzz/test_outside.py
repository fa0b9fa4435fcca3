"""Nothing outside its root is read or written, and nothing of the environment is in what a run leaves."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dance_seg.build import build_model
from dance_seg.errors import DataError, RecipeError
from dance_seg.export import OnnxFile
from dance_seg.recipe import parse_recipe
from tests.tiny import TINY
from tools.fuzz.run_readers import SMALL, onnx

ROOT = Path(__file__).parents[2]
SECRET = "sk-canary-0123456789"


@pytest.mark.parametrize("place", ["../outside/weights.bin", "{tmp}/outside/weights.bin", "link.bin"])
def test_weights_of_an_onnx_file_that_lie_outside_are_not_read(place, tmp_path):
    library = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "weights.bin").write_bytes(np.arange(9, dtype=np.float32).tobytes())
    (inside / "link.bin").symlink_to(outside / "weights.bin")
    model = library.load_from_string(onnx(inside).seeds[0])
    weight = model.graph.initializer[0]
    library.external_data_helper.set_external_data(weight, place.format(tmp=tmp_path), length=36)
    weight.ClearField("raw_data")
    weight.data_location = library.TensorProto.EXTERNAL
    (inside / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="no ONNX file that can be run"):
        OnnxFile(inside / "net.onnx", threads=1)


def test_a_network_too_large_for_any_memory_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match="the network would have more than 100,000 values"):
        build_model(parse_recipe(SMALL), 3, most_values=100_000)
    assert sum(tensor.numel() for tensor in build_model(parse_recipe(SMALL), 3).state_dict().values()) > 100_000


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "..", "a\\\\b", "", "."])
def test_a_run_is_named_after_no_place(name):
    with pytest.raises(RecipeError, match="name"):
        parse_recipe(TINY, [f"name='{name}'"], name="../x")


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_what_a_run_leaves_or_says(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    environment = {**os.environ, "MY_API_KEY": SECRET, "WANDB_MODE": "offline", "PLAIN_CANARY": "canary-plain-987654"}
    words = [
        "-m",
        "tools.train",
        str(tmp_path / "tiny.yaml"),
        "tracking.wandb=offline",
        "--runs",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "report.html"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written)
    for content in (done.stdout, done.stderr, *(path.read_bytes() for path in written)):
        assert SECRET.encode() not in content
        assert b"canary-plain-987654" not in content
