"""The decode passes on one rank: the model over the newest tokens, and its MTP module over what they became."""

from typing import Generic

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.model.cache import PagedKeys, slots_after, slots_of, write_rows
from cmjax.model.mla import (
    CoreAttention,
    Part,
    absorbed_end,
    absorbed_part,
    absorbed_start,
    mla_prolog,
    rms_norm,
)
from cmjax.model.params import AttentionParams, Params
from cmjax.model.pipeline import Microbatch, pipelined_layers
from cmjax.model.transformer import (
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
class DecodeBatch(Generic[Leaf]):
    """The newest token of each of the rank's sequences, and perhaps equally many guesses of what follows.

    Attributes:
        token_ids: `int32[tokens]`, not yet in the cache, those of a sequence side by side.
        positions: `int32[tokens]`, -1 for an empty place; the newest token's is the number of tokens in the cache.
        last_positions: `int32[requests]`, the last position to compute; the request ends after it.
        block_table: `int32[requests, max blocks]`, -1 padded.
    """

    token_ids: Leaf
    positions: Leaf
    last_positions: Leaf
    block_table: Leaf


def decode_context(expert_to_slot: jax.Array, batch: DecodeBatch, spec: RankSpec, channel: str) -> PassContext:
    """What the layers share of a pass over the newest tokens of sequences."""
    moe = exchanged_moe(spec, expert_to_slot, batch.positions >= 0)
    return PassContext(spec.config, channel, decode_attention(batch, spec), moe)


def decode_attention(batch: DecodeBatch, spec: RankSpec) -> AttendInParts:
    """How the newest tokens of sequences attend; all the metadata of a pass is made here, once for its layers."""
    config = spec.config
    is_valid = batch.positions >= 0
    positions = jnp.maximum(batch.positions, 0)
    slots = jnp.where(is_valid, slots_of(batch.block_table, positions, spec.block_size), -1)
    lengths = jnp.where(is_valid, positions + 1, 0)

    def begin(
        p: AttentionParams, x: jax.Array, cache: jax.Array, layer: Index, others: jax.Array | None
    ) -> tuple[CoreAttention, jax.Array]:
        q_nope, q_pe, latent = mla_prolog(p, config, x, positions)
        cache = write_rows(cache, layer, slots_after(slots, others), latent)
        return absorbed_start(p, config, q_nope, q_pe, batch.block_table.shape[0]), cache

    def part(p: AttentionParams, core: CoreAttention, cache: jax.Array, layer: Index, part: Part) -> CoreAttention:
        keys = PagedKeys(cache, layer, batch.block_table, spec.block_size, config.latent_width)
        return absorbed_part(config, core, keys, lengths, part)

    def end(p: AttentionParams, core: CoreAttention) -> jax.Array:
        return absorbed_end(p, config, core)

    return AttendInParts(begin, part, end)


def decode_pass(
    params: Params, expert_to_slot: jax.Array, cache: jax.Array, batch: DecodeBatch, spec: RankSpec
) -> PassOutput:
    """Decode the newest tokens of this rank's sequences; arguments as for `prefill_pass`.

    With two microbatches each takes half of the sequences, which must be even in number.
    """
    context = decode_context(expert_to_slot, batch, spec, "decode")
    if spec.microbatches == 1:
        hidden, cache, loads = main_pass(params, batch.token_ids, cache, context)
        return PassOutput(hidden, cache, stack_loads(loads))
    parts = [jax.tree.map(lambda a, i=i: jnp.split(a, 2)[i], batch) for i in range(2)]
    halves = [Microbatch(decode_attention(one, spec), one.positions >= 0) for one in parts]
    x = embed(params.embed, batch.token_ids)
    x, cache, loads = pipelined_layers(params, x, cache, context, (halves[0], halves[1]), expert_to_slot, spec)
    return PassOutput(rms_norm(x, params.norm, spec.config.rms_norm_eps), cache, stack_loads(loads))


def draft_pass(
    params: Params,
    expert_to_slot: jax.Array,
    cache: jax.Array,
    batch: DecodeBatch,
    hidden: jax.Array,
    spec: RankSpec,
    *,
    channel: str = "draft",
) -> PassOutput:
    """The MTP module's hidden states, which predict the token after next (paper section 4.2.4).

    Args:
        params: with an MTP module.
        expert_to_slot, cache, spec: as for `decode_pass`.
        batch: `token_ids` are those after the positions.
        hidden: `[tokens, hidden]` at the positions, the model's or, for a further guess, the module's own.
        channel: names the exchanges; passes of one step need different ones.
    """
    assert params.mtp is not None  # checked by the caller
    context = decode_context(expert_to_slot, batch, spec, channel)
    hidden, cache, loads = mtp_pass(params, params.mtp, hidden, batch.token_ids, cache, context)
    return PassOutput(hidden, cache, stack_loads(loads))
