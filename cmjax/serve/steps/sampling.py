"""Sampling in the graph, each request by its own settings, and log probabilities (paper section 4.2.4).

The noise of a token depends on its request's seed and its position alone: not on the batch, the rank, the steps of a
call, or on whether it was guessed before. One set of noise serves a draft and the token that verifies it.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.schedule import NOT_FINITE, NOTHING_ALLOWED, Ragged, SamplingRows, SamplingShape

# On the host, or in a step.
Array = np.ndarray | jax.Array
# What requests have generated, or what makes it, where it is work that only some requests need.
History = Array | Callable[[], Array]

# What is read where a token is chosen, one value a row; and rows of a width that the shape gives, with what fills them.
_VALUES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_positions",
    "asks_logprobs",
    "seed",
)
_LISTS = {"bias_ids": -1, "bias_values": 0, "stop_ids": -1, "word_ids": -1, "word_ends": -1}
_MASKS = {"prompt_mask": 0, "allowed_mask": 0xFF}


@flax.struct.dataclass
class SamplingState:
    """How each of the rows of a batch is sampled.

    Attributes:
        temperature: `float32[rows]`, 0 for the best token.
        top_k: `int32[rows]`, 0 for all.
        top_p, min_p: `float32[rows]`, 1 and 0 for all.
        presence_penalty, frequency_penalty: `float32[rows]`.
        repetition_penalty: `float32[rows]`, 1 for none.
        min_positions: `int32[rows]`, the first position that may hold a stop token.
        asks_logprobs: `int32[rows]`, whether the log probabilities of its tokens are asked for.
        seed: `uint32[rows, 2]`, high and low half.
        bias_ids, bias_values: `int32[rows, any]`, -1 padded, and `float32` of the same shape.
        stop_ids: `int32[rows, any]`, -1 padded; a token among them is a request's last.
        word_ids, word_ends: `int32[rows, any]`, -1 padded: the tokens of bad words, one word after another, and how
            many come after each in its word.
        prompt_mask, allowed_mask: `uint8[rows, bytes]`, a bit for each token of the vocabulary, the lowest of a byte
            first: those of the prompt (where there is a repetition penalty), and those that are allowed.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    presence_penalty: Array
    frequency_penalty: Array
    repetition_penalty: Array
    min_positions: Array
    asks_logprobs: Array
    seed: Array
    bias_ids: Array
    bias_values: Array
    stop_ids: Array
    word_ids: Array
    word_ends: Array
    prompt_mask: Array
    allowed_mask: Array

    @classmethod
    def empty(
        cls, rows: int, num_bias: int = 0, num_stop: int = 0, num_word_tokens: int = 0, num_mask_bytes: int = 0
    ) -> "SamplingState":
        """Host arrays for `rows` greedy rows, with room for so much each."""
        zeros = [np.zeros(rows, np.float32) for _ in range(6)]
        return cls(
            temperature=zeros[0],
            top_k=np.zeros(rows, np.int32),
            top_p=zeros[1] + 1,
            min_p=zeros[2],
            presence_penalty=zeros[3],
            frequency_penalty=zeros[4],
            repetition_penalty=zeros[5] + 1,
            min_positions=np.zeros(rows, np.int32),
            asks_logprobs=np.zeros(rows, np.int32),
            seed=np.zeros((rows, 2), np.uint32),
            bias_ids=np.full((rows, num_bias), -1, np.int32),
            bias_values=np.zeros((rows, num_bias), np.float32),
            stop_ids=np.full((rows, num_stop), -1, np.int32),
            word_ids=np.full((rows, num_word_tokens), -1, np.int32),
            word_ends=np.full((rows, num_word_tokens), -1, np.int32),
            prompt_mask=np.zeros((rows, num_mask_bytes), np.uint8),
            allowed_mask=np.full((rows, num_mask_bytes), 0xFF, np.uint8),
        )

    @classmethod
    def for_shape(cls, rows: int, shape: SamplingShape, vocabulary: int) -> "SamplingState":
        """Host arrays for `rows` greedy rows, with room for all that a shape allows."""
        num_mask_bytes = -(-vocabulary // 8) if shape.has_masks else 0
        return cls.empty(rows, shape.num_bias, shape.num_stop, shape.num_word_tokens, num_mask_bytes)

    def write(self, rows: np.ndarray, given: SamplingRows) -> None:
        """Write requests' settings into rows of host arrays that have room for them."""
        for name in _VALUES:
            getattr(self, name)[rows] = getattr(given, name)
        for name, filler in _LISTS.items():
            getattr(self, name)[rows] = filler
            getattr(given, name).write_into(getattr(self, name), rows)
        if self.prompt_mask.shape[1]:
            self.prompt_mask[rows] = _mask(given.prompt_ids, self.prompt_mask.shape[1])
            allowed = _mask(given.allowed_ids, self.allowed_mask.shape[1])
            allowed[given.allowed_ids.lengths == 0] = 0xFF
            self.allowed_mask[rows] = allowed

    def take(self, narrow: "SamplingState") -> None:
        """Write all rows of host arrays with room for less into these."""
        for field in dataclasses.fields(self):
            values = getattr(narrow, field.name)
            getattr(self, field.name)[tuple(map(slice, values.shape))] = values

    def rows(self, index: np.ndarray, shape: SamplingShape, vocabulary: int) -> "SamplingState":
        """Some rows of host arrays, with room for what a shape allows."""
        narrow = SamplingState.for_shape(0, shape, vocabulary)
        fields = {field.name: getattr(self, field.name)[index] for field in dataclasses.fields(self)}
        for name in (*_LISTS, *_MASKS):
            fields[name] = fields[name][:, : getattr(narrow, name).shape[1]]
        return SamplingState(**fields)

    def clear(self, rows: np.ndarray) -> None:
        """Make rows of host arrays greedy, so that they do not have the others draw, sort or add."""
        empty = SamplingState.empty(1)
        for name in _VALUES:
            getattr(self, name)[rows] = getattr(empty, name)[0]
        for name, filler in (_LISTS | _MASKS).items():
            getattr(self, name)[rows] = filler


@flax.struct.dataclass
class PackedSampling:
    """A `SamplingState` as one array: one argument of a step to cut by rank, and to send to hundreds of devices, in
    place of a dozen and more.

    Attributes:
        words: `int32[rows, any]`, the bytes of each row's fields one after another, each from a word on.
        layout: dtype and width of each field, None for one of a value a row.
    """

    words: Array
    layout: tuple[tuple[str, int | None], ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, state: SamplingState) -> "PackedSampling":
        """Pack host arrays."""
        arrays = [np.asarray(getattr(state, field.name)) for field in dataclasses.fields(state)]
        parts = [np.ascontiguousarray(a.reshape(len(a), -1)).view(np.uint8).reshape(len(a), -1) for a in arrays]
        padded = [np.pad(part, ((0, 0), (0, -part.shape[1] % 4))) for part in parts]
        layout = tuple((a.dtype.name, a.shape[1] if a.ndim == 2 else None) for a in arrays)
        return cls(np.concatenate(padded, axis=1).view(np.int32), layout)

    def unpacked(self) -> SamplingState:
        """In a step."""
        words, begin, fields = jnp.asarray(self.words), 0, []
        for dtype, width in self.layout:
            count, per_word = 1 if width is None else width, 4 // np.dtype(dtype).itemsize
            num_words = -(-count // per_word)
            part = lax.bitcast_convert_type(words[:, begin : begin + num_words], dtype)
            values = part.reshape(len(words), num_words * per_word)
            fields.append(values[:, 0] if width is None else values[:, :width])
            begin += num_words
        return SamplingState(*fields)


def _mask(ids: Ragged, num_bytes: int) -> np.ndarray:
    """A bit for each token id, `uint8[rows, num_bytes]`."""
    bits = np.zeros((len(ids.lengths), num_bytes * 8), bool)
    bits[np.repeat(np.arange(len(ids.lengths)), ids.lengths), ids.values] = True
    return np.packbits(bits, axis=1, bitorder="little")


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
    return _finite_only(_best(logits), logits)


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


def sample(logits: jax.Array, state: SamplingState, positions: jax.Array, history: History | None = None) -> jax.Array:
    """The token at `positions int32[rows]` of each request: `int32[rows]`, `NOT_FINITE` where the logits are not, and
    `NOTHING_ALLOWED` where the request's settings leave no token.

    In vLLM's order: what is forbidden, biases, penalties, then the best token or (temperature, min-p, top-k, top-p) a
    draw. Of equal logits at the edge of a filter all are kept, whatever the others of the batch are.

    Args:
        logits: `float32[rows, vocabulary]`.
        state: of the rows.
        positions: those of the tokens to sample.
        history: `int32[rows, any]`, what each request has generated so far, -1 padded, or what makes it; None: nothing,
            or nothing that counts.
    """
    adjusted = _adjusted(logits, state, positions, history)
    best = _best(adjusted)
    is_random = state.temperature > 0

    def draw() -> jax.Array:
        kept = _filtered(adjusted / jnp.where(is_random, state.temperature, 1)[:, None], state)
        drawn = _best(kept + _noise(state.seed, positions, logits.shape[-1]))
        return jnp.where(is_random, drawn, best)

    token_ids = lax.cond(is_random.any(), draw, lambda: best)
    return _finite_only(jnp.where(adjusted.max(-1) == -jnp.inf, NOTHING_ALLOWED, token_ids), logits)


def _adjusted(logits: jax.Array, state: SamplingState, positions: jax.Array, history: History | None) -> jax.Array:
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
    logits: jax.Array, state: SamplingState, positions: jax.Array, history: History | None
) -> jax.Array:
    if state.allowed_mask.shape[1]:
        logits = jnp.where(_unpacked(state.allowed_mask, logits.shape[1]), logits, -jnp.inf)
    if state.word_ids.shape[1]:
        logits = _at(logits, jnp.where(_ends_word(state, _made(history)), state.word_ids, -1), -jnp.inf)
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


def _made(history: History | None) -> Array | None:
    return history() if callable(history) else history


def _penalized(logits: jax.Array, state: SamplingState, history: History | None) -> jax.Array:
    counts, generated = jnp.zeros(logits.shape, jnp.int32), _made(history)
    if generated is not None:
        counts = _at(counts, generated, 1)
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
    x = jnp.where(x >= x.max(-1, keepdims=True) + jnp.log(state.min_p)[:, None], x, -jnp.inf)
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
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocabulary,), jnp.float32)

    return jax.vmap(row)(jnp.asarray(seed), positions)
