"""The engine's settings, and the memory they ask for."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import psutil

from cmjax.errors import UserError
from cmjax.model import ModelConfig
from cmjax.moe import Exchange, ExpertPlacement, FabricExchange, WireDtype, buffer_bytes, message_bytes
from cmjax.schedule import blocks_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Sizes and formats of an engine.

    Attributes:
        max_model_len: most tokens of one request, prompt and output together.
        max_num_seqs_per_rank: requests that one decode rank runs together.
        block_size: tokens a cache block.
        max_num_batched_tokens: tokens of one prefill step over all the ranks of an instance; longer prompts are
            prefilled in several steps.
        steps_per_call: decode steps in one call of the compiled program.
        num_speculative_tokens: tokens that the model's MTP module guesses ahead in each step, and the step verifies.
        microbatches: 1, or 2 that take turns in a step, so that exchanges hide behind work; "auto" tries both in the
            first steps and stays with the faster.
        dispatch_dtype: what a row is on its way to the experts: a float dtype, or "int8"; None: "int8" where the model
            is quantized, else as it is.
        combine_dtype: what a row is on its way back: a float dtype; None: bfloat16 where the model is quantized, else
            as it is.
        num_redundant_experts, num_shared_replicas: of the decode instance; None: see `ExpertPlacement.plan`.
        exchange: replaces dispatch and combine (`cmjax.moe.Exchange`).
        num_kv_blocks: cache blocks of a decode rank; None: for `max_num_seqs_per_rank` requests of `max_model_len`.
            With fewer, sequences get theirs as they grow, and the least urgent make room where there are none left.
        handoff_timeout_s: seconds after which a hand-off that has not arrived is sent again.
        tpot_slo_ms: target for the time per output token, which decides how many sequences of a rank run together;
            None: all.
    """

    max_model_len: int = 1024
    max_num_seqs_per_rank: int = 8
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    steps_per_call: int = 8
    num_speculative_tokens: int = 0
    microbatches: int | Literal["auto"] = 1
    dispatch_dtype: WireDtype | None = None
    combine_dtype: WireDtype | None = None
    num_redundant_experts: int | None = None
    num_shared_replicas: int | None = None
    exchange: Callable[..., Exchange] = FabricExchange
    num_kv_blocks: int | None = None
    handoff_timeout_s: float = 60.0
    tpot_slo_ms: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < (field.name != "num_speculative_tokens"):
                raise UserError(f"{field.name} {value} is {'negative' if value < 0 else 'not positive'}")
        for name in ("num_kv_blocks", "handoff_timeout_s", "tpot_slo_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} {value} is not positive")
        if self.microbatches not in (1, 2, "auto"):
            raise UserError(f"microbatches {self.microbatches} are not supported; supported: 1, 2, auto")
        if self.microbatches == 2 and self.max_num_seqs_per_rank % 2:
            raise UserError(
                f"microbatches {self.microbatches} do not divide max_num_seqs_per_rank {self.max_num_seqs_per_rank}"
            )
        if self.num_speculative_tokens >= self.max_model_len:
            raise UserError(
                f"num_speculative_tokens {self.num_speculative_tokens} leaves no room in max_model_len "
                f"{self.max_model_len}: a step puts the newest token and its drafts into the cache"
            )

    @property
    def max_blocks(self) -> int:
        """Width of a block table: the blocks of the longest request."""
        return blocks_for(self.max_model_len, self.block_size)

    @property
    def num_decode_blocks(self) -> int:
        """Blocks of a decode rank."""
        return self.num_kv_blocks or self.max_num_seqs_per_rank * self.max_blocks

    @property
    def num_prefill_blocks(self) -> int:
        """Blocks of a prefill instance: room for the longest prompt, and for two steps of short ones."""
        return self.max_blocks + 2 * blocks_for(self.max_num_batched_tokens, self.block_size)


def cache_bytes(config: ModelConfig, num_blocks: int, block_size: int, dtype: Any) -> int:
    """Bytes of one rank's latent cache."""
    return config.num_cache_layers * num_blocks * block_size * config.latent_width * np.dtype(dtype).itemsize


def check_caches_fit(
    config: ModelConfig, settings: EngineSettings, sizes: Sequence[tuple[int, int]], dtype: Any
) -> None:
    """Refuse caches that cannot fit, before anything is allocated; `sizes`: (ranks, blocks a rank) of each instance."""
    longest = config.max_position_embeddings
    if settings.max_model_len > longest:
        raise UserError(f"max_model_len {settings.max_model_len} exceeds the model's max_position_embeddings {longest}")
    needed = sum(ranks * cache_bytes(config, blocks, settings.block_size, dtype) for ranks, blocks in sizes)
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"the KV caches need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free: lower "
            f"max_model_len ({settings.max_model_len}), max_num_seqs_per_rank ({settings.max_num_seqs_per_rank}) "
            f"or max_num_batched_tokens ({settings.max_num_batched_tokens})"
        )


def check_exchange_fits(
    config: ModelConfig, placement: ExpertPlacement | None, settings: EngineSettings, setting: str, dtype: Any
) -> None:
    """Refuse a step whose exchange buffers cannot be had at their worst, when every token picks the same experts.

    Untouched pages cost nothing, so it is one rank's buffers that must not exceed the memory there is, not everybody's.

    Args:
        placement: None for a model without experts, which needs no buffers.
        setting: what decides the tokens of a step, "max_num_seqs_per_rank" or (over all ranks)
            "max_num_batched_tokens".

    Raises:
        UserError: naming the setting.
    """
    if placement is None:
        return
    value = getattr(settings, setting)
    if setting.endswith("per_rank"):
        local_batch = value * (settings.num_speculative_tokens + 1)
    else:
        local_batch = -(-value // placement.ep_size)
    num_choices = config.num_topk + placement.num_dispatched_shared
    message = message_bytes(config.hidden_size, dtype, None)
    # What arrives and what the experts make of it have one size (equation 1).
    needed = 2 * buffer_bytes(placement.ep_size, local_batch, num_choices, placement.num_local_experts, message)
    limit = psutil.virtual_memory().available
    if needed > limit:
        raise UserError(
            f"the exchange buffers of a rank with {local_batch} tokens need {needed / 2**30:.1f} GiB at worst, "
            f"{limit / 2**30:.1f} GiB are free: lower {setting} ({value})"
        )
    # The choices are sorted by one 32-bit key.
    most = (2**31 - 1) // (num_choices * (placement.num_physical_experts + 1))
    if local_batch > most:
        raise UserError(
            f"{local_batch} tokens a rank are more than a step can sort ({most}): lower {setting} ({value})"
        )
