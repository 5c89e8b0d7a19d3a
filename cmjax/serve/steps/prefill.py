"""The jitted steps of prefill: `prefill` for prompts, `score` for texts; and what all steps share.

Each is one `shard_map` over an instance's one-axis mesh. Params, expert placement, cache and batch are arguments; only
`StepSpec` is static, so that an instance can switch models of one shape and rebalance without recompiling. The steps
see the cache only through block tables and slot mappings.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cmjax.mesh import EP_AXIS, fabric
from cmjax.model import (
    Leaf,
    Params,
    PrefillBatch,
    RankSpec,
    lm_head,
    local_tokens,
    mtp_head,
    param_specs,
    prefill_pass,
)
from cmjax.quant import linear
from cmjax.serve.steps.sampling import SamplingState, greedy, logprobs, sample

_EVERYWHERE = PartitionSpec()
_BY_RANK = PartitionSpec(EP_AXIS)
_MAPS = PartitionSpec(None, EP_AXIS)  # expert_to_slot[moe layers, source rank, logical]


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What is static about an instance's steps: the rank's pass, and the mesh it runs on."""

    rank: RankSpec
    mesh: Mesh

    def on_ranks(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Wrap a per-rank function for the instance's mesh."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def by_rank(self) -> NamedSharding:
        """The sharding of arrays whose leading axis is cut by rank."""
        return NamedSharding(self.mesh, _BY_RANK)


@flax.struct.dataclass
class PrefillOutput(Generic[Leaf]):
    """What a prefill step returns. R ranks.

    Attributes:
        cache: `[R, cache layers, slots, latent width]`; every rank holds all the prompts' latents.
        token_ids: `int32[sequences]`, the token after the last one of each sequence, or `NOT_FINITE`.
        logits: `float32[sequences, vocabulary]` there.
        last_hidden: `[sequences, hidden]` there, after the final norm; whole on every rank.
        slot_load: `int32[moe layers, slots]`, rows each physical expert received (the MTP layer's last).
        all_logits: `float32[tokens, vocabulary]`, where asked for; in the order of `cmjax.model.token_order`, which is
            that of the batch where there is one microbatch.
        logprobs: of `token_ids`, where asked for.
        prompt_logprobs: of `next_token_ids` at each token, in the same order, where asked for; mean nothing where that
            is -1.
    """

    cache: Leaf
    token_ids: Leaf
    logits: Leaf
    last_hidden: Leaf
    slot_load: Leaf
    all_logits: Leaf | None
    logprobs: Any  # Logprobs or None
    prompt_logprobs: Any


@flax.struct.dataclass
class ScoreOutput(Generic[Leaf]):
    """What a scoring step returns.

    Attributes:
        cache: as for prefill.
        token_ids: `int32[tokens]`, the greedy next token after each, or `NOT_FINITE`.
        logprobs: `float32[tokens]`, natural logarithm of the probability of `next_token_ids`; means nothing where that
            is -1.
        draft_ids: `int32[tokens]`, the MTP module's greedy token after the next, given the next; None without one.
        slot_load: as for prefill.
        hidden: `[tokens, hidden]` after the final norm, cut by rank: the `reference` of another model's step.
        kl_divergence: `float32[tokens]`, nats by which the next-token distribution is off the reference's; None without
            one.
    """

    cache: Leaf
    token_ids: Leaf
    logprobs: Leaf
    draft_ids: Leaf | None
    slot_load: Leaf
    hidden: Leaf
    kl_divergence: Leaf | None


def new_cache(spec: StepSpec, num_blocks: int, dtype: Any) -> jax.Array:
    """Return an instance's cache, `[R, cache layers, num_blocks * block_size, latent width]`; nothing is cleared."""
    config = spec.rank.config
    shape = (1, config.num_cache_layers, num_blocks * spec.rank.block_size, config.latent_width)
    return jax.jit(spec.on_ranks(lambda: fabric.empty(shape, dtype), (), _BY_RANK))()


@functools.partial(
    jax.jit,
    static_argnames=("spec", "num_logprobs", "num_prompt_logprobs", "with_all_logits"),
    donate_argnames=("cache",),
)
def prefill(
    params: Params,
    expert_to_slot: jax.Array,
    cache: jax.Array,
    batch: PrefillBatch,
    sampling: SamplingState | None = None,
    *,
    spec: StepSpec,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
    with_all_logits: bool = False,
) -> PrefillOutput:
    """Prefill packed prompts on an instance: fill the cache, and return the first token of each.

    Args:
        params: placed params (`cmjax.model.place_params`).
        expert_to_slot: `int32[moe layers, R, logical]`, the placement.
        cache: donated.
        batch: replicated; both tokens and sequences are multiples of R.
        sampling: of the sequences, cut by rank; None: greedy.
        num_logprobs, num_prompt_logprobs: also return log probabilities, of the tokens sampled and of the prompts', and
            so many of the best at each place.
        with_all_logits: also return the logits of every token.
    """
    num_ranks = spec.mesh.size
    num_sequences = batch.block_table.shape[0]
    parts = num_ranks * spec.rank.microbatches
    if batch.token_ids.shape[0] % parts or num_sequences % num_ranks:
        raise ValueError(
            f"{batch.token_ids.shape[0]} tokens are no multiple of {parts}, or {num_sequences} sequences of {num_ranks}"
        )

    def rank(params: Params, maps: jax.Array, cache: jax.Array, batch: PrefillBatch, sampling: Any) -> PrefillOutput:
        output, _ = prefill_pass(params, maps[:, 0], cache[0], batch, spec.rank)
        rank_id = lax.axis_index(EP_AXIS)
        tokens = local_tokens(batch.token_ids.shape[0], spec.rank)
        ends, is_used = batch.query_start[1:], batch.query_start[1:] > batch.query_start[:-1]
        is_last = (ends[:, None] - 1 == tokens) & is_used[:, None]
        mine = jnp.where(is_last.any(1)[:, None], output.hidden[is_last.argmax(1)], 0)
        last_hidden = fabric.psum(mine, EP_AXIS, channel="prefill/last_hidden")
        share = num_sequences // num_ranks
        logits = lm_head(params, lax.dynamic_slice_in_dim(last_hidden, rank_id * share, share))
        if sampling is None:
            token_ids = greedy(logits)
        else:
            own_ends = lax.dynamic_slice_in_dim(ends, rank_id * share, share)
            token_ids = sample(logits, sampling, batch.positions[jnp.maximum(own_ends - 1, 0)] + 1)
        prompt_logprobs = None
        if num_prompt_logprobs is not None:
            following = batch.next_token_ids[tokens]
            prompt_logprobs = _by_rows(
                lambda hidden, ids: logprobs(lm_head(params, hidden), ids, num_prompt_logprobs),
                output.hidden,
                following,
            )
        return PrefillOutput(
            cache=output.cache[None],
            token_ids=token_ids,
            logits=logits,
            last_hidden=last_hidden,
            slot_load=output.slot_load,
            all_logits=lm_head(params, output.hidden) if with_all_logits else None,
            logprobs=None if num_logprobs is None else logprobs(logits, token_ids, num_logprobs),
            prompt_logprobs=prompt_logprobs,
        )

    out_specs = PrefillOutput(_BY_RANK, _BY_RANK, _BY_RANK, _EVERYWHERE, _MAPS, _BY_RANK, _BY_RANK, _BY_RANK)
    in_specs = (param_specs(params, EP_AXIS), _MAPS, _BY_RANK, _EVERYWHERE, _BY_RANK)
    return spec.on_ranks(rank, in_specs, out_specs)(params, expert_to_slot, cache, batch, sampling)


# Logits of this many tokens at a time: those of a whole step would be its largest array by far.
_SCORE_ROWS = 512


def _by_rows(function: Callable, *arrays: jax.Array) -> Any:
    """Apply `function` to `arrays[tokens, ...]`, a few hundred rows at a time."""
    tokens = arrays[0].shape[0]
    rows = min(_SCORE_ROWS, tokens)
    pad = -tokens % rows

    def cut(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, pad), *(((0, 0),) * (a.ndim - 1)))).reshape(-1, rows, *a.shape[1:])

    out = lax.map(lambda parts: function(*parts), tuple(map(cut, arrays)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:tokens], out)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("cache",))
