"""The stages of a network with exits, as files, decide as the network does, and only those that are reached run.

What is expected is always what torch says of the network itself.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dance_seg.export_exits as export_exits
from dance_seg.early_exit.exits import ExitNetwork, State
from dance_seg.early_exit.policy import Decided, ExitPolicy, at_every_exit, decide
from dance_seg.errors import DataError
from dance_seg.export import drawn_images
from dance_seg.export_exits import StagesOnnx, check_stages, export_stages
from dance_seg.models.basisnet import BasisNet
from dance_seg.models.multi_stage import MultiStage, MultiStageSupernet
from dance_seg.models.ranet import RANet
from dance_seg.models.smp_exits import SmpWithExits
from dance_seg.normalise import normalise
from dance_seg.predict import load_predictor
from datamodules.scenes import CLASSES
from tests.exported import small_record
from tools.bench.slimming import enliven

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZE = (64, 96)
LIGHT = "timm-mobilenetv3_small_minimal_100"


class Exported(NamedTuple):
    """A network, its policy, and the folder of its stages."""

    model: ExitNetwork
    policy: ExitPolicy
    folder: Path


class Small(ExitNetwork):
    """Two exits that export in seconds; the second reads the images, and not all that is handed on."""

    num_exits, stride, minimum_size, align_corners = 2, 8, 16, (False, True)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shallow, self.deep = nn.Conv2d(8, len(CLASSES), 1), nn.Conv2d(11, len(CLASSES), 1)

    def begin(self, images: Tensor) -> State:
        return images

    def part(self, exit: int, state: State) -> tuple[State, State]:
        if exit == 0:
            features = self.first(state).relu()
            return features, {"images": state, "features": [features, None], "unread": features * 2}
        looked = nn.functional.avg_pool2d(state["images"], 8)
        return torch.cat([self.second(state["features"][0]), looked], 1), ()

    def head(self, exit: int, seen: State) -> Tensor:
        return 10 * (self.deep if exit else self.shallow)(seen)


def make_small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small().eval()


def lively(make: Callable[[], ExitNetwork]) -> ExitNetwork:
    """A fresh network whose exits tell images apart."""
    torch.manual_seed(0)
    model = make()
    enliven(model, normalised(pictures(4)))
    return model.eval()


def pictures(count: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """From nearly flat to lively."""
    shares = np.linspace(0.1, 1, count)
    drawn = drawn_images([size] * count)
    return [(share * image + (1 - share) * 90).astype(np.uint8) for share, image in zip(shares, drawn, strict=True)]


def normalised(images: list[np.ndarray]) -> Tensor:
    return normalise(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous())


def in_thirds(model: ExitNetwork, images: list[np.ndarray]) -> ExitPolicy:
    """A policy by which as many images leave at each exit, its thresholds halfway between two images' scores."""
    policy = ExitPolicy(score="mean")
    scores = at_every_exit(model, normalised(images), SIZE).scores(policy)
    share, there, thresholds = len(images) // model.num_exits, torch.arange(len(images)), []
    for of_exit in scores.T[:-1]:
        order = of_exit[there].argsort(descending=True)
        surest, others = there[order[:share]], there[order[share:]]
        thresholds.append(float(of_exit[surest].min() + of_exit[others].max()) / 2)
        there = others
    return ExitPolicy(score="mean", thresholds=tuple(thresholds))


