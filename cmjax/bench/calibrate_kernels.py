"""C++ kernels, each alone at a few sizes: what `cmjax.bench.calibrate` fits their costs to."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.kernels import SamplerSpec, choose_tokens
from cmjax.model.cache import PagedKeys
from cmjax.model.config import ModelConfig
from cmjax.model.mla import (
    CoreAttention,
    LocalSequences,
    Softmax,
    absorbed_end,
    absorbed_part,
    absorbed_start,
    expanded_part,
    rms_norm,
)
from cmjax.model.params import AttentionParams
from cmjax.moe import MlpParams, ReceivedRows, RouterConfig, WireDtype, expert_ffn, laid_out, packed_rows
from cmjax.moe.router import choose_slots
from cmjax.perf.host_kernels import HostData
from cmjax.quant import QuantArray, linear

_BLOCK = 16
Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A kernel at one size.

    Attributes:
        call: of arrays, the first of which is made anew each time by adding next to nothing.
        make: the arrays of one device.
        repeats: calls in a row at most, each with arrays of its own, so that they are found where they then lie.
        data: what the arrays say.
    """

    call: Callable[..., jax.Array]
    make: Callable[[np.random.Generator], Arrays]
    repeats: int = 4
    data: HostData = dataclasses.field(default_factory=HostData)


def probes() -> dict[str, list[Probe]]:
    """Families of kernels whose costs are fitted together, each beside the costs before it."""
    return {
        "norm": [_norm(*size) for size in ((8, 64), (8, 32), (8, 512), (512, 64), (64, 1024))],
        "choose": [_choose(*size) for size in ((8, 256, 8), (2, 64, 4), (64, 64, 8), (256, 256, 8))],
        "pack": [_pack(*size) for size in ((8, 64, 8, 256), (256, 64, 8, 64), (8, 512, 8, 512), (8, 64, 1, 16))],
        "sample": [_sample(*size) for size in ((8, 512), (1, 256), (8, 8192))],
        "lay_out": [_lay_out(*size) for size in ((8, 1), (320, 1), (16, 64))],
        "absorb": [_absorb(*size) for size in ((8, 4, 16, 24), (2, 16, 16, 32), (32, 4, 16, 64), (8, 4, 64, 256))],
        "attend": [
            _attend(*size)
            for size in (
                (8, 4, 32, 256),
                (2, 4, 32, 256),
                (8, 16, 64, 128),
                (8, 8, 96, 256),
                (4, 4, 256, 128),
                (2, 32, 256, 128),
            )
        ],
        "matrices": [*_products(), *(_expert(*size) for size in _EXPERTS)],
        "release": [_release(*size) for size in ((8, 4, 16, 24), (2, 16, 16, 32), (32, 4, 16, 64))],
        "quantized": [
            *(_quantized(*size) for size in _QUANTIZED),
            *(_expert(*size, is_quantized=True) for size in _QUANTIZED_EXPERTS),
            _pack(64, 256, 8, 64, "int8"),
        ],
        "attend_expanded": [_attend_expanded(*size) for size in _PROMPTS],
    }


def mixed() -> Probe:
    """Small kernels of all kinds in a row, with `float32[]` that depends on each."""
    several = [_norm(8, 64), _product(8, 64, 96), _norm(8, 32), _absorb(8, 4, 16, 24), _attend(8, 4, 32, 256),
               _release(8, 4, 16, 24), _product(8, 64, 64), _norm(8, 96), _product(8, 64, 256, np.float32),
               _choose(8, 256, 8), _sample(8, 512), _pack(8, 64, 8, 256), _lay_out(8, 8), _expert(16, 2, 64, 16),
               _product(8, 32, 64)]  # fmt: skip
    sizes = [len(one.make(np.random.default_rng(0))) for one in several]

    def make(rng: np.random.Generator) -> Arrays:
        return tuple(array for one in several for array in one.make(rng))

    def call(*arrays: jax.Array) -> jax.Array:
        found = jnp.zeros((), jnp.float32)
        for one, size in zip(several, sizes, strict=True):
            own, arrays = arrays[:size], arrays[size:]
            found = found + one.call(*own).reshape(-1)[0].astype(jnp.float32)
        return found

    return Probe(call, make, 1, HostData(keys=256, rows=32, experts=16))


def helped() -> list[Probe]:
    """Kernels that take from a little to much longer than a helper takes to come."""
    return [_attend(requests, 4, 32, 256) for requests in (1, 3, 8, 24, 96)]


def _normal(rng: np.random.Generator, *shape: int, dtype: Any = jnp.bfloat16) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def _norm(rows: int, width: int) -> Probe:
    def make(rng: np.random.Generator) -> Arrays:
        return _normal(rng, rows, width), np.ones(width, np.float32)

    return Probe(lambda x, weight: rms_norm(x, weight, 1e-6), make, 8)


