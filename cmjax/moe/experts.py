"""The expert FFN over the rows that were really received."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from cmjax.mesh import fabric
from cmjax.moe.dispatch import ReceivedRows
from cmjax.quant import linear


@flax.struct.dataclass
class ExpertParams:
    """SwiGLU experts by slot, stacked over layers: `w13[layers, slots, 2f, hidden]` (gate rows, then up rows) and
    `w2[layers, slots, hidden, f]`."""

    w13: jax.Array
    w2: jax.Array


def swiglu(x: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """Return `silu(gate) * up` through `w2`: `[rows, hidden]` for `x[rows, hidden]`, `w13[2f, hidden]`, `w2[hidden, f]`."""
    gate, up = jnp.split(linear(x, w13), 2, axis=-1)
    return linear(jax.nn.silu(gate) * up, w2)


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows that the FFN takes at a time: a power of two near the mean rows of an expert, 8 to 128.

    Small blocks waste little where experts receive few rows; large ones read the weights less often.
    """
    mean = max(1, num_rows // max(1, num_experts))
    return min(128, max(8, 1 << (mean - 1).bit_length()))


def expert_ffn(
    received: ReceivedRows,
    params: ExpertParams,
    layer: jax.Array | int,
    *,
    rows_per_block: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """Run each local expert over its rows: `[receive rows, hidden]` in `dtype`, laid out as received.

    A loop over blocks whose trip count is what was received: rows that do not exist are neither read nor written (the
    result is uninitialized there). The expected trip count is `rows / rows_per_block` plus half an expert's block.

    Args:
        received: the dispatched rows.
        params: this rank's slots.
        layer: index into the layers of `params`.
        rows_per_block: see `block_rows`.
    """
    messages, counts = received.messages, received.num_tokens_per_expert
    capacity, width = messages.shape
    rows = min(rows_per_block, capacity)
    num_slots, hidden = params.w2.shape[1], params.w2.shape[2]
    starts = jnp.cumsum(counts) - counts
    blocks = -(-counts // rows)
    last_block = jnp.cumsum(blocks)
    first_block = last_block - blocks

    def body(block: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.minimum(jnp.sum(block >= last_block), num_slots - 1)
        start = starts[expert] + (block - first_block[expert]) * rows
        # Groups lie without gaps, so an expert's last block reaches into the next expert's rows: what it writes there
        # is overwritten when their own blocks follow. At the end of the buffer the block is moved back to fit; the
        # rows it then repeats belong to earlier blocks, and are kept.
        clamped = jnp.minimum(start, capacity - rows)
        x = received.unpack(lax.dynamic_slice(messages, (clamped, 0), (rows, width)), dtype)
        w13 = lax.dynamic_slice(params.w13, (layer, expert, 0, 0), (1, 1, *params.w13.shape[2:]))[0, 0]
        w2 = lax.dynamic_slice(params.w2, (layer, expert, 0, 0), (1, 1, *params.w2.shape[2:]))[0, 0]
        y = swiglu(x, w13, w2)
        before = lax.dynamic_slice(out, (clamped, 0), (rows, hidden))
        y = jnp.where((clamped + jnp.arange(rows) < start)[:, None], before, y)
        return lax.dynamic_update_slice(out, y, (clamped, 0))

    out = fabric.empty((capacity, hidden), dtype)
    return lax.fori_loop(0, last_block[-1], body, out)
