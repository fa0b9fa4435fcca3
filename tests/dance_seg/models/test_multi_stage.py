"""Stages are slices of the width: each says the same whatever runs behind it, and uses all that was computed before."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dance_seg.cost.macs import count_macs
from dance_seg.early_exit.exits import ExitNetwork, Outputs, full_size
from dance_seg.early_exit.paths import path_costs
from dance_seg.models.multi_stage import STAGES, MultiStage, MultiStageSupernet, shapes_of, space_of
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.supernet.elastic import ElasticConv2d, activated
from dance_seg.supernet.space import SearchSpace, Subnet
from tests.contracts import (
    check_cost_is_counted,
    check_logits_have_the_size_of_the_images,
    check_state_can_be_kept,
)
from tools.bench.slimming import enliven


def supernet(size: Any = "tiny") -> MultiStageSupernet:
    torch.manual_seed(0)
    return MultiStageSupernet(5, size)


@pytest.fixture
def lively() -> MultiStageSupernet:
    """A supernet whose norms have statistics and weights, and kernels matrices of their own, in evaluation."""
    model = supernet()
    enliven(model, torch.randn(2, 3, 64, 96))
    for layer in model.modules():
        if isinstance(layer, ElasticConv2d):
            for change in layer.changes:
                nn.init.normal_(change, std=0.1)
    return model.eval()


def with_choices(space: SearchSpace, subnet: Subnet, **chosen: Any) -> Subnet:
    """The network with some values changed; `stage2_stride8_depth` is `stage2.stride8.depth`."""
    return space.subnet({**subnet.as_record(), **{name.replace("_", "."): value for name, value in chosen.items()}})


def sampled(space: SearchSpace, count: int) -> list[Subnet]:
    return [space.sample(np.random.default_rng(seed)) for seed in range(count)]


def found(model: ExitNetwork, images: Tensor) -> list[Tensor]:
    """The logits of every exit."""
    with torch.no_grad():
        return [coarse.logits for coarse in model.exits(images) if coarse is not None]


@contextmanager
def rows_seen(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """How many images each layer was called with, by its name, once for each call."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | ElasticConv2d)]
    seen: dict[str, list[int]] = {name: [] for name, _ in layers}
    hooks = [
        module.register_forward_pre_hook(lambda module, given, name=name: seen[name].append(len(given[0])))
        for name, module in layers
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def of(seen: dict[str, list[int]], start: str) -> set[int]:
    """What the layers whose names begin so were called with; empty when none was."""
    names = [name for name in seen if name.startswith(start)]
    assert names, f"no layer is named {start}"
    return {rows for name in names for rows in seen[name]}


# What every model is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subnet", [None, space_of("tiny").smallest.as_record()], ids=["largest", "smallest"])
def test_a_network_meets_the_contract(subnet: dict[str, Any] | None) -> None:
    torch.manual_seed(0)
    model = MultiStage(5, "tiny", subnet)
    check_logits_have_the_size_of_the_images(model, 5, ((45, 67), (96, 128), (1, 1), (33, 200)))
    check_state_can_be_kept(lambda: MultiStage(5, "tiny", subnet), model, (45, 67))
    check_cost_is_counted(model, (96, 128))


def test_the_supernet_meets_the_contract() -> None:
    model = supernet()
    check_logits_have_the_size_of_the_images(model, 5, ((45, 67), (96, 128)))
    check_state_can_be_kept(supernet, model, (45, 67))
    check_cost_is_counted(model, (96, 128))


@pytest.mark.parametrize("size", [(45, 67), (1, 1), (97, 130)])
def test_smaller_networks_take_any_size(lively: MultiStageSupernet, size: tuple[int, int]) -> None:
    for subnet in (lively.space.smallest, *sampled(lively.space, 2)):
        with activated(lively, subnet), torch.no_grad():
            logits = lively(torch.randn(1, 3, *size))
        assert tuple(logits.shape) == (1, 5, *size)
        assert logits.isfinite().all()


def test_every_weight_has_a_gradient_from_the_largest_network() -> None:
    """So that ranks agree on what has one; the matrices of kernels do not run there and have zeros."""
    model = supernet().train()
    outputs = model(torch.randn(2, 3, 45, 67))
    assert isinstance(outputs, Outputs)
    assert [tuple(logits.shape) for logits in outputs.logits] == [(2, 5, 45, 67)] * STAGES
    sum(logits.square().mean() for logits in outputs.logits).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any() or ".changes." in name, name


def test_networks_of_one_step_add_up_their_gradients() -> None:
    model, images = supernet().train(), torch.randn(2, 3, 64, 64)

    def gradients(subnets: Sequence[Subnet]) -> dict[str, Tensor]:
        model.zero_grad()
        for subnet in subnets:
            with activated(model, subnet):
                sum(logits.square().mean() for logits in model(images).logits).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    largest, smallest = model.space.largest, model.space.smallest
    both, one, other = gradients([largest, smallest]), gradients([largest]), gradients([smallest])
    assert set(both) == {name for name, _ in model.named_parameters()}
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, one[name] + other.get(name, 0), rtol=1e-3, atol=1e-5)
    assert any(gradient.any() for name, gradient in both.items() if ".changes." in name)


