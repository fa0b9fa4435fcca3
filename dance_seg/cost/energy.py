"""Joules where the machine can tell; otherwise an estimate that is marked as one.

NVIDIA GPUs since Volta count the energy of the whole card (through NVML), Intel and AMD processors that of each
package (RAPL, which Linux shows under /sys/class/powercap, often to root only). Both count everything that runs there,
ours or not. What has no counter (memory of some machines, disks, the power supply's losses) is not in the figure.

Where there is no meter, `estimate_joules` says what the operations and the bytes would cost by published figures, and
`estimate_from_watts` what a stated power comes to. Neither is a measurement: an Estimate is a type of its own, is kept
under keys of its own and never stands in a column of measured joules.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")

PICOJOULES_PER_MAC = {"float32": 3.7 + 0.9, "float16": 1.1 + 0.4, "bfloat16": 1.1 + 0.4}
"""One multiplication and one addition in 45 nm at 0.9 V. M. Horowitz, "Computing's energy problem (and what we can do
about it)", ISSCC 2014, table of operations. He gives none for bfloat16; its smaller mantissa would need less than
float16's."""

PICOJOULES_PER_BYTE = 640 / 4
"""640 pJ for 32 bits read from DRAM: the same source as S. Han et al., "Learning both weights and connections for
efficient neural networks", NIPS 2015, table 1, quote it."""

MOST_WATTS = 1000.0
"""No processor package draws more: so long can a RAPL counter not go round once without our noticing."""

SHORTEST_S = 0.2
"""NVML renews its counter every 20 to 100 ms, so a difference over less time says little."""


@dataclass(frozen=True)
class Estimate:
    """Joules that nobody measured, with the model they come from."""

    joules: float
    model: str
    is_estimate: bool = True  # so that a record of it says so too


def estimate_joules(macs: int, bytes_moved: int, dtype: str = "float32") -> Estimate:
    """What the arithmetic and the memory of so many MACs and bytes would take in 45 nm, every byte from DRAM.

    Without what a processor needs to fetch and order its instructions, without leakage and idle power: far below what a
    meter shows. It serves to compare networks by their operations and by what they move. Raises ValueError for a type
    without a figure and for negative counts.

    >>> estimate = estimate_joules(10**9, 10**6)  # 1 GMAC at 4.6 pJ and 1 MB at 160 pJ a byte
    >>> round(estimate.joules, 6), estimate.is_estimate
    (0.00476, True)
    >>> estimate.model
    '45 nm, 4.6 pJ per float32 MAC (Horowitz 2014), 160 pJ per byte of DRAM (Han 2015)'
    """
    if dtype not in PICOJOULES_PER_MAC:
        raise ValueError(f"dtype is {dtype!r}; there are figures for {', '.join(PICOJOULES_PER_MAC)}")
    if macs < 0 or bytes_moved < 0:
        raise ValueError(f"macs is {macs} and bytes_moved is {bytes_moved}; neither is negative")
    per_mac = PICOJOULES_PER_MAC[dtype]
    model = (
        f"45 nm, {per_mac:g} pJ per {dtype} MAC (Horowitz 2014), {PICOJOULES_PER_BYTE:g} pJ per byte of DRAM (Han 2015)"
    )
    return Estimate((per_mac * macs + PICOJOULES_PER_BYTE * bytes_moved) / 1e12, model)


def estimate_from_watts(seconds: float, watts: float) -> Estimate:
    """What a device of a stated power takes in so many seconds. Raises ValueError unless both are numbers above 0.

    >>> estimate_from_watts(2.0, 65)
    Estimate(joules=130.0, model='65 W as stated, for 2 s', is_estimate=True)
    """
    if not (0 < watts < float("inf") and 0 < seconds < float("inf")):
        raise ValueError(f"{watts} W for {seconds} s: both are numbers above 0")
    return Estimate(watts * seconds, f"{watts:g} W as stated, for {seconds:.3g} s")


@dataclass
class EnergyCounter:
    """One hardware counter: how to read it in joules, and after how many joules it begins again at 0."""

    read: Callable[[], float]
    wraps_at: float | None = None
    last: float = 0.0
    joules: float = 0.0
    sampled_at: float = 0.0

    def start(self, now: float) -> None:
        """Begin to count from here."""
        self.last, self.joules, self.sampled_at = self.read(), 0.0, now

    def sample(self, now: float) -> None:
        """Add what was used since the last sample. Raises OSError when the counter may have gone round meanwhile."""
        value = self.read()
        if self.wraps_at is not None and (now - self.sampled_at) * MOST_WATTS > self.wraps_at:
            raise OSError(
                f"the counter was not read for {now - self.sampled_at:.0f} s and may have begun again meanwhile; "
                "call sample() more often"
            )
        used = value - self.last
        if used < 0 and self.wraps_at is not None:
            used += self.wraps_at
        self.joules += used
        self.last, self.sampled_at = value, now


