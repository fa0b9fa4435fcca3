"""RANet's sub-networks run one after another, each from what the one before found, and each gives a whole mask."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dance_seg.cost.macs import count_macs
from dance_seg.early_exit.exits import Outputs, full_size
from dance_seg.models.ranet import (
    BlockShape,
    DenseBlock,
    FusionBlock,
    MaskDecoder,
    RANet,
    bottlenecked,
)
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.network_slimming.structure import restructure, structure_record
from dance_seg.network_slimming.surgery import silence
from tests.contracts import (
    check_cost_is_counted,
    check_logits_have_the_size_of_the_images,
    check_state_can_be_kept,
)
from tools.bench.slimming import enliven


def tiny(**options: Any) -> RANet:
    torch.manual_seed(0)
    return RANet(5, size="tiny", **options)


def lively(**options: Any) -> RANet:
    """A network whose norms have statistics and weights of their own, in evaluation."""
    model = tiny(**options)
    enliven(model, torch.randn(2, 3, 64, 96))
    return model.eval()


def walked(model: RANet, images: Tensor, wanted: Sequence[bool] | None = None) -> list[Tensor | None]:
    with torch.no_grad():
        return [None if coarse is None else coarse.logits for coarse in model.exits(images, wanted)]


def found(model: RANet, images: Tensor) -> list[Tensor]:
    """The logits of every exit."""
    logits = [logits for logits in walked(model, images) if logits is not None]
    assert len(logits) == model.num_exits
    return logits


@contextmanager
def rows_seen(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """How many images each module was called with, by its name, once for each call."""
    seen: dict[str, list[int]] = {name: [] for name, _ in model.named_modules()}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, given, name=name: seen[name].append(
                len(given[0]) if isinstance(given[0], Tensor) else len(given[0][0])
            )
        )
        for name, module in model.named_modules()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def of(seen: dict[str, list[int]], start: str) -> set[int]:
    """What the modules whose names begin so were called with; empty when none was."""
    names = [name for name in seen if name.startswith(start)]
    assert names, f"no module is named {start}"
    return {rows for name in names for rows in seen[name]}


# What every model is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"exits_per_network": 2}, {"exits": "last"}], ids=str)
def test_it_meets_the_contract(options: dict[str, Any]) -> None:
    model = tiny(**options)
    check_logits_have_the_size_of_the_images(model, 5, ((45, 67), (96, 128), (1, 1), (33, 200)))
    check_state_can_be_kept(lambda: RANet(5, size="tiny", **options), model, (45, 67))
    check_cost_is_counted(model, (96, 128))


@pytest.mark.parametrize("options", [{}, {"exits_per_network": 2}, {"exits": "last"}], ids=str)
def test_every_weight_of_every_exit_gets_a_gradient(options: dict[str, Any]) -> None:
    model = tiny(**options).train()
    outputs = model(torch.randn(2, 3, 45, 67))
    assert isinstance(outputs, Outputs)
    assert [tuple(logits.shape) for logits in outputs.logits] == [(2, 5, 45, 67)] * model.num_exits
    sum(logits.square().mean() for logits in outputs.logits).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name


def test_later_exits_teach_the_first_sub_network() -> None:
    """Nothing is detached: the last exit's loss alone reaches all but the other exits' decoders."""
    model = tiny().train()
    model(torch.randn(2, 3, 64, 64)).logits[-1].square().mean().backward()
    untaught = {name.rsplit(".", 1)[0] for name, weight in model.named_parameters() if weight.grad is None}
    assert untaught
    assert all(name.startswith(("decoders.0.", "decoders.1.")) for name in untaught)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_trains_in_bfloat16_and_in_channels_last(layout: torch.memory_format) -> None:
    model = tiny().train().to(memory_format=layout)
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
    sum(logits.float().square().mean() for logits in outputs.logits).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    assert {logits.dtype for logits in outputs.logits} == {torch.bfloat16}


def test_the_smallest_image_trains_alone() -> None:
    """It is padded to 64x64, so that the lowest resolution has four values for its statistics."""
    outputs = tiny().train()(torch.randn(1, 3, 20, 30))
    assert all(logits.isfinite().all() for logits in outputs.logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "model.args.size is 'huge'; choose one of tiny, small, base"),
        ({"exits_per_network": 3}, "model.args.exits_per_network is 3; choose 1, or 2"),
        ({"exits_per_network": True}, "model.args.exits_per_network is True"),
        ({"exits": "first"}, "model.args.exits is 'first'; choose all, or last"),
    ],
)
def test_other_values_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        RANet(5, **{"size": "tiny", **options})


# What an exit costs -----------------------------------------------------------------------------------------------


class WayTo(nn.Module):
    """The network up to one exit, no other head asked."""

    def __init__(self, model: RANet, exit: int) -> None:
        super().__init__()
        self.model, self.exit = model, exit

    def forward(self, images: Tensor) -> Tensor:
        with closing(self.model.exits(images, [exit == self.exit for exit in range(self.model.num_exits)])) as walk:
            coarse = [next(walk) for _ in range(self.exit + 1)][-1]
            assert coarse is not None
            return coarse.logits


def shares(model: RANet, size: tuple[int, int]) -> tuple[list[float], float]:
    """The MACs of the way to each exit as shares of the whole, and the whole in GMACs."""
    macs = [count_macs(WayTo(model, exit), size).macs for exit in range(model.num_exits)]
    return [each / macs[-1] for each in macs], macs[-1] / 1e9


@pytest.mark.parametrize(("size", "gmacs"), [("tiny", (1.2, 1.6)), ("small", (3, 4)), ("base", (8.5, 11))])
def test_exits_cost_a_quarter_and_half_of_the_network(size: Any, gmacs: tuple[float, float]) -> None:
    found, full = shares(RANet(11, size=size), (360, 480))
    assert 0.15 <= found[0] <= 0.25
    assert 0.45 <= found[1] <= 0.55
    assert gmacs[0] < full < gmacs[1]


def test_six_exits_cost_ever_more() -> None:
    found, _ = shares(tiny(exits_per_network=2), (192, 256))
    assert len(found) == 6
    assert all(later > earlier + 0.01 for earlier, later in pairwise(found))
    assert found[0] < 0.2


def test_tiny_is_below_six_tenths_of_a_gmac_at_192_by_256() -> None:
    assert count_macs(RANet(11, size="tiny"), (192, 256)).macs < 0.6e9


@pytest.mark.parametrize("options", [{}, {"exits_per_network": 2}], ids=str)
def test_the_twin_is_the_network_without_the_other_exits(options: dict[str, Any]) -> None:
    model, twin = lively(**options), tiny(**options, exits="last").eval()
    assert twin.num_exits == 1
    last = f"decoders.{model.num_exits - 1}."
    state = {
        name.replace(last, "decoders.0."): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("decoders.") or name.startswith(last)
    }
    twin.load_state_dict(state)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(twin(images), model(images))
    assert count_macs(twin, (64, 96)).macs == count_macs(model, (64, 96)).macs


def test_base_features_are_narrow_where_they_are_large() -> None:
    """By hand, at 64x64: 3x3 convolutions 3 -> 16 -> 24 -> 32 -> 64 -> 64 on 32, 16, 8, 4 and 2 squared pixels."""
    by_hand = 9 * (3 * 16 * 32**2 + 16 * 24 * 16**2 + 24 * 32 * 8**2 + 32 * 64 * 4**2 + 64 * 64 * 2**2)
    assert count_macs(tiny().chain, (64, 64)).macs == by_hand
    assert by_hand < 0.1 * count_macs(tiny(), (64, 64)).macs


# What runs --------------------------------------------------------------------------------------------------------


def test_a_later_sub_network_does_not_run_before_it_is_asked() -> None:
    model = lively()
    with rows_seen(model) as seen, torch.no_grad(), closing(model.exits(torch.randn(3, 3, 64, 96))) as walk:
        for reached in range(model.num_exits):
            next(walk)
            assert of(seen, "chain") == {3}
            for number in range(model.num_exits):
                ran = {3} if number <= reached else set()
                assert of(seen, f"networks.{number}.blocks") == of(seen, f"decoders.{number}") == ran
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert {len(seen[name]) for name in layers} == {1}, "what was computed is kept"


def test_between_two_exits_of_a_sub_network_only_one_block_runs() -> None:
    model = lively(exits_per_network=2)
    with rows_seen(model) as seen, torch.no_grad(), closing(model.exits(torch.randn(1, 3, 64, 64))) as walk:
        next(walk)
        assert (of(seen, "networks.0.blocks.0"), of(seen, "networks.0.blocks.1")) == ({1}, set())
        next(walk)
        assert (of(seen, "networks.0.blocks.1"), of(seen, "networks.1.blocks")) == ({1}, set())
        next(walk)
        assert (of(seen, "networks.1.blocks.2"), of(seen, "networks.1.blocks.3")) == ({1}, set())


def test_a_head_that_is_not_wanted_does_not_run_and_gives_none() -> None:
    model = lively()
    images = torch.randn(1, 3, 64, 64)
    with rows_seen(model) as seen:
        logits = walked(model, images, [False, True, False])
    assert [each is None for each in logits] == [True, False, True]
    assert [of(seen, f"decoders.{exit}") for exit in range(3)] == [set(), {1}, set()]
    assert torch.equal(logits[1], found(model, images)[1])  # type: ignore[arg-type]


def test_a_wish_for_another_number_of_exits_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted has 2 values; the network has 3 exits"):
        walked(lively(), torch.randn(1, 3, 64, 64), [True, True])


@pytest.mark.parametrize("options", [{}, {"exits_per_network": 2}], ids=str)
def test_survivors_are_what_they_are_alone(options: dict[str, Any]) -> None:
    """Of five images 4, 0 and 2 go on from the first exit, and of those the last and the first from the second."""
    model, images = lively(**options), torch.randn(5, 3, 64, 96)
    alone = [found(model, image[None]) for image in images]
    left, kept = torch.arange(5), [torch.tensor([4, 0, 2]), torch.tensor([2, 0])]
    with rows_seen(model) as seen, torch.no_grad():
        walk = model.exits(images)
        coarse = next(walk)
        for exit in range(model.num_exits):
            assert coarse is not None
            expected = torch.cat([alone[image][exit] for image in left])
            torch.testing.assert_close(coarse.logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
            if exit == model.num_exits - 1:
                break
            chosen = kept[exit] if exit < len(kept) else None
            left = left if chosen is None else left[chosen]
            coarse = next(walk) if chosen is None else walk.send(chosen)
    assert [of(seen, f"decoders.{exit}") for exit in range(3)] == [{5}, {3}, {2}]
    if not options:
        assert [of(seen, f"networks.{number}.blocks") for number in range(3)] == [{5}, {3}, {2}]
    assert left.tolist() == [2, 4]


def test_without_the_other_heads_the_last_exit_is_the_same_bit_for_bit() -> None:
    model, images = lively(), torch.randn(2, 3, 50, 70)
    with rows_seen(model) as seen, torch.no_grad():
        plain = model(images)
        coarse = model.coarse_logits(images)
    assert of(seen, "decoders.0") == of(seen, "decoders.1") == set()
    assert torch.equal(coarse.logits, found(model, images)[-1])
    assert torch.equal(full_size(coarse, (50, 70)), plain)
    assert (coarse.padded_size, coarse.align_corners) == ((64, 96), False)


def test_padding_is_outside_the_mask_and_masks_are_at_strides_8_and_4() -> None:
    sizes = [tuple(logits.shape[-2:]) for logits in found(lively(), torch.randn(1, 3, 90, 120))]
    assert sizes == [(96 // 8, 128 // 8), (96 // 8, 128 // 8), (96 // 4, 128 // 4)]


# What is reused ---------------------------------------------------------------------------------------------------


def silenced(model: RANet, number: int) -> RANet:
    """The network, whose sub-network `number` gives zeros to the next one's fusion and the truth to its own exit."""
    model = deepcopy(model)
    for block in model.networks[number + 1].blocks:
        if isinstance(block, FusionBlock):
            block.register_forward_pre_hook(lambda block, given: (given[0], [each * 0 for each in given[1]]))
    return model