def test_the_last_exit_teaches_all_stages_and_the_first_only_its_own() -> None:
    model = MultiStage(5, "tiny").train()
    outputs = model(torch.randn(2, 3, 64, 64))
    outputs.logits[-1].square().mean().backward(retain_graph=True)
    untaught = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert untaught
    assert all(".head." in name and not name.startswith("stages.2.") for name in untaught)
    model.zero_grad()
    outputs.logits[0].square().mean().backward()
    taught = {name.rsplit(".", 1)[0] for name, weight in model.named_parameters() if weight.grad is not None}
    assert all(name.startswith(("stem.", "stages.0.")) for name in taught)


def test_it_trains_in_bfloat16_and_in_channels_last() -> None:
    model = supernet().train().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    for subnet in (model.space.largest, model.space.smallest):
        with activated(model, subnet), torch.autocast("cpu", torch.bfloat16):
            outputs = model(images)
        sum(logits.float().square().mean() for logits in outputs.logits).backward()
        assert {logits.dtype for logits in outputs.logits} == {torch.bfloat16}
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_the_smallest_image_trains_alone() -> None:
    model = supernet().train()
    with activated(model, model.space.smallest):
        outputs = model(torch.randn(1, 3, 20, 30))
    assert all(logits.isfinite().all() for logits in outputs.logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "model.args.size is 'huge'; choose one of tiny, small"),
        ({"subnet": {"depth": 2}}, "model.args.subnet: 'depth' is no choice of this search space"),
        ({"subnet": "largest"}, "model.args.subnet is 'largest'; give a value for each of resolution, stage1"),
        ({"subnet": {"resolution": 1.0}}, "model.args.subnet: stage1.stride8.depth is missing"),
    ],
)
def test_other_values_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        MultiStage(5, **{"size": "tiny", **options})


# The triangular rule ----------------------------------------------------------------------------------------------


def test_a_stage_says_the_same_bit_for_bit_whatever_runs_behind_it(lively: MultiStageSupernet) -> None:
    """Not advanced, advanced, with other sizes of the later stages, and with other weights there."""
    images = torch.randn(2, 3, 64, 96)
    whole = found(lively, images)
    with torch.no_grad(), closing(lively.exits(images)) as walk:
        alone = next(walk)
    assert alone is not None
    assert torch.equal(alone.logits, whole[0])
    changed = with_choices(
        lively.space, lively.space.largest, stage2_stride8_depth=1, stage3_stride16_kernel=3, stage3_stride32_width=0.5
    )
    with activated(lively, changed):
        others = found(lively, images)
    assert torch.equal(others[0], whole[0])
    assert not torch.equal(others[1], whole[1])
    other = deepcopy(lively)
    for parameter in other.stages[2].parameters():
        nn.init.normal_(parameter)
    rewritten = found(other, images)
    assert torch.equal(rewritten[0], whole[0])
    assert torch.equal(rewritten[1], whole[1])
    assert not torch.equal(rewritten[2], whole[2])


