"""What a page says of a search."""

import json

import pytest
import yaml

from dance_seg.errors import DataError
from dance_seg.report.page import Table
from dance_seg.report.runs import read_run
from dance_seg.report.search import search
from tests.run_folders import make_recipe


def one(score, cost=2e9, **details):
    choices = {"resolution": 1.0, "stage1.stride8.depth": 2, "stage1.stride8.kernel": 3}
    return {"generation": 0, "number": 0, "subnet": choices, "cost": cost, "score": score, "details": details}


def found(**more):
    best = one(60.0, average_cost=1.5e9)
    about = {"performance": "dynamic", "images": 40, "split": "val", "method": "evolution"}
    return {"about": about, "unit": "MACs", "best": best, "history": [one(58.0), best], **more}


def section_of(folder, record):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(make_recipe("found")))
    (folder / "search.json").write_text(json.dumps(record))
    return search(read_run(folder))


def test_it_says_what_was_judged_and_what_the_best_costs_on_average(tmp_path):
    control = {"best": one(59.0), "history": [one(57.0), one(59.0)]}
    section = section_of(tmp_path, found(control=control, beside=[{"name": "dense", "score": 61.0, "cost": 4e9}]))
    assert "2 networks judged on 40 images of val; the best: mIoU 60.00 at 1.50 GMACs an image" in section.note
    assert "Random search, as many networks: 59.00" in section.note
    charts = [block for block in section.blocks if not isinstance(block, Table)]
    assert "dense" in charts[0].svg
    assert [key.name for key in charts[1].keys] == ["evolution", "random"]


def test_the_choices_stand_in_a_row_for_each_place(tmp_path):
    (table,) = (block for block in section_of(tmp_path, found()).blocks if isinstance(block, Table))
    assert table.head == ("", "resolution", "depth", "kernel")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["network", "1", "", ""],
        ["stage1, stride8", "", "2", "3"],
    ]


def test_a_front_has_no_best_network(tmp_path):
    record = {key: value for key, value in found(front=[one(50.0, 1e9), one(60.0)]).items() if key != "best"}
    section = section_of(tmp_path, record)
    assert len(section.blocks) == 1
    assert "the best" not in section.note


@pytest.mark.parametrize("damage", [{"unit": "joules"}, {"history": 5}, {"best": {}}, {"about": None}])
def test_a_damaged_file_is_named(tmp_path, damage):
    with pytest.raises(DataError, match=r"search\.json: is not what a search came to"):
        section_of(tmp_path, found() | damage)
