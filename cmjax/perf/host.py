"""This very machine: what its operators take, and what a compiled step of virtual devices therefore takes.

`HostCosts` holds measurements of operators alone (`cmjax.bench.calibrate`). A step is priced by what its compiled
program runs: each XLA operator and each C++ kernel costs its launch, and the arithmetic and bytes that its shapes say;
each exchange what one takes among so many devices. Devices share the cores: what one of them computes is paid as often
as there are devices.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.perf.work import STAGES
from cmjax.targets.hlo import Instruction, Program, array_shapes, shape_bytes, shape_elements
from cmjax.text import JsonObject

CROWD = 8  # devices that rates of shared cores are measured with
PRODUCT_ROWS = (1, 8, 64, 512)
# Elementwise functions that take many instructions.
_BENDING = (
    "exponential",
    "cosine",
    "sine",
    "log",
    "log-plus-one",
    "tanh",
    "logistic",
    "power",
    "exponential-minus-one",
)
_ITEM = {"bf16": "bfloat16", "f32": "float32", "s8": "bfloat16"}
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_GIVEN = re.compile(r"operand_layout_constraints=\{(.*?)\}, (?:custom_call|output_to|api_version|metadata)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CHUNKS, _TILES = (
    re.compile(r"core_attention/loop_\d+/while$"),
    re.compile(r"core_attention/loop_\d+/while/.*loop_1/while$"),
)


@dataclasses.dataclass
class HostCosts:
    """Measured costs.

    Attributes:
        cores: that all devices share.
        machine: what it was measured on.
        values: name -> number of devices -> value.
    """

    cores: int
    machine: Mapping[str, Any]
    values: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)

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

    def product_rate(self, dtype: str, rows: float, devices: int) -> float:
        """Operations a second of the machine in products of so many rows."""
        rates = [self.at(f"product_{dtype}_{one}", devices) for one in PRODUCT_ROWS]
        return float(np.exp(np.interp(np.log2(max(rows, 1)), np.log2(PRODUCT_ROWS), np.log(rates))))

    def to_json(self) -> JsonObject:
        """What a file keeps."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "HostCosts":
        """See `to_json`; JSON's keys are text."""
        values = {name: {int(at): value for at, value in points.items()} for name, points in kept["values"].items()}
        return cls(kept["cores"], kept["machine"], values)

    def save(self, path: Path) -> None:
        """Write it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class HostData:
    """What the data of a step is expected to be, of a device on average.

    Attributes:
        keys: of a request (decode).
        rows, experts: that the experts receive of one dispatch, and experts that receive any.
        chunks, tiles: trips of prefill's loop over keys, and for each of the loop over queries inside it.
    """

    keys: float = 0
    rows: float = 0
    experts: float = 0
    chunks: float = 0
    tiles: float = 0

    def trips(self, loop: Instruction) -> float | None:
        """Of a loop whose trips the data decides."""
        scope = _SCOPE.search(loop.rest)
        if scope is None or not self.chunks:
            return None
        return self.tiles if _TILES.search(scope[1]) else self.chunks if _CHUNKS.search(scope[1]) else None


def price_program(text: str, costs: HostCosts, devices: int, data: HostData) -> dict[str, float]:
    """Seconds of a call by stage, of `devices` that run a compiled program together; "launch" is of the call."""
    program, found = Program(text), {"launch": costs.at("launch_s", devices)}
    walk = _Walk(program, costs, devices, data)
    for one, shapes, times in program.expected(data.trips):
        if one.is_run:
            scope = _SCOPE.search(one.rest)
            words = scope[1].split("/") if scope else []
            stage = next((word for word in reversed(words) if word in STAGES), "other")
            found[stage] = found.get(stage, 0.0) + times * walk.seconds(one, shapes)
    return found


@dataclasses.dataclass
class OperatorCounts:
    """Of XLA's own operators on one device.

    Attributes:
        operators: to launch.
        touched: bytes, see `_touched`.
        bent: elements that functions such as the exponential are taken of.
        dot_ops: operations of products.
        compared: pairs of elements that sorts compare.
    """

    operators: float = 0
    touched: float = 0
    bent: float = 0
    dot_ops: float = 0
    compared: float = 0


def counts(text: str) -> OperatorCounts:
    """Of a whole program."""
    program, total = Program(text), OperatorCounts()
    for one, shapes, times in program.instructions():
        if one.is_run:
            own = _own_counts(program, one, shapes)
            total.operators += times
            total.touched += times * own.touched
            total.bent += times * own.bent
            total.dot_ops += times * own.dot_ops
            total.compared += times * own.compared
    return total


def _own_counts(program: Program, one: Instruction, shapes: Mapping[str, str]) -> OperatorCounts:
    if one.operation == "sort":
        length = array_shapes(one.shape)[0][1][-1]
        return OperatorCounts(1, compared=length * math.log2(max(length, 2)))
    held = program.held(one) or [one]
    inside = {each.name: each.shape for each in held} if held != [one] else shapes
    dots = sum(_dot_ops(inner, inside) for inner in held)
    bent = sum(shape_elements(inner.shape) for inner in held if inner.operation in _BENDING)
    return OperatorCounts(1, _touched(held, inside), bent, dots)


class _Walk:
    """Prices one instruction at a time."""

    def __init__(self, program: Program, costs: HostCosts, devices: int, data: HostData) -> None:
        self._program, self._costs, self._devices, self._data = program, costs, devices, data
        self._operator = costs.at("operator_s", devices) * costs.turns(devices)
        self._kernel = costs.at("kernel_s", devices) * costs.turns(devices)

    def seconds(self, one: Instruction, shapes: Mapping[str, str]) -> float:
        """Of all devices together."""
        target = _TARGET.search(one.rest)
        name = target[1] if target else ""
        if name.startswith("cmjax_kernels_"):
            return self._kernel + self._kernel_work(name.removeprefix("cmjax_kernels_"), one)
        if name.startswith("cmjax_fabric_"):
            return self._exchange(name.removeprefix("cmjax_fabric_"), one)
        given = [shapes[operand] for operand in one.operands if operand in shapes]
        if name == "TopK":
            elements = sum(math.prod(sizes) for _, sizes in array_shapes(given[0]))
            return self._operator + self._devices * elements / self._costs.at("top_k_elements_per_s", self._devices)
        own, costs = _own_counts(self._program, one, shapes), self._costs
        moved = own.touched / costs.at("elementwise_bytes_per_s", self._devices)
        moved += own.bent / costs.at("bent_elements_per_s", self._devices)
        moved += own.dot_ops / costs.at("dot_ops_per_s", self._devices) + own.compared * costs.at(
            "compare_s", self._devices
        )
        return self._operator + self._devices * moved

    def _kernel_work(self, name: str, one: Instruction) -> float:
        costs, count, data = self._costs, self._devices, self._data
        given = _GIVEN.search(one.rest)
        arrays = array_shapes(given[1] if given else "")
        if name == "attend":
            requests, rows, width = arrays[0][1]
            each = costs.at("key_s", count) + rows * width * costs.at("attended_s", count)
            return count * requests * data.keys * each
        if name == "experts":
            (w13_type, w13), (_, w2) = [one for one in arrays if len(one[1]) == 4][:2]
            values = math.prod(w13[2:]) + math.prod(w2[2:])
            work = self._product(data.rows / max(data.experts, 1e-9), values, w13_type)
            through = data.rows * (sum(w13[2:]) + sum(w2[2:])) * costs.at("expert_value_s", count)
            each = data.experts * costs.at("expert_s", count) * costs.turns(count)
            return count * (data.experts * work + through) + each
        if name == "product":
            (_, x), (kind, weight) = arrays[0], arrays[2]
            through = x[0] * sum(weight[1:]) * costs.at("value_s", count)
            return count * (self._product(x[0], math.prod(weight[1:]), kind) + through)
        if name not in ("absorb", "release"):  # norms, choices, packing, layouts: values that pass through
            return count * shape_bytes(one.shape) * 2 / self._costs.at("elementwise_bytes_per_s", self._devices)
        kind, kv_b = next((kind, sizes) for kind, sizes in arrays if len(sizes) == 4)
        tokens = array_shapes(one.shape)[0][1][0]
        return count * kv_b[1] * self._product(tokens, kv_b[2] * kv_b[3] / 2, kind)

    def _product(self, rows: float, values: float, kind: str) -> float:
        """Of one device and one matrix of so many values."""
        rate = self._costs.product_rate(_ITEM[kind], rows, self._devices)
        size = values * (1 if kind == "s8" else 2 if kind == "bf16" else 4)
        return max(2 * rows * values / rate, size / self._costs.at("memory_bytes_per_s", self._devices))

    def _exchange(self, half: str, one: Instruction) -> float:
        if half not in ("enter", "done"):  # the first half, and buffers, are in the cost of the second
            return 0.0
        latency = "exchange_s" if half == "enter" else "ragged_s"
        sent = float(shape_bytes(one.shape))
        if half == "done":
            kind, sizes = array_shapes(one.shape)[0]
            sent = self._data.rows * shape_bytes(f"{kind}[{sizes[-1]}]")
        return self._costs.at(latency, self._devices) + self._devices * sent / self._costs.at(
            "sent_bytes_per_s", self._devices
        )


def _dot_ops(one: Instruction, shapes: Mapping[str, str]) -> float:
    """Operations of a product that XLA computes."""
    if one.operation != "dot":
        return 0.0
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    left = array_shapes(shapes.get(one.operands[0], ""))
    if axes is None or not left:
        return 0.0
    depth = math.prod(left[0][1][int(axis)] for axis in axes[1].split(",") if axis)
    return 2.0 * depth * math.prod(array_shapes(one.shape)[0][1])


def _touched(held: list[Instruction], shapes: Mapping[str, str]) -> float:
    """Bytes that an operator reads and writes, about: its largest value twice, operands only of what needs all of them.
    A part that is cut out of an array or written into it counts, and not the array."""
    sizes = [shape_bytes(inner.shape) for inner in held if inner.operation not in _WHOLE]
    sizes += [
        shape_bytes(shapes[name])
        for inner in held
        if inner.operation in ("dot", "reduce")
        for name in inner.operands
        if name in shapes
    ]
    return 2.0 * max(sizes, default=0)


_WHOLE = ("parameter", "dynamic-update-slice", "bitcast", "constant", "scatter", "tuple")
