"""Convolutions whose kernel is mixed for each image, from a few basis kernels and coefficients that are given to them.

`W(x) = sum_n alpha_n(x) W_n`, biases likewise. Unlike in CondConv and dynamic convolution a layer does not look at its
own input for alpha: all layers are handed theirs by the network before it runs (`handed`). They lie on the layer as an
attribute for the time of one `with`, so that the network between them, any encoder, stays as it is; they are taken
away on leaving it, after an error too, and a layer that has none raises instead of using an older batch's. They are no
part of the state, and every DDP rank hands its own.

Three ways of computing the same (to rounding):

- `grouped`: kernels by one product (B, N) x (N, |W|), then one convolution over the batch, laid side by side as groups;
- `one_by_one`: the same kernels, an image at a time;
- `loop`: N convolutions of all images, their outputs mixed.

Times of these layers over those of a plain convolution in the same layout, 3x3, batch 8, N = 8, one core of a Xeon that
other programs used as well; medians of interleaved runs, all from one session:

                            inference, contiguous         inference, channels_last     forward, backward, contiguous
                           grouped  one_by_one  loop     grouped  one_by_one  loop     grouped  one_by_one  loop
    128 channels at 24x32     1.65        1.59    10        2.02        1.61   9.5        1.15        1.12   7.6
    64 at 48x64               1.28        1.33   9.5        1.71        1.33    10        1.09        1.14    10
    256 at 24x30              1.16        1.23   8.5        1.28        1.37   8.3        1.28        1.25   8.0
    256 at 12x15              1.71        1.79   8.4        1.90        2.18   8.5        1.96        1.84   8.3
    512 at 12x15              2.67        2.17   8.0        2.84        3.11   8.5

Read them as rough: single pairs of the first row lie between 1.3 and 1.8, and the same arithmetic before, on a less
busy core, took 1.10 grouped and 1.23 one by one there. Depthwise layers took from a quarter to ten times a plain one
in the same way, too unsteady to print. What all sessions agree on: the loop loses, even at N = 2 in training (2.1 to
2.9 against 1.0 to 1.9 grouped); in channels_last at 64 channels one by one is faster than grouped; and kernels that are
much larger than the maps they slide over cost memory: N kernels read, B written and read, and where these are more
than the allocator keeps, their pages fetched from the system in every batch. So in inference on a CPU kernels are mixed
and used for some channels at a time (`KERNELS_AT_ONCE`): then the last row takes 1.4 instead of 2.5 grouped and
contiguous, and 1.6 instead of 2.7 in channels_last (one core of an AMD EPYC, beside other work).

B images, N bases, L layers, O and I channels made and read (I of one group).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Synthesis = Literal["auto", "grouped", "one_by_one", "loop"]
Chosen = Callable[[str, nn.Conv2d], bool] | Collection[str]
"""Which convolutions: a predicate of path and layer, or the paths."""

KERNELS_AT_ONCE = 20 * 2**20
"""Bytes of a batch's kernels that are mixed together: memory that the allocator keeps, and not much more than a cache
holds until they are used."""

CHANNELS_IN_STEPS_OF = 32
"""Channels are made at a time in multiples of it, as vectors are: 86 and 47 at a time took a fifth, a third longer."""

LARGE_KERNEL = 4
"""Above this many values of a kernel per value of the image that it reads, the layout decides nothing."""

LOOP_BELOW = 8
"""Below this many bases N convolutions train faster than one in groups on accelerators: CondConv.MXNet's advice, not
measured here."""


class BasisConv2d(nn.Module):
    """A convolution with a kernel for each image: features (B, C, h, w) and coefficients (B, N) -> (B, O, h', w').

    It takes the shape of `convolution` (stride, padding, dilation, groups) and its weights as the first basis. The
    others are own draws as large as those weights, or, with `around`, the weights themselves and so much of such
    noise, for weights that are worth keeping. `synthesis` says how it is computed; `auto` chooses by layout and sizes
    (see `_fastest`), in training on accelerators the loop below 8 bases. With one basis it is a plain convolution times
    its coefficient, bit for bit where that is 1.

    Raises ValueError for fewer than one basis, for another `synthesis`, and for a convolution that is more than
    `nn.Conv2d` or does not pad with zeros; RuntimeError when run without coefficients for its images.

    >>> layer = BasisConv2d(nn.Conv2d(4, 6, 3, padding=1), bases=8)
    >>> with handed([layer], torch.full((2, 1, 8), 1 / 8)):
    ...     tuple(layer(torch.zeros(2, 4, 10, 12)).shape)
    (2, 6, 10, 12)
    """

    weight: nn.Parameter  # (N, O, I, kh, kw, 1): five dimensions torch would refuse to lay out in channels_last
    bias: nn.Parameter | None  # (N, O)

    def __init__(
        self, convolution: nn.Conv2d, bases: int, synthesis: Synthesis = "auto", around: float | None = None
    ) -> None:
        super().__init__()
        if isinstance(bases, bool) or not isinstance(bases, int) or bases < 1:
            raise ValueError(f"model.args.bases is {bases!r}; a whole number of basis kernels from 1, such as 8")
        if synthesis not in get_args(Synthesis):
            raise ValueError(f"synthesis is {synthesis!r}; choose one of {', '.join(get_args(Synthesis))}")
        if type(convolution) is not nn.Conv2d:
            raise ValueError(
                f"a {type(convolution).__name__} does more than nn.Conv2d; basis layers replace plain ones"
            )
        if convolution.padding_mode != "zeros":
            raise ValueError(f"padding_mode is {convolution.padding_mode!r}; basis layers pad with zeros only")
        self.synthesis: Synthesis = synthesis
        self.stride, self.padding, self.dilation = convolution.stride, convolution.padding, convolution.dilation
        self.weight = nn.Parameter(basis_kernels(convolution.weight.detach(), bases, around).unsqueeze(-1))
        bias = convolution.bias
        self.bias = nn.Parameter(bias.detach().expand(bases, -1).clone()) if bias is not None else None
        self.coefficients: Tensor | None = None  # (B, N), while the network runs

    def forward(self, features: Tensor) -> Tensor:
        """Each image's features convolved with its own kernel."""
        coefficients = self._coefficients(len(features))
        way = self.synthesis if self.synthesis != "auto" else self._fastest(features)
        # Groups follow from the shapes, so that network slimming may cut channels of depthwise layers too.
        shape = (self.stride, self.padding, self.dilation, features.shape[1] // self.weight.shape[2])
        weight = self.weight.squeeze(-1)
        if way == "loop" or len(weight) == 1:
            return mixed_outputs(features, coefficients, weight, self.bias, *shape)
        convolve = convolved_one_by_one if way == "one_by_one" or len(features) == 1 else convolved_in_groups
        outputs = []
        for channels in self._channels_at_once(features, weight):
            bias = self.bias[:, channels] if self.bias is not None else None
            kernels, biases = mixed_kernels(coefficients, weight[:, channels], bias)
            outputs.append(convolve(features, kernels, biases, *shape))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _coefficients(self, images: int) -> Tensor:
        if self.coefficients is None:
            raise RuntimeError("a basis layer has no coefficients; run it inside `with handed(layers, coefficients)`")
        if tuple(self.coefficients.shape) != (images, len(self.weight)):
            raise RuntimeError(
                f"a basis layer of {len(self.weight)} bases got coefficients {tuple(self.coefficients.shape)} "
                f"for {images} images"
            )
        return self.coefficients

    def _channels_at_once(self, features: Tensor, weight: Tensor) -> list[slice]:
        """All channels that are made; a few at a time where their kernels are large, see the file's head."""
        made, read = weight.shape[1:3]
        of_batch = len(features) * weight[0].numel() * weight.element_size()
        if features.device.type != "cpu" or torch.is_grad_enabled() or read != features.shape[1]:
            return [slice(None)]
        parts = -(-of_batch // KERNELS_AT_ONCE)
        step = CHANNELS_IN_STEPS_OF * -(-made // (parts * CHANNELS_IN_STEPS_OF))
        return [slice(start, start + step) for start in range(0, made, step)]

    def _fastest(self, features: Tensor) -> Synthesis:
        if features.device.type != "cpu":
            accelerator = features.device.type != "meta"
            return "loop" if self.training and accelerator and len(self.weight) < LOOP_BELOW else "grouped"
        if torch.is_grad_enabled() and self.training:
            return "grouped"
        large = self.weight[0].numel() > LARGE_KERNEL * features[0].numel()
        return "one_by_one" if is_channels_last(features) and not large else "grouped"

    def extra_repr(self) -> str:
        """What torch prints of the layer."""
        bases, made, read, *kernel, _ = self.weight.shape
        return f"{read} per group, {made}, {kernel}, bases={bases}, stride={self.stride}, synthesis={self.synthesis}"


@contextmanager
def handed(layers: Sequence[BasisConv2d], coefficients_BLN: Tensor) -> Iterator[None]:
    """Let each layer have its coefficients inside the `with`, and none after it.

    Raises ValueError when there are not as many coefficients as layers.
    """
    if coefficients_BLN.ndim != 3 or coefficients_BLN.shape[1] != len(layers):
        raise ValueError(f"coefficients are (B, {len(layers)}, N) here, got {tuple(coefficients_BLN.shape)}")
    try:
        for layer, own in zip(layers, coefficients_BLN.unbind(1), strict=True):
            layer.coefficients = own
        yield
    finally:
        for layer in layers:
            layer.coefficients = None


# Mixing ---------------------------------------------------------------------------------------------------------------


def basis_kernels(kernel: Tensor, bases: int, around: float | None) -> Tensor:
    """Kernels (N, O, I, kh, kw) to begin with: the given one, then draws as large, or it with some noise."""
    noise = torch.randn(bases - 1, *kernel.shape, dtype=kernel.dtype, device=kernel.device)
    noise = noise * kernel.square().mean().sqrt()
    others = noise if around is None else kernel + around * noise
    return torch.cat([kernel[None], others])


def mixed_kernels(coefficients_BN: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The kernels (B, O, I, kh, kw) and biases (B, O) of each image: one product (B, N) x (N, |W|), N |W| MACs each."""
    coefficients = coefficients_BN.to(weight.dtype)
    kernels = (coefficients @ weight.flatten(1)).view(-1, *weight.shape[1:])
    return kernels, coefficients @ bias if bias is not None else None


def convolved_in_groups(features: Tensor, kernels: Tensor, biases: Tensor | None, *shape: Any) -> Tensor:
    """Each image with its kernel, as one convolution whose groups are the images."""
    stride, padding, dilation, groups = shape
    batch, channels, *size = features.shape
    outputs = F.conv2d(
        features.reshape(1, batch * channels, *size),
        kernels.flatten(0, 1),
        biases.flatten() if biases is not None else None,
        stride,
        padding,
        dilation,
        batch * groups,
    )
    outputs = outputs.reshape(batch, -1, *outputs.shape[2:])
    # The layers that follow were to run in channels_last.
    return outputs.contiguous(memory_format=torch.channels_last) if is_channels_last(features) else outputs


def convolved_one_by_one(features: Tensor, kernels: Tensor, biases: Tensor | None, *shape: Any) -> Tensor:
    """Each image with its kernel, one after another."""
    if is_channels_last(features):
        kernels = kernels.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(kernels.shape)
    own = biases.unbind() if biases is not None else [None] * len(kernels)
    pairs = zip(features.split(1), kernels.unbind(), own, strict=True)
    outputs = [F.conv2d(image, kernel, bias, *shape) for image, kernel, bias in pairs]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def mixed_outputs(
    features: Tensor, coefficients_BN: Tensor, weight: Tensor, bias: Tensor | None, *shape: Any
) -> Tensor:
    """All images with each basis kernel, and the outputs mixed: the same, since a convolution is linear."""
    own = bias.unbind() if bias is not None else [None] * len(weight)
    total: Tensor | None = None
    for kernel, of_kernel, shares in zip(weight.unbind(), own, coefficients_BN.unbind(1), strict=True):
        outputs = F.conv2d(features, kernel, of_kernel, *shape)
        outputs = outputs * shares.to(outputs.dtype).view(-1, 1, 1, 1)
        total = outputs if total is None else total + outputs
    assert total is not None
    return total


def is_channels_last(features: Tensor) -> bool:
    """Whether the channels of a pixel lie together, and not the pixels of a channel."""
    return features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()


# Choosing -------------------------------------------------------------------------------------------------------------


def to_basis_layers(
    module: nn.Module,
    bases: int,
    at: Chosen | None = None,
    *,
    synthesis: Synthesis = "auto",
    around: float | None = None,
) -> list[BasisConv2d]:
    """Turn convolutions of an encoder, or of any module, into basis layers, in place; the layers in order of names.

    `at` says which, by path or by predicate; by default those with a spatial kernel in the last two stages, see
    `of_last_stages`. Raises ValueError when there are none, when a path is no convolution, and for layers that
    BasisConv2d refuses, naming them.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> len(to_basis_layers(network, bases=4, at=["2"])), type(network[2]).__name__
    (1, 'BasisConv2d')
    """
    names = _names(module, of_last_stages(module) if at is None else at)
    layers = []
    for name in names:
        parent_name, _, own_name = name.rpartition(".")
        try:
            layer = BasisConv2d(module.get_submodule(name), bases, synthesis, around)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{name or 'the module itself'} cannot become a basis layer: {error}") from None
        setattr(module.get_submodule(parent_name), own_name, layer)
        layers.append(layer)
    return layers


def of_last_stages(encoder: nn.Module, stages: int = 2, size: tuple[int, int] = (64, 64)) -> list[str]:
    """The paths of the convolutions with a spatial kernel in the last stages of an encoder, depthwise ones too.

    A stage is what works at one stride, dilation counted as a stride that was taken out, as SMP does it. Seen in one
    pass over an image of `size`. Raises ValueError when the encoder has none that can become basis layers.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 2, 2))
    >>> of_last_stages(network, stages=1)
    ['2']
    """
    strides: dict[str, int] = {}

    def seen(name: str) -> Callable[..., None]:
        def hook(layer: nn.Conv2d, inputs: Any, output: Tensor) -> None:
            strides[name] = round(size[0] / output.shape[-2]) * max(layer.dilation)

        return hook

    spatial = {
        name: layer for name, layer in encoder.named_modules() if _is_plain(layer) and max(layer.kernel_size) > 1
    }
    hooks = [layer.register_forward_hook(seen(name)) for name, layer in spatial.items()]
    modes = {module: module.training for module in encoder.modules()}
    weight = next(encoder.parameters())
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    last = sorted(set(strides.values()))[-stages:]
    found = [name for name in spatial if strides.get(name) in last]
    if not found:
        raise ValueError(
            f"model.args.encoder_name: {type(encoder).__name__} has no plain nn.Conv2d with a spatial kernel to "
            "turn into a basis layer; take another encoder, such as resnet18 or mobilenet_v2"
        )
    return found


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros"


def _names(module: nn.Module, at: Chosen) -> list[str]:
    convolutions = {name: layer for name, layer in module.named_modules() if name and isinstance(layer, nn.Conv2d)}
    if callable(at):
        names = [name for name, layer in convolutions.items() if at(name, layer)]
    else:
        unknown = [name for name in at if name not in convolutions]
        if unknown:
            raise ValueError(
                f"at: {unknown[0]!r} is no convolution of this module; it has {', '.join(list(convolutions)[:20])}"
            )
        names = [name for name in convolutions if name in set(at)]
    if not names:
        raise ValueError(f"at: chooses none of the {len(convolutions)} convolutions of this module")
    return names
