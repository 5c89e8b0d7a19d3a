"""The machines that steps are priced on: numbers with units, sources and marks, from one data file.

`data/hardware.toml` holds them, `data/operators.toml` the published figures of single operators: exchanges by EP
degree, and what the fit (`cmjax.perf.fit`) reads.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, Literal, get_args

import numpy as np

from cmjax.errors import UserError
from cmjax.targets import machines

Mark = Literal["measured", "published", "fitted", "assumed"]
Overlap = Literal["cores", "exchange", "none"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of a machine: its value, unit, source, and how it is known."""

    value: float
    unit: str
    source: str
    mark: Mark


@dataclasses.dataclass(frozen=True)
class ExchangeTable:
    """Dispatch and combine by EP degree, of `tokens` tokens a rank with 7,168 values and 8 choices each."""

    tokens: int
    degrees: Sequence[int]
    dispatch_s: Sequence[float]
    combine_s: Sequence[float]

    def seconds(self, what: str, degree: int) -> float:
        """Of "dispatch" or "combine" at any degree: between two of the table by the logarithm, held beyond them."""
        column = self.dispatch_s if what == "dispatch" else self.combine_s
        return float(np.interp(np.log2(degree), np.log2(self.degrees), column))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device of a machine.

    Attributes:
        name, title: of the machine.
        figures: name -> number; `hardware.memory_bytes` and the like read them.
        devices_per_package: 2 where a device is half of what is sold (a die).
        devices_per_node: of one host.
        domain: devices that the fast links reach.
        cores: that two streams can share out.
        decode_overlap, prefill_overlap: how two microbatches run: "cores", each stream with a share of the cores;
            "exchange", the exchange of one behind the work of the other; "none", in turn.
        fused: stages that are one operator to launch.
        table: of dispatch and combine, where it was published.
        bulk: degrees, and bytes/s of dispatch and of combine of thousands of tokens, where published.
        bulk_once_per_node: a token travels once to each node, and by fast links from there.
        bulk_cores: that exchanges of many tokens take from the rest.
        by_devices: of devices that share a machine: what each of so many has.
    """

    name: str
    title: str
    figures: Mapping[str, Figure]
    devices_per_package: int
    devices_per_node: int
    domain: int
    cores: int
    decode_overlap: Overlap
    prefill_overlap: Overlap
    fused: frozenset[str]
    table: ExchangeTable | None = None
    bulk: tuple[Sequence[int], Sequence[float], Sequence[float]] | None = None
    bulk_once_per_node: bool = False
    bulk_cores: int = 0
    by_devices: "Callable[[int], Hardware] | None" = None

    def __getattr__(self, name: str) -> float:
        figures = self.__dict__.get("figures", {})
        if name in figures:
            return float(figures[name].value)
        raise AttributeError(name)

    def peak(self, precision: str) -> float:
        """Operations a second at the datasheet's best; 4-bit where the machine has it, else as 8-bit."""
        found = self.figures.get(f"peak_{precision}") or self.figures["peak_int8"]
        return found.value

    def bulk_bytes_per_s(self, what: str, degree: int) -> float:
        """Rate of one device's dispatch or combine of many tokens."""
        if self.bulk is None:
            return self.link_rate(degree)
        degrees, dispatch, combine = self.bulk
        return float(np.interp(np.log2(degree), np.log2(degrees), dispatch if what == "dispatch" else combine))

    def link_rate(self, degree: int) -> float:
        """Bytes a second of one device to `degree` peers: those outside of the fast links' domain are slower."""
        if degree <= self.domain:
            return self.link_bytes_per_s
        far = 1 - self.domain / degree
        return 1 / (far / self.far_bytes_per_s + (1 - far) / self.link_bytes_per_s)

    def among(self, devices: int) -> "Hardware":
        """One of so many devices of an instance: itself, where each has a machine of its own."""
        return self if self.by_devices is None else self.by_devices(devices)

    def with_figures(self, mark: Mark, source: str, **values: float) -> "Hardware":
        """The machine with other numbers, for what-ifs, fits and calibration."""
        figures = dict(self.figures)
        for name, value in values.items():
            unit = figures[name].unit if name in figures else ""
            figures[name] = Figure(value, unit, source, mark)
        return dataclasses.replace(self, figures=figures)


def names() -> list[str]:
    """The machines of the data file."""
    return list(_data("hardware.toml"))


def hardware(name: str) -> Hardware:
    """A machine by its name; a UserError that lists them where there is none."""
    machines = _data("hardware.toml")
    if name not in machines:
        raise UserError(f"hardware {name!r} is unknown; there are {', '.join(names())}")
    return _read(name, machines[name])


def operators() -> dict[str, Any]:
    """The published figures of single operators."""
    return _data("operators.toml")


@functools.cache
def _data(file: str) -> dict[str, Any]:
    text = (resources.files("cmjax.perf") / "data" / file).read_text(encoding="utf-8")
    return tomllib.loads(text)


def _described(target: str) -> dict[str, Figure]:
    """What `cmjax compile` is told of the same machine."""
    machine = machines()[target]
    source = str(machine.facts["source"])
    figures = {"memory_bytes": Figure(machine.memory_bytes, "bytes", source, "published")}
    if rate := machine.facts.get("memory_bytes_per_s"):
        figures["memory_bytes_per_s"] = Figure(float(rate), "bytes/s", source, "published")
    return figures


def _read(name: str, entries: Mapping[str, Any]) -> Hardware:
    figures = {key: Figure(**value) for key, value in entries.items() if isinstance(value, dict)}
    if "target" in entries:
        figures = _described(entries["target"]) | figures
    for key, figure in figures.items():
        if figure.mark not in get_args(Mark) or not figure.source or not figure.unit:
            raise ValueError(f"{name}.{key}: a number needs a unit, a source, and a mark of {get_args(Mark)}")
    table = bulk = None
    if "exchange" in entries:
        published = operators()["exchange"][entries["exchange"]]
        seconds = [[us * 1e-6 for us in published[f"{what}_us"]] for what in ("dispatch", "combine")]
        table = ExchangeTable(published["tokens"], published["degrees"], *seconds)
    if "bulk_degrees" in entries:
        dispatch, combine = (
            [rate * 1e9 for rate in entries[f"bulk_{what}_gb_per_s"]] for what in ("dispatch", "combine")
        )
        bulk = entries["bulk_degrees"], dispatch, combine
    plain = ("title", "devices_per_package", "devices_per_node", "domain", "cores", "decode_overlap", "prefill_overlap")
    return Hardware(
        name=name,
        figures=figures,
        fused=frozenset(entries["fused"]),
        table=table,
        bulk=bulk,
        bulk_once_per_node=entries.get("bulk_once_per_node", False),
        bulk_cores=entries.get("bulk_cores", 0),
        **{key: entries[key] for key in plain},
    )
