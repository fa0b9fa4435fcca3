"""Who may import whom: tools -> datamodules -> dance_seg, and inside dance_seg only downwards."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A file imports only from lower ranks and from its own package.
RANKS = {
    "sample": 0, "part": 0, "randomness": 0, "errors": 0, "machine": 0, "signals": 0, "heartbeat": 1, "ddp": 1,
    "distributed": 0, "normalise": 0, "plain_data": 0.5, "allocation": 0,
    "data_slimming": 1, "losses": 1, "batch_norm": 0.5, "metrics": 1, "evaluator": 1, "cost": 1, "options": 1,
    "early_exit": 1.5, "supernet": 1.7,
    "boundary": 2, "consistency": 2, "inference": 2,
    "models": 2, "network_slimming": 2,
    "distillation": 3,  # labels by inference, scores by consistency; for recipe and report
    "checkpoint": 2, "background": 2.5, "checkpoint_io": 3,
    "tracking": 3, "metrics_file": 1, "module": 3, "callbacks": 3,
    "calibration": 4, "subnet_scores": 4.5,
    "recipe": 4, "report": 4,
    "execution": 5, "run_folder": 5, "build": 6,
    "file_metadata": 6, "onnx_tools": 6,
    "found_network": 7,
    "export": 7, "export_exits": 7.5, "predict": 8,
    "teachers": 8, "stream_pictures": 9, "stream": 10,
}  # fmt: skip

# Heavy or replaceable libraries have few homes.
HOMES = {
    "omegaconf": {"dance_seg/recipe.py"},
    "albumentations": {"datamodules/transforms.py"},
    "wandb": {"dance_seg/tracking.py"},
    "pytorch_lightning": {
        "dance_seg/module.py", "dance_seg/tracking.py", "dance_seg/build.py",
        "dance_seg/ddp.py", "datamodules/base.py",
        *(f"dance_seg/callbacks/{name}.py" for name in (
            "checkpoints", "cuts", "energy", "finite", "image_losses", "ledger", "pictures", "plan", "resume",
            "statistics", "stop", "watch",
        )),
    },
    "segmentation_models_pytorch": {"dance_seg/models/smp.py"},
    "av": {"datamodules/video_file.py"},
    "optuna": {"dance_seg/supernet/storage.py", "dance_seg/supernet/front.py"},
}  # fmt: skip


def files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path, *, only_top=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if only_top else ast.walk(tree)
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in nodes:
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module


def relative(path):
    return path.relative_to(ROOT).as_posix()


def package(path):
    return relative(path).split("/")[1].removesuffix(".py")


@pytest.mark.parametrize("path", files("dance_seg"), ids=relative)
def test_dance_seg_imports_only_downwards(path):
    own = package(path)
    for name in imports(path):
        top, *rest = name.split(".")
        assert top not in ("datamodules", "tools"), f"{relative(path)} imports {name}"
        if top == "dance_seg" and rest and own != "__init__" and rest[0] != own:
            assert RANKS[rest[0]] < RANKS[own] or (RANKS[own] == RANKS[rest[0]] == 3), (
                f"{relative(path)} imports {name}"
            )


@pytest.mark.parametrize("path", files("datamodules"), ids=relative)
def test_datamodules_never_import_tools(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "tools"]


@pytest.mark.parametrize("library", HOMES)
def test_a_library_with_a_home_is_imported_nowhere_else(library):
    users = {relative(p) for p in files("dance_seg", "datamodules") if library in {n.split(".")[0] for n in imports(p)}}
    assert users <= HOMES[library]


@pytest.mark.parametrize("path", files("dance_seg", "datamodules", "tools"), ids=relative)
def test_slow_libraries_are_imported_when_used(path):
    if "bench" in path.parts:  # a benchmark needs both sides
        return
    late = {"wandb", "albumentations", "segmentation_models_pytorch", "matplotlib", "jinja2", "timm"}
    assert not late & {name.split(".")[0] for name in imports(path, only_top=True)}


def test_torchvision_never_decodes():
    for path in files("dance_seg", "datamodules", "tools"):
        found = {name for name in imports(path) if name.split(".")[0] == "torchvision"}
        allowed = {"torchvision.models.detection"} if relative(path) == "dance_seg/distillation/teacher.py" else set()
        assert found <= allowed, relative(path)
