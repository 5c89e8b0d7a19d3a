"""The fabric: collectives among the ranks of a mesh axis, with the meaning of their `jax.lax` namesakes.

Called inside `jax.shard_map`; `axis_name` is one mesh axis or a tuple of them. On CPU devices a collective is an
asynchronous C++ handler (`native/`) that blocks no thread, so that 320 or 384 virtual devices can exchange data; on
other platforms it lowers to `jax.lax`. Callers never ask which; `status()` tells.

Each collective also comes in two halves. `NAME_start` says that this rank's data is ready and returns a `Token` at
once; `NAME_done` takes the same data and the token and returns the result. Work placed between the two hides the
exchange: pass it (any pytree of arrays) as `hide_behind`, which fixes the order on every executor. Use each token
once. Trees of arrays are exchanged leaf by leaf.

`channel` names an exchange. By default each call in a program has its own. Two calls that have no data dependence
and come from one cached jitted function (two microbatches, say) must be given different ones. `plane` is the network
the bytes are booked on ("ub", "rdma" or "vpc").

An exchange has no derivative and no batching rule: `jax.grad` and `jax.vmap` over it are errors.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from cmjax.mesh.books import TrafficBooks, TrafficEntry, TrafficSnapshot
from cmjax.mesh.exchange import (
    AxisName,
    Token,
    check_dtype,
    exchange_bytes,
    make_primitives,
    run_done,
    run_plain,
    run_start,
)
from cmjax.mesh.layout import (
    Layout,
    all_gather_layout,
    all_to_all_layout,
    place_ragged_rows,
    psum_scatter_layout,
)
from cmjax.mesh.settings import (
    CollectivesMode,
    DelayModel,
    FabricError,
    Forms,
    FormStatus,
    RaggedMode,
    Settings,
    lax_ragged_native,
)

Array = jax.Array

_SETTINGS = Settings()
books = TrafficBooks()
record = books.record


def configure(
    *,
    timeout_s: float | None = None,
    ragged: RaggedMode | None = None,
    collectives: CollectivesMode | None = None,
    delay: DelayModel | None | Literal["keep"] = "keep",
) -> None:
    """Changes the settings given, for the whole process.

    Args:
      timeout_s: seconds without progress after which an exchange fails, naming the missing ranks
        (120, or $CMJAX_FABRIC_TIMEOUT_S).
      ragged: form of `ragged_all_to_all` where lax collectives run: "native" (`lax.ragged_all_to_all`), "padded" (an
        `all_to_all` of worst-case size) or "auto".
      collectives: "fabric" (C++), "lax", or "auto". Changing a form drops JAX's caches of compiled programs.
      delay: a `DelayModel`, or None for none.
    """
    _SETTINGS.configure(timeout_s=timeout_s, ragged=ragged, collectives=collectives, delay=delay)


def status() -> dict[str, FormStatus]:
    """The form each collective takes on the default platform ("fabric", "lax" or "lax padded"), and why."""
    return _SETTINGS.status()


# --- Collectives: each with its two halves ---------------------------------------------------------------------------


def all_to_all(
    x: Any,
    axis_name: AxisName,
    split_axis: int,
    concat_axis: int,
    *,
    tiled: bool = False,
    channel: str | None = None,
    plane: str = "ub",
) -> Any:
    """What the ranks sent here, stacked (`tiled`: joined) along `concat_axis`; part r of `x` goes to rank r."""
    arguments = split_axis, concat_axis, tiled
    return _plain("all_to_all", all_to_all_layout, arguments, x, axis_name, channel, plane)


def all_to_all_start(
    x: Any,
    axis_name: AxisName,
    split_axis: int,
    concat_axis: int,
    *,
    tiled: bool = False,
    channel: str | None = None,
    plane: str = "ub",
) -> Any:
    """Starts `all_to_all`: one `Token` per array in `x`."""
    arguments = split_axis, concat_axis, tiled
    return _start("all_to_all", all_to_all_layout, arguments, x, axis_name, channel, plane)


def all_gather(
    x: Any,
    axis_name: AxisName,
    *,
    axis: int = 0,
    tiled: bool = False,
    channel: str | None = None,
    plane: str = "ub",
) -> Any:
    """Every rank's `x`, stacked along a new axis `axis` (`tiled`: joined along it)."""
    return _plain("all_gather", all_gather_layout, (axis, tiled), x, axis_name, channel, plane)


