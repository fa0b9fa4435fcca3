"""A head that turns features in the middle of a network into logits, for little.

N images, h and w rows and columns of the features, C classes.
"""

from torch import Tensor, nn


class ExitHead(nn.Module):
    """Features (N, channels_in, h, w) -> logits (N, C, h, w): to few channels at once, then one depthwise 3x3.

    Every image that goes on pays the heads it was asked at, so a head has to be cheap beside the part it may save.
    With the usual head, a dense 3x3 at full width, HRNet-W48 with four exits costs 1110 GFLOPs against 696 of the plain
    network (ADP-C's README): the heads eat the saving and more. Here the widest operation is a 1x1 convolution, and
    the 3x3, which gives each pixel its neighbours, costs nine MACs per channel.

    >>> sum(weight.numel() for weight in ExitHead(256, num_classes=11).parameters())
    17931
    """

    def __init__(self, channels_in: int, num_classes: int, channels: int = 64) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.logits = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, C, h, w) of the features."""
        reduced = self.relu(self.reduce_norm(self.reduce(features)))
        return self.logits(self.relu(self.depthwise_norm(self.depthwise(reduced))))
