"""The fabric: collectives among the ranks of a mesh axis, with the meaning of their `jax.lax` namesakes.

Called inside `jax.shard_map`; `axis_name` is one mesh axis or a tuple of them. On CPU devices a collective is an
asynchronous C++ handler (`native/`) that blocks no thread, so that 320 or 384 virtual devices can exchange data; on
other platforms it lowers to `jax.lax`. Callers never ask which; `status()` tells.

Each collective also comes in two halves. `NAME_start` says that this rank's data is ready and returns a `Token` at
once; `NAME_done` takes the same data and the token and returns the result. Work placed between the two hides the
exchange: pass what it gives (any pytree of arrays) as `hide_behind`, and what it takes through `after(token, ...)`,
which together fix the order on every executor. Use each token once. Trees of arrays are exchanged leaf by leaf.

`group_size` cuts the axis into groups of so many consecutive ranks, each of which exchanges among itself as if it were
the axis (what `axis_index_groups` is to `lax`).

`channel` names an exchange. By default each call in a program has its own. Two calls that have no data dependence
and come from one cached jitted function (two microbatches, say) must be given different ones. `plane` is the network
the bytes are counted on ("ub", "rdma" or "vpc").

An exchange has no derivative and no batching rule: `jax.grad` and `jax.vmap` over it are errors.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.typing import ArrayLike, DTypeLike

from cmjax.mesh.exchange import (
    AxisName,
    Call,
    Params,
    Token,
    as_data,
    check_dtype,
    exchange_bytes,
    make_params,
    make_primitives,
    refuse,
    run_done,
    run_each,
    run_plain,
    run_start,
)
from cmjax.mesh.fabric_ragged import lax_ragged, native_ragged_failure
from cmjax.mesh.layout import (
    ALONE,
    Layout,
    all_gather_layout,
    all_to_all_layout,
    checked_ragged_index,
    psum_scatter_layout,
)
from cmjax.mesh.settings import (
    DelayModel,
    FabricError,
    FormStatus,
    Settings,
)
from cmjax.mesh.traffic import TrafficCounters, TrafficEntry, TrafficSnapshot

__all__ = [
    "DelayModel",
    "FabricError",
    "FormStatus",
    "Token",
    "TrafficCounters",
    "TrafficEntry",
    "TrafficSnapshot",
    "after",
    "all_gather",
    "all_gather_done",
    "all_gather_start",
    "all_to_all",
    "all_to_all_done",
    "all_to_all_start",
    "configure",
    "delay_s",
    "done",
    "empty",
    "exchange_bytes",
    "ppermute",
    "ppermute_done",
    "ppermute_start",
    "psum",
    "psum_done",
    "psum_scatter",
    "psum_scatter_done",
    "psum_scatter_start",
    "psum_start",
    "ragged_all_to_all",
    "ragged_all_to_all_done",
    "ragged_all_to_all_start",
    "record",
    "status",
    "time_memcpy",
    "traffic",
]

Array = jax.Array
Tree = TypeVar("Tree")  # of arrays

_SETTINGS = Settings(native_ragged_failure)
traffic = TrafficCounters()
record = traffic.record
configure = _SETTINGS.configure
delay_s = _SETTINGS.delay_s
status = _SETTINGS.status
time_memcpy = _SETTINGS.time_memcpy


def all_to_all(
    x: Tree,
    axis_name: AxisName,
    split_axis: int,
    concat_axis: int,
    *,
    tiled: bool = False,
    group_size: int | None = None,
    channel: str | None = None,
    plane: str = "ub",
) -> Tree:
    """What the ranks sent here, stacked (`tiled`: joined) along `concat_axis`; part r of `x` goes to rank r."""
    layout = partial(all_to_all_layout, split_axis=split_axis, concat_axis=concat_axis, tiled=tiled)
    return _each(run_plain, "all_to_all", layout, x, Call(axis_name, channel, plane, group_size))


def all_to_all_start(
    x: object,
    axis_name: AxisName,
    split_axis: int,
    concat_axis: int,
    *,
    tiled: bool = False,
    group_size: int | None = None,
    channel: str | None = None,
    plane: str = "ub",
) -> Any:
    """Starts `all_to_all`: one `Token` per array in `x`."""
    layout = partial(all_to_all_layout, split_axis=split_axis, concat_axis=concat_axis, tiled=tiled)
    return _each(run_start, "all_to_all", layout, x, Call(axis_name, channel, plane, group_size))


def all_gather(
    x: Tree,
    axis_name: AxisName,
    *,
    axis: int = 0,
    tiled: bool = False,
    group_size: int | None = None,
    channel: str | None = None,
    plane: str = "ub",
) -> Tree:
    """Every rank's `x`, stacked along a new axis `axis` (`tiled`: joined along it)."""
    layout = partial(all_gather_layout, axis=axis, tiled=tiled)
    return _each(run_plain, "all_gather", layout, x, Call(axis_name, channel, plane, group_size))


