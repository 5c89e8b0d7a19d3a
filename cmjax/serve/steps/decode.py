"""The jitted decode step: draft, verify, sample and keep count, without leaving the devices (paper section 4.2.4).

A step gives every sequence one token, or with k drafts of the model's own MTP module up to k + 1. Drafting: the module
takes the tokens that the last step settled, with their hidden states, and predicts the next; applied again to what it
made of the newest, it predicts the one after, and so on. Verifying: one pass of the model over the newest token and its
drafts, side by side. Every position is then sampled from the model's own logits, with noise that depends on request
and position alone; a draft is kept where it is what was sampled. So the tokens are the very ones of plain decoding, and
drafts only say how many of them a step can give: the rejection sampling of section 4.2.4, since a draft that is a fixed
token is accepted with the model's probability of it, and refused leaves the model's distribution without it.

Rows of refused drafts stay in the cache behind the newest token, where nothing reads them before they are written over.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.loops import scan
from cmjax.mesh import EP_AXIS
from cmjax.model import DecodeBatch, Params, decode_pass, draft_pass, lm_head, mtp_head, param_specs
from cmjax.serve.steps.sampling import (
    Logprobs,
    appended,
    greedy,
    is_stop,
    logprobs,
    logprobs_where_asked,
    sample,
)
from cmjax.serve.steps.sampling_state import Array, PackedSampling, SamplingState
from cmjax.serve.steps.spec import BY_RANK, NO_EXTRAS, SECOND_BY_RANK, Extras, Step, StepSpec, specs_of


@flax.struct.dataclass
class Settled:
    """The tokens that a step settled, which the MTP module has yet to see; k drafts a step.

    Attributes:
        hidden: `[places, k + 1, hidden]`, the model's hidden states of consecutive positions; of every place that a
            rank has, whether its sequence takes part or not.
        places: `int32[requests]`, each one's place on its rank.
        next_token_ids: `int32[requests, k + 1]`, the token after each.
        counts: `int32[requests]`, how many there are, 1 to k + 1; the last is the one before the newest token.
    """

    hidden: jax.Array
    places: Array
    next_token_ids: Array
    counts: Array


@flax.struct.dataclass
class DecodeState:
    """The requests of an instance between two steps; every array is cut by rank.

    Attributes:
        batch: newest tokens, positions, block tables.
        sampling: each request's settings.
        settled: where drafts are made.
        history: `int32[requests, longest]`, generated so far, -1 padded, where a request has penalties.
    """

    batch: DecodeBatch
    sampling: PackedSampling | None = None
    settled: Settled | None = None
    history: Array | None = None


@flax.struct.dataclass
class DecodeOutput:
    """What a decode call returns. k drafts a step.

    Attributes:
        cache: as for prefill, each rank with its own sequences.
        state: the requests after the call, to go on from.
        token_ids: `int32[steps * (k + 1), requests]`, those of a step side by side, -1 where there is none,
            `NOT_FINITE` where the logits are not.
        slot_load: `int32[moe layers, slots]`, summed over the steps; with drafts the MTP layer's last.
        logits: `float32[steps * (k + 1), requests, vocabulary]`, where asked for.
        logprobs: of the tokens, where asked for.
    """

    cache: jax.Array
    state: DecodeState
    token_ids: jax.Array
    slot_load: jax.Array
    logits: jax.Array | None
    logprobs: Logprobs | None


@functools.partial(Step, static_argnames=("spec", "num_steps", "extras"), donate_argnames=("cache",))
def decode(
    params: Params,
    expert_to_slot: jax.Array,
    cache: jax.Array,
    state: DecodeState,
    forced_token_ids: jax.Array | None = None,
    *,
    spec: StepSpec,
    num_steps: int,
    extras: Extras = NO_EXTRAS,
) -> DecodeOutput:
    """Run `num_steps` steps of every sequence.

    Starting a program on hundreds of devices costs more than a step of a small model, hence several steps a call.

    Args:
        params, expert_to_slot, cache: as for `prefill`.
        state: cut by rank; the block tables must hold the blocks that the steps will fill. Without `sampling`, greedy;
            with `settled` of k + 1 tokens, the MTP module guesses k ahead in each step.
        forced_token_ids: `int32[num_steps, requests]`: the token to go on with in place of the sampled one, -1 for
            none; not with drafts.
    """
    num_drafts = 0 if state.settled is None else state.settled.next_token_ids.shape[1] - 1
    if num_drafts and (params.mtp is None or forced_token_ids is not None):
        raise ValueError("drafts need an MTP module, and no forced tokens")

    def rank(
        params: Params, maps: jax.Array, cache: jax.Array, state: DecodeState, forced: jax.Array | None
    ) -> DecodeOutput:
        params = params if num_drafts else dataclasses.replace(params, mtp=None)
        settings = None if state.sampling is None else state.sampling.unpacked()

        def step(carry: tuple[jax.Array, DecodeState], forced: jax.Array | None) -> tuple[tuple, tuple]:
            cache, state = carry
            drafts, draft_load = jnp.zeros((len(state.batch.positions), 0), jnp.int32), None
            if num_drafts:
                drafts, cache, draft_load = _draft(params, maps[:, 0], cache, state, num_drafts, spec)
            batch = _with_drafts(state.batch, drafts)
            output = decode_pass(params, maps[:, 0], cache, batch, spec.rank)
            logits = lm_head(params, output.hidden)
            with jax.named_scope("sampling"):
                sampled = _sample(logits, state, drafts, forced)
            state, token_ids = _settle(state, settings, drafts, sampled, output.hidden)
            load = output.slot_load if draft_load is None else jnp.concatenate([output.slot_load, draft_load])
            best = None
            if extras.num_logprobs is not None:
                best = _logprobs(logits, sampled.reshape(-1), extras.num_logprobs, settings)
            shape, found = sampled.shape, (logits if extras.logits else None, best)
            rows = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(*shape, *a.shape[1:]), 0, 1), found)
            return (output.cache, state), (token_ids.T, load, *rows)

        (cache, state), out = scan(step, (cache[0], state), forced, length=num_steps)
        token_ids, loads, logits, best = out
        token_ids, logits, best = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (token_ids, logits, best))
        return DecodeOutput(cache[None], state, token_ids, loads.sum(0), logits, best)

    in_specs = (param_specs(params, EP_AXIS), SECOND_BY_RANK, BY_RANK, BY_RANK, SECOND_BY_RANK)
    by_step = dict.fromkeys(("token_ids", "slot_load", "logits", "logprobs"), SECOND_BY_RANK)
    out_specs = specs_of(DecodeOutput, **by_step)
    return spec.on_ranks(rank, in_specs, out_specs)(params, expert_to_slot, cache, state, forced_token_ids)


def _draft(
    params: Params,
    maps: jax.Array,
    cache: jax.Array,
    state: DecodeState,
    num_drafts: int,
    spec: StepSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Guess the tokens after the newest: `(int32[requests, k], cache, slot load of the MTP layer)`."""
    batch, settled = state.batch, state.settled
    assert settled is not None
    is_running = batch.positions >= 0
    # Where everything goes is known before anything runs: the settled tokens' positions, then one each pass.
    index = jnp.arange(settled.next_token_ids.shape[1])
    positions = batch.positions[:, None] - settled.counts[:, None] + index
    positions = jnp.where(is_running[:, None] & (index < settled.counts[:, None]), positions, -1)
    drafts = jnp.zeros((len(is_running), 0), jnp.int32)
    hidden, next_token_ids = settled.hidden[settled.places], settled.next_token_ids
    load = jnp.zeros((0, 0), jnp.int32)
    for ahead in range(num_drafts):
        rows = DecodeBatch(next_token_ids.reshape(-1), positions.reshape(-1), batch.last_positions, batch.block_table)
        flat = hidden.reshape(-1, hidden.shape[-1])
        output = draft_pass(params, maps, cache, rows, flat, spec.rank, channel=f"draft{ahead}")
        cache, load = output.cache, output.slot_load if ahead == 0 else load + output.slot_load
        made = output.hidden.reshape(hidden.shape)
        if ahead == 0:
            made = jnp.take_along_axis(made, settled.counts[:, None, None] - 1, axis=1)
        logits = mtp_head(params, made[:, 0])
        # Position p + 1 + ahead, by the very noise that the token there will be sampled with: the guess is likelier.
        with jax.named_scope("sampling"):
            guess = _chosen(logits, state, batch.positions + 1 + ahead, drafts, first=ahead)
        drafts = jnp.concatenate([drafts, guess[:, None]], axis=1)
        hidden, next_token_ids = made, guess[:, None]
        position = batch.positions + ahead
        positions = jnp.where(is_running & (position <= batch.last_positions), position, -1)[:, None]
    return drafts, cache, load


