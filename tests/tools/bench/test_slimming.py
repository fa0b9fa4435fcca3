"""The benchmark of slimming: its check of a cut network finds faults, its limits hold, and it runs."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tools.bench import slimming
from tools.bench.slimming import PAIRS, Pair, fault_after_cut, in_process, main

IMAGES = torch.ones(2, 3, 4, 4)
SHAPE = torch.Size([2, 2, 4, 4])


def fault(model: nn.Module, *, parameters: int = 1000) -> str | None:
    return fault_after_cut(model, IMAGES, SHAPE, parameters)


def test_a_sound_network_has_no_fault() -> None:
    assert fault(nn.Conv2d(3, 2, 1)) is None


def test_a_network_that_is_not_sound_after_a_cut_is_found_out() -> None:
    assert fault(nn.Conv2d(3, 1, 1)) == "outputs are (2, 1, 4, 4) instead of (2, 2, 4, 4)"
    assert (fault(nn.Conv2d(5, 2, 1)) or "").startswith("RuntimeError: ")
    assert fault(nn.Conv2d(3, 2, 1), parameters=8) == "has 8 parameters and had 8"
    idle = nn.Conv2d(3, 2, 1)
    idle.register_parameter("spare", nn.Parameter(torch.ones(1)))
    assert fault(idle) == "spare gets no gradient"
    broken = nn.Conv2d(3, 2, 1)
    nn.init.constant_(broken.weight, torch.inf)
    assert fault(broken) == "outputs are not finite"


def test_a_parameter_that_is_not_learnt_needs_no_gradient() -> None:
    model = nn.Conv2d(3, 2, 1)
    model.bias.requires_grad_(False)  # type: ignore[union-attr]
    assert fault(model) is None


def test_every_architecture_meets_four_families_of_encoders() -> None:
    assert len(PAIRS) == 12 * 5 - 6 + 1  # two refuse Mix Transformers, DPT takes timm's encoders and its own
    assert Pair("dpt", "tu-vit_small_patch16_224") in PAIRS
    assert len(set(PAIRS)) == len(PAIRS)


@pytest.mark.slow
def test_a_cut_has_a_process_of_its_own_with_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_process(os.getpid)[0] != os.getpid()
    assert in_process(int, "seven") == (None, "ValueError: invalid literal for int() with base 10: 'seven'")
    assert in_process(os._exit, 1) == (None, "its process was killed")
    assert (in_process(bytearray, slimming.LIMIT_BYTES)[1] or "").startswith("MemoryError")
    monkeypatch.setattr(slimming, "LIMIT_SECONDS", 0.5)
    assert in_process(time.sleep, 600) == (None, "takes over 0.5 s")


@pytest.mark.slow
def test_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slimming", "--quick"])
    assert main() == 0
    ratios = json.loads((tmp_path / "runs/bench/slimming_quick.json").read_text())["ratios"]
    assert ratios["coverage"]["median"] == 1.0
    assert ratios.keys() >= {
        "latency_over_macs_half/fpn",
        "latency_over_macs_quarter/fpn",
        "step_gain_over_macs_gain/fpn",
        "cut_seconds/fpn_resnet18",
        "cut_memory_over_model/fpn_resnet18",
    }
    assert "coverage/segformer mit_b0: ours by magnitude: " in capsys.readouterr().out
