"""Latent attention over a paged cache: absorbed, in three steps (paper section 4.2.2), and expanded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from cmjax.kernels.primitive import FLOATS, INLINE, Form, Result, make_primitive, run_kernel

Array = jax.Array
State = tuple[Array, Array, Array]  # of a running softmax: largest score, sum, values summed
_IN_PLACE = {1: 0, 2: 1, 3: 2}  # the state is an operand, and the result
_ABSORB, _RELEASE = make_primitive("absorb"), make_primitive("release")
_ATTEND, _ATTEND_EXPANDED = (make_primitive(name, aliases=_IN_PLACE) for name in ("attend", "attend_expanded"))


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is static about absorbed attention.

    Attributes:
        requests: equally many tokens each, side by side.
        nope: width of a head's queries without position.
        scale: of scores.
        block_size: tokens of a cache block.
        part: share i of n of each request's keys, as (i, n).
    """

    requests: int
    nope: int
    scale: float
    block_size: int = 1
    part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class ExpandedSpec:
    """What is static about expanded attention.

    Attributes:
        num_tokens: rows that queries can be of; behind them there are some for a form whose tiles reach beyond.
        nope: width of a head's queries without position.
        scale: of scores, positive.
        block_size: tokens of a cache block.
        part: share i of n of the keys of all sequences in a row, as (i, n).
    """

    num_tokens: int
    nope: int
    scale: float
    block_size: int
    part: tuple[int, int] = (0, 1)


def _serves(*arrays: Array) -> bool:
    return len({array.dtype for array in arrays}) == 1 and arrays[0].dtype.name in FLOATS


def _like(state: State) -> tuple[Result, ...]:
    return tuple(Result(one.shape, one.dtype) for one in state)


@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=INLINE)
def absorb(form: Form, q_nope: Array, q_pe: Array, kv_b: Array, layer: Array | int, spec: AttentionSpec) -> Array:
    """The queries that meet latents: `[requests, rows, latent + rope]` in their dtype, a token's heads side by side.

    Args:
      form: the XLA form, of the same arguments.
      q_nope, q_pe: `[tokens, heads, nope]` and `[tokens, heads, rope]`.
      kv_b: `[layers, heads, nope + v, latent]`, of which `layer` is read in place.
    """
    arguments = (q_nope, q_pe, kv_b, jnp.asarray(layer, jnp.int32))
    run, serves = functools.partial(form, spec=spec), _serves(q_nope, q_pe, kv_b)
    tokens, heads, rope = q_pe.shape
    results = Result((spec.requests, tokens * heads // spec.requests, kv_b.shape[-1] + rope), q_nope.dtype)
    return run_kernel(_ABSORB, run, arguments, results, {}, serves=serves)


@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=INLINE)
def attend(
    form: Form,
    query: Array,
    state: State,
    cache: Array,
    layer: Array | int,
    block_table: Array,
    lengths: Array,
    spec: AttentionSpec,
) -> State:
    """The running softmax after the queries have met a share of their keys; all shares in turn are the whole.

    A request's result depends on nothing but its own queries, keys and lengths.

    Args:
      form: the XLA form, of the same arguments.
      query: as `absorb` gives it.
      state: `float32[requests, rows]` twice, and `float32[requests, rows, latent + rope]`.
      cache: `[layers, slots, latent + rope, or more]`, of which `layer` is read in place.
      block_table: `int32[requests, blocks]`.
      lengths: `int32[tokens]`, keys that each token sees.
    """
    arguments = (query, state, cache, jnp.asarray(layer, jnp.int32), block_table, lengths)
    attributes = {"block_size": spec.block_size, "part": spec.part[0], "num_parts": spec.part[1], "scale": spec.scale}
    # Where devices store rows in tiles, those of the cache are wider.
    serves = _serves(query, cache) and query.shape[-1] == cache.shape[-1] and spec.scale > 0
    return run_kernel(_ATTEND, functools.partial(form, spec=spec), arguments, _like(state), attributes, serves=serves)


@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=INLINE)
def release(form: Form, total: Array, mixed: Array, kv_b: Array, layer: Array | int, spec: AttentionSpec) -> Array:
    """What comes of the means, `mixed / total`, through the value part of `kv_b`: `[tokens, heads * v]` in its dtype.

    Args:
      form: the XLA form, of the same arguments.
      total, mixed: of the state after all keys.
      kv_b, layer: as for `absorb`.
    """
    arguments = (total, mixed, kv_b, jnp.asarray(layer, jnp.int32))
    run, heads = functools.partial(form, spec=spec), kv_b.shape[1]
    results = Result((total.size // heads, heads * (kv_b.shape[2] - spec.nope)), kv_b.dtype)
    return run_kernel(_RELEASE, run, arguments, results, {"nope": spec.nope}, serves=_serves(kv_b))


@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=INLINE)
def attend_expanded(
    form: Form,
    query: Array,
    state: State,
    kv_b: Array,
    layer: Array | int,
    keys: tuple[Array, Array | int, Array],
    sequences: tuple[Array, Array, Array],
    spec: ExpandedSpec,
) -> State:
    """The running softmax after packed queries have met a share of their keys; all shares in turn are the whole.

    Keys and values of every head are made of the latents, rounded to their dtype. A row's result depends on nothing
    but its position, its sequence's keys, and itself.

    Args:
      form: the XLA form, of the same arguments.
      query: `[heads, rows, nope + rope]`, the rows of a sequence side by side.
      state: `float32[heads, rows]` twice, and `float32[heads, rows, v]`.
      kv_b, layer: as for `absorb`.
      keys: cache `[layers, slots, latent + rope, or more]`, of which a layer is read in place, the layer, and the block
        table, `int32[sequences, blocks]`.
      sequences: `int32[sequences]` each: first row, number of rows (0 for none), position of the first one, which sees
        the keys up to its own.
    """
    cache, cache_layer, block_table = keys
    places = (cache, jnp.asarray(cache_layer, jnp.int32), block_table)
    arguments = (query, state, kv_b, jnp.asarray(layer, jnp.int32), places, sequences)
    attributes = {
        "nope": spec.nope,
        "block_size": spec.block_size,
        "part": spec.part[0],
        "num_parts": spec.part[1],
        "scale": spec.scale,
    }
    width = kv_b.shape[-1] + query.shape[-1] - spec.nope
    serves = _serves(query, kv_b, cache) and width == cache.shape[-1] and spec.scale > 0
    run = functools.partial(form, spec=spec)
    return run_kernel(_ATTEND_EXPANDED, run, arguments, _like(state), attributes, serves=serves)