@pytest.mark.parametrize("number", [0, 1])
def test_a_sub_network_uses_what_the_coarser_one_found(number: int) -> None:
    model, images = lively(), torch.randn(2, 3, 64, 96)
    with_coarse, without = found(model, images), found(silenced(model, number), images)
    for exit in range(model.num_exits):
        change = float((with_coarse[exit] - without[exit]).abs().max() / with_coarse[exit].abs().max())
        assert change > 1e-2 if exit > number else change == 0


def test_fusion_blocks_are_those_that_the_coarser_sub_network_has_too() -> None:
    kinds = [[isinstance(block, FusionBlock) for block in network.blocks] for network in tiny().networks]
    assert kinds == [[False] * 2, [True] * 2 + [False] * 2, [True] * 4 + [False] * 2]


def test_growth_and_bottleneck_fall_4_2_1_from_low_to_high_resolution() -> None:
    """Growth 64 for the last: its own layers in plain blocks make 256, 128, 64 from at most 1024, 256, 64."""
    growths, bottlenecks = [], []
    for network in tiny().networks:
        layers = [layer for block in network.blocks if isinstance(block, DenseBlock) for layer in block.layers]
        convolutions = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Conv2d)]
        growths.append({module.out_channels for module in convolutions if module.kernel_size == (3, 3)})
        bottlenecks.append(
            all(
                module.out_channels == min(module.in_channels, limit)
                for module in convolutions
                if module.kernel_size == (1, 1)
                for limit in [{256: 1024, 128: 256, 64: 64}[max(growths[-1])]]
            )
        )
    assert growths == [{256}, {128}, {64}]
    assert all(bottlenecks)


