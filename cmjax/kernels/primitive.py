"""A kernel as a JAX primitive: a C++ handler on CPU devices, its XLA form everywhere else."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from cmjax.kernels import settings
from cmjax.mesh import num_cores

FLOATS = ("float32", "bfloat16")
_RESULTS = (*FLOATS, "int8", "int32")
# A function of the operator's arguments, and of its keyword `spec`, what it has to know beside; its results are a tuple
# where there are several.
Form = Callable[..., Any]


def _lower_form(ctx: mlir.LoweringRuleContext, *operands: Any, jaxpr: ClosedJaxpr, **_: object) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)


def _lower_cpu(
    name: str,
    aliases: dict[int, int] | None,
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    jaxpr: ClosedJaxpr,
    attributes: tuple[tuple[str, Any], ...],
) -> Sequence[Any]:
    if not settings.is_native():
        return _lower_form(ctx, *operands, jaxpr=jaxpr)
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    num_devices = 1 if mesh is None else mesh.size
    # Devices that outnumber the threads have no use for each other's help.
    is_parallel = settings.is_helped() and 2 * num_devices <= num_cores()
    lowering = jax.ffi.ffi_lowering(f"cmjax_kernels_{name}", operand_output_aliases=aliases)
    return lowering(ctx, *operands, is_parallel=is_parallel, **dict(attributes))


def _abstract(*avals: Any, jaxpr: ClosedJaxpr, **_: object) -> list[Any]:
    varying = frozenset().union(*(aval.mat.varying for aval in avals))
    kind = avals[0].mat.update(varying=varying)
    return [
        avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False, manual_axis_type=kind)
        for out in jaxpr.out_avals
    ]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: ClosedJaxpr, **_: object) -> tuple[Any, Any]:
    chosen = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def function(*values: jax.Array) -> list[jax.Array]:
        operands = list(primals)
        for i, value in zip(chosen, values, strict=True):
            operands[i] = value
        return jaxpr_as_fun(jaxpr)(*operands)

    return jax.jvp(function, [primals[i] for i in chosen], [tangents[i] for i in chosen])


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, jaxpr: ClosedJaxpr, **_: object) -> tuple[Any, list[int]]:
    results = jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


class _KernelPrimitive(Primitive):
    def is_high(self, *_: object, **__: object) -> bool:
        """A form may hold calls that JAX has yet to lower within itself; it is traced anew wherever it is used."""
        return False


def make_primitive(name: str, aliases: dict[int, int] | None = None) -> Primitive:
    """`kernels_{name}`: the handler `cmjax_kernels_{name}` on CPU, its parameter `jaxpr` everywhere else.

    `aliases`: operands whose memory results take.
    """
    primitive = _KernelPrimitive(f"kernels_{name}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(_abstract)
    primitive.def_impl(lambda *operands, **params: jax.jit(functools.partial(primitive.bind, **params))(*operands))
    mlir.register_lowering(primitive, _lower_form, cacheable=False)
    mlir.register_lowering(primitive, functools.partial(_lower_cpu, name, aliases), platform="cpu", cacheable=False)
    ad.primitive_jvps[primitive] = _jvp
    batching.primitive_batchers[primitive] = _batch
    return primitive


def run_kernel(
    primitive: Primitive, form: Form, arguments: Sequence[Any], attributes: Mapping[str, int | float], *, serves: bool
) -> Any:
    """`form(*arguments)`, as the primitive where the C++ `serves` such arguments and is wanted.

    Its operands are the arguments' arrays in turn; its parameter `jaxpr` is the form, traced.
    """
    if not (serves and settings.is_wanted()):
        return form(*arguments)
    operands, tree = jax.tree.flatten(tuple(arguments))
    jaxpr, results = jax.make_jaxpr(lambda *values: form(*jax.tree.unflatten(tree, values)), return_shape=True)(
        *operands
    )
    if any(out.dtype.name not in _RESULTS for out in jaxpr.out_avals):
        return form(*arguments)
    typed = {key: (np.float32 if isinstance(value, float) else np.int32)(value) for key, value in attributes.items()}
    outputs = primitive.bind(*operands, jaxpr=jaxpr, attributes=tuple(typed.items()))
    return jax.tree.unflatten(jax.tree.structure(results), outputs)