def _with_drafts(batch: DecodeBatch, drafts: jax.Array) -> DecodeBatch:
    """The newest tokens and their drafts side by side, `[requests * (k + 1)]`; those beyond the last position empty."""
    positions = batch.positions[:, None] + jnp.arange(drafts.shape[1] + 1)
    is_valid = (batch.positions[:, None] >= 0) & (positions <= batch.last_positions[:, None])
    token_ids = jnp.concatenate([batch.token_ids[:, None], drafts], axis=1)
    return dataclasses.replace(
        batch, token_ids=token_ids.reshape(-1), positions=jnp.where(is_valid, positions, -1).reshape(-1)
    )


def _chosen(logits: jax.Array, state: DecodeState, positions: jax.Array, drafts: jax.Array, first: int) -> jax.Array:
    """See `sample`."""
    if state.sampling is None:
        return greedy(logits)
    return sample(logits, state.sampling, positions, state.history, drafts, first=first)


def _sample(logits: jax.Array, state: DecodeState, drafts: jax.Array, forced: jax.Array | None) -> jax.Array:
    """The token after the newest and after each draft, those before it taken as given: `int32[requests, k + 1]`."""
    width = drafts.shape[1] + 1
    positions = state.batch.positions[:, None] + 1 + jnp.arange(width)
    sampled = _chosen(logits, state, positions.reshape(-1), drafts, first=0).reshape(-1, width)
    return sampled if forced is None else jnp.where(forced[:, None] >= 0, forced[:, None], sampled)