class EnergyMeter:
    """The joules used between entering and leaving, or None with the reason in `source`.

    `source` is "nvml" (the GPUs given by torch's numbers), "rapl" (all processor packages), "nvml + rapl", or "none: "
    and the reason. Beside GPUs the `processors` can be left out, where another process of the machine counts them.
    Call sample() now and then in long measurements, once a minute at least: RAPL counters begin again after a while.
    A figure over less than 0.2 s, or counters that stand still, give None, not 0.

    >>> with EnergyMeter() as meter:
    ...     pass
    >>> meter.joules is None and meter.source.startswith("none: ")
    True
    """

    def __init__(self, gpus: tuple[int, ...] = (), *, processors: bool = True) -> None:
        self.joules: float | None = None
        self.source = "none: nothing was measured yet"
        self._gpus, self._processors = gpus, processors

    def __enter__(self) -> "EnergyMeter":
        self._counters: dict[str, list[EnergyCounter]] = {}
        self._broken = ""
        try:
            if self._gpus:  # without the GPUs' share the figure would say little, so it is not given
                self._counters["nvml"] = nvml_counters(self._gpus)
            if self._processors or not self._gpus:
                with suppress(OSError) if self._gpus else nullcontext():
                    self._counters["rapl"] = rapl_counters()
        except OSError as error:
            self._broken = str(error)
        self._started = time.monotonic()
        self._each(lambda counter, now: counter.start(now))
        return self

    def sample(self) -> None:
        """Read the counters, before they begin again."""
        self._each(lambda counter, now: counter.sample(now))

    def __exit__(self, *error: object) -> None:
        self.sample()
        seconds = time.monotonic() - self._started
        joules = {name: sum(c.joules for c in found) for name, found in self._counters.items()}
        still = [name for name, used in joules.items() if used <= 0]
        if self._broken:
            self.joules, self.source = None, f"none: {self._broken}"
        elif seconds < SHORTEST_S:
            self.joules, self.source = None, f"none: {seconds:.3f} s is too short, measure {SHORTEST_S} s or more"
        elif still:
            self.joules, self.source = None, f"none: the counter of {' and '.join(still)} stood still"
        else:
            self.joules, self.source = sum(joules.values()), " + ".join(joules)

    def _each(self, act: Callable[[EnergyCounter, float], None]) -> None:
        """Read every counter; one that fails spoils the whole figure, and the reason is kept."""
        if self._broken:
            return
        try:
            for found in self._counters.values():
                for counter in found:
                    act(counter, time.monotonic())
        except OSError as error:
            self._broken = str(error)


def rapl_counters() -> list[EnergyCounter]:
    """One counter per processor package. Raises OSError when there is none or it may not be read."""
    # intel-rapl:0 is a package (on AMD too), intel-rapl:0:0 a part of it, which would be counted twice.
    packages = sorted(path for path in POWERCAP.glob("intel-rapl:*") if path.name.count(":") == 1)
    packages = [path for path in packages if (path / "name").read_text().startswith("package")]
    if not packages:
        raise OSError(f"no processor package under {POWERCAP}")
    counters = []
    for package in packages:
        file = package / "energy_uj"
        try:
            file.read_text()
        except PermissionError:
            raise OSError(f"{file} may not be read; an administrator can allow it") from None
        wraps_at = int((package / "max_energy_range_uj").read_text()) / 1e6
        counters.append(EnergyCounter(partial(rapl_joules, file), wraps_at))
    return counters


def rapl_joules(file: Path) -> float:
    """The state of a package's counter, in joules (RAPL says microjoules)."""
    return int(file.read_text()) / 1e6


def nvml_counters(gpus: tuple[int, ...]) -> list[EnergyCounter]:
    """One counter per GPU, by torch's numbers. Raises OSError when NVML or the GPU's counter is not there."""
    if not gpus:
        return []
    try:
        import pynvml
    except ImportError:
        raise OSError("the package nvidia-ml-py is not installed; pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid(gpu)) for gpu in gpus]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise OSError(str(error)) from None
    return [EnergyCounter(partial(nvml_joules, pynvml, handle)) for handle in handles]


def nvml_joules(pynvml: Any, handle: Any) -> float:
    """What the card has used since the driver was loaded, in joules (NVML says millijoules)."""
    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError as error:
        raise OSError(str(error)) from None


def gpu_uuid(gpu: int) -> str:
    """The identity of torch's GPU number so and so: NVML numbers all cards, torch only those it may see."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"
