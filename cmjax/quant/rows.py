"""Symmetric int8 quantization of rows: one float32 scale a row (paper section 3.3, early quantization)."""

import jax
import jax.numpy as jnp

from cmjax.quant.array import INT8_MAX


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantize `x[rows, width]` to `(qvalue int8[rows, width], scale float32[rows])`, `x ~ qvalue * scale`.

    A row of zeros has scale 0 and stays zero.
    """
    # The largest is found in the rows' own dtype: XLA's CPU backend takes thrice as long over rows widened before.
    scale = jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32) / INT8_MAX
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    # Nothing is left to clip: the largest comes out as 127 to a few float32 roundings.
    return jnp.round(x.astype(jnp.float32) * inverse[:, None]).astype(jnp.int8), scale


def dequantize_rows(qvalue: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Undo `quantize_rows` up to rounding: `[rows, width]` in `dtype`."""
    return (qvalue.astype(jnp.float32) * scale[:, None]).astype(dtype)
