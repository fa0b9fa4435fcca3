"""MACs against counts by hand and against torch's own FLOP counter (two FLOPs are one MAC)."""

import copy

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dance_seg.cost.macs import EVERYTHING_ELSE, OperationCounter, count_macs, count_training_macs

MODELS = {"unet": "resnet18", "fpn": "resnet18", "deeplabv3plus": "resnet18", "segformer": "mit_b0"}

# Every architecture once, and encoders whose convolutions are grouped or that attend.
# Those that bring no kind of operation of their own only in the long run.
FAMILIES = [
    *((arch, "resnet18") for arch in ("manet", "pspnet", "pan", "deeplabv3")),
    ("dpt", "tu-vit_tiny_patch16_224"),
    ("fpn", "mobilenet_v2"),
    *(
        pytest.param(*family, marks=pytest.mark.slow)
        for family in (
            ("unetplusplus", "resnet18"),
            ("linknet", "resnet18"),
            ("upernet", "resnet18"),
            ("fpn", "tu-convnext_atto"),
        )
    ),
]
GROUPED = {"mobilenet_v2", "tu-convnext_atto"}  # torch's counter overstates these backward


def smp_model(name: str) -> nn.Module:
    return smp.create_model(name, encoder_name=MODELS[name], encoder_weights=None, classes=5)


class Calls(nn.Module):
    """A module that calls a function of its input and, maybe, one parameter."""

    def __init__(self, function, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = None if shape is None else nn.Parameter(torch.zeros(shape))

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images) if self.weight is None else self.function(images, self.weight)


@pytest.mark.parametrize(
    ("layer", "macs", "written"),
    [
        # kernel 3x3, 3 inputs, 8 outputs, 10x20 pixels
        (nn.Conv2d(3, 8, 3, padding=1), 9 * 3 * 8 * 10 * 20, 8 * 10 * 20),
        (nn.Conv2d(3, 8, 3, padding=1, stride=2), 9 * 3 * 8 * 5 * 10, 8 * 5 * 10),
        (nn.Conv2d(3, 8, 3, dilation=2), 9 * 3 * 8 * 6 * 16, 8 * 6 * 16),
        # each of 6 outputs sees one input
        (nn.Conv2d(3, 6, 5, padding=2, groups=3), 25 * 1 * 6 * 10 * 20, 6 * 10 * 20),
        # each of 3 x 10 x 20 inputs is spread over 2x2 places in 4 outputs
        (nn.ConvTranspose2d(3, 4, 2, stride=2), 3 * 10 * 20 * 4 * 4, 4 * 20 * 40),
        # 3 x 10 rows of 20 numbers, each times 20 x 7 weights
        (nn.Linear(20, 7), 3 * 10 * 20 * 7, 3 * 10 * 7),
        (nn.Linear(20, 7, bias=False), 3 * 10 * 20 * 7, 3 * 10 * 7),
        # rows of each channel with one another: (10, 20) x (20, 10), three times
        (Calls(lambda x: x @ x.transpose(-1, -2)), 3 * 10 * 20 * 10, 3 * 10 * 10),
        (Calls(lambda x: torch.einsum("nchw,nkhw->nck", x, x)), 3 * 3 * 200, 9),
        # each of 4 x 10 x 20 inputs is spread over 2x2 places in the 3 outputs of its half of the channels
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)),
            3 * 4 * 200 + 4 * 200 * 4 * 3,
            4 * 200 + 6 * 800,
        ),
        # 1-d along rows, kernel 3, 10 inputs, 4 outputs
        (nn.Sequential(Calls(lambda x: x[:, 0]), nn.Conv1d(10, 4, 3, padding=1)), 3 * 10 * 4 * 20, 4 * 20),
        # 3-d, kernel 3x3x3, 1 input, 2 outputs
        (nn.Sequential(Calls(lambda x: x[:, None]), nn.Conv3d(1, 2, 3, padding=1)), 27 * 2 * 600, 2 * 600),
        # 3 heads, 10 queries, 10 keys of length 20, 10 values of length 20
        (Calls(lambda x: F.scaled_dot_product_attention(x, x, x)), 3 * 10 * 10 * (20 + 20), None),
    ],
)
def test_counts_by_hand(layer, macs, written):
    cost = count_macs(layer, (10, 20))
    assert cost.macs == macs
    assert cost.uncounted == ()
    assert cost.input_size == (10, 20)
    assert cost.parameters == sum(parameter.numel() for parameter in layer.parameters())
    if written is not None:
        assert cost.activations == written


