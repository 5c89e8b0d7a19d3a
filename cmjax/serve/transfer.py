"""The KV hand-off from a prefill instance to the ranks of a decode instance (paper section 4.3.3).

With MLA's single latent head every prefill rank holds the same latents, so the source is free to choose; a fixed map
spreads the decode ranks evenly over the prefill ranks. The copies go on the books of the RDMA plane, apart from the
exchanges of decode.
"""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cmjax.mesh import EP_AXIS, fabric
from cmjax.serve.block_pool import slot_mapping
from cmjax.serve.decode_instance import DecodeInstance
from cmjax.serve.instance import bucket
from cmjax.serve.prefill_instance import Prefilled, PrefillInstance
from cmjax.serve.steps import StepSpec

_PLANE = "rdma"
_RECORD = "kv_handoff"


def prefill_tp_rank(decode_dp_rank: int, prefill_tp_size: int, decode_dp_size: int) -> int:
    """The prefill rank that feeds a decode rank.

    The paper's group mapping where the sizes divide (prefill TP 32, decode DP 320: each prefill rank feeds ten decode
    ranks), and its even extension where they do not.
    """
    return decode_dp_rank * prefill_tp_size // decode_dp_size


@functools.partial(jax.jit, static_argnames=("spec",))
def _gather(
    cache: jax.Array, last_hidden: jax.Array, slots: jax.Array, rows: jax.Array, *, spec: StepSpec
) -> tuple[jax.Array, jax.Array]:
    """On every prefill rank: the latents in the slots `[R, tokens]`, and the hidden states in the rows `[R, requests]`.

    Returns `([R, layers, tokens, width], [R * requests, hidden])`, one part a rank.
    """

    def rank(cache: jax.Array, last_hidden: jax.Array, slots: jax.Array, rows: jax.Array) -> tuple:
        return jnp.take(cache, slots[0], axis=2, mode="clip"), jnp.take(last_hidden, rows[0], axis=0, mode="clip")

    by_rank = PartitionSpec(EP_AXIS)
    in_specs = (by_rank, PartitionSpec(), by_rank, by_rank)
    return spec.on_ranks(rank, in_specs, by_rank)(cache, last_hidden, slots, rows)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("cache", "kept"))
def _insert(
    cache: jax.Array,
    kept: jax.Array | None,
    latents: jax.Array,
    slots: jax.Array,
    hidden: jax.Array,
    places: jax.Array,
    *,
    spec: StepSpec,
) -> tuple[jax.Array, jax.Array | None]:
    """On every decode rank: latents into the slots `[R, tokens]`, hidden states into the places `[R, requests]`, each
    the first of its place."""

    def rank(cache: jax.Array, kept: jax.Array | None, latents: jax.Array, slots: jax.Array, *rest: jax.Array) -> tuple:
        hidden, places = rest
        index = jnp.where(slots[0] < 0, cache.shape[2], slots[0])
        cache = cache.at[0, :, index].set(latents[0].transpose(1, 0, 2), mode="drop")
        if kept is not None:
            index = jnp.where(places[0] < 0, kept.shape[0], places[0])
            kept = kept.at[index, 0].set(hidden, mode="drop")
        return cache, kept

    by_rank = PartitionSpec(EP_AXIS)
    return spec.on_ranks(rank, by_rank, by_rank)(cache, kept, latents, slots, hidden, places)


@dataclasses.dataclass
class _Parcel:
    """What one decode rank is sent: slots and rows on the prefill side, slots and places on its own."""

    decode_rank: int
    from_slots: np.ndarray
    to_slots: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    num_tokens: int = 0
    num_requests: int = 0

    @classmethod
    def pack(cls, decode_rank: int, group: Sequence[Prefilled], sizes: tuple[int, int, int]) -> "_Parcel":
        """Put the group's prompts side by side; `sizes` is (tokens, requests, block size), padded with -1."""
        num_tokens, num_requests, block_size = sizes
        slots, rows = np.full(num_tokens, -1, np.int32), np.full(num_requests, -1, np.int32)
        parcel = cls(decode_rank, slots, slots.copy(), rows, rows.copy())
        for index, one in enumerate(group):
            positions = np.arange(len(one.request.prompt_ids), dtype=np.int32)
            part = slice(parcel.num_tokens, parcel.num_tokens + len(positions))
            parcel.from_slots[part] = slot_mapping(one.blocks, positions, block_size)
            parcel.to_slots[part] = slot_mapping(one.request.decode_blocks, positions, block_size)
            parcel.rows[index], parcel.places[index] = one.row, one.request.decode_place
            parcel.num_tokens = part.stop
            parcel.num_requests = index + 1
        return parcel