def test_while_it_trains_later_stages_do_not_change_what_earlier_ones_say() -> None:
    """A BatchNorm over all groups would mix them."""
    model, images = MultiStage(5, "tiny").train(), torch.randn(2, 3, 64, 64)
    before = model(images).logits
    for parameter in model.stages[1].parameters():
        nn.init.normal_(parameter)
    after = model(images).logits
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("stage", [0, 1])
def test_later_stages_use_what_a_stage_computed(lively: MultiStageSupernet, stage: int) -> None:
    images, other = torch.randn(1, 3, 64, 64), deepcopy(lively)
    for parameter in other.stages[stage].levels.parameters():
        parameter.data.mul_(1.5)
    before, after = found(lively, images), found(other, images)
    assert [torch.equal(b, a) for b, a in zip(before, after, strict=True)] == [exit < stage for exit in range(STAGES)]


def block_triangular(parts: Sequence[nn.Module], visible: Sequence[int], channels: int) -> Tensor:
    """One weight of all stages, with zeros where a stage may not read."""
    kernel = parts[0].weight.shape[-1]  # type: ignore[union-attr, index]
    whole = torch.zeros(channels, visible[-1], kernel, kernel)  # type: ignore[arg-type]
    start = 0
    for part, seen in zip(parts, visible, strict=True):
        weight: Any = part.weight
        whole[start : start + len(weight), :seen] = weight.detach()
        start += len(weight)
    return whole


