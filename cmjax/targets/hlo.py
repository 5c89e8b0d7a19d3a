"""What a compiled program's text says: collectives and their bytes, the cycles that its schedule is expected to take.

Both are counted as often as they run: a loop's trips are what the compiler knows, else what its scope says
(`cmjax.loops`).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEADING = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_OPERATION = re.compile(r"(?<=[ )\]}])([a-z][\w-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%([^\s,)]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([^\s,)]+))")
_SCOPE_TRIPS = re.compile(r'\bloop_(\d+)/while"')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62  # what stands where the compiler has none

_NAMES = ("", "bitcast", "constant", "get-tuple-element", "parameter", "partition-id", "tuple", "while", "conditional")
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One of a program's instructions.

    Attributes:
        name, operation: such as "fusion.3" and "fusion".
        shape: of the result, as text.
        operands: names, as far as they are in the same computation.
        rest: the whole text after the name.
    """

    name: str
    operation: str
    shape: str
    operands: tuple[str, ...]
    rest: str

    @property
    def is_run(self) -> bool:
        """Whether it is an operator, and no name for what is there already."""
        return self.operation not in _NAMES


@dataclasses.dataclass(frozen=True)
class CollectiveUse:
    """How often a kind of collective runs in a call, and what a device gives to it: `num_bytes` in all, of worst-case
    size where the data decides."""

    calls: int
    num_bytes: int


def array_shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """`(element type, sizes)` of each array in a shape's text."""
    return [(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(text)]


def shape_elements(text: str) -> int:
    """Elements of all arrays in a shape's text."""
    return sum(math.prod(sizes) for _, sizes in array_shapes(text))


def shape_bytes(text: str) -> int:
    """Bytes of all arrays in a shape's text, such as `bf16[8,7168]{1,0}` or a tuple of several."""
    return math.ceil(sum(_of_array(dtype, sizes) for dtype, sizes in _ARRAY.findall(text)))


def _of_array(dtype: str, sizes: str) -> float:
    width = re.search(r"\d+$", dtype)
    each = _BYTES.get(dtype, int(width[0]) / 8 if width else 0)
    return each * math.prod(int(size) for size in sizes.split(",") if size)


def xla_counts(compiled: Any) -> dict[str, float]:
    """Operations and bytes that `compiled.cost_analysis()` says, of one device; empty where it says nothing."""
    said = compiled.cost_analysis()
    cost = said[0] if isinstance(said, list | tuple) and said else said
    names = {"flops": "flops", "bytes accessed": "memory_bytes"}
    return {ours: float(cost[theirs]) for theirs, ours in names.items() if cost and theirs in cost}


class Program:
    """A compiled program, read from its text (`compiled.as_text()`)."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if heading := _HEADING.match(line):
                current = self._computations[heading[2]] = []
                self.entry = heading[2] if heading[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current.append(_instruction(found[1], found[2]))

    def instructions(self) -> Iterator[tuple[Instruction, Mapping[str, str], int]]:
        """All that run, with the shapes of their computation by name, and how often; what fusions hold is left out."""
        for one, shapes, times in self.expected(lambda loop: None):
            yield one, shapes, int(times)

    def expected(
        self, trips: Callable[[Instruction], float | None]
    ) -> Iterator[tuple[Instruction, Mapping[str, str], float]]:
        """As `instructions`, for whoever knows of some loops how often the data lets them run: `trips`, else None."""
        yield from self._walk(self.entry, 1, trips)

    def held(self, one: Instruction) -> list[Instruction]:
        """The instructions of the computation that one calls: of a fusion, those that are fused."""
        called = _CALLED.search(one.rest)
        return self._computations.get(called[1], []) if called else []

    def collectives(self) -> dict[str, CollectiveUse]:
        """By kind."""
        uses: dict[str, CollectiveUse] = {}
        for one, shapes, times in self.instructions():
            kind = one.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                size = sum(shape_bytes(shapes[name]) for name in one.operands if name in shapes)
                if kind == "ragged-all-to-all":  # its other operands are where to, and the buffer that receives
                    size = shape_bytes(shapes[one.operands[0]]) if one.operands[0] in shapes else 0
                before = uses.get(kind, CollectiveUse(0, 0))
                uses[kind] = CollectiveUse(before.calls + times, before.num_bytes + times * size)
        return dict(sorted(uses.items()))

    def estimated_cycles(self) -> int | None:
        """What the compiler expects all instructions to take, one after the other; None where it says nothing."""
        cycles = [
            times * int(found[1])
            for one, _, times in self.instructions()
            if (found := _CYCLES.search(one.rest)) and int(found[1]) < _NO_ESTIMATE
        ]
        return sum(cycles) if cycles else None

    def copies(self, count: int) -> list[tuple[int, str, str]]:
        """The largest copies of arrays, `(bytes, shape, scope)`, once a scope."""
        found = {}
        for one, shapes, _ in self.instructions():
            if one.operation in ("copy", "copy-start", "transpose"):
                scope = re.search(r'op_name="([^"]*)"', one.rest)
                of = shapes.get(one.operands[0], one.shape) if one.operands else one.shape
                shape = re.sub(r"\{[^}]*\}", "", of).strip()
                found[shape, scope[1] if scope else one.name] = shape_bytes(of)
        ordered = sorted(found.items(), key=lambda item: -item[1])
        return [(size, shape, scope) for (shape, scope), size in ordered[:count]]

    def _walk(
        self, name: str, times: float, trips: Callable[[Instruction], float | None]
    ) -> Iterator[tuple[Instruction, Mapping[str, str], float]]:
        instructions = self._computations.get(name, [])
        shapes = {one.name: one.shape for one in instructions}
        for one in instructions:
            yield one, shapes, times
            if one.operation == "while":
                body, known = _CALLED.search(one.rest), trips(one)
                times_body = times * (_trips(one) if known is None else known)
                yield from self._walk(body[1] if body else "", times_body, trips)
            elif one.operation == "conditional":
                # Either is possible; what a branch costs counts once.
                for several, single in _BRANCHES.findall(one.rest):
                    for branch in re.findall(r"%([^\s,]+)", several) or [single]:
                        yield from self._walk(branch, times, trips)
            elif one.operation in ("call", "async-start"):
                for called in _CALLED.findall(one.rest):
                    yield from self._walk(called, times, trips)


def _instruction(name: str, rest: str) -> Instruction:
    operation = _OPERATION.search(rest)
    if operation is None:
        return Instruction(name, "", rest, (), rest)
    end = _closing(rest, operation.end())
    operands = tuple(re.findall(r"%([^\s,()]+)", rest[operation.end() : end]))
    return Instruction(name, operation[1], rest[: operation.start()], operands, rest)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that was opened before `start` closes."""
    depth = 1
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    return len(text)


def _trips(loop: Instruction) -> int:
    if known := _KNOWN_TRIPS.search(loop.rest):
        return int(known[1])
    scope = _SCOPE_TRIPS.search(loop.rest)  # none of a loop that the compiler made: it counts once
    return int(scope[1]) if scope else 1