def all_gather_start(
    x: object,
    axis_name: AxisName,
    *,
    axis: int = 0,
    tiled: bool = False,
    group_size: int | None = None,
    channel: str | None = None,
    plane: str = "ub",
) -> Any:
    """Starts `all_gather`: one `Token` per array in `x`."""
    layout = partial(all_gather_layout, axis=axis, tiled=tiled)
    return _each(run_start, "all_gather", layout, x, Call(axis_name, channel, plane, group_size))


def psum(x: Tree, axis_name: AxisName, *, channel: str | None = None, plane: str = "ub") -> Tree:
    """The sum of every rank's `x`, added in rank order (16-bit floats in float32); bool counts as int32."""
    return _each(run_plain, "psum", _whole("psum"), x, Call(axis_name, channel, plane))


def psum_start(x: object, axis_name: AxisName, *, channel: str | None = None, plane: str = "ub") -> Any:
    """Starts `psum`: one `Token` per array in `x`."""
    return _each(run_start, "psum", _whole("psum"), x, Call(axis_name, channel, plane))


def psum_scatter(
    x: Tree,
    axis_name: AxisName,
    *,
    scatter_dimension: int = 0,
    tiled: bool = False,
    channel: str | None = None,
    plane: str = "ub",
) -> Tree:
    """This rank's part (along `scatter_dimension`) of the sum of every rank's `x`."""
    layout = partial(psum_scatter_layout, scatter_dimension=scatter_dimension, tiled=tiled)
    return _each(run_plain, "psum_scatter", layout, x, Call(axis_name, channel, plane))


def psum_scatter_start(
    x: object,
    axis_name: AxisName,
    *,
    scatter_dimension: int = 0,
    tiled: bool = False,
    channel: str | None = None,
    plane: str = "ub",
) -> Any:
    """Starts `psum_scatter`: one `Token` per array in `x`."""
    layout = partial(psum_scatter_layout, scatter_dimension=scatter_dimension, tiled=tiled)
    return _each(run_start, "psum_scatter", layout, x, Call(axis_name, channel, plane))


def ppermute(
    x: Tree, axis_name: AxisName, perm: Sequence[tuple[int, int]], *, channel: str | None = None, plane: str = "ub"
) -> Tree:
    """The `x` of the rank that `perm`, pairs of (source, destination), sends here; zeros where it sends none."""
    return _each(run_plain, "ppermute", _whole("ppermute"), x, Call(axis_name, channel, plane, perm=perm))


def ppermute_start(
    x: object, axis_name: AxisName, perm: Sequence[tuple[int, int]], *, channel: str | None = None, plane: str = "ub"
) -> Any:
    """Starts `ppermute`: one `Token` per array in `x`."""
    return _each(run_start, "ppermute", _whole("ppermute"), x, Call(axis_name, channel, plane, perm=perm))


