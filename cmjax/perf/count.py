"""Counts what a traced step does, by walking its jaxpr: nothing is compiled, no memory is taken.

Inside the step's `shard_map` shapes are those of one device. The innermost scope that names a stage says where an
equation belongs, the scopes "a" and "b" which microbatch. Rules, the same for every stage:

- A matrix product has two operations a multiply-add, of the precision of its operands before `einsum_f32` widened them;
  `Precision.HIGHEST` is float32.
- Its weights are what comes from the parameters by slicing and reshaping alone, at the size they are stored in.
- Its other operand and its result are read and written, and once more by the one vector operator that is taken to stand
  between two products (norm, rotation, quantization, activation, residual). Operators inside core attention are one:
  scores stay on the chip, keys and values are read once.
- Loops whose trips the data decides (`cmjax.loops`) are counted by key, by pair of query and key, or by expert row, so
  that a static worst case is never taken for what is expected. Where a stage has several loops of one kind (the first
  chunk, short blocks), they share the units: the largest one's work by unit stands for all.
- A ragged exchange moves the rows that exist: the smaller of operand and result. What sorts rows before and after it is
  read and written.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from cmjax.mesh.exchange import exchange_bytes
from cmjax.perf.work import STAGES, ExchangeWork, LoopWork, StageWork, Unit, Work

# Primitives whose result is a part or another form of their first operand.
_VIEWS = {
    "slice", "dynamic_slice", "squeeze", "reshape", "transpose", "convert_element_type", "broadcast_in_dim", "split",
    "copy", "gather", "scatter", "dynamic_update_slice",
}  # fmt: skip
_EXCHANGES = {
    f"fabric_{name}{half}": name
    for name in ("all_to_all", "all_gather", "psum", "psum_scatter", "ppermute", "ragged_all_to_all")
    for half in ("", "_done")
}
_ACTIVATION_BYTES, _WIDE_BYTES = 2, 4  # bfloat16, and float32 where the step asks for it
_TWICE = 2  # a matrix operator and the vector operator beside it


@dataclasses.dataclass(frozen=True)
class _Value:
    """Where a value comes from, and the bytes of one element where it is stored."""

    origin: str = ""  # "params", "cache" or ""
    itemsize: int = 0
    is_rounded: bool = False  # it was bfloat16 or smaller before it was widened


@dataclasses.dataclass
class _Found:
    """Work of a stage under way."""

    calls: int
    fixed: Work = dataclasses.field(default_factory=Work)
    # unit -> (units a trip, work of a trip, weights of a trip) of its largest loop
    loops: dict[Unit, tuple[float, Work, float]] = dataclasses.field(default_factory=dict)


def count(jaxpr: Jaxpr, num_params: int, cache_index: int) -> list[StageWork]:
    """The stages of a step.

    Args:
        jaxpr: of `prefill` or `decode`, traced.
        num_params: how many of its first inputs are parameters.
        cache_index: which input is the cache.
    """
    values = {}
    for index, var in enumerate(jaxpr.invars):
        origin = "params" if index < num_params else "cache" if index == cache_index else ""
        values[var] = _stored(var, origin)
    walk = _Walk()
    walk.run(jaxpr, values, "", 0, 1)
    return walk.stages()


def _stored(var: Any, origin: str = "") -> _Value:
    dtype = np.dtype(var.aval.dtype) if hasattr(var.aval, "dtype") and _is_plain(var.aval.dtype) else np.dtype(np.int32)
    return _Value(origin, dtype.itemsize, dtype.itemsize < _WIDE_BYTES)


def _is_plain(dtype: Any) -> bool:
    return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def _bytes(var: Any, itemsize: int) -> float:
    return float(math.prod(var.aval.shape) * itemsize)


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(var.aval.shape)


class _Walk:
    """Goes through a jaxpr and those inside it."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str, str], _Found] = {}
        self._num_sections = 0
        self._sections: dict[tuple[int, str], int] = {}  # (scan, draft) -> its number

    def stages(self) -> list[StageWork]:
        """What was found, in the order of the step."""
        result = []
        for (section, stage, lane), found in self._found.items():
            loops = []
            for unit, (units, work, weights) in found.loops.items():
                each = dataclasses.replace(work, operators=0).times(1 / units)
                loops.append(LoopWork(unit, each, weights, work.operators, units))
            if found.fixed != Work() or loops:
                result.append(StageWork(section, stage, lane, found.calls, found.fixed, tuple(loops)))
        return result

    def run(self, jaxpr: Jaxpr, values: dict[Var, _Value], scope: str, section: int, calls: int) -> list[_Value]:
        """Count all equations; returns where the results come from."""
        for eqn in jaxpr.eqns:
            own = f"{scope}/{eqn.source_info.name_stack}"
            for var, value in zip(eqn.outvars, self._equation(eqn, values, own, section, calls), strict=False):
                values[var] = value
        return [_value_of(var, values) for var in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, values: dict[Var, _Value], scope: str, section: int, calls: int) -> list[_Value]:
        name, given = eqn.primitive.name, [_value_of(var, values) for var in eqn.invars]
        if name == "scan":
            self._num_sections += 1
            inner = self._num_sections
            body = eqn.params["jaxpr"].jaxpr
            return self.run(
                body, dict(zip(body.invars, given, strict=True)), scope, inner, calls * eqn.params["length"]
            )
        if name == "while":
            self._loop(eqn, given, scope, section, calls)
            return [_stored(var) for var in eqn.outvars]
        if name == "cond":
            branch = eqn.params["branches"][-1].jaxpr
            return self.run(branch, dict(zip(branch.invars, given[1:], strict=True)), scope, section, calls)
        for inner_jaxpr in _inner_jaxprs(eqn):
            return self.run(inner_jaxpr, dict(zip(inner_jaxpr.invars, given, strict=True)), scope, section, calls)
        work = _work_of(eqn, given, _stage_of(scope))
        if work is None and name == "gather" and _stage_of(scope) in ("dispatch", "combine"):
            work = Work(activation_bytes=_TWICE * _bytes(eqn.outvars[0], _stored(eqn.outvars[0]).itemsize))
        if work is not None:
            self._add(scope, section, calls, work)
        return _results(eqn, given)

    def _at(self, scope: str, section: int, calls: int) -> _Found:
        words, stage = scope.split("/"), _stage_of(scope)
        lane = next((word for word in words if word in ("a", "b")), "")
        draft = next((word for word in words if word.startswith("draft")), "")
        number = self._sections.setdefault((section, draft), len(self._sections))
        return self._found.setdefault((number, stage, lane), _Found(calls))

    def _add(self, scope: str, section: int, calls: int, work: Work) -> None:
        found = self._at(scope, section, calls)
        found.fixed = found.fixed + work

    def _loop(self, eqn: JaxprEqn, given: list[_Value], scope: str, section: int, calls: int) -> None:
        """A loop of core attention or of experts, by the units that one trip takes."""
        found = self._at(scope, section, calls)
        for unit, units, work, weights in _trips(eqn, given):
            if units > found.loops.get(unit, (0,))[0]:
                found.loops[unit] = (units, work, weights)


