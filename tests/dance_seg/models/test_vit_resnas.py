"""ViT-ResNAS: residual spatial reduction, subnets that are corners of the weights, and several of them in one pass."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.cost.macs import count_macs, count_training_macs
from dance_seg.models.vit_resnas import (
    SIZES,
    Attention,
    Block,
    BlockSizes,
    PositionTable,
    Reduction,
    ResNasNetwork,
    VitResNas,
    averaged,
    from_windows,
    search_space,
    to_windows,
    vit_resnas,
)
from dance_seg.network_slimming import NetworkSlimming, slim
from dance_seg.supernet.prefix import ChannelDrop, PrefixDropPath, PrefixLinear, PrefixNorm, several_at_once
from dance_seg.supernet.sampling import Sampling, subnets_of_step
from dance_seg.supernet.space import SearchSpace, Subnet
from tests.contracts import check_model

CLASSES = 5


def tiny(**options: Any) -> VitResNas:
    torch.manual_seed(0)
    return VitResNas(CLASSES, **options)


def lively(**options: Any) -> VitResNas:
    """A network whose biases, norms and statistics are of their own, in evaluation."""
    model = tiny(**options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        for name, statistics in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                statistics.add_(torch.rand_like(statistics))
    return model.eval()


def at(space: SearchSpace, position: int) -> Subnet:
    """The subnet with the values at that position of every choice that has four of them, and the largest others."""
    return space.subnet(
        {name: values[position] if len(values) == 4 else values[-1] for name, values in space.values.items()}
    )


def drawn(space: SearchSpace, count: int) -> list[Subnet]:
    random = np.random.default_rng(0)
    return [space.sample(random) for _ in range(count)]


# What every model is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 4}, {"attention": "window"}, {"attention": "global", "residual_reduction": False}],
    ids=str,
)
def test_it_meets_the_contract(options: dict[str, Any]) -> None:
    check_model(lambda: VitResNas(CLASSES, **options), CLASSES)


def test_the_published_shape_meets_the_contract_in_size_small() -> None:
    model = VitResNas(CLASSES, size="small").eval()
    assert model(torch.zeros(1, 3, 33, 40)).shape == (1, CLASSES, 33, 40)
    assert count_macs(model, (96, 128)).uncounted == ()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (31, 33), (64, 200)])
def test_any_size_of_image_works(height: int, width: int) -> None:
    model = tiny().eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, height, width)).shape == (1, CLASSES, height, width)


def test_images_that_fit_are_not_padded_and_others_to_the_next_multiple() -> None:
    assert tiny().stride == 32
    assert tiny().padded_size(64, 65) == (64, 96)
    assert tiny(attention="window").padded_size(64, 65) == (64, 128)


@pytest.mark.parametrize("stride", [4, 8])
def test_logits_come_at_the_stride_of_the_first_stage(stride: Any) -> None:
    coarse = tiny(stride=stride).eval().coarse_logits(torch.zeros(1, 3, 60, 90))
    assert coarse.logits.shape == (1, CLASSES, 64 // stride, 96 // stride)
    assert coarse.padded_size == (64, 96)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", "large"),
        ("stride", 16),
        ("stride", True),
        ("attention", "linear"),
        ("residual_reduction", "no"),
        ("drop_path", 1.0),
        ("drop_path", True),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.args\.{option} is {value!r}"):
        VitResNas(CLASSES, **{option: value})


def test_it_trains_in_bfloat16_as_one_and_as_several() -> None:
    model = tiny().train()
    images = torch.randn(4, 3, 64, 64)
    for subnets in ([], [model.space.largest, model.space.smallest]):
        with torch.autocast("cpu", torch.bfloat16), several_at_once(model, subnets):
            logits = model(images)
        logits.float().square().mean().backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_in_bfloat16_several_are_near_what_each_is() -> None:
    model = lively()
    images = torch.randn(1, 3, 64, 64)
    subnets = [model.space.largest, model.space.smallest]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with several_at_once(model, subnets):
            found = model(images.expand(2, -1, -1, -1)).float()
        for number, subnet in enumerate(subnets):
            expected = model.extract(subnet)(images).float()[0]
            assert (found[number] - expected).abs().max() < 0.05 * expected.abs().max()


# Residual spatial reduction ---------------------------------------------------------------------------------------


def still(residual: bool = True) -> Reduction:
    torch.manual_seed(0)
    reduction = Reduction(4, 6, grid=3, residual=residual)
    nn.init.zeros_(reduction.conv.weight)
    nn.init.zeros_(reduction.conv.corner()[1])
    nn.init.normal_(reduction.position.table)
    return reduction


def test_with_a_convolution_of_zeros_the_reduction_is_the_mean_of_four_with_zeros_behind_and_positions() -> None:
    tokens = torch.randn(2, 6, 6, 4)
    reduction = still()
    expected = torch.zeros(2, 3, 3, 6)
    expected[..., :4] = (tokens[:, ::2, ::2] + tokens[:, 1::2, ::2] + tokens[:, ::2, 1::2] + tokens[:, 1::2, 1::2]) / 4
    positions = reduction.position.table.permute(1, 2, 0)
    torch.testing.assert_close(reduction(tokens), expected + positions)
    nn.init.zeros_(reduction.position.table)
    torch.testing.assert_close(reduction(tokens), expected)


def test_without_the_residual_nothing_of_the_tokens_as_they_were_is_left() -> None:
    tokens = torch.randn(2, 6, 6, 4)
    reduction = still(residual=False)
    assert torch.equal(reduction(tokens), reduction.position.table.permute(1, 2, 0).expand(2, -1, -1, -1))


def test_the_ablation_has_the_same_weights() -> None:
    names = [set(tiny(residual_reduction=residual).state_dict()) for residual in (True, False)]
    assert names[0] == names[1]


# Positions and attention ------------------------------------------------------------------------------------------


def test_positions_are_the_table_on_its_own_grid_and_resized_bicubically_on_others() -> None:
    position = PositionTable(3, grid=4)
    nn.init.normal_(position.table)
    table = position.table.permute(1, 2, 0)
    assert torch.equal(position(torch.zeros(1, 4, 4, 3))[0], table)
    expected = F.interpolate(position.table[None], (5, 9), mode="bicubic")[0].permute(1, 2, 0)
    assert torch.equal(position(torch.zeros(1, 5, 9, 3))[0], expected)


def test_every_stage_adds_positions_anew() -> None:
    model = lively()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        for place in ("embedding", "reductions.0", "reductions.1"):
            table = model.network.get_parameter(f"{place}.position.table")
            kept = table.clone()
            table.zero_()
            assert not torch.allclose(model(images), before)
            table.copy_(kept)


def test_windows_are_cut_row_by_row_and_put_together_again() -> None:
    tokens = torch.arange(32.0).view(1, 4, 8, 1)
    windows = to_windows(tokens, 2)
    assert windows.shape == (8, 4, 1)
    assert windows[1].flatten().tolist() == [2, 3, 10, 11]
    assert torch.equal(from_windows(windows, 2, (4, 8)), tokens)
    two = torch.randn(2, 4, 8, 3)
    assert torch.equal(from_windows(to_windows(two, 4), 4, (4, 8)), two)


def test_averaging_takes_the_mean_of_squares_of_tokens() -> None:
    tokens = torch.arange(8.0).view(1, 2, 4, 1)
    assert averaged(tokens, 2).flatten().tolist() == [2.5, 4.5]


def attention(kind: Any, reduction: int = 2) -> Attention:
    torch.manual_seed(0)
    return Attention(BlockSizes(8, heads=2, head_dim=4, mlp=8, exists=True), kind, reduction)


def test_global_attention_is_torchs_own_multi_head_attention() -> None:
    """8 channels, 2 heads of 4 dimensions: the same weights in nn.MultiheadAttention."""
    layer = attention("global")
    other = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key_value.weight]))
        other.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key_value.bias]))
        other.out_proj.weight.copy_(layer.project.weight)
        other.out_proj.bias.copy_(layer.project.bias)
    tokens = torch.randn(2, 3, 5, 8)
    flat = tokens.flatten(1, 2)
    torch.testing.assert_close(layer(tokens).flatten(1, 2), other(flat, flat, flat)[0], rtol=1e-5, atol=1e-6)


def seen_by_the_first(layer: Attention, height: int, width: int) -> Tensor:
    """Which tokens change what the first one takes: (h, w) of bool."""
    tokens = torch.randn(1, height, width, 8, requires_grad=True)
    layer(tokens)[0, 0, 0].sum().backward()
    assert tokens.grad is not None
    return tokens.grad[0].abs().sum(-1) > 0


def test_a_token_sees_its_window_or_all_tokens() -> None:
    seen = seen_by_the_first(attention("window"), 16, 16)
    assert seen[:8, :8].all()
    assert seen.sum() == 64
    assert seen_by_the_first(attention("reduced"), 8, 8).all()
    assert seen_by_the_first(attention("global"), 5, 7).all()


def test_reduced_attention_costs_a_share_of_the_global_one() -> None:
    macs = {kind: count_macs(tiny(attention=kind), (256, 256)).macs for kind in ("reduced", "global")}
    # 4 blocks at stride 8: 1024 tokens of 64 channels see 1024, or 64. Two products, and keys and values for fewer.
    assert macs["global"] - macs["reduced"] == 4 * (1024 - 64) * (2 * 1024 * 64 + 64 * 2 * 64)


# The space --------------------------------------------------------------------------------------------------------


def test_after_a_block_that_is_left_out_the_droppable_ones_of_its_run_are_left_out_too() -> None:
    space = tiny().space
    largest = space.largest.as_record()
    assert space.subnet({**largest, "stage1.block3.exists": 0})["stage1.block4.exists"] == 0
    assert space.subnet({**largest, "stage1.block4.exists": 0})["stage1.block3.exists"] == 1
    assert space.subnet({**largest, "stage1.block3.exists": 0})["stage2.block3.exists"] == 1


def test_where_every_second_block_is_droppable_a_run_is_one_block() -> None:
    space = search_space(SIZES["small"])
    without = space.subnet({**space.largest.as_record(), "stage1.block2.exists": 0})
    assert [without[f"stage1.block{block}.exists"] for block in range(1, 7)] == [1, 0, 1, 1, 1, 1]


def test_the_sizes_of_a_block_that_is_left_out_do_not_make_another_network() -> None:
    space = tiny().space
    without = {**space.largest.as_record(), "stage1.block4.exists": 0}
    assert space.subnet(without) == space.subnet({**without, "stage1.block4.heads": 1, "stage1.block4.mlp": 64})
    assert all(subnet in space for subnet in drawn(space, 20))


def test_sampled_subnets_are_in_a_space_that_is_opened_from_the_largest_down() -> None:
    space = tiny().space
    part = space.restricted({name: values[-2:] for name, values in space.values.items()})
    random = np.random.default_rng(0)
    assert all(part.sample(random) in part for _ in range(20))


@pytest.mark.parametrize("size", SIZES)
def test_a_stage_is_never_narrower_than_the_one_before(size: str) -> None:
    values = search_space(SIZES[size]).values
    for stage in (1, 2):
        assert values[f"stage{stage}.embed"][-1] <= values[f"stage{stage + 1}.embed"][0]


# Subnets ----------------------------------------------------------------------------------------------------------


def test_the_extracted_network_is_the_activated_one_and_its_part_of_a_masked_pass() -> None:
    model = lively()
    images = torch.randn(1, 3, 70, 90)
    subnets = [model.space.largest, model.space.smallest, *drawn(model.space, 6)]
    assert any(not value for subnet in subnets for name, value in subnet.choices if name.endswith("exists"))
    with torch.no_grad(), several_at_once(model, subnets):
        together = model(images.expand(8, -1, -1, -1))
    for number, subnet in enumerate(subnets):
        model.activate(subnet)
        extracted = model.extract(subnet)
        assert not any(layer.training for layer in extracted.modules())
        with torch.no_grad():
            expected = extracted(images)
            torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(together[number : number + 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"stride": 4}, {"attention": "window"}, {"residual_reduction": False}], ids=str)
def test_every_variant_has_subnets(options: dict[str, Any]) -> None:
    model = lively(**options)
    images = torch.randn(1, 3, 64, 64)
    subnets = [model.space.largest, model.space.smallest, *drawn(model.space, 2)]
    with torch.no_grad(), several_at_once(model, subnets):
        together = model(images.expand(4, -1, -1, -1))
    for number, subnet in enumerate(subnets):
        with torch.no_grad():
            torch.testing.assert_close(together[number], model.extract(subnet)(images)[0], rtol=1e-5, atol=1e-5)


def test_several_at_once_train_as_each_alone_would() -> None:
    """The gradient of one pass is the sum of those of the subnets, each on its own images."""
    model = lively()  # in evaluation: BatchNorm's statistics and drop path would differ
    images, wanted = torch.randn(4, 3, 64, 64), torch.randn(4, CLASSES, 64, 64)
    subnets = [model.space.largest, model.space.smallest]
    with several_at_once(model, subnets):
        (model(images) * wanted).sum().backward()
    together = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    for number, subnet in enumerate(subnets):
        model.activate(subnet)
        part = slice(2 * number, 2 * number + 2)
        (model(images[part]) * wanted[part]).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        size = weight.grad.abs().max()
        assert (together[name] - weight.grad).abs().max() <= 1e-4 * size + 1e-5, name


def test_the_extracted_network_has_plain_layers_and_no_masks() -> None:
    model = tiny()
    subnet = model.space.smallest
    with several_at_once(model, [model.space.largest, subnet]):
        network = model.extract(subnet)
    kinds = {type(layer) for layer in network.modules()}
    assert not kinds & {PrefixLinear, PrefixNorm, PrefixDropPath, ChannelDrop}
    assert [len(blocks) for blocks in network.stages] == [2, 2, 2]
    assert network.stages[0][0].attention.query.weight.shape == (1 * 8, 40)


def test_the_extracted_network_learns_without_the_supernet() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = model.extract(model.space.smallest).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(weight.grad is not None for weight in network.parameters())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_extracted_networks_state_fits_another_of_the_same_subnet() -> None:
    model = lively()
    network = model.extract(model.space.smallest)
    other = VitResNas(CLASSES).extract(model.space.smallest).eval()
    other.load_state_dict(network.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other(images), network(images))


def test_extracting_leaves_the_model_and_the_random_numbers_as_they_are() -> None:
    model = tiny()
    model.activate(model.space.smallest)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert isinstance(model.extract(model.space.largest), ResNasNetwork)
    assert torch.equal(torch.rand(1), expected)
    assert model.active == model.space.smallest
    subnets = (model.space.largest, model.space.smallest)
    model.set_masks(subnets)
    model.extract(model.space.smallest)
    assert model.masked == subnets
    assert model.network.embedding.drop.mask is not None


def test_the_extracted_network_can_be_slimmed() -> None:
    model = lively()
    network = model.extract(model.space.smallest)
    before = count_macs(network, (64, 64)).macs
    slim(network, NetworkSlimming(keep=0.5, importance="magnitude"), input_size=(64, 64))
    assert count_macs(network, (64, 64)).macs < before
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_an_active_subnet_costs_what_the_extracted_one_costs() -> None:
    model = tiny()
    for subnet in (model.space.smallest, *drawn(model.space, 2)):
        model.activate(subnet)
        assert count_macs(model, (64, 96)).macs == count_macs(model.extract(), (64, 96)).macs
    model.activate(None)
    assert count_macs(model, (64, 96)).macs > 2 * count_macs(model.extract(model.space.smallest), (64, 96)).macs


def test_a_subnet_of_another_space_is_refused() -> None:
    model = tiny()
    other = SearchSpace({"width": (1, 2)}).largest
    runs: tuple[Callable[[], object], ...] = (
        lambda: model.activate(other),
        lambda: model.extract(other),
        lambda: model.set_masks([other]),
    )
    for run in runs:
        with pytest.raises(ValueError, match="'width' is no choice of this search space"):
            run()
    assert model.active == model.space.largest


def test_a_recipe_names_a_subnet_by_its_choices() -> None:
    space = tiny().space
    named = vit_resnas(CLASSES, subnet=space.smallest.as_record())
    shapes = {name: weight.shape for name, weight in tiny().extract(space.smallest).named_parameters()}
    assert {name: weight.shape for name, weight in named.named_parameters()} == shapes
    with pytest.raises(ValueError, match=r"model\.args\.subnet: stage1\.embed is 41; choose one of 40, 48, 56, 64"):
        vit_resnas(CLASSES, subnet={**space.smallest.as_record(), "stage1.embed": 41})
    with pytest.raises(ValueError, match=r"model\.args\.subnet is 7; give a value for each of stage1\.embed"):
        vit_resnas(CLASSES, subnet=7)  # type: ignore[arg-type]


def test_a_model_and_its_space_can_be_sent_to_another_process() -> None:
    model = tiny()
    assert pickle.loads(pickle.dumps(model)).space.smallest == model.space.smallest


def test_the_layout_of_images_in_memory_does_not_matter() -> None:
    model = lively()
    images = torch.randn(2, 3, 64, 64)
    subnets = [model.space.largest, model.space.smallest]
    with torch.no_grad(), several_at_once(model, subnets):
        expected = model(images)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_state_is_the_same_whatever_is_active() -> None:
    model, other = lively(), tiny().eval()
    model.activate(model.space.smallest)
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        other.activate(other.space.smallest)
        assert torch.equal(other(images), expected)


# Several at once --------------------------------------------------------------------------------------------------


def four(model: VitResNas) -> list[Subnet]:
    return [at(model.space, position) for position in (3, 0, 2, 1)]


def test_eight_images_by_twos_are_four_distinct_masks_in_every_layer() -> None:
    model = tiny(drop_path=0.0).train()
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda layer, given, made, name=name: seen.__setitem__(name, made.flatten(1, 2).abs().sum(1) > 0)
        )
        for name, layer in model.named_modules()
        if isinstance(layer, ChannelDrop | PrefixNorm)
    ]
    with several_at_once(model, four(model)):
        model(torch.randn(8, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    assert (
        len(seen) == 3 + 12 * 5 + 2 + 3
    )  # tokens; in every block two norms, queries, heads and MLP; two and three norms
    for name, kept in seen.items():
        rows = kept.tolist()
        assert all(rows[image] == rows[image + 1] for image in range(0, 8, 2)), name
        assert len(set(map(tuple, rows))) == 4, name
        if "attention" not in name:  # whose channels are heads
            assert all(row == sorted(row, reverse=True) for row in rows), name


def test_networks_that_a_step_draws_have_distinct_masks_in_most_layers() -> None:
    """Of the four of a step 2.8 differ in a layer on average: widths are few, and a drawn one may be an end's."""
    model = tiny(drop_path=0.0).train()
    options = Sampling(method="multi_architectural", drawn=2, phases=(), start=0.0, end=0.0)
    apart, of_drawn = [], []
    for step in range(4):
        subnets = subnets_of_step(model.space, options, seed=0, global_step=step, progress=1.0)
        assert len(set(subnets)) == 4
        model.set_masks(subnets)
        masks = [
            layer.mask if layer.mask is not None else torch.ones(4, 1)
            for layer in model.modules()
            if isinstance(layer, ChannelDrop | PrefixNorm)
        ]
        of_drawn += [not torch.equal(mask[2], mask[3]) for mask in masks]
        apart += [len(set(map(tuple, mask.tolist()))) for mask in masks]
    assert np.mean(of_drawn) > 0.6
    assert np.mean(apart) > 2.5


