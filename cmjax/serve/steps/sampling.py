"""Sampling in the graph, each request by its own settings, and log probabilities (paper section 4.2.4).

The noise of a token depends on its request's seed and its position alone: not on the batch, the rank, the steps of a
call, or on whether it was guessed before. One set of noise serves a draft and the token that verifies it.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from cmjax.kernels import SamplerSpec, choose_tokens
from cmjax.schedule import NOT_FINITE, NOTHING_ALLOWED
from cmjax.serve.steps.sampling_state import Array, PackedSampling, SamplingState

# What makes an array that only some requests need.
Maker = Callable[[], Array]


@flax.struct.dataclass
class Logprobs:
    """Log probabilities (natural) by the model's own logits, before any setting of a request changes them.

    Attributes:
        chosen: `float32[rows]`, of the token.
        rank: `int32[rows]`, its place among all, 1 for the best.
        top_ids, top: `int32[rows, n]`, `float32[rows, n]`, the n best, best first.
    """

    chosen: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top: jax.Array


def logprobs_where_asked(
    is_asked: Array, token_ids: jax.Array, num_top: int, logits: Callable[[], jax.Array]
) -> Logprobs:
    """See `logprobs`; zeros where none of the rows is asked for, `is_asked bool[rows]`."""

    def nothing() -> Logprobs:
        rows = len(token_ids)
        values, ids = jnp.zeros((rows, num_top), jnp.float32), jnp.zeros((rows, num_top), jnp.int32)
        return Logprobs(jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.int32), ids, values)

    return lax.cond(jnp.any(is_asked), lambda: logprobs(logits(), token_ids, num_top), nothing)


def logprobs(logits: jax.Array, token_ids: jax.Array, num_top: int) -> Logprobs:
    """Of `token_ids int32[rows]` under `logits float32[rows, vocabulary]`, and of the `num_top` best."""
    every = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(every, jnp.maximum(token_ids, 0)[:, None], axis=-1)
    top, top_ids = lax.top_k(every, num_top)
    return Logprobs(chosen[:, 0], jnp.sum(every > chosen, axis=-1) + 1, top_ids, top)


def greedy(logits: jax.Array) -> jax.Array:
    """The best token, or `NOT_FINITE`: the index of NaN, the largest of logits that hold it, looks like any other."""
    rows = len(logits)
    nothing = jnp.zeros((rows, 0), jnp.int32)
    spec = SamplerSpec(not_finite=NOT_FINITE, nothing_allowed=NOTHING_ALLOWED)
    return choose_tokens(_form, logits, nothing, jnp.zeros(rows, jnp.int32), nothing, nothing, spec)


def _best(scores: jax.Array) -> jax.Array:
    """The first index of each row's maximum, `int32[rows]`; XLA's argmax is scalar code on a CPU, the two reductions of
    this are not. Nonsense where a row holds NaN."""
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    return jnp.where(scores == scores.max(-1, keepdims=True), index, scores.shape[-1]).min(-1)


def _finite_only(token_ids: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(logits.max(-1)), token_ids, NOT_FINITE)


def repeat(state: SamplingState, times: int) -> SamplingState:
    """Each row so many times, side by side."""
    return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), state) if times > 1 else state


def is_stop(token_ids: jax.Array, state: SamplingState) -> jax.Array:
    """Whether `token_ids int32[rows, any]` are among their row's stop tokens."""
    return (token_ids[..., None] == state.stop_ids[:, None]).any(-1) & (token_ids >= 0)


def appended(history: Array, token_ids: Array, counts: Array) -> jax.Array:
    """`history[requests, longest]` with the first `counts` of `token_ids[requests, some]` after what it holds."""
    index = jnp.arange(token_ids.shape[1])
    end = (jnp.asarray(history) >= 0).sum(1, keepdims=True)
    target = jnp.where(index < counts[:, None], end + index, history.shape[1])
    return jnp.asarray(history).at[jnp.arange(len(history))[:, None], target].set(token_ids, mode="drop")


def sample(
    logits: jax.Array,
    sampling: PackedSampling,
    positions: jax.Array,
    history: Array | None = None,
    drafts: Array | None = None,
    *,
    first: int = 0,
) -> jax.Array:
    """The token at `positions int32[rows]` of each request: `int32[rows]`, `NOT_FINITE` where the logits are not, and
    `NOTHING_ALLOWED` where the request's settings leave no token.

    In vLLM's order: what is forbidden, biases, penalties, then the best token or (temperature, min-p, top-k, top-p) a
    draw. Of equal logits at the edge of a filter all are kept, whatever the others of the batch are.

    Args:
        logits: `float32[rows, vocabulary]`, the same number of rows for each request, side by side.
        sampling: of the requests.
        positions: those of the tokens to sample.
        history: `int32[requests, any]`, what each request has generated so far, -1 padded; None: nothing, or nothing
            that counts.
        drafts: `int32[requests, any]`, guesses at what comes after it: a request's first row has the first `first` of
            them behind its history, each further row one more.
    """
    requests = len(sampling.words)
    width = len(logits) // requests
    nothing = jnp.zeros((requests, 0), jnp.int32)
    if history is None or drafts is None:
        drafts = nothing
    if history is not None and drafts.shape[1] < first + width - 1:
        raise ValueError(f"{width} rows a request from {first} drafts on need more than {drafts.shape[1]} drafts")
    before = nothing if history is None else jnp.asarray(history)
    spec = SamplerSpec(
        width=width, first=first, not_finite=NOT_FINITE, nothing_allowed=NOTHING_ALLOWED, **sampling.room
    )
    return choose_tokens(_form, logits, jnp.asarray(sampling.words), positions, before, jnp.asarray(drafts), spec)


