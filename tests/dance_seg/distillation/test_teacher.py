"""Teachers: labels as a teacher must give them, and what cannot be used refused by name."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dance_seg.cost.macs import count_macs
from dance_seg.distillation.teacher import (
    TEACHERS,
    HuggingFaceTeacher,
    MaskRCNNTeacher,
    NetworkTeacher,
    OracleTeacher,
    RecordedTeacher,
    check_classes,
    network_input,
    paint,
)
from dance_seg.errors import DataError
from dance_seg.inference import Protocol, mean_probabilities, predict_labels
from dance_seg.normalise import normalise
from dance_seg.sample import IGNORE, Frame
from tests.dance_seg.distillation.streams import CLASSES, SIZE, frame_at, student


def test_teacher_and_student_of_other_classes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"teacher alone has tree, the student alone has car") as error:
        check_classes(("road", "tree"), ("road", "car"))
    assert "names" in str(error.value)
    with pytest.raises(ValueError, match="another order: road, car and car, road"):
        check_classes(("road", "car"), ("car", "road"))
    check_classes(["road", "car"], ("road", "car"))


# A network --------------------------------------------------------------------------------------------------------


def test_a_network_teaches_what_it_predicts():
    network = student()
    frame = frame_at(3)
    images = normalise(torch.from_numpy(frame.image).permute(2, 0, 1)[None])
    expected = predict_labels(network, images, SIZE)[0].numpy()
    taught = NetworkTeacher(network, CLASSES, device="cpu")(frame)
    np.testing.assert_array_equal(taught.labels, expected)
    assert taught.boxes is None


def test_a_network_at_half_the_resolution_costs_a_quarter_and_labels_the_whole_frame():
    full, half = (NetworkTeacher(student(), CLASSES, resolution, device="cpu") for resolution in (1.0, 0.5))
    assert full.macs(SIZE) == 4 * half.macs(SIZE) == (3 * 12 + 12 * 3) * 9 * 32 * 48
    assert half(frame_at(0)).labels.shape == SIZE
    with pytest.raises(ValueError, match="resolution is 0"):
        NetworkTeacher(student(), CLASSES, 0, device="cpu")


def test_a_network_seen_at_several_scales_labels_and_costs_as_the_evaluation_of_those_scales():
    network, protocol = student(), Protocol(scales=(0.5, 1.0, 1.5), flip=True)
    teacher = NetworkTeacher(network, CLASSES, device="cpu", protocol=protocol)
    frame = frame_at(3)
    images = network_input(frame.image, 1.0, torch.device("cpu"))
    expected = mean_probabilities(network, images, SIZE, protocol).argmax(1)[0].numpy()
    np.testing.assert_array_equal(teacher(frame).labels, expected)
    assert (teacher(frame).labels != NetworkTeacher(network, CLASSES, device="cpu")(frame).labels).any()
    sizes = [(SIZE[0] * k // 2, SIZE[1] * k // 2) for k in (1, 2, 3)]
    assert teacher.macs(SIZE) == 2 * sum(count_macs(network, size).macs for size in sizes)


def test_a_frame_that_may_not_be_written_to_is_taken_without_a_warning(recwarn):
    image = frame_at(0).image
    image.flags.writeable = False
    network_input(image, 1.0, torch.device("cpu"))
    assert not recwarn


# Recorded masks ---------------------------------------------------------------------------------------------------


def write(path, labels, mode="L"):
    picture = Image.fromarray(labels, "L")
    if mode == "P":
        picture = Image.frombytes("P", labels.shape[::-1], labels.tobytes())
        picture.putpalette([7, 8, 9] * 256)
    picture.convert(mode).save(path) if mode == "RGB" else picture.save(path)


def test_recorded_masks_are_found_by_the_index_in_their_name(tmp_path):
    for index in (0, 12):
        write(tmp_path / f"frame_{index:06d}.png", np.full(SIZE, index % 3, np.uint8), "P" if index else "L")
    recorded = RecordedTeacher(tmp_path, CLASSES, macs=7)
    assert (recorded(frame_at(0)).labels == 0).all()
    assert (recorded(frame_at(12)).labels == 0).all()
    assert recorded.macs(SIZE) == 7


def test_recorded_masks_are_taken_in_order_where_that_is_asked_for(tmp_path):
    for place, name in enumerate(("0016E5_07959.png", "0016E5_07961.png")):
        write(tmp_path / name, np.full(SIZE, place + 1, np.uint8))
    recorded = RecordedTeacher(tmp_path, CLASSES, by="order")
    assert [int(recorded(frame_at(index)).labels[0, 0]) for index in (0, 1)] == [1, 2]


def test_a_missing_mask_is_named_with_those_that_are_there(tmp_path):
    write(tmp_path / "000003.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(DataError, match=r"no mask of frame 4; 1 are there, of frames 3 to 3"):
        RecordedTeacher(tmp_path, CLASSES)(frame_at(4))


def test_masks_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        RecordedTeacher(tmp_path / "nowhere", CLASSES)
    with pytest.raises(DataError, match="holds no masks"):
        RecordedTeacher(tmp_path, CLASSES)
    write(tmp_path / "0.png", np.zeros((8, 8), np.uint8))
    write(tmp_path / "1.png", np.zeros(SIZE, np.uint8), "RGB")
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    recorded = RecordedTeacher(tmp_path, CLASSES)
    for index, problem in ((0, "0.png: is 8 x 8, frame 0 is 32 x 48"), (1, "mode RGB"), (2, "2.png: cannot be read")):
        with pytest.raises(DataError, match=problem):
            recorded(frame_at(index))
    write(tmp_path / "mask_2.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(DataError, match="second mask of frame 2"):
        RecordedTeacher(tmp_path, CLASSES)
    with pytest.raises(ValueError, match=r"index .* or order"):
        RecordedTeacher(tmp_path, CLASSES, by="name")


# An oracle --------------------------------------------------------------------------------------------------------


def test_the_oracle_is_wrong_on_the_share_asked_for_and_always_in_the_same_places():
    """A class at random out of three is right by chance a third of the time: 0.3 noise is 0.2 wrong."""
    oracle = OracleTeacher(CLASSES, noise=0.3, block=1)
    wrong = np.mean([(oracle(frame_at(i)).labels != frame_at(i).label).mean() for i in range(20)])
    assert wrong == pytest.approx(0.2, abs=0.02)
    np.testing.assert_array_equal(
        oracle(frame_at(5)).labels, OracleTeacher(CLASSES, noise=0.3, block=1)(frame_at(5)).labels
    )
    assert (oracle(frame_at(5)).labels != oracle(frame_at(6)._replace(label=frame_at(5).label)).labels).any()


def test_noise_comes_in_squares_and_leaves_ignored_pixels_ignored():
    label = np.full((8, 8), IGNORE, np.uint8)
    label[:, :4] = 0
    taught = OracleTeacher(CLASSES, noise=1.0, block=4)(Frame(0, 0.0, np.zeros((8, 8, 3), np.uint8), label)).labels
    assert (taught[:, 4:] == IGNORE).all()
    assert all(len(np.unique(taught[rows, :4])) == 1 for rows in (slice(0, 4), slice(4, 8)))


def test_the_oracle_needs_ground_truth():
    with pytest.raises(ValueError, match="frame 3 has no ground truth"):
        OracleTeacher(CLASSES)(frame_at(3)._replace(label=None))


# Mask R-CNN -------------------------------------------------------------------------------------------------------

COCO = ["__background__", "person", "car", "truck"]


class FakeMaskRCNN(nn.Module):
    """Finds a person, a car that overlaps it, a truck nobody asked for, and something unsure."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, images):
        height, width = images[0].shape[-2:]
        masks = torch.zeros(4, 1, height, width)
        masks[0, 0, :4, :4], masks[1, 0, :4, 2:8], masks[2, 0, 8:], masks[3, 0, :, 12:] = 1, 1, 1, 0.9
        boxes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 8, 4], [0, 8, width, height], [12, 0, width, height]])
        return [
            {
                "boxes": boxes,
                "labels": torch.tensor([1, 2, 3, 1]),
                "scores": torch.tensor([0.9, 0.7, 0.95, 0.4]),
                "masks": masks,
            }
        ]