def test_the_widest_channels_learn_only_from_the_groups_that_keep_them() -> None:
    """The largest subnet's images are the first two: without their loss the last channels get no gradient at all."""
    model = tiny(drop_path=0.0).train()
    images = torch.randn(8, 3, 64, 64)
    last = {
        "embedding.project.weight": lambda grad: grad[-1],
        "reductions.0.conv.weight": lambda grad: grad[:, -1],
        "reductions.0.norm.weight": lambda grad: grad[-1],
        "stages.0.1.attention.query.weight": lambda grad: grad[-1],
        "stages.1.1.attention.key_value.weight": lambda grad: grad[-1],
        "stages.1.1.attention.project.weight": lambda grad: grad[:, -1],
        "stages.2.1.mlp.expand.bias": lambda grad: grad[-1],
        "stages.2.1.mlp.project.weight": lambda grad: grad[:, -1],
        "stages.2.1.mlp.project.bias": lambda grad: grad[-1],
        "head.linears.2.weight": lambda grad: grad[:, -1],
    }
    for counted, learns in ((slice(2, 8), False), (slice(0, 2), True)):
        model.zero_grad(set_to_none=True)
        with several_at_once(model, four(model)):
            model(images)[counted].square().mean().backward()
        for name, part in last.items():
            gradient = model.network.get_parameter(name).grad
            assert gradient is not None
            assert bool(part(gradient).any()) is learns, name
            assert gradient.any(), name


