"""Every reader takes a changed file or refuses it in the project's own words: no other error, no wrong figure."""

import logging
from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tools.fuzz.changes import changed_file
from tools.fuzz.readers import READERS
from tools.fuzz.target import SECRET, judge

SETTINGS = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip
COSTLY = {"network", "safetensors", "onnx"}  # they build a network or start an engine


class Drawn:
    """Chance by hypothesis, which makes what fails as short as it can."""

    def __init__(self, draw):
        self.draw = draw

    def one_of(self, things):
        return things[self.draw(st.integers(0, len(things) - 1))]

    def whole(self, least, most):
        return self.draw(st.integers(least, most))


@st.composite
def changed(draw, target):
    return changed_file(Drawn(draw), target)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    @cache
    def target(reader):
        return READERS[reader](tmp_path_factory.mktemp(reader))

    return target


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("FUZZ_SECRET_KEY", SECRET)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def hold(reader, targets, examples):
    target = targets(reader)
    for seed in target.seeds:
        assert judge(target.check, seed) == ""

    @settings(SETTINGS, max_examples=examples)
    @given(changed(target))
    def holds(data):
        assert judge(target.check, data) == ""

    holds()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
def test_changed_files_are_read_or_refused(reader, targets):
    hold(reader, targets, 5 if reader in COSTLY else 30)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
def test_many_changed_files_are_read_or_refused(reader, targets):
    hold(reader, targets, 200 if reader in COSTLY else 1500)
