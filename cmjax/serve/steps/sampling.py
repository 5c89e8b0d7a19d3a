"""Sampling in the graph, each request by its own settings, and log probabilities (paper section 4.2.4).

The noise of a token depends on its request's seed and its position alone: not on the batch, the rank, the steps of a
call, or on whether it was guessed before. One set of noise serves a draft and the token that verifies it.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.schedule import NOT_FINITE, SamplingRows

# On the host, or in a step.
Array = np.ndarray | jax.Array


@flax.struct.dataclass
class SamplingState:
    """How each of the rows of a batch is sampled.

    Attributes:
        temperature: `float32[rows]`, 0 for the best token.
        top_k: `int32[rows]`, 0 for all.
        top_p, min_p: `float32[rows]`, 1 and 0 for all.
        presence_penalty, frequency_penalty: `float32[rows]`.
        seed: `uint32[rows, 2]`, high and low half.
        bias_ids, bias_values: `int32[rows, any]`, -1 padded, and `float32` of the same shape.
        stop_ids: `int32[rows, any]`, -1 padded; a token among them is a request's last.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    presence_penalty: Array
    frequency_penalty: Array
    seed: Array
    bias_ids: Array
    bias_values: Array
    stop_ids: Array

    @classmethod
    def empty(cls, rows: int, num_bias: int = 0, num_stop: int = 0) -> "SamplingState":
        """Host arrays for `rows` greedy rows, with room for so many biases and stop tokens each."""
        zeros = [np.zeros(rows, np.float32) for _ in range(5)]
        return cls(
            temperature=zeros[0],
            top_k=np.zeros(rows, np.int32),
            top_p=zeros[1] + 1,
            min_p=zeros[2],
            presence_penalty=zeros[3],
            frequency_penalty=zeros[4],
            seed=np.zeros((rows, 2), np.uint32),
            bias_ids=np.full((rows, num_bias), -1, np.int32),
            bias_values=np.zeros((rows, num_bias), np.float32),
            stop_ids=np.full((rows, num_stop), -1, np.int32),
        )

    def write(self, rows: np.ndarray, given: SamplingRows) -> None:
        """Write requests' settings into rows of host arrays that have room for their biases and stop tokens."""
        for name in ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "seed"):
            getattr(self, name)[rows] = getattr(given, name)
        for name in ("bias_ids", "bias_values", "stop_ids"):
            getattr(self, name)[rows] = 0 if name == "bias_values" else -1
            getattr(given, name).write_into(getattr(self, name), rows)

    def take(self, narrow: "SamplingState") -> None:
        """Write all rows of host arrays with room for fewer biases and stop tokens into these."""
        for field in dataclasses.fields(self):
            values = getattr(narrow, field.name)
            getattr(self, field.name)[tuple(map(slice, values.shape))] = values

    def rows(self, index: np.ndarray, num_bias: int, num_stop: int) -> "SamplingState":
        """Some rows of host arrays, with room for so many biases and stop tokens."""
        widths = {"bias_ids": num_bias, "bias_values": num_bias, "stop_ids": num_stop}
        fields = {field.name: getattr(self, field.name)[index] for field in dataclasses.fields(self)}
        return SamplingState(**{name: a[:, : widths[name]] if name in widths else a for name, a in fields.items()})

    def clear(self, rows: np.ndarray) -> None:
        """Make rows of host arrays greedy, so that they do not have the others draw, sort or add."""
        empty = SamplingState.empty(1, self.bias_ids.shape[1], self.stop_ids.shape[1])
        for field in dataclasses.fields(self):
            getattr(self, field.name)[rows] = getattr(empty, field.name)[0]


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


def sample(logits: jax.Array, state: SamplingState, positions: jax.Array, history: Array | None = None) -> jax.Array:
    """The token at `positions int32[rows]` of each request: `int32[rows]`, `NOT_FINITE` where the logits are not.

    In vLLM's order: biases, penalties, then the best token or (temperature, min-p, top-k, top-p) a draw. Of equal
    logits at the edge of a filter all are kept, whatever the others of the batch are.

    Args:
        logits: `float32[rows, vocabulary]`.
        state: of the rows.
        positions: those of the tokens to sample.
        history: `int32[rows, any]`, what each request has generated so far, -1 padded; None: no row has penalties.
    """
    adjusted = _adjusted(logits, state, history)
    best = _best(adjusted)
    is_random = state.temperature > 0

    def draw() -> jax.Array:
        kept = _filtered(adjusted / jnp.where(is_random, state.temperature, 1)[:, None], state)
        drawn = _best(kept + _noise(state.seed, positions, logits.shape[-1]))
        return jnp.where(is_random, drawn, best)

    return _finite_only(lax.cond(is_random.any(), draw, lambda: best), logits)


def _adjusted(logits: jax.Array, state: SamplingState, history: Array | None) -> jax.Array:
    rows = jnp.arange(logits.shape[0])[:, None]
    vocabulary = logits.shape[1]
    if state.bias_ids.shape[1]:
        index = jnp.where(state.bias_ids < 0, vocabulary, state.bias_ids)
        has_bias = (state.bias_ids >= 0).any()
        # The scatter is scalar code on a CPU, and hardly any request has a bias.
        logits = lax.cond(
            has_bias, lambda x: x.at[rows, index].add(state.bias_values, mode="drop"), lambda x: x, logits
        )
    if history is not None:
        index = jnp.where(history < 0, vocabulary, history)
        counts = jnp.zeros(logits.shape, jnp.int32).at[rows, index].add(1, mode="drop")
        logits -= state.frequency_penalty[:, None] * counts + state.presence_penalty[:, None] * (counts > 0)
    return logits


def _filtered(x: jax.Array, state: SamplingState) -> jax.Array:
    """`x[rows, vocabulary]`, logits over temperature, -inf where min-p, top-k or top-p leave a token out."""
    vocabulary = x.shape[-1]
    x = jnp.where(x >= x.max(-1, keepdims=True) + jnp.log(state.min_p)[:, None], x, -jnp.inf)

    def by_rank() -> jax.Array:
        descending = -jnp.sort(-x, axis=-1)
        num_kept = jnp.where(state.top_k > 0, jnp.minimum(state.top_k, vocabulary), vocabulary)[:, None]
        descending = jnp.where(jnp.arange(vocabulary) < num_kept, descending, -jnp.inf)
        p = jax.nn.softmax(descending, axis=-1)
        # Kept as long as the better ones have not reached top_p: the best always is, be top_p 0 in float32.
        is_kept = (jnp.cumsum(p, axis=-1) - p < state.top_p[:, None]) | (state.top_p[:, None] >= 1)
        is_kept = (is_kept & (descending > -jnp.inf)).at[:, 0].set(True)
        last = jnp.min(jnp.where(is_kept, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(x >= last, x, -jnp.inf)

    has_rank = ((state.temperature > 0) & ((state.top_k > 0) | (state.top_p < 1))).any()
    return lax.cond(has_rank, by_rank, lambda: x)


def _noise(seed: Array, positions: jax.Array, vocabulary: int) -> jax.Array:
    """Gumbel noise, `float32[rows, vocabulary]`: the largest of logits plus it is a draw from their softmax."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocabulary,), jnp.float32)

    return jax.vmap(row)(jnp.asarray(seed), positions)
