"""Multi-head latent attention: expanded for prefill, absorbed for decode (paper sections 4.2.2 and 4.3.1).

Both forms read keys and values from the latent cache in chunks of blocks, with a running softmax, so that neither
scores nor expanded keys ever exceed one chunk, and a request's result does not depend on what else is in its batch.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from cmjax.kernels import AttentionSpec, ExpandedSpec, absorb, attend, attend_expanded, norm, release
from cmjax.loops import dynamic_loop
from cmjax.model.cache import PagedKeys
from cmjax.model.config import LATENT_NORM_EPS, ModelConfig
from cmjax.model.params import AttentionParams
from cmjax.model.rope import apply_rope, rope_tables
from cmjax.quant import einsum_f32, in_stack, is_by_inputs, linear, own_matrix

_QUERY_TILE = 128
_PREFILL_CHUNK = 128
# In decode the first keys are a chunk of their own: where all requests are short, more of it would be work for nothing.
_FIRST_DECODE_CHUNK = 128
_DECODE_CHUNK = 256


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalize `x[..., width]` by its root mean square, in float32; same dtype out."""
    return norm(_norm_form, x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)


def _norm_form(x: jax.Array, weight: jax.Array, spec: float) -> jax.Array:
    """The XLA form of `kernels.norm`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + spec)
    return (x32 * weight).astype(x.dtype)


def mla_prolog(
    params: AttentionParams, config: ModelConfig, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Project and rotate: `(q_nope [tokens, heads, nope], q_pe [tokens, heads, rope], latent [tokens, latent width])`.

    Args:
        params: one layer's.
        x: `[tokens, hidden]`, already normalized.
        positions: `int32[tokens]`.
    """
    q_nope, q_pe = queries(params, config, query_latent(params, x), positions)
    return q_nope, q_pe, key_value_latent(params, config, x, positions)


def query_latent(params: AttentionParams, x: jax.Array) -> jax.Array:
    """What `queries` projects: `[tokens, q_lora]`, or `x` itself in a model without low-rank queries."""
    if params.q_a is None or params.q_a_norm is None:
        return x
    return rms_norm(linear(x, params.q_a, params.q_a_bias), params.q_a_norm, LATENT_NORM_EPS)


