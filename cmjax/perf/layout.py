"""What is priced: a model's step on an instance, and the counts of its trace.

The steps are `cmjax.serve.prefill` and `cmjax.serve.decode` themselves, traced with shapes in place of arrays on a mesh
of no devices: any EP size, in less than a second.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from cmjax.errors import UserError
from cmjax.mesh import EP_AXIS
from cmjax.model import (
    DecodeBatch,
    LayerParams,
    ModelConfig,
    Params,
    PrefillBatch,
    RankSpec,
    abstract_params,
    default_wires,
    head_shards,
    num_bytes,
    plan_placement,
)
from cmjax.moe import ExpertPlacement, FabricExchange, MlpParams, buffer_bytes, message_bytes
from cmjax.perf.count import count
from cmjax.perf.work import ATTENTION_STREAM, Expected, StageWork, blend_stages
from cmjax.serve import DecodeState, StepSpec, decode, prefill
from cmjax.serve.steps.decode import Settled

Array = jax.ShapeDtypeStruct
Phase = Literal["prefill", "decode"]
_BLOCK = 128
_DTYPE = jnp.bfloat16
# Blocks of a traced cache and of its tables: how many there are changes no count, as long as there is a whole chunk.
_TABLE_BLOCKS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One instance and one step of it.

    Attributes:
        config: the model's.
        phase: "prefill" or "decode".
        ep_size: ranks; attention is data-parallel over them in decode, SP-TP-SP in prefill.
        batch: of a rank: requests (decode), or tokens of a step (prefill).
        context: tokens that a request has in the cache (decode, on average), or tokens of a prompt (prefill).
        cached: of a prompt's tokens, those whose latents are there already (prefill).
        drafts: MTP drafts of a decode step.
        microbatches: 1 or 2.
        quant: "int8", or None for bfloat16.
        balance: rows of the busiest rank's experts over the mean; 1 is perfect.
        attention: of prefill: "staged" is the engine's SP-TP-SP; "dp" leaves each rank its own prompts whole, as others
            do, and takes the stages of attention from the same step traced on one rank.
        num_redundant_experts, num_shared_replicas: of the placement; None: what `ExpertPlacement.plan` takes.
    """

    config: ModelConfig
    phase: Phase
    ep_size: int
    batch: int
    context: float
    cached: float = 0
    drafts: int = 0
    microbatches: int = 1
    quant: Literal["int8"] | None = "int8"
    balance: float = 1.0
    attention: Literal["staged", "dp"] = "staged"
    num_redundant_experts: int | None = None
    num_shared_replicas: int | None = None

    def __post_init__(self) -> None:
        for name in ("ep_size", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is not positive")
        if self.context <= 0 or not 0 <= self.cached < max(self.context, 1):
            raise UserError(f"context {self.context:g} and cached {self.cached:g} are no lengths of a request")
        if self.balance < 1:
            raise UserError(f"balance {self.balance:g} is below 1: it is the busiest rank's load over the mean")
        if self.microbatches not in (1, 2):
            raise UserError(f"microbatches {self.microbatches} are not supported; supported: 1, 2")
        if self.microbatches == 2 and self.batch % 2:
            raise UserError(f"microbatches 2 do not divide a batch of {self.batch}")
        if self.drafts and not self.config.num_mtp_layers:
            raise UserError(f"drafts {self.drafts} need an MTP module, which this model has not")
        longest = self.config.max_position_embeddings
        if self.context > longest:
            raise UserError(f"context {self.context:g} exceeds the model's max_position_embeddings {longest}")

    @property
    def tokens(self) -> int:
        """Of a rank and a step."""
        return self.batch * (self.drafts + 1) if self.phase == "decode" else self.batch

    @functools.cached_property
    def placement(self) -> ExpertPlacement | None:
        """Of the experts."""
        return plan_placement(
            self.config,
            self.ep_size,
            num_redundant_experts=self.num_redundant_experts,
            num_shared_replicas=self.num_shared_replicas,
        )

    def counts(self) -> list[StageWork]:
        """The stages of the step; those of equal shapes are traced once."""
        shape = dataclasses.replace(self, context=1.0, cached=0.0, balance=1.0, attention="staged")
        stages = _counts(shape)
        if self.attention == "staged" or self.phase == "decode":
            return stages
        alone = dataclasses.replace(shape, ep_size=1, num_redundant_experts=None, num_shared_replicas=None)
        own = {(one.section, one.stage, one.lane): one for one in _counts(alone)}
        return [
            own[one.section, one.stage, one.lane] if one.stage in ATTENTION_STREAM else one
            for one in stages
        ]

    def counts_by_batch(self, low: int, high: int) -> list[StageWork]:
        """As `counts`, between those of two batches: for searches over many."""
        at = [dataclasses.replace(self, batch=batch).counts() for batch in (low, high)]
        return blend_stages(*at, (self.batch - low) / (high - low))

    def expected(self, tokens: int) -> Expected:
        """What the data is expected to be where `tokens` of the rank are dispatched together."""
        rows, experts = self._rows(tokens)
        if self.phase == "decode":
            return Expected(keys=self.context, rows=rows, experts=experts)
        # A group's tokens attend together, each rank with its share of the heads.
        own = tokens * (head_shards(self.config, self.ep_size) if self.attention == "staged" else 1)
        new = self.context - self.cached
        # Half of the prompts' own pairs are masked; what was cached is seen by all.
        pairs = own * (self.cached + new / 2)
        return Expected(keys=own * self.context / new, pairs=pairs, rows=rows, experts=experts)

    def _rows(self, tokens: int) -> tuple[float, float]:
        """`(rows, experts that receive any)` of the busiest rank."""
        placement = self.placement
        if placement is None:
            return 0.0, 0.0
        local, slots = placement.num_local_experts, placement.num_physical_experts
        shared = placement.num_shared_replicas
        sent = float(tokens * self.ep_size)
        routed = sent * self.config.num_topk * local / (slots - shared) * self.balance
        dispatched = sent * placement.num_dispatched_shared * local / shared if shared else 0.0
        rows = max(routed, dispatched)
        return rows, local * -math.expm1(-rows / local)

    def memory(self) -> dict[str, float]:
        """Bytes that a rank needs, by what for: weights, cache, the static buffers of equations 1 and 2, activations.

        Buffers are those of the paper: one for dispatch and one for combine, sized by a microbatch's tokens at worst.
        """
        config, placement = self.config, self.placement
        params = _placed_params(config, placement, self.quant)
        sparse = [one.mlp.experts for one in (params.moe, params.mtp and params.mtp.layer) if one and _has_experts(one)]
        of_experts = float(sum(num_bytes(one) for one in sparse))
        weights = num_bytes(params) - of_experts + of_experts / self.ep_size
        latent = config.num_cache_layers * config.latent_width * jnp.dtype(_DTYPE).itemsize
        if self.phase == "decode":
            cached = self.batch * (self.context + self.drafts) * latent
        else:  # every rank holds all the prompts' latents
            ranks = self.ep_size if self.attention == "staged" else 1
            cached = self.batch * ranks * (self.context / (self.context - self.cached)) * latent
        buffers = 0.0
        if placement is not None:
            tokens, choices = self.tokens // self.microbatches, config.num_topk + placement.num_dispatched_shared
            wires = ("int8", "bfloat16") if self.quant else (None, None)
            for wire in wires:
                message = message_bytes(config.hidden_size, _DTYPE, wire)  # type: ignore[arg-type]  # wire dtypes
                buffers += buffer_bytes(self.ep_size, tokens, choices, placement.num_local_experts, message)
        if self.phase == "prefill":
            # In prefill rows go by SDMA into buffers of what is expected: the worst case of all would not fit anywhere.
            buffers = 2 * self.expected(self.tokens).rows * config.hidden_size * jnp.dtype(_DTYPE).itemsize
        logits = self.tokens * config.vocab_size * 4 if self.phase == "decode" else 0
        hidden = 8 * self.tokens * config.hidden_size * jnp.dtype(_DTYPE).itemsize
        return {"weights": weights, "cache": cached, "buffers": buffers, "activations": float(hidden + logits)}


def abstract_bytes(config: ModelConfig, quant: Literal["int8"] | None = "int8") -> float:
    """Bytes of a model's weights, experts once."""
    return float(num_bytes(abstract_params(config, _DTYPE, quant=quant, mtp_head=False, mtp_embed=False)))


def _has_experts(layers: LayerParams) -> bool:
    return hasattr(layers.mlp, "experts")


@functools.lru_cache(maxsize=512)
def _counts(layout: Layout) -> list[StageWork]:
    traced, num_params = trace(layout)
    return count(traced, num_params, num_params + 1)


@functools.lru_cache(maxsize=64)
def _placed_params(config: ModelConfig, placement: ExpertPlacement | None, quant: Any) -> Params:
    """Shapes of a model's parameters as `place_params` puts them on an instance."""
    params = abstract_params(config, _DTYPE, quant=quant, mtp_head=False, mtp_embed=False)
    if placement is None:
        return params

    def place(layers: LayerParams) -> LayerParams:
        slots = placement.num_physical_experts
        experts = jax.tree.map(lambda a: Array((a.shape[0], slots, *a.shape[2:]), a.dtype), layers.mlp.experts)
        shared: MlpParams | None = None if placement.num_shared_replicas else layers.mlp.shared
        return dataclasses.replace(layers, mlp=dataclasses.replace(layers.mlp, experts=experts, shared=shared))

    if params.moe is not None:
        params = dataclasses.replace(params, moe=place(params.moe))
    if params.mtp is not None and _has_experts(params.mtp.layer):
        params = dataclasses.replace(params, mtp=dataclasses.replace(params.mtp, layer=place(params.mtp.layer)))
    return params


def trace(layout: Layout) -> tuple[Any, int]:
    """The jaxpr of a step, and how many of its inputs are parameters: then come the placement and the cache."""
    config, ranks, placement = layout.config, layout.ep_size, layout.placement
    params = _placed_params(config, placement, layout.quant)
    mesh = AbstractMesh((ranks,), (EP_AXIS,), axis_types=(AxisType.Auto,))
    dispatch_wire, combine_wire = default_wires(params)
    exchange = FabricExchange(
        axis_name=EP_AXIS,
        num_local_experts=placement.num_local_experts if placement else 0,
        dispatch_dtype=dispatch_wire,
        combine_dtype=combine_wire,
    )
    rank = RankSpec(
        config=config,
        axis_name=EP_AXIS,
        block_size=_BLOCK,
        exchange=exchange,
        num_dispatched_shared=placement.num_dispatched_shared if placement else 0,
        microbatches=layout.microbatches,
    )
    spec: Any = StepSpec(rank, mesh)  # type: ignore[arg-type]  # an abstract mesh serves for tracing
    maps = Array(placement.expert_to_slot.shape if placement else (0, ranks, 0), jnp.int32)
    cache = Array((ranks, config.num_cache_layers, 2 * _TABLE_BLOCKS * _BLOCK, config.latent_width), _DTYPE)
    if layout.phase == "decode":
        traced = decode.trace(params, maps, cache, _decode_state(layout), spec=spec, num_steps=1)
    else:
        traced = prefill.trace(params, maps, cache, _prefill_batch(layout), spec=spec)
    return traced.jaxpr.jaxpr, len(jax.tree.leaves(params))


def _decode_state(layout: Layout) -> DecodeState:
    size, width = layout.ep_size * layout.batch, layout.drafts + 1
    batch = DecodeBatch(
        *(Array((size,), jnp.int32) for _ in range(3)), block_table=Array((size, _TABLE_BLOCKS), jnp.int32)
    )
    settled = None
    if layout.drafts:
        settled = Settled(
            hidden=Array((size, width, layout.config.hidden_size), _DTYPE),
            places=Array((size,), jnp.int32),
            next_token_ids=Array((size, width), jnp.int32),
            counts=Array((size,), jnp.int32),
        )
    return DecodeState(batch, settled=settled)


def _prefill_batch(layout: Layout) -> PrefillBatch:
    tokens, sequences = layout.ep_size * layout.batch, layout.ep_size
    return PrefillBatch(
        *(Array((tokens,), jnp.int32) for _ in range(4)),
        query_start=Array((sequences + 1,), jnp.int32),
        block_table=Array((sequences, _TABLE_BLOCKS), jnp.int32),
    )
