"""The decoder on one rank: prefill and decode passes over local arrays and one mesh axis.

The functions here run inside `jax.shard_map`, on 1 device as on 320. The expert parameters are stored by physical slot,
`[layers, local slots, ...]`; everything else is replicated. Attention differs between the two passes, and is handed to
the layers as a function; all the rest is one code.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from cmjax.mesh import fabric
from cmjax.model.cache import slots_of, write_rows
from cmjax.model.config import ModelConfig
from cmjax.model.mla import LocalSequences, attend_absorbed, attend_expanded, mla_prolog, rms_norm
from cmjax.model.params import AttentionParams, LayerParams, MoeParams, Params
from cmjax.moe import Exchange, ExpertParams, RouterConfig, moe_ffn, swiglu
from cmjax.quant import linear

# (attention params, normalized x, cache, cache layer) -> (attention output before o_proj, cache)
Attend = Callable[[AttentionParams, jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankSpec:
    """What is static about a rank's pass.

    Attributes:
        config: the model's.
        axis_name: the mesh axis of the instance.
        block_size: tokens a cache block.
        exchange: how MoE rows travel.
        num_dispatched_shared: shared experts reached through dispatch (see `ExpertPlacement`).
    """

    config: ModelConfig
    axis_name: str
    block_size: int
    exchange: Exchange
    num_dispatched_shared: int

    @property
    def router(self) -> RouterConfig:
        """The router's part of the model config."""
        c = self.config
        return RouterConfig(
            num_experts=c.num_routed_experts,
            num_topk=c.num_topk,
            num_expert_groups=c.num_expert_groups,
            num_topk_groups=c.num_topk_groups,
            scoring=c.scoring,
            topk_method=c.topk_method,
            norm_topk_prob=c.norm_topk_prob,
            routed_scaling_factor=c.routed_scaling_factor,
        )


@flax.struct.dataclass
class PrefillBatch:
    """Packed prompts, the same on every rank; tokens are cut into equal contiguous segments, one a rank.

    Attributes:
        token_ids: `int32[tokens]`, a multiple of the ranks; sequences side by side, padding at the end.
        next_token_ids: `int32[tokens]`, the token after each (the MTP module's input), -1 where it is not known yet.
        positions: `int32[tokens]`.
        slot_mapping: `int32[tokens]`, where the token's latent goes, -1 for padding.
        query_start: `int32[sequences + 1]`, first token of each sequence; an unused sequence is empty.
        block_table: `int32[sequences, max blocks]`, -1 padded; also holds the blocks of tokens computed before.
    """

    token_ids: jax.Array
    next_token_ids: jax.Array
    positions: jax.Array
    slot_mapping: jax.Array
    query_start: jax.Array
    block_table: jax.Array


@flax.struct.dataclass
class DecodeBatch:
    """One token of each of the rank's sequences.

    Attributes:
        token_ids: `int32[requests]`, the newest token, not yet in the cache.
        positions: `int32[requests]`, its position, which is the number of tokens in the cache; -1 for an empty place.
        last_positions: `int32[requests]`, the last position to compute; the request ends after it.
        block_table: `int32[requests, max blocks]`, -1 padded.
    """

    token_ids: jax.Array
    positions: jax.Array
    last_positions: jax.Array
    block_table: jax.Array


@flax.struct.dataclass
class PassOutput:
    """What a pass returns.

    Attributes:
        hidden: `[tokens, hidden]` of this rank, after the final norm.
        cache: the cache with the tokens' latents.
        slot_load: `int32[moe layers, local slots]`, rows each expert received (the MTP layer's last).
    """

    hidden: jax.Array
    cache: jax.Array
    slot_load: jax.Array


@dataclasses.dataclass(frozen=True)
class _Run:
    """Consecutive layers of one kind: `count` of them, from `stack_start` in their stack and `first_layer` in all."""

    is_moe: bool
    stack_start: int
    first_layer: int
    count: int


def _layer_runs(config: ModelConfig) -> list[_Run]:
    runs: list[_Run] = []
    seen = {False: 0, True: 0}
    for layer in range(config.num_hidden_layers):
        is_moe = layer in config.moe_layer_ids
        if runs and runs[-1].is_moe == is_moe:
            runs[-1] = dataclasses.replace(runs[-1], count=runs[-1].count + 1)
        else:
            runs.append(_Run(is_moe, seen[is_moe], layer, 1))
        seen[is_moe] += 1
    return runs


def _without_experts(layers: LayerParams) -> tuple[LayerParams, ExpertParams | None]:
    """Split off the experts: a scan over layers would copy all of a layer's experts to read a few of them."""
    if not isinstance(layers.mlp, MoeParams):
        return layers, None
    experts = ExpertParams(layers.mlp.experts.w13, layers.mlp.experts.w2)
    return layers.replace(mlp=layers.mlp.replace(experts=None)), experts


