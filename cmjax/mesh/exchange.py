"""The exchange as a JAX primitive: its operands and parameters, abstract evaluation, lowering, and bytes.

Each collective has three primitives, `fabric_NAME`, `fabric_NAME_start` and `fabric_NAME_done`, over canonical
operands (see `layout.py`):

  plain: place, x, [output, 4 index arrays]
  start: place, x, [4 index arrays] -> stamp int32[4]
  done:  place, stamp, x, [output, 4 index arrays], guards...

`place` is int32[]: group * num_ranks + rank, computed from the axis indices so that compiled code holds no device
ids; an axis that `group_size` cuts is several groups. Guards are single elements of the work an exchange hides behind.
Parameters: `axis_name` (tuple), `num_ranks` of a group, `channel` (None = one per call site), `plane`, `forms`, `perm`
(ppermute).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from cmjax.mesh.layout import Layout, checked_perm
from cmjax.mesh.settings import COLLECTIVES, Forms, Settings

Array = jax.Array
T = TypeVar("T")
AxisName = str | tuple[str, ...]
Half = Literal["plain", "start", "done"]
Params = dict[str, Any]
# (*data operands, axis_name, perm, forms, groups, platform) -> result
LaxForm = Callable[..., Array]
# (lowering context, half, collective's number, aliases, channel, operands, params) -> results
NativeLowering = Callable[..., Sequence[Any]]

_STAMP_LENGTH = 4
_NUM_INDEX_ARRAYS = 4
_SUMMABLE_INTS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_SUMMABLE_FLOATS = ("bfloat16", "float16", "float32", "float64")


class Call(NamedTuple):
    """How a collective is called: among which ranks, under which name, on which plane; see `fabric`."""

    axis_name: AxisName
    channel: str | None
    plane: str
    group_size: int | None = None
    perm: Sequence[tuple[int, int]] = ()


class Primitives(NamedTuple):
    """The three primitives of one collective, and what stands for them on an axis of size 1, where nothing moves."""

    name: str
    plain: Primitive
    start: Primitive
    done: Primitive
    alone: Callable[..., Array]  # (*data operands, axis_name, perm) -> result


@flax.struct.dataclass
class Token:
    """An exchange that has been started: a pytree, so that it can be carried through `lax.scan`."""

    stamp: Array  # int32[4], what the C++ side knows it by
    index: tuple[Array, ...]  # offsets and sizes of a ragged exchange
    started: jax.ShapeDtypeStruct = flax.struct.field(pytree_node=False)  # the array that the start was given
    layout: Layout = flax.struct.field(pytree_node=False)
    params: tuple[tuple[str, Any], ...] = flax.struct.field(pytree_node=False)


def make_primitives(
    name: str, lax_form: LaxForm, alone: Callable[..., Array], lower_native: NativeLowering, settings: Settings
) -> Primitives:
    """The primitives of collective `name`: C++ handlers on CPU where they serve, `lax_form` everywhere else."""

    def make(half: Half) -> Primitive:
        primitive = Primitive(_primitive_name(name, half))

        def lower_lax(ctx: mlir.LoweringRuleContext, *operands: object, **params: Any) -> Sequence[Any]:
            def call(*arguments: Array) -> Array:
                if half == "start":
                    return jnp.zeros((_STAMP_LENGTH,), jnp.int32)
                data = _data_operands(name, half, arguments)
                named = {key: params[key] for key in ("axis_name", "perm", "forms")}
                groups = _groups(params["axis_name"], params["num_ranks"])
                return lax_form(*data, **named, groups=groups, platform=ctx.module_context.platforms[0])

            return mlir.lower_fun(call, multiple_results=False)(ctx, *operands)

        def lower_cpu(ctx: mlir.LoweringRuleContext, *operands: object, **params: Any) -> Sequence[Any]:
            mesh = getattr(ctx.module_context.axis_context, "mesh", None)
            num_devices = params["num_ranks"] if mesh is None else mesh.size
            if not settings.cpu_uses_native(params["forms"], num_devices):
                return lower_lax(ctx, *operands, **params)
            channel = params["channel"]
            if channel is None:
                # The module's own numbering: the same in every process, as JAX's collectives rely on too.
                scope = "/".join(filter(None, (str(ctx.name_stack), name)))
                channel = f"{scope}#{ctx.module_context.new_channel()}"
            return lower_native(ctx, half, COLLECTIVES.index(name), _aliases(name, half), channel, operands, params)

        primitive.def_abstract_eval(functools.partial(_abstract, name, half))
        primitive.def_impl(functools.partial(_impl, primitive))
        mlir.register_lowering(primitive, lower_lax, cacheable=False)
        mlir.register_lowering(primitive, lower_cpu, platform="cpu", cacheable=False)
        refuse(primitive, name)
        return primitive

    return Primitives(name, make("plain"), make("start"), make("done"), alone)


def make_params(layout: Layout, call: Call, forms: Forms) -> Params:
    """The parameters of an exchange's primitives."""
    return {
        "axis_name": (call.axis_name,) if isinstance(call.axis_name, str) else tuple(call.axis_name),
        "num_ranks": layout.num_ranks,
        "channel": call.channel,
        "plane": call.plane,
        "forms": forms,
        "perm": checked_perm(call.perm, layout.num_ranks),
    }