def queries(
    params: AttentionParams, config: ModelConfig, latent: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The queries of all heads in `params`, rotated: `(q_nope [tokens, heads, nope], q_pe [tokens, heads, rope])`."""
    q_b = params.q_b
    if not is_by_inputs(q_b):
        q_b = q_b.reshape(-1, q_b.shape[-1])
    # The product stands alone: TPU's compiler would rather lay out the weights of all layers anew, a copy of several
    # GiB, than what the product gives.
    q = lax.optimization_barrier(linear(latent, q_b)).reshape(latent.shape[0], -1, config.qk_head_dim)
    q_nope, q_pe = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, apply_rope(q_pe, *rope_tables(config, positions), interleaved=config.rope_interleave)


def key_value_latent(params: AttentionParams, config: ModelConfig, x: jax.Array, positions: jax.Array) -> jax.Array:
    """What the cache keeps of each token: its normalized latent and its rotated key, `[tokens, latent width]`."""
    latent, k_pe = jnp.split(linear(x, params.kv_a, params.kv_a_bias), [config.kv_lora_rank], axis=-1)
    k_pe = apply_rope(k_pe, *rope_tables(config, positions), interleaved=config.rope_interleave)
    return jnp.concatenate([rms_norm(latent, params.kv_a_norm, LATENT_NORM_EPS), k_pe], axis=-1)


def take_heads(params: AttentionParams, shard: jax.Array | int, num_shards: int) -> AttentionParams:
    """`params` with the queries, keys and values of the heads in one of equal shards; all else stays whole."""
    if num_shards == 1:
        return params
    count = params.kv_b.shape[0] // num_shards

    def take(leaf: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(leaf, shard * count, count)

    # By leaf: of a quantized matrix, the values and their scales.
    q_b, kv_b = jax.tree.map(take, (own_matrix(params.q_b), own_matrix(params.kv_b)))
    return dataclasses.replace(params, q_b=q_b, kv_b=kv_b)


@flax.struct.dataclass
class Softmax:
    """A running softmax: scores seen so far have maximum `peak`, and `total`, `mixed` are relative to it."""

    peak: jax.Array
    total: jax.Array
    mixed: jax.Array

    @classmethod
    def start(cls, shape: tuple[int, ...], width: int) -> "Softmax":
        """Nothing seen yet, for score rows of `shape` and values of `width`."""
        return cls(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, width)))

    def add(self, scores: jax.Array, mix: jax.Array, spec: str) -> "Softmax":
        """Take in `scores float32[..., keys]` (-inf: masked) for values `mix`, by the einsum `spec`."""
        peak = jnp.maximum(self.peak, scores.max(-1))
        base = jnp.where(jnp.isneginf(peak), 0, peak)
        p = jnp.exp(scores - base[..., None])
        keep = jnp.exp(self.peak - base)
        mixed = einsum_f32(spec, p, mix)
        return Softmax(peak, self.total * keep + p.sum(-1), self.mixed * keep[..., None] + mixed)

    def result(self) -> jax.Array:
        """The weighted mean of the values, zero where every score was masked."""
        return self.mixed / jnp.where(self.total > 0, self.total, 1)[..., None]


@flax.struct.dataclass
class CoreAttention:
    """Core attention under way: the queries in the form that scores keys, and what their softmax has seen."""

    query: jax.Array
    state: Softmax
    num_tokens: int = flax.struct.field(pytree_node=False)

    @property
    def met(self) -> tuple[jax.Array, jax.Array]:
        """What is there once the queries have met the keys so far."""
        return self.query, self.state.peak


# Part i of n of core attention, as (i, n): a share of the loop over keys. All in a row are the whole, bit for bit.
Part = tuple[int, int]
WHOLE: Part = (0, 1)


def _share(num_trips: jax.Array, part: Part) -> tuple[jax.Array | int, jax.Array]:
    """The trips of one part: `(first, end)`."""
    index, count = part
    return (num_trips * index // count if index else 0), num_trips * (index + 1) // count


@flax.struct.dataclass
class LocalSequences:
    """The part of each packed sequence whose queries are on this rank; all `int32[sequences]`.

    Attributes:
        start: index of its first query among the rank's tokens.
        count: number of its queries here, 0 for none.
        first_position: position of the first of them.
    """

    start: jax.Array
    count: jax.Array
    first_position: jax.Array


def _chunk_blocks(block_size: int, max_blocks: int, chunk: int) -> int:
    return min(max_blocks, max(1, chunk // block_size))


def _pad_table(block_table: jax.Array, blocks_per_chunk: int, first_block: int = 0) -> jax.Array:
    """The table with whole chunks from `first_block` on."""
    pad = (first_block - block_table.shape[1]) % blocks_per_chunk
    return jnp.pad(block_table, ((0, 0), (0, pad)), constant_values=-1)


# -- expanded: keys and values of every head, for packed queries. A loop over the key chunks that are needed; each is
# expanded once, then meets the query tiles of its sequence.


def expanded_start(config: ModelConfig, q_nope: jax.Array, q_pe: jax.Array) -> CoreAttention:
    """Un-absorbed attention before any key.

    Args:
        q_nope, q_pe: `[tokens, heads, ...]`, queries of one sequence side by side.
    """
    tokens, heads, _ = q_nope.shape
    tile = min(_QUERY_TILE, tokens)
    queries = jnp.concatenate([q_nope, q_pe], axis=-1).transpose(1, 0, 2)
    # A tile may reach beyond the last token; slices must not be moved back to fit.
    queries = jnp.pad(queries, ((0, 0), (0, tile), (0, 0)))
    return CoreAttention(queries, Softmax.start((heads, tokens + tile), config.v_head_dim), tokens)


def expanded_end(core: CoreAttention) -> jax.Array:
    """Un-absorbed attention after all keys: `[tokens, heads * v_head_dim]`."""
    out = core.state.result()[:, : core.num_tokens]
    return out.transpose(1, 0, 2).reshape(core.num_tokens, -1).astype(core.query.dtype)


def expanded_part(
    params: AttentionParams,
    config: ModelConfig,
    core: CoreAttention,
    keys: PagedKeys,
    sequences: LocalSequences,
    part: Part = WHOLE,
) -> CoreAttention:
    """The queries meet a share of the key chunks.

    Args:
        params: one layer's.
        keys: of the packed sequences; the queries' own latents must be there already.
        sequences: which queries belong to which sequence.
    """
    kv_b = in_stack(params.kv_b)
    spec = ExpandedSpec(core.num_tokens, config.qk_nope_head_dim, config.softmax_scale, keys.block_size, part)
    state = (core.state.peak, core.state.total, core.state.mixed)
    places = (keys.cache, keys.layer, keys.block_table)
    spans = (sequences.start, sequences.count, sequences.first_position)
    state = attend_expanded(_attend_expanded_form, core.query, state, kv_b.stack, kv_b.layer, places, spans, spec)
    return dataclasses.replace(core, state=Softmax(*state))


def _attend_expanded_form(
    queries: jax.Array,
    state: tuple[jax.Array, jax.Array, jax.Array],
    kv_b: jax.Array,
    layer: jax.Array,
    places: tuple[jax.Array, jax.Array, jax.Array],
    spans: tuple[jax.Array, jax.Array, jax.Array],
    spec: ExpandedSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A loop over the key chunks that are needed, of one sequence after the other."""
    kv_b, tokens = lax.dynamic_index_in_dim(kv_b, layer, keepdims=False), spec.num_tokens
    rank, (cache, cache_layer, block_table) = kv_b.shape[-1], places
    keys = PagedKeys(cache, cache_layer, block_table, spec.block_size, rank + queries.shape[-1] - spec.nope)
    sequences, heads, tile = LocalSequences(*spans), queries.shape[0], min(_QUERY_TILE, tokens)
    blocks_per_chunk = _chunk_blocks(keys.block_size, keys.block_table.shape[1], _PREFILL_CHUNK)
    chunk = blocks_per_chunk * keys.block_size
    table = _pad_table(keys.block_table, blocks_per_chunk)
    kv_length = jnp.where(sequences.count > 0, sequences.first_position + sequences.count, 0)
    num_chunks = -(-kv_length // chunk)
    last_chunk = jnp.cumsum(num_chunks)

    def attend_chunk(step: jax.Array, state: Softmax) -> Softmax:
        seq = jnp.sum(step >= last_chunk)
        first_key = (step - (last_chunk[seq] - num_chunks[seq])) * chunk
        row = lax.dynamic_slice_in_dim(table, seq, 1, axis=0)
        latent = keys.read(row, first_key // keys.block_size, blocks_per_chunk)[0]
        key_pos = first_key + jnp.arange(chunk)
        latent = jnp.where((key_pos < kv_length[seq])[:, None], latent, 0)
        c_kv, k_pe = jnp.split(latent, [rank], axis=-1)
        kv = einsum_f32("cl,hdl->hcd", c_kv, kv_b).astype(c_kv.dtype)
        k_nope, v = jnp.split(kv, [spec.nope], axis=-1)
        k = jnp.concatenate([k_nope, jnp.broadcast_to(k_pe, (heads, *k_pe.shape))], axis=-1)

        def attend_tile(index: jax.Array, state: Softmax) -> Softmax:
            local = index * tile + jnp.arange(tile)
            begin = sequences.start[seq] + index * tile
            q = lax.dynamic_slice_in_dim(queries, begin, tile, axis=1)
            visible = key_pos <= (sequences.first_position[seq] + local)[:, None]
            visible &= (local < sequences.count[seq])[:, None]
            scores = jnp.where(visible, einsum_f32("hqd,hkd->hqk", q, k) * spec.scale, -jnp.inf)
            seen = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, begin, tile, axis=1), state)
            seen = seen.add(scores, v, "hqk,hkd->hqd")
            return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, begin, axis=1), state, seen)

        first_tile = jnp.maximum(first_key - sequences.first_position[seq], 0) // tile
        last_tile = -(-sequences.count[seq] // tile)
        return dynamic_loop(first_tile, last_tile, attend_tile, state, expected_trips=1)

    # A chunk for each sequence that the rank's tokens can belong to, at least.
    expected = -(-min(tokens, keys.block_table.shape[0]) // spec.part[1])
    softmax = dynamic_loop(*_share(last_chunk[-1], spec.part), attend_chunk, Softmax(*state), expected_trips=expected)
    return softmax.peak, softmax.total, softmax.mixed


# -- absorbed: the key and value projections are folded into the query and the output, so that the cached latent serves
# as the one key and value of all heads, and of all queries of a request. The trip count follows the longest request.


def absorbed_start(
    params: AttentionParams, config: ModelConfig, q_nope: jax.Array, q_pe: jax.Array, requests: int
) -> CoreAttention:
    """Absorbed attention, of the same number of queries of each request, before any key.

    Args:
        params: one layer's.
        q_nope, q_pe: `[tokens, heads, ...]`, the queries of a request side by side.
    """
    kv_b, spec = in_stack(params.kv_b), AttentionSpec(requests, config.qk_nope_head_dim, config.softmax_scale)
    query = absorb(_absorb_form, q_nope, q_pe, kv_b.stack, kv_b.layer, spec)
    return CoreAttention(query, Softmax.start(query.shape[:2], config.latent_width), q_nope.shape[0])


def _absorb_form(
    q_nope: jax.Array, q_pe: jax.Array, kv_b: jax.Array, layer: jax.Array, spec: AttentionSpec
) -> jax.Array:
    w_uk = lax.dynamic_index_in_dim(kv_b, layer, keepdims=False)[:, : spec.nope]
    q_latent = einsum_f32("hbn,hnl->hbl", q_nope.swapaxes(0, 1), w_uk).swapaxes(0, 1).astype(q_nope.dtype)
    query = jnp.concatenate([q_latent, q_pe], axis=-1)
    return query.reshape(spec.requests, -1, query.shape[-1])


def absorbed_part(
    config: ModelConfig, core: CoreAttention, keys: PagedKeys, lengths: jax.Array, part: Part = WHOLE
) -> CoreAttention:
    """The queries meet a share of their keys.

    Args:
        keys: of the requests.
        lengths: `int32[tokens]`, tokens in the cache that a query sees, its own included; 0 for an empty place.
    """
    spec = AttentionSpec(core.query.shape[0], config.qk_nope_head_dim, config.softmax_scale, keys.block_size, part)
    state = (core.state.peak, core.state.total, core.state.mixed)
    state = attend(_attend_form, core.query, state, keys.cache, keys.layer, keys.block_table, lengths, spec)
    return dataclasses.replace(core, state=Softmax(*state))


def _attend_form(
    query: jax.Array,
    state: tuple[jax.Array, jax.Array, jax.Array],
    cache: jax.Array,
    layer: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A share of the key chunks, as many as the longest request has; the last share has also the first chunk."""
    keys, block_size = PagedKeys(cache, layer, block_table, spec.block_size, query.shape[2]), spec.block_size
    requests, rows, _ = query.shape
    first_blocks = _chunk_blocks(block_size, block_table.shape[1], _FIRST_DECODE_CHUNK)
    lengths = lengths.reshape(requests, -1)
    seen = jnp.repeat(lengths, rows // lengths.shape[1], axis=1)
    longest = seen.max(1)

    def attend_chunk(state: Softmax, table: jax.Array, first_block: jax.Array | int, num_blocks: int) -> Softmax:
        latent = keys.read(table, first_block, num_blocks)
        key_pos = first_block * block_size + jnp.arange(num_blocks * block_size)
        latent = jnp.where((key_pos < longest[:, None])[..., None], latent, 0)
        scores = einsum_f32("bqw,bcw->bqc", query, latent) * spec.scale
        scores = jnp.where(key_pos < seen[..., None], scores, -jnp.inf)
        return state.add(scores, latent, "bqc,bcw->bqw")

    softmax, (index, count) = Softmax(*state), spec.part
    more_blocks = block_table.shape[1] - first_blocks
    if more_blocks:
        size = _chunk_blocks(block_size, more_blocks, _DECODE_CHUNK)
        table = _pad_table(block_table, size, first_blocks)
        num_chunks = -(-jnp.maximum(lengths.max() - first_blocks * block_size, 0) // (size * block_size))
        softmax = dynamic_loop(
            *_share(num_chunks, spec.part),
            lambda chunk, state: attend_chunk(state, table, first_blocks + chunk * size, size),
            softmax,
            expected_trips=-(-more_blocks // (size * count)),
        )
    if index == count - 1:
        # A rank without requests has no chunk.
        is_any = (lengths.max() > 0).astype(jnp.int32)
        softmax = dynamic_loop(
            0, is_any, lambda _, state: attend_chunk(state, block_table, 0, first_blocks), softmax, expected_trips=1
        )
    return softmax.peak, softmax.total, softmax.mixed


def absorbed_end(params: AttentionParams, config: ModelConfig, core: CoreAttention) -> jax.Array:
    """Absorbed attention after all keys: `[tokens, heads * v_head_dim]`."""
    kv_b = in_stack(params.kv_b)
    spec = AttentionSpec(core.query.shape[0], config.qk_nope_head_dim, config.softmax_scale)
    out = release(_release_form, core.state.total, core.state.mixed, kv_b.stack, kv_b.layer, spec)
    return out.astype(core.query.dtype)


def _release_form(
    total: jax.Array, mixed: jax.Array, kv_b: jax.Array, layer: jax.Array, spec: AttentionSpec
) -> jax.Array:
    w_uv, dtype = lax.dynamic_index_in_dim(kv_b, layer, keepdims=False)[:, spec.nope :], kv_b.dtype
    heads, _, latent = w_uv.shape
    means = Softmax(total, total, mixed).result()
    means = means.reshape(-1, heads, means.shape[-1])[..., :latent].astype(dtype)
    return einsum_f32("bhl,hvl->bhv", means, w_uv).reshape(means.shape[0], -1).astype(dtype)