def _logprobs(logits: jax.Array, token_ids: jax.Array, num_top: int, settings: SamplingState | None) -> Logprobs:
    """Of `token_ids int32[requests * (k + 1)]`; nothing is computed where a rank has no request that asks."""
    if settings is None:
        return logprobs(logits, token_ids, num_top)
    return logprobs_where_asked(settings.asks_logprobs > 0, token_ids, num_top, lambda: logits)


def _settle(
    state: DecodeState, settings: SamplingState | None, drafts: jax.Array, sampled: jax.Array, hidden: jax.Array
) -> tuple[DecodeState, jax.Array]:
    """Keep what was sampled up to the first refused draft or the end: the next state, and `int32[requests, k + 1]`."""
    batch, width = state.batch, sampled.shape[1]
    is_running = batch.positions >= 0
    index = jnp.arange(width)
    is_within = batch.positions[:, None] + index <= batch.last_positions[:, None]
    num_accepted = jnp.cumprod((drafts == sampled[:, :-1]) & is_within[:, 1:], axis=1).sum(1)
    is_end = sampled < 0
    if settings is not None:
        is_end |= is_stop(sampled, settings)
    num_before_end = jnp.cumprod(~is_end, axis=1).sum(1)
    counts = jnp.minimum(num_accepted, num_before_end) + 1
    positions = batch.positions + counts
    goes_on = is_running & (num_accepted < num_before_end) & (positions <= batch.last_positions)
    newest = jnp.take_along_axis(sampled, counts[:, None] - 1, axis=1)[:, 0]
    kept = jnp.where(is_running[:, None] & (index < counts[:, None]), sampled, -1)
    settled = state.settled
    if settled is not None:
        # One that waits for its latents, or has ended, keeps what it has.
        target = jnp.where(is_running, settled.places, len(settled.hidden))
        kept_hidden = settled.hidden.at[target].set(hidden.reshape(*sampled.shape, -1), mode="drop")
        settled = Settled(
            kept_hidden,
            settled.places,
            jnp.where(is_running[:, None], sampled, settled.next_token_ids),
            jnp.where(is_running, counts, settled.counts),
        )
    history = state.history
    if history is not None:
        history = appended(history, sampled, jnp.where(is_running, counts, 0))
    batch = dataclasses.replace(batch, token_ids=newest, positions=jnp.where(goes_on, positions, -1))
    return dataclasses.replace(state, batch=batch, settled=settled, history=history), kept
