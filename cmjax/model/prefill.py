"""The prefill pass on one rank: packed prompts, in one microbatch or two that take turns.

Attention is staged, SP-TP-SP (paper section 4.3.1). The packed tokens are cut into equal contiguous segments, one a
rank, wherever a prompt may end: projections down to the latents, and all that follows attention, are of a rank's own
tokens. Between them, the ranks of a group (as many as divide both heads and ranks) gather the small latents of their
queries and share out the heads: each has an equal part of the work, however long the prompts are. An all-to-all puts
the heads of each token together again.

With two, the first half of the packed tokens are A's and the second half B's; each is cut into a segment a rank. B
attends to A's tokens, whose latents of a layer are always there first, and never the other way round. So three things
run side by side (paper section 4.3.2): one half's attention and experts, the other's arithmetic around the exchange,
and the exchange itself.
"""

import math
from typing import Generic

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.mesh import fabric
from cmjax.model.cache import PagedKeys, slots_after, write_rows
from cmjax.model.config import ModelConfig
from cmjax.model.mla import (
    WHOLE,
    CoreAttention,
    LocalSequences,
    Part,
    expanded_end,
    expanded_part,
    expanded_start,
    key_value_latent,
    queries,
    query_latent,
    rms_norm,
    take_heads,
)
from cmjax.model.params import AttentionParams, Params
from cmjax.model.pipeline import Microbatch, pipelined_layers
from cmjax.model.transformer import (
    Attend,
    AttendInParts,
    Index,
    PassContext,
    PassOutput,
    RankSpec,
    embed,
    exchanged_moe,
    main_pass,
    mtp_pass,
    stack_loads,
)
from cmjax.moe import Leaf


@flax.struct.dataclass
class PrefillBatch(Generic[Leaf]):
    """Packed prompts, the same on every rank; tokens are cut into equal contiguous segments, one a rank.

    Attributes:
        token_ids: `int32[tokens]`, a multiple of the ranks; sequences side by side, padding at the end.
        next_token_ids: `int32[tokens]`, the token after each (the MTP module's input), -1 where it is not known yet.
        positions: `int32[tokens]`.
        slot_mapping: `int32[tokens]`, where the token's latent goes, -1 for padding.
        query_start: `int32[sequences + 1]`, first token of each sequence; an unused sequence is empty.
        block_table: `int32[sequences, max blocks]`, -1 padded; also holds the blocks of tokens computed before.
    """

    token_ids: Leaf
    next_token_ids: Leaf
    positions: Leaf
    slot_mapping: Leaf
    query_start: Leaf
    block_table: Leaf


def token_order(num_tokens: int, num_ranks: int, microbatches: int) -> np.ndarray:
    """Where each packed token stands among the ranks' tokens side by side, `int[tokens]`."""
    segments = np.arange(num_tokens).reshape(microbatches, num_ranks, -1)
    return np.argsort(segments.transpose(1, 0, 2).reshape(-1))


class _Segments:
    """Tokens of each microbatch that belong to this rank, or to its group: `count` from `firsts[i]` on."""

    def __init__(self, num_tokens: int, spec: RankSpec, group_size: int = 1) -> None:
        self.num_parts = spec.microbatches
        self.part = num_tokens // self.num_parts  # tokens of a microbatch, all ranks
        num_groups = lax.axis_size(spec.axis_name) // group_size
        self.count = self.part // num_groups
        group = lax.axis_index(spec.axis_name) // group_size
        self.firsts = [i * self.part + group * self.count for i in range(self.num_parts)]

    def of(self, values: jax.Array, which: int) -> jax.Array:
        """Values of the tokens of one microbatch."""
        return lax.dynamic_slice_in_dim(values, self.firsts[which], self.count)

    def all(self, values: jax.Array) -> jax.Array:
        """Values of the tokens of all of them."""
        return jnp.concatenate([self.of(values, which) for which in range(self.num_parts)])

    def sequences(self, batch: PrefillBatch, stop: jax.Array, which: int) -> LocalSequences:
        """The packed sequences, each up to its `stop`, cut to the tokens of one microbatch."""
        first = self.firsts[which]
        begin = jnp.clip(batch.query_start[:-1], first, first + self.count)
        end = jnp.clip(stop, first, first + self.count)
        last_token = batch.positions.shape[0] - 1
        return LocalSequences(begin - first, end - begin, batch.positions[jnp.minimum(begin, last_token)])


def head_shards(config: ModelConfig, num_ranks: int) -> int:
    """How many ranks share out the heads of their tokens in prefill (its tensor-parallel degree)."""
    return math.gcd(config.num_attention_heads, num_ranks)


def local_tokens(num_tokens: int, spec: RankSpec) -> jax.Array:
    """Which packed tokens this rank's are, in the order of its hidden states: `int32[tokens / ranks]`."""
    return _Segments(num_tokens, spec).all(jnp.arange(num_tokens, dtype=jnp.int32))