@pytest.fixture
def mask_rcnn(monkeypatch, tmp_path):
    import torchvision.models.detection as detection

    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn", lambda **_: FakeMaskRCNN())
    weights = types.SimpleNamespace(COCO_V1=types.SimpleNamespace(meta={"categories": COCO}))
    monkeypatch.setattr(detection, "MaskRCNN_ResNet50_FPN_Weights", weights)
    torch.save(FakeMaskRCNN().state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_instances_are_painted_the_surest_on_top_and_their_boxes_given(mask_rcnn):
    found = MaskRCNNTeacher(mask_rcnn, ("background", "person", "vehicle"), names={"car": "vehicle"}, device="cpu")(
        frame_at(0)
    )
    assert found.labels[0].tolist() == [1] * 4 + [2] * 4 + [0] * 40
    assert not found.labels[8:].any()  # a truck is none of our classes, and 0.4 is not sure enough
    assert found.boxes.tolist() == [[0, 0, 4, 4], [2, 0, 8, 4]]


def test_pixels_of_no_instance_can_be_ignored(mask_rcnn):
    found = MaskRCNNTeacher(mask_rcnn, ("person",), unpainted=None, score=0.99, device="cpu")(frame_at(0))
    assert (found.labels == IGNORE).all()
    assert found.boxes.shape == (0, 4)


def test_names_and_files_that_mask_rcnn_cannot_use_are_refused(mask_rcnn, tmp_path):
    with pytest.raises(ValueError, match="no class 'bus'"):
        MaskRCNNTeacher(mask_rcnn, CLASSES, names={"bus": "red"})
    with pytest.raises(ValueError, match=r"teacher.names.car is 'green'; choose one of background, red, blue"):
        MaskRCNNTeacher(mask_rcnn, CLASSES, names={"car": "green"})
    with pytest.raises(ValueError, match="are none of"):
        MaskRCNNTeacher(mask_rcnn, CLASSES)
    with pytest.raises(ValueError, match=r"teacher\.unpainted is 'sky'"):
        MaskRCNNTeacher(mask_rcnn, ("person",), unpainted="sky")
    with pytest.raises(DataError, match=r"nowhere\.pth: no such file"):
        MaskRCNNTeacher(tmp_path / "nowhere.pth", ("person",), unpainted=None)
    torch.save({"another": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"other\.pth: is no state dict"):
        MaskRCNNTeacher(tmp_path / "other.pth", ("person",), unpainted=None)


def test_weights_that_could_run_code_are_not_loaded(mask_rcnn, tmp_path):
    torch.save(nn.Conv2d(3, 3, 1), tmp_path / "pickled.pth")
    with pytest.raises(DataError, match=r"pickled\.pth: is no state dict"):
        MaskRCNNTeacher(tmp_path / "pickled.pth", ("person",), unpainted=None)


def test_the_surest_of_two_instances_wins_whatever_their_order():
    left, right = np.array([[True, True, False]]), np.array([[False, True, True]])
    for instances in ([(0.9, 1, left), (0.6, 2, right)], [(0.6, 2, right), (0.9, 1, left)]):
        assert paint((1, 3), instances, 0).tolist() == [[1, 1, 2]]


@pytest.mark.slow
def test_torchvisions_own_mask_rcnn_takes_its_state_dict(tmp_path):
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.save(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict(), tmp_path / "weights.pth")
    found = MaskRCNNTeacher(tmp_path / "weights.pth", ("background", "car"), shorter_side=64, device="cpu")
    taught = found(frame_at(0))
    assert taught.labels.shape == SIZE
    assert taught.boxes.shape[1] == 4
    assert found.macs(SIZE) > 1e9


# Hugging Face -----------------------------------------------------------------------------------------------------


class FakeModel(nn.Module):
    config = types.SimpleNamespace(id2label={0: "wall", 1: "red", 2: "lake"})

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, pixel_values):
        self.layer(pixel_values)  # 3 x 3 MACs a pixel
        logits = torch.zeros(1, 3, 2, 2)
        logits[0, 1, :, 0], logits[0, 2, 0, 1], logits[0, 0, 1, 1] = 1, 1, 1
        return types.SimpleNamespace(logits=logits)


@pytest.fixture
def hugging_face(monkeypatch, tmp_path):
    """A folder that looks like a model's, and a package that looks like transformers; the arguments it was given."""
    given = {}

    def load(kind, made):
        def from_pretrained(cls, folder, **arguments):
            given[kind] = arguments
            return made

        return classmethod(from_pretrained)

    module = types.ModuleType("transformers")
    processor = lambda images, return_tensors: {"pixel_values": torch.zeros(1, 3, 8, 8)}  # noqa: E731
    module.AutoImageProcessor = type("AutoImageProcessor", (), {"from_pretrained": load("processor", processor)})
    module.AutoModelForSemanticSegmentation = type("Auto", (), {"from_pretrained": load("model", FakeModel())})
    monkeypatch.setitem(sys.modules, "transformers", module)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path, given


def test_a_hugging_face_model_is_loaded_locally_without_code_and_mapped_to_our_classes(hugging_face):
    folder, given = hugging_face
    found = HuggingFaceTeacher(folder, CLASSES, names={"lake": "blue"}, device="cpu")(frame_at(0)).labels
    assert (found[:, 0] == 1).all()
    assert found[0, -1] == 2
    assert found[-1, -1] == IGNORE  # walls are none of ours
    assert given["model"] == {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    assert given["processor"] == {"local_files_only": True, "trust_remote_code": False}
    found = HuggingFaceTeacher(folder, CLASSES, others="background", device="cpu")(frame_at(0)).labels
    assert set(np.unique(found)) == {0, 1}


def test_the_macs_of_a_hugging_face_model_are_those_at_its_processors_size(hugging_face):
    assert HuggingFaceTeacher(hugging_face[0], CLASSES, others="background", device="cpu").macs(SIZE) == 9 * 8 * 8


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="safetensors"):
        HuggingFaceTeacher(tmp_path, CLASSES)


def test_without_transformers_the_message_says_how_to_get_it(monkeypatch, hugging_face):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        HuggingFaceTeacher(hugging_face[0], CLASSES)


def test_every_teacher_that_a_recipe_can_name_is_there():
    assert set(TEACHERS) == {"network", "recorded", "oracle", "mask_rcnn", "hugging_face"}
