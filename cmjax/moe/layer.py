"""One MoE layer on one rank: gate, dispatch, expert FFN, combine."""

import math

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.moe.exchange import Exchange, ReceivedRows
from cmjax.moe.experts import Experts, block_rows, expert_ffn
from cmjax.moe.router import RouterConfig, route_to_slots
from cmjax.quant import Matrix


@flax.struct.dataclass
class LayerRouter:
    """A layer's router, and where its choices are on this rank.

    Attributes:
        weight, bias: see `route`.
        expert_to_slot: `int32[logical]`, this source rank's row of the placement: routed experts, then the shared ones
            that have ranks of their own.
        config: how scores become choices.
    """

    weight: Matrix
    bias: jax.Array | None
    expert_to_slot: jax.Array
    config: RouterConfig = flax.struct.field(pytree_node=False)

    def slots(self, x: jax.Array, is_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the rows of `x[tokens, hidden]` go, and how much they count, see `route_to_slots`; tokens that are not
        `is_valid`, `bool[tokens]`, go nowhere."""
        with jax.named_scope("gate"):
            return route_to_slots(x, self.weight, self.bias, self.config, self.expert_to_slot, is_valid)


def run_experts(
    received: ReceivedRows,
    experts: Experts,
    layer: jax.Array | int,
    choices_shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """The FFN over what a dispatch of `choices_shape`, `(tokens, topk)`, delivered: see `expert_ffn`."""
    with jax.named_scope("moe"):
        num_choices, num_slots = math.prod(choices_shape), experts.w13.shape[1]
        # A rank can expect to receive as many rows as it sends; an expert gets each token at most once.
        max_rows = max(1, received.messages.shape[0] // min(choices_shape[1], num_slots))
        rows_per_block = block_rows(num_choices, num_slots, max_rows)
        return expert_ffn(
            received, experts, layer, rows_per_block=rows_per_block, expected_rows=num_choices, dtype=dtype
        )


def moe_ffn(
    x: jax.Array,
    is_valid: jax.Array,
    router: LayerRouter,
    experts: Experts,
    layer: jax.Array | int,
    *,
    exchange: Exchange,
    channel: str,
) -> tuple[jax.Array, jax.Array]:
    """Route, dispatch, compute and combine `x[tokens, hidden]`.

    Args:
        is_valid: `bool[tokens]`; a padding token goes nowhere.
        router: of this layer.
        experts: this rank's slots of all layers, of which `layer` is this one.

    Returns:
        `(float32[tokens, hidden], int32[local experts])`: the sum of the chosen experts' outputs (those of shared
        experts that are reached through dispatch included), and the rows each local expert received.
    """
    slot_idx, weights = router.slots(x, is_valid)
    with jax.named_scope("dispatch"):
        received, handle = exchange.dispatch(x, slot_idx, channel=f"{channel}/dispatch")
    rows = run_experts(received, experts, layer, slot_idx.shape, x.dtype)
    with jax.named_scope("combine"):
        y = exchange.combine(rows, weights, handle, channel=f"{channel}/combine")
    return y, received.num_tokens_per_expert