@dataclasses.dataclass
class _Body:
    """What a loop's body does in one trip.

    Attributes:
        work: without the loops inside it.
        products: results of its matrix products, as shapes.
        num_keys: of each request, that it reads from the cache.
        inner: loops inside it, and where their operands come from.
    """

    work: Work = dataclasses.field(default_factory=Work)
    products: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    num_keys: int = 0
    inner: list[tuple[JaxprEqn, list[_Value]]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, eqn: JaxprEqn, given: list[_Value]) -> "_Body":
        body = eqn.params["body_jaxpr"].jaxpr
        found = cls()
        found.collect(body, dict(zip(body.invars, given[eqn.params["cond_nconsts"] :], strict=True)))
        return found

    def collect(self, jaxpr: Jaxpr, values: dict[Var, _Value]) -> list[_Value]:
        """Go through a jaxpr; returns where its results come from."""
        for eqn in jaxpr.eqns:
            name, given = eqn.primitive.name, [_value_of(var, values) for var in eqn.invars]
            results = _results(eqn, given)
            if name == "while":
                self.inner.append((eqn, given))
            elif nested := list(_inner_jaxprs(eqn)):
                results = self.collect(nested[0], dict(zip(nested[0].invars, given, strict=True)))
            else:
                self._equation(eqn, given)
            values.update(zip(eqn.outvars, results, strict=False))
        return [_value_of(var, values) for var in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, given: list[_Value]) -> None:
        work = _work_of(eqn, given)
        if work is not None:
            self.work = self.work + work
        if eqn.primitive.name == "dot_general":
            self.products.append(_shape(eqn.outvars[0]))
        elif eqn.primitive.name == "gather" and given[0].origin == "cache":
            self.num_keys = _shape(eqn.outvars[0])[-2]  # [requests, keys, latent width]


