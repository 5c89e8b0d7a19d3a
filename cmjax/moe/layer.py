"""One MoE layer on one rank: gate, dispatch, shared experts, expert FFN, combine; in a row, or with work in between."""

import dataclasses
import math
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.moe.exchange import Exchange, InFlight, ReceivedRows, SplitExchange, WholeExchange, after_start
from cmjax.moe.experts import Experts, MlpParams, block_rows, expert_ffn, swiglu
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


@flax.struct.dataclass
class Routed:
    """Tokens `x[tokens, hidden]`, where they go and how much that counts: see `route_to_slots`."""

    x: jax.Array
    slot_idx: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class Returning:
    """Rows on their way back from the experts, how many each local expert received (`int32[local experts]`), and what
    the layer's own shared experts made of the tokens."""

    in_flight: InFlight[jax.Array]
    num_tokens_per_expert: jax.Array
    shared: jax.Array | None


def shared_ffn(x: jax.Array, shared: MlpParams) -> jax.Array:
    """Shared experts that are here, one MLP, over `x[tokens, hidden]`: `float32[tokens, hidden]`."""
    with jax.named_scope("shared_expert"):
        return swiglu(x, shared.w13, shared.w2).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class MoeLayer:
    """A MoE layer as this rank's tokens go through it: `route`, `dispatch`, `run`, `combine`; called, all in a row.

    Attributes:
        router: of this layer.
        experts: this rank's slots of all layers, of which `layer` is this one.
        shared: this layer's shared experts, where every rank has a copy of them.
        exchange: how rows travel; a `SplitExchange`, where the stages are called one by one.
        channel: the name of its exchanges.
    """

    router: LayerRouter
    experts: Experts
    layer: jax.Array | int
    shared: MlpParams | None
    exchange: Exchange
    channel: str

    def __call__(self, x: jax.Array, is_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the experts, shared ones included, make of `x[tokens, hidden]`, `float32[tokens, hidden]`, and the rows
        each local expert received, `int32[local experts]`. Tokens not `is_valid`, `bool[tokens]`, go to no expert."""
        layer = dataclasses.replace(self, exchange=WholeExchange(self.exchange))
        routed = layer.route(x, is_valid)
        returning = layer.run(routed, layer.dispatch(routed))
        return layer.combine(returning), returning.num_tokens_per_expert

    def route(self, x: jax.Array, is_valid: jax.Array) -> Routed:
        """Choose experts."""
        with jax.named_scope("gate"):
            one = self.router
            return Routed(x, *route_to_slots(x, one.weight, one.bias, one.config, one.expert_to_slot, is_valid))

    def dispatch(self, routed: Routed) -> InFlight[tuple[ReceivedRows, Any]]:
        """Send the rows to their experts."""
        with jax.named_scope("dispatch"):
            exchange = cast(SplitExchange, self.exchange)
            return exchange.dispatch_start(routed.x, routed.slot_idx, channel=f"{self.channel}/dispatch")

    def run(self, routed: Routed, in_flight: InFlight[tuple[ReceivedRows, Any]], hide_behind: Any = None) -> Returning:
        """Receive rows behind the shared experts and the tree of arrays `hide_behind`, run the experts over them, and
        send the outputs back."""
        shared = None if self.shared is None else shared_ffn(after_start(in_flight, routed.x), self.shared)
        with jax.named_scope("dispatch"):
            received, handle = in_flight.done((shared, hide_behind))
        with jax.named_scope("moe"):
            num_choices, num_slots = math.prod(routed.slot_idx.shape), self.experts.w13.shape[1]
            # A rank can expect to receive as many rows as it sends; an expert gets each token at most once.
            max_rows = max(1, received.messages.shape[0] // min(routed.slot_idx.shape[1], num_slots))
            rows = expert_ffn(
                received,
                self.experts,
                self.layer,
                rows_per_block=block_rows(num_choices, num_slots, max_rows),
                expected_rows=num_choices,
                dtype=routed.x.dtype,
            )
        with jax.named_scope("combine"):
            exchange = cast(SplitExchange, self.exchange)
            back = exchange.combine_start(rows, routed.weights, handle, channel=f"{self.channel}/combine")
        return Returning(back, received.num_tokens_per_expert, shared)

    def combine(self, returning: Returning, hide_behind: Any = None) -> jax.Array:
        """Receive the outputs behind `hide_behind` and sum them, see `__call__`."""
        with jax.named_scope("combine"):
            y = returning.in_flight.done(hide_behind)
            return y if returning.shared is None else y + returning.shared
