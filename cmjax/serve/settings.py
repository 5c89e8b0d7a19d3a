"""The engine's settings, and the memory they ask for."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import psutil

from cmjax.errors import UserError
from cmjax.model import ModelConfig
from cmjax.moe import Exchange, ExpertPlacement, FabricExchange, WireDtype, buffer_bytes, message_bytes


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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < (field.name != "num_speculative_tokens"):
                raise UserError(f"{field.name} {value} is {'negative' if value < 0 else 'not positive'}")
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
        return -(-self.max_model_len // self.block_size)


def cache_bytes(config: ModelConfig, num_blocks: int, block_size: int, dtype: Any) -> int:
    """Bytes of one rank's latent cache."""
    return config.num_cache_layers * num_blocks * block_size * config.latent_width * np.dtype(dtype).itemsize


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
