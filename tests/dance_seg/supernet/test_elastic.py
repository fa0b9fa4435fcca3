"""A layer at one of its sizes is the plain layer with those weights; activation is undone whatever happens."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.batch_norm import reestimate_batch_norm
from dance_seg.supernet.elastic import (
    ElasticBatchNorm2d,
    ElasticConv2d,
    activated,
    check_belongs,
    copy_chosen,
    reorder,
)
from dance_seg.supernet.space import SearchSpace, Subnet


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# Convolutions -----------------------------------------------------------------------------------------------------


def test_the_largest_size_is_the_plain_convolution() -> None:
    layer, features = ElasticConv2d((4, 6), 8, kernels=(3, 5), stride=2), torch.randn(2, 10, 9, 11)
    torch.testing.assert_close(layer(features), F.conv2d(features, layer.weight, stride=2, padding=2))


def test_widths_are_the_first_channels_of_what_is_made_and_of_each_input() -> None:
    """Of inputs with 4, 6 and 2 channels come 3, 0 and 2: weights 0..2 and 10..11 of the 12."""
    layer, features = ElasticConv2d((4, 6, 2), 8), torch.randn(2, 5, 7, 7)
    layer.choose(channels_in=(3, 0, 2), channels=5)
    expected = F.conv2d(features, layer.weight[:5, [0, 1, 2, 10, 11]], padding=1)
    torch.testing.assert_close(layer(features), expected)


@pytest.mark.parametrize(("kernel", "cut"), [(7, 0), (5, 1), (3, 2)])
def test_before_anything_is_learnt_a_smaller_kernel_is_the_centre(kernel: int, cut: int) -> None:
    layer = ElasticConv2d((3,), 4, kernels=(3, 5, 7))
    layer.choose(kernel=kernel)
    centre = layer.weight[:, :, cut : 7 - cut, cut : 7 - cut]
    assert torch.equal(layer.chosen_weight(), centre)
    features = torch.randn(1, 3, 10, 10)
    torch.testing.assert_close(layer(features), F.conv2d(features, centre, padding=kernel // 2))


def test_each_smaller_kernel_is_mapped_from_the_next_larger_one() -> None:
    """7 -> 5 -> 3, each by one matrix for all channels, written out here with loops over the channels."""
    layer = ElasticConv2d((2,), 3, kernels=(3, 5, 7))
    for change in layer.changes:
        nn.init.normal_(change)
    layer.choose(kernel=3)
    five, three = (torch.eye(change.shape[0]) + change for change in layer.changes)
    for made in range(3):
        for given in range(2):
            at_five = five @ layer.weight[made, given, 1:6, 1:6].reshape(25)
            at_three = three @ at_five.reshape(5, 5)[1:4, 1:4].reshape(9)
            torch.testing.assert_close(layer.chosen_weight()[made, given], at_three.reshape(3, 3))


def test_the_matrices_learn_from_smaller_kernels() -> None:
    layer = ElasticConv2d((2,), 2, kernels=(3, 5))
    layer.choose(kernel=3)
    layer(torch.randn(1, 2, 6, 6)).square().sum().backward()
    (change,) = layer.changes
    assert change.grad is not None
    assert change.grad.any()
    border = torch.ones(5, 5, dtype=torch.bool)
    border[1:4, 1:4] = False
    assert layer.weight.grad is not None
    assert not layer.weight.grad[:, :, border].any()


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_every_parameter_has_a_gradient_at_every_kernel_while_it_trains(kernel: int) -> None:
    layer = ElasticConv2d((2,), 2, kernels=(3, 5, 7))
    layer.choose(kernel=kernel)
    layer(torch.randn(1, 2, 6, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"kernel": 9}, "kernel is 9; this convolution has 3, 5"),
        ({"channels": 9}, "channels is 9; this convolution makes 1 to 8"),
        ({"channels": 0}, "channels is 0"),
        ({"channels_in": (5,)}, r"channels_in is \(5,\); this convolution takes at most \(4,\)"),
        ({"channels_in": (2, 2)}, r"channels_in is \(2, 2\)"),
    ],
)
def test_sizes_that_a_layer_has_not_are_refused(size: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticConv2d((4,), 8, kernels=(3, 5)).choose(**size)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", [(), (3, 7), (4,), (5, 3)])
def test_kernels_that_do_not_nest_are_refused(kernels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="odd ones that ascend by 2"):
        ElasticConv2d((4,), 8, kernels=kernels)


# Norms ------------------------------------------------------------------------------------------------------------


def lively_norm(channels: int) -> ElasticBatchNorm2d:
    norm = ElasticBatchNorm2d(channels)
    for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert value is not None
        value.uniform_(0.5, 1.5)
    return norm


def plain_norm(norm: ElasticBatchNorm2d) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.channels)
    plain.load_state_dict(norm.chosen_state())
    return plain


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [4, 6])
def test_a_norm_at_one_width_is_the_plain_norm_of_the_first_channels(channels: int, training: bool) -> None:
    norm, features = lively_norm(6), torch.randn(3, channels, 5, 5) * 2 + 1
    norm.choose(channels)
    plain = plain_norm(norm).train(training)
    torch.testing.assert_close(norm.train(training)(features), plain(features))


def test_statistics_are_kept_of_the_largest_network_alone() -> None:
    norm = lively_norm(6).train()
    before = copy.deepcopy(norm.state_dict())
    for channels, features in ((4, torch.randn(2, 4, 5, 5)), (6, torch.randn(2, 6, 5, 5))):
        norm.choose(channels, keeps_statistics=False)
        norm(features)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm.choose()
    norm(torch.randn(2, 6, 5, 5))
    assert not torch.equal(norm.running_mean, before["running_mean"])  # type: ignore[arg-type]


def test_statistics_of_a_smaller_network_cannot_be_written_into_the_supernet() -> None:
    norm = lively_norm(6)
    before = copy.deepcopy(norm.state_dict())
    norm.choose(4, keeps_statistics=False)
    with pytest.raises(ValueError, match="belong to its largest network"):
        reestimate_batch_norm(norm, [torch.randn(2, 4, 5, 5)])
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_statistics_of_the_largest_network_can_be_re_estimated() -> None:
    norm, features = lively_norm(3), torch.randn(4, 3, 5, 5) + 7
    reestimate_batch_norm(norm, [features])
    torch.testing.assert_close(norm.running_mean, features.mean(dim=(0, 2, 3)))


# Which network runs -----------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A supernet of one convolution and its norm, whose width is the choice."""

    space = SearchSpace({"width": (2, 4)})

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = ElasticConv2d((3,), 4), ElasticBatchNorm2d(4)
        self.active = self.space.largest

    def activate(self, subnet: Subnet | None) -> None:
        subnet = self.space.largest if subnet is None else subnet
        check_belongs(subnet, self.space)
        self.active = subnet
        self.convolution.choose(channels=int(subnet["width"]))
        self.norm.choose(int(subnet["width"]), keeps_statistics=subnet == self.space.largest)

    def extract(self, subnet: Subnet) -> nn.Module:
        width = int(subnet["width"])
        network = nn.ModuleDict(
            {"convolution": nn.Conv2d(3, width, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(width)}
        )
        with activated(self, subnet):
            copy_chosen(self, network)
        return nn.Sequential(*network.values())

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.convolution(images))


