"""Cached blocks of prefixes: read from, and written into, the cache of an instance (paper section 4.4.2).

Every rank of a prefill instance holds all latents. So each reads, and sends to the pool, a share of the tokens of every
block; and each pulls a share, which all then gather from one another, inside the instance.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.mesh import EP_AXIS, fabric
from cmjax.model import Params, as_stored, mtp_latents, param_specs, write_rows
from cmjax.schedule import LoadPlan
from cmjax.serve.caching.context import BlockLayout, CachedBlock
from cmjax.serve.steps import BY_RANK, EVERYWHERE, StepSpec
from cmjax.serve.transfer.wire import Holder

# Tokens that one plan loads or stores, where a cached block has fewer.
PLAN_TOKENS = 2048


def plan_blocks(block_tokens: int, max_model_len: int) -> int:
    """Cached blocks that one plan loads or stores, at most."""
    return max(min(PLAN_TOKENS, max_model_len) // block_tokens, 1)


@functools.partial(jax.jit, static_argnames=("spec",))
def _read(cache: jax.Array, slots: jax.Array, *, spec: StepSpec) -> jax.Array:
    """What each rank holds in its slots `int32[R, tokens]`: `[R, tokens, layers, width]`."""

    def rank(cache: jax.Array, slots: jax.Array) -> jax.Array:
        latents = jnp.take(cache[0], slots[0], axis=1, mode="clip")[..., : spec.rank.config.latent_width]
        return latents.transpose(1, 0, 2)[None]

    return spec.on_ranks(rank, BY_RANK, BY_RANK)(cache, slots)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("cache",))
def _write(
    params: Params,
    cache: jax.Array,
    latents: jax.Array,
    slots: jax.Array,
    ends: "tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None",
    *,
    spec: StepSpec,
) -> jax.Array:
    """Write `latents[R, tokens, layers, width]`, a share a rank, into the slots `int32[R * tokens]` of every rank.

    Args:
        ends: of the last token of each block `[blocks]`, where there is an MTP module: hidden states `[blocks,
            hidden]`, the token after it, its position, its slot. The latent that the MTP module has of it is computed.
    """
    config = spec.rank.config

    def rank(params: Params, cache: jax.Array, latents: jax.Array, slots: jax.Array, *ends: jax.Array) -> jax.Array:
        rows = fabric.all_gather(latents[0], EP_AXIS, tiled=True, channel="prefix_cache/latents")
        index = jnp.where(slots < 0, cache.shape[2], slots)
        cache = cache.at[0, :, index].set(as_stored(rows, cache), mode="drop")
        if params.mtp is not None:
            hidden, next_token_ids, positions, end_slots = ends
            rows = mtp_latents(params, params.mtp, hidden, next_token_ids, positions, config)
            cache = write_rows(cache[0], config.num_hidden_layers, end_slots, rows)[None]
        return cache

    specs = (param_specs(params, EP_AXIS), BY_RANK, BY_RANK, EVERYWHERE, *([EVERYWHERE] * len(ends or ())))
    return spec.on_ranks(rank, specs, BY_RANK)(params, cache, latents, slots, *(ends or ()))


class CachedBlocks:
    """Reads and writes cached blocks of one prefill instance.

    Args:
        holder: the instance.
        num_blocks: at a time, at most. Fewer are filled up to one of `sizes`, which programs are compiled for.
    """

    def __init__(self, holder: Holder, layout: BlockLayout, num_blocks: int) -> None:
        self._holder, self.layout = holder, layout
        self.sizes = tuple(sorted({max(num_blocks // 8, 1), num_blocks}))

    def read(self, blocks: np.ndarray) -> jax.Array:
        """Begin to read blocks `int32[n, blocks of a cached block]`; see `on_host`."""
        slots = self._slots(blocks, self._size_for(len(blocks)), 0)
        return _read(self._holder.cache, slots.reshape(self._holder.instance.ep_size, -1), spec=self._holder.spec)

    def on_host(self, found: jax.Array, count: int) -> np.ndarray:
        """What was read of `count` blocks: `[count, block_tokens, layers, width]`."""
        tokens = np.asarray(found).reshape(-1, *found.shape[2:])
        size = self.layout.block_tokens
        return tokens[: count * size].reshape(count, size, *tokens.shape[1:])

    def write(self, params: Params, plan: LoadPlan, found: Sequence[CachedBlock]) -> jax.Array:
        """The cache with blocks that have been fetched; that of the instance is given away."""
        return self._write(params, plan, found, self._size_for(len(found)))

    def compile(self, params: Params, keep: Callable[[jax.Array], None]) -> None:
        """Compile all programs by running them with nothing; each new cache is given to `keep`."""
        nothing = np.zeros(0, np.int32)
        plan = LoadPlan(-1, 0, nothing.reshape(0, 1), nothing, nothing, is_last=True)
        for size in self.sizes:
            jax.block_until_ready(self.read(np.zeros((size, 1), np.int32)))
            keep(self._write(params, plan, [], size))

    def _write(self, params: Params, plan: LoadPlan, found: Sequence[CachedBlock], size: int) -> jax.Array:
        holder, layout, count = self._holder, self.layout, len(found)
        num_ranks, tokens = holder.instance.ep_size, layout.block_tokens
        slots = self._slots(plan.blocks, size, -1)
        latents = np.empty((len(slots), layout.num_layers, layout.width), layout.dtype)
        for index, block in enumerate(found):
            latents[index * tokens : (index + 1) * tokens] = block.latents
        latents[count * tokens :] = 0
        by_rank = jax.device_put(latents.reshape(num_ranks, -1, *latents.shape[1:]), holder.spec.by_rank())
        ends = None
        if layout.hidden_size:
            hidden = np.zeros((size, layout.hidden_size), layout.dtype)
            end_slots = np.full(size, -1, np.int32)
            for index, block in enumerate(found):
                if block.hidden is not None:
                    hidden[index], end_slots[index] = block.hidden, slots[(index + 1) * tokens - 1]
            ends = (
                hidden,
                _padded(plan.next_token_ids, size, 0),
                _padded(plan.last_positions, size, 0),
                end_slots,
            )
        return _write(params, holder.cache, by_rank, slots, ends, spec=holder.spec)

    def _size_for(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count)

    def _slots(self, blocks: np.ndarray, size: int, filler: int) -> np.ndarray:
        """Of the tokens of some blocks, filled up to those of `size` and to as many a rank."""
        block_size, num_ranks = self._holder.settings.block_size, self._holder.instance.ep_size
        slots = (blocks.reshape(-1, 1) * block_size + np.arange(block_size)).reshape(-1).astype(np.int32)
        return _padded(slots, -(-size * self.layout.block_tokens // num_ranks) * num_ranks, filler)


def read_of_ranks(holder: Holder, ranks: np.ndarray, blocks: np.ndarray) -> list[jax.Array]:
    """Begin to read a cached block of some ranks of a decode instance, each `[1, block_tokens, layers, width]` on its
    device; blocks `int32[n, blocks of a cached block]`."""
    block_size = holder.settings.block_size
    slots = np.zeros((holder.instance.ep_size, blocks.shape[1] * block_size), np.int32)
    slots[ranks] = (blocks[:, :, None] * block_size + np.arange(block_size)).reshape(len(blocks), -1)
    shards = {
        shard.index[0].start or 0: shard.data
        for shard in _read(holder.cache, slots, spec=holder.spec).addressable_shards
    }
    return [shards[rank] for rank in ranks.tolist()]


def _padded(values: np.ndarray, length: int, filler: int) -> np.ndarray:
    out = np.full(length, filler, np.int32)
    out[: len(values)] = values
    return out
