"""What all steps share: the mesh they run on, how their arrays are cut, and the cache they work on.

A step is one `shard_map` over an instance's one-axis mesh. Params, expert placement, cache and batch are arguments,
`StepSpec` alone is static: an instance can switch models of one shape and rebalance without recompiling. The steps see
the cache only through block tables and slot mappings.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from cmjax.mesh import EP_AXIS, fabric, is_crowded, stored_width
from cmjax.model import RankSpec

T = TypeVar("T")

EVERYWHERE = PartitionSpec()
BY_RANK = PartitionSpec(EP_AXIS)
# Such as `expert_to_slot[moe layers, source rank, logical]`, or `token_ids[steps, requests]`.
SECOND_BY_RANK = PartitionSpec(None, EP_AXIS)


def specs_of(output: type[T], **others: PartitionSpec | None) -> T:
    """An output that holds how each field is cut in the field's place: by rank, but for `others`."""
    fields = dataclasses.fields(output)  # type: ignore[arg-type]  # always a dataclass
    return output(**{field.name: others.get(field.name, BY_RANK) for field in fields})


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What is static about an instance's steps: the rank's pass, and the mesh it runs on (abstract: traces only).

    Specs that differ in their devices alone are equal: a step is traced and lowered once for all instances of a kind,
    and runs where its arguments are.

    Attributes:
        form: the mesh without its devices.
    """

    rank: RankSpec
    mesh: Mesh | AbstractMesh = dataclasses.field(compare=False)
    form: AbstractMesh = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", self.mesh.abstract_mesh)

    def on_ranks(self, function: Callable, in_specs: object, out_specs: object) -> Callable:
        """Wrap a per-rank function for meshes of the instance's form."""
        return jax.shard_map(function, mesh=self.form, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    @property
    def cache_width(self) -> int:
        """Of a row of the cache: that of a latent, or more where the devices store rows in tiles."""
        return stored_width(self.rank.config.latent_width, self.mesh)

    def by_rank(self) -> NamedSharding:
        """The sharding of arrays whose leading axis is cut by rank."""
        return NamedSharding(self.mesh, BY_RANK)


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a step returns besides, where asked for.

    Attributes:
        num_logprobs: log probabilities of the sampled tokens, and of so many of the best at each place.
        num_prompt_logprobs: the same for the prompts of a prefill step.
        logits: of every token of a prefill step, of every step of a decode call.
        hidden: of every token of a prefill step.
    """

    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    logits: bool = False
    hidden: bool = False


NO_EXTRAS = Extras()


class Step(Generic[T]):
    """A jitted step, whose static keyword `spec` says which devices its programs are for.

    XLA orders a CPU program's operations so that many can run at once. Devices that outnumber the cores gain nothing by
    that, and pay for switching between threads: their programs are ordered for little memory, a sixth of a step at
    EP320. XLA's own collectives end the process in that order; it takes the fabric's.
    Such a step is called at top level, not from another jitted function.
    """

    def __init__(self, function: Callable[..., T], **how: Any) -> None:
        self._usual = jax.jit(function, **how)
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        self._crowded = jax.jit(function, compiler_options=options, **how)
        functools.update_wrapper(self, function)

    def _jitted(self, mesh: Mesh | AbstractMesh) -> Any:
        return self._crowded if is_crowded(mesh) and fabric.status()["psum"].form == "fabric" else self._usual

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        result: T = self._jitted(kwargs["spec"].mesh)(*args, **kwargs)
        return result

    def _cache_size(self) -> int:
        jits: tuple[Any, Any] = self._usual, self._crowded
        return sum(one._cache_size() for one in jits)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As of `jax.jit`."""
        lowered: jax.stages.Lowered = self._jitted(kwargs["spec"].mesh).lower(*args, **kwargs)
        return lowered

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As of `jax.jit`."""
        traced: jax.stages.Traced = self._jitted(kwargs["spec"].mesh).trace(*args, **kwargs)
        return traced


def new_cache(spec: StepSpec, num_blocks: int, dtype: DTypeLike) -> jax.Array:
    """Return an instance's cache, `[R, cache layers, num_blocks * block_size, row width]`; nothing is cleared."""
    shape = (1, spec.rank.config.num_cache_layers, num_blocks * spec.rank.block_size, spec.cache_width)
    return jax.jit(spec.on_ranks(lambda: fabric.empty(shape, dtype), (), BY_RANK), out_shardings=spec.by_rank())()


# Logits of this many tokens at a time: those of a whole step would be its largest array by far.
_ROWS = 512


def by_rows(function: Callable[..., T], *arrays: jax.Array) -> T:
    """Apply `function` to `arrays[tokens, ...]`, a few hundred rows at a time."""
    tokens = arrays[0].shape[0]
    rows = min(_ROWS, tokens)
    pad = -tokens % rows

    def cut(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, pad), *(((0, 0),) * (a.ndim - 1)))).reshape(-1, rows, *a.shape[1:])

    out = lax.map(lambda parts: function(*parts), tuple(map(cut, arrays)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:tokens], out)