@torch.no_grad()
def test_it_is_one_network_with_block_lower_triangular_weights(lively: MultiStageSupernet) -> None:
    """The features at stride 8 of all stages, from dense convolutions of all channels with the zeros filled in."""
    model = lively.extract(lively.space.largest).eval()
    images = torch.randn(1, 3, 64, 64)

    def together(layers: Sequence[Any], features: Tensor, visible: Sequence[int], stride: int = 1) -> Tensor:
        convolutions, norms = [layer[0] for layer in layers], [layer[1] for layer in layers]
        weight = block_triangular(convolutions, visible, sum(norm.num_features for norm in norms))
        made = torch.conv2d(features, weight, stride=stride, padding=weight.shape[-1] // 2)
        return torch.cat([norm(part) for norm, part in zip(norms, made.chunk(STAGES, dim=1), strict=True)], dim=1)

    levels = [stage.levels[0] for stage in model.stages]
    features = together([level.down for level in levels], model.stem(images), [48] * STAGES, stride=2).relu()
    for position in range(2):
        blocks = [level.blocks[position] for level in levels]
        inner = together([block.first for block in blocks], features, [24, 48, 72]).relu()
        features = (features + together([block.second for block in blocks], inner, [24, 48, 72])).relu()

    state, made = model.begin(images), None
    for exit in range(STAGES):
        seen, state = model.part(exit, state)
        made = seen[0]
    torch.testing.assert_close(made, features, rtol=1e-4, atol=1e-4)


def test_a_block_that_a_stage_leaves_out_is_the_identity_there(lively: MultiStageSupernet) -> None:
    """Stage 1 has one block and stage 3 two: stage 3's second reads what stage 1's first made."""
    subnet = with_choices(lively.space, lively.space.largest, stage1_stride8_depth=1, stage2_stride8_depth=1)
    given: dict[str, Tensor] = {}
    with activated(lively, subnet):
        first, second = (lively.stages[2].levels[0].blocks[position].first for position in range(2))
        for name, layer in (("first", first), ("second", second)):
            layer.register_forward_pre_hook(lambda layer, features, name=name: given.__setitem__(name, features[0]))
        with rows_seen(lively) as seen, torch.no_grad():
            state = lively.begin(torch.randn(1, 3, 64, 64))
            visible = []
            for exit in range(STAGES):
                levels, state = lively.part(exit, state)
                visible.append(levels[0])
    assert [of(seen, f"stages.{stage}.levels.0.blocks.1") for stage in range(STAGES)] == [set(), set(), {1}]
    assert torch.equal(given["second"][:, :48], visible[1])
    assert not torch.equal(given["second"][:, :48], given["first"][:, :48])


# What runs, and what it costs -------------------------------------------------------------------------------------


def test_a_later_stage_does_not_run_before_it_is_asked(lively: MultiStageSupernet) -> None:
    with rows_seen(lively) as seen, torch.no_grad(), closing(lively.exits(torch.randn(3, 3, 64, 96))) as walk:
        for reached in range(STAGES):
            next(walk)
            for number in range(STAGES):
                ran = {3} if number <= reached else set()
                assert of(seen, f"stages.{number}.levels") == of(seen, f"stages.{number}.head") == ran
    assert {len(calls) for calls in seen.values()} == {1}, "what was computed is kept"


def test_in_evaluation_only_the_last_head_runs(lively: MultiStageSupernet) -> None:
    images = torch.randn(1, 3, 50, 70)
    with rows_seen(lively) as seen, torch.no_grad():
        plain = lively(images)
        coarse = lively.coarse_logits(images)
    assert [of(seen, f"stages.{number}.head") for number in range(STAGES)] == [set(), set(), {1}]
    assert torch.equal(coarse.logits, found(lively, images)[-1])
    assert torch.equal(full_size(coarse, (50, 70)), plain)
    assert (coarse.padded_size, coarse.align_corners, tuple(coarse.logits.shape[-2:])) == ((64, 96), False, (8, 12))


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_survivors_are_what_they_are_alone(lively: MultiStageSupernet, seed: int | None) -> None:
    """Of five images 4, 0 and 2 go on from the first exit, and of those the last and the first from the second."""
    space, images = lively.space, torch.randn(5, 3, 64, 96)
    subnet = space.largest if seed is None else space.sample(np.random.default_rng(seed))
    kept, left = [torch.tensor([4, 0, 2]), torch.tensor([2, 0])], torch.arange(5)
    with activated(lively, subnet):
        alone = [found(lively, image[None]) for image in images]
        with rows_seen(lively) as seen, torch.no_grad():
            walk = lively.exits(images)
            coarse = next(walk)
            for exit in range(STAGES):
                assert coarse is not None
                expected = torch.cat([alone[image][exit] for image in left])
                torch.testing.assert_close(coarse.logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
                if exit < STAGES - 1:
                    left = left[kept[exit]]
                    coarse = walk.send(kept[exit])
    assert [of(seen, f"stages.{number}.") for number in range(STAGES)] == [{5}, {3}, {2}]
    assert left.tolist() == [2, 4]


def test_behind_the_last_stage_nothing_is_kept(lively: MultiStageSupernet) -> None:
    with torch.no_grad():
        state = lively.begin(torch.randn(1, 3, 64, 64))
        for exit in range(STAGES - 1):
            _, state = lively.part(exit, state)
        stem, earlier = state
        _, made = lively.stages[-1](stem, earlier, [0, 0, 0])
        _, state = lively.part(STAGES - 1, state)
    assert earlier
    assert (made, state) == ({}, ())


@pytest.mark.parametrize(("size", "gmacs"), [("tiny", (1.2, 1.6)), ("small", (3, 4))])
def test_exits_cost_a_quarter_and_a_little_more_than_half(size: Any, gmacs: tuple[float, float]) -> None:
    costs = path_costs(MultiStage(11, size), (360, 480))
    shares = [(trunk + head) / costs.full for trunk, head in zip(costs.trunk, costs.heads, strict=True)]
    assert 0.2 < shares[0] < 0.27
    assert 0.5 < shares[1] < 0.57
    assert all(head < 0.03 * costs.full for head in costs.heads)
    assert gmacs[0] < costs.full / 1e9 < gmacs[1]


def test_macs_of_a_stage_grow_with_all_that_it_sees() -> None:
    """By hand, at 64x64: stage j's 5x5 at stride 8 reads 24 j channels and makes 24, on 8x8 pixels."""
    model = MultiStage(5, "tiny")
    for number, stage in enumerate(model.stages, start=1):
        (convolution, *_) = stage.levels[0].blocks[0].first
        by_hand = 5**2 * (24 * number) * 24 * 8**2
        counted = count_macs(convolution, (8, 8), in_channels=24 * number).macs
        assert counted == by_hand


# The supernet -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_network_on_its_own_is_the_active_one(lively: MultiStageSupernet, seed: int) -> None:
    space = lively.space
    subnet = (space.smallest, space.largest, *sampled(space, 4))[seed]
    network, images = lively.extract(subnet), torch.randn(2, 3, 90, 129)
    assert isinstance(network, ExitNetwork)
    assert not network.training
    assert network.active == subnet
    assert {type(module).__module__ for module in network.modules() if not list(module.children())} <= {
        f"torch.nn.modules.{kind}" for kind in ("conv", "batchnorm", "activation")
    }
    with activated(lively, subnet):
        expected = found(lively, images)
    for own, active in zip(found(network, images), expected, strict=True):
        torch.testing.assert_close(own, active, rtol=1e-5, atol=1e-5 * float(active.abs().max()))
    assert lively.active == space.largest


def test_in_training_too_a_network_on_its_own_is_the_active_one(lively: MultiStageSupernet) -> None:
    images = torch.randn(2, 3, 64, 96)
    subnet = sampled(lively.space, 1)[0]
    network = lively.train().extract(subnet)
    assert network.training
    with activated(lively, subnet), torch.no_grad():
        expected = lively(images).logits
    for own, active in zip(network(images).logits, expected, strict=True):
        torch.testing.assert_close(own, active, rtol=1e-4, atol=1e-4)


def test_a_network_on_its_own_has_its_own_weights_and_learns(lively: MultiStageSupernet) -> None:
    before = {name: value.clone() for name, value in lively.state_dict().items()}
    network = lively.extract(lively.space.smallest).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    sum(logits.square().mean() for logits in network(torch.randn(2, 3, 64, 64)).logits).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.parameters())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in lively.state_dict().items())