def _choose(tokens: int, experts: int, topk: int) -> Probe:
    config = RouterConfig(num_experts=experts, num_topk=topk, num_expert_groups=4, num_topk_groups=2)

    def make(rng: np.random.Generator) -> Arrays:
        slots = np.arange(experts, dtype=np.int32)
        return _normal(rng, tokens, experts, dtype=np.float32), slots, np.zeros(experts, np.float32)

    def call(logits: jax.Array, slots: jax.Array, bias: jax.Array) -> jax.Array:
        return choose_slots(logits, bias, config, slots, jnp.ones(tokens, jnp.bool_))[1]

    return Probe(call, make)


def _sample(rows: int, vocabulary: int) -> Probe:
    spec = SamplerSpec(not_finite=-2, nothing_allowed=-3)

    def best(logits: jax.Array, *_: jax.Array, spec: SamplerSpec) -> jax.Array:
        return jnp.argmax(logits, -1).astype(jnp.int32)

    def call(logits: jax.Array) -> jax.Array:
        nothing = jnp.zeros((rows, 0), jnp.int32)
        return choose_tokens(best, logits, nothing, jnp.zeros(rows, jnp.int32), nothing, nothing, spec)

    return Probe(call, lambda rng: (_normal(rng, rows, vocabulary, dtype=np.float32),), 8)


def _pack(tokens: int, width: int, topk: int, slots: int, wire: WireDtype | None = None) -> Probe:
    def make(rng: np.random.Generator) -> Arrays:
        return _normal(rng, tokens, width), rng.integers(0, slots, (tokens, topk)).astype(np.int32)

    return Probe(lambda x, chosen: packed_rows(x, chosen, 1, slots, wire)[0], make)


def _lay_out(ranks: int, local: int) -> Probe:
    def make(rng: np.random.Generator) -> Arrays:
        return (np.ones((ranks, 2, local), np.int32),)

    return Probe(lambda announced: laid_out(announced)[0], make, 8)


def _mla(heads: int, nope: int, latent: int, rope: int = 8) -> ModelConfig:
    """As far as attention asks."""
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=8, hidden_size=latent, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=heads, q_lora_rank=None, kv_lora_rank=latent, qk_nope_head_dim=nope, qk_rope_head_dim=rope,
        v_head_dim=nope, moe_intermediate_size=8, num_routed_experts=0, num_shared_experts=0, num_topk=0,
        num_expert_groups=1, num_topk_groups=1, routed_scaling_factor=1.0, first_k_dense_replace=1,
        max_position_embeddings=1024,
    )  # fmt: skip


def _heads(kv_b: jax.Array) -> AttentionParams:
    """Parameters of which only `kv_b` is looked at."""
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(AttentionParams)}
    return AttentionParams(**{**fields, "kv_b": kv_b})


def _absorb(tokens: int, heads: int, nope: int, latent: int) -> Probe:
    config = _mla(heads, nope, latent)

    def make(rng: np.random.Generator) -> Arrays:
        q_nope, q_pe = (_normal(rng, tokens, heads, width) for width in (nope, 8))
        return q_nope, q_pe, _normal(rng, heads, 2 * nope, latent)

    def call(q_nope: jax.Array, q_pe: jax.Array, kv_b: jax.Array) -> jax.Array:
        return absorbed_start(_heads(kv_b), config, q_nope, q_pe, tokens).query

    return Probe(call, make)


def _release(tokens: int, heads: int, value: int, latent: int) -> Probe:
    config = _mla(heads, value, latent)

    def make(rng: np.random.Generator) -> Arrays:
        mixed = _normal(rng, tokens, heads, latent + 8, dtype=np.float32)
        return np.ones((tokens, heads), np.float32), mixed, _normal(rng, heads, 2 * value, latent)

    def call(total: jax.Array, mixed: jax.Array, kv_b: jax.Array) -> jax.Array:
        core = CoreAttention(jnp.zeros(mixed.shape, kv_b.dtype), Softmax(total, total, mixed), tokens)
        return absorbed_end(_heads(kv_b), config, core)

    return Probe(call, make)


