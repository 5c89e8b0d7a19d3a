"""The matrix products that every layer uses."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.kernels import Weights, product
from cmjax.quant.array import (
    AnyArray,
    InputMajor,
    LayerMatrix,
    Matrix,
    QuantArray,
    QuantizedRows,
    dequantize,
    in_stack,
    matrix_at,
    own_matrix,
)
from cmjax.quant.rows import dequantize_rows, quantize_rows


def _precision(*operands: AnyArray) -> lax.Precision:
    """float32 is multiplied as true float32 on every platform: an accelerator's default (TF32, bfloat16 passes) is
    coarse enough to flip a router's choice. Values that were bfloat16 lose nothing by the default."""
    is_float32 = all(operand.dtype == jnp.float32 for operand in operands)
    return lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT


def linear(x: jax.Array | QuantizedRows, weight: Matrix, bias: jax.Array | None = None) -> jax.Array:
    """Return `x @ weight.T (+ bias)` in `x.dtype`.

    Args:
        x: `[..., in]`, the activations; or `[rows, in]` already quantized.
        weight: `[out, in]` (the orientation of published checkpoints), of the dtype of `x`, however it is stored; or
            quantized: then each row of `x` is quantized first, if it is not yet (per token, dynamic; paper section
            4.5).
        bias: `[out]` or None.
    """
    if isinstance(x, QuantizedRows):
        lead, dtype = x.qvalue.shape[:-1], x.dtype
    else:
        lead, dtype = x.shape[:-1], x.dtype
        x = x.reshape(-1, x.shape[-1])
    stack = weight.stack if isinstance(weight, LayerMatrix) else weight
    if isinstance(stack, InputMajor) or (isinstance(stack, QuantArray) and stack.mode == "fake"):
        y = _product_xla(x, own_matrix(weight))
    else:
        y = _product_in_place(x, in_stack(weight))
    y = y.astype(dtype).reshape(*lead, -1)
    return y if bias is None else y + bias.astype(y.dtype)


def _product_in_place(x: jax.Array | QuantizedRows, weight: LayerMatrix) -> jax.Array:
    """The product by the kernel, which reads the matrix in its stack."""
    rows, x_scale, dtype = (x.qvalue, x.scale, x.dtype) if isinstance(x, QuantizedRows) else (x, None, x.dtype)
    stack = weight.stack
    if x_scale is not None and not isinstance(stack, QuantArray):
        rows, x_scale = dequantize_rows(rows, x_scale, dtype), None
    weights = (stack.qvalue, stack.scale) if isinstance(stack, QuantArray) else (stack, None)
    return product(_product_form, rows, weight.layer, weights, x_scale, np.dtype(dtype))


def _product_form(
    x: jax.Array, layer: jax.Array, weight: Weights, x_scale: jax.Array | None, spec: np.dtype
) -> jax.Array:
    """The XLA form of `kernels.product`; `spec` is the dtype of the result."""
    values, scale = weight
    matrix = matrix_at(values if scale is None else QuantArray(values, scale), layer)
    return _product_xla(x if x_scale is None else QuantizedRows(x, x_scale, spec), matrix)


def _product_xla(x: jax.Array | QuantizedRows, weight: Matrix) -> jax.Array:
    if isinstance(weight, QuantArray):
        return _quantized_product(x, weight)
    if isinstance(x, QuantizedRows):
        x = dequantize_rows(x.qvalue, x.scale, x.dtype)
    return _product(x, weight)


def _product(x: jax.Array, weight: Matrix) -> jax.Array:
    assert not isinstance(weight, QuantArray | LayerMatrix)
    values, inputs = (weight.value, 0) if isinstance(weight, InputMajor) else (weight, 1)
    return lax.dot_general(x, values, (((x.ndim - 1,), (inputs,)), ((), ())), precision=_precision(x, values))


def _quantized_product(x: jax.Array | QuantizedRows, weight: QuantArray) -> jax.Array:
    """An int8 product with 32-bit sums, rescaled; or, in mode "fake", the float product of the same values."""
    rows = x if isinstance(x, QuantizedRows) else QuantizedRows(*quantize_rows(x), x.dtype)
    if weight.mode == "fake":
        y = _product(dequantize_rows(rows.qvalue, rows.scale, jnp.dtype(jnp.float32)), dequantize(weight))
    else:
        dimensions = (((1,), (1,)), ((), ()))
        qvalue, num_rows = rows.qvalue, rows.qvalue.shape[0]
        if num_rows == 1:
            # One row alone takes XLA's CPU backend four times as long as two.
            qvalue = jnp.pad(qvalue, ((0, 1), (0, 0)))
        sums = lax.dot_general(qvalue, weight.qvalue, dimensions, preferred_element_type=jnp.int32)[:num_rows]
        y = sums.astype(jnp.float32) * rows.scale[:, None] * weight.scale
    return y.astype(rows.dtype)


def einsum_f32(spec: str, *operands: jax.Array) -> jax.Array:
    """Return the einsum of `operands` in float32, whatever their dtype: products exact, sums in float32.

    Operands are widened first: XLA's CPU backend has no bfloat16 product with a float32 result.
    """
    precision = _precision(*operands)
    return jnp.einsum(spec, *(operand.astype(jnp.float32) for operand in operands), precision=precision)
