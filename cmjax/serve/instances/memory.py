"""The memory that an instance asks for, and whether its devices have it."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import AbstractMesh, Mesh
from numpy.typing import DTypeLike

from cmjax.errors import UserError
from cmjax.mesh import Instance, Memory, stored_width
from cmjax.model import ModelConfig
from cmjax.moe import ExpertPlacement, WireDtype, buffer_bytes, message_bytes
from cmjax.serve.instances.forms import check_length
from cmjax.serve.settings import EngineSettings

GIB = 2**30


def cache_bytes(config: ModelConfig, num_tokens: int, dtype: DTypeLike, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of one rank's latent cache for so many tokens."""
    width = stored_width(config.latent_width, mesh)
    return config.num_cache_layers * num_tokens * width * np.dtype(dtype).itemsize


def exchange_bytes(
    placement: ExpertPlacement,
    config: ModelConfig,
    local_batch: int,
    dtype: DTypeLike,
    wires: tuple[WireDtype | None, WireDtype | None] = (None, None),
) -> int:
    """Bytes of one rank's exchange buffers at their worst (paper equations 1 and 2): what dispatch brings, what the
    experts make of it, and that once more where it travels in another format.

    Args:
        local_batch: tokens of a rank in one step, of both microbatches where there are two.
        wires: of dispatch and combine; None: as the activations are.
    """
    num_choices = config.num_topk + placement.num_dispatched_shared
    hidden, dtype = config.hidden_size, np.dtype(dtype)
    there, made, back = (message_bytes(hidden, dtype, wire) for wire in (wires[0], None, wires[1]))
    a_row = there + made + (back if back != made else 0)
    return buffer_bytes(placement.ep_size, local_batch, num_choices, placement.num_local_experts, a_row)


def check_caches_fit(
    config: ModelConfig, settings: EngineSettings, sizes: Sequence[tuple[Instance, int]], dtype: DTypeLike
) -> None:
    """Refuse caches that cannot fit, before anything is allocated; `sizes`: instances and the blocks of a rank."""
    check_length(config, settings)
    each = [cache_bytes(config, blocks * settings.block_size, dtype, one.mesh) for one, blocks in sizes]
    memory = Memory.of([device for one, _ in sizes for device in one.devices])
    needed = max(each)
    if memory.is_shared:
        needed = sum(one.ep_size * size for (one, _), size in zip(sizes, each, strict=True))
    if needed > memory.free_bytes:
        of_rank = "" if memory.is_shared else " of a rank"
        raise UserError(
            f"the KV caches{of_rank} need {needed / GIB:.1f} GiB, {memory.free_bytes / GIB:.1f} GiB are free: lower "
            f"max_model_len ({settings.max_model_len}), max_num_seqs_per_rank ({settings.max_num_seqs_per_rank}) "
            f"or max_num_batched_tokens ({settings.max_num_batched_tokens})"
        )


def check_exchange_fits(
    config: ModelConfig,
    placement: ExpertPlacement | None,
    settings: EngineSettings,
    setting: str,
    dtype: DTypeLike,
    memory: Memory,
) -> None:
    """Refuse a step whose exchange buffers cannot be had at their worst, when every token picks the same experts.

    On virtual devices untouched pages cost nothing, so it is one rank's buffers that must not exceed the memory there
    is, not everybody's.

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
    needed = exchange_bytes(placement, config, local_batch, dtype)
    if needed > memory.free_bytes:
        raise UserError(
            f"the exchange buffers of a rank with {local_batch} tokens need {needed / GIB:.1f} GiB at worst, "
            f"{memory.free_bytes / GIB:.1f} GiB are free: lower {setting} ({value})"
        )
    # The choices are sorted by one 32-bit key.
    most = (2**31 - 1) // ((config.num_topk + placement.num_dispatched_shared) * (placement.num_physical_experts + 1))
    if local_batch > most:
        raise UserError(
            f"{local_batch} tokens a rank are more than a step can sort ({most}): lower {setting} ({value})"
        )
