"""What is priced: a model's step on an instance, and the counts of its trace.

The steps are `cmjax.serve.prefill` and `cmjax.serve.decode` themselves, traced with shapes in place of arrays on a mesh
of no devices: any EP size, in less than a second.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from cmjax.errors import UserError
from cmjax.mesh import EP_AXIS
from cmjax.model import ModelConfig, abstract_params, head_shards, num_bytes, plan_placement, token_bytes
from cmjax.moe import ExpertPlacement, buffer_bytes, message_bytes
from cmjax.perf.count import count
from cmjax.perf.work import ATTENTION_STREAM, Expected, StageWork, blend_stages
from cmjax.serve import EngineSettings
from cmjax.serve.instances import AbstractInstance

Phase = Literal["prefill", "decode"]
_BLOCK = 128
_DTYPE = jnp.bfloat16
# Blocks of a traced cache and of its tables: how many there are changes no count, as long as there is a whole chunk.
_TABLE_BLOCKS = 16
# Far above any machine, so that nonsense is refused before anything is sized by it.
MOST_RANKS = 8_192  # a larger placement takes minutes; no supernode has more devices
MOST_BATCH = 65_536
_MOST_TOKENS = 2**24  # of a rank and a step of prefill


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
        most_batch = MOST_BATCH if self.phase == "decode" else _MOST_TOKENS
        for name, most in (("ep_size", MOST_RANKS), ("batch", most_batch)):
            if getattr(self, name) > most:
                raise UserError(f"{name} {getattr(self, name)} is over {most:,}")
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
        return _placement(self.config, self.ep_size, self.num_redundant_experts, self.num_shared_replicas)

    def instance(self) -> AbstractInstance:
        """The engine's own, as shapes on a mesh of no devices; its settings are those that the engine would have."""
        tokens = self.ep_size * self.batch
        settings = EngineSettings(
            max_model_len=min(_TABLE_BLOCKS * _BLOCK, self.config.max_position_embeddings),
            block_size=_BLOCK,
            max_num_seqs_per_rank=self.batch if self.phase == "decode" else 2,
            max_num_batched_tokens=tokens if self.phase == "prefill" else _BLOCK,
            num_speculative_tokens=self.drafts,
            microbatches=self.microbatches,
            num_redundant_experts=self.num_redundant_experts,
            num_shared_replicas=self.num_shared_replicas,
            steps_per_call=1,
        )
        mesh = AbstractMesh((self.ep_size,), (EP_AXIS,), axis_types=(AxisType.Auto,))
        return AbstractInstance(self.phase, self.config, settings, mesh, _DTYPE, self.quant)

    def counts(self) -> list[StageWork]:
        """The stages of the step; those of equal shapes are traced once."""
        shape = self._form(self.batch)
        stages = _counts(shape)
        if self.attention == "staged" or self.phase == "decode":
            return stages
        alone = dataclasses.replace(shape, ep_size=1, num_redundant_experts=None, num_shared_replicas=None)
        own = {(one.section, one.stage, one.lane): one for one in _counts(alone)}
        return [own[one.section, one.stage, one.lane] if one.stage in ATTENTION_STREAM else one for one in stages]

    def _form(self, batch: int) -> "Layout":
        """What decides the shapes of a step, and of the parameters."""
        return dataclasses.replace(self, batch=batch, context=1.0, cached=0.0, balance=1.0, attention="staged")

    def counts_by_batch(self, low: int, high: int) -> list[StageWork]:
        """As `counts`, between those of two batches: for searches over many."""
        at_low, at_high = (dataclasses.replace(self, batch=batch).counts() for batch in (low, high))
        return blend_stages(at_low, at_high, (self.batch - low) / (high - low))

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
        instance = _instance(self._form(2))
        weights = float(instance.local_bytes(instance.params))
        latent = latent_bytes(config)
        if self.phase == "decode":
            cached = self.batch * (self.context + self.drafts) * latent
        else:  # every rank holds all the prompts' latents
            ranks = self.ep_size if self.attention == "staged" else 1
            cached = self.batch * ranks * (self.context / (self.context - self.cached)) * latent
        buffers = 0.0
        if placement is not None:
            tokens, choices = self.tokens // self.microbatches, config.num_topk + placement.num_dispatched_shared
            for wire in instance.wires:
                message = message_bytes(config.hidden_size, jnp.dtype(_DTYPE), wire)
                buffers += buffer_bytes(self.ep_size, tokens, choices, placement.num_local_experts, message)
        if self.phase == "prefill":
            # In prefill rows go by SDMA into buffers of what is expected: the worst case of all would not fit anywhere.
            buffers = 2 * self.expected(self.tokens).rows * config.hidden_size * jnp.dtype(_DTYPE).itemsize
        logits = self.tokens * config.vocab_size * 4 if self.phase == "decode" else 0
        hidden = 8 * self.tokens * config.hidden_size * jnp.dtype(_DTYPE).itemsize
        return {"weights": weights, "cache": cached, "buffers": buffers, "activations": float(hidden + logits)}


def latent_bytes(config: ModelConfig) -> int:
    """Bytes that the cache has of a token."""
    return token_bytes(config, _DTYPE)


def abstract_bytes(config: ModelConfig, quant: Literal["int8"] | None = "int8") -> float:
    """Bytes of a model's weights, experts once."""
    return float(num_bytes(abstract_params(config, _DTYPE, quant=quant, mtp_head=False, mtp_embed=False)))


@functools.lru_cache(maxsize=512)
def _placement(
    config: ModelConfig, ep_size: int, num_redundant: int | None, num_shared: int | None
) -> ExpertPlacement | None:
    return plan_placement(config, ep_size, num_redundant_experts=num_redundant, num_shared_replicas=num_shared)


@functools.lru_cache(maxsize=512)
def _counts(layout: Layout) -> list[StageWork]:
    instance = layout.instance()
    num_params = len(jax.tree.leaves(instance.params))
    try:
        traced = instance.trace().jaxpr.jaxpr
    except OverflowError as error:  # the program's indices are of 32 bits
        raise UserError(
            f"{layout.phase} at EP{layout.ep_size}, batch {layout.batch} is too large to trace: it has more rows or "
            "tokens in its cache than 32 bits can count"
        ) from error
    # After the parameters come the placement and the cache.
    return count(traced, num_params, num_params + 1)


@functools.lru_cache(maxsize=64)
def _instance(layout: Layout) -> AbstractInstance:
    return layout.instance()
