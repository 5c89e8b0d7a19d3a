"""The latent KV cache as the layers see it: rows named by slots, reached through block tables.

A cache is `[cache layers, slots, row width]`; slot = block_id * block_size + offset. A row is the normalized latent
followed by the rotated `k_pe`, all that MLA needs to keep of a token, and where devices store rows in tiles, padding
(`cmjax.mesh.stored_width`). The MTP layer's rows come after the model's.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from cmjax.model.config import ModelConfig


def token_bytes(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes of a token's latents, of all layers of the cache, without padding."""
    return config.num_cache_layers * config.latent_width * np.dtype(dtype).itemsize


@flax.struct.dataclass
class PagedKeys:
    """What the queries of some requests attend to: one layer of the cache, through the requests' blocks.

    Attributes:
        cache: `[cache layers, slots, row width]`.
        layer: which of its layers.
        block_table: `int32[requests, max blocks]`, -1 padded.
        block_size: tokens a block.
        width: of a latent.
    """

    cache: jax.Array
    layer: jax.Array | int
    block_table: jax.Array
    block_size: int = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)

    def read(self, table: jax.Array, first_block: jax.Array | int, num_blocks: int) -> jax.Array:
        """Rows of some blocks of `table`, a part of the block table: see `read_blocks`."""
        rows = read_blocks(self.cache, self.layer, table, first_block, num_blocks, self.block_size)
        return rows[..., : self.width]


def as_stored(rows: jax.Array, cache: jax.Array) -> jax.Array:
    """`rows[..., latent width]` as a cache has them, padded where its rows are wider."""
    missing = cache.shape[-1] - rows.shape[-1]
    return jnp.pad(rows, ((0, 0),) * (rows.ndim - 1) + ((0, missing),)) if missing else rows


def slots_after(slot_mapping: jax.Array, total: jax.Array | None) -> jax.Array:
    """`slot_mapping`, to be had once attention with the softmax sums `total` has read the cache; None: at once.

    What one microbatch writes does not depend on what the other reads; a compiler that does not know which comes first
    keeps both versions, a copy of the whole cache in every layer. Sums are never negative, but no compiler knows.
    """
    return slot_mapping if total is None else jnp.where(total.reshape(-1)[0] < 0, -1, slot_mapping)


def write_rows(cache: jax.Array, layer: jax.Array | int, slot_mapping: jax.Array, rows: jax.Array) -> jax.Array:
    """Return the cache with `rows[tokens, latent width]` at the slots `int32[tokens]` of a layer; -1 is skipped."""
    layers, slots, width = cache.shape
    if rows.shape[0] == 1:
        # XLA turns a scatter of one row into a read and an update, and copies the whole cache around them.
        slot_mapping, rows = jnp.pad(slot_mapping, (0, 1), constant_values=-1), jnp.pad(rows, ((0, 1), (0, 0)))
    index = jnp.where(slot_mapping < 0, layers * slots, layer * slots + slot_mapping)
    flat = cache.reshape(layers * slots, width).at[index].set(as_stored(rows, cache).astype(cache.dtype), mode="drop")
    return flat.reshape(cache.shape)


def read_blocks(
    cache: jax.Array,
    layer: jax.Array | int,
    block_table: jax.Array,
    first_block: jax.Array | int,
    num_blocks: int,
    block_size: int,
) -> jax.Array:
    """Return rows `[requests, num_blocks * block_size, row width]` of a layer by `block_table int32[requests, blocks]`.

    Unused entries (-1) read block 0: the caller masks what lies beyond a request's length.
    """
    layers, slots, width = cache.shape
    blocks = lax.dynamic_slice_in_dim(block_table, first_block, num_blocks, axis=1)
    index = jnp.maximum(blocks, 0)[..., None] * block_size + jnp.arange(block_size)
    index = layer * slots + index.reshape(block_table.shape[0], num_blocks * block_size)
    return jnp.take(cache.reshape(layers * slots, width), index, axis=0, mode="clip")


def slots_of(block_table: jax.Array, positions: jax.Array, block_size: int) -> jax.Array:
    """Return the slot of each of `positions int32[tokens]`, equally many of each request side by side; -1 where the
    table, `int32[requests, max blocks]`, has no block for it."""
    blocks = positions.reshape(block_table.shape[0], -1) // block_size
    block = jnp.take_along_axis(block_table, blocks, axis=1, mode="fill", fill_value=-1).reshape(positions.shape)
    return jnp.where(block < 0, -1, block * block_size + positions % block_size)