def hand_off(
    source: PrefillInstance, target: DecodeInstance, prefilled: Sequence[Prefilled], *, min_tokens: int = 1
) -> None:
    """Copy the prompts' latents (the MTP layer's included) and last hidden states to their reserved decode places.

    Args:
        source: has just prefilled them, in one step.
        target: where their places and blocks are reserved.
        prefilled: the prompts, perhaps none.
        min_tokens: the copy is shaped for at least that many tokens a rank: few shapes, few compilations.
    """
    groups: dict[int, list[Prefilled]] = defaultdict(list)
    for one in prefilled:
        groups[one.request.decode_rank].append(one)
    block_size, places = source.settings.block_size, target.settings.max_num_seqs_per_rank
    most = max((sum(len(one.request.prompt_ids) for one in group) for group in groups.values()), default=0)
    sizes = (bucket(max(most, min_tokens), block_size), places, block_size)
    parcels = {rank: _Parcel.pack(rank, group, sizes) for rank, group in groups.items()}
    received = _send(source, target, parcels, prefilled[0].last_hidden if prefilled else None, sizes)
    nothing = _Parcel.pack(-1, [], sizes)
    arrived = [parcels.get(rank, nothing) for rank in range(target.instance.ep_size)]
    target.cache, target.hidden = _insert(
        target.cache,
        target.hidden,
        received[0],
        np.stack([parcel.to_slots for parcel in arrived]),
        received[1],
        np.stack([parcel.places for parcel in arrived]),
        spec=target.spec,
    )


def _send(
    source: PrefillInstance,
    target: DecodeInstance,
    parcels: dict[int, _Parcel],
    last_hidden: jax.Array | None,
    sizes: tuple[int, int, int],
) -> tuple[jax.Array, jax.Array]:
    """Move the parcels' arrays to their decode devices: latents and hidden states, a part a rank (zeros for none)."""
    config, dtype = source.model.config, source.model.dtype
    prefill_size, decode_size = source.instance.ep_size, target.instance.ep_size
    devices = target.instance.devices
    latents = [np.zeros((1, config.num_cache_layers, sizes[0], config.latent_width), dtype)] * decode_size
    hidden = [np.zeros((sizes[1], config.hidden_size), dtype)] * decode_size
    by_peer: dict[int, list[_Parcel]] = defaultdict(list)
    for rank, parcel in parcels.items():
        by_peer[prefill_tp_rank(rank, prefill_size, decode_size)].append(parcel)
    nothing = _Parcel.pack(-1, [], sizes)
    # Each prefill rank sends to one of its decode ranks at a time.
    for turn in itertools.zip_longest(*by_peer.values()):
        sending = dict(zip(by_peer, turn, strict=True))
        now = [sending.get(peer) or nothing for peer in range(prefill_size)]
        slots, rows = np.stack([p.from_slots for p in now]), np.stack([p.rows for p in now])
        taken = _gather(source.cache, last_hidden, slots, rows, spec=source.spec)
        parts = [{shard.device: shard.data for shard in array.addressable_shards} for array in taken]
        for peer, parcel in sending.items():
            if parcel is not None:
                device = source.instance.devices[peer]
                latents[parcel.decode_rank] = parts[0][device]
                hidden[parcel.decode_rank] = parts[1][device]
                _record(device, devices[parcel.decode_rank], parcel, target)

    def on_ranks(parts: list) -> jax.Array:
        moved = jax.device_put(parts, list(devices))
        shape = (decode_size * parts[0].shape[0], *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, target.spec.by_rank(), moved)

    return on_ranks(latents), on_ranks(hidden)


def _record(source: jax.Device, destination: jax.Device, parcel: _Parcel, target: DecodeInstance) -> None:
    config, itemsize = target.model.config, target.model.dtype.itemsize
    num_bytes = config.num_cache_layers * parcel.num_tokens * config.latent_width * itemsize
    if target.hidden is not None:
        num_bytes += parcel.num_requests * config.hidden_size * itemsize
    fabric.record(_PLANE, _RECORD, source.id, destination.id, num_bytes)
