"""The jitted step of scoring: what a model expects at every token of given texts (teacher-forced)."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.mesh import EP_AXIS
from cmjax.model import Params, PrefillBatch, lm_head, local_tokens, mtp_head, param_specs, prefill_pass
from cmjax.quant import linear
from cmjax.serve.steps.sampling import greedy
from cmjax.serve.steps.spec import BY_RANK, EVERYWHERE, SECOND_BY_RANK, StepSpec, by_rows, specs_of


@flax.struct.dataclass
class ScoreOutput:
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

    cache: jax.Array
    token_ids: jax.Array
    logprobs: jax.Array
    draft_ids: jax.Array | None
    slot_load: jax.Array
    hidden: jax.Array
    kl_divergence: jax.Array | None


# Another model's `hidden` for the same batch, and its head `[vocabulary, hidden]`.
Reference = tuple[jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("cache",))
def score(
    params: Params,
    expert_to_slot: jax.Array,
    cache: jax.Array,
    batch: PrefillBatch,
    reference: Reference | None = None,
    *,
    spec: StepSpec,
) -> ScoreOutput:
    """Prefill packed texts, and say at each token what the model and its MTP module expect (teacher-forced).

    Arguments as for `prefill`; `batch.next_token_ids` is the text that is scored. The next-token distribution of
    `reference` is the one that this model's is compared with.
    """

    def rank(
        params: Params, maps: jax.Array, cache: jax.Array, batch: PrefillBatch, reference: Reference | None
    ) -> ScoreOutput:
        output, mtp_hidden = prefill_pass(params, maps[:, 0], cache[0], batch, spec.rank)
        following = batch.next_token_ids[local_tokens(batch.token_ids.shape[0], spec.rank)]

        def expect(
            hidden: jax.Array, following: jax.Array, other: jax.Array | None = None
        ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
            logits = lm_head(params, hidden)
            logprobs = jax.nn.log_softmax(logits, axis=-1)
            chosen = jnp.take_along_axis(logprobs, jnp.maximum(following, 0)[:, None], axis=-1)[:, 0]
            divergence = None
            if other is not None and reference is not None:
                wanted = jax.nn.log_softmax(linear(other, reference[1]).astype(jnp.float32), axis=-1)
                divergence = jnp.sum(jnp.exp(wanted) * (wanted - logprobs), axis=-1)
            return greedy(logits), chosen, divergence

        others = () if reference is None else (reference[0],)
        token_ids, logprobs, divergence = by_rows(expect, output.hidden, following, *others)
        drafts = None
        if mtp_hidden is not None:
            drafts = by_rows(lambda hidden: greedy(mtp_head(params, hidden)), mtp_hidden)
        return ScoreOutput(output.cache[None], token_ids, logprobs, drafts, output.slot_load, output.hidden, divergence)

    drafts, divergence = (None if absent else BY_RANK for absent in (params.mtp is None, reference is None))
    out_specs = specs_of(ScoreOutput, draft_ids=drafts, slot_load=SECOND_BY_RANK, kl_divergence=divergence)
    in_specs = (
        param_specs(params, EP_AXIS),
        SECOND_BY_RANK,
        BY_RANK,
        EVERYWHERE,
        None if reference is None else (BY_RANK, EVERYWHERE),
    )
    return spec.on_ranks(rank, in_specs, out_specs)(params, expert_to_slot, cache, batch, reference)