def _decoder_layer(
    params: LayerParams,
    experts: ExpertParams | None,
    expert_layer: Any,
    expert_to_slot: jax.Array | None,
    x: jax.Array,
    cache: jax.Array,
    cache_layer: Any,
    is_valid: jax.Array,
    attend: Attend,
    spec: RankSpec,
    channel: str,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """One layer: `(x, cache, num_tokens_per_expert or None)`; `params` is one layer's, `experts` all layers'."""
    eps = spec.config.rms_norm_eps
    with jax.named_scope("attention"):
        attended, cache = attend(params.attn, rms_norm(x, params.input_norm, eps), cache, cache_layer)
    with jax.named_scope("oproj"):
        x = x + linear(attended, params.attn.o, params.attn.o_bias)
    normed = rms_norm(x, params.post_attn_norm, eps)
    if experts is None:
        with jax.named_scope("mlp"):
            return x + swiglu(normed, params.mlp.w13, params.mlp.w2), cache, None
    mlp = params.mlp
    y, load = moe_ffn(
        normed,
        mlp.router,
        mlp.router_bias,
        experts,
        expert_layer,
        expert_to_slot,
        is_valid,
        router_config=spec.router,
        exchange=spec.exchange,
        num_dispatched_shared=spec.num_dispatched_shared,
        channel=channel,
    )
    if mlp.shared is not None:
        with jax.named_scope("shared_expert"):
            y = y + swiglu(normed, mlp.shared.w13, mlp.shared.w2).astype(jnp.float32)
    return x + y.astype(x.dtype), cache, load


def _run_layers(
    params: Params,
    expert_to_slot: jax.Array,
    x: jax.Array,
    cache: jax.Array,
    is_valid: jax.Array,
    attend: Attend,
    spec: RankSpec,
    channel: str,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """All decoder layers: `(x, cache, [num_tokens_per_expert [layers of a run, local slots]])`."""
    loads: list[jax.Array] = []
    for run in _layer_runs(spec.config):
        stack = params.moe if run.is_moe else params.dense
        layers, experts = _without_experts(stack)
        stop = run.stack_start + run.count
        if (run.stack_start, stop) != (0, layers.input_norm.shape[0]):
            layers = jax.tree.map(lambda a: a[run.stack_start : stop], layers)  # noqa: B023
        maps = expert_to_slot[run.stack_start : stop] if run.is_moe else None
        name = f"{channel}/{'moe' if run.is_moe else 'dense'}{run.first_layer}"

        def step(carry: tuple, xs: tuple, experts: Any = experts, name: str = name) -> tuple[tuple, Any]:
            layer_params, expert_map, expert_layer, cache_layer = xs
            *carry, load = _decoder_layer(
                layer_params, experts, expert_layer, expert_map, *carry, cache_layer, is_valid, attend, spec, name
            )
            return tuple(carry), load

        indices = jnp.arange(run.count)
        xs = (layers, maps, run.stack_start + indices, run.first_layer + indices)
        (x, cache), load = lax.scan(step, (x, cache), xs)
        if load is not None:
            loads.append(load)
    return x, cache, loads


def _embed(table: jax.Array, token_ids: jax.Array) -> jax.Array:
    return jnp.take(table, jnp.maximum(token_ids, 0), axis=0)


def lm_head(params: Params, hidden: jax.Array) -> jax.Array:
    """Return `float32[tokens, vocabulary]` for hidden states after the final norm."""
    head = params.embed if params.head is None else params.head
    return linear(hidden, head).astype(jnp.float32)


def mtp_head(params: Params, hidden: jax.Array) -> jax.Array:
    """Return `float32[tokens, vocabulary]` for the MTP module's hidden states."""
    head = params.mtp.head
    return lm_head(params, hidden) if head is None else linear(hidden, head).astype(jnp.float32)


def _pass(
    params: Params,
    expert_to_slot: jax.Array,
    token_ids: jax.Array,
    cache: jax.Array,
    is_valid: jax.Array,
    attend: Attend,
    spec: RankSpec,
    channel: str,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    x, cache, loads = _run_layers(
        params, expert_to_slot, _embed(params.embed, token_ids), cache, is_valid, attend, spec, channel
    )
    return rms_norm(x, params.norm, spec.config.rms_norm_eps), cache, loads


def _mtp_pass(
    params: Params,
    expert_to_slot: jax.Array,
    hidden: jax.Array,
    next_token_ids: jax.Array,
    cache: jax.Array,
    is_valid: jax.Array,
    attend: Attend,
    spec: RankSpec,
    channel: str,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """The MTP module: from the hidden state at t and the token at t+1, the hidden state that predicts t+2."""
    mtp, eps = params.mtp, spec.config.rms_norm_eps
    embedding = _embed(params.embed if mtp.embed is None else mtp.embed, next_token_ids)
    both = jnp.concatenate([rms_norm(embedding, mtp.enorm, eps), rms_norm(hidden, mtp.hnorm, eps)], axis=-1)
    x = linear(both, mtp.eh_proj)
    layers, experts = _without_experts(mtp.layer)
    layer = jax.tree.map(lambda a: a[0], layers)
    expert_map = None if experts is None else expert_to_slot[-1]
    x, cache, load = _decoder_layer(
        layer, experts, 0, expert_map, x, cache, spec.config.num_hidden_layers, is_valid, attend, spec, f"{channel}/mtp"
    )
    return rms_norm(x, mtp.norm, eps), cache, [] if load is None else [load[None]]


def _stack_loads(loads: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(loads) if loads else jnp.zeros((0, 0), jnp.int32)


def _local_sequences(batch: PrefillBatch, first: jax.Array, count: int) -> LocalSequences:
    """Cut the packed sequences to the tokens `[first, first + count)`."""
    begin = jnp.clip(batch.query_start[:-1], first, first + count)
    end = jnp.clip(batch.query_start[1:], first, first + count)
    last_token = batch.positions.shape[0] - 1
    return LocalSequences(begin - first, end - begin, batch.positions[jnp.minimum(begin, last_token)])


def prefill_pass(
    params: Params, expert_to_slot: jax.Array, cache: jax.Array, batch: PrefillBatch, spec: RankSpec
) -> tuple[PassOutput, jax.Array | None]:
    """Prefill the packed prompts: this rank's segment of tokens, and everybody's latents.

    After it, the cache of every rank holds the latents of all the prompts, so that any of them can hand them on.

    Args:
        params: with experts by local slot.
        expert_to_slot: `int32[moe layers, logical]`, this rank's rows of the placement.
        cache: `[cache layers, slots, latent width]`.

    Returns:
        The output for the rank's `tokens / ranks` tokens, and the MTP module's hidden states for them (None without
        one); those of tokens whose successor is unknown mean nothing, and leave no trace in the cache.
    """
    config, axis = spec.config, spec.axis_name
    count = batch.token_ids.shape[0] // lax.axis_size(axis)
    first = lax.axis_index(axis) * count
    sequences = _local_sequences(batch, first, count)

    def local(a: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(a, first, count)

    def attend_with(slot_mapping: jax.Array, channel: str) -> Attend:
        def attend(p: AttentionParams, x: jax.Array, cache: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
            q_nope, q_pe, latent = mla_prolog(p, config, x, local(batch.positions))
            latents = fabric.all_gather(latent, axis, tiled=True, channel=channel)
            cache = write_rows(cache, layer, slot_mapping, latents)
            attended = attend_expanded(
                p, config, q_nope, q_pe, cache, layer, sequences, batch.block_table, spec.block_size
            )
            return attended, cache

        return attend

    is_valid = local(batch.slot_mapping) >= 0
    attend = attend_with(batch.slot_mapping, "prefill/latents")
    hidden, cache, loads = _pass(
        params, expert_to_slot, local(batch.token_ids), cache, is_valid, attend, spec, "prefill"
    )
    mtp_hidden = None
    if params.mtp is not None:
        next_token_ids = local(batch.next_token_ids)
        slots = jnp.where(batch.next_token_ids < 0, -1, batch.slot_mapping)
        mtp_hidden, cache, mtp_loads = _mtp_pass(
            params,
            expert_to_slot,
            hidden,
            next_token_ids,
            cache,
            is_valid & (next_token_ids >= 0),
            attend_with(slots, "prefill/mtp_latents"),
            spec,
            "prefill",
        )
        loads += mtp_loads
    return PassOutput(hidden, cache, _stack_loads(loads)), mtp_hidden


def decode_pass(
    params: Params, expert_to_slot: jax.Array, cache: jax.Array, batch: DecodeBatch, spec: RankSpec
) -> PassOutput:
    """Decode one token of each of this rank's sequences; arguments as for `prefill_pass`."""
    config = spec.config
    is_valid = batch.positions >= 0
    positions = jnp.maximum(batch.positions, 0)
    slots = jnp.where(is_valid, slots_of(batch.block_table, positions, spec.block_size), -1)
    lengths = jnp.where(is_valid, positions + 1, 0)

    def attend(p: AttentionParams, x: jax.Array, cache: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        q_nope, q_pe, latent = mla_prolog(p, config, x, positions)
        cache = write_rows(cache, layer, slots, latent)
        attended = attend_absorbed(
            p, config, q_nope, q_pe, cache, layer, lengths, batch.block_table, spec.block_size
        )
        return attended, cache

    hidden, cache, loads = _pass(
        params, expert_to_slot, batch.token_ids, cache, is_valid, attend, spec, "decode"
    )
    return PassOutput(hidden, cache, _stack_loads(loads))