def test_images_without_a_block_do_not_teach_it() -> None:
    model = tiny(drop_path=0.0).train()
    without = model.space.subnet({**model.space.largest.as_record(), "stage2.block3.exists": 0})
    with several_at_once(model, [model.space.largest, without]):
        model(torch.randn(2, 3, 64, 64))[1].square().mean().backward()
    for place, learns in ((1, True), (2, False), (3, False)):
        block = model.network.stages[1][place]
        assert isinstance(block, Block)
        assert any(weight.grad is not None and bool(weight.grad.any()) for weight in block.parameters()) is learns


def test_every_weight_gets_a_gradient_when_several_train_at_once() -> None:
    model = tiny().train()
    with several_at_once(model, four(model)):
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


def test_several_at_once_cost_the_matrix_products_of_the_largest() -> None:
    model = tiny()
    alone = count_training_macs(model, (64, 64), batch=2)
    with several_at_once(model, [model.space.largest, model.space.smallest]):
        together = count_training_macs(model, (64, 64), batch=2)
    assert together.uncounted == ()
    assert together.macs == alone.macs


def test_the_largest_has_to_be_among_them_and_the_batch_to_divide() -> None:
    model = tiny().train()
    with pytest.raises(ValueError, match="the largest subnet has to be one of those"):
        model.set_masks([model.space.smallest])
    with (
        several_at_once(model, four(model)),
        pytest.raises(ValueError, match=r"4 subnets .* batch of 6 images .* data\.args\.batch_size"),
    ):
        model(torch.randn(6, 3, 64, 64))


