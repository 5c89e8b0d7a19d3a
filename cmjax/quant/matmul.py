"""The matrix products that every layer uses."""

import jax
import jax.numpy as jnp
from jax import lax


def _precision(*operands: jax.Array) -> lax.Precision:
    """float32 is multiplied as true float32 on every platform: an accelerator's default (TF32, bfloat16 passes) is
    coarse enough to flip a router's choice. Values that were bfloat16 lose nothing by the default."""
    is_float32 = all(operand.dtype == jnp.float32 for operand in operands)
    return lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Return `x @ weight.T (+ bias)` in `x.dtype`.

    Args:
        x: `[..., in]`, the activations.
        weight: `[out, in]` (the orientation of published checkpoints), same dtype as `x`.
        bias: `[out]` or None.
    """
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    y = lax.dot_general(x, weight, dimensions, precision=_precision(x, weight))
    return y if bias is None else y + bias.astype(y.dtype)


def einsum_f32(spec: str, *operands: jax.Array) -> jax.Array:
    """Return the einsum of `operands` in float32, whatever their dtype: products exact, sums in float32.

    Operands are widened first: XLA's CPU backend has no bfloat16 product with a float32 result.
    """
    precision = _precision(*operands)
    return jnp.einsum(spec, *(operand.astype(jnp.float32) for operand in operands), precision=precision)