def test_a_network_on_its_own_can_be_slimmed(lively: MultiStageSupernet) -> None:
    network = lively.extract(lively.space.smallest)
    before = count_macs(network, (64, 64)).macs
    slim(network, NetworkSlimming(keep=0.7, importance="magnitude"), input_size=(64, 64))
    assert count_macs(network, (64, 64)).macs < 0.85 * before
    assert [tuple(logits.shape) for logits in found(network.eval(), torch.randn(1, 3, 64, 64))] == [(1, 5, 8, 8)] * 3


def test_a_network_on_its_own_can_be_built_and_loaded_again(lively: MultiStageSupernet) -> None:
    subnet, images = sampled(lively.space, 1)[0], torch.randn(1, 3, 64, 64)
    network = lively.extract(subnet)
    again = MultiStage(5, "tiny", subnet.as_record()).eval()
    again.load_state_dict(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found(network, images), found(again, images), strict=True))


def test_every_choice_changes_the_network(lively: MultiStageSupernet) -> None:
    images = torch.randn(1, 3, 96, 128)
    largest = found(lively, images)[-1]
    for name, values in lively.space.values.items():
        chosen = lively.space.subnet({**lively.space.largest.as_record(), name: values[0]})
        with activated(lively, chosen):
            other = found(lively, images)[-1]
        assert largest.shape != other.shape or not torch.equal(largest, other), name
    assert torch.equal(found(lively, images)[-1], largest)


def test_smaller_values_cost_less(lively: MultiStageSupernet) -> None:
    full = count_macs(lively, (96, 128)).macs
    for name in ("resolution", "stage1_stride8_depth", "stage2_stride16_kernel", "stage3_stride32_width"):
        smallest = lively.space.values[name.replace("_", ".")][0]
        with activated(lively, with_choices(lively.space, lively.space.largest, **{name: smallest})):
            assert count_macs(lively, (96, 128)).macs < full, name


def test_taking_a_network_out_draws_no_random_numbers(lively: MultiStageSupernet) -> None:
    before = torch.get_rng_state()
    lively.extract(lively.space.smallest)
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes_are_those_of_the_choices() -> None:
    space = space_of("small")
    subnet = with_choices(
        space, space.smallest, stage2_stride16_depth=3, stage2_stride16_kernel=5, stage2_stride16_width=0.75
    )
    shapes = shapes_of("small", subnet)
    assert shapes[1][1] == (3, 5, 40)  # 0.75 x 48 = 36, and the next multiple of 8
    assert shapes[0][0] == (1, 3, 16)


