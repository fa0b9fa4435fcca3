"""The roofline and the batches of measure_cost in a page."""

import json
import re

import pytest

from dance_seg.cost.roofline import Peak, Usage, roofline
from dance_seg.report.page import Page, render
from dance_seg.report.roofline import NOT_MEASURED, roofline_chart, roofline_section
from dance_seg.report.roofline import roofline as roofline_of_run
from dance_seg.report.runs import read_run
from tests.run_folders import write_run

PEAK = Peak(gmacs_per_second=100, gigabytes_per_second=10, device="cpu", dtype="float32", threads=2)
OPERATIONS = (
    Usage("convolution", macs=4 * 10**9, bytes=10**8, seconds=0.05),  # 80 GMAC/s of 100
    Usage("everything else", macs=0, bytes=10**8, seconds=0.02),  # 5 of 10 GB/s
)


def record(**changes):
    training = Usage("training", macs=6 * 10**9, bytes=10**9, seconds=0.2)  # 30 of 60 GMAC/s
    found = roofline(OPERATIONS, PEAK, batch=1, input_size=(352, 480), training=training, notes=("<a note>",))
    return {**json.loads(json.dumps(found.as_record())), **changes}


def with_costs(folder, **parts):
    write_run(folder)
    costs = json.loads((folder / "cost.json").read_text())
    (folder / "cost.json").write_text(json.dumps({**costs, **parts}))
    return read_run(folder)


def test_the_page_shows_peaks_shares_and_notes(tmp_path):
    page = render(Page("t", sections=(roofline_of_run(with_costs(tmp_path / "run", roofline=record())),)))
    for said in ("352x480", "100 GMAC/s", "10.0 GB/s", "10.0 MACs per byte", "80 %", "50 %", "&lt;a note&gt;", "<svg"):
        assert said in page, said
    assert "71 %" in page  # of the time of all operations: 50 of 70 ms
    assert "<a note>" not in page


def test_a_run_without_a_roofline_says_how_to_get_one(tmp_path):
    write_run(tmp_path / "run")
    assert roofline_of_run(read_run(tmp_path / "run")).note == NOT_MEASURED


@pytest.mark.parametrize(
    "broken",
    [
        {"peak": None},
        {"peak": {"gmacs_per_second": 0, "gigabytes_per_second": 1}},
        {"total": []},
        {"operations": "many"},
        {"operations": [3, {"name": None, "seconds": "long"}]},
        {"input_size": 3, "notes": "text", "training": 7},
    ],
    ids=str,
)
def test_a_damaged_record_does_not_break_the_page(broken):
    render(Page("t", sections=(roofline_section(record(**broken)),)))


def test_the_roof_rises_to_the_ridge_and_points_lie_below_it():
    """100 GMAC/s and 10 GB/s meet at 10; from there to a power of ten beyond everything the roof is level."""
    usages = record()["operations"] + [record()["total"]]
    section = roofline_section(record())
    svg = str(section.blocks[0].svg)
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert y0 > y1 == y2  # drawing coordinates grow downwards
    circles = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(circles) == sum(usage["gmacs"] > 0 for usage in usages) + 1  # and the training
    for x, y in circles:
        roof = y1 if x >= x1 else y0 + (x - x0) / (x1 - x0) * (y1 - y0)
        assert y > roof
    assert 'text-anchor="end">100</text>' in svg


def test_a_training_in_another_type_stands_in_the_table_and_not_below_this_roof():
    section = roofline_section(record(training_peak={"dtype": "bfloat16"}))
    assert [key.name for key in section.blocks[0].keys] == ["convolution", "whole network"]
    assert section.blocks[1].rows[-1][0].text == "training"


def test_a_chart_of_points_far_away_still_holds_all_of_them():
    from dance_seg.report.charts import HEIGHT, WIDTH, Mark

    svg = str(roofline_chart(1e5, 3e3, [Mark(1e-3, 1e-2, "slow"), Mark(1e6, 9e4, "fast")], title="t"))
    for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg):
        assert 0 <= float(x) <= WIDTH
        assert 0 <= float(y) <= HEIGHT