def prefill_pass(
    params: Params, expert_to_slot: jax.Array, cache: jax.Array, batch: PrefillBatch, spec: RankSpec
) -> tuple[PassOutput, jax.Array | None]:
    """Prefill the packed prompts: this rank's tokens (see `local_tokens`), and everybody's latents.

    After it, the cache of every rank holds the latents of all the prompts, so that any of them can hand them on.

    Args:
        params: with experts by local slot.
        expert_to_slot: `int32[moe layers, logical]`, this rank's rows of the placement.
        cache: `[cache layers, slots, latent width]`.

    Returns:
        The output for the rank's `tokens / ranks` tokens, and the MTP module's hidden states for them (None without
        one); those of tokens whose successor is unknown mean nothing, and leave no trace in the cache.
    """
    config = spec.config
    segments = _Segments(batch.token_ids.shape[0], spec)
    stop = batch.query_start[1:]
    is_valid = batch.slot_mapping >= 0

    def context(slot_mapping: jax.Array, stop: jax.Array, is_valid: jax.Array, name: str) -> _Contexts:
        parts = range(segments.num_parts)
        attends = [_attend(batch, slot_mapping, stop, segments, which, spec, name) for which in parts]
        moe = exchanged_moe(spec, expert_to_slot, segments.all(is_valid))
        halves = [Microbatch(attend, segments.of(is_valid, which)) for which, attend in enumerate(attends)]
        return _Contexts(PassContext(config, "prefill", _in_turn(attends), moe), halves)

    contexts = context(batch.slot_mapping, stop, is_valid, "main")
    token_ids = segments.all(batch.token_ids)
    if spec.microbatches == 1:
        hidden, cache, loads = main_pass(params, token_ids, cache, contexts.whole)
    else:
        a, b = contexts.halves
        x = embed(params.embed, token_ids)
        x, cache, loads = pipelined_layers(params, x, cache, contexts.whole, (a, b), expert_to_slot, spec)
        hidden = rms_norm(x, params.norm, config.rms_norm_eps)
    mtp_hidden = None
    if params.mtp is not None:
        slots = jnp.where(batch.next_token_ids < 0, -1, batch.slot_mapping)
        # A last token whose successor is unknown has no row in the cache: nothing may read what the memory holds there.
        is_open = (stop > batch.query_start[:-1]) & (batch.next_token_ids[jnp.maximum(stop - 1, 0)] < 0)
        contexts = context(slots, stop - is_open, is_valid & (batch.next_token_ids >= 0), "mtp")
        next_token_ids = segments.all(batch.next_token_ids)
        mtp_hidden, cache, mtp_loads = mtp_pass(params, params.mtp, hidden, next_token_ids, cache, contexts.whole)
        loads += mtp_loads
    return PassOutput(hidden, cache, stack_loads(loads)), mtp_hidden


@flax.struct.dataclass
class _Contexts:
    """How a pass goes over all of a rank's tokens, and over each microbatch's."""

    whole: PassContext = flax.struct.field(pytree_node=False)
    halves: list[Microbatch] = flax.struct.field(pytree_node=False)


def _attend(
    batch: PrefillBatch,
    slot_mapping: jax.Array,
    stop: jax.Array,
    segments: _Segments,
    which: int,
    spec: RankSpec,
    name: str,
) -> AttendInParts:
    """Attention of one microbatch's tokens: this rank's heads of its group's tokens, after everybody's latents of them
    are in the cache, and from all of the group the heads of its own tokens."""
    config, axis = spec.config, spec.axis_name
    num_shards = head_shards(config, lax.axis_size(axis))
    shard = lax.axis_index(axis) % num_shards
    group = _Segments(batch.positions.shape[0], spec, num_shards)
    sequences = group.sequences(batch, stop, which)
    positions, group_positions = segments.of(batch.positions, which), group.of(batch.positions, which)
    slots = lax.slice_in_dim(slot_mapping, which * segments.part, (which + 1) * segments.part)
    name = f"prefill/{name}" + (f"/{'ab'[which]}" if segments.num_parts > 1 else "")

    def begin(
        p: AttentionParams, x: jax.Array, cache: jax.Array, layer: Index, others: jax.Array | None
    ) -> tuple[CoreAttention, jax.Array]:
        latent = key_value_latent(p, config, x, positions)
        q_latent = query_latent(p, x)
        q_latents = fabric.all_gather(q_latent, axis, tiled=True, group_size=num_shards, channel=f"{name}/queries")
        latents = fabric.all_gather(latent, axis, tiled=True, channel=f"{name}/latents")
        q_nope, q_pe = queries(take_heads(p, shard, num_shards), config, q_latents, group_positions)
        cache = write_rows(cache, layer, slots_after(slots, others), latents)
        return expanded_start(config, q_nope, q_pe), cache

    def part(p: AttentionParams, core: CoreAttention, cache: jax.Array, layer: Index, part: Part) -> CoreAttention:
        keys = PagedKeys(cache, layer, batch.block_table, spec.block_size, config.latent_width)
        return expanded_part(take_heads(p, shard, num_shards), config, core, keys, sequences, part)

    def end(p: AttentionParams, core: CoreAttention) -> jax.Array:
        attended, channel = expanded_end(core), f"{name}/heads"
        return fabric.all_to_all(attended, axis, 0, 1, tiled=True, group_size=num_shards, channel=channel)

    return AttendInParts(begin, part, end, has_lanes=True)


def _in_turn(attends: list[AttendInParts]) -> Attend:
    """Attention of all microbatches' tokens, side by side as a rank has them."""
    if len(attends) == 1:
        return attends[0]

    def attend(p: AttentionParams, x: jax.Array, cache: jax.Array, layer: Index) -> tuple[jax.Array, jax.Array]:
        parts, total = [], None
        for own, part in zip(attends, jnp.split(x, len(attends)), strict=True):
            core, cache = own.begin(p, part, cache, layer, total)
            core = own.part(p, core, cache, layer, WHOLE)
            total = core.state.total
            parts.append(own.end(p, core))
        return jnp.concatenate(parts), cache

    return attend
