"""What a page says of the exits of a network."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from dance_seg.report.exits import exits
from dance_seg.report.page import Bars, Chart, Panels, Table
from dance_seg.report.runs import read_run
from tests.run_folders import make_recipe

POINTS = [
    {"average_cost": 1e9, "miou": 40.0, "random_cost": 1e9, "random_miou": 40.0},
    {"average_cost": 2e9, "miou": 50.0, "random_cost": 2e9, "random_miou": 45.0},
]


def section_of(folder, epochs_now=3, **changes):
    record = {
        "policy": {"thresholds": [0.75, None]},
        "achieved": {
            "images": 8, "miou": 48.0, "miou_random": 44.0, "miou_of_exits": [40.0, 45.0, 50.0],
            "exits": [0.5, 0.0, 0.5], "macs": 1.5e9,
        },
        "costs": {"macs": {"trunk": [1e9, 2e9, 3e9], "heads": [0.0, 0.0, 0.0]}},
        "curves": {"macs": POINTS},
        "budget": 0.5, "unit": "macs", "split": "val", "epochs": 3, **changes,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(make_recipe("adaptive")))
    (folder / "metrics.jsonl").write_text("".join(f'{{"epoch": {e}, "step": {e}}}\n' for e in range(epochs_now)))
    (folder / "calibration.json").write_text(json.dumps(record))
    (folder / "pictures").mkdir(exist_ok=True)
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(folder / "pictures" / "exit_3_1_scene.png")
    return exits(read_run(folder))


def blocks(section, kind):
    return [block for block in section.blocks if isinstance(block, kind)]


def test_each_exit_has_its_row_its_bar_and_its_pictures(tmp_path):
    section = section_of(tmp_path)
    assert "mIoU 48.00 at 1.50 GMACs on average" in section.note
    (table,) = blocks(section, Table)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["exit 1", "0.7500", "40.00", "1.00"],
        ["exit 2", "never asked", "45.00", "2.00"],
        ["exit 3", "–", "50.00", "3.00"],
    ]
    (bars,) = blocks(section, Bars)
    assert [(bar.name, bar.text) for bar in bars.bars] == [("exit 1", "50 %"), ("exit 2", "0 %"), ("exit 3", "50 %")]
    (panels,) = blocks(section, Panels)
    assert panels.title == "Left at exit 3"


def test_static_networks_stand_in_the_curve(tmp_path):
    (chart,) = blocks(section_of(tmp_path), Chart)
    assert [key.name for key in chart.keys] == ["by thresholds", "by chance"]
    (chart,) = blocks(section_of(tmp_path, beside=[{"name": "twin_67", "miou": 47.0, "macs": 1.4e9}]), Chart)
    assert "twin_67" in chart.svg
    assert [key.name for key in chart.keys] == ["by thresholds", "by chance", "networks that never stop"]


@pytest.mark.parametrize(("epochs_now", "said"), [(3, False), (4, True)])
def test_it_says_when_the_network_was_trained_on_since(tmp_path, epochs_now, said):
    assert ("trained on since: calibrate again" in section_of(tmp_path, epochs_now).note) == said
