"""The ledger's sums by hand, its record, and how the ledgers of several ranks become one."""

import json

import pytest
import torch
from torch import nn

from dance_seg.cost import ledger as ledger_module
from dance_seg.cost.ledger import KINDS, Ledger, MacsPerSize, merge_ranks


def spent() -> Ledger:
    """Two steps of an epoch that offers six images and drops one."""
    ledger = Ledger()
    ledger.add_offered(6)
    ledger.add_dropped(1)
    ledger.add_step(images=2, pixels=200, macs_forward=10**9, macs_backward=2 * 10**9, seconds=1.0, decodes=2)
    ledger.add_step(images=3, pixels=75, macs_forward=10**9, macs_backward=2 * 10**9, seconds=0.5, decodes=0)
    return ledger


def test_steps_are_added_up():
    summary = spent().summary()
    assert summary["cost/steps"] == 2
    assert summary["cost/images_offered"] == 6
    assert summary["cost/images_paid"] == 5
    assert summary["cost/images_dropped"] == 1
    assert summary["cost/pixels"] == 275
    assert summary["cost/decode_calls"] == 2
    assert summary["cost/train_gmacs"] == 6
    assert summary["cost/forward_gmacs"] == 2
    assert summary["cost/backward_gmacs"] == 4
    assert summary["cost/train_seconds"] == 1.5
    assert "cost/train_joules" not in summary


@pytest.mark.parametrize("kind", KINDS)
def test_overheads_are_part_of_trainings_cost_and_validation_is_not(kind):
    ledger = spent()
    ledger.add(kind, seconds=2.0, macs=10**9, decodes=4)
    ledger.add(kind, seconds=0.25)
    part = 0 if kind == "validation" else 1
    assert ledger.training_seconds == 1.5 + 2.25 * part
    assert ledger.training_macs == (6 + part) * 10**9
    assert ledger.decode_calls == 2 + 4 * part
    assert ledger.summary()[f"cost/{kind}_seconds"] == 2.25
    assert ledger.summary()[f"cost/{kind}_gmacs"] == 1


def test_an_unknown_kind_of_overhead_is_an_error_that_lists_the_kinds():
    with pytest.raises(ValueError, match=r"'teaching' is no kind.*teacher"):
        Ledger().add("teaching", seconds=1.0)


def test_a_record_survives_json_and_goes_on_where_it_was():
    ledger = spent()
    ledger.add("scoring", seconds=0.5)
    ledger.add_energy(3.5, "nvml")
    record = json.loads(json.dumps(ledger.as_record()))
    resumed = Ledger.from_record(record)
    assert resumed == ledger
    resumed.add("scoring", seconds=0.5)
    assert record["overhead_seconds"]["scoring"] == 0.5  # the record is no part of the ledger
    assert resumed.training_seconds == 2.5


def test_a_record_of_another_form_is_an_error_that_names_the_difference():
    record = spent().as_record()
    with pytest.raises(ValueError, match="pixels"):
        Ledger.from_record({name: value for name, value in record.items() if name != "pixels"})
    with pytest.raises(ValueError, match="watts"):
        Ledger.from_record({**record, "watts": 3})
    with pytest.raises(ValueError, match=r"overhead_macs.*cuts"):
        Ledger.from_record({**record, "overhead_macs": {kind: 0 for kind in KINDS if kind != "cuts"}})


def test_ranks_add_their_work_and_share_the_clock():
    first, second = spent(), spent()
    second.add_step(images=1, pixels=25, macs_forward=1, macs_backward=2, seconds=0.25, decodes=1)
    first.add("scoring", seconds=3.0, macs=5)
    second.add("scoring", seconds=2.0, macs=5)
    merged = merge_ranks([first, second])
    assert (merged.images_paid, merged.pixels, merged.decode_calls) == (11, 575, 5)
    assert (merged.images_offered, merged.images_dropped) == (12, 2)
    assert merged.forward_macs + merged.backward_macs == 12 * 10**9 + 3
    assert (merged.steps, merged.step_seconds) == (3, 1.75)
    assert merged.overhead_seconds["scoring"] == 3.0
    assert merged.overhead_macs["scoring"] == 10
    assert merge_ranks([first]) == first


def test_resuming_on_rank_0_alone_counts_nothing_twice():
    saved = merge_ranks([spent(), spent()])
    again = merge_ranks([Ledger.from_record(saved.as_record()), Ledger(), Ledger()])
    assert again == saved


def test_macs_stay_exact_beyond_64_bits():
    ledger = Ledger()
    ledger.add_step(images=1, pixels=1, macs_forward=2**63, macs_backward=1, seconds=1.0, decodes=0)
    merged = merge_ranks([Ledger.from_record(json.loads(json.dumps(ledger.as_record())))] * 2)
    assert merged.training_macs == 2**64 + 2


def test_joules_are_a_total_only_if_all_of_training_was_measured():
    ledger = Ledger()
    ledger.add_energy(2.0, "rapl")
    ledger.add_energy(3.0, "rapl")
    assert (ledger.joules, ledger.energy_source) == (5.0, "rapl")
    assert ledger.summary()["cost/train_joules"] == 5.0
    ledger.add_energy(None, "none: no processor package")
    ledger.add_energy(3.0, "rapl")
    assert (ledger.joules, ledger.energy_source) == (None, "none: no processor package")
    assert "cost/train_joules" not in ledger.summary()


def test_joules_of_ranks_are_added_unless_one_could_not_measure():
    one, other, new, blind = Ledger(), Ledger(), Ledger(), Ledger()
    one.add_energy(2.0, "nvml")
    other.add_energy(3.0, "nvml")
    blind.add_energy(None, "none: no counter")
    assert (merge_ranks([one, other, new]).joules, merge_ranks([one, other]).energy_source) == (5.0, "nvml")
    assert (merge_ranks([one, blind]).joules, merge_ranks([one, blind]).energy_source) == (None, "none: no counter")
    assert merge_ranks([new, new]).energy_source == ""


def test_each_size_is_counted_once_until_the_model_is_renewed(monkeypatch):
    sizes = []
    count = ledger_module.count_training_macs
    monkeypatch.setattr(
        ledger_module, "count_training_macs", lambda model, size: sizes.append(size) or count(model, size)
    )
    macs_per_size = MacsPerSize(nn.Conv2d(3, 8, 1))
    for size in [(4, 4), (4, 8), (4, 4), torch.Size((4, 8))]:
        macs_per_size(size)
    assert sizes == [(4, 4), (4, 8)]
    assert macs_per_size((4, 8)).forward_macs == 3 * 8 * 32
    macs_per_size.renew(nn.Conv2d(3, 2, 1))
    assert macs_per_size((4, 8)).forward_macs == 3 * 2 * 32
