"""What an operator of a compiled program does, counted from its text: amounts that each have a cost on this machine.

A name of an amount is the name of its cost (`cmjax.perf.host.HostCosts`). Calibration and prediction count by the same
rules, so that what a rule leaves out is in the costs. Amounts are of one device and one run of the operator.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from cmjax.perf.host_kernels import LAUNCHED, SCOPE, Amounts, HostData, kernel_amounts, operand_shapes
from cmjax.perf.work import STAGES
from cmjax.targets.hlo import Instruction, Program, array_shapes, shape_bytes, shape_elements

KERNELS = "cmjax_kernels_"
FABRIC = "cmjax_fabric_"
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_DIMENSIONS = re.compile(r"dimensions=\{([\d,]*)\}")
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
_INDEXED = {"gather": "gathered_s", "scatter": "scattered_s", "pad": "padded_s"}
_REDUCING = ("reduce", "reduce-window")
# What moves, names or repeats values, and computes none.
_PLAIN = (
    "parameter", "constant", "bitcast", "broadcast", "iota", "tuple", "get-tuple-element", "slice", "dynamic-slice",
    "dynamic-update-slice", "reshape", "transpose", "copy", "concatenate", "dot", *_INDEXED, *_REDUCING, *_BENDING,
)  # fmt: skip
_WHOLE = ("parameter", "dynamic-update-slice", "bitcast", "constant", "scatter", "tuple")
WAITS = ("parted_s", "library_s")
LAUNCHES = ("operator_s", *LAUNCHED)
_CLOSE_BYTES = 2 * 2**16  # what an operator reads and writes and finds in the cache of its core
_MAPPED_BYTES = 2**20  # beyond them a library asks for memory that was never touched, each time


@dataclasses.dataclass(frozen=True)
class Run:
    """An operator, as often as a call runs it.

    Attributes:
        stage: of the step, "other" where its scope names none.
        kind: "xla", "exchange", or the name of a kernel.
        times: that it runs.
        amounts: of one run.
        weight_bytes: of matrices that it reads in one run.
    """

    stage: str
    kind: str
    times: float
    amounts: Amounts
    weight_bytes: float = 0.0


def runs(text: str, data: HostData) -> Iterator[Run]:
    """All operators of a compiled program."""
    program = Program(text)
    for one, shapes, times in program.expected(data.trips):
        scope = SCOPE.search(one.rest)
        words = scope[1].split("/") if scope else []
        stage = next((word for word in reversed(words) if word in STAGES), "other")
        if one.is_run:
            target = _TARGET.search(one.rest)
            name = target[1] if target else ""
            if name.startswith(KERNELS):
                name = name.removeprefix(KERNELS)
                amounts, weight_bytes = kernel_amounts(name, one, data)
                yield Run(stage, name, times, amounts, weight_bytes)
            elif name.startswith(FABRIC):
                yield Run(stage, "exchange", times, _exchange_amounts(name.removeprefix(FABRIC), one, data))
            else:
                yield Run(stage, "xla", times, operator_amounts(program, one, shapes, name))


def total(text: str, data: HostData) -> dict[str, float]:
    """The amounts of a whole program."""
    found: dict[str, float] = {}
    for run in runs(text, data):
        for name, amount in run.amounts.items():
            found[name] = found.get(name, 0.0) + run.times * amount
    return found


# -- XLA's own operators ----------------------------------------------------------------------------------------------


def operator_amounts(program: Program, one: Instruction, shapes: Mapping[str, str], target: str) -> Amounts:
    """Of one that XLA has compiled, alone or with others fused into it."""
    if target == "TopK":
        elements = sum(shape_elements(shapes[name]) for name in one.operands if name in shapes)
        return {"operator_s": 1, "top_k_s": elements}
    if one.operation == "sort":
        length = array_shapes(one.shape)[0][1][-1]
        pairs = shape_elements(one.shape) / max(len(array_shapes(one.shape)), 1) * math.log2(max(length, 2))
        return {"operator_s": 1, "compared_s": pairs}
    held = program.held(one) or [one]
    inside = {each.name: each.shape for each in held} if held != [one] else dict(shapes)
    dots = [inner for inner in held if inner.operation == "dot"]
    touched, is_library = _touched(held, inside), "__ynn_fusion" in one.rest
    return {
        "operator_s": 1,
        # What several threads are to do waits for them.
        "parted_s": float('"outer_dimension_partitions":["' in one.rest),
        "library_s": float(is_library and touched > _CLOSE_BYTES),
        "touched_s": touched,
        "spilled_s": max(touched - _CLOSE_BYTES, 0.0),
        "mapped_s": is_library * max(touched - _MAPPED_BYTES, 0.0),
        "worked_s": sum(shape_elements(inner.shape) for inner in held if not _is_plain(inner)),
        "bent_s": sum(shape_elements(inner.shape) for inner in held if inner.operation in _BENDING),
        "reduced_s": sum(_elements_of_first(inner, inside) for inner in held if inner.operation in _REDUCING),
        "folded_s": sum(_elements_of_first(inner, inside) for inner in held if _folds(inner, inside)),
        "rounded_s": sum(shape_elements(inner.shape) for inner in held if _rounds(inner)),
        **{_INDEXED[inner.operation]: _indexed(inner, inside) for inner in held if inner.operation in _INDEXED},
        "searched_s": sum(_searched(inner, held) for inner in held if inner.operation == "gather"),
        "dot_s": sum(_dot_ops(inner, inside) for inner in dots),
        "dot_value_s": sum(shape_elements(inner.shape) + _elements(inner, inside) for inner in dots),
    }


def _searched(one: Instruction, held: list[Instruction]) -> float:
    """Elements of a gather whose index is computed for each of them: by more than four, which keep it within bounds."""
    by_name, todo, seen = {inner.name: inner for inner in held}, list(one.operands[1:2]), set[str]()
    while todo:
        inner = by_name.get(todo.pop())
        if inner is not None and inner.name not in seen:
            seen.add(inner.name)
            todo += inner.operands
    steps = sum(not _is_plain(by_name[name]) for name in seen)
    return shape_elements(one.shape) if steps > 4 else 0.0


def _is_plain(one: Instruction) -> bool:
    return one.operation in _PLAIN or _rounds(one)


def _rounds(one: Instruction) -> bool:
    """To bfloat16, for which CPUs take several instructions."""
    return one.operation == "convert" and one.shape.startswith("bf16")


def _folds(one: Instruction, shapes: Mapping[str, str]) -> bool:
    """Whether rows become one row: a reduction that leaves the last axis."""
    axes = _DIMENSIONS.search(one.rest)
    given = array_shapes(shapes.get(one.operands[0], "")) if one.operands else []
    if one.operation != "reduce" or axes is None or not given:
        return False
    return str(len(given[0][1]) - 1) not in axes[1].split(",")


def _elements(one: Instruction, shapes: Mapping[str, str]) -> float:
    return sum(shape_elements(shapes[name]) for name in one.operands if name in shapes)


def _elements_of_first(one: Instruction, shapes: Mapping[str, str]) -> float:
    return shape_elements(shapes.get(one.operands[0], one.shape)) if one.operands else 0.0


def _indexed(one: Instruction, shapes: Mapping[str, str]) -> float:
    """Elements that are each found by an index: of a gather and a padded array those that come, of a scatter those
    that go."""
    return shape_elements(shapes.get(one.operands[-1], "") if one.operation == "scatter" else one.shape)


def _dot_ops(one: Instruction, shapes: Mapping[str, str]) -> float:
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


# -- exchanges --------------------------------------------------------------------------------------------------------


def _exchange_amounts(half: str, one: Instruction, data: HostData) -> Amounts:
    """Of an exchange, in the half of it that knows its shapes."""
    if half == "enter":
        return {"exchange_s": 1, "sent_byte_s": shape_bytes(one.shape)}
    if half != "start":
        return {}
    arrays = operand_shapes(one)
    (kind, rows), (_, index) = arrays[1], arrays[2]  # behind a token
    segments = math.prod(index)
    existing = segments * -math.expm1(-data.rows / segments)
    row_bytes = shape_bytes(f"{kind}[{rows[-1]}]")
    return {"ragged_s": 1, "entry_s": segments, "segment_s": existing, "sent_byte_s": data.rows * row_bytes}