def _trips(eqn: JaxprEqn, given: list[_Value]) -> Iterator[tuple[Unit, float, Work, float]]:
    """`(unit, units a trip, work of a trip without weights, bytes of weights)` of a loop and of one inside it."""
    body = _Body.of(eqn, given)
    if not body.products:
        return
    work, weights = dataclasses.replace(body.work, weight_bytes=0), body.work.weight_bytes
    if not body.num_keys:
        yield "rows", body.products[0][0], work, weights
    elif not body.inner:  # decode: scores stay on the chip, and the latents serve as keys and as values
        yield "keys", body.num_keys, dataclasses.replace(work, activation_bytes=0, operators=0), 0
    else:  # prefill: keys and values of every head are expanded, written and read once; then they meet tiles of queries
        expanded = 2.0 * math.prod(body.products[0]) * _ACTIVATION_BYTES
        yield "keys", body.num_keys, dataclasses.replace(work, activation_bytes=expanded), weights
        for tile in (_Body.of(*one) for one in body.inner):
            pairs = math.prod(tile.products[0][1:])  # scores, [heads, queries, keys]
            yield "pairs", pairs, dataclasses.replace(tile.work, activation_bytes=0, weight_bytes=0, operators=0), 0


def _stage_of(scope: str) -> str:
    return next((word for word in reversed(scope.split("/")) if word in STAGES), "other")


def _value_of(var: Any, values: dict[Var, _Value]) -> _Value:
    return _stored(var) if isinstance(var, Literal) else values.get(var, _Value())


def _results(eqn: JaxprEqn, given: list[_Value]) -> list[_Value]:
    """Where the results of an equation without a jaxpr of its own come from."""
    name = eqn.primitive.name
    if name in _VIEWS:
        return [given[0]] * len(eqn.outvars)
    if name in ("select_n", "concatenate", "pad") and any(value.is_rounded for value in given):
        return [_Value("", _ACTIVATION_BYTES, True)]
    return [_stored(var) for var in eqn.outvars]


def _inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxpr of a call: jit, shard_map and the like."""
    if eqn.primitive.name.startswith("reduce"):
        return
    if eqn.primitive.name.startswith("kernels_"):
        yield eqn.params["form"].jaxpr
        return
    for value in eqn.params.values():
        if hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
            yield value.jaxpr
        elif hasattr(value, "eqns"):
            yield value


def _work_of(eqn: JaxprEqn, given: list[_Value], stage: str = "") -> Work | None:
    """The work of one equation; None where it is free: fused into a neighbour."""
    name = eqn.primitive.name
    if name == "dot_general":
        return _product(eqn, given)
    if name == "gather" and given[0].origin:
        num_bytes = _bytes(eqn.outvars[0], given[0].itemsize)
        return Work(cache_bytes=num_bytes) if given[0].origin == "cache" else Work(weight_bytes=num_bytes)
    if name in _EXCHANGES:
        return _exchange(eqn, _EXCHANGES[name])
    if name in ("reduce_max", "reduce_min", "sort", "top_k") and stage == "sampling":
        return Work(activation_bytes=_bytes(eqn.invars[0], _WIDE_BYTES), operators=1)
    return None


def _product(eqn: JaxprEqn, given: list[_Value]) -> Work:
    left: Any
    right: Any
    left, right = eqn.invars
    out: Any = eqn.outvars[0]
    contracting = eqn.params["dimension_numbers"][0][0]
    depth = math.prod(left.aval.shape[axis] for axis in contracting)
    flops = 2.0 * math.prod(out.aval.shape) * depth
    is_wide = eqn.params["precision"] in (lax.Precision.HIGHEST, (lax.Precision.HIGHEST,) * 2)
    is_int8 = left.aval.dtype == np.int8 and right.aval.dtype == np.int8
    weights = activations = 0.0
    for var, value in zip((left, right), given, strict=True):
        if value.origin == "params":
            weights += _bytes(var, value.itemsize)
        elif value.origin != "cache":
            activations += _bytes(var, 1 if is_int8 else _WIDE_BYTES if is_wide else _ACTIVATION_BYTES)
    activations += _bytes(out, _WIDE_BYTES if is_wide else _ACTIVATION_BYTES)
    kind = "int8" if is_int8 else "f32" if is_wide else "bf16"
    return Work(**{kind: flops}, weight_bytes=weights, activation_bytes=_TWICE * activations, operators=_TWICE)


def _exchange(eqn: JaxprEqn, name: str) -> Work:
    ranks = eqn.params["num_ranks"]
    sent, messages = float(exchange_bytes(eqn)), float(ranks - 1)
    if name == "ragged_all_to_all":
        data: Any = next(var.aval for var in eqn.invars if getattr(var.aval, "ndim", 0) == 2)
        rows = min(data.shape[0], _shape(eqn.outvars[0])[0])
        messages = float(rows)
        sent = messages * data.shape[1] * np.dtype(data.dtype).itemsize
    return Work(operators=1, exchanges=(ExchangeWork(name, eqn.params["plane"], ranks, sent, messages),))
