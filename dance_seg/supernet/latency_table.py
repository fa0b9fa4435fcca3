"""Milliseconds of a network as the sum of its parts, each measured once on this machine.

A search asks for the cost of thousands of networks, too many to measure whole. Their parts are few: a layer of one
size on features of one size is the same part in all networks. It is measured where it runs: alone in a loop it would
find its inputs in the cache and seem up to twice as fast. What runs between parts (sums, resizing, Python) is in no
part; `check` says how far sums are from whole networks, and `corrected` takes the common factor out.

Other work on the machine draws whole networks out more than parts, which fit between two of its turns: measure on an
idle one.
"""

import hashlib
import json
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dance_seg.cost.latency import device_name, evaluating, images_for, measure, measure_latency, synchronise
from dance_seg.errors import DataError, cut_off, first_line
from dance_seg.machine import processor, write_text
from dance_seg.plain_data import parse_json
from dance_seg.supernet.space import SearchSpace

PERCENTILE = 25
"""Of a part's calls. Other work on the machine only ever adds, to some of the calls."""

VERSION = 2
"""Of what tells parts apart: since 2 the number of an attention's heads does."""

Parts = Counter[str]
"""How often each part runs in one forward."""


class UnmeasuredError(ValueError):
    """A network with parts that a latency table does not know; the message names one."""


@dataclass(frozen=True)
class Conditions:
    """What milliseconds depend on beside the network."""

    input_size: tuple[int, int]  # (H, W)
    batch: int
    processor: str
    device: str
    threads: int
    torch: str
    version: int = VERSION


@dataclass(frozen=True)
class LatencyTable:
    """The milliseconds of each part of a space's networks.

    `factor` brings sums to whole networks; 1 until it is known. `errors` say how far sums are then off for others.
    """

    space: str  # its fingerprint
    conditions: Conditions
    parts: Mapping[str, float] = field(repr=False)
    factor: float = 1.0
    errors: tuple[float, ...] = ()  # relative, negative where a sum is too small

    @property
    def typical_error(self) -> float:
        """The median of the absolute relative errors; 0 where none is known.

        >>> LatencyTable("", Conditions((8, 8), 1, "any", "cpu", 1, "2"), {}, errors=(-0.3, 0.1, 0.2)).typical_error
        0.2
        """
        return median(map(abs, self.errors)) if self.errors else 0.0

    @property
    def fingerprint(self) -> str:
        """A name of the table that changes with what it holds, for what was found by its costs."""
        return hashlib.sha256(json.dumps(self.as_record()).encode()).hexdigest()[:16]

    def milliseconds(self, parts: Parts) -> float:
        """The milliseconds of a network with these parts. Raises UnmeasuredError when some were not measured.

        >>> conditions = Conditions((8, 8), 1, "any", "cpu", 1, "2")
        >>> LatencyTable("", conditions, {"small": 2.0, "large": 3.0}).milliseconds(Counter(small=2, large=1))
        7.0
        """
        missing = [part for part in parts if part not in self.parts]
        if missing:
            raise UnmeasuredError(
                f"{len(missing)} parts were not measured, such as {missing[0]}; measure a table of more networks"
            )
        return self.factor * sum(count * self.parts[part] for part, count in parts.items())

    def refuse_elsewhere(self, space: SearchSpace, conditions: Conditions) -> None:
        """Raise ValueError, saying what differs, unless the table is of this space and these conditions."""
        if self.space != space.fingerprint:
            raise ValueError(
                f"the latency table is of another search space, {cut_off(self.space)}; measure one of this space"
            )
        there, here = asdict(self.conditions), asdict(conditions)
        differs = [
            f"{name} was {cut_off(there[name])} and is {here[name]}" for name in there if there[name] != here[name]
        ]
        if differs:
            raise ValueError(
                f"the latency table was measured elsewhere: {'; '.join(differs)}; move it away, and one is measured "
                "here"
            )

    def as_record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Checked(NamedTuple):
    """A whole network beside the sum of its parts."""

    summed_ms: float
    measured_ms: float

    @property
    def relative_error(self) -> float:
        """Of the sum; negative where it is too small."""
        return self.summed_ms / self.measured_ms - 1


def conditions_here(
    model: nn.Module, input_size: tuple[int, int], *, batch: int = 1, device: torch.device | None = None
) -> Conditions:
    """The conditions of a measurement on this machine, on a device; by default where the model is."""
    device = device or next(model.parameters()).device
    size = (int(input_size[0]), int(input_size[1]))
    return Conditions(size, batch, processor(), device_name(device), torch.get_num_threads(), torch.__version__)


def parts_of(
    network: nn.Module, input_size: tuple[int, int], *, batch: int = 1, whole: tuple[type[nn.Module], ...] = ()
) -> Parts:
    """The parts that one forward on images (H, W) runs, by running it.

    A part is a call of a module without children, or of one of the types `whole`, such as attention whose products
    are no modules.

    >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ReLU())
    >>> sorted(parts_of(network, (8, 8)).values())
    [1, 2]
    """
    with watched(network, input_size, batch, whole) as (forward, times):
        forward()
        return Counter({name: len(each) for name, each in times.items()})