@functools.cache
def _layout(*room: int) -> tuple[tuple[str, int | None], ...]:
    return PackedSampling.of(SamplingState.empty(1, *room)).layout


def _form(
    logits: jax.Array, words: jax.Array, positions: jax.Array, history: jax.Array, drafts: jax.Array, spec: SamplerSpec
) -> jax.Array:
    """The XLA form of `sample`, and without words of `greedy`."""
    if not words.shape[1]:
        return _finite_only(_best(logits), logits)
    layout = _layout(spec.num_bias, spec.num_stop, spec.num_word_tokens, spec.num_mask_bytes)
    state = repeat(PackedSampling(words, layout).unpacked(), spec.width)

    def generated() -> jax.Array:
        counts = range(spec.first, spec.first + spec.width)
        each = [appended(history, drafts, jnp.full(len(drafts), count)) for count in counts]
        return jnp.stack(each, axis=1).reshape(-1, history.shape[1])

    if not history.shape[1]:
        return _sampled(logits, state, positions, None)
    return _sampled(logits, state, positions, generated if drafts.shape[1] else lambda: history)


def _sampled(logits: jax.Array, state: SamplingState, positions: jax.Array, history: Maker | None) -> jax.Array:
    """Of as many rows of settings as there are logits; `history` makes `int32[rows, any]`."""
    adjusted = _adjusted(logits, state, positions, history)
    best = _best(adjusted)
    is_random = state.temperature > 0

    def draw() -> jax.Array:
        kept = _filtered(adjusted / jnp.where(is_random, state.temperature, 1)[:, None], state)
        drawn = _best(kept + _noise(state.seed, positions, logits.shape[-1]))
        return jnp.where(is_random, drawn, best)

    token_ids = lax.cond(is_random.any(), draw, lambda: best)
    return _finite_only(jnp.where(adjusted.max(-1) == -jnp.inf, NOTHING_ALLOWED, token_ids), logits)


def _adjusted(logits: jax.Array, state: SamplingState, positions: jax.Array, history: Maker | None) -> jax.Array:
    """`logits` with each row's settings but temperature and filters. What hardly any request has is behind a condition:
    scatters are scalar code on a CPU."""
    forbids = jnp.any(positions < state.min_positions) | (state.word_ids >= 0).any()
    forbids |= (state.allowed_mask != 0xFF).any()
    if state.stop_ids.shape[1] or state.word_ids.shape[1] or state.allowed_mask.shape[1]:
        logits = lax.cond(forbids, lambda x: _without_forbidden(x, state, positions, history), lambda x: x, logits)
    if state.bias_ids.shape[1]:
        has_bias = (state.bias_ids >= 0).any()
        logits = lax.cond(
            has_bias, lambda x: _at(x, state.bias_ids, jnp.asarray(state.bias_values)), lambda x: x, logits
        )
    if history is None and not state.prompt_mask.shape[1]:
        return logits
    has_penalty = (state.presence_penalty != 0) | (state.frequency_penalty != 0) | (state.repetition_penalty != 1)
    return lax.cond(has_penalty.any(), lambda x: _penalized(x, state, history), lambda x: x, logits)


def _at(logits: jax.Array, token_ids: Array, values: jax.Array | float) -> jax.Array:
    """`logits[rows, vocabulary]` plus `values` at `token_ids int32[rows, any]`, -1 for none."""
    rows = jnp.arange(logits.shape[0])[:, None]
    index = jnp.where(token_ids < 0, logits.shape[1], token_ids)
    return logits.at[rows, index].add(values, mode="drop")


def _without_forbidden(
    logits: jax.Array, state: SamplingState, positions: jax.Array, history: Maker | None
) -> jax.Array:
    if state.allowed_mask.shape[1]:
        logits = jnp.where(_unpacked(state.allowed_mask, logits.shape[1]), logits, -jnp.inf)
    if state.word_ids.shape[1]:
        logits = _at(
            logits, jnp.where(_ends_word(state, None if history is None else history()), state.word_ids, -1), -jnp.inf
        )
    is_early = (positions < state.min_positions)[:, None]
    return _at(logits, jnp.where(is_early, state.stop_ids, -1), -jnp.inf)


