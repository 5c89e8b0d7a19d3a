"""Products: by one matrix, and by those of a layer's experts."""

import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.kernels.primitive import FLOATS, INLINE, Form, Result, make_primitive, run_kernel

Array = jax.Array
# Matrices, and of int8 ones the scale of each output.
Weights = tuple[Array | np.ndarray, Array | np.ndarray | None]
_PRODUCT, _EXPERTS = make_primitive("product"), make_primitive("experts")


# Inlined where it is traced; called eagerly, one compiled program for all calls alike.
@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=INLINE)
def product(
    form: Form,
    x: Array,
    layer: Array | int,
    weight: Weights,
    x_scale: Array | None,
    spec: np.dtype,
) -> Array:
    """`x @ weight[layer].T`, `[rows, out]`: the weights are read where they are, without conversion.

    Sums are float32 (int32 of int8 products), and a row's result does not depend on the rows beside it.

    Args:
      form: the XLA form, `form(x, layer, weight, x_scale, spec=spec)`.
      x: `[rows, in]`, float32 or bfloat16; or int8.
      layer: `int32[]`, the index of a matrix in the stack.
      weight: `[layers, out, in]`, of the dtype of `x`; or int8: then rows of floats are quantized first.
      x_scale: `float32[rows]` of int8 rows, else None.
      spec: the dtype of the results.
    """
    run = functools.partial(form, spec=spec)
    arguments = (x, jnp.asarray(layer, jnp.int32), weight, x_scale)
    kind = weight[0].dtype
    serves = kind == np.int8 or (x.dtype == kind and x.dtype.name in FLOATS)
    serves &= x.dtype.name in (*FLOATS, "int8") and x.size > 0
    results = Result((x.shape[0], weight[0].shape[-2]), spec)
    return run_kernel(_PRODUCT, run, arguments, results, {}, serves=serves)


@functools.partial(jax.jit, static_argnames=("form", "spec", "dtype", "scale_at"), inline=INLINE)
def expert_mlp(
    form: Form,
    messages: Array,
    counts: Array,
    layer: Array | int,
    w13: Weights,
    w2: Weights,
    spec: Hashable,
    *,
    dtype: np.dtype,
    scale_at: int,
) -> Array:
    """Gated MLPs of the experts of one layer over rows grouped by expert: `[rows, hidden]` in `dtype`.

    Rows beyond `counts.sum()` are neither read nor written. Weights are read where they are.

    Args:
      form: the XLA form, `form(messages, counts, layer, w13, w2, spec=spec)`.
      messages: `[rows, width]`, float32 or bfloat16, `width` being hidden; or int8, with a row's float32 scale at byte
        `scale_at`.
      counts: `int32[experts]`, rows of each.
      layer: `int32[]`.
      w13, w2: `[layers, experts, 2f, hidden]` and `[layers, experts, hidden, f]`, of `dtype`; or int8.
      spec: what the form has to know beside.
    """
    run = functools.partial(form, spec=spec)
    arguments = (messages, counts, jnp.asarray(layer, jnp.int32), w13, w2)
    serves = all(values.dtype in (np.int8, dtype) for values, _ in (w13, w2))
    serves &= np.dtype(dtype).name in FLOATS and messages.dtype.name in (*FLOATS, "int8")
    serves &= counts.dtype == np.int32
    results = Result((messages.shape[0], w2[0].shape[-2]), np.dtype(dtype))
    return run_kernel(_EXPERTS, run, arguments, results, {"scale_at": scale_at}, serves=serves)
