"""Mixture of experts: router, placement, dispatch, expert FFN, combine. Usable alone inside `jax.shard_map`."""

from cmjax.moe.dispatch import (
    CombineInFlight,
    DispatchHandle,
    DispatchInFlight,
    ReceivedRows,
    buffer_bytes,
    combine,
    combine_done,
    combine_start,
    dispatch,
    dispatch_done,
    dispatch_start,
    max_tokens,
)
from cmjax.moe.experts import ExpertParams, block_rows, expert_ffn, swiglu
from cmjax.moe.layer import Exchange, FabricExchange, SplitExchange, gate, moe_ffn, routed_choices, run_experts
from cmjax.moe.placement import ExpertPlacement
from cmjax.moe.router import RouterConfig, Scoring, TopkMethod, route
from cmjax.moe.wire import WireDtype, message_bytes, pack_rows, unpack_int8, unpack_rows

__all__ = [
    "CombineInFlight",
    "DispatchHandle",
    "DispatchInFlight",
    "Exchange",
    "ExpertParams",
    "ExpertPlacement",
    "FabricExchange",
    "ReceivedRows",
    "RouterConfig",
    "Scoring",
    "SplitExchange",
    "TopkMethod",
    "WireDtype",
    "block_rows",
    "buffer_bytes",
    "combine",
    "combine_done",
    "combine_start",
    "dispatch",
    "dispatch_done",
    "dispatch_start",
    "expert_ffn",
    "gate",
    "max_tokens",
    "message_bytes",
    "moe_ffn",
    "pack_rows",
    "route",
    "routed_choices",
    "run_experts",
    "swiglu",
    "unpack_int8",
    "unpack_rows",
]
