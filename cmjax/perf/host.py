"""This very machine: what its operators take, and what a compiled step of virtual devices therefore takes.

`HostCosts` holds measurements of operators alone (`cmjax.bench.calibrate`). A step is priced by what its compiled
program runs (`cmjax.perf.host_work`): amounts times costs, summed. Devices share the cores: what one of them computes
is paid as often as there are devices.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.perf.host_kernels import Amounts, HostData
from cmjax.perf.host_work import Run, runs
from cmjax.text import JsonObject

# What is read in turn when a rate is measured; the last is so much that no cache has it.
READ_MIB = (8, 24, 128)


def read_rate(mib: int) -> str:
    """The name of the rate at which all devices together read so much in turn."""
    return "memory_bytes_per_s" if mib == READ_MIB[-1] else f"read_{mib}_mib_bytes_per_s"


@dataclasses.dataclass
class HostCosts:
    """Measured costs, in seconds of one device on its core.

    Attributes:
        cores: that all devices share.
        machine: what it was measured on.
        values: name -> number of devices -> seconds of one; and rates of the whole machine, see `read_rate`.
        help: `(seconds alone, seconds)` of kernels that the threads of other cores help with, where one device has
            the machine; ascending.
    """

    cores: int
    machine: Mapping[str, Any]
    values: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    help: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def put(self, name: str, devices: int, value: float) -> None:
        """Keep a measurement."""
        self.values.setdefault(name, {})[devices] = value

    def at(self, name: str, devices: int) -> float:
        """A cost among so many devices: between two that were measured by the logarithm, held beyond them."""
        points = sorted(self.values[name].items())
        return float(np.interp(np.log2(devices), np.log2([at for at, _ in points]), [value for _, value in points]))

    def turns(self, devices: int) -> float:
        """How often a core does what each device does once."""
        return devices / min(devices, self.cores)

    def of(self, amounts: Amounts, devices: int) -> float:
        """Seconds of a device on its core; an amount without a cost is one that nothing was measured of."""
        return sum(amount * self.at(name, devices) for name, amount in amounts.items() if amount)

    def rate(self, num_bytes: float, devices: int) -> float:
        """Bytes a second of the machine where `num_bytes` are read in turn, held below and beyond what was measured."""
        rates = [self.at(read_rate(mib), devices) for mib in READ_MIB]
        return float(np.interp(np.log2(max(num_bytes, 1.0)), np.log2(READ_MIB) + 20, rates))

    def helped(self, seconds: float) -> float:
        """What a kernel takes of one device that has the machine, which takes `seconds` on one core."""
        alone = [one for one, _ in self.help]
        if not alone or seconds <= alone[0]:
            return seconds
        ratios = [np.log(with_help / one) for one, with_help in self.help]
        return seconds * max(float(np.exp(np.interp(np.log(seconds), np.log(alone), ratios))), 1 / self.cores)

    def to_json(self) -> JsonObject:
        """What a file keeps."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "HostCosts":
        """See `to_json`; JSON's keys are text."""
        values = {name: {int(at): value for at, value in points.items()} for name, points in kept["values"].items()}
        return cls(kept["cores"], kept["machine"], values, [(alone, helped) for alone, helped in kept["help"]])

    def save(self, path: Path) -> None:
        """Write it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")


def price_program(text: str, costs: HostCosts, devices: int, data: HostData, steps: int = 1) -> dict[str, float]:
    """Seconds of a call by stage, of `devices` that run a compiled program together; "launch" is of the call.

    Args:
        steps: of a call, which each read the weights.
    """
    found = {"launch": costs.at("launch_s", devices)}
    several = list(runs(text, data))
    rate = costs.rate(devices * sum(run.times * run.weight_bytes for run in several) / steps, devices)
    for run in several:
        found[run.stage] = found.get(run.stage, 0.0) + run.times * price_run(run, costs, devices, rate)
    return found


def price_run(run: Run, costs: HostCosts, devices: int, rate: float) -> float:
    """Seconds of an operator of all devices together, which read weights at `rate`."""
    each = costs.of(run.amounts, devices)
    if run.kind != "exchange":
        each += costs.at("among_others_s", devices)
    if run.kind in ("xla", "exchange"):
        return costs.turns(devices) * each
    if 2 * devices <= costs.cores:  # fewer than that, and a device's kernels use the cores that nobody else does
        each = costs.helped(each)
    return max(costs.turns(devices) * each, devices * run.weight_bytes / rate)


def fit(measured: Sequence[tuple[Amounts, float]], names: Sequence[str]) -> dict[str, float]:
    """Costs, none below zero, that come closest to measured `(amounts, seconds)` in relative terms."""
    x = np.array([[amounts.get(name, 0.0) / seconds for name in names] for amounts, seconds in measured])
    scale = np.where(x.any(0), np.abs(x).max(0), 1.0)
    x = x / scale
    gram, wanted, found = x.T @ x, x.T @ np.ones(len(x)), np.zeros(len(names))
    # One cost at a time, each to its best beside the others: the error is convex, so that this ends at its least.
    for _ in range(4000):
        before = found.copy()
        for i in range(len(names)):
            if gram[i, i] > 0:
                found[i] = max(0.0, found[i] + (wanted[i] - gram[i] @ found) / gram[i, i])
        if np.all(np.abs(found - before) <= 1e-7 * found):
            break
    return dict(zip(names, (found / scale).tolist(), strict=True))
