"""The expert layer on one device with a derivative: what `MoeLayer` computes, in static shapes.

`expert_ffn` loops over what was received, a trip count known only at run time, which JAX cannot differentiate in
reverse. Here the chosen rows are laid out by expert in blocks of a fixed size, each expert's last block filled up, in
a buffer that holds every possible choice: nothing is dropped, whatever the balance.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from cmjax.moe import MlpParams, RouterConfig, pack_choices, route
from cmjax.quant import einsum_f32


@flax.struct.dataclass
class BlockLayout:
    """Where each choice stands in the blocks.

    Attributes:
        row_token: `int32[rows]`, the token of each row; `tokens` for a row that only fills a block up.
        choice_row: `int32[tokens, topk]`, the row of each choice.
        block_expert: `int32[blocks]`, whose rows a block holds.
        num_tokens_per_expert: `int32[experts]`.
    """

    row_token: jax.Array
    choice_row: jax.Array
    block_expert: jax.Array
    num_tokens_per_expert: jax.Array


def block_layout(topk_idx: jax.Array, num_experts: int, rows_per_block: int) -> BlockLayout:
    """Lay the choices `topk_idx int32[tokens, topk]` out in blocks of one expert each."""
    tokens, num_topk = topk_idx.shape
    num_choices = tokens * num_topk
    # Each expert leaves at most one block unfinished.
    num_blocks = num_choices // rows_per_block + min(num_experts, num_choices)
    _, choice_pos, offsets, counts = pack_choices(topk_idx, num_experts)
    last_block = jnp.cumsum(-(-counts // rows_per_block))
    first_row = (last_block + (counts // -rows_per_block)) * rows_per_block
    choice_row = choice_pos + (first_row - offsets)[topk_idx]
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], topk_idx.shape)
    row_token = jnp.full(num_blocks * rows_per_block, tokens, jnp.int32)
    row_token = row_token.at[choice_row].set(token, unique_indices=True)
    block_expert = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right").astype(jnp.int32)
    return BlockLayout(
        row_token=row_token,
        choice_row=choice_row,
        block_expert=jnp.minimum(block_expert, num_experts - 1),
        num_tokens_per_expert=counts,
    )


# Each is the other's transpose, and both are gathers: a scatter of whole rows would run on one core.
@jax.custom_vjp
def _to_rows(x: jax.Array, layout: BlockLayout) -> jax.Array:
    """`x[tokens, width]` -> `[rows, width]`, zero where a row fills up."""
    return jnp.take(x, layout.row_token, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _sum_rows(rows: jax.Array, layout: BlockLayout) -> jax.Array:
    """`rows[rows, width]` -> `[tokens, width]`, the sum over each token's choices."""
    return functools.reduce(jnp.add, (jnp.take(rows, index, axis=0, mode="clip") for index in layout.choice_row.T))


_to_rows.defvjp(lambda x, layout: (_to_rows(x, layout), layout), lambda layout, ct: (_sum_rows(ct, layout), None))
_sum_rows.defvjp(lambda x, layout: (_sum_rows(x, layout), layout), lambda layout, ct: (_to_rows(ct, layout), None))


def expert_ffn_blocks(
    x: jax.Array, topk_weights: jax.Array, layout: BlockLayout, w13: jax.Array, w2: jax.Array
) -> jax.Array:
    """Return the weighted sum of the chosen experts' outputs, `float32[tokens, hidden]`.

    Args:
        x: `[tokens, hidden]`.
        topk_weights: `float32[tokens, topk]`.
        layout: of the choices.
        w13: `[experts, 2f, hidden]`.
        w2: `[experts, hidden, f]`.
    """
    num_blocks = layout.block_expert.shape[0]

    # The rows and each block's copy of its expert are made again for the backward pass: they are far larger than what
    # they are made of.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("narrow"))
    def ffn(x: jax.Array, topk_weights: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
        rows = _to_rows(x, layout).reshape(num_blocks, -1, x.shape[1])
        gate_up = checkpoint_name(einsum_f32("grh,gfh->grf", rows, w13[layout.block_expert]), "narrow")
        gate, up = jnp.split(gate_up, 2, axis=-1)
        # A row's weight goes in where the row is narrow.
        row_weights = _row_weights(topk_weights, layout).reshape(num_blocks, -1, 1)
        y = einsum_f32("grf,ghf->grh", jax.nn.silu(gate) * up * row_weights, w2[layout.block_expert])
        return _sum_rows(y.reshape(-1, x.shape[1]), layout)

    return ffn(x, topk_weights, w13, w2)


def _row_weights(topk_weights: jax.Array, layout: BlockLayout) -> jax.Array:
    """The weight of each row, `float32[rows]`, 0 where a row fills up."""
    weights = jnp.zeros(layout.row_token.shape[0], jnp.float32)
    return weights.at[layout.choice_row.reshape(-1)].set(topk_weights.reshape(-1), unique_indices=True)


@functools.partial(jax.jit, static_argnames=("config", "rows_per_block"))
def moe_ffn_blocks(
    x: jax.Array,
    router: jax.Array,
    router_bias: jax.Array | None,
    experts: MlpParams,
    layer: jax.Array | int,
    *,
    config: RouterConfig,
    rows_per_block: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """The routed experts on one device, with a derivative: `(float32[tokens, hidden], tokens of each int32[experts])`.

    The router's bias takes part in the choice alone, so it has no gradient (loss-free balancing moves it).
    """
    with jax.named_scope("gate"):
        topk_idx, topk_weights = route(x, router, router_bias, config)
        layout = block_layout(lax.stop_gradient(topk_idx), config.num_experts, rows_per_block)
    with jax.named_scope("moe"):
        y = expert_ffn_blocks(x, topk_weights, layout, experts.w13[layer], experts.w2[layer])
    return y, layout.num_tokens_per_expert