def _attend(requests: int, rows: int, width: int, keys: int) -> Probe:
    config = _mla(rows, 8, width - 8)

    def make(rng: np.random.Generator) -> Arrays:
        table = rng.permutation(requests * keys // _BLOCK).astype(np.int32).reshape(requests, -1)
        return _normal(rng, requests, rows, width), _normal(rng, 1, requests * keys, width), table

    def call(query: jax.Array, cache: jax.Array, table: jax.Array) -> jax.Array:
        state = Softmax.start(query.shape[:2], width)
        paged = PagedKeys(cache, 0, table, _BLOCK, width)
        lengths = jnp.full(requests, keys, jnp.int32)
        return absorbed_part(config, CoreAttention(query, state, requests), paged, lengths).state.mixed

    return Probe(call, make, 2, HostData(keys=keys))


# Prompts, tokens of each in the cache and new ones, heads, width of a head's keys, and of latents.
_PROMPTS = (
    (8, 0, 16, 2, 16, 32), (16, 0, 16, 2, 16, 32), (4, 0, 128, 4, 16, 32), (1, 0, 512, 2, 64, 128),
    (1, 496, 16, 2, 16, 64), (2, 0, 256, 2, 64, 32), (2, 0, 256, 4, 16, 128),
)  # fmt: skip
# Rows, width and outputs: few rows, which are read where they are, rows that have to be staged, and many rows.
_PRODUCTS = (
    (1, 64, 64), (8, 64, 32), (8, 64, 256), (8, 256, 256), (64, 64, 64), (64, 24, 128),
    (256, 64, 256), (96, 512, 256), (512, 256, 64), (512, 64, 32),
)  # fmt: skip
_WIDE_PRODUCTS = ((1, 64, 64), (8, 64, 256), (64, 64, 64), (256, 64, 256), (96, 512, 256), (512, 64, 32))  # float32
_QUANTIZED = ((8, 64, 256), (8, 256, 256), (16, 64, 32), (256, 64, 256), (32, 256, 256), (512, 64, 32))


def _attend_expanded(prompts: int, cached: int, length: int, heads: int, nope: int, latent: int) -> Probe:
    config, keys = _mla(heads, nope, latent), cached + length

    def make(rng: np.random.Generator) -> Arrays:
        table = rng.permutation(-(-prompts * keys // _BLOCK)).astype(np.int32).reshape(prompts, -1)
        query = _normal(rng, heads, prompts * length + 128, nope + 8)
        return query, _normal(rng, heads, 2 * nope, latent), _normal(rng, 1, table.size * _BLOCK, latent + 8), table

    def call(query: jax.Array, kv_b: jax.Array, cache: jax.Array, table: jax.Array) -> jax.Array:
        core = CoreAttention(query, Softmax.start(query.shape[:2], nope), prompts * length)
        counts = jnp.full(prompts, length, jnp.int32)
        spans = LocalSequences(jnp.arange(prompts, dtype=jnp.int32) * length, counts, jnp.full_like(counts, cached))
        paged = PagedKeys(cache, 0, table, _BLOCK, latent + 8)
        return expanded_part(_heads(kv_b), config, core, paged, spans).state.mixed

    pairs = prompts * length * (cached + (length + 1) / 2)
    return Probe(call, make, data=HostData(prompts=prompts, prompt_keys=prompts * keys, pairs=pairs))


def _products() -> Iterator[Probe]:
    yield from (_product(*size) for size in _PRODUCTS)
    yield from (_product(*size, np.float32) for size in _WIDE_PRODUCTS)


def _product(rows: int, width: int, out: int, dtype: Any = jnp.bfloat16) -> Probe:
    def make(rng: np.random.Generator) -> Arrays:
        return _normal(rng, rows, width, dtype=dtype), _normal(rng, out, width, dtype=dtype)

    return Probe(linear, make)


def _quantized(rows: int, width: int, out: int) -> Probe:
    def make(rng: np.random.Generator) -> Arrays:
        weight = rng.integers(-127, 128, (out, width)).astype(np.int8)
        return _normal(rng, rows, width), weight, np.full(out, 1 / width, np.float32)

    return Probe(lambda x, weight, scale: linear(x, QuantArray(weight, scale)), make)


# Experts, rows of each, hidden and inner width.
_EXPERTS = (
    (16, 1, 64, 16), (8, 1, 256, 128), (32, 2, 64, 16), (1, 64, 64, 16), (16, 48, 64, 16), (4, 32, 256, 64),
    (2, 128, 64, 32),
)  # fmt: skip
_QUANTIZED_EXPERTS = ((16, 1, 64, 16), (8, 4, 256, 64), (2, 96, 64, 32))


def _expert(count: int, each: int, hidden: int, ffn: int, is_quantized: bool = False) -> Probe:
    def made(rng: np.random.Generator, *shape: int) -> Arrays:
        if is_quantized:
            return rng.integers(-127, 128, shape).astype(np.int8), np.full(shape[:-1], 1 / shape[-1], np.float32)
        return ((rng.standard_normal(shape) / shape[-1] ** 0.5).astype(jnp.bfloat16),)

    def make(rng: np.random.Generator) -> Arrays:
        x, counts = _normal(rng, count * each, hidden), np.full(count, each, np.int32)
        return x, counts, *made(rng, 1, count, 2 * ffn, hidden), *made(rng, 1, count, hidden, ffn)

    def call(x: jax.Array, counts: jax.Array, *weights: jax.Array) -> jax.Array:
        received, rows = ReceivedRows(x, counts, None), x.shape[0]
        pairs = zip(weights[::2], weights[1::2], strict=True) if is_quantized else ()
        params = MlpParams(*[QuantArray(*pair) for pair in pairs] or weights)
        return expert_ffn(received, params, 0, rows_per_block=1, expected_rows=rows, dtype=jnp.dtype(x.dtype))

    return Probe(call, make, data=HostData(rows=count * each, experts=count))