def score(
    params: Params,
    expert_to_slot: jax.Array,
    cache: jax.Array,
    batch: PrefillBatch,
    reference: tuple[jax.Array, jax.Array] | None = None,
    *,
    spec: StepSpec,
) -> ScoreOutput:
    """Prefill packed texts, and say at each token what the model and its MTP module expect (teacher-forced).

    Arguments as for `prefill`; `batch.next_token_ids` is the text that is scored. `reference` is another model's
    `hidden` for the same batch, and its head `[vocabulary, hidden]`: their next-token distribution is the one that this
    model's is compared with.
    """

    def rank(params: Params, maps: jax.Array, cache: jax.Array, batch: PrefillBatch, reference: Any) -> ScoreOutput:
        output, mtp_hidden = prefill_pass(params, maps[:, 0], cache[0], batch, spec.rank)
        following = batch.next_token_ids[local_tokens(batch.token_ids.shape[0], spec.rank)]

        def expect(
            hidden: jax.Array, following: jax.Array, other: jax.Array | None = None
        ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
            logits = lm_head(params, hidden)
            logprobs = jax.nn.log_softmax(logits, axis=-1)
            chosen = jnp.take_along_axis(logprobs, jnp.maximum(following, 0)[:, None], axis=-1)[:, 0]
            divergence = None
            if other is not None:
                wanted = jax.nn.log_softmax(linear(other, reference[1]).astype(jnp.float32), axis=-1)
                divergence = jnp.sum(jnp.exp(wanted) * (wanted - logprobs), axis=-1)
            return greedy(logits), chosen, divergence

        others = () if reference is None else (reference[0],)
        token_ids, logprobs, divergence = _by_rows(expect, output.hidden, following, *others)
        drafts = None
        if mtp_hidden is not None:
            drafts = _by_rows(lambda hidden: greedy(mtp_head(params, hidden)), mtp_hidden)
        return ScoreOutput(output.cache[None], token_ids, logprobs, drafts, output.slot_load, output.hidden, divergence)

    drafts, divergence = (None if absent else _BY_RANK for absent in (params.mtp is None, reference is None))
    out_specs = ScoreOutput(_BY_RANK, _BY_RANK, _BY_RANK, drafts, _MAPS, _BY_RANK, divergence)
    in_specs = (
        param_specs(params, EP_AXIS),
        _MAPS,
        _BY_RANK,
        _EVERYWHERE,
        None if reference is None else (_BY_RANK, _EVERYWHERE),
    )
    return spec.on_ranks(rank, in_specs, out_specs)(params, expert_to_slot, cache, batch, reference)
