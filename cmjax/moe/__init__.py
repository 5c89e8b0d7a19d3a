"""Mixture of experts: router, placement, dispatch, expert FFN, combine. Usable alone inside `jax.shard_map`."""

from cmjax.kernels import RouterConfig, Scoring, TopkMethod
from cmjax.moe.dispatch import (
    DispatchHandle,
    DispatchInFlight,
    FabricExchange,
    buffer_bytes,
    combine,
    dispatch,
    laid_out,
    max_tokens,
    pack_choices,
    packed_rows,
)
from cmjax.moe.exchange import Exchange, InFlight, ReceivedRows, SplitExchange, after_start
from cmjax.moe.experts import Experts, Leaf, MlpParams, block_rows, expert_ffn, swiglu
from cmjax.moe.layer import LayerRouter, MoeLayer, Returning, Routed, shared_ffn
from cmjax.moe.placement import ExpertPlacement
from cmjax.moe.router import route, route_to_slots
from cmjax.moe.wire import WireDtype, message_bytes, pack_rows, unpack_int8, unpack_rows

__all__ = [
    "DispatchHandle",
    "DispatchInFlight",
    "Exchange",
    "ExpertPlacement",
    "Experts",
    "FabricExchange",
    "InFlight",
    "LayerRouter",
    "Leaf",
    "MlpParams",
    "MoeLayer",
    "ReceivedRows",
    "Returning",
    "Routed",
    "RouterConfig",
    "Scoring",
    "SplitExchange",
    "TopkMethod",
    "WireDtype",
    "after_start",
    "block_rows",
    "buffer_bytes",
    "combine",
    "dispatch",
    "expert_ffn",
    "laid_out",
    "max_tokens",
    "message_bytes",
    "pack_choices",
    "pack_rows",
    "packed_rows",
    "route",
    "route_to_slots",
    "shared_ffn",
    "swiglu",
    "unpack_int8",
    "unpack_rows",
]