@pytest.mark.parametrize(
    ("mode", "inputs_mixed"), [("nearest", 0), ("bilinear", 4), ("bicubic", 16), ("nearest-exact", 0)]
)
def test_interpolation_counts_the_weights_of_each_output(mode, inputs_mixed):
    enlarge = Calls(lambda x: F.interpolate(x, size=(30, 40), mode=mode))
    cost = count_macs(enlarge, (10, 20))
    assert cost.macs == inputs_mixed * 3 * 30 * 40
    assert cost.uncounted == ()
    training = count_training_macs(nn.Sequential(nn.Conv2d(3, 3, 1), enlarge), (10, 20))
    assert training.backward_macs == cost.macs + 9 * 200


def test_grid_sampling_counts_the_weights_of_each_output():
    cost = count_macs(
        Calls(lambda x: F.grid_sample(x, torch.zeros(1, 5, 6, 2, device=x.device), align_corners=False)), (10, 20)
    )
    assert cost.macs == 4 * 3 * 5 * 6


def test_what_is_no_product_counts_nothing_and_is_not_listed():
    layers = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Hardswish(), nn.GroupNorm(1, 3), nn.PReLU(), nn.GELU(),
        nn.Dropout(), nn.AvgPool2d(2), nn.LeakyReLU(), nn.Softmax(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    cost = count_macs(layers, (16, 16))
    assert cost.macs == 0
    assert cost.uncounted == ()
    training = count_training_macs(layers, (16, 16))
    assert training.macs == 0
    assert training.uncounted == ()


def test_operations_that_are_not_counted_are_named():
    cost = count_macs(Calls(lambda x: torch.fft.rfft2(x).real), (8, 8))
    assert cost.macs == 0
    assert cost.uncounted == ("aten::_fft_r2c",)


def test_an_operation_of_another_library_is_named():
    from torchvision.ops import deform_conv2d

    def deform(images: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(images, torch.zeros(len(images), 18, 6, 6, device=images.device), weight)

    cost = count_macs(Calls(deform, (4, 3, 3, 3)), (8, 8))
    assert cost.uncounted == ("torchvision::deform_conv2d",)


@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_torchs_counter(name):
    model = smp_model(name).eval()
    cost = count_macs(model, (64, 96))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 96))
    assert cost.uncounted == ()
    assert 2 * (cost.macs - cost.by_operation.get("interpolation", 0)) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["unet", "fpn"])
def test_training_equals_torchs_counter(name):
    """Without grouped convolutions, which torch's counter overstates backward (see the next test)."""
    model = smp_model(name).train()
    cost = count_training_macs(model, (64, 96))
    interpolation = count_macs(model, (64, 96)).by_operation.get("interpolation", 0)
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(torch.zeros(2, 3, 64, 96)).sum()
    assert 2 * 2 * (cost.forward_macs - interpolation) == counter.get_total_flops()
    counter = FlopCounterMode(display=False)
    with counter:
        loss.backward()
    assert 2 * 2 * (cost.backward_macs - interpolation) == counter.get_total_flops()


