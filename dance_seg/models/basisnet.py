"""BasisNet: a light network previews the image, answers if that is enough, and else says how to build a specialist.

Known, from the abstract (BasisNet: Two-stage Model Synthesis for Efficient Inference, arXiv 2105.03014): a lightweight
model predicts input-dependent coefficients and an answer of its own; the coefficients mix basis models into one
specialist; both are trained jointly; any network will do; the light model's confidence ends the work early; the
training recipe is decisive. All coefficients are predicted once, before the specialist runs.

Remembered and not verified, so options here: bases (16, or 8), softmax over them in each layer, basis layers only in
the later part, normalisation not mixed, each basis left out with probability 1/8 in training, a temperature that falls
from 30 to 1 (that is dynamic convolution's), a preview at about half the size.

Ours: everything that makes masks. The preview is an encoder at `preview_scale` of the size with a small feature
pyramid and an exit head, its mask at 1/8 of the image by default; its logits are handed to the specialist, which adds
its own (`Z = Z_SM + beta Z_LM`, beta learned from 0.5), so that no work is thrown away. Where a recipe says nothing,
the preview is MobileNetV2: beside FPN with ResNet-18 it is 3 % of the MACs at 384x480 but, as small depthwise layers
are slow for their MACs, 7 to 10 % of the time; `resnet18` would be 13 % of the MACs and a sixth of the time. Bases
begin as own draws as large as the encoder's weights, and with pretrained weights as those with 0.3 of such noise: a
mean of eight own draws has little left of the one that was pretrained. The penalty keeps bases alive: the squared
coefficient of variation of the batch's mean coefficients.

Its cost: the specialist's beside the preview's and N |W| MACs per basis layer and image; N times the weights of those
layers, which on small maps are memory traffic that MACs do not show (see basis_layers). Limits: two exits; the preview
takes part in every image.

B images, L basis layers, N bases, C classes, H and W rows and columns.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.distributed import mean_over_ranks
from dance_seg.early_exit.exits import ExitNetwork, Outputs, State, full_size
from dance_seg.early_exit.heads import ExitHead
from dance_seg.models.basis_layers import Synthesis, handed, of_last_stages, to_basis_layers
from dance_seg.models.smp import SmpModel, build_network, pad_to, take_out_unused
from dance_seg.sample import CoarseLogits

Squash = Literal["softmax", "sigmoid"]

PRETRAINED_SPREAD = 0.3
"""How far bases begin from pretrained weights, as a share of those weights' size."""

SMALLEST_PREVIEW = 32
"""Rows and columns below which the preview's last features would vanish."""