def test_every_sub_network_ends_at_the_lowest_resolution() -> None:
    assert [network.levels for network in tiny().networks] == [[2, 2], [1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]


def test_a_layer_lays_what_it_made_beside_what_it_was_given() -> None:
    block = DenseBlock(BlockShape(channels=16, growth=32, bottleneck=64, layers=2, halves=False)).eval()
    features = torch.randn(1, 16, 6, 8)
    first, second = block(features)
    assert torch.equal(first[:, :16], features)
    assert torch.equal(second[:, :48], first)
    assert block.made == [first.shape[1], second.shape[1]] == [48, 80]


def test_a_quarter_of_a_fusion_layer_and_of_its_blocks_end_is_from_the_coarser_sub_network() -> None:
    """Growth 32 from 16 channels: 16 given, 24 of its own and 8 from below; at the end 2 x 8 more from below."""
    block = FusionBlock(BlockShape(channels=16, growth=32, bottleneck=64, layers=2, halves=False), [40]).eval()
    features, coarse = torch.randn(1, 16, 6, 8), torch.randn(1, 40, 3, 4)
    first, second = block(features, [coarse])
    _, other = block(features, [coarse + 1])
    assert block.made == [first.shape[1], second.shape[1]] == [16 + 32, 16 + 2 * 32 + 16]
    assert torch.equal(first[:, :40], block(features, [coarse + 1])[0][:, :40])
    changed = [channel for channel in range(96) if not torch.equal(second[:, channel], other[:, channel])]
    assert set(changed) & set(range(40)) == set()
    assert set(changed) >= set(range(80, 96))
    up = block.ups[0](coarse)
    torch.testing.assert_close(first[:, 40:].mean(), up.mean(), atol=0.2, rtol=0)


def test_coming_down_halves_rows_columns_and_channels() -> None:
    block = DenseBlock(BlockShape(channels=48, growth=32, bottleneck=64, layers=1, halves=True)).eval()
    (made,) = block(torch.randn(1, 48, 6, 8))
    assert tuple(made.shape) == (1, 24 + 32, 3, 4)


def test_macs_of_a_layer_counted_by_hand() -> None:
    """1x1 from 40 to the bottleneck of 16, 3x3 to 24, at 5 x 6; with less given than the bottleneck, 8 -> 8 -> 24."""
    assert count_macs(bottlenecked(40, 24, 16), (5, 6), in_channels=40).macs == 30 * (40 * 16 + 9 * 16 * 24)
    assert count_macs(bottlenecked(8, 24, 16), (5, 6), in_channels=8).macs == 30 * (8 * 8 + 9 * 8 * 24)


def test_the_context_lets_every_pixel_see_the_whole_image() -> None:
    decoder = MaskDecoder([8, 8, 8], channels=16, num_classes=3).eval()
    levels = [torch.randn(1, 8, 32 // 2**level, 32 // 2**level) for level in range(3)]
    changed = [*levels[:2], levels[2].clone()]
    changed[2][..., 0, 0] += 1000.0
    with torch.no_grad():
        far = (decoder(levels, levels[0]) - decoder(changed, levels[0]))[..., -1, -1]
    assert far.abs().max() > 0.01


# Slimming ---------------------------------------------------------------------------------------------------------


def every_logits(model: RANet, images: Tensor) -> list[Tensor]:
    return [coarse.logits for coarse in model.exits(images) if coarse is not None]


@pytest.mark.parametrize(("exits", "measure"), [("all", "magnitude"), ("last", "bn_scale")])
def test_slimmed_to_half_it_is_the_silenced_network_at_every_exit(exits: str, measure: Any) -> None:
    dense, images = lively(exits=exits), torch.randn(2, 3, 64, 96)
    model, zeroed = deepcopy(dense), deepcopy(dense)
    options = NetworkSlimming(keep=0.5, of="channels", importance=measure, round_to=4)
    groups, kept = slim(model, options, input_size=(64, 64))
    silence(zeroed, groups, kept)
    with torch.no_grad():
        found = [every_logits(each.eval(), images) for each in (model, zeroed, dense)]
        for made, expected, full in zip(*found, strict=True):
            torch.testing.assert_close(made, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
            assert (made - full).abs().max() > 1e-3 * full.abs().max()
    assert 0.15 < count_macs(model, (64, 64)).macs / count_macs(dense, (64, 64)).macs < 0.5

    again = tiny(exits=exits).eval()
    restructure(again, structure_record(model))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