def test_a_grouped_convolutions_gradients_cost_as_much_as_its_forward_each():
    """Depthwise: the weight's gradient has 8 x 9 elements, each a sum over 64 pixels; so has the input's, turned."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    pointwise, depthwise = 3 * 8 * 64, 8 * 9 * 64
    cost = count_training_macs(model, (8, 8))
    assert cost.forward_macs == pointwise + depthwise
    assert cost.backward_macs == pointwise + 2 * depthwise  # no gradient of the image
    counter = FlopCounterMode(display=False)
    loss = model(torch.zeros(1, 3, 8, 8)).sum()
    with counter:
        loss.backward()
    assert counter.get_total_flops() > 2 * cost.backward_macs


@pytest.mark.parametrize(("arch", "encoder"), FAMILIES)
def test_each_family_equals_torchs_counter(arch, encoder):
    """Both look at the same network, ours apart from the weights of interpolation, which torch does not count."""
    model = smp.create_model(arch, encoder_name=encoder, encoder_weights=None, classes=5).to("meta")
    size = {"dpt": (224, 224), "pan": (128, 128)}.get(arch, (64, 96))
    cost, training = count_macs(model, size), count_training_macs(model, size)
    interpolation = cost.by_operation.get("interpolation", 0)
    assert (cost.uncounted, training.uncounted) == ((), ())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, *size, device="meta"))
    assert 2 * (cost.macs - interpolation) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss = model.train()(torch.empty(2, 3, *size, device="meta")).sum()
    assert 4 * (training.forward_macs - interpolation) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    if encoder in GROUPED:
        assert 4 * training.backward_macs < counter.get_total_flops()
    else:
        assert 4 * (training.backward_macs - interpolation) == counter.get_total_flops()


def test_a_transposed_convolutions_gradients_cost_as_much_as_its_forward_each():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 5, 2, stride=2))
    first, transposed = 3 * 4 * 64, 4 * 64 * 4 * 5
    cost = count_training_macs(model, (8, 8))
    assert (cost.forward_macs, cost.backward_macs) == (first + transposed, first + 2 * transposed)


def test_kernels_that_a_network_makes_for_itself_are_counted():
    """4 kernels of 3 -> 6, 3x3, mixed anew for each image by 4 numbers that a linear layer takes from its mean."""

    class Synthesised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.route, self.kernels = nn.Linear(3, 4), nn.Parameter(torch.zeros(4, 6 * 3 * 9))

        def forward(self, images: Tensor) -> Tensor:
            mixed = self.route(images.mean((2, 3))).softmax(1) @ self.kernels
            kernels = mixed.reshape(-1, 3, 3, 3)  # one group for each image of the batch
            return F.conv2d(images.flatten(0, 1)[None], kernels, padding=1, groups=len(images))

    routing, mixing, convolving = 3 * 4, 4 * 6 * 27, 6 * 27 * 8 * 8
    cost = count_macs(Synthesised(), (8, 8), batch=2)
    assert cost.macs == routing + mixing + convolving
    assert cost.by_operation == {"convolution": convolving, "matrix product": routing + mixing}
    assert cost.uncounted == ()
    # Mixing has two factors that are learnt, routing one, and the image of the convolution takes no gradient.
    assert count_training_macs(Synthesised(), (8, 8)).backward_macs == routing + 2 * mixing + convolving


def test_torchs_own_attention_layer_equals_torchs_counter_and_is_counted_whole():
    """4 projections of 20 x 20 for 30 tokens, and two products of 30 x 30 x 20."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(20, 4, batch_first=True)

        def forward(self, images: Tensor) -> Tensor:
            tokens = images.flatten(1, 2)  # (N, 3 x 10, 20)
            return self.layer(tokens, tokens, tokens, need_weights=False)[0]

    for cost in (count_macs(Attending(), (10, 20)), count_training_macs(Attending(), (10, 20))):
        assert getattr(cost, "forward_macs", getattr(cost, "macs", 0)) == 4 * 30 * 20 * 20 + 2 * 30 * 30 * 20
        assert cost.uncounted == ()


