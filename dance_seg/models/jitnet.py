"""JITNet: a network small enough to be trained on one video while it follows that video.

From the published code (Online Model Distillation for Efficient Video Inference, arXiv 1812.02699; its TensorFlow code
holds the network and no online loop): two 3x3 convolutions of stride 2 (16 and 64 channels), three encoder blocks of
stride 2 (128, 128, 256), three decoder blocks (256, 128, 64), each but the first on the matching encoder block's output
laid beside the one before, bilinear upsampling with aligned corners after each, two 3x3 convolutions at half the size
of the image (64 and 16), logits. A block is BatchNorm-ReLU, 3x3 with the stride, 1x3, 3x1, and a shortcut around them:
1x1 with the stride, or every other pixel where the widths are equal. The least width of the decoder is 8, 16 or 32 for
up to 8, 16 or more classes, that of the encoder 8; all widths take one factor.

Ours: widths are multiples of 8; images of any size, padded to a multiple of 32; the 1x1 logits come before the last
upsampling, which is the same function for a quarter of the work and lets evaluation fuse it with the argmax;
`head_stride: 4` leaves out the upsampling to half the size, where half of all MACs are; He initialisation; PyTorch's
momentum of the running statistics (0.1, where the published 0.003 needs thousands of steps). The published code has
no counterpart of `bn_online`; that the current frame's statistics are used online comes from re-implementations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.batch_norm import BnOnline, set_bn_online
from dance_seg.evaluator import full_size
from dance_seg.models.smp import pad_to
from dance_seg.normalise import padded_size
from dance_seg.sample import CoarseLogits

STEM, ENCODER, DECODER, HEAD = (16, 64), (128, 128, 256), (256, 128, 64), (64, 16)


class JITNet(nn.Module):
    """A student network: images (N, 3, H, W), normalised -> logits (N, C, H, W), any H and W.

    `width` multiplies all widths: the parameters fall with its square. `bn_online` is what BatchNorm normalises by, see
    `set_bn_online`. `head_stride` is where the last two convolutions run, 2 (published) or 4 (about half the
    MACs). Raises ValueError for other values.

    >>> import torch
    >>> model = JITNet(num_classes=3, width=0.25).eval()
    >>> model.stride, tuple(model(torch.zeros(1, 3, 45, 67)).shape)
    (32, (1, 3, 45, 67))
    """

    stride = 32
    minimum_size = 64  # smaller images are padded: a frame needs more than one value for its own statistics

    def __init__(
        self, num_classes: int, width: float = 1.0, bn_online: BnOnline = "frame", head_stride: int = 2
    ) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 8:
            raise ValueError(f"model.args.width is {width!r}; a factor above 0 and at most 8, such as 0.5")
        if head_stride not in (2, 4):
            raise ValueError(
                f"model.args.head_stride is {head_stride!r}; choose 2, as published, or 4, which is cheaper"
            )
        self.num_classes, self.head_stride = num_classes, head_stride
        least = minimum_decoder_width(num_classes)
        stem, encoder = ([rounded(channels * width, 8) for channels in widths] for widths in (STEM, ENCODER))
        decoder, head = ([rounded(channels * width, least) for channels in widths] for widths in (DECODER, HEAD))
        self.stem = nn.Sequential(conv_norm(3, stem[0], stride=2), conv_norm(stem[0], stem[1], stride=2))
        self.encoder = nn.ModuleList(
            Block(given, channels, stride=2) for given, channels in zip([stem[1], *encoder], encoder, strict=False)
        )
        beside = [0, *encoder[-2::-1]]  # what the encoder lays beside the decoder's own
        self.decoder = nn.ModuleList(
            Block(given + skipped, channels)
            for given, skipped, channels in zip([encoder[-1], *decoder], beside, decoder, strict=False)
        )
        self.head = nn.Sequential(conv_norm(decoder[-1], head[0]), conv_norm(head[0], head[1]))
        self.logits = nn.Conv2d(head[1], num_classes, 1)
        self.apply(_initialise)
        set_bn_online(self, bn_online)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C, H, W) of images (N, 3, H, W)."""
        return full_size(self.coarse_logits(images), images.shape[-2:])

    def coarse_logits(self, images: Tensor) -> CoarseLogits:
        """Logits before the last upsampling, so that upsampling and argmax can be one pass over the image."""
        padded = pad_to(images, self.padded_size(*images.shape[-2:]))
        features = self.stem(padded)
        sizes, skips = [], []
        for block in self.encoder:
            sizes.append(features.shape[-2:])
            features = block(features)
            skips.append(features)
        features = skips.pop()
        for number, block in enumerate(self.decoder):
            features = _upsampled(block(features), sizes.pop())
            if number < len(self.decoder) - 1:
                features = torch.cat([skips.pop(), features], dim=1)
        if self.head_stride == 2:
            features = _upsampled(features, (padded.shape[-2] // 2, padded.shape[-1] // 2))
        logits = self.logits(self.head(features))
        return CoarseLogits(logits, (padded.shape[-2], padded.shape[-1]), align_corners=True)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) at which the network runs on an image of height x width."""
        return padded_size((height, width), self.stride, self.minimum_size)


class Block(nn.Module):
    """Features (N, channels_in, h, w) -> (N, channels, h / stride, w / stride), around which a shortcut leads."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.Sequential(nn.BatchNorm2d(channels_in), nn.ReLU(inplace=True))
        self.square = conv_norm(channels_in, channels, stride)
        self.across = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.down = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride) if channels != channels_in else None

    def forward(self, features: Tensor) -> Tensor:
        """The shortcut's and the convolutions' outputs added."""
        active = self.norm(features)
        short = self.shortcut(active) if self.shortcut is not None else features[..., :: self.stride, :: self.stride]
        return short + self.down(self.across(self.square(active)))


def conv_norm(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with BatchNorm and ReLU."""
    convolution = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def rounded(channels: float, least: int) -> int:
    """A width as a multiple of 8, no less than `least`.

    >>> rounded(128 * 0.3, 8), rounded(16 * 0.25, 16)
    (40, 16)
    """
    return max(least, 8 * round(channels / 8))


def minimum_decoder_width(num_classes: int) -> int:
    """The least width of a decoder that tells so many classes apart.

    >>> [minimum_decoder_width(classes) for classes in (8, 11, 19)]
    [8, 16, 32]
    """
    return 8 if num_classes <= 8 else 16 if num_classes <= 16 else 32


def _upsampled(features: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=True)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        linear = module.bias is not None  # no ReLU follows the convolutions that have a bias
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if linear else "relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
