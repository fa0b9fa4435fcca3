"""Energy counters that are files and objects made here, so that every machine can run these tests."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dance_seg.cost import energy
from dance_seg.cost.energy import EnergyMeter, estimate_from_watts, estimate_joules


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(energy, "time", clock)
    return clock


@pytest.fixture
def powercap(tmp_path, monkeypatch) -> Path:
    """Two packages, a part of the first and the whole system, each at 100 J; they begin again after 300 J."""
    for zone, name in (("0", "package-0"), ("0:0", "core"), ("1", "package-1"), ("2", "psys")):
        folder = tmp_path / f"intel-rapl:{zone}"
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("300000000\n")
        (folder / "energy_uj").write_text("100000000\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return tmp_path


def set_joules(powercap: Path, zone: str, joules: float) -> None:
    (powercap / f"intel-rapl:{zone}" / "energy_uj").write_text(f"{round(joules * 1e6)}\n")


def test_packages_are_added_and_their_parts_are_not_counted_twice(powercap, clock):
    with EnergyMeter() as meter:
        clock.now += 0.25
        for zone in ("0", "0:0", "2"):
            set_joules(powercap, zone, 110)
        set_joules(powercap, "1", 105)
    assert (meter.joules, meter.source) == (pytest.approx(15), "rapl")


def test_a_counter_that_begins_again_is_followed(powercap, clock):
    """100 -> 290 -> 40 of 300: 190 and 50, then 40 -> 10: 270."""
    with EnergyMeter() as meter:
        for joules in (290, 40, 10):
            set_joules(powercap, "0", joules)
            clock.now += 0.25
            meter.sample()
    assert meter.joules == pytest.approx(190 + 50 + 270)


def test_a_counter_not_read_for_so_long_that_it_may_have_gone_round_gives_no_figure(powercap, clock):
    """300 J at 1000 W last 0.3 s."""
    with EnergyMeter() as meter:
        set_joules(powercap, "0", 120)
        clock.now += 0.31
    assert meter.joules is None
    assert "sample()" in meter.source


def test_a_counter_that_stands_still_gives_no_figure_rather_than_0(powercap, clock):
    with EnergyMeter() as meter:
        clock.now += 0.25
    assert (meter.joules, meter.source) == (None, "none: the counter of rapl stood still")


def test_too_short_a_time_gives_no_figure(powercap, clock):
    with EnergyMeter() as meter:
        set_joules(powercap, "0", 110)
        clock.now += 0.1
    assert meter.joules is None
    assert "too short" in meter.source


def test_without_a_counter_it_says_so(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nothing")
    with EnergyMeter() as meter:
        clock.now += 1
        meter.sample()
    assert meter.joules is None
    assert meter.source.startswith("none: no processor package under")


def test_a_counter_that_may_not_be_read_is_said_to_be_so(powercap, monkeypatch, clock):
    read_text = Path.read_text

    def refuse(path: Path) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    with EnergyMeter() as meter:
        clock.now += 1
    assert meter.joules is None
    assert "may not be read" in meter.source


class FakeNvml(SimpleNamespace):
    """The four names of pynvml that are used; card "GPU-b" has no counter."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__(millijoules={"GPU-a": 5000, "GPU-c": 7000})

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if handle not in self.millijoules:
            raise self.NVMLError("Not Supported")
        return self.millijoules[handle]


@pytest.fixture
def nvml(monkeypatch, tmp_path) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(energy, "gpu_uuid", lambda gpu: f"GPU-{'abc'[gpu]}")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nothing")
    return fake


def test_the_given_gpus_are_read_in_millijoules(nvml, clock):
    with EnergyMeter(gpus=(0, 2)) as meter:
        nvml.millijoules.update({"GPU-a": 5500, "GPU-c": 9000})
        clock.now += 1000
    assert (meter.joules, meter.source) == (pytest.approx(2.5), "nvml")


def test_gpus_and_packages_are_added(nvml, powercap, clock):
    with EnergyMeter(gpus=(0,)) as meter:
        nvml.millijoules["GPU-a"] += 1000
        set_joules(powercap, "0", 102)
        clock.now += 0.25
    assert (meter.joules, meter.source) == (pytest.approx(3), "nvml + rapl")


def test_without_the_gpus_counter_there_is_no_figure_even_where_the_processor_has_one(nvml, powercap, clock):
    with EnergyMeter(gpus=(0, 1)) as meter:
        set_joules(powercap, "0", 120)
        clock.now += 0.25
    assert (meter.joules, meter.source) == (None, "none: Not Supported")


def test_without_the_library_it_says_what_to_install(powercap, monkeypatch, clock):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with EnergyMeter(gpus=(0,)) as meter:
        clock.now += 1
    assert meter.joules is None
    assert "pip install nvidia-ml-py" in meter.source


def test_an_error_inside_is_passed_on(powercap, clock):
    with pytest.raises(KeyError), EnergyMeter():
        raise KeyError


def test_an_estimate_is_the_sum_of_arithmetic_and_memory_and_says_what_it_is():
    """1000 MACs at 3.7 + 0.9 pJ, or 1.1 + 0.4 pJ in half precision, and 100 bytes at 640 pJ for four."""
    found = estimate_joules(1000, 100)
    assert found.joules == pytest.approx((1000 * 4.6 + 25 * 640) * 1e-12)
    assert found.is_estimate
    for said in ("45 nm", "4.6 pJ", "float32", "Horowitz 2014", "160 pJ per byte", "Han 2015"):
        assert said in found.model
    assert estimate_joules(1000, 0, "float16").joules == pytest.approx(1000 * 1.5e-12)
    assert estimate_from_watts(0.5, 30).joules == 15
    assert "30 W as stated" in estimate_from_watts(0.5, 30).model


def test_an_estimate_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        estimate_joules(1, 1, "int8")
    with pytest.raises(ValueError, match="neither is negative"):
        estimate_joules(-1, 1)
    for watts in (0.0, -5.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            estimate_from_watts(1.0, watts)