def exported(make: Callable[[], ExitNetwork], folder: Path) -> Exported:
    model = lively(make)
    policy = in_thirds(model, pictures(3 * model.num_exits))
    record = {
        **small_record("data.args.cache_dir=/home/somebody/secret"),
        "exits": {"policy": policy.as_record(), "names": ["secret"]},
    }
    export_stages(model, folder, record=record, size=SIZE)
    return Exported(model, policy, folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(make_small, tmp_path_factory.mktemp("small") / "stages")


@pytest.fixture
def copied(small: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small.folder, tmp_path / "copied"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit of each stage that was run."""
    made: list[int] = []
    run = StagesOnnx._run

    def counting(self: StagesOnnx, exit: int, values: Any, **options: Any) -> Any:
        made.append(exit)
        return run(self, exit, values, **options)

    monkeypatch.setattr(StagesOnnx, "_run", counting)
    return made


# As the network decides -----------------------------------------------------------------------------------------------


def check_it_decides_as_the_network_does(found: Exported, calls: list[int]) -> None:
    model, policy, folder = found
    stages, images = StagesOnnx(folder), pictures(3 * model.num_exits)
    taken, same = [], 0
    for image in images:
        expected = decide(model, normalised([image]), SIZE, policy)
        calls.clear()
        decided = stages.labels(image, SIZE, policy)
        same += int((decided.labels == expected.labels).sum())
        assert decided.exits.tolist() == expected.exits.tolist()
        torch.testing.assert_close(decided.scores, expected.scores, atol=1e-4, rtol=0, equal_nan=True)
        assert calls == list(range(int(expected.exits[0]) + 1)), "a stage behind the exit has run"
        taken.append(int(expected.exits[0]))
    assert same >= 0.9999 * len(images) * SIZE[0] * SIZE[1]
    assert [taken.count(exit) for exit in range(model.num_exits)] == [3] * model.num_exits


def test_stages_decide_as_the_network_does_and_later_ones_wait(small: Exported, calls: list[int]) -> None:
    check_it_decides_as_the_network_does(small, calls)


def small_unet() -> SmpWithExits:
    return SmpWithExits(
        arch="unet",
        encoder_name="resnet18",
        num_classes=len(CLASSES),
        encoder_depth=3,
        decoder_channels=[32, 16, 16],
        at=[4],
    )


def test_the_stages_of_a_real_encoder_decide_as_the_network_does(tmp_path: Path, calls: list[int]) -> None:
    check_it_decides_as_the_network_does(exported(small_unet, tmp_path / "stages"), calls)


def taken_out(seed: int | None) -> MultiStage:
    """A network of a supernet, the smallest or a drawn one, which sees images smaller and has stages unequally deep."""
    supernet = MultiStageSupernet(len(CLASSES), "tiny")
    space = supernet.space
    return supernet.extract(space.smallest if seed is None else space.sample(np.random.default_rng(seed)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: RANet(len(CLASSES), size="tiny"),
        lambda: RANet(len(CLASSES), size="tiny", exits_per_network=2),
        lambda: SmpWithExits(arch="fpn", encoder_name="resnet18", num_classes=len(CLASSES)),
        lambda: BasisNet(len(CLASSES), encoder_name=LIGHT, preview_encoder=LIGHT, bases=2, basis_stages=1),
        lambda: BasisNet(len(CLASSES), encoder_name=LIGHT, preview_encoder=LIGHT, bases=2, hand_over=False),
        lambda: taken_out(None),
        lambda: taken_out(1),
    ],
    ids=[
        "ranet",
        "ranet_two_per_network",
        "smp_exits",
        "basisnet",
        "basisnet_no_hand_over",
        "multi_stage_smallest",
        "multi_stage_drawn",
    ],
)
def test_the_stages_of_every_network_decide_as_it_does(
    make: Callable[[], ExitNetwork], tmp_path: Path, calls: list[int]
) -> None:
    check_it_decides_as_the_network_does(exported(make, tmp_path / "stages"), calls)


def test_images_of_a_batch_leave_one_by_one(small: Exported, calls: list[int]) -> None:
    images = normalised(pictures(6))
    expected = decide(small.model, images, SIZE, small.policy)
    found: Decided = decide(StagesOnnx(small.folder), images, SIZE, small.policy)  # type: ignore[arg-type]
    assert found.exits.tolist() == expected.exits.tolist()
    assert (found.labels == expected.labels).float().mean() >= 0.9999
    assert (calls.count(0), calls.count(1)) == (6, int((expected.exits == 1).sum()))


def test_an_exit_that_is_not_wanted_gives_none(small: Exported) -> None:
    images = normalised(pictures(1))
    first, last = StagesOnnx(small.folder).exits(images, [False, True])
    assert first is None
    assert last is not None
    torch.testing.assert_close(last.logits, small.model.coarse_logits(images).logits, atol=1e-4, rtol=0)
    assert last.align_corners
    assert [each is None for each in StagesOnnx(small.folder).exits(images, [True, False])] == [False, True]
    with pytest.raises(ValueError, match=r"wanted has 3 values; .* has 2 exits"):
        StagesOnnx(small.folder).exits(images, [True] * 3)


def test_without_a_policy_it_stops_as_calibrated_or_at_the_last_exit(small: Exported, copied: Path) -> None:
    image = pictures(6)[0]
    assert StagesOnnx(small.folder).policy == small.policy
    as_calibrated = decide(small.model, normalised([image]), SIZE, small.policy).exits
    assert StagesOnnx(small.folder).labels(image, SIZE).exits == as_calibrated
    never = ExitPolicy(thresholds=(math.inf,))
    assert StagesOnnx(small.folder).labels(image, SIZE, never).exits == 1
    uncalibrated = StagesOnnx(copied)
    uncalibrated.policy = None
    assert uncalibrated.labels(image, SIZE).exits == 1


def test_a_smaller_image_is_padded_as_the_network_pads_and_others_are_refused(tmp_path: Path, small: Exported) -> None:
    class Pads(Small):
        def begin(self, images: Tensor) -> State:
            return export_exits.pad_to(images, self.padded_size(*images.shape[-2:]))

    model = Pads().eval()
    model.load_state_dict(small.model.state_dict())
    (image,) = pictures(1, (61, 90))
    expected = decide(model, normalised([image]), (61, 90), small.policy)
    found = StagesOnnx(small.folder).labels(image, (61, 90), small.policy)
    assert found.exits == expected.exits
    assert (found.labels == expected.labels).float().mean() >= 0.9999
    with pytest.raises(ValueError, match=r"stages: .* images of 64x96, and this one is 64x97 .* --size 64 104"):
        StagesOnnx(small.folder).labels(pictures(1, (64, 97))[0], (64, 97))


# What the files say ---------------------------------------------------------------------------------------------------


def test_what_no_later_stage_reads_is_not_handed_on_and_what_stays_the_same_keeps_its_name(small: Exported) -> None:
    first, second = (onnx.load(str(small.folder / f"stage_{number}.onnx")).graph for number in (1, 2))
    assert [value.name for value in first.input] == ["images"]
    assert [value.name for value in first.output] == ["logits", "state_1"]
    assert sorted(value.name for value in second.input) == ["images", "state_1"]
    assert [value.name for value in second.output] == ["logits"]


def test_each_file_says_what_a_reader_must_know_and_nothing_of_the_machine(small: Exported) -> None:
    for number, corners in ((1, False), (2, True)):
        path = small.folder / f"stage_{number}.onnx"
        said = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
        assert json.loads(said["dance_seg.exit"]) == {"number": number, "of": 2, "align_corners": corners}
        assert json.loads(said["dance_seg.exits"]) == {"policy": small.policy.as_record()}
        assert json.loads(said["dance_seg.labels"])["classes"] == list(CLASSES)
        assert json.loads(said["dance_seg.sizes"])["only"] == list(SIZE)
        assert said.keys() >= {"dance_seg.normalisation", "dance_seg.structure"}
        for private in (b"secret", b"site-packages", str(Path(export_exits.__file__).parent).encode()):
            assert private not in path.read_bytes()


def test_a_predictor_stops_by_the_stages(small: Exported) -> None:
    predictor = load_predictor(small.folder)
    for image in pictures(6):
        expected = decide(small.model, normalised([image]), SIZE, small.policy).labels[0].numpy()
        assert (predictor(image) == expected).mean() >= 0.9999
    assert predictor.classes == CLASSES
    assert predictor.runs_on.endswith("2 exits")
    with pytest.raises(ValueError, match=r"stage_2\.onnx: is one stage of a network with exits; give its folder"):
        load_predictor(small.folder / "stage_2.onnx")


# Refusals -------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: flip(folder / "stage_2.onnx"), r"stage_2\.onnx: is not the file that was written with the"),
        (lambda folder: shutil.copy(folder / "stage_1.onnx", folder / "stage_2.onnx"), r"stage_2\.onnx: is not the"),
        (lambda folder: (folder / "stage_2.onnx").unlink(), r"stage_2\.onnx: cannot be read; the network has 2 stages"),
        (lambda folder: (folder / "stages.json").unlink(), r"stages\.json: cannot be read; .* tools\.export RUN"),
        (lambda folder: (folder / "stages.json").write_text("{}"), r"stages\.json: does not say which stages belong"),
        (lambda folder: (folder / "stages.json").write_text("["), r"stages\.json: does not say which stages belong"),
        (shutil.rmtree, r"stages\.json: cannot be read"),
    ],
    ids=["tampered", "mixed", "missing", "no_list", "empty_list", "bad_list", "no_folder"],
)
def test_files_that_do_not_belong_together_are_refused(
    damage: Callable[[Path], object], said: str, copied: Path
) -> None:
    damage(copied)
    with pytest.raises(DataError, match=said):
        StagesOnnx(copied)


def test_stages_of_two_exports_are_refused(small: Exported, copied: Path, tmp_path: Path) -> None:
    """The other network has the same structure and other weights."""
    export_stages(make_small(7), tmp_path / "other", record=small_record(), size=SIZE)
    shutil.copy(tmp_path / "other" / "stage_2.onnx", copied)
    with pytest.raises(DataError, match=r"copied/stage_2\.onnx: is not the file"):
        StagesOnnx(copied)
    with pytest.raises(ValueError, match=r"other/stage_[12]\.onnx: refused: it gives the network's class on 0\."):
        check_stages(small.model, tmp_path / "other", pictures(1))
    assert all(each.argmax >= 0.9999 for each in check_stages(small.model, small.folder, pictures(2)))


def test_the_stages_of_another_structure_are_refused(small: Exported) -> None:
    model = make_small()
    model.second = nn.Conv2d(8, 8, 1)
    with pytest.raises(ValueError, match=r"stages holds another network than the one it is checked against"):
        check_stages(model, small.folder, pictures(1))


def test_files_that_disagree_are_never_put_in_place(monkeypatch: pytest.MonkeyPatch, copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    whole = export_exits.with_open_pooling

    def wrong(model: nn.Module) -> nn.Module:
        changed = whole(model)
        changed.deep.bias.data[0] += 3.0  # type: ignore[union-attr, operator]
        return changed

    monkeypatch.setattr(export_exits, "with_open_pooling", wrong)
    with pytest.raises(ValueError, match=r"copied/stage_2\.onnx: refused: .* and 0\.9999 is asked for"):
        export_stages(make_small(), copied, record=small_record(), size=SIZE)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert list(copied.parent.iterdir()) == [copied]


def test_an_earlier_export_is_replaced_and_a_folder_of_anything_else_is_not(copied: Path) -> None:
    export_stages(make_small(3), copied, record=small_record(), size=(32, 32))
    assert StagesOnnx(copied).sizes.only == (32, 32)
    assert sorted(path.name for path in copied.iterdir()) == ["stage_1.onnx", "stage_2.onnx", "stages.json"]
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="copied: holds something else than the stages of a network"):
        export_stages(make_small(), copied, record=small_record(), size=SIZE)
    assert (copied / "notes.txt").read_text() == "mine"


def test_a_network_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training mode"):
        export_stages(make_small().train(), tmp_path / "stages", record=small_record(), size=SIZE)
    assert not list(tmp_path.iterdir())


# The tool -------------------------------------------------------------------------------------------------------------


def test_the_tool_writes_and_checks_stages(
    small: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dance_seg.build
    from tools.export import main

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(dance_seg.build, "load_run", lambda *_: (small.model, small_record(), Path("best.ckpt")))
    words = ["export", str(tmp_path / "run"), "--images", "2", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    folder = tmp_path / "run" / "export" / "run_stages"
    said = capsys.readouterr().out
    assert f"written to {folder}: 2 stages for images of 64x64, compared on 2 images of shapes val" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [each["argmax"] >= 0.9999 for each in figures["exits"]] == [True, True]
    assert len(figures["onnxruntime_ms"]) == len(figures["eager_ms"]) == 2

    monkeypatch.setattr(sys, "argv", [*words, "--check", str(small.folder)])
    assert main() == 0
    said = capsys.readouterr().out
    assert f"compared with {small.folder}: 2 stages for images of 64x96, compared on drawn pictures, none other" in said
