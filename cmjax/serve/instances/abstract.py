"""Instances without weights, and without devices if need be: the steps that an engine would run, ready to be traced,
counted, priced, or compiled for a machine that is not there."""

import dataclasses
import functools
import math
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from numpy.typing import DTypeLike

from cmjax.model import ModelConfig, Params, PrefillBatch, abstract_params, abstract_placed_params, plan_placement
from cmjax.moe import ExpertPlacement, WireDtype
from cmjax.quant import QuantMode
from cmjax.schedule import SamplingShape
from cmjax.serve.instances.decode_rows import DecodeRows
from cmjax.serve.instances.forms import (
    check_drafts,
    check_length,
    empty_batch,
    prefill_places,
    prefill_step_tokens,
    step_spec,
    wires,
)
from cmjax.serve.instances.memory import cache_bytes, exchange_bytes
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import (
    BY_RANK,
    EVERYWHERE,
    SECOND_BY_RANK,
    DecodeState,
    Extras,
    PackedSampling,
    SamplingState,
    StepSpec,
    decode,
    prefill,
)

T = TypeVar("T")  # a tree of arrays
GREEDY = SamplingShape()


@dataclasses.dataclass(frozen=True)
class AbstractInstance:
    """A decode or prefill instance as shapes with shardings.

    Attributes:
        role, config, settings: of the instance.
        mesh: one axis "ep"; of devices that are there, of a described topology, or abstract (traces, does not compile).
        dtype: of floats.
        quant: how the large matrices are stored and multiplied; None: as floats.
        shape: of what its requests may ask for.
    """

    role: Literal["decode", "prefill"]
    config: ModelConfig
    settings: EngineSettings
    mesh: Mesh | AbstractMesh
    dtype: DTypeLike = jnp.bfloat16
    quant: QuantMode | None = None
    shape: SamplingShape = GREEDY

    def __post_init__(self) -> None:
        check_drafts(self.settings, has_module=self.config.num_mtp_layers > 0)
        check_length(self.config, self.settings)

    @property
    def ep_size(self) -> int:
        return int(self.mesh.size)

    @functools.cached_property
    def placement(self) -> ExpertPlacement | None:
        """Of the experts; None for a model without any."""
        counts = {}
        if self.role == "decode":
            counts = {
                "num_redundant_experts": self.settings.num_redundant_experts,
                "num_shared_replicas": self.settings.num_shared_replicas,
            }
        return plan_placement(self.config, self.ep_size, **counts)

    @functools.cached_property
    def params(self) -> Params[jax.ShapeDtypeStruct]:
        """Placed: experts by slot."""
        whole = abstract_params(self.config, self.dtype, quant=self.quant)
        return abstract_placed_params(whole, self.placement, self.mesh)

    @functools.cached_property
    def spec(self) -> StepSpec:
        """The static part of its steps."""
        return step_spec(self.config, self.params, self.placement, self.settings, self.mesh)

    @property
    def wires(self) -> tuple[WireDtype | None, WireDtype | None]:
        """What rows are on their way to the experts and back; None: as the activations are."""
        return wires(self.params, self.settings)

    @property
    def num_blocks(self) -> int:
        """Blocks of a rank's cache."""
        is_decode = self.role == "decode"
        return self.settings.num_decode_blocks if is_decode else self.settings.num_prefill_blocks

    @property
    def num_tokens(self) -> int:
        """Of a whole step, of all ranks: drafts are tokens too."""
        if self.role == "decode":
            each = self.settings.max_num_seqs_per_rank * (1 + self.settings.num_speculative_tokens)
            return self.ep_size * each
        return prefill_step_tokens(self.settings.max_num_batched_tokens, self.settings, self.ep_size)

    @property
    def cache(self) -> jax.ShapeDtypeStruct:
        """See `cmjax.serve.steps.new_cache`."""
        slots = self.num_blocks * self.settings.block_size
        shape = (self.ep_size, self.config.num_cache_layers, slots, self.spec.cache_width)
        return self._array(shape, self.dtype, BY_RANK)

    @property
    def cache_bytes(self) -> int:
        """Of a rank's cache."""
        return cache_bytes(self.config, self.num_blocks * self.settings.block_size, self.dtype, self.mesh)

    @property
    def exchange_bytes(self) -> int:
        """Of a rank's exchange buffers at their worst; devices that are not virtual have them in full."""
        if self.placement is None:
            return 0
        local_batch = self.num_tokens // self.ep_size
        return exchange_bytes(self.placement, self.config, local_batch, self.dtype, self.wires)

    @staticmethod
    def local_bytes(tree: object) -> int:
        """Bytes that one device holds of a tree of shapes with shardings."""
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What its step takes, all abstract: `(arguments, static arguments)` of `decode` or `prefill`."""
        num_layers = 0 if self.placement is None else len(self.placement.expert_to_slot)
        num_logical = 0 if self.placement is None else self.placement.expert_to_slot.shape[2]
        maps = self._array((num_layers, self.ep_size, num_logical), jnp.int32, SECOND_BY_RANK)
        common = self.params, maps, self.cache
        if self.role == "decode":
            static = {"num_steps": self.settings.steps_per_call, "extras": Extras(self.shape.num_logprobs)}
            return (*common, self._decode_state()), {"spec": self.spec, **static}
        extras = Extras(self.shape.num_logprobs, self.shape.num_prompt_logprobs)
        return (*common, *self._prefill_batch()), {"spec": self.spec, "extras": extras}

    def trace(self) -> jax.stages.Traced:
        """The step itself, traced: to be counted, or lowered and compiled."""
        arguments, static = self.arguments()
        return (decode if self.role == "decode" else prefill).trace(*arguments, **static)

    def _array(self, shape: tuple[int, ...], dtype: DTypeLike, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _like(self, tree: T, spec: PartitionSpec, times: int = 1) -> T:
        """Host arrays as shapes, the leading axis `times` as long."""
        return jax.tree.map(lambda a: self._array((a.shape[0] * times, *a.shape[1:]), a.dtype, spec), tree)

    def _decode_state(self) -> DecodeState:
        """Of one rank on the host, then of all."""
        settings, places = self.settings, self.settings.max_num_seqs_per_rank
        sizes = (1, places, settings.max_blocks, settings.max_model_len, settings.num_speculative_tokens)
        rows = DecodeRows(*sizes, self.shape, self.config.vocab_size)
        nobody = np.zeros(0, np.int64)
        hidden: Any = None
        if settings.num_speculative_tokens:
            width = settings.num_speculative_tokens + 1
            hidden = jax.ShapeDtypeStruct((places, width, self.config.hidden_size), self.dtype)
        state = rows.state(nobody, places, self.shape, hidden)
        state = dataclasses.replace(state, sampling=rows.sampling_of(nobody, places, self.shape))
        return self._like(state, BY_RANK, self.ep_size)

    def _prefill_batch(self) -> tuple[PrefillBatch, PackedSampling | None, jax.ShapeDtypeStruct | None]:
        num_places = prefill_places(self.settings, self.ep_size)
        batch = empty_batch(self.num_tokens, num_places, self.settings.max_blocks)
        sampling = scored = None
        if self.shape.is_sampled:
            rows = SamplingState.for_shape(num_places // self.ep_size, self.shape, self.config.vocab_size)
            sampling = self._like(PackedSampling.of(rows), BY_RANK, self.ep_size)
        if self.shape.num_prompt_logprobs is not None:
            scored = self._array((self.num_tokens,), jnp.int32, EVERYWHERE)
        return self._like(batch, EVERYWHERE), sampling, scored
