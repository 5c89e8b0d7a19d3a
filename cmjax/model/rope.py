"""Rotary position embedding, plain and YaRN, in the interleaved and the half-split layout."""

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.model.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position turns each pair of dimensions: `float64[qk_rope_head_dim / 2]`.

    YaRN blends the interpolated (slow) frequencies with the original (fast) ones over its correction range.
    """
    dim, yarn = config.qk_rope_head_dim, config.yarn
    original = config.rope_theta ** (-np.arange(0, dim, 2) / dim)
    if yarn is None:
        return original
    low, high = yarn.correction_range(dim, config.rope_theta)
    span = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / span, 0, 1)
    return original / yarn.factor * interpolated + original * (1 - interpolated)


def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `(cos, sin)`, each `float32[tokens, qk_rope_head_dim / 2]`, for `positions int32[tokens]`."""
    scale = 1.0 if config.yarn is None else config.yarn.rope_factor
    frequencies = rope_frequencies(config)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotate `x[tokens, ..., dim]` by `cos, sin [tokens, dim / 2]`, in float32; same dtype out.

    Interleaved, dimensions (2i, 2i+1) form a pair; otherwise (i, i + dim/2). Queries and keys are always rotated alike,
    so the result may stay in the half-split order.
    """
    cos, sin = (a.reshape(a.shape[0], *([1] * (x.ndim - 2)), a.shape[1]) for a in (cos, sin))
    x32 = x.astype(jnp.float32)
    first, second = (x32[..., 0::2], x32[..., 1::2]) if interleaved else jnp.split(x32, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
