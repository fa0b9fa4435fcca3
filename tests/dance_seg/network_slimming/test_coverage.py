"""Every architecture of SMP with an encoder of every family is slimmed, and is then a network like any other."""

from copy import deepcopy
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dance_seg.checkpoint import load_checkpoint, save_checkpoint
from dance_seg.cost.macs import count_macs
from dance_seg.models.smp import SmpModel
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.network_slimming.structure import restructure, structure_record
from dance_seg.network_slimming.surgery import silence
from tools.bench.slimming import PAIRS, REFUSED, Pair, enliven, fault_after_cut, trial_size

NUM_CLASSES = 3
Measure = Literal["magnitude", "bn_scale"]


class Case(NamedTuple):
    """One network, how much of it stays and by which measure."""

    pair: Pair
    keep: float
    measure: Measure

    def __str__(self) -> str:
        return f"{self.pair.arch}-{self.pair.encoder_name}-{self.keep}-{self.measure}"


# One of each family of encoders, and with each an architecture that joins, gates or attends to features in its own way.
REPRESENTATIVES = {
    Case(Pair("manet", "resnet18"), 0.5, "magnitude"),
    Case(Pair("pspnet", "mobilenet_v2"), 0.5, "magnitude"),
    Case(Pair("deeplabv3plus", "tu-mobilenetv3_small_100"), 0.75, "bn_scale"),
    Case(Pair("fpn", "efficientnet-b0"), 0.75, "magnitude"),
    Case(Pair("segformer", "mit_b0"), 0.5, "magnitude"),
    Case(Pair("dpt", "tu-vit_small_patch16_224"), 0.5, "magnitude"),
}
BY_SCALE = [
    Pair("unet", "resnet18"),
    Pair("pspnet", "mobilenet_v2"),
    Pair("deeplabv3plus", "tu-mobilenetv3_small_100"),
    Pair("upernet", "efficientnet-b0"),
    Pair("unet", "mit_b0"),
    Pair("dpt", "tu-vit_small_patch16_224"),
]
CASES = [
    *(Case(pair, keep, "magnitude") for pair in PAIRS for keep in (0.75, 0.5)),
    *(Case(pair, keep, "bn_scale") for pair in BY_SCALE for keep in (0.75, 0.5)),
]
IN_ONNX = Pair("segformer", "mit_b0")


class Slimmed(NamedTuple):
    """A network before and after, and what it was given."""

    dense: SmpModel
    silenced: SmpModel  # the dense one with the channels that were cut set to zero
    model: SmpModel
    images: Tensor


def slimmed(case: Case) -> Slimmed:
    dense = build(case.pair)
    images = torch.randn(3, 3, *trial_size(dense))
    enliven(dense, images)
    model, silenced = deepcopy(dense), deepcopy(dense)
    options = NetworkSlimming(keep=case.keep, of="channels", importance=case.measure)
    groups, kept = slim(model, options, input_size=trial_size(dense))
    silence(silenced, groups, kept)
    return Slimmed(dense, silenced, model, images)


def build(pair: Pair) -> SmpModel:
    return SmpModel(**pair._asdict(), num_classes=NUM_CLASSES)


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def relative_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in REPRESENTATIVES else [pytest.mark.slow]) for case in CASES], ids=str
)
def test_a_slimmed_network_is_the_silenced_one_and_trains_and_comes_back_from_its_checkpoint(
    case: Case, tmp_path: Path
) -> None:
    dense, silenced, model, images = slimmed(case)
    made, shape, size = outputs(model, images), outputs(dense, images).shape, trial_size(dense)
    expected = outputs(silenced, images)
    if relative_difference(made, expected) >= 1e-5:  # sums in another order: in deep networks it is told from an error
        made_exactly, expected_exactly = (outputs(deepcopy(one).double(), images.double()) for one in (model, silenced))
        assert relative_difference(made_exactly, expected_exactly) < 1e-10
    assert relative_difference(made, expected) < 2e-5
    # Channels that do not reach the output would make any cut look right.
    assert relative_difference(made, outputs(dense, images)) > 1e-3

    save_checkpoint({"structure": structure_record(model), "state_dict": model.state_dict()}, tmp_path / "slim.ckpt")
    record = load_checkpoint(tmp_path / "slim.ckpt")
    again = build(case.pair)
    restructure(again, record["structure"])
    again.load_state_dict(record["state_dict"])
    assert torch.equal(outputs(again, images), made)

    before, after = count_macs(dense, size), count_macs(model, size)
    assert after.macs < before.macs
    assert after.parameters < before.parameters
    assert fault_after_cut(model, images, shape, before.parameters) is None


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=[] if pair == IN_ONNX else [pytest.mark.slow]) for pair in PAIRS], ids=str
)
def test_a_slimmed_network_computes_the_same_in_onnx(pair: Pair) -> None:
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    onnxruntime = pytest.importorskip("onnxruntime")
    _, _, model, images = slimmed(Case(pair, 0.5, "magnitude"))
    expected = outputs(model, images).numpy()
    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("pair", sorted(REFUSED), ids=str)
def test_the_pairs_that_are_left_out_are_those_that_smp_refuses(pair: Pair) -> None:
    with pytest.raises(ValueError, match="is refused"):
        build(pair)


def test_the_representatives_are_among_the_cases() -> None:
    assert set(CASES) >= REPRESENTATIVES
    assert len(CASES) == len(set(CASES))