def all_gather_start(
    x: Any,
    axis_name: AxisName,
    *,
    axis: int = 0,
    tiled: bool = False,
    channel: str | None = None,
    plane: str = "ub",
) -> Any:
    """Starts `all_gather`: one `Token` per array in `x`."""
    return _start("all_gather", all_gather_layout, (axis, tiled), x, axis_name, channel, plane)


def psum(x: Any, axis_name: AxisName, *, channel: str | None = None, plane: str = "ub") -> Any:
    """The sum of every rank's `x`, added in rank order (16-bit floats in float32); bool counts as int32."""
    return _plain("psum", _psum_layout, (), _summable(x), axis_name, channel, plane)


def psum_start(x: Any, axis_name: AxisName, *, channel: str | None = None, plane: str = "ub") -> Any:
    """Starts `psum`: one `Token` per array in `x`."""
    return _start("psum", _psum_layout, (), _summable(x), axis_name, channel, plane)


def psum_scatter(
    x: Any,
    axis_name: AxisName,
    *,
    scatter_dimension: int = 0,
    tiled: bool = False,
    channel: str | None = None,
    plane: str = "ub",
) -> Any:
    """This rank's part (along `scatter_dimension`) of the sum of every rank's `x`."""
    arguments = scatter_dimension, tiled
    return _plain("psum_scatter", psum_scatter_layout, arguments, _summable(x), axis_name, channel, plane)


def psum_scatter_start(
    x: Any,
    axis_name: AxisName,
    *,
    scatter_dimension: int = 0,
    tiled: bool = False,
    channel: str | None = None,
    plane: str = "ub",
) -> Any:
    """Starts `psum_scatter`: one `Token` per array in `x`."""
    arguments = scatter_dimension, tiled
    return _start("psum_scatter", psum_scatter_layout, arguments, _summable(x), axis_name, channel, plane)


def ppermute(
    x: Any, axis_name: AxisName, perm: Sequence[tuple[int, int]], *, channel: str | None = None, plane: str = "ub"
) -> Any:
    """The `x` of the rank that `perm`, pairs of (source, destination), sends here; zeros where it sends none."""
    return _plain("ppermute", _ppermute_layout, (perm,), x, axis_name, channel, plane)


def ppermute_start(
    x: Any, axis_name: AxisName, perm: Sequence[tuple[int, int]], *, channel: str | None = None, plane: str = "ub"
) -> Any:
    """Starts `ppermute`: one `Token` per array in `x`."""
    return _start("ppermute", _ppermute_layout, (perm,), x, axis_name, channel, plane)


