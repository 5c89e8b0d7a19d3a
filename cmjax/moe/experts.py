"""The expert FFN over the rows that were really received."""

import dataclasses
from typing import Generic, TypeAlias, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.kernels import Weights, expert_mlp
from cmjax.loops import dynamic_loop
from cmjax.mesh import fabric
from cmjax.moe.exchange import ReceivedRows
from cmjax.moe.wire import WireDtype, padded_row
from cmjax.quant import AnyArray, Matrix, QuantArray, QuantizedRows, QuantMode, linear, matrix_at

# What stands for an array in a tree of parameters: one of jax's, one of numpy's (on the host), a `jax.ShapeDtypeStruct`
# (abstract), a `PartitionSpec`; for a large matrix also a `QuantArray` or an `InputMajor` of those.
Leaf = TypeVar("Leaf")


@flax.struct.dataclass
class MlpParams(Generic[Leaf]):
    """Gated MLPs, stacked over layers; of experts with a second axis, by logical id or by slot.

    Attributes:
        w13: `[layers, (experts,) 2f, hidden]`: the gate's rows, then the up projection's.
        w2: `[layers, (experts,) hidden, f]`.
    """

    w13: Leaf
    w2: Leaf


Experts: TypeAlias = MlpParams[AnyArray | QuantArray]


def swiglu(x: jax.Array | QuantizedRows, w13: Matrix, w2: Matrix) -> jax.Array:
    """Return `w2 (silu(gate) * up)`, `[rows, hidden]`, for `x[rows, hidden]`, `w13[2f, hidden]`, `w2[hidden, f]`."""
    gate, up = jnp.split(linear(x, w13), 2, axis=-1)
    return linear(jax.nn.silu(gate) * up, w2)


def block_rows(num_rows: int, num_experts: int, max_rows: int) -> int:
    """Rows that the FFN takes at a time: a power of two near the mean rows of an expert, 8 to 128, at most `max_rows`.

    Small blocks waste little where experts receive few rows; large ones read the weights less often. Where most experts
    that receive a row receive one, it goes alone: such a product takes half the time of one of several rows.

    Args:
        num_rows: rows that a rank can expect.
        num_experts: local experts they go to.
        max_rows: most rows that one expert can receive.
    """
    if 2 * num_rows <= num_experts:
        return 1
    mean = max(1, num_rows // max(1, num_experts))
    return min(128, max(8, _power_of_two(mean)), _power_of_two(max_rows))


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


# A full block for a few rows left over would cost as much as for many; from this size up they get quarter blocks.
_SPLIT_FROM = 32


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What the XLA form of the expert FFN has to know beside its arrays; see `expert_ffn`."""

    rows_per_block: int
    expected_rows: int
    dtype: np.dtype
    wire: WireDtype | None
    mode: QuantMode | None


def expert_ffn(
    received: ReceivedRows,
    params: Experts,
    layer: jax.Array | int,
    *,
    rows_per_block: int,
    expected_rows: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """Run each local expert over its rows: `[receive rows, hidden]` in `dtype`, laid out as received.

    Rows that do not exist are not written (the result is uninitialized there). The XLA form loops over blocks whose
    trip counts are what was received; what a block reads beyond its expert's rows is thrown away.

    Args:
        received: the dispatched rows.
        params: this rank's slots.
        layer: index into the layers of `params`.
        rows_per_block: see `block_rows`.
        expected_rows: rows that a rank can expect to receive.
    """
    mode = params.w13.mode if isinstance(params.w13, QuantArray) else None
    spec = _Blocks(rows_per_block, expected_rows, np.dtype(dtype), received.wire, mode)
    messages, counts = received.messages, received.num_tokens_per_expert
    w13, w2 = (_weights(matrix) for matrix in (params.w13, params.w2))
    if mode == "fake":
        return _expert_ffn_form(messages, counts, layer, w13, w2, spec)
    scale_at = padded_row(params.w2.shape[2])
    arguments = (messages, counts, layer, w13, w2, spec)
    return expert_mlp(_expert_ffn_form, *arguments, dtype=spec.dtype, scale_at=scale_at)


def _weights(matrix: AnyArray | QuantArray) -> Weights:
    return (matrix.qvalue, matrix.scale) if isinstance(matrix, QuantArray) else (matrix, None)


def _expert_ffn_form(
    messages: jax.Array,
    counts: jax.Array,
    layer: jax.Array | int,
    w13: Weights,
    w2: Weights,
    spec: _Blocks,
) -> jax.Array:
    """The XLA form of `kernels.expert_mlp`."""

    def matrix(weights: Weights) -> AnyArray | QuantArray:
        values, scale = weights
        return values if scale is None or spec.mode is None else QuantArray(values, scale, spec.mode)

    received, params = ReceivedRows(messages, counts, spec.wire), MlpParams(matrix(w13), matrix(w2))
    capacity = messages.shape[0]
    large = min(spec.rows_per_block, capacity)
    starts = jnp.cumsum(counts) - counts
    out = fabric.empty((capacity, params.w2.shape[2]), spec.dtype)
    num_large = -(-counts // large)
    num_slots = params.w2.shape[1]
    expected = max(1, spec.expected_rows // large)
    if large >= _SPLIT_FROM:
        is_short = counts % large <= large // 2
        num_large = jnp.where(is_short, counts // large, num_large)
        rest = jnp.where(is_short, counts % large, 0)
        out = _run_blocks(out, received, params, layer, starts + num_large * large, rest, large // 4, num_slots)
    return _run_blocks(out, received, params, layer, starts, jnp.minimum(counts, num_large * large), large, expected)


def _run_blocks(
    out: jax.Array,
    received: ReceivedRows,
    params: Experts,
    layer: jax.Array | int,
    starts: jax.Array,
    counts: jax.Array,
    rows: int,
    expected_trips: int,
) -> jax.Array:
    """Run expert e over the rows `[starts[e], starts[e] + counts[e])`, in blocks of `rows`; return `out` with them."""
    messages = received.messages
    capacity, width = messages.shape
    num_slots, hidden = params.w2.shape[1:3]
    blocks = -(-counts // rows)
    last_block = jnp.cumsum(blocks)
    first_block = last_block - blocks

    def body(block: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.minimum(jnp.sum(block >= last_block), num_slots - 1)
        start = starts[expert] + (block - first_block[expert]) * rows
        # At the end of the buffer the block is moved back to fit; rows that are not this block's are kept as they were.
        begin = jnp.minimum(start, capacity - rows)
        row = begin + jnp.arange(rows)
        is_mine = (row >= start) & (row < starts[expert] + counts[expert])
        part = lax.dynamic_slice(messages, (begin, 0), (rows, width))
        unpack = received.unpack_int8 if isinstance(params.w13, QuantArray) else received.unpack
        x = unpack(part, hidden, out.dtype)
        w13, w2 = matrix_at(params.w13, layer, expert), matrix_at(params.w2, layer, expert)
        before = lax.dynamic_slice(out, (begin, 0), (rows, hidden))
        y = jnp.where(is_mine[:, None], swiglu(x, w13, w2), before)
        return lax.dynamic_update_slice(out, y, (begin, 0))

    return dynamic_loop(0, last_block[-1], body, out, expected_trips=expected_trips)