@pytest.mark.parametrize(("resolution", "seen"), [(1.0, (160, 256)), (0.75, (128, 192)), (0.5, (96, 128))])
def test_the_resolution_is_that_at_which_the_network_sees_the_images(
    lively: MultiStageSupernet, resolution: float, seen: tuple[int, int]
) -> None:
    """150x250 is padded to 160x256; rows are 120 and 80 at 0.75 and 0.5, nearest to 128 and 96 (or 64)."""
    with activated(lively, with_choices(lively.space, lively.space.largest, resolution=resolution)), torch.no_grad():
        coarse = lively.coarse_logits(torch.randn(1, 3, 150, 250))
        assert tuple(lively(torch.randn(1, 3, 150, 250)).shape) == (1, 5, 150, 250)
    assert coarse.padded_size == (160, 256)
    assert tuple(coarse.logits.shape[-2:]) == (seen[0] // 8, seen[1] // 8)


def test_activation_is_undone_after_an_error(lively: MultiStageSupernet) -> None:
    images = torch.randn(1, 3, 64, 64)
    before = found(lively, images)
    with pytest.raises(RuntimeError, match="stop"), activated(lively, lively.space.smallest):
        raise RuntimeError("stop")
    assert lively.active == lively.space.largest
    assert all(torch.equal(a, b) for a, b in zip(found(lively, images), before, strict=True))


def test_networks_of_another_space_are_refused(lively: MultiStageSupernet) -> None:
    other = space_of("small").largest
    for refuse in (lively.activate, lively.extract):
        with pytest.raises(ValueError, match=r"stage1\.stride8\.depth is 3; choose one of 1, 2"):
            refuse(other)
    assert lively.active == lively.space.largest
    lively.activate(lively.space.smallest)
    lively.activate(None)
    assert lively.active == lively.space.largest


def test_only_the_largest_network_moves_the_running_statistics() -> None:
    model, images = supernet().train(), torch.randn(2, 3, 64, 64)
    before = {name: value.clone() for name, value in model.named_buffers()}
    for subnet in (model.space.smallest, with_choices(model.space, model.space.largest, resolution=0.5)):
        with activated(model, subnet):
            model(images)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model(images)
    assert not any(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_sorting_channels_keeps_the_largest_network_and_puts_the_heaviest_first(lively: MultiStageSupernet) -> None:
    images, follower = torch.randn(1, 3, 64, 64), deepcopy(lively)
    before = found(lively, images)
    optimizer = torch.optim.AdamW(lively.parameters(), lr=0.0, weight_decay=0.0)
    lively.train()
    sum(logits.square().mean() for logits in lively(images).logits).backward()
    optimizer.step()
    weight = lively.stages[0].levels[0].blocks[0].second[0].weight  # read by stage 1 from stage 1
    held = {name: optimizer.state[value]["exp_avg"].sum().clone() for name, value in lively.named_parameters()}
    ratio = (optimizer.state[weight]["exp_avg"] / weight).flatten().sort().values
    lively.eval().load_state_dict(follower.state_dict())
    lively.sort_channels("width", [optimizer], [follower])
    for model in (lively, follower):
        for own, expected in zip(found(model, images), before, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for level in range(3):
        for number in range(STAGES):
            blocks = [stage.levels[level].blocks[1] for stage in lively.stages]
            inner = blocks[number].inner
            start = number * inner
            read = sum(
                block.second[0].weight[:, start : start + inner].abs().sum((0, 2, 3)) for block in blocks[number:]
            )
            assert isinstance(read, Tensor)
            assert all(one >= other for one, other in pairwise(read.tolist()))
    torch.testing.assert_close((optimizer.state[weight]["exp_avg"] / weight).flatten().sort().values, ratio)
    for name, value in lively.named_parameters():
        torch.testing.assert_close(optimizer.state[value]["exp_avg"].sum(), held[name], rtol=1e-3, atol=1e-6)