class BasisNet(ExitNetwork):
    """A preview and the specialist it builds: images (B, 3, H, W), normalised -> logits (B, C, H, W), any H and W.

    Exit 0 is the preview's mask, exit 1 the specialist's: a SmpModel of `arch` and `encoder_name`, whose spatial
    convolutions in the last `basis_stages` stages of the encoder mix `bases` kernels each; `options` go to SmpModel.
    The preview is any encoder of SMP at `preview_scale` of the size, `preview_weights` as SmpModel's `encoder_weights`;
    `preview_channels` is its pyramid's width.

    `temperature` divides the coefficients' logits: it goes from the first value to the second, linearly, by
    `anneal_until` of the training progress told to `set_progress`. It is kept in the state, so that a checkpoint
    gives what the network gave; a network that is told no progress has the last one. `basis_dropout` is how likely each
    basis is left out, per image and layer, in training; `load_balance` weighs the penalty (0: none). With
    `hand_over` the preview's logits are computed even where exit 0 is not wanted, since exit 1 needs them.

    Raises ValueError for values that make no sense, and what SmpModel raises.

    >>> model = BasisNet(num_classes=3).eval()
    >>> tuple(model(torch.zeros(1, 3, 45, 67)).shape), len(model.layers)
    ((1, 3, 45, 67), 8)
    """

    num_exits = 2
    align_corners = (True, True)

    def __init__(
        self,
        num_classes: int,
        arch: str = "fpn",
        encoder_name: str = "resnet18",
        encoder_weights: str | bool | None = None,
        *,
        preview_encoder: str = "mobilenet_v2",
        preview_weights: str | bool | None = None,
        preview_scale: float = 0.5,
        preview_channels: int = 128,
        bases: int = 8,
        basis_stages: int = 2,
        coefficients: Squash = "softmax",
        hidden: int = 64,
        temperature: Sequence[float] = (30.0, 1.0),
        anneal_until: float = 0.1,
        basis_dropout: float = 0.125,
        load_balance: float = 0.01,
        hand_over: bool = True,
        synthesis: Synthesis = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        _check_whole("bases", bases, 1, 64)
        _check_whole("basis_stages", basis_stages, 1, 5)
        _check_whole("preview_channels", preview_channels, 8, 1024)
        _check_whole("hidden", hidden, 1, 4096)
        _check_share("preview_scale", preview_scale, low_open=True)
        _check_share("anneal_until", anneal_until)
        _check_share("basis_dropout", basis_dropout, high_open=True)
        _check_choice("coefficients", coefficients, get_args(Squash))
        _check_choice("synthesis", synthesis, get_args(Synthesis))
        _check_choice("hand_over", hand_over, (True, False))
        if not _is_number(load_balance) or load_balance < 0:
            raise ValueError(f"model.args.load_balance is {load_balance!r}; a weight of at least 0, such as 0.01")
        if not isinstance(temperature, Sequence) or len(temperature) != 2 or not all(map(_is_positive, temperature)):
            raise ValueError(
                f"model.args.temperature is {temperature!r}; two numbers above 0, first and last, such as [30, 1]"
            )
        self.preview_scale, self.hand_over, self.load_balance = float(preview_scale), hand_over, float(load_balance)
        self.temperatures, self.anneal_until = (float(temperature[0]), float(temperature[1])), float(anneal_until)

        # The specialist first: with one basis it then draws what a SmpModel draws.
        self.specialist = SmpModel(
            arch=arch,
            encoder_name=encoder_name,
            num_classes=num_classes,
            encoder_weights=encoder_weights,
            **options,
        )
        self.stride, self.minimum_size = self.specialist.stride, self.specialist.minimum_size
        encoder: Any = self.specialist.network.encoder
        side = max(64, self.minimum_size, self.stride)
        self.layers = to_basis_layers(
            encoder,
            bases,
            of_last_stages(encoder, basis_stages, (side, side)),
            synthesis=synthesis,
            around=PRETRAINED_SPREAD if encoder_weights else None,
        )
        self.preview = Preview(preview_encoder, preview_weights, num_classes, preview_channels)
        self.mixer = Mixer(self.preview.top_channels, hidden, len(self.layers), bases, coefficients, basis_dropout)
        self.beta = nn.Parameter(torch.tensor(0.5)) if hand_over else None

    def forward(self, images: Tensor) -> Outputs | Tensor:
        """Both exits and the load balance while training, the specialist's logits (B, C, H, W) in evaluation."""
        if not self.training:
            return super().forward(images)
        padded = self._padded(images)
        features = self._look(padded)
        preview_logits = self.preview.logits(features)
        mixing = self.mixer.logits(features[-1])
        specialist = self._specialise(padded, self.mixer.drawn(mixing), preview_logits)
        preview = CoarseLogits(preview_logits, _size(padded), align_corners=True)
        size = images.shape[-2:]
        return Outputs((full_size(preview, size), full_size(specialist, size)), self._penalty(mixing))

    def begin(self, images: Tensor) -> State:
        """The images, padded."""
        return self._padded(images)

    def part(self, exit: int, state: State) -> tuple[State, State]:
        """The preview; nothing before exit 1, whose head is the specialist as a whole.

        Coefficients are predicted behind exit 0, for the images that go on.
        """
        if exit:
            return state, ()
        features = self._look(state)
        if not self.hand_over:
            return features, (state, features[-1], None)
        logits = self.preview.logits(features)
        return logits, (state, features[-1], logits)

    def head(self, exit: int, seen: State) -> Tensor:
        """The preview's logits or the specialist's."""
        if exit == 0:
            return seen if self.hand_over else self.preview.logits(seen)
        padded, top, logits = seen
        return self._specialise(padded, self.mixer(top), logits).logits

    def set_progress(self, progress: float) -> None:
        """Set the temperature for a place in training, 0 to 1: linear, then constant."""
        first, last = self.temperatures
        done = 1.0 if progress >= self.anneal_until else max(progress, 0.0) / self.anneal_until
        self.mixer.temperature.fill_(first + (last - first) * done)

    def set_synthesis(self, synthesis: Synthesis) -> None:
        """Let all basis layers compute in that way.

        In a loop, each basis is a convolution of its own, which is how network slimming looks at it.
        """
        _check_choice("synthesis", synthesis, get_args(Synthesis))
        for layer in self.layers:
            layer.synthesis = synthesis

    def coefficients(self, images: Tensor) -> Tensor:
        """What the preview says of images (B, 3, H, W): coefficients (B, L, N), for reports and controls."""
        return self.mixer(self._look(self._padded(images))[-1])

    def _padded(self, images: Tensor) -> Tensor:
        return pad_to(images, self.padded_size(*images.shape[-2:]))

    def _look(self, padded: Tensor) -> list[Tensor]:
        rows, columns = (max(SMALLEST_PREVIEW, round(side * self.preview_scale)) for side in _size(padded))
        return self.preview.features(shrunk(padded, (rows, columns)))

    def _specialise(self, padded: Tensor, coefficients: Tensor, preview_logits: Tensor | None) -> CoarseLogits:
        with handed(self.layers, coefficients):
            coarse = self.specialist.coarse_logits(padded)
        if self.beta is None or preview_logits is None:
            return coarse
        size = coarse.logits.shape[-2:]
        beside = F.interpolate(preview_logits, size=size, mode="bilinear", align_corners=coarse.align_corners)
        return coarse._replace(logits=coarse.logits + self.beta * beside)

    def _penalty(self, mixing: Tensor) -> Tensor | None:
        if not self.load_balance:
            return None
        return self.load_balance * variation(self.mixer.squashed(mixing))


class Preview(nn.Module):
    """An encoder of SMP, a feature pyramid of few channels on its strides from 4 on, and an exit head on the finest.

    The pyramid is 1x1 convolutions and sums, and after each sum a separable 3x3 convolution: without these the mask is
    points worse, and FPN's decoder takes four times the MACs for one point more (recipes/README.md). Images may have
    any size.
    Raises ValueError for names and weights that do not exist and for encoders that take images of one size only.
    """

    def __init__(self, encoder_name: str, weights: str | bool | None, num_classes: int, channels: int) -> None:
        super().__init__()
        try:
            network, only_size = build_network("fpn", encoder_name, num_classes, weights or None, {})
        except ValueError as error:
            said = str(error).replace("model.args.encoder_name", "model.args.preview_encoder")
            raise ValueError(said.replace("model.args.encoder_weights", "model.args.preview_weights")) from error
        if only_size is not None:
            raise ValueError(
                f"model.args.preview_encoder: {encoder_name} takes only images of {only_size}x{only_size}; the preview "
                "sees images of any size, such as mobilenet_v2 does"
            )
        self.encoder_name = encoder_name
        encoder: Any = network.encoder
        given = list(encoder.out_channels)
        self.encoder = encoder
        self.used = [index for index in range(2, len(given)) if given[index]]  # some transformers begin at stride 4
        self.top_channels = given[-1]
        self.lateral = nn.ModuleList(nn.Conv2d(given[index], channels, 1) for index in self.used)
        self.smoothing = nn.ModuleList(separable(channels) for _ in self.used)
        self.head = ExitHead(channels, num_classes)
        take_out_unused(self, 2 * SMALLEST_PREVIEW)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, h, w) of small images."""
        return self.logits(self.features(images))

    def features(self, images: Tensor) -> list[Tensor]:
        """The encoder's features, fine to coarse.

        Raises ValueError for images that it does not take.
        """
        try:
            features = self.encoder(images)
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f"model.args.preview_encoder: {self.encoder_name} does not take {len(images)} images of "
                f"{images.shape[-2]}x{images.shape[-1]}, which model.args.preview_scale makes: {error}"
            ) from error
        return [features[index] for index in self.used]

    def logits(self, features: list[Tensor]) -> Tensor:
        """Logits (B, C, h, w) at the size of the finest features."""
        levels = [lateral(own) for lateral, own in zip(self.lateral, features, strict=True)]
        merged = self.smoothing[-1](levels[-1])
        for level, smoothing in zip(reversed(levels[:-1]), reversed(self.smoothing[:-1]), strict=True):
            finer = F.interpolate(merged, size=level.shape[-2:], mode="bilinear", align_corners=False)
            merged = smoothing(level + finer)
        return self.head(merged)


def separable(channels: int) -> nn.Sequential:
    """A depthwise 3x3 and a pointwise convolution, each with BatchNorm and ReLU: (B, channels, h, w) to the same."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class Mixer(nn.Module):
    """Says from the preview's last features (B, channels, h, w) how each layer mixes its bases: (B, L, N).

    Coefficients of a layer sum to 1 by softmax; by sigmoid each is in (0, 1) and they sum to anything.
    """

    temperature: Tensor  # ()

    def __init__(self, channels: int, hidden: int, layers: int, bases: int, squash: Squash, dropout: float) -> None:
        super().__init__()
        self.bases, self.squash, self.dropout = bases, squash, dropout
        self.hidden, self.relu = nn.Linear(channels, hidden), nn.ReLU()
        self.mixing = nn.Linear(hidden, layers * bases)
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Coefficients (B, L, N) without dropout."""
        return self.squashed(self.logits(features))

    def logits(self, features: Tensor) -> Tensor:
        """What softmax or sigmoid takes (B, L, N), float32 or more, temperature applied."""
        mixing = self.mixing(self.relu(self.hidden(features.mean((2, 3)))))
        precise = mixing if mixing.dtype == torch.float64 else mixing.float()
        return precise.view(len(features), -1, self.bases) / self.temperature

    def squashed(self, mixing: Tensor) -> Tensor:
        """Coefficients (B, L, N) of such logits."""
        return mixing.softmax(-1) if self.squash == "softmax" else mixing.sigmoid()

    def drawn(self, mixing: Tensor) -> Tensor:
        """Coefficients (B, L, N) with some bases left out and the rest made larger for it; never all of a layer."""
        if not self.dropout or self.bases == 1:
            return self.squashed(mixing)
        left_out = torch.rand(mixing.shape, device=mixing.device) < self.dropout
        left_out = left_out & ~left_out.all(-1, keepdim=True)
        if self.squash == "softmax":  # in the logits, where what is left cannot be too small to divide by
            return mixing.masked_fill(left_out, -math.inf).softmax(-1)
        kept = (~left_out).sum(-1, keepdim=True)
        return mixing.sigmoid().masked_fill(left_out, 0.0) * (self.bases / kept)


def variation(coefficients: Tensor) -> Tensor:
    """The squared coefficient of variation of the batch's mean coefficients (B, L, N), averaged over layers.

    The batch is that of all ranks, which all must call it. 0 where all bases are used alike, N - 1 where one is used
    alone. Images of a batch may use different ones.

    >>> variation(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).item(), variation(torch.tensor([[[1.0, 0.0]]])).item()
    (0.0, 1.0)
    """
    used = mean_over_ranks(coefficients)  # (L, N)
    return (used.var(-1, unbiased=False) / used.mean(-1).square()).mean()


def shrunk(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) at a smaller size, each pixel the mean of those it covers: no frequencies are folded.

    >>> shrunk(torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]]), (1, 2)).tolist()
    [[[[0.5, 2.5]]]]
    """
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    if height % size[0] == width % size[1] == 0:
        return F.avg_pool2d(images, (height // size[0], width // size[1]))
    return F.interpolate(images, size=size, mode="area")


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _check_whole(key: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"model.args.{key} is {value!r}; a whole number from {least} to {most}")


def _check_share(key: str, value: Any, *, low_open: bool = False, high_open: bool = False) -> None:
    inside = _is_number(value) and 0 <= value <= 1 and not (low_open and value == 0) and not (high_open and value == 1)
    if not inside:
        low, high = "above 0" if low_open else "from 0", "below 1" if high_open else "to 1"
        raise ValueError(f"model.args.{key} is {value!r}; a number {low} and {high}")


def _check_choice(key: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise ValueError(f"model.args.{key} is {value!r}; choose one of {', '.join(map(str, allowed))}")
