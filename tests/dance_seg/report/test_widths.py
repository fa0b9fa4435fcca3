"""What network slimming kept, in the pages of a run and of several."""

import json

import pytest

from dance_seg.errors import DataError
from dance_seg.report.page import render
from dance_seg.report.run_page import report
from dance_seg.report.runs import read_run
from dance_seg.report.widths import compared
from tests.run_folders import write_run

WIDTHS = {
    "layers": {"network.encoder.conv1": [64, 48], "network.encoder.layer1.0.conv1": [64, 16], "head": [11, 11]},
    "branches": {"network.decoder.aspp.0.convs.1": [256, 0], "network.decoder.aspp.0.convs.2": [256, 64]},
    "cuts": [{"epoch": 2, "macs": 0.56, "channels": 0.7, "gmacs": 1.0, "parameters": 1_500_000}],
}


def slimmed_run(folder, widths=WIDTHS):
    write_run(folder)
    (folder / "widths.json").write_text(json.dumps(widths))
    return read_run(folder)


def test_a_run_shows_its_cuts_and_the_branches_that_went(tmp_path):
    page = render(report(slimmed_run(tmp_path / "run")))
    for said in ("epoch 2", "56 %", "70 %", "1.50 M", "gone, of 256", "64 of 256"):
        assert said in page
    assert "network.encoder.layer1.0.conv1: 16 of 64 channels" in page


def test_the_parts_of_a_network_are_summed(tmp_path):
    widths = slimmed_run(tmp_path / "run").widths
    assert widths.parts() == {"encoder.conv1": (64, 48), "encoder.layer1": (64, 16), "head": (11, 11)}


def test_several_runs_stand_side_by_side_and_those_that_cut_nothing_are_left_out(tmp_path):
    one = slimmed_run(tmp_path / "network_slimming")
    wider = json.loads(json.dumps(WIDTHS))
    wider["branches"]["network.decoder.aspp.0.convs.1"] = [256, 8]
    two = slimmed_run(tmp_path / "dance", wider)
    write_run(tmp_path / "dense")
    section = compared([read_run(tmp_path / "dense"), one, two])
    table = section.blocks[-1]
    assert table.head[1:] == ("network_slimming", "dance")
    (row,) = (row for row in table.rows if row[0].text.endswith("convs.1"))
    assert [cell.text for cell in row[1:]] == ["gone, of 256", "8 of 256"]
    assert "No run slimmed" in compared([read_run(tmp_path / "dense")]).note


@pytest.mark.parametrize(
    "damage", [{"layers": {}}, {"layers": {"a": [0, 0]}}, {"layers": {"a": [8, 9]}}, {"cuts": [{}]}, {"branches": 3}]
)
def test_damaged_widths_are_one_clear_error(tmp_path, damage):
    with pytest.raises(DataError, match=r"widths\.json: no widths of a network"):
        slimmed_run(tmp_path / "run", {**WIDTHS, **damage})
