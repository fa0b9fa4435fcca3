import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from dance_seg.errors import DataError
from dance_seg.models.vit_resnas import VitResNas
from dance_seg.supernet.latency_table import (
    Checked,
    check,
    conditions_here,
    corrected,
    load_table,
    measure_table,
    parts_of,
    save_table,
)
from dance_seg.supernet.space import SearchSpace

SPACE = SearchSpace({"depth": (1, 2, 3), "width": (4, 8)})
SIZE = (16, 24)


def network(depth, width):
    layers = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(width, 2, 1))


@pytest.fixture(scope="module")
def table():
    return measure_table(SPACE, [network(1, 4), network(1, 8)], SIZE, time_limit_s=0.0)


def test_parts_are_counted_once_for_each_time_they_run():
    assert sorted(parts_of(network(3, 8), SIZE).values()) == [1, 1, 3, 3]
    assert parts_of(network(1, 8), SIZE).keys() == parts_of(network(3, 8), SIZE).keys()
    assert not parts_of(network(1, 8), SIZE).keys() & parts_of(network(1, 4), SIZE).keys()
    assert not parts_of(network(1, 8), SIZE).keys() & parts_of(network(1, 8), (8, 8)).keys()


def test_a_module_that_runs_twice_is_two_runs_of_a_part():
    shared = nn.Conv2d(3, 3, 1)
    assert list(parts_of(nn.Sequential(shared, shared), SIZE).values()) == [2]


def test_types_that_are_measured_whole_hide_what_is_in_them():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(3, 1)

        def forward(self, images):
            tokens = images.flatten(2).permute(2, 0, 1)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    (name,) = parts_of(Mixed(), (4, 4), whole=(nn.MultiheadAttention,))
    assert name.startswith("MultiheadAttention")
    assert "16x1x3" in name


def test_a_table_of_few_networks_prices_all_that_have_the_same_parts(table):
    parts = parts_of(network(3, 8), SIZE)
    convolution = next(name for name in parts if name.startswith("Conv2d(8, 8"))
    relu = next(name for name in parts if name.startswith("ReLU"))
    one, three = table.milliseconds(parts_of(network(1, 8), SIZE)), table.milliseconds(parts)
    assert 0 < one < three
    assert three - one == pytest.approx(2 * (table.parts[convolution] + table.parts[relu]))


def test_a_part_that_was_not_measured_is_named(table):
    with pytest.raises(ValueError, match=r"4 parts were not measured, such as Conv2d\(3, 5"):
        table.milliseconds(parts_of(network(1, 5), SIZE))


def test_sums_are_checked_against_whole_networks_and_corrected(table):
    checked = check(table, [network(2, 8), network(3, 4)], time_limit_s=0.0)
    assert [one.summed_ms for one in checked] == [
        table.milliseconds(parts_of(given, SIZE)) for given in (network(2, 8), network(3, 4))
    ]
    assert all(one.measured_ms > 0 for one in checked)
    assert Checked(3.0, 4.0).relative_error == -0.25
    twice = corrected(table, [Checked(1.0, 2.0)])
    parts = parts_of(network(1, 4), SIZE)
    assert twice.milliseconds(parts) == pytest.approx(2 * table.milliseconds(parts))
    assert corrected(twice, [Checked(1.0, 1.5)]).factor == pytest.approx(3)
    with pytest.raises(ValueError, match="at least one network"):
        corrected(table, [])


def test_the_network_is_left_as_it_was():
    given = network(2, 4).train()
    parts_of(given, SIZE)
    assert all(module.training and not module._forward_hooks for module in given.modules())


def test_a_table_comes_back_from_its_file(table, tmp_path):
    given = replace(table, factor=1.25, errors=(0.1, -0.3))
    read = load_table(save_table(given, tmp_path / "table.json"), SPACE, conditions_here(network(1, 4), SIZE))
    assert read == given
    assert read.typical_error == pytest.approx(0.2)
    assert read.fingerprint == given.fingerprint != table.fingerprint


def test_of_processes_that_measure_at_once_the_first_gives_the_table_of_all(table, tmp_path):
    path = save_table(replace(table, factor=1.25), tmp_path / "table.json")
    save_table(replace(table, factor=3.0), path)
    assert load_table(path, SPACE, conditions_here(network(1, 4), SIZE)).factor == 1.25
    assert [one.name for one in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"processor": "another"}, "processor was another and is"),
        ({"threads": 99}, "threads was 99 and is"),
        ({"input_size": (8, 8)}, r"input_size was \(8, 8\) and is \(16, 24\)"),
        ({"torch": "0.4"}, "torch was 0.4 and is"),
    ],
)
def test_a_table_of_other_conditions_is_refused(table, tmp_path, change, says):
    other = replace(table, conditions=replace(table.conditions, **change))
    path = save_table(other, tmp_path / "table.json")
    with pytest.raises(DataError, match=says) as error:
        load_table(path, SPACE, conditions_here(network(1, 4), SIZE))
    assert str(error.value).startswith(str(path))


def test_a_table_of_another_space_is_refused(table, tmp_path):
    path = save_table(table, tmp_path / "table.json")
    with pytest.raises(DataError, match="of another search space"):
        load_table(path, SearchSpace({"depth": (1, 2)}), conditions_here(network(1, 4), SIZE))


@pytest.mark.parametrize("wrong", ["", "[]", "{}", '{"space": 1, "conditions": {"input_size": 3}}', "NaN"])
def test_a_file_that_is_no_table_is_refused(table, tmp_path, wrong):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**table.as_record(), "factor": float("nan")}) if wrong == "NaN" else wrong)
    with pytest.raises(DataError, match=r"table\.json: is no latency table"):
        load_table(path, SPACE, conditions_here(network(1, 4), SIZE))


def test_no_networks_make_no_table():
    with pytest.raises(ValueError, match="at least one network"):
        measure_table(SPACE, [], SIZE)


def test_torch_keeps_its_random_state():
    given = network(1, 4)
    before = torch.get_rng_state()
    parts_of(given, SIZE)
    assert torch.equal(before, torch.get_rng_state())


def test_attentions_of_other_heads_are_other_parts_though_their_weights_are_alike():
    """4 heads of 8 and 2 of 16 take other times on the same tensors."""
    model = VitResNas(3, "tiny")
    largest = dict(model.space.largest.choices)
    heads = {f"stage1.block{block}.heads": (2, 4) for block in (1, 2, 3, 4)}
    few = model.space.subnet({**largest, **{name: two for name, (two, _) in heads.items()}, "stage1.head_dim": 16})
    many = model.space.subnet({**largest, **{name: four for name, (_, four) in heads.items()}, "stage1.head_dim": 8})
    one, other = (parts_of(model.extract(subnet), (64, 64), whole=model.measured_whole) for subnet in (few, many))
    assert {part.partition("(")[0] for part in one.keys() ^ other.keys()} == {"Attention"}