def test_what_ran_before_runs_again_afterwards() -> None:
    model = Toy()
    with activated(model, model.space.smallest) as same:
        assert same is model
        assert model(torch.randn(2, 3, 4, 4)).shape[1] == 2
        with activated(model, model.space.largest):
            assert model(torch.randn(2, 3, 4, 4)).shape[1] == 4
        assert model.active == model.space.smallest
    assert model.active == model.space.largest
    assert model(torch.randn(2, 3, 4, 4)).shape[1] == 4


def test_what_ran_before_runs_again_after_an_error() -> None:
    model = Toy()
    with pytest.raises(KeyboardInterrupt), activated(model, model.space.smallest):
        raise KeyboardInterrupt
    assert model.active == model.space.largest
    assert model(torch.randn(2, 3, 4, 4)).shape[1] == 4


def test_a_network_of_another_space_is_refused_and_changes_nothing() -> None:
    model = Toy()
    model.activate(model.space.smallest)
    for record, message in (((("depth", 2),), "'depth' is no choice"), ((("width", 3),), "width is 3; choose one of")):
        with pytest.raises(ValueError, match=message), activated(model, Subnet(record)):
            pytest.fail("it was activated")
        assert model.active == model.space.smallest
        assert model(torch.randn(2, 3, 4, 4)).shape[1] == 2


def test_copies_are_the_networks_own() -> None:
    model, images = Toy().eval(), torch.randn(1, 3, 6, 6)
    network = model.extract(model.space.smallest).eval()
    with torch.no_grad(), activated(model, model.space.smallest):
        before = model(images)
        torch.testing.assert_close(network(images), before)
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.equal(model(images), before)


# Order of channels ------------------------------------------------------------------------------------------------


def test_what_an_optimiser_holds_goes_with_the_channels() -> None:
    weight = nn.Parameter(torch.randn(2, 5))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.randn(2, 5)
    optimizer.step()
    before, held = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    reorder(weight, 1, torch.tensor([2, 0, 1]), start=1, optimizers=[optimizer])
    order = [0, 3, 1, 2, 4]
    assert torch.equal(weight, before[:, order])
    assert torch.equal(optimizer.state[weight]["exp_avg"], held[:, order])


def test_a_gradient_goes_with_the_channels() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    weight.grad = torch.tensor([10.0, 20.0, 30.0])
    reorder(weight, 0, torch.tensor([2, 0, 1]))
    assert weight.tolist() == [3, 1, 2]
    assert weight.grad.tolist() == [30, 10, 20]
