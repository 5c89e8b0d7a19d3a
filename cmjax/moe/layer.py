"""One MoE layer on one rank: gate, dispatch, expert FFN, combine."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from cmjax.moe.dispatch import (
    CombineInFlight,
    DispatchHandle,
    DispatchInFlight,
    ReceivedRows,
    combine_done,
    combine_start,
    dispatch_done,
    dispatch_start,
)
from cmjax.moe.experts import ExpertParams, block_rows, expert_ffn
from cmjax.moe.router import RouterConfig, route
from cmjax.moe.wire import WireDtype, check_wire_dtype
from cmjax.quant import Matrix


class Exchange(Protocol):
    """How rows reach their experts and come back: what a replacement of dispatch and combine has to offer.

    An exchange is built once for an instance, with the arguments of `FabricExchange`, and called inside `shard_map`; it
    must be hashable, since the compiled step is keyed by it.
    """

    def dispatch(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> tuple[ReceivedRows, Any]:
        """Deliver `x[tokens, hidden]` to the slots `slot_idx int32[tokens, topk]` (-1: none), with a handle."""
        ...

    def combine(self, rows: jax.Array, topk_weights: jax.Array, handle: Any, *, channel: str) -> jax.Array:
        """Return the weighted sum of each token's outputs at its source, `float32[tokens, hidden]`."""
        ...


@runtime_checkable
class SplitExchange(Exchange, Protocol):
    """An exchange in two halves each, which microbatches need: work placed between them hides it."""

    def dispatch_start(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> Any:
        """First half of `dispatch`: something with a `token`, for `fabric.after`."""
        ...

    def dispatch_done(self, in_flight: Any, hide_behind: Any = None) -> tuple[ReceivedRows, Any]:
        """Second half of `dispatch`, once the arrays of `hide_behind` are there."""
        ...

    def combine_start(self, rows: jax.Array, topk_weights: jax.Array, handle: Any, *, channel: str) -> Any:
        """First half of `combine`."""
        ...

    def combine_done(self, in_flight: Any, hide_behind: Any = None) -> jax.Array:
        """Second half of `combine`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FabricExchange:
    """The default exchange: counts, then only the rows that exist, over the fabric."""

    axis_name: str
    num_local_experts: int
    dispatch_dtype: WireDtype | None = None
    combine_dtype: WireDtype | None = None

    def __post_init__(self) -> None:
        check_wire_dtype("dispatch_dtype", self.dispatch_dtype, allow_int8=True)
        check_wire_dtype("combine_dtype", self.combine_dtype, allow_int8=False)

    def dispatch_start(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> DispatchInFlight:
        """First half of `dispatch`."""
        return dispatch_start(
            x,
            slot_idx,
            axis_name=self.axis_name,
            num_local_experts=self.num_local_experts,
            dispatch_dtype=self.dispatch_dtype,
            channel=channel,
        )

    def dispatch_done(
        self, in_flight: DispatchInFlight, hide_behind: Any = None
    ) -> tuple[ReceivedRows, DispatchHandle]:
        """Second half of `dispatch`."""
        return dispatch_done(in_flight, hide_behind=hide_behind)

    def dispatch(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> tuple[ReceivedRows, DispatchHandle]:
        """See `cmjax.moe.dispatch`."""
        return self.dispatch_done(self.dispatch_start(x, slot_idx, channel=channel))

    def combine_start(
        self, rows: jax.Array, topk_weights: jax.Array, handle: DispatchHandle, *, channel: str
    ) -> CombineInFlight:
        """First half of `combine`."""
        return combine_start(
            rows,
            topk_weights,
            handle,
            axis_name=self.axis_name,
            combine_dtype=self.combine_dtype,
            channel=channel,
        )

    def combine_done(self, in_flight: CombineInFlight, hide_behind: Any = None) -> jax.Array:
        """Second half of `combine`."""
        return combine_done(in_flight, hide_behind=hide_behind)

    def combine(self, rows: jax.Array, topk_weights: jax.Array, handle: DispatchHandle, *, channel: str) -> jax.Array:
        """See `cmjax.moe.combine`."""
        return self.combine_done(self.combine_start(rows, topk_weights, handle, channel=channel))


def routed_choices(
    topk_idx: jax.Array, topk_weights: jax.Array, expert_to_slot: jax.Array, is_valid: jax.Array, num_shared: int
) -> tuple[jax.Array, jax.Array]:
    """Turn logical choices into slots and add the shared experts that are reached through dispatch.

    Args:
        topk_idx, topk_weights: `[tokens, topk]` from the router.
        expert_to_slot: `int32[logical]`, this source rank's row of the placement.
        is_valid: `bool[tokens]`; a padding token goes nowhere.
        num_shared: shared experts with ranks of their own; each gets every token, with weight 1.

    Returns:
        `(slot_idx int32[tokens, topk + num_shared], weights float32 of the same shape)`.
    """
    tokens = topk_idx.shape[0]
    num_routed = expert_to_slot.shape[0] - num_shared
    slots = jnp.take(expert_to_slot, topk_idx, axis=0)
    if num_shared:
        shared = jnp.broadcast_to(expert_to_slot[num_routed:], (tokens, num_shared))
        slots = jnp.concatenate([slots, shared], axis=1)
        topk_weights = jnp.concatenate([topk_weights, jnp.ones((tokens, num_shared), jnp.float32)], axis=1)
    return jnp.where(is_valid[:, None], slots, -1), topk_weights


def gate(
    x: jax.Array,
    router: Matrix,
    router_bias: jax.Array | None,
    expert_to_slot: jax.Array,
    is_valid: jax.Array,
    *,
    router_config: RouterConfig,
    num_dispatched_shared: int,
) -> tuple[jax.Array, jax.Array]:
    """Where the rows of `x[tokens, hidden]` go: `(slot_idx, weights)` of `routed_choices`."""
    with jax.named_scope("gate"):
        topk_idx, topk_weights = route(x, router, router_bias, router_config)
        return routed_choices(topk_idx, topk_weights, expert_to_slot, is_valid, num_dispatched_shared)


def run_experts(
    received: ReceivedRows,
    experts: ExpertParams,
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
    router: Matrix,
    router_bias: jax.Array | None,
    experts: ExpertParams,
    layer: jax.Array | int,
    expert_to_slot: jax.Array,
    is_valid: jax.Array,
    *,
    router_config: RouterConfig,
    exchange: Exchange,
    num_dispatched_shared: int,
    channel: str,
) -> tuple[jax.Array, jax.Array]:
    """Route, dispatch, compute and combine `x[tokens, hidden]`.

    Returns:
        `(float32[tokens, hidden], int32[local experts])`: the sum of the chosen experts' outputs (those of shared
        experts that are reached through dispatch included), and the rows each local expert received.
    """
    slot_idx, weights = gate(
        x,
        router,
        router_bias,
        expert_to_slot,
        is_valid,
        router_config=router_config,
        num_dispatched_shared=num_dispatched_shared,
    )
    with jax.named_scope("dispatch"):
        received, handle = exchange.dispatch(x, slot_idx, channel=f"{channel}/dispatch")
    rows = run_experts(received, experts, layer, slot_idx.shape, x.dtype)
    with jax.named_scope("combine"):
        y = exchange.combine(rows, weights, handle, channel=f"{channel}/combine")
    return y, received.num_tokens_per_expert