def done(x: Any, token: Any, hide_behind: Any = None) -> Any:
    """Ends any exchange but a ragged one: its result. Takes the `x` that was started and the token(s) it gave.

    Waits for the arrays in `hide_behind` first.
    """
    return jax.tree.map(lambda leaf, one: _done_leaf(leaf, one, hide_behind), x, token)


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
    d's `output`. `recv_sizes[s * k + j]` is the size of update j of peer s. Rows outside a buffer, and sizes that
    disagree, fail the exchange on every rank. `operand` and `output` may differ in rows only.
    """
    index = _ragged_index(operand, output, (input_offsets, send_sizes, output_offsets, recv_sizes), axis_name)
    if lax.axis_size(axis_name) == 1:
        return place_ragged_rows(operand, output, index[0], index[2], index[1])
    layout = Layout("ragged_all_to_all", lax.axis_size(axis_name))
    params = _params(layout, axis_name, channel, plane)
    return run_plain(_PRIMITIVES["ragged_all_to_all"], layout, params, operand, (output,), index)


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
    index = _ragged_index(operand, operand, (input_offsets, send_sizes, output_offsets, recv_sizes), axis_name)
    layout = Layout("ragged_all_to_all", lax.axis_size(axis_name))
    params = _params(layout, axis_name, channel, plane)
    if layout.num_ranks == 1:
        return Token(jnp.zeros((4,), jnp.int32), index, layout, tuple(sorted(params.items())))
    return run_start(_PRIMITIVES["ragged_all_to_all"], layout, params, operand, index)


def ragged_all_to_all_done(operand: Array, output: Array, token: Token, hide_behind: Any = None) -> Array:
    """Ends `ragged_all_to_all`: `output` with the received rows. Waits for the arrays in `hide_behind` first."""
    if token.layout.num_ranks == 1:
        return place_ragged_rows(operand, output, token.index[0], token.index[2], token.index[1])
    return run_done(_PRIMITIVES["ragged_all_to_all"], token, hide_behind, operand, (output,))


# --- How a call becomes an exchange ----------------------------------------------------------------------------------


def _params(
    layout: Layout, axis_name: AxisName, channel: str | None, plane: str, perm: tuple[tuple[int, int], ...] = ()
) -> dict[str, Any]:
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    return {
        "axis_name": axes,
        "num_ranks": layout.num_ranks,
        "channel": channel,
        "plane": plane,
        "forms": _SETTINGS.forms,
        "perm": perm,
    }


def _leaves(
    name: str,
    make_layout: Callable[..., Layout],
    arguments: tuple[Any, ...],
    x: Any,
    axis_name: AxisName,
    channel: str | None,
    plane: str,
) -> tuple[list[tuple[Array, Layout, dict[str, Any]]], Any]:
    """Each array of `x` with its layout and parameters, and the tree to put results back into."""
    leaves, tree = jax.tree.flatten(x)
    calls = []
    for i, leaf in enumerate(map(jnp.asarray, leaves)):
        check_dtype(name, leaf.dtype)
        layout = make_layout(leaf, lax.axis_size(axis_name), *(() if name == "ppermute" else arguments))
        perm = _checked_perm(arguments[0], layout.num_ranks) if name == "ppermute" else ()
        own_channel = f"{channel}[{i}]" if channel is not None and len(leaves) > 1 else channel
        calls.append((leaf, layout, _params(layout, axis_name, own_channel, plane, perm)))
    return calls, tree


def _plain(name: str, *call: Any) -> Any:
    calls, tree = _leaves(name, *call)
    results = [
        run_plain(_PRIMITIVES[name], layout, params, leaf)
        if layout.num_ranks > 1
        else layout.unpack(_alone(name, layout.pack(leaf), params))
        for leaf, layout, params in calls
    ]
    return jax.tree.unflatten(tree, results)


def _start(name: str, *call: Any) -> Any:
    calls, tree = _leaves(name, *call)
    tokens = [
        run_start(_PRIMITIVES[name], layout, params, leaf)
        if layout.num_ranks > 1
        else Token(jnp.zeros((4,), jnp.int32), (), layout, tuple(sorted(params.items())))
        for leaf, layout, params in calls
    ]
    return jax.tree.unflatten(tree, tokens)


def _done_leaf(x: Any, token: Token, hide_behind: Any) -> Array:
    name = token.layout.name
    leaf = _summable(x) if name.startswith("psum") else jnp.asarray(x)
    if token.layout.num_ranks == 1:
        return token.layout.unpack(_alone(name, token.layout.pack(leaf), dict(token.params)))
    return run_done(_PRIMITIVES[name], token, hide_behind, leaf)


def _alone(name: str, x: Array, params: dict[str, Any]) -> Array:
    """The exchange over an axis of size 1: nothing moves."""
    if name == "psum":
        # Only for its type: with check_vma=True the sum no longer varies over the axis.
        varies = set(params["axis_name"]) & set(jax.typeof(x).mat.varying)
        return lax.psum(x, tuple(sorted(varies))) if varies else x
    if name == "ppermute":
        return x if params["perm"] else jnp.zeros_like(x)
    return {"all_gather": lambda: x[None], "psum_scatter": lambda: x[0]}.get(name, lambda: x)()


def _summable(x: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.int32) if jnp.asarray(leaf).dtype == bool else leaf, x)


def _psum_layout(_: Array, num_ranks: int) -> Layout:
    return Layout("psum", num_ranks)


def _ppermute_layout(_: Array, num_ranks: int) -> Layout:
    return Layout("ppermute", num_ranks)


def _checked_perm(perm: Sequence[tuple[int, int]], num_ranks: int) -> tuple[tuple[int, int], ...]:
    pairs = tuple((int(source), int(target)) for source, target in perm)
    for what, ranks in (("source", [s for s, _ in pairs]), ("destination", [d for _, d in pairs])):
        if len(set(ranks)) != len(ranks) or not all(0 <= rank < num_ranks for rank in ranks):
            raise ValueError(f"fabric.ppermute: {what} ranks must be distinct and in [0, {num_ranks}), got {ranks}")
    return pairs


def _ragged_index(
    operand: Array, output: Array, index: tuple[Array, ...], axis_name: AxisName
) -> tuple[Array, ...]:
    check_dtype("ragged_all_to_all", operand.dtype)
    if operand.dtype != output.dtype or operand.ndim < 1 or operand.shape[1:] != output.shape[1:]:
        raise ValueError(
            f"fabric.ragged_all_to_all: operand {operand.dtype}{operand.shape} and output {output.dtype}{output.shape} "
            "may differ in rows only"
        )
    shapes = {jnp.shape(array) for array in index}
    num_ranks = lax.axis_size(axis_name)
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or shape[0] == 0 or shape[0] % num_ranks:
        raise ValueError(
            "fabric.ragged_all_to_all: offsets and sizes must be four vectors of one length, a multiple of the "
            f"{num_ranks} ranks, got shapes {[jnp.shape(array) for array in index]}"
        )
    if not all(jnp.issubdtype(array.dtype, jnp.integer) for array in index):
        raise TypeError(
            f"fabric.ragged_all_to_all: offsets and sizes must be integers, got {[array.dtype.name for array in index]}"
        )
    wide = any(array.dtype.itemsize == 8 for array in index)
    return tuple(array.astype(jnp.int64 if wide else jnp.int32) for array in index)


# --- Lowerings -------------------------------------------------------------------------------------------------------


def _lower_native(
    ctx: mlir.LoweringRuleContext,
    half: Literal["plain", "start", "done"],
    collective: int,
    aliases: dict[int, int],
    channel: str,
    operands: Sequence[Any],
    params: dict[str, Any],
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


def _lax_ragged(*operands: Array, axis_name: tuple[str, ...], forms: Forms, **_: Any) -> Array:
    if lax_ragged_native(jax.default_backend(), forms.ragged):
        return lax.ragged_all_to_all(*operands, axis_name=axis_name)
    return _padded_ragged(*operands, axis_name=axis_name)


def _padded_ragged(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: tuple[str, ...],
) -> Array:
    """Every update in a slot of the worst-case size, one `all_to_all`, and the rows that exist put in place."""
    num_ranks, num_rows = lax.axis_size(axis_name), min(operand.shape[0], output.shape[0])
    rows = jnp.clip(input_offsets[:, None] + jnp.arange(num_rows), 0, max(operand.shape[0] - 1, 0))
    slots = operand[rows].reshape(num_ranks, -1, *operand.shape[1:])  # [ranks, updates * rows, ...]
    received = lax.all_to_all(slots, axis_name, 0, 0).reshape(-1, *operand.shape[1:])
    offsets = lax.all_to_all(output_offsets.reshape(num_ranks, -1), axis_name, 0, 0).reshape(-1)
    starts = jnp.arange(offsets.shape[0], dtype=offsets.dtype) * num_rows
    return place_ragged_rows(received, output, starts, offsets, recv_sizes)


_LAX_FORMS: dict[str, Callable[..., Array]] = {
    "all_to_all": lambda x, *, axis_name, **_: lax.all_to_all(x, axis_name, 0, 0),
    "all_gather": lambda x, *, axis_name, **_: lax.all_gather(x, axis_name),
    "psum": lambda x, *, axis_name, **_: lax.psum(x, axis_name),
    "psum_scatter": lambda x, *, axis_name, **_: lax.psum_scatter(x, axis_name),
    "ppermute": lambda x, *, axis_name, perm, **_: lax.ppermute(x, axis_name, perm),
    "ragged_all_to_all": _lax_ragged,
}
_PRIMITIVES = {name: make_primitives(name, form, _lower_native, _SETTINGS) for name, form in _LAX_FORMS.items()}


# --- Uninitialised memory --------------------------------------------------------------------------------------------


def empty(shape: Sequence[int], dtype: Any) -> Array:
    """An array whose contents are whatever the memory held: nothing is cleared, and untouched pages cost nothing."""
    return _EMPTY.bind(shape=tuple(shape), dtype=jnp.dtype(dtype))


def _lower_empty(ctx: mlir.LoweringRuleContext, **_: Any) -> Sequence[Any]:
    # The side effect keeps two of them from becoming one, and one in a loop from leaving it: either would cost a copy.
    if _SETTINGS.native().library is None:
        return _lower_lax_empty(ctx, **_)
    return jax.ffi.ffi_lowering("cmjax_fabric_empty", has_side_effect=True)(ctx)


def _lower_lax_empty(ctx: mlir.LoweringRuleContext, *, shape: tuple[int, ...], dtype: np.dtype) -> Sequence[Any]:
    return mlir.lower_fun(lambda: lax.empty(shape, dtype), multiple_results=False)(ctx)


_EMPTY = Primitive("fabric_empty")
_EMPTY.def_abstract_eval(lambda *, shape, dtype: jax.core.ShapedArray(shape, dtype))
_EMPTY.def_impl(lambda **params: jax.jit(lambda: _EMPTY.bind(**params))())
mlir.register_lowering(_EMPTY, _lower_lax_empty, cacheable=False)
mlir.register_lowering(_EMPTY, _lower_empty, platform="cpu", cacheable=False)