def refuse(primitive: Primitive, name: str) -> None:
    """Makes `jax.vmap` and differentiation of the primitive one clear error each."""
    batching.primitive_batchers[primitive] = functools.partial(_raise, name, "jax.vmap", "a batching rule")
    ad.primitive_jvps[primitive] = functools.partial(_raise, name, "differentiation", "a derivative")


def run_each(
    run: Callable[[Primitives, Layout, Params, Array], Any],
    primitives: Primitives,
    make_layout: Callable[[Array, int], Layout],
    x: object,
    call: Call,
    forms: Forms,
) -> Any:
    """`run` for every array in the tree `x`; arrays that share a named channel get numbers of their own."""
    leaves, tree = jax.tree.flatten(x)
    name, channel = primitives.name, call.channel
    num_ranks = _group_size(name, call.group_size, lax.axis_size(call.axis_name))
    results = []
    for i, leaf in enumerate(as_data(name, leaf) for leaf in leaves):
        check_dtype(name, leaf.dtype)
        layout = make_layout(leaf, num_ranks)
        own = call if channel is None or len(leaves) == 1 else call._replace(channel=f"{channel}[{i}]")
        results.append(run(primitives, layout, make_params(layout, own, forms), leaf))
    return jax.tree.unflatten(tree, results)


def _group_size(name: str, wanted: int | None, axis_size: int) -> int:
    if wanted is None:
        return axis_size
    if wanted < 1 or axis_size % wanted:
        raise ValueError(f"fabric.{name}: group_size {wanted} does not divide the {axis_size} ranks of the mesh axis")
    return wanted


def _groups(axis_name: tuple[str, ...], num_ranks: int) -> list[list[int]] | None:
    """The ranks of each group, where there are several."""
    axis_size = lax.axis_size(axis_name)
    return None if num_ranks == axis_size else np.arange(axis_size).reshape(-1, num_ranks).tolist()


def as_data(name: str, x: ArrayLike) -> Array:
    """`x` as an array; what a sum is to count, as int32."""
    array = jnp.asarray(x)
    return array.astype(jnp.int32) if name.startswith("psum") and array.dtype == np.bool_ else array


def run_plain(primitives: Primitives, layout: Layout, params: Params, x: Array, *extras: Array) -> Array:
    """The whole exchange of `x`; `extras` are the ragged form's output and index arrays."""
    operands = _vary([layout.pack(x), *extras], params["axis_name"])
    if layout.num_ranks == 1:
        return layout.unpack(_run_alone(primitives, params, operands))
    return layout.unpack(primitives.plain.bind(_place(params["axis_name"]), *operands, **params))


def run_start(primitives: Primitives, layout: Layout, params: Params, x: Array, *index: Array) -> Token:
    """The first half."""
    stamp = jnp.zeros((_STAMP_LENGTH,), jnp.int32)
    if layout.num_ranks > 1:
        operands = _vary([layout.pack(x), *index], params["axis_name"])
        stamp = primitives.start.bind(_place(params["axis_name"]), *operands, **params)
    return Token(stamp, index, jax.ShapeDtypeStruct(x.shape, x.dtype), layout, tuple(sorted(params.items())))


def run_done(primitives: Primitives, token: Token, hide_behind: object, x: Array, *output: Array) -> Array:
    """The second half; any array in `hide_behind` is waited for first."""
    started = token.started
    if (x.shape, x.dtype) != (started.shape, started.dtype):
        raise ValueError(
            f"fabric.{token.layout.name}_done: the token was started with {started.dtype}{list(started.shape)}, "
            f"not {x.dtype}{list(x.shape)}: pass the array that was started"
        )
    params = dict(token.params)
    operands = _vary([token.stamp, token.layout.pack(x), *output, *token.index], params["axis_name"])
    if token.layout.num_ranks == 1:
        return token.layout.unpack(_run_alone(primitives, params, operands[1:]))
    guards = [_one_element(leaf) for leaf in jax.tree.leaves(hide_behind) if np.size(leaf)]
    result = primitives.done.bind(_place(params["axis_name"]), *operands, *guards, **params)
    return token.layout.unpack(result)


def check_dtype(name: str, dtype: np.dtype) -> None:
    """Raises TypeError where a collective cannot carry the dtype."""
    if name.startswith("psum") and dtype.name not in _SUMMABLE_INTS + _SUMMABLE_FLOATS:
        raise TypeError(f"fabric.{name}: dtype {dtype} cannot be summed (it can be moved, by the other collectives)")
    if dtype.name in ("int2", "uint2", "int4", "uint4", "float4_e2m1fn"):
        raise TypeError(f"fabric.{name}: dtype {dtype} does not fill whole bytes")
    if not jnp.issubdtype(dtype, jnp.number) and dtype != np.bool_:
        raise TypeError(f"fabric.{name}: dtype {dtype} is not plain data")