@contextmanager
def watched(
    network: nn.Module, input_size: tuple[int, int], batch: int, whole: tuple[type[nn.Module], ...]
) -> Iterator[tuple[Callable[[], object], dict[str, list[float]]]]:
    """A forward to call, and for each part the milliseconds of each of its calls so far."""
    taken = [module for module in network.modules() if isinstance(module, whole)]
    inside = {inner for module in taken for inner in module.modules() if inner is not module}
    wanted = [
        module
        for module in network.modules()
        if module not in inside and (isinstance(module, whole) or not any(module.children()))
    ]
    images = images_for(network, input_size, batch, 3)
    times: dict[str, list[float]] = {}
    begun: list[float] = []

    def before(module: nn.Module, args: Any) -> None:
        synchronise(images.device)
        begun.append(time.perf_counter())

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        synchronise(images.device)
        took = 1000 * (time.perf_counter() - begun.pop())
        times.setdefault(part_name(module, args, kwargs), []).append(took)

    handles = [module.register_forward_pre_hook(before) for module in wanted]
    handles += [module.register_forward_hook(after, with_kwargs=True) for module in wanted]
    try:
        with evaluating(network), torch.inference_mode():
            yield lambda: network(images), times
    finally:
        for handle in handles:
            handle.remove()


def part_name(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The same for calls that do the same work: the module as it is printed, and the shapes of weights and inputs."""
    weights = " ".join(shape(weight) for weight in module.parameters())
    inputs = " ".join(shape(given) for given in [*args, *kwargs.values()])
    return f"{' '.join(repr(module).split())} [{weights}] on {inputs}"


def shape(given: Any) -> str:
    """The shape of a tensor, 1x3x8x8; other things as they are printed, but not the numbers in lists of tensors.

    >>> shape(torch.zeros(1, 3)), shape([torch.zeros(2), True])
    ('1x3', '(2, True)')
    """
    if isinstance(given, Tensor):
        return "x".join(str(length) for length in given.shape) or "scalar"
    if isinstance(given, list | tuple):
        return f"({', '.join(shape(one) for one in given)})"
    return repr(given)


def measure_table(
    space: SearchSpace,
    networks: Iterable[nn.Module],
    input_size: tuple[int, int],
    *,
    batch: int = 1,
    whole: tuple[type[nn.Module], ...] = (),
    time_limit_s: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> LatencyTable:
    """Measure every part of the networks once, where it runs: the lower quartile of its calls in `time_limit_s`.

    The networks are those of a space and should hold all its parts: the largest, the smallest, and some drawn at
    random until no new parts come. `progress` is told the number of parts after each network. Raises ValueError
    when there are none.
    """
    parts: dict[str, float] = {}
    conditions = None
    for network in networks:
        conditions = conditions or conditions_here(network, input_size, batch=batch)
        with watched(network, input_size, batch, whole) as (forward, times):
            forward()
            if times.keys() - parts.keys():
                forward()
                times.clear()  # the first calls allocate
                measure(forward, warm_up=0, time_limit_s=time_limit_s)
                parts = {name: float(np.percentile(each, PERCENTILE)) for name, each in times.items()} | parts
        if progress is not None:
            progress(len(parts))
    if conditions is None:
        raise ValueError("a latency table needs at least one network to measure")
    return LatencyTable(space.fingerprint, conditions, parts)


def check(
    table: LatencyTable,
    networks: Iterable[nn.Module],
    *,
    whole: tuple[type[nn.Module], ...] = (),
    time_limit_s: float = 2.0,
) -> list[Checked]:
    """Measure whole networks, by the median of their runs, beside the sums of their parts."""
    size, batch = table.conditions.input_size, table.conditions.batch
    return [
        Checked(
            table.milliseconds(parts_of(network, size, batch=batch, whole=whole)),
            measure_latency(network, size, batch=batch, time_limit_s=time_limit_s).p50_ms,
        )
        for network in networks
    ]


def corrected(table: LatencyTable, checked: Sequence[Checked]) -> LatencyTable:
    """The table with the factor that half of the checked networks lie above and half below; check it on others.

    >>> table = LatencyTable("", Conditions((8, 8), 1, "any", "cpu", 1, "2"), {"part": 2.0})
    >>> corrected(table, [Checked(2.0, 3.0), Checked(4.0, 6.0)]).factor
    1.5
    """
    if not checked:
        raise ValueError("a table is corrected by at least one network that was measured whole")
    return replace(table, factor=table.factor * median(one.measured_ms / one.summed_ms for one in checked))


def save_table(table: LatencyTable, path: Path) -> Path:
    """Write the table as JSON, whole or not at all; one that is there stays.

    Processes that begin together all measure: the first to finish gives the table of all.
    """
    text = json.dumps(table.as_record(), indent=1) + "\n"
    written = write_text(path.with_name(f"{path.name}.{uuid.uuid4().hex}"), text)
    try:
        os.link(written, path)
    except OSError:
        if not path.exists():  # a file system without links
            written.replace(path)
    written.unlink(missing_ok=True)
    return path


def load_table(path: Path, space: SearchSpace, conditions: Conditions) -> LatencyTable:
    """Read a table. Raises DataError, naming the file, when it is none, or not of this space, machine and input."""
    try:
        record = parse_json(path.read_bytes())
        there = record["conditions"]
        table = LatencyTable(
            str(record["space"]),
            Conditions(**{"version": 1, **there, "input_size": tuple(there["input_size"])}),
            {str(part): float(milliseconds) for part, milliseconds in record["parts"].items()},
            float(record["factor"]),
            tuple(float(error) for error in record["errors"]),
        )
        times = (*table.parts.values(), table.factor)
        if not all(math.isfinite(one) for one in (*times, *table.errors)) or min(times) < 0:
            raise ValueError("a time in it is no number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is no latency table ({first_line(error)}); move it away, and one is measured"
        ) from None
    try:
        table.refuse_elsewhere(space, conditions)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    return table