def done(x: Tree, token: object, hide_behind: object = None) -> Tree:
    """Ends any exchange but a ragged one: its result. Takes the `x` that was started and the token(s) it gave.

    Waits for the arrays in `hide_behind` first.
    """

    def end(leaf: ArrayLike, one: Token) -> Array:
        name = one.layout.name
        return run_done(_PRIMITIVES[name], one, hide_behind, as_data(name, leaf))

    return jax.tree.map(end, x, token)


all_to_all_done = all_gather_done = psum_done = psum_scatter_done = ppermute_done = done


def ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: AxisName,
    channel: str | None = None,
    plane: str = "ub",
) -> Array:
    """`output` with the rows the ranks sent here written into it; no other row is read or written.

    The four index arrays are int[ranks * k], k updates per peer, peer-major. Update j for peer d sends the
    `send_sizes[d * k + j]` rows of `operand` from `input_offsets[d * k + j]` on to row `output_offsets[d * k + j]` of
    d's `output`. `recv_sizes[s * k + j]` is the size of update j of peer s. Rows outside a buffer, sizes that disagree,
    and ranks whose k or index dtype differ fail the exchange on every rank, before any row is written. Where updates
    overlap in an `output`, which of them a row there comes from is undefined, as in lax. `operand` and `output` may
    differ in rows only.
    """
    layout, params = _ragged(axis_name, channel, plane, operand)
    arrays = input_offsets, send_sizes, output_offsets, recv_sizes
    index = checked_ragged_index(operand, output.dtype, output.shape, arrays, layout.num_ranks)
    return run_plain(_PRIMITIVES[layout.name], layout, params, operand, output, *index)


def ragged_all_to_all_start(
    operand: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: AxisName,
    channel: str | None = None,
    plane: str = "ub",
) -> Token:
    """Starts `ragged_all_to_all`: its `Token`. The output comes with the second half."""
    layout, params = _ragged(axis_name, channel, plane, operand)
    arrays = input_offsets, send_sizes, output_offsets, recv_sizes
    index = checked_ragged_index(operand, operand.dtype, operand.shape, arrays, layout.num_ranks)
    return run_start(_PRIMITIVES[layout.name], layout, params, operand, *index)


def ragged_all_to_all_done(operand: Array, output: Array, token: Token, hide_behind: object = None) -> Array:
    """Ends `ragged_all_to_all`: `output` with the received rows. Waits for the arrays in `hide_behind` first."""
    checked_ragged_index(operand, output.dtype, output.shape, token.index, token.layout.num_ranks)
    return run_done(_PRIMITIVES[token.layout.name], token, hide_behind, operand, output)


def _each(run: Callable, name: str, make_layout: Callable[[Array, int], Layout], x: object, call: Call) -> Any:
    return run_each(run, _PRIMITIVES[name], make_layout, x, call, _SETTINGS.forms)


def _whole(name: str) -> Callable[[Array, int], Layout]:
    return lambda _, num_ranks: Layout(name, num_ranks)


def _ragged(axis_name: AxisName, channel: str | None, plane: str, operand: Array) -> tuple[Layout, Params]:
    check_dtype("ragged_all_to_all", operand.dtype)
    layout = Layout("ragged_all_to_all", lax.axis_size(axis_name))
    return layout, make_params(layout, Call(axis_name, channel, plane), _SETTINGS.forms)


def _lower_native(
    ctx: mlir.LoweringRuleContext,
    half: Literal["plain", "start", "done"],
    collective: int,
    aliases: dict[int, int],
    channel: str,
    operands: Sequence[object],
    params: Params,
) -> Sequence[Any]:
    handler = {"plain": "enter", "start": "start", "done": "done"}[half]
    lowering = jax.ffi.ffi_lowering(
        f"cmjax_fabric_{handler}", has_side_effect=True, operand_output_aliases=aliases or None
    )
    return lowering(
        ctx,
        *operands,
        channel=channel,
        plane=params["plane"],
        collective=np.int32(collective),
        num_ranks=np.int32(params["num_ranks"]),
        pairs=np.array(params["perm"], np.int64).reshape(-1),
    )


