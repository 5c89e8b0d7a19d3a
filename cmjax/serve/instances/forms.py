"""The static side of an instance's steps, whether its devices are there or not: what is compiled in, and the sizes."""

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from cmjax.errors import UserError
from cmjax.mesh import EP_AXIS
from cmjax.model import ModelConfig, Params, PrefillBatch, RankSpec, default_wires
from cmjax.moe import ExpertPlacement, SplitExchange, WireDtype
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps import StepSpec
from cmjax.serve.steps.shapes import bucket, round_up

# A server's step comes in the full budget, in a quarter of it, a quarter of that, and so on, down to this many tokens.
LEAST_STEP_TOKENS = 128
# A step has room for its budget in prompts of this length; shorter ones leave some of it unused.
LEAST_PROMPT_TOKENS = 16


def wires(params: Params, settings: EngineSettings) -> tuple[WireDtype | None, WireDtype | None]:
    """How rows travel to the experts and back: what the settings say, else what suits the model (abstract or not)."""
    dispatch_dtype, combine_dtype = default_wires(params)
    return settings.dispatch_dtype or dispatch_dtype, settings.combine_dtype or combine_dtype


def step_spec(
    config: ModelConfig,
    params: Params,
    placement: ExpertPlacement | None,
    settings: EngineSettings,
    mesh: Mesh | AbstractMesh,
) -> StepSpec:
    """What is compiled into the steps of an instance.

    Args:
        params: the model's, abstract or not.
        placement: None for a model without experts.
        mesh: of the instance.

    Raises:
        UserError: the exchange cannot be split in two, where microbatches need it.
    """
    dispatch_dtype, combine_dtype = wires(params, settings)
    exchange = settings.exchange(
        axis_name=EP_AXIS,
        num_local_experts=placement.num_local_experts if placement else 1,
        dispatch_dtype=dispatch_dtype,
        combine_dtype=combine_dtype,
    )
    if settings.microbatches != 1 and not isinstance(exchange, SplitExchange):
        raise UserError(f"{type(exchange).__name__} has no dispatch_start, combine_start: microbatches must be 1")
    rank = RankSpec(
        config=config,
        axis_name=EP_AXIS,
        block_size=settings.block_size,
        exchange=exchange,
        microbatches=2 if settings.microbatches == 2 else 1,
    )
    return StepSpec(rank, mesh)


def check_length(config: ModelConfig, settings: EngineSettings) -> None:
    """Refuse requests that are longer than the model's positions reach."""
    longest = config.max_position_embeddings
    if settings.max_model_len > longest:
        raise UserError(f"max_model_len {settings.max_model_len} exceeds the model's max_position_embeddings {longest}")


def check_drafts(settings: EngineSettings, *, has_module: bool) -> None:
    """Refuse drafts that nobody makes."""
    if settings.num_speculative_tokens and not has_module:
        raise UserError("the model has no MTP module (num_nextn_predict_layers): num_speculative_tokens must be 0")


def prefill_places(settings: EngineSettings, ep_size: int) -> int:
    """Prompts that can share a prefill step."""
    most = max(settings.max_num_seqs_per_rank, settings.max_num_batched_tokens // LEAST_PROMPT_TOKENS)
    return round_up(most, ep_size)


def prefill_step_tokens(wanted: int, settings: EngineSettings, ep_size: int) -> int:
    """One of a few sizes of a prefill step for `wanted` tokens, within the budget (of at least a token a rank)."""
    parts = ep_size * (1 if settings.microbatches == 1 else 2)
    return min(bucket(wanted, parts), max(settings.max_num_batched_tokens // parts, 1) * parts)


def serving_step_sizes(settings: EngineSettings, ep_size: int) -> list[int]:
    """The sizes of a server's prefill steps, in tokens, ascending."""
    sizes = [prefill_step_tokens(settings.max_num_batched_tokens, settings, ep_size)]
    while sizes[0] >= 4 * LEAST_STEP_TOKENS:
        sizes.insert(0, prefill_step_tokens(sizes[0] // 4, settings, ep_size))
    return list(dict.fromkeys(sizes))


def empty_batch(num_tokens: int, num_places: int, max_blocks: int) -> PrefillBatch[np.ndarray]:
    """A prefill step of padding, as host arrays."""
    return PrefillBatch(
        token_ids=np.zeros(num_tokens, np.int32),
        next_token_ids=np.full(num_tokens, -1, np.int32),
        positions=np.zeros(num_tokens, np.int32),
        slot_mapping=np.full(num_tokens, -1, np.int32),
        query_start=np.zeros(num_places + 1, np.int32),
        block_table=np.full((num_places, max_blocks), -1, np.int32),
    )
