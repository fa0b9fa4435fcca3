"""The data module: arguments are checked by name, validation is not padded, statistics come from training images."""

import warnings

import numpy as np
import pytest
import torch

from dance_seg.data_slimming.plan import DataSlimming
from dance_seg.errors import DataError
from dance_seg.part import Part, build_part
from datamodules.dataset import DatasetDataModule, DatasetSource
from datamodules.files import CamVidDataModule, FolderDataModule
from datamodules.label_table import label_table
from datamodules.shapes import ShapesDataModule
from tools.make_shapes import write_layout

TWO = label_table(("road", "car"), raw_to_train={0: 0, 1: 1}, ignore=[255])

SMALL = {"num_train": 12, "num_val": 5, "size": [64, 64], "crop": [64, 64], "batch_size": 4}


def shapes(tmp_path, **changes):
    made = ShapesDataModule(**{**SMALL, "cache_dir": str(tmp_path), **changes})
    made.fit_to(stride=32, epochs=4, seed=0, data_slimming=None)
    return made


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"crop": [64]}, "data.args.crop"),
        ({"crop": [64, 10]}, "data.args.crop"),
        ({"crop": [32768, 32768]}, "data.args.crop"),
        ({"batch_size": 1}, "data.args.batch_size"),
        ({"batch_size": 2.5}, "data.args.batch_size"),
        ({"random_scale": [2.0, 0.5]}, "data.args.random_scale"),
        ({"resolution": 2}, "data.args.resolution"),
        ({"validate_on": "everything"}, "data.args.validate_on"),
        ({"validate_on": "held_out"}, "data.args.hold_out"),
        ({"bad_files": "ignore"}, "data.args.bad_files"),
        ({"num_train": 0}, "data.args.num_train"),
        ({"hold_out": 0.5}, "data.args.hold_out"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_key(changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        shapes(tmp_path, **changes)


def test_a_misspelt_argument_names_the_nearest_also_of_the_base_class():
    with pytest.raises(ValueError, match="did you mean 'batch_size'"):
        build_part({"shapes": ShapesDataModule}, Part("shapes", {"batchsize": 4}), at="data")
    with pytest.raises(ValueError, match=r"data\.name is 'shape'.*shapes"):
        build_part({"shapes": ShapesDataModule}, Part("shape"), at="data")
    with pytest.raises(ValueError, match=r"data\.args\.root is missing"):
        build_part({"folder": FolderDataModule}, Part("folder"), at="data")


def test_training_batches_are_normalised_after_transfer_and_validation_is_whole(tmp_path):
    data = shapes(tmp_path)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.dtype == batch.labels.dtype == torch.uint8
    assert tuple(batch.images.shape) == (4, 3, 64, 64)
    moved = data.on_after_batch_transfer(batch, 0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (batch.images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(moved.images, expected, rtol=1e-5, atol=1e-5)
    assert moved.labels.dtype == torch.int64
    assert [b.names[0] for b in data.val_dataloader()] == list(data.source("val").names)


def test_workers_give_the_same_batches_as_none(tmp_path):
    def images(workers):
        data = shapes(tmp_path, workers=workers)
        return [(b.images, b.labels, b.names) for b in data.train_dataloader()]

    for alone, helped in zip(images(0), images(2), strict=True):
        assert alone[2] == helped[2]
        assert torch.equal(alone[0], helped[0])
        assert torch.equal(alone[1], helped[1])


def test_resolution_makes_the_images_smaller_and_leaves_the_labels(tmp_path):
    data = shapes(tmp_path, resolution=0.5)
    batch = next(iter(data.val_dataloader()))
    assert tuple(batch.images.shape) == (1, 3, 32, 32)
    assert tuple(batch.labels.shape) == (1, 64, 64)


def test_statistics_are_taken_on_a_fixed_list_of_training_images(tmp_path):
    one = list(shapes(tmp_path, statistics_images=5).statistics_batches())
    two = list(shapes(tmp_path, statistics_images=5).statistics_batches())
    assert [len(b) for b in one] == [4, 2]  # 5 images; the last is doubled
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_drive_that_is_held_out_is_validated_on_and_not_trained_on(tmp_path):
    write_layout("camvid", tmp_path / "camvid", 24, size=(64, 96))
    data = CamVidDataModule(root=str(tmp_path / "camvid"), hold_out="0006R0", cache_dir=str(tmp_path), batch_size=2)
    assert {name.split("_")[0] for name in data.source("held_out").names} == {"0006R0"}
    assert "0006R0" not in {name.split("_")[0] for name in data.source("train").names}
    assert data.validate_on == "held_out"


def test_the_number_of_protected_images_is_said_loudly_when_it_is_most(tmp_path):
    data = shapes(tmp_path, num_train=12)
    data.fit_to(stride=32, epochs=4, seed=0, data_slimming=DataSlimming(rare_class_images=1.0, drop_below=0.5))
    data.prepare_data()
    with pytest.warns(UserWarning, match="kept for a rare class"):
        _ = data.batches


class Pairs(torch.utils.data.Dataset):
    def __init__(self, image, label):
        self.image, self.label = image, label

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.image, self.label


@pytest.mark.parametrize(
    "image",
    [
        torch.full((3, 40, 50), 0.5),
        np.full((40, 50, 3), 128, np.uint8),
        torch.full((3, 40, 50), 128, dtype=torch.uint8),
    ],
)
def test_a_users_dataset_may_hold_arrays_or_tensors_in_either_order(image):
    sample = DatasetSource(Pairs(image, torch.zeros(40, 50, dtype=torch.long)), "train", TWO).load(0)
    assert sample.image.shape == (40, 50, 3)
    assert sample.image.dtype == np.uint8
    assert sample.image[0, 0].tolist() == [128, 128, 128]


def test_a_users_dataset_with_the_wrong_form_is_refused():
    with pytest.raises(ValueError, match="give"):
        DatasetSource(Pairs(torch.zeros(1, 40, 50), torch.zeros(40, 50)), "train", TWO).load(0)
    with pytest.raises(ValueError, match="before normalisation"):
        DatasetSource(Pairs(torch.full((3, 40, 50), 2.0), torch.zeros(40, 50)), "train", TWO).load(0)
    with pytest.raises(ValueError, match="not test"):
        DatasetDataModule(None, None, ["a"]).raw_source("test")


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (256, torch.long, r"raw id 256 \(1 pixel\) is not in the label table"),  # 0 as uint8
        (-100, torch.long, r"raw id -100"),
        (2, torch.uint8, r"raw id 2 \(1 pixel\) is not in the label table"),
        (1.9, torch.float32, "the label is float32; give class indices"),
    ],
)
def test_a_users_label_that_names_no_class_is_refused_and_not_taken_for_another(value, dtype, said):
    label = torch.zeros(40, 50, dtype=dtype)
    label[0, 0], label[1, 1] = value, 1
    with pytest.raises(DataError, match=f"^train_0000000: {said}"):
        DatasetSource(Pairs(torch.zeros(3, 40, 50), label), "train", TWO).load(0)
    label[0, 0] = 255
    if dtype != torch.float32:
        kept = DatasetSource(Pairs(torch.zeros(3, 40, 50), label), "train", TWO).load(0).label
        assert kept[0, 0] == 255
        assert kept[1, 1] == 1


def test_of_a_users_dataset_nothing_is_kept_unless_it_says_what_it_is(tmp_path):
    pairs = [(torch.zeros(3, 40, 50), torch.zeros(40, 50, dtype=torch.long))] * 4
    for fingerprint, kept in ((None, 0), ("version 1", 1), ("version 1", 1), ("version 2", 2)):
        data = DatasetDataModule(pairs, pairs, ["a", "b"], fingerprint=fingerprint, cache_dir=str(tmp_path))
        data.fit_to(stride=32, epochs=1, seed=0, data_slimming=DataSlimming())
        assert len(data.table.values) == 4
        assert len(list(tmp_path.rglob("*.json"))) == kept
    with pytest.raises(ValueError, match=r"cache_gb is 1, and a Dataset cannot say .*give a fingerprint"):
        DatasetDataModule(pairs, pairs, ["a", "b"], cache_gb=1)


def test_at_adaptive_resolution_each_image_is_as_large_as_its_complexity_calls_for(tmp_path):
    slimming = DataSlimming(scales=(0.5, 1.0), quantiles=(0.5,), inference="adaptive")
    data = shapes(tmp_path, num_val=12)
    data.fit_to(stride=32, epochs=2, seed=0, data_slimming=slimming)
    sizes = [tuple(batch.images.shape[-2:]) for batch in data.val_dataloader()]
    labels = {tuple(batch.labels.shape[-2:]) for batch in data.val_dataloader()}
    assert set(sizes) == {(32, 32), (64, 64)}
    assert labels == {(64, 64)}
    shares = data.inference_sizes("val")
    assert shares == {size: sizes.count(size) / 12 for size in ((32, 32), (64, 64))}
    # the training images themselves: half of them lie below the quantile 0.5
    assert data.inference_sizes("train")[(32, 32)] == 0.5


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"root": None}, "data.args.root is None; name the folder"),
        ({"root": ""}, "data.args.root is ''; name the folder"),
        ({"root": 0}, "data.args.root is 0"),
        ({"root": ".", "cache_dir": 3}, "data.args.cache_dir is 3; name a folder"),
    ],
)
def test_a_folder_that_is_no_text_is_refused_by_its_key(value, said):
    with pytest.raises(ValueError, match=said):
        build_part({"folder": FolderDataModule}, Part("folder", value), at="data").raw_source("train")


def test_masks_of_one_class_are_said_loudly(tmp_path):
    white = [(torch.zeros(3, 40, 50), torch.where(torch.rand(40, 50) > 0.5, 255, 0))] * 4
    for pairs, warned in ((white, True), ([(white[0][0], torch.arange(50).expand(40, 50) % 2)] * 4, False)):
        data = DatasetDataModule(pairs, pairs, ["road", "car"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data.prepare_data()
        assert (
            any("no class but road: are the masks saved with 255 for white" in str(one.message) for one in caught)
            is warned
        )