_LAX_FORMS: dict[str, Callable[..., Array]] = {
    "all_to_all": lambda x, *, groups, axis_name, **_: lax.all_to_all(x, axis_name, 0, 0, axis_index_groups=groups),
    "all_gather": lambda x, *, groups, axis_name, **_: lax.all_gather(x, axis_name, axis_index_groups=groups),
    "psum": lambda x, *, axis_name, **_: lax.psum(x, axis_name),
    "psum_scatter": lambda x, *, axis_name, **_: lax.psum_scatter(x, axis_name),
    "ppermute": lambda x, *, axis_name, perm, **_: lax.ppermute(x, axis_name, perm),
    "ragged_all_to_all": lax_ragged,
}


def _psum_alone(x: Array, *, axis_name: tuple[str, ...], **_: object) -> Array:
    # Only for its type: with check_vma=True the sum no longer varies over the axis.
    return lax.psum(x, axis_name) if set(axis_name) & set(jax.typeof(x).mat.varying) else x


_ALONE = {**ALONE, "psum": _psum_alone}
_PRIMITIVES = {
    name: make_primitives(name, form, _ALONE[name], _lower_native, _SETTINGS) for name, form in _LAX_FORMS.items()
}


def empty(shape: Sequence[int], dtype: DTypeLike) -> Array:
    """An array whose contents are whatever the memory held: nothing is cleared, and untouched pages cost nothing."""
    return _EMPTY.bind(shape=tuple(shape), dtype=jnp.dtype(dtype))


def after(token: object, x: Tree) -> Tree:
    """`x`, to be had only once the exchange of `token` (or all of several) has been started; no copy, no work.

    Give it to the work that an exchange should hide behind: an executor with all its threads busy may otherwise run
    that work before the start. On virtual devices, which outnumber the threads, what else is ready goes first: all
    devices have started before any goes on to work, as devices of their own would.
    """
    stamps = [one.stamp for one in jax.tree.leaves(token, is_leaf=lambda leaf: isinstance(leaf, Token))]
    return jax.tree.map(lambda leaf: _AFTER.bind(jnp.asarray(leaf), *stamps), x)


def _in_memory(
    name: str, abstract: Callable[..., object], portable: Callable[..., object], aliases: dict[int, int] | None
) -> Primitive:
    """A primitive that is a handler without work on CPU, and `portable` elsewhere or where there is no library."""

    def lower_portable(ctx: mlir.LoweringRuleContext, *operands: object, **params: object) -> Sequence[Any]:
        return mlir.lower_fun(portable, multiple_results=False)(ctx, *operands, **params)

    def lower_cpu(ctx: mlir.LoweringRuleContext, *operands: object, **params: object) -> Sequence[Any]:
        if _SETTINGS.native().library is None:
            return lower_portable(ctx, *operands, **params)
        # The side effect keeps two empty arrays from becoming one, and one in a loop from leaving it.
        unique = aliases is None
        target = "cmjax_fabric_nothing" if unique else "cmjax_fabric_yield"
        return jax.ffi.ffi_lowering(target, has_side_effect=unique, operand_output_aliases=aliases)(ctx, *operands)

    primitive = Primitive(f"fabric_{name}")
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(lambda *operands, **params: jax.jit(partial(primitive.bind, **params))(*operands))
    mlir.register_lowering(primitive, lower_portable, cacheable=False)
    mlir.register_lowering(primitive, lower_cpu, platform="cpu", cacheable=False)
    refuse(primitive, name)
    return primitive


_EMPTY = _in_memory("empty", lambda *, shape, dtype: jax.core.ShapedArray(shape, dtype), lax.empty, None)
_AFTER = _in_memory("after", lambda x, *_: x, lambda x, *stamps: lax.optimization_barrier((x, stamps))[0], {0: 0})
