"""What an operator of a compiled program does, counted from its text: amounts that each have a cost on this machine.

A name of an amount is the name of its cost (`cmjax.perf.host.HostCosts`). Calibration and prediction count by the same
rules, so that what a rule leaves out is in the costs. Amounts are of one device and one run of the operator.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from cmjax.kernels import Tiling, tiling
from cmjax.perf.work import STAGES
from cmjax.targets.hlo import Instruction, Program, array_shapes, shape_bytes, shape_elements

Amounts = Mapping[str, float]
KERNELS = "cmjax_kernels_"
FABRIC = "cmjax_fabric_"
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_GIVEN = re.compile(r"operand_layout_constraints=\{(.*?)\}, (?:custom_call|output_to|api_version|metadata)")
_DIMENSIONS = re.compile(r"dimensions=\{([\d,]*)\}")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CHUNKS, _TILES = (
    re.compile(r"core_attention/loop_\d+/while$"),
    re.compile(r"core_attention/loop_\d+/while/.*loop_1/while$"),
)
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
_ITEM_BYTES = {"bf16": 2, "f32": 4, "s8": 1}
_LANES = 16
_PADDED = 64  # values of a staged row
_EXPANDED = 128  # keys of a chunk in prefill, and queries of a tile at most
_CLOSE_BYTES = 2 * 2**16  # what an operator reads and writes and finds in the cache of its core
_MAPPED_BYTES = 2**20  # beyond them a library asks for memory that was never touched, each time


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
        scope = _SCOPE.search(one.rest)
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


# -- kernels ----------------------------------------------------------------------------------------------------------


def kernel_amounts(name: str, one: Instruction, data: HostData) -> tuple[Amounts, float]:
    """Of a C++ kernel, and the bytes of matrices that it reads: what its inner loops run over, in whole vectors."""
    given = _GIVEN.search(one.rest)
    arrays, results = array_shapes(given[1] if given else ""), array_shapes(one.shape)
    own, weight_bytes = _KERNELS[name](arrays, results, data)
    return {f"{name}_s": 1.0, **own}, weight_bytes


_Shapes = list[tuple[str, tuple[int, ...]]]
_Counted = tuple[dict[str, float], float]


def _whole(width: float, lanes: int = _LANES) -> float:
    return math.ceil(width / lanes) * lanes


def _norm(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    rows, width = arrays[0][1]
    return {"norm_row_s": rows, "norm_value_s": rows * _whole(width)}, 0.0


def _choose(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    tokens, experts = arrays[0][1]
    shared = arrays[2][1][0] - experts
    taken = results[0][1][1] - shared
    return {"choose_score_s": tokens * experts, "choose_compare_s": tokens * taken * _whole(experts)}, 0.0


def _pack(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    (given, (tokens, hidden)), (kind, (rows, width)), (_, offsets) = arrays[0], results[0], results[2]
    return {
        "pack_row_s": rows,
        "pack_slot_s": math.prod(offsets),
        "pack_byte_s": rows * shape_bytes(f"{kind}[{width}]"),
        "quantized_s": tokens * _whole(hidden) if kind == "s8" and given != kind else 0.0,
    }, 0.0


def _lay_out(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    ranks, _, local = arrays[0][1]
    return {"lay_out_rank_s": ranks, "lay_out_segment_s": ranks * local}, 0.0


def _absorb(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    (_, (tokens, heads, nope)), (_, (_, _, _, latent)) = arrays[0], arrays[2]
    each = nope * _whole(latent)
    return {
        "absorb_row_s": tokens * heads,
        "absorb_weight_s": heads * each,
        "absorb_value_s": tokens * heads * each,
    }, 0.0


def _release(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    kind, (_, heads, _, latent) = next(one for one in arrays if len(one[1]) == 4)
    tokens, values = results[0][1]
    found = _multiplied(tiling(kind), kind, tokens, values / heads, latent, is_many=False)
    found = {name: heads * amount for name, amount in found.items()}
    return {**found, "release_row_s": tokens * heads * _whole(latent), "stored_s": tokens * values}, 0.0


def _attend(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    requests, rows, width = arrays[0][1]
    keys = requests * data.keys
    return {
        "attend_key_s": keys,
        "attend_read_s": keys * _whole(width),
        "attend_score_s": keys * rows,
        "attend_value_s": keys * rows * _whole(width),
    }, 0.0


def _attend_expanded(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    (_, (heads, rows, width)), (_, (_, _, out, latent)) = arrays[0], arrays[4]
    pairs = heads * data.chunks * data.tiles * _EXPANDED * min(_EXPANDED, rows // 2)
    return {
        "expand_key_s": heads * data.chunks * _EXPANDED * out * _whole(latent),
        "expand_score_s": pairs,
        "expand_value_s": pairs * (_whole(width) + _whole(results[2][1][-1])),
    }, 0.0


def matrix_amounts(kind: str, rows: float, out: float, width: float, given: str | None = None) -> _Counted:
    """Of a product `[rows, width] x [out, width]`, of rows that are `given` as another type than the matrix."""
    how, given = tiling(kind), given or kind
    is_many = rows >= how.many_rows
    amounts = {"stored_s": rows * out, **_multiplied(how, kind, rows, out, width, is_many)}
    if is_many:
        share = min(4 * _whole(width, _PADDED) / how.many_bytes, 1 / how.many_block)  # of a group of rows, each
        amounts[f"laid_{kind}_s"] *= math.ceil(rows * share)
    if is_many or width % how.step or not (how.is_read_in_place and given == kind):
        _add(amounts, _staged(kind, given, rows, width, is_many))
    return amounts, out * width * _ITEM_BYTES[kind]


def _multiplied(how: Tiling, kind: str, rows: float, out: float, width: float, is_many: bool) -> dict[str, float]:
    """Sums: a tile of few rows reads the weights as they are, for many rows columns are laid side by side once."""
    values, tile = out * _whole(width, how.step), how.many_tile if is_many else how.tile_rows
    # At most one tile has fewer rows; of an expectation, which is no whole number, half a one.
    tiles = math.ceil(rows / tile) if rows == int(rows) else max(1.0, rows / tile + 0.5)
    scaled = rows * out if kind == "s8" else 0.0
    if is_many:
        return {f"laid_{kind}_s": values, f"many_{kind}_s": tiles * tile * values, "scaled_s": scaled}
    return {
        f"tile_{kind}_s": tiles * values,
        f"value_{kind}_s": rows * values,
        "summed_s": rows * out,  # a vector of sums each
        "rest_s": tiles * out if width % how.step else 0.0,  # of rows that are no whole steps
        "scaled_s": scaled,
    }


def _staged(kind: str, given: str, rows: float, width: float, is_many: bool) -> dict[str, float]:
    """Rows made what products read."""
    name, values = "quantized_s" if kind == "s8" and given != kind else "staged_s", rows * _whole(width)
    return {name: values, "by_lane_s": values if is_many and kind != "s8" else 0.0}


def _add(amounts: dict[str, float], more: Amounts, times: float = 1.0) -> None:
    for name, amount in more.items():
        amounts[name] = amounts.get(name, 0.0) + times * amount


def _product(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    (given, (rows, width)), (kind, (*_, out, _)) = arrays[0], arrays[2]
    return matrix_amounts(kind, rows, out, width, given)


def _experts(arrays: _Shapes, results: _Shapes, data: HostData) -> _Counted:
    (kind, w13), (_, w2) = [one for one in arrays if len(one[1]) == 4][:2]
    found = {"expert_s": data.experts, "gated_s": data.rows * w2[3], "stored_s": data.rows * w2[2]}
    how, each = tiling(kind), data.rows / max(data.experts, 1e-9)
    is_many = each >= how.many_rows
    for given, (out, width) in ((arrays[0][0], w13[2:]), ("f32", w2[2:])):
        amounts = _multiplied(how, kind, each, out, width, is_many)
        if is_many:
            amounts[f"laid_{kind}_s"] *= math.ceil(each / how.many_block)
        _add(amounts, _staged(kind, given, each, width, is_many))
        _add(found, amounts, data.experts)
    return found, data.experts * (math.prod(w13[2:]) + math.prod(w2[2:])) * _ITEM_BYTES[kind]


_KERNELS = {
    "norm": _norm, "choose": _choose, "pack": _pack, "lay_out": _lay_out, "absorb": _absorb, "attend": _attend,
    "release": _release, "attend_expanded": _attend_expanded, "product": _product, "experts": _experts,
}  # fmt: skip


WAITS = ("parted_s", "library_s")
LAUNCHES = ("operator_s", *(f"{name}_s" for name in _KERNELS))


# -- exchanges --------------------------------------------------------------------------------------------------------


def _exchange_amounts(half: str, one: Instruction, data: HostData) -> Amounts:
    """Of an exchange, in the half of it that knows its shapes."""
    if half == "enter":
        return {"exchange_s": 1, "sent_byte_s": shape_bytes(one.shape)}
    if half != "start":
        return {}
    given = _GIVEN.search(one.rest)
    arrays = array_shapes(given[1] if given else "")
    (kind, rows), (_, index) = arrays[1], arrays[2]  # behind a token
    segments = math.prod(index)
    existing = segments * -math.expm1(-data.rows / segments)
    row_bytes = shape_bytes(f"{kind}[{rows[-1]}]")
    return {"ragged_s": 1, "entry_s": segments, "segment_s": existing, "sent_byte_s": data.rows * row_bytes}
