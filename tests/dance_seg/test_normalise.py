import pytest
import torch

from dance_seg.normalise import MEAN, STD, denormalise, normalise


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 33, 47), (1, 3, 1, 1), (3, 3, 2, 12000)])
def test_normalise_is_the_formula_and_keeps_the_memory_format(layout, shape):
    torch.manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=layout)
    mean, std = (torch.tensor(row, dtype=torch.float64).view(3, 1, 1) for row in (MEAN, STD))
    normalised = normalise(images)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised.double(), (images.double() / 255 - mean) / std, rtol=0, atol=1e-6)
    assert normalised.is_contiguous(memory_format=layout)
    assert torch.equal(denormalise(normalised), images)
    assert torch.equal(denormalise(normalise(images[0])), images[0])


def test_normalise_of_a_part_of_a_batch():
    images = torch.randint(0, 256, (4, 3, 20, 30), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalise(images[1:3, :, 2:9, 5:17]), normalise(images)[1:3, :, 2:9, 5:17])
    assert normalise(images[:0]).shape == (0, 3, 20, 30)


def test_normalise_on_a_named_device():
    images = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(normalise(images, "cpu"), normalise(images))
    assert normalise(images, torch.device("meta")).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalise_is_the_same_on_an_accelerator(layout):
    images = torch.randint(0, 256, (2, 3, 33, 47), dtype=torch.uint8).contiguous(memory_format=layout)
    there = normalise(images, torch.accelerator.current_accelerator())
    assert there.is_contiguous(memory_format=layout)
    torch.testing.assert_close(there.cpu(), normalise(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)])
def test_normalise_refuses_other_types_and_channels(images):
    with pytest.raises(ValueError, match="normalise takes uint8 images"):
        normalise(images)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_of_an_earlier_result_is_used_again_where_it_fits(layout):
    first, second = (
        torch.randint(0, 256, (2, 3, 7, 9), dtype=torch.uint8).contiguous(memory_format=layout) for _ in range(2)
    )
    expected = normalise(second)
    memory = normalise(first)
    again = normalise(second, out=memory)
    assert again.data_ptr() == memory.data_ptr()
    assert torch.equal(again, expected)
    assert again.is_contiguous(memory_format=layout)


def test_memory_that_does_not_fit_is_left_alone():
    images = torch.randint(0, 256, (2, 3, 7, 9), dtype=torch.uint8)
    expected = normalise(images)
    for memory in (torch.zeros(1, 3, 7, 9), torch.zeros(2, 3, 7, 9).half(), torch.zeros(2, 3, 9, 7).mT, None):
        assert torch.equal(normalise(images, out=memory), expected)
        assert memory is None or not memory.any()
