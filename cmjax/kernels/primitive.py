"""A kernel as a JAX primitive: a C++ handler on CPU devices, its XLA form everywhere else."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from cmjax.kernels import settings
from cmjax.mesh import num_cores

FLOATS = ("float32", "bfloat16")
Result = jax.ShapeDtypeStruct
# Before, an inlined call keeps the scopes of the first one like it, and counts of lanes and stages go by scopes.
INLINE = jax.__version_info__ >= (0, 11)
_RESULTS = (*FLOATS, "int8", "int32")
# A function of the operator's arguments, and of its keyword `spec`, what it has to know beside; its results are a tuple
# where there are several.
Form = Callable[..., Any]


class _FormOf:
    """A form with operands of some shapes, which is traced when somebody asks: on CPU devices nobody does.

    Attributes:
        results: shape and dtype of each result.
    """

    def __init__(self, function: Callable[..., Any], operands: Sequence[Any], results: Sequence[Result]) -> None:
        self._function = function
        self._operands = [jax.typeof(one) for one in operands]
        self._mesh = jax.sharding.get_abstract_mesh()
        self.results = tuple(results)

    @functools.cached_property
    def closed(self) -> ClosedJaxpr:
        """Traced; RuntimeError where its results are others than its operator says."""
        with jax.sharding.use_abstract_mesh(self._mesh):
            found = jax.make_jaxpr(self._function)(*self._operands)
        shapes = [(one.shape, one.dtype) for one in found.out_avals]
        if shapes != [(one.shape, one.dtype) for one in self.results]:
            raise RuntimeError(f"a form returns {shapes}, its operator says {self.results}")
        return found

    @property
    def jaxpr(self) -> Jaxpr:
        return self.closed.jaxpr

    def __call__(self, *operands: Any) -> Any:
        return jaxpr_as_fun(self.closed)(*operands)

    def __repr__(self) -> str:
        return str(self.closed)


def _lower_form(ctx: mlir.LoweringRuleContext, *operands: Any, form: _FormOf, **_: object) -> Any:
    return mlir.lower_fun(form, multiple_results=True)(ctx, *operands)


def _lower_cpu(
    name: str,
    aliases: dict[int, int] | None,
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    form: _FormOf,
    attributes: tuple[tuple[str, Any], ...],
) -> Sequence[Any]:
    if not settings.is_native():
        return _lower_form(ctx, *operands, form=form)
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    num_devices = 1 if mesh is None else mesh.size
    # Devices that outnumber the threads have no use for each other's help.
    is_parallel = settings.is_helped() and 2 * num_devices <= num_cores()
    lowering = jax.ffi.ffi_lowering(f"cmjax_kernels_{name}", operand_output_aliases=aliases)
    return lowering(ctx, *operands, is_parallel=is_parallel, **dict(attributes))


def _abstract(*avals: Any, form: _FormOf, **_: object) -> list[Any]:
    varying = frozenset().union(*(aval.mat.varying for aval in avals))
    kind = avals[0].mat.update(varying=varying)
    return [
        avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False, manual_axis_type=kind)
        for out in form.results
    ]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, form: _FormOf, **_: object) -> tuple[Any, Any]:
    chosen = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def function(*values: jax.Array) -> list[jax.Array]:
        operands = list(primals)
        for i, value in zip(chosen, values, strict=True):
            operands[i] = value
        return form(*operands)

    return jax.jvp(function, [primals[i] for i in chosen], [tangents[i] for i in chosen])


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, form: _FormOf, **_: object) -> tuple[Any, list[int]]:
    results = jax.vmap(form, in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


class _KernelPrimitive(Primitive):
    def is_high(self, *_: object, **__: object) -> bool:
        """A form may hold calls that JAX has yet to lower within itself; it is traced anew wherever it is used."""
        return False


def make_primitive(name: str, aliases: dict[int, int] | None = None) -> Primitive:
    """`kernels_{name}`: the handler `cmjax_kernels_{name}` on CPU, its parameter `form` everywhere else.

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
    primitive: Primitive,
    form: Form,
    arguments: Sequence[Any],
    results: Any,
    attributes: Mapping[str, int | float],
    *,
    serves: bool,
) -> Any:
    """`form(*arguments)`, as the primitive where the C++ `serves` such arguments and is wanted.

    Its operands are the arguments' arrays in turn; its parameter `form` stands for the form, and has its `jaxpr`.

    Args:
      results: a tree of `Result`, what the form returns.
    """
    shapes, results_tree = jax.tree.flatten(results)
    if not (serves and settings.is_wanted()) or any(one.dtype.name not in _RESULTS for one in shapes):
        return form(*arguments)
    operands, tree = jax.tree.flatten(tuple(arguments))
    own = _FormOf(lambda *values: jax.tree.leaves(form(*jax.tree.unflatten(tree, values))), operands, shapes)
    typed = {key: (np.float32 if isinstance(value, float) else np.int32)(value) for key, value in attributes.items()}
    outputs = primitive.bind(*operands, form=own, attributes=tuple(typed.items()))
    return jax.tree.unflatten(results_tree, outputs)