def test_the_bytes_of_an_operation_are_those_of_its_tensors():
    """Images, weights, biases and results of two float32 convolutions; ReLU reads and writes; a view moves nothing."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()).eval()
    counter = OperationCounter()
    with torch.no_grad():
        images = torch.zeros(2, 3, 10, 20)
        with counter:
            model(images)
    elements = (2 * 3 * 200 + 3 * 8 + 8 + 2 * 8 * 200) + (2 * 8 * 200 + 8 * 4 + 4 + 2 * 4 * 200)
    assert counter.bytes["forward"] == {"convolution": 4 * elements, EVERYTHING_ELSE: 4 * 2 * (2 * 8 * 200)}


@pytest.mark.parametrize("name", MODELS)
def test_backward_is_twice_forward_less_the_images_gradient(name):
    """Every product has two factors, so two gradients, each as dear as itself; the image needs none.

    An interpolation has one factor that takes a gradient.
    """
    model = smp_model(name)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first_macs = []
    first.register_forward_hook(
        lambda module, inputs, output: first_macs.append(output[0].numel() * module.weight[0].numel())
    )
    cost, inference = count_training_macs(model, (64, 96)), count_macs(model, (64, 96))
    interpolation = inference.by_operation.get("interpolation", 0)
    assert cost.uncounted == ()
    assert cost.forward_macs == inference.macs
    assert cost.backward_macs == 2 * (cost.forward_macs - interpolation) + interpolation - first_macs[0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_costs_the_same_whichever_kernel_runs(device):
    """Forward two products, backward four: on the CPU in one fused kernel, on the meta device one by one."""

    class Attention(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            if device == "cpu":
                images.sum().item()  # looks at a value: counted on the CPU instead of the meta device
            heads = self.layer(images).unflatten(1, (3, 4)).flatten(3).transpose(2, 3)  # (N, 3 heads, 48 pixels, 4)
            return F.scaled_dot_product_attention(heads, heads, heads)

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 12, 1)

    products, layer = 2 * 3 * 48 * 48 * 4, 48 * 3 * 12
    cost = count_training_macs(Attention(), (6, 8))
    assert cost.forward_macs == products + layer
    assert cost.backward_macs == 2 * products + layer
    assert cost.uncounted == ()


def test_a_network_that_looks_at_values_is_counted_by_running_it():
    class EarlyExit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, images: Tensor) -> Tensor:
            features = self.first(images)
            return features if features.std() < 1 else self.second(features)

    assert count_macs(EarlyExit(), (5, 5)).macs == 3 * 4 * 25


def test_a_step_is_counted_where_batch_norm_refuses_one_image():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert count_training_macs(pooled, (8, 8)).forward_macs == 12


def test_the_count_per_image_does_not_depend_on_the_batch():
    model = smp_model("fpn")
    assert count_macs(model, (64, 64), batch=3) == count_macs(model, (64, 64))
    assert count_training_macs(model, (64, 64), batch=5) == count_training_macs(model, (64, 64))


def test_parameters_without_a_gradient_are_not_charged_for_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    model[0].requires_grad_(False)
    assert count_training_macs(model, (10, 10)).backward_macs == 4 * 5 * 100  # the second weight's alone
    model.requires_grad_(False)
    assert count_training_macs(model, (10, 10)).backward_macs == 0


@pytest.mark.parametrize("looks_at_values", [False, True])
def test_the_model_and_torchs_random_state_are_left_as_they_are(looks_at_values):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), Calls(lambda x: x + x.sum().item() * looks_at_values)
    )  # fmt: skip
    model[1].eval()
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradient, random_state = model[0].weight.grad.clone(), torch.get_rng_state()
    count_macs(model, (8, 8))
    count_training_macs(model, (8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, gradient)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_training_is_counted_within_inference_mode_and_outputs_of_any_form():
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, images: Tensor) -> dict[str, object]:
            return {"out": self.layer(images), "aux": (self.layer(images) for _ in range(2)), "name": "two"}

    with torch.inference_mode():
        cost = count_training_macs(TwoOutputs(), (5, 5))
    assert (cost.forward_macs, cost.backward_macs) == (3 * 300, 3 * 300)


def test_a_size_beyond_any_memory_is_counted():
    layer = nn.Conv2d(3, 64, 3, padding=1)
    assert count_macs(layer, (100_000, 100_000)).macs == 27 * 64 * 10**10


def test_a_size_that_the_model_refuses_is_the_models_error():
    with pytest.raises(RuntimeError, match="Kernel size"):
        count_macs(nn.Conv2d(3, 4, 7), (5, 5))


def test_deterministic_algorithms_change_no_count():
    """On the meta device torch then takes interpolation apart; a run is deterministic, a measuring tool is not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.UpsamplingBilinear2d(scale_factor=2))
    usual = count_macs(model, (4, 4)), count_training_macs(model, (4, 4))
    assert usual[0].by_operation["interpolation"] == 4 * (4 * 8 * 8)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert (count_macs(model, (4, 4)), count_training_macs(model, (4, 4))) == usual
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