def exchange_bytes(eqn: JaxprEqn) -> int:
    """Bytes one rank sends to others in an exchange primitive; 0 for its start half and for any other equation.

    psum counts as psum_scatter then all_gather. Of a ragged exchange, whose sizes are data, it is the upper bound:
    the whole operand. `eqn.params` holds `plane`, `axis_name`, `num_ranks` and `channel`.
    """
    name, half = _name_and_half(eqn.primitive.name)
    if name is None or half == "start":
        return 0
    aval: Any = eqn.invars[1 if half == "plain" else 2].aval
    num_bytes = math.prod(aval.shape) * aval.dtype.itemsize
    num_ranks = eqn.params["num_ranks"]
    if name == "psum":
        return 2 * -(-num_bytes // num_ranks) * (num_ranks - 1)
    if name in ("all_to_all", "psum_scatter"):
        return num_bytes // num_ranks * (num_ranks - 1)
    return num_bytes * (num_ranks - 1) if name == "all_gather" else num_bytes


def _primitive_name(name: str, half: Half) -> str:
    return f"fabric_{name}" if half == "plain" else f"fabric_{name}_{half}"


def _name_and_half(primitive_name: str) -> tuple[str | None, Half]:
    for name in COLLECTIVES:
        for half in ("plain", "start", "done"):
            if primitive_name == _primitive_name(name, half):
                return name, half
    return None, "plain"


def _data_operands(name: str, half: Half, operands: Sequence[T]) -> Sequence[T]:
    first = 2 if half == "done" else 1
    count = 1
    if name == "ragged_all_to_all":
        count += _NUM_INDEX_ARRAYS + (half != "start")
    return operands[first : first + count]


def _aliases(name: str, half: Half) -> dict[int, int]:
    # A whole all_to_all happens in place: no second buffer, and in a loop no copy of the carry. The halves cannot: XLA
    # may read the operand between them.
    if name == "all_to_all" and half == "plain":
        return {1: 0}
    # The ragged form writes into the caller's output: only the rows that arrive are touched.
    if name != "ragged_all_to_all" or half == "start":
        return {}
    return {2 if half == "plain" else 3: 0}


def _abstract(
    name: str, half: Half, *avals: jax.core.ShapedArray, axis_name: tuple[str, ...], num_ranks: int, **_: object
) -> jax.core.ShapedArray:
    x, *extras = _data_operands(name, half, avals)
    if half == "start":
        return x.update(shape=(_STAMP_LENGTH,), dtype=np.dtype(np.int32), weak_type=False)
    shape, varying = x.shape, x.mat.varying
    if name == "all_gather":
        shape = (num_ranks, *shape)
    elif name == "psum":
        varying = frozenset(varying) - set(axis_name)
    elif name == "psum_scatter":
        shape = shape[1:]
    elif name == "ragged_all_to_all":
        shape = extras[0].shape
    return x.update(shape=shape, weak_type=False, manual_axis_type=x.mat.update(varying=varying))


def _impl(primitive: Primitive, *operands: Array, **params: Any) -> Array:
    return jax.jit(functools.partial(primitive.bind, **params))(*operands)


def _raise(name: str, what: str, rule: str, *_: object, **__: object) -> NoReturn:
    raise NotImplementedError(f"fabric.{name} does not have {rule}: take {what} out of the exchange")


def _run_alone(primitives: Primitives, params: Params, operands: Sequence[Array]) -> Array:
    return primitives.alone(*operands, axis_name=params["axis_name"], perm=params["perm"])


def _place(axis_name: tuple[str, ...]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    others = tuple(axis for axis in mesh.axis_names if axis not in axis_name)
    automatic = [axis for axis in others if axis not in mesh.manual_axes and mesh.shape[axis] > 1]
    if automatic:
        raise ValueError(f"fabric: mesh axes {automatic} are not manual; give them to jax.shard_map too")
    others = tuple(axis for axis in others if axis in mesh.manual_axes)
    return lax.axis_index(others + axis_name)


def _vary(operands: Sequence[Array], axis_name: tuple[str, ...]) -> list[Array]:
    """Marks operands as differing between ranks, and as differing wherever the first does (check_vma=True)."""
    varying = set().union(*(jax.typeof(operand).mat.varying for operand in operands))
    if not varying and not jax.sharding.get_abstract_mesh().manual_axes:
        return list(operands)
    wanted = varying | set(axis_name)
    return [_pcast(operand, wanted) for operand in operands]


def _pcast(x: Array, axes: set[str]) -> Array:
    missing = tuple(axis for axis in sorted(axes) if axis not in jax.typeof(x).mat.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def _one_element(x: ArrayLike) -> Array:
    return jnp.asarray(x).reshape(-1)[0]
