"""The KV hand-off from a prefill instance to the ranks of a decode instance (paper section 4.3.3).

With MLA's single latent head every prefill rank holds the same latents, so the source is free to choose; a fixed map
spreads the decode ranks evenly over the prefill ranks. The copies go on the books of the RDMA plane, apart from the
exchanges of decode.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cmjax.mesh import EP_AXIS, fabric
from cmjax.serve.block_pool import slot_mapping
from cmjax.serve.instance import DecodeInstance, Prefilled, PrefillInstance, bucket
from cmjax.serve.steps import StepSpec

_PLANE = "rdma"
_RECORD = "kv_handoff"


def prefill_tp_rank(decode_dp_rank: int, prefill_tp_size: int, decode_dp_size: int) -> int:
    """The prefill rank that feeds a decode rank.

    The paper's group mapping where the sizes divide (prefill TP 32, decode DP 320: each prefill rank feeds ten decode
    ranks), and its even extension where they do not.
    """
    return decode_dp_rank * prefill_tp_size // decode_dp_size


@jax.jit
def _gather(cache: jax.Array, last_hidden: jax.Array, slots: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """On one prefill device: `(latents [1, layers, tokens, width], hidden [requests, hidden])`."""
    return jnp.take(cache, slots, axis=2, mode="clip"), jnp.take(last_hidden, rows, axis=0, mode="clip")


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("cache", "last_hidden"))
def _insert(
    cache: jax.Array,
    last_hidden: jax.Array | None,
    latents: jax.Array,
    slots: jax.Array,
    hidden: jax.Array,
    places: jax.Array,
    *,
    spec: StepSpec,
) -> tuple[jax.Array, jax.Array | None]:
    """On every decode rank: latents into the slots `[R, tokens]`, hidden states into the places `[R, requests]`."""

    def rank(cache: jax.Array, kept: jax.Array | None, latents: jax.Array, slots: jax.Array, *rest: jax.Array) -> tuple:
        hidden, places = rest
        index = jnp.where(slots[0] < 0, cache.shape[2], slots[0])
        cache = cache.at[0, :, index].set(latents[0].transpose(1, 0, 2), mode="drop")
        if kept is not None:
            index = jnp.where(places[0] < 0, kept.shape[0], places[0])
            kept = kept.at[index].set(hidden, mode="drop")
        return cache, kept

    by_rank = PartitionSpec(EP_AXIS)
    return spec.on_ranks(rank, by_rank, by_rank)(cache, last_hidden, latents, slots, hidden, places)


def _shards(array: jax.Array) -> dict[jax.Device, jax.Array]:
    return {shard.device: shard.data for shard in array.addressable_shards}


def hand_off(source: PrefillInstance, target: DecodeInstance, prefilled: Sequence[Prefilled]) -> None:
    """Copy the prompts' latents (the MTP layer's included) and last hidden states to their reserved decode places."""
    by_rank: dict[int, list[Prefilled]] = defaultdict(list)
    for one in prefilled:
        by_rank[one.request.decode_rank].append(one)
    if not by_rank:
        return
    block_size, places = source.settings.block_size, target.settings.max_num_seqs_per_rank
    most = max(sum(len(one.request.prompt_ids) for one in group) for group in by_rank.values())
    num_tokens = bucket(most, block_size)
    ranks = target.instance.ep_size
    slots = np.full((ranks, num_tokens), -1, np.int32)
    place = np.full((ranks, places), -1, np.int32)
    caches, config = _shards(source.cache), source.model.config
    empty_latents = np.zeros((1, config.num_cache_layers, num_tokens, config.latent_width), source.model.dtype)
    empty_hidden = np.zeros((places, config.hidden_size), source.model.dtype)
    latents, hidden = [], []
    for rank, device in enumerate(target.instance.devices):
        group = by_rank.get(rank)
        if group is None:
            sent = (empty_latents, empty_hidden)
        else:
            peer = source.instance.devices[prefill_tp_rank(rank, source.instance.ep_size, ranks)]
            taken, rows = np.zeros(num_tokens, np.int32), np.zeros(places, np.int32)
            begin = 0
            for index, one in enumerate(group):
                positions = np.arange(len(one.request.prompt_ids), dtype=np.int32)
                end = begin + len(positions)
                taken[begin:end] = slot_mapping(one.blocks, positions, block_size)
                slots[rank, begin:end] = slot_mapping(one.request.decode_blocks, positions, block_size)
                rows[index], place[rank, index] = one.row, one.request.decode_place
                begin = end
            sent = _gather(caches[peer], _shards(group[0].last_hidden)[peer], taken, rows)
            _record(peer, device, begin, len(group), target)
        latents.append(jax.device_put(sent[0], device))
        hidden.append(jax.device_put(sent[1], device))

    def on_ranks(parts: list[jax.Array]) -> jax.Array:
        shape = (ranks * parts[0].shape[0], *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, target.spec.by_rank(), parts)

    target.cache, target.last_hidden = _insert(
        target.cache,
        target.last_hidden,
        on_ranks(latents),
        slots,
        on_ranks(hidden),
        place,
        spec=target.spec,
    )


def _record(source: jax.Device, target: jax.Device, num_tokens: int, num_requests: int, instance: DecodeInstance) -> None:
    config, itemsize = instance.model.config, instance.model.dtype.itemsize
    num_bytes = config.num_cache_layers * num_tokens * config.latent_width * itemsize
    if instance.last_hidden is not None:
        num_bytes += num_requests * config.hidden_size * itemsize
    fabric.record(_PLANE, _RECORD, source.id, target.id, num_bytes)
