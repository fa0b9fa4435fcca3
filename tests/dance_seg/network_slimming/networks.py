"""Small networks that hold one way each of tying channels, for the tests of network slimming; images are 3 x 8 x 8."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dance_seg.network_slimming.channels import Group, Groups

SIZE = (8, 8)


class Calls(nn.Module):
    """A network in one function of itself and the images; its parts are modules, parameters and buffers by name."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, images: Tensor) -> Any:
        return self.function(self, images)


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def conv(given: int, made: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(given, made, kernel, padding=kernel // 2, **options)


def block(given: int, made: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(given, made, kernel, bias=False, **options), nn.BatchNorm2d(made), nn.ReLU())


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, with values that no channel shares and statistics that matter."""
    drawn = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=drawn) / max(1, parameter[0].numel()) ** 0.5
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            values = torch.rand(buffer.shape, generator=drawn) + 0.5
            buffer.copy_(values if "var" in name else values - 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            module.weight.data = torch.rand(module.weight.shape, generator=drawn) + 0.5
    return model.eval()


def random_images(seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def random_kept(groups: Groups, seed: int = 0) -> list[np.ndarray]:
    """About half of the channels of each group, at least one."""
    drawn = np.random.default_rng(seed)
    return [np.sort(drawn.choice(g.channels, max(1, g.channels // 2), replace=False)) for g in groups]


def positions(group: Group, *, reads: bool) -> dict[tuple[str, int], list[list[int]]]:
    """Where the channels of a group lie: (tensor, dim) -> the positions of each channel."""
    return {(m.tensor, m.dim): m.positions.tolist() for m in group.members if m.reads == reads}


def made_in(groups: Groups) -> set[str]:
    """The modules whose channels can be cut."""
    return {member.tensor.rpartition(".")[0] for group in groups for member in group.members if not member.reads}


class Attention(nn.Module):
    """A transformer's block: attention in two heads and an MLP, each beside a shortcut, over tokens (N, L, C)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        n, length, channels = tokens.shape
        heads = self.qkv(self.norm1(tokens)).reshape(n, length, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(n, length, channels)
        tokens = tokens + self.proj(mixed)
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


def plain() -> nn.Module:
    return nn.Sequential(block(3, 8), block(8, 12), conv(12, 2))


def residual() -> nn.Module:
    """Two blocks on one shortcut, so that three layers make the same channels."""

    def forward(net: Any, images: Tensor) -> Tensor:
        first = net.stem(images)
        second = F.relu(first + net.one(first))
        return net.head(second + net.two(second))

    return Calls(forward, stem=block(3, 8), one=block(8, 8), two=block(8, 8), head=conv(8, 2))


def concatenation() -> nn.Module:
    """A decoder that joins what it has upsampled to what the encoder had."""

    def forward(net: Any, images: Tensor) -> Tensor:
        high = net.high(images)
        low = net.up(net.low(F.max_pool2d(high, 2)))
        return net.head(net.join(torch.cat([low, high], dim=1)))

    up = nn.ConvTranspose2d(12, 6, 2, stride=2)
    return Calls(forward, high=block(3, 8), low=block(8, 12), up=up, join=block(14, 8), head=conv(8, 2))


def dense_block() -> nn.Module:
    """Each layer reads all before it."""

    def forward(net: Any, images: Tensor) -> Tensor:
        first = net.one(images)
        second = net.two(first)
        third = net.three(torch.cat([first, second], 1))
        return net.head(torch.cat([first, second, third], 1))

    return Calls(forward, one=block(3, 4), two=block(4, 6), three=block(10, 8), head=conv(18, 2))


def squeeze_excite() -> nn.Module:
    """An inverted residual: expansion, depthwise, a gate per channel, projection."""

    def forward(net: Any, images: Tensor) -> Tensor:
        wide = F.hardswish(net.depthwise(net.expand(net.stem(images))))
        gate = torch.sigmoid(net.excite(F.relu(net.squeeze(F.adaptive_avg_pool2d(wide, 1)))))
        return net.head(net.stem(images) + net.project(wide * gate))

    return Calls(
        forward,
        stem=block(3, 6),
        expand=block(6, 16, 1),
        depthwise=block(16, 16, 3, groups=16),
        squeeze=conv(16, 4),
        excite=conv(4, 16),
        project=conv(16, 6),
        head=conv(6, 2),
    )


def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(block(3, 6), block(6, 18, 3, groups=6), conv(18, 2))


def grouped() -> nn.Module:
    return nn.Sequential(block(3, 12), block(12, 8, 3, groups=4), conv(8, 2))


def group_norm() -> nn.Module:
    return nn.Sequential(conv(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 8), nn.GroupNorm(8, 8), conv(8, 2))


def transposed() -> nn.Module:
    layers = (nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6))
    return nn.Sequential(block(3, 8), *layers, nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2))


def linear_after_flatten() -> nn.Module:
    """Each channel takes the four positions that pooling leaves of it; the weights of the images come from them."""

    def forward(net: Any, images: Tensor) -> Tensor:
        features = net.stem(images)
        scale = net.second(F.relu(net.first(F.adaptive_avg_pool2d(features, 2).flatten(1))))
        return net.head(features) * scale[..., None, None]

    return Calls(forward, stem=block(3, 6), first=nn.Linear(24, 10), second=nn.Linear(10, 2), head=conv(6, 2))


def transformer() -> nn.Module:
    def forward(net: Any, images: Tensor) -> Tensor:
        features = net.patches(net.stem(images))
        tokens = net.attention(features.flatten(2).transpose(1, 2))
        return net.head(tokens.transpose(1, 2).unflatten(2, features.shape[-2:]))

    return Calls(forward, stem=block(3, 6), patches=conv(6, 8), attention=Attention(8, 20), head=conv(8, 2))


def attention_over_positions() -> nn.Module:
    """A non-local block: positions are compared by their products, and values are mixed."""

    def forward(net: Any, images: Tensor) -> Tensor:
        features = net.stem(images)
        query, key, value = (part(features).flatten(2) for part in (net.query, net.key, net.value))
        alike = (query.transpose(1, 2) @ key).softmax(-1)
        return net.head(features + net.out((value @ alike.transpose(1, 2)).unflatten(2, features.shape[-2:])))

    parts = {"query": conv(6, 4), "key": conv(6, 4), "value": conv(6, 8), "out": conv(8, 6)}
    return Calls(forward, stem=block(3, 6), **parts, head=conv(6, 2))


def shared_head() -> nn.Module:
    """One head for two scales: its weights are used twice."""

    def forward(net: Any, images: Tensor) -> Tensor:
        fine = net.fine(images)
        coarse = F.interpolate(net.coarse(F.avg_pool2d(fine, 2)), size=fine.shape[-2:], mode="bilinear")
        return net.last(net.head(fine) + net.head(coarse))

    return Calls(forward, fine=block(3, 8), coarse=block(8, 8), head=block(8, 6), last=conv(6, 2))


def tied_weights() -> nn.Module:
    """Two layers that hold one weight, and one weight that makes channels and reads them again."""
    one, two = conv(6, 6, 3), conv(6, 6, 3)
    two.weight = one.weight

    def forward(net: Any, images: Tensor) -> Tensor:
        features = net.two(F.relu(net.one(net.stem(images))))
        hidden = F.relu(F.conv2d(features, net.code, net.shift))
        return net.head(F.conv_transpose2d(hidden, net.code))

    return Calls(
        forward, stem=block(3, 6), one=one, two=two, code=weights(10, 6, 1, 1), shift=weights(10), head=conv(6, 2)
    )


def scales_and_slopes() -> nn.Module:
    """Parameters that multiply channels: a layer scale and a PReLU."""

    def forward(net: Any, images: Tensor) -> Tensor:
        features = net.slope(net.stem(images))
        return net.head(features + net.scale * net.one(features))

    return Calls(forward, stem=conv(3, 8), slope=nn.PReLU(8), one=conv(8, 8), scale=weights(8, 1, 1), head=conv(8, 2))


def buffers() -> nn.Module:
    """Fixed values: a norm that does not learn, and a kernel that makes channels of its own."""

    def forward(net: Any, images: Tensor) -> Tensor:
        edges = F.conv2d(images, net.kernel, padding=1)
        return net.head(torch.cat([edges + net.shift, F.relu(net.norm(net.stem(images)))], 1))

    fixed = {"kernel": torch.zeros(4, 3, 3, 3), "shift": torch.zeros(4, 1, 1)}
    return Calls(forward, stem=conv(3, 8), norm=FrozenBatchNorm2d(8), **fixed, head=conv(12, 2))


def pyramid() -> nn.Module:
    """Branches at several rates and one that pools, joined."""

    def forward(net: Any, images: Tensor) -> Tensor:
        features = net.stem(images)
        pooled = F.interpolate(net.pool(features.mean((2, 3), keepdim=True)), size=features.shape[-2:])
        return net.head(torch.cat([net.near(features), net.far(features), pooled], 1))

    far = nn.Conv2d(8, 6, 3, padding=2, dilation=2)
    return Calls(forward, stem=block(3, 8), near=block(8, 6, 1), far=far, pool=block(8, 4, 1), head=conv(16, 2))


def sums_over_channels() -> nn.Module:
    """A matrix product and a sum, which channels that are zero do not change."""

    def forward(net: Any, images: Tensor) -> Tensor:
        scores = torch.einsum("nchw,kc->nkhw", net.features(images), net.classes)
        return scores + net.bright(images).sum(1, keepdim=True)

    return Calls(forward, features=block(3, 8), classes=weights(2, 8), bright=conv(3, 6))


def some_frozen() -> nn.Module:
    """Half of it can be cut: the other half is shifted by where it is, mixed over positions or read as a sigmoid."""

    def forward(net: Any, images: Tensor) -> Tensor:
        placed = net.placed(images) + net.place
        tokens = net.tokens(net.mixed(images).flatten(2)).unflatten(2, SIZE)
        return net.fixed(torch.cat([placed, tokens, torch.sigmoid(net.gate(images))], 1)) + net.head(net.free(images))

    return Calls(
        forward,
        placed=conv(3, 4),
        place=weights(1, 1, *SIZE),
        mixed=conv(3, 4),
        tokens=nn.Linear(64, 64),
        gate=conv(3, 4),
        fixed=conv(12, 2),
        free=block(3, 8),
        head=conv(8, 2),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    make.__name__: make
    for make in (
        *(plain, residual, concatenation, dense_block, squeeze_excite, depthwise_multiplier, grouped, group_norm),
        *(transposed, linear_after_flatten, transformer, attention_over_positions, shared_head, tied_weights),
        *(scales_and_slopes, buffers, pyramid, sums_over_channels, some_frozen),
    )
}