def test_activating_a_subnet_takes_masks_away_and_masks_make_the_largest_active() -> None:
    model = tiny()
    model.activate(model.space.smallest)
    model.set_masks([model.space.largest])
    assert model.active == model.space.largest
    model.set_masks(four(model))
    model.activate(model.space.smallest)
    assert model.masked == ()
    assert not any(getattr(layer, "mask", None) is not None for layer in model.modules())


def test_without_masks_the_largest_runs() -> None:
    model = lively()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        with several_at_once(model, [model.space.largest, model.space.largest]):
            assert torch.equal(model(images), expected)
        assert torch.equal(model(images), expected)


# Drop path --------------------------------------------------------------------------------------------------------


def test_drop_path_grows_with_depth_and_anew_in_what_is_extracted() -> None:
    model = tiny(drop_path=0.22)

    def rates(network: ResNasNetwork) -> list[float]:
        return [block.add_mlp.rate for _, _, block in network.every_block()]

    assert rates(model.network) == pytest.approx([0.02 * number for number in range(12)])
    assert rates(model.extract(model.space.smallest)) == pytest.approx([0.044 * number for number in range(6)])


# Order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "heads"])
def test_sorting_keeps_the_largest_network_and_its_momentum_and_changes_smaller_ones(kind: str) -> None:
    model, images = lively(), torch.randn(1, 3, 64, 64)
    follower = deepcopy(model)
    choices = {name: values[0] for name, values in model.space.values.items() if name.endswith(f".{kind}")}
    fewer = model.space.subnet({**model.space.largest.as_record(), **choices})
    with torch.no_grad():
        whole, small = model(images), model.extract(fewer)(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(images).square().mean().backward()
    optimizer.step()
    weight = model.network.stages[0][0].mlp.project.weight
    pairs = torch.stack([weight, optimizer.state[weight]["momentum_buffer"]]).detach().clone()  # (2, C, hidden)
    model.sort_channels(kind, [optimizer], [follower])
    with torch.no_grad():
        for sorted_model in (model, follower):
            torch.testing.assert_close(sorted_model(images), whole, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(model.extract(fewer)(images), small, rtol=1e-2, atol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), follower.parameters(), strict=True))
    for _, _, block in model.network.every_block():
        part = block.mlp if kind == "mlp" else block.attention
        assert part.order().tolist() == list(range(len(part.order())))
    moved = torch.stack([weight, optimizer.state[weight]["momentum_buffer"]]).detach()
    order = pairs[0].abs().sum(0).argsort(descending=True, stable=True) if kind == "mlp" else slice(None)
    assert torch.equal(moved, pairs[:, :, order])
