"""The operators as JAX primitives."""

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from cmjax.kernels import settings

Array = jax.Array
Form = Callable[..., Array]
Weights = tuple[
    Array | np.ndarray, Array | np.ndarray | None
]  # matrices, and where they are int8 a float32 scale for each output

_FLOATS = ("float32", "bfloat16")


def _lower_form(ctx: mlir.LoweringRuleContext, *operands: Any, jaxpr: ClosedJaxpr, **_: object) -> Any:
    return mlir.lower_fun(lambda *values: jaxpr_as_fun(jaxpr)(*values)[0], multiple_results=False)(ctx, *operands)


def _lower_cpu(
    name: str, ctx: mlir.LoweringRuleContext, *operands: Any, jaxpr: ClosedJaxpr, **attributes: Any
) -> Sequence[Any]:
    if not settings.is_native():
        return _lower_form(ctx, *operands, jaxpr=jaxpr)
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    num_devices = 1 if mesh is None else mesh.size
    # Devices that outnumber the threads have no use for each other's help.
    is_parallel = 2 * num_devices <= (os.cpu_count() or 1)
    typed = {key: np.int32(value) for key, value in attributes.items()}
    return jax.ffi.ffi_lowering(f"cmjax_kernels_{name}")(ctx, *operands, is_parallel=is_parallel, **typed)


def _abstract(*avals: Any, jaxpr: ClosedJaxpr, **_: object) -> Any:
    (out,) = jaxpr.out_avals
    varying = frozenset().union(*(aval.mat.varying for aval in avals))
    return avals[0].update(
        shape=out.shape, dtype=out.dtype, weak_type=False, manual_axis_type=avals[0].mat.update(varying=varying)
    )


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: ClosedJaxpr, **_: object) -> tuple[Any, Any]:
    chosen = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def function(*values: Array) -> Array:
        operands = list(primals)
        for i, value in zip(chosen, values, strict=True):
            operands[i] = value
        return jaxpr_as_fun(jaxpr)(*operands)[0]

    return jax.jvp(function, [primals[i] for i in chosen], [tangents[i] for i in chosen])


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, jaxpr: ClosedJaxpr, **_: object) -> tuple[Any, int]:
    return jax.vmap(lambda *values: jaxpr_as_fun(jaxpr)(*values)[0], in_axes=tuple(axes))(*operands), 0


def _make_primitive(name: str) -> Primitive:
    """`kernels_{name}`: the C++ handler on CPU, its parameter `jaxpr` everywhere else."""
    primitive = Primitive(f"kernels_{name}")
    primitive.def_abstract_eval(_abstract)
    primitive.def_impl(lambda *operands, **params: jax.jit(functools.partial(primitive.bind, **params))(*operands))
    mlir.register_lowering(primitive, _lower_form, cacheable=False)
    mlir.register_lowering(primitive, functools.partial(_lower_cpu, name), platform="cpu", cacheable=False)
    ad.primitive_jvps[primitive] = _jvp
    batching.primitive_batchers[primitive] = _batch
    return primitive


_PRODUCT, _EXPERTS = _make_primitive("product"), _make_primitive("experts")


def _run(primitive: Primitive, form: Form, arguments: Sequence[Any], attributes: dict[str, int]) -> Array:
    """Bind the primitive to the arguments that there are, with `form`, a function of all of them, traced."""
    operands, tree = jax.tree.flatten(tuple(arguments))
    jaxpr = jax.make_jaxpr(lambda *values: form(*jax.tree.unflatten(tree, values)))(*operands)
    return primitive.bind(*operands, jaxpr=jaxpr, **attributes)


# Inlined where it is traced; called eagerly, one compiled program for all calls alike.
@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=True)
def product(
    form: Form,
    x: Array,
    layer: Array | int,
    weight: Weights,
    x_scale: Array | None,
    spec: Hashable,
) -> Array:
    """`x @ weight[layer].T`, `[rows, out]`: the weights are read where they are, without conversion.

    Sums are float32 (int32 of int8 products), and a row's result does not depend on the rows beside it.

    Args:
      form: the XLA form, `form(x, layer, weight, x_scale, spec=spec)`.
      x: `[rows, in]`, float32 or bfloat16; or int8.
      layer: `int32[]`, the index of a matrix in the stack.
      weight: `[layers, out, in]`, of the dtype of `x`; or int8: then rows of floats are quantized first.
      x_scale: `float32[rows]` of int8 rows, else None.
      spec: what the form has to know beside.
    """
    run = functools.partial(form, spec=spec)
    arguments = (x, jnp.asarray(layer, jnp.int32), weight, x_scale)
    kind = weight[0].dtype
    is_served = kind == np.int8 or (x.dtype == kind and x.dtype.name in _FLOATS)
    is_served &= x.dtype.name in (*_FLOATS, "int8") and x.size > 0 and settings.is_wanted()
    return _run(_PRODUCT, run, arguments, {}) if is_served else run(*arguments)


@functools.partial(jax.jit, static_argnames=("form", "spec", "dtype", "scale_at"), inline=True)
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
    is_served = all(values.dtype in (np.int8, dtype) for values, _ in (w13, w2))
    is_served &= np.dtype(dtype).name in _FLOATS and messages.dtype.name in (*_FLOATS, "int8")
    is_served &= counts.dtype == np.int32 and settings.is_wanted()
    return _run(_EXPERTS, run, arguments, {"scale_at": scale_at}) if is_served else run(*arguments)
