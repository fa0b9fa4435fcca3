"""Loss beside complexity: the right images are paired, and what is said of them is what they show."""

import json

import numpy as np
import pytest

from dance_seg.errors import DataError
from dance_seg.report.page import Bars, Chart
from dance_seg.report.runs import read_run
from dance_seg.report.slimmed_data import image_losses, rank_correlation
from tests.run_folders import write_run


def with_losses(folder, losses: dict[str, float], **changes):
    write_run(folder, pictures=False, **changes)
    record = {"epoch": 11, "names": list(losses), "losses": list(losses.values())}
    (folder / "image_losses.json").write_text(json.dumps(record))
    return read_run(folder)


def losses_of(slope: float, count: int = 120) -> dict[str, float]:
    """Losses of the images of a made-up run, whose complexity rises with their number."""
    return {f"scene_{i:04d}": 1.0 + slope * i / count for i in reversed(range(count))}


@pytest.mark.parametrize(
    ("slope", "said"),
    [
        (0.5, "Rank correlation +1.00: complex images have clearly higher losses."),
        (-0.5, "Rank correlation −1.00: complex images have clearly lower losses."),
        (0.0, ""),  # no variation: nothing to say
    ],
)
def test_losses_are_paired_with_complexity_by_the_name_of_the_image(tmp_path, slope, said):
    section = image_losses(with_losses(tmp_path / "run", losses_of(slope), slimming=True))
    (chart,) = [block for block in section.blocks if isinstance(block, Chart)]
    assert chart.note == said
    assert section.note.startswith("The mean unweighted loss of 120 images over epoch 12")


def test_the_hardest_and_the_easiest_images_are_named(tmp_path):
    section = image_losses(with_losses(tmp_path / "run", losses_of(0.5), slimming=True))
    hardest, easiest = (block for block in section.blocks if isinstance(block, Bars))
    assert [bar.name for bar in hardest.bars] == [f"scene_{i:04d}" for i in range(119, 113, -1)]
    assert [bar.name for bar in easiest.bars] == [f"scene_{i:04d}" for i in range(6)]
    assert hardest.bars[0].share == 1.0


def test_a_run_without_scored_images_still_names_the_hardest(tmp_path):
    section = image_losses(with_losses(tmp_path / "run", {"a": 2.0, "b": 1.0}))
    assert [type(block) for block in section.blocks] == [Bars, Bars]


def test_images_that_are_not_in_the_plan_are_not_drawn(tmp_path):
    section = image_losses(with_losses(tmp_path / "run", {"scene_0000": 1.0, "other": 9.0}, slimming=True))
    (chart,) = [block for block in section.blocks if isinstance(block, Chart)]
    assert chart.svg.count("<circle") == 1


def test_without_losses_a_line_says_so(tmp_path):
    section = image_losses(read_run(write_run(tmp_path / "run", pictures=False)))
    assert (section.blocks, section.note) == ((), "Not known yet: it is kept at the end of each epoch.")


@pytest.mark.parametrize("record", [{"epoch": 1}, {"epoch": 1, "names": ["a"], "losses": []}, {"epoch": "x"}])
def test_a_damaged_file_of_losses_is_named(tmp_path, record):
    folder = write_run(tmp_path / "run", pictures=False)
    (folder / "image_losses.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"image_losses\.json: no losses of images"):
        read_run(folder)


def test_rank_correlation_is_spearmans_with_ties():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for _ in range(20):
        x, y = random.integers(0, 6, 30), random.integers(0, 6, 30)
        assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert rank_correlation([1, 2], [1, 2]) is None
