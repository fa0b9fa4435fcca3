"""Whatever cost.json holds is shown, under its name, and an estimate never without that word."""

import json

from dance_seg.report.costs import batches_table, inference_table, operation_bars, other_tables
from dance_seg.report.runs import Run, read_run
from tests.run_folders import write_run


def run_with(tmp_path, inference: dict, **sections) -> Run:
    folder = write_run(tmp_path / "run", pictures=False, inference=inference)
    record = json.loads((folder / "cost.json").read_text())
    (folder / "cost.json").write_text(json.dumps(record | sections))
    return read_run(folder)


def rows_of(table) -> dict[str, str]:
    return {row[0].text: row[1].text for row in table.rows}


def test_a_figure_that_nobody_knew_of_is_shown_under_its_own_name(tmp_path):
    rows = rows_of(inference_table(run_with(tmp_path, {"some_new_figure": 1.25, "deep": {"er": [1, 2]}, "none": None})))
    assert rows["some new figure"] == "1.250"
    assert rows["deep.er"] == "1, 2"
    assert "none" not in rows


def test_an_estimate_is_called_one(tmp_path):
    guess = {"joules_per_image": 2.5, "model": "65 W for 38 ms", "is_estimate": True}
    rows = rows_of(inference_table(run_with(tmp_path, {"joules_per_image": None, "estimated_energy": guess})))
    assert rows["joules per image, an ESTIMATE"] == "2.50, by 65 W for 38 ms"
    assert "joules per image" not in rows


def test_every_size_and_batch_that_was_measured_is_a_row(tmp_path):
    one = {"batch": 1, "p50_ms": 10.0, "p90_ms": 12.0, "images_per_second": 99.0, "joules_per_image": None}
    eight = {**one, "batch": 8, "p50_ms": 70.0, "peak_memory": {"total_bytes": 3_000_000}}
    other = {"input_size": [512, 1024], "batches": [one]}
    (table,) = batches_table(run_with(tmp_path, {"batches": [one, eight], "other_sizes": [other]}))
    assert [row[0].text for row in table.rows] == [
        "192 × 256, batch 1",
        "192 × 256, batch 8",
        "512 × 1024, batch 1",
    ]
    assert [cell.text for cell in table.rows[1]][1:] == ["70.0", "12.0", "99.0", "3.00 MB"]
    assert "J per image" not in table.head  # nobody measured joules
    assert batches_table(run_with(tmp_path / "none", {})) == ()


def test_the_macs_of_a_pass_are_shown_by_operation(tmp_path):
    (bars,) = operation_bars(run_with(tmp_path, {"gmacs_by_operation": {"interpolate": 1.0, "convolution": 3.0}}))
    assert [(bar.name, bar.text) for bar in bars.bars] == [
        ("convolution", "3.00 GMACs · 75.0 %"),
        ("interpolate", "1.00 GMACs · 25.0 %"),
    ]


def test_other_sections_are_tables_and_the_roofline_is_left_to_its_own(tmp_path):
    run = run_with(tmp_path, {}, training_estimated_energy={"joules": 5.0, "is_estimate": True}, roofline={"a": 1})
    (table,) = other_tables(run)
    assert table.title == "Training estimated energy"
    assert rows_of(table) == {"joules": "5", "is estimate": "yes"}