def _ends_word(state: SamplingState, history: Array | None) -> jax.Array:
    """Which of `state.word_ids` are the last of a bad word whose other tokens have just been generated: `bool`."""
    word_ids, ends = jnp.asarray(state.word_ids), jnp.asarray(state.word_ends)
    is_there = ends == 0
    if history is not None:
        place = (jnp.asarray(history) >= 0).sum(1, keepdims=True) - ends
        before = jnp.take_along_axis(jnp.asarray(history), jnp.maximum(place, 0), axis=1)
        is_there |= (place >= 0) & (before == word_ids)
    # A word is there where, from its first token on, none is missing.
    num_missing = jnp.cumsum(~is_there, axis=1)
    follows_end = jnp.pad(ends[:, :-1] == 0, ((0, 0), (1, 0)), constant_values=True)
    before_word = lax.cummax(jnp.where(follows_end, num_missing - ~is_there, -1), axis=1)
    return (ends == 0) & (num_missing == before_word)


def _penalized(logits: jax.Array, state: SamplingState, history: Maker | None) -> jax.Array:
    counts = jnp.zeros(logits.shape, jnp.int32)
    if history is not None:
        counts = _at(counts, history(), 1)
    if state.prompt_mask.shape[1]:
        is_repeated = _unpacked(state.prompt_mask, logits.shape[1]) | (counts > 0)
        penalty = jnp.where(is_repeated, state.repetition_penalty[:, None], 1)
        logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return logits - state.frequency_penalty[:, None] * counts - state.presence_penalty[:, None] * (counts > 0)


def _unpacked(mask: Array, vocabulary: int) -> jax.Array:
    """The bits of `uint8[rows, bytes]`, the lowest of a byte first: `bool[rows, vocabulary]`."""
    bits = (jnp.asarray(mask)[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return bits.reshape(len(mask), -1)[:, :vocabulary] > 0


def _filtered(x: jax.Array, state: SamplingState) -> jax.Array:
    """`x[rows, vocabulary]`, logits over temperature, -inf where min-p, top-k or top-p leave a token out."""
    least = jnp.where(state.min_p > 0, x.max(-1) + jnp.log(state.min_p), -jnp.inf)
    x = jnp.where(x >= least[:, None], x, -jnp.inf)
    is_random = state.temperature > 0
    has_top_k, has_top_p = is_random & (state.top_k > 0), is_random & (state.top_p < 1)

    def best_k(x: jax.Array) -> jax.Array:
        is_kept = _is_within(x, jnp.ones(x.shape, jnp.int32), jnp.asarray(state.top_k))
        return jnp.where(is_kept | ~has_top_k[:, None], x, -jnp.inf)

    def best_p(x: jax.Array) -> jax.Array:
        is_kept = _is_within(x, jax.nn.softmax(x, axis=-1), jnp.asarray(state.top_p))
        return jnp.where(is_kept | ~has_top_p[:, None], x, -jnp.inf)

    x = lax.cond(has_top_k.any(), best_k, lambda x: x, x)
    return lax.cond(has_top_p.any(), best_p, lambda x: x, x)


def _is_within(x: jax.Array, weights: jax.Array, most: jax.Array) -> jax.Array:
    """Which of `x[rows, vocabulary]` have less than `most[rows]` of the weights above them, and the best in any case.

    By bisection of the bits of float32, 32 sums a row: sorting is far slower on a CPU, and no faster elsewhere.
    """

    def value(key: jax.Array) -> jax.Array:
        """Of keys in the order of floats; those that stand for NaN are above nothing."""
        bits = jnp.where(key >> 31 > 0, key ^ jnp.uint32(1 << 31), ~key)
        return lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def next_bit(index: jax.Array, key: jax.Array) -> jax.Array:
        """The largest key with `most` or more above it, bit by bit."""
        longer = key | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        above = jnp.sum(jnp.where(x > value(longer), weights, 0), axis=-1)
        return jnp.where(above >= most, longer, key)

    key = lax.fori_loop(0, 32, next_bit, jnp.zeros(len(x), jnp.uint32))
    # Key 0: there is not so much in the whole row.
    return (x > value(key)) | (key == 0)[:, None] | (x == x.max(-1, keepdims=True))


def _noise(seed: Array, positions: jax.Array, vocabulary: int) -> jax.Array:
    """Gumbel noise, `float32[rows, vocabulary]`: the largest of logits plus it is a draw from their softmax."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocabulary,), jnp.float32, mode="low")

    # The numbers of one token do not depend on the size of the vocabulary, or on how JAX is set up.
    with jax.threefry_partitionable(True):
        return jax.vmap(row)(jnp.asarray(seed), positions)
