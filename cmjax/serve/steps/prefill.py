"""The jitted step of prefill: prompts to latents and first tokens."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from cmjax.mesh import EP_AXIS, fabric
from cmjax.model import Params, PrefillBatch, lm_head, local_tokens, param_specs, prefill_pass
from cmjax.serve.steps.sampling import Logprobs, greedy, logprobs_where_asked, sample
from cmjax.serve.steps.sampling_state import PackedSampling
from cmjax.serve.steps.spec import BY_RANK, EVERYWHERE, NO_EXTRAS, SECOND_BY_RANK, Extras, StepSpec, by_rows, specs_of


@flax.struct.dataclass
class PrefillOutput:
    """What a prefill step returns. R ranks.

    Attributes:
        cache: `[R, cache layers, slots, latent width]`; every rank holds all the prompts' latents.
        token_ids: `int32[sequences]`, the token after the last one of each sequence, or `NOT_FINITE`.
        logits: `float32[sequences, vocabulary]` there.
        last_hidden: `[sequences, hidden]` there, after the final norm; whole on every rank.
        slot_load: `int32[moe layers, slots]`, rows each physical expert received (the MTP layer's last).
        all_logits: `float32[tokens, vocabulary]`, where asked for; in the order of `cmjax.model.token_order`, which is
            that of the batch where there is one microbatch.
        hidden: `[tokens, hidden]`, after the final norm, in the same order, where asked for.
        logprobs: of `token_ids`, where asked for.
        prompt_logprobs: of `scored_token_ids`, in the same order, where asked for; mean nothing where that is -1.
    """

    cache: jax.Array
    token_ids: jax.Array
    logits: jax.Array
    last_hidden: jax.Array
    slot_load: jax.Array
    all_logits: jax.Array | None
    hidden: jax.Array | None
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


@functools.partial(jax.jit, static_argnames=("spec", "extras"), donate_argnames=("cache",))
def prefill(
    params: Params,
    expert_to_slot: jax.Array,
    cache: jax.Array,
    batch: PrefillBatch,
    sampling: PackedSampling | None = None,
    scored_token_ids: jax.Array | None = None,
    *,
    spec: StepSpec,
    extras: Extras = NO_EXTRAS,
) -> PrefillOutput:
    """Prefill packed prompts on an instance: fill the cache, and return the first token of each.

    Args:
        params: placed params (`cmjax.model.place_params`).
        expert_to_slot: `int32[moe layers, R, logical]`, the placement.
        cache: donated.
        batch: replicated; both tokens and sequences are multiples of R.
        sampling: of the sequences, cut by rank; None: greedy.
        scored_token_ids: `int32[tokens]`, the token after each one of a prompt whose log probabilities are asked for,
            -1 for all others; None: of all prompts.
    """
    num_ranks = spec.mesh.size
    num_sequences = batch.block_table.shape[0]
    parts = num_ranks * spec.rank.microbatches
    if batch.token_ids.shape[0] % parts or num_sequences % num_ranks:
        raise ValueError(
            f"{batch.token_ids.shape[0]} tokens are no multiple of {parts}, or {num_sequences} sequences of {num_ranks}"
        )

    def rank(
        params: Params,
        maps: jax.Array,
        cache: jax.Array,
        batch: PrefillBatch,
        sampling: PackedSampling | None,
        scored: jax.Array | None,
    ) -> PrefillOutput:
        output, _ = prefill_pass(params, maps[:, 0], cache[0], batch, spec.rank)
        rank_id = lax.axis_index(EP_AXIS)
        tokens = local_tokens(batch.token_ids.shape[0], spec.rank)
        ends, is_used = batch.query_start[1:], batch.query_start[1:] > batch.query_start[:-1]
        is_last = (ends[:, None] - 1 == tokens) & is_used[:, None]
        mine = jnp.where(is_last.any(1)[:, None], output.hidden[is_last.argmax(1)], 0)
        last_hidden = fabric.psum(mine, EP_AXIS, channel="prefill/last_hidden")
        share = num_sequences // num_ranks
        logits = lm_head(params, lax.dynamic_slice_in_dim(last_hidden, rank_id * share, share))
        with jax.named_scope("sampling"):
            if sampling is None:
                token_ids = greedy(logits)
            else:
                own_ends = lax.dynamic_slice_in_dim(ends, rank_id * share, share)
                token_ids = sample(logits, sampling, batch.positions[jnp.maximum(own_ends - 1, 0)] + 1)
        of_first = of_prompts = None
        if (num_top := extras.num_logprobs) is not None:
            asks = jnp.ones(share) if sampling is None else sampling.unpacked().asks_logprobs
            of_first = logprobs_where_asked(asks > 0, token_ids, num_top, lambda: logits)
        if (num_top := extras.num_prompt_logprobs) is not None:
            following = batch.next_token_ids if scored is None else scored
            of_prompts = _prompt_logprobs(params, output.hidden, following[tokens], num_top)
        return PrefillOutput(
            cache=output.cache[None],
            token_ids=token_ids,
            logits=logits,
            last_hidden=last_hidden,
            slot_load=output.slot_load,
            all_logits=lm_head(params, output.hidden) if extras.logits else None,
            hidden=output.hidden if extras.hidden else None,
            logprobs=of_first,
            prompt_logprobs=of_prompts,
        )

    out_specs = specs_of(PrefillOutput, last_hidden=EVERYWHERE, slot_load=SECOND_BY_RANK)
    in_specs = (param_specs(params, EP_AXIS), SECOND_BY_RANK, BY_RANK, EVERYWHERE, BY_RANK, EVERYWHERE)
    on_ranks = spec.on_ranks(rank, in_specs, out_specs)
    return on_ranks(params, expert_to_slot, cache, batch, sampling, scored_token_ids)


def _prompt_logprobs(params: Params, hidden: jax.Array, token_ids: jax.Array, num_top: int) -> Logprobs:
    """Of `token_ids int32[tokens]`, each the one after a token with `hidden[tokens, hidden]`, or -1."""

    # From 1 on: rows that fill the last part up hold 0, and nobody asks for them.
    def of_some(hidden: jax.Array, numbers: jax.Array) -> Logprobs:
        return logprobs_where_asked(numbers > 0, numbers - 1, num_top, lambda: lm_head(params, hidden))

    return by_rows(of_some, hidden, token_ids + 1)
