"""The KV hand-off from a prefill instance to the ranks of a decode instance (paper section 4.3.3).

With MLA's single latent head every prefill rank holds the same latents, so the source is free to choose; a fixed map
spreads the decode ranks evenly over the prefill ranks. A prompt travels in rounds of some tokens: the prefill side
reads and sends them one after another, and the decode side writes what has arrived between two of its calls. The copies
go on the books of the RDMA plane, apart from the exchanges of decode.
"""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cmjax.mesh import EP_AXIS, fabric
from cmjax.serve.block_pool import slot_mapping
from cmjax.serve.decode_instance import DecodeInstance
from cmjax.serve.instance import bucket
from cmjax.serve.prefill_instance import Prefilled, PrefillInstance
from cmjax.serve.request import Request
from cmjax.serve.steps import StepSpec

# A rank's share of a round: whole short prompts, and no more of a long one than decode can take between two calls.
MAX_ROUND_TOKENS = 256
_EVERYWHERE = PartitionSpec()
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


@dataclasses.dataclass(frozen=True)
class Parcel:
    """Tokens `[start, stop)` of a prefilled prompt, on their way to the place reserved for it.

    Attributes:
        attempt, decode_rank: what they were when it was sent; a request that has moved on since takes no delivery.
    """

    prefilled: Prefilled
    start: int
    stop: int
    attempt: int
    decode_rank: int

    @property
    def num_tokens(self) -> int:
        """Latents of each layer."""
        return self.stop - self.start

    @property
    def is_last(self) -> bool:
        """Whether the prompt is whole with it."""
        return self.stop == self.prefilled.request.num_cached

    @property
    def is_current(self) -> bool:
        """Whether its request still waits for it."""
        request = self.prefilled.request
        return (request.num_attempts, request.decode_rank) == (self.attempt, self.decode_rank)


@dataclasses.dataclass(frozen=True)
class Handoff:
    """One round of a hand-off: for every decode rank at most so many tokens.

    Attributes:
        parcels: by decode rank, side by side.
        latents: `[decode ranks, layers, tokens, width]`, on the decode devices, perhaps not yet there.
        hidden: `[decode ranks * places, hidden]`, the last hidden states of the prompts that end.
    """

    parcels: dict[int, list[Parcel]]
    latents: jax.Array
    hidden: jax.Array

    @property
    def is_ready(self) -> bool:
        """Whether it has arrived."""
        return all(array.is_ready() for array in (self.latents, self.hidden))  # type: ignore[attr-defined]  # the stub lacks it


def round_tokens(target: DecodeInstance) -> int:
    """Tokens that a decode rank receives in one round."""
    return min(MAX_ROUND_TOKENS, bucket(target.settings.max_model_len, target.settings.block_size))


def hand_off(source: PrefillInstance, target: DecodeInstance, prefilled: Sequence[Prefilled]) -> list[Request]:
    """Copy the prompts' latents (the MTP layer's included) and last hidden states to their reserved decode places, and
    wait for them: `send`, then `insert` of each round. Returns the requests that have arrived."""
    return [request for one in send(source, target, prefilled) for request in insert(target, one)]


def warm_up_source(source: PrefillInstance, target: DecodeInstance) -> None:
    """Compile what the prefill side of a hand-off runs, by reading nothing."""
    _gather_round(source, target, {}, None)


def warm_up_target(target: DecodeInstance) -> None:
    """Compile what the decode side of a hand-off runs, by writing nothing."""
    insert(target, _assemble(target, {}, {}))


def send(source: PrefillInstance, target: DecodeInstance, prefilled: Sequence[Prefilled]) -> Iterator[Handoff]:
    """Start copying prompts that one step of `source` has just ended to `target`, round by round.

    Each round is on its way when it is yielded. The latents are read in the order of the source's programs, so that its
    blocks may be used again by its next step.
    """
    for parcels in plan_rounds(prefilled, round_tokens(target)):
        yield _on_their_way(source, target, parcels, prefilled[0].last_hidden)


def plan_rounds(prefilled: Sequence[Prefilled], max_tokens: int) -> list[dict[int, list[Parcel]]]:
    """Cut prompts into rounds of at most `max_tokens` tokens for each decode rank, in order."""
    rounds: list[dict[int, list[Parcel]]] = []
    filled: dict[int, int] = defaultdict(int)  # decode rank -> tokens it has been given, over all rounds
    for one in prefilled:
        request, start = one.request, 0
        while start < request.num_cached:
            index, used = divmod(filled[request.decode_rank], max_tokens)
            stop = min(request.num_cached, start + max_tokens - used)
            if index == len(rounds):
                rounds.append({})
            parcel = Parcel(one, start, stop, request.num_attempts, request.decode_rank)
            rounds[index].setdefault(request.decode_rank, []).append(parcel)
            filled[request.decode_rank] += stop - start
            start = stop
    return rounds


def insert(target: DecodeInstance, handoff: Handoff) -> list[Request]:
    """Write a round into the cache of `target`; returns the requests that are whole with it.

    Parcels whose request has been cancelled, or sent again, are left out: their blocks are somebody else's.
    """
    num_ranks, num_tokens, num_places = target.instance.ep_size, round_tokens(target), target.router.num_places
    slots = np.full((num_ranks, num_tokens), -1, np.int32)
    places = np.full((num_ranks, num_places), -1, np.int32)
    arrived = []
    for rank, parcels in handoff.parcels.items():
        begin = row = 0
        for parcel in parcels:
            request, end = parcel.prefilled.request, begin + parcel.num_tokens
            if parcel.is_current:
                positions = np.arange(parcel.start, parcel.stop, dtype=np.int32)
                slots[rank, begin:end] = slot_mapping(request.decode_blocks, positions, target.settings.block_size)
                if parcel.is_last:
                    places[rank, row] = request.decode_place
                    arrived.append(request)
            row += parcel.is_last
            begin = end
    latents, hidden = handoff.latents, handoff.hidden
    target.cache, target.hidden = _insert(target.cache, target.hidden, latents, slots, hidden, places, spec=target.spec)
    for request in arrived:
        request.num_settled = 1
    return arrived


def _on_their_way(
    source: PrefillInstance,
    target: DecodeInstance,
    parcels: dict[int, list[Parcel]],
    last_hidden: jax.Array,
) -> Handoff:
    """Read a round, and start moving it to its decode devices."""
    devices = target.instance.devices
    found = _gather_round(source, target, parcels, last_hidden)
    moved = jax.device_put([*found.values()], [(devices[rank],) * 2 for rank in found])
    for rank in found:
        peer = prefill_tp_rank(rank, source.instance.ep_size, target.instance.ep_size)
        for parcel in parcels[rank]:
            _record(source.instance.devices[peer], devices[rank], parcel, target)
    return _assemble(target, parcels, dict(zip(found, moved, strict=True)))


def _assemble(
    target: DecodeInstance, parcels: dict[int, list[Parcel]], moved: dict[int, tuple[jax.Array, jax.Array]]
) -> Handoff:
    """One array of all ranks' parts; ranks that get nothing have idle ones."""
    latents, hidden = (list(parts) for parts in _idle_parts(target))
    for rank, parts in moved.items():
        latents[rank], hidden[rank] = parts

    def on_ranks(parts: list) -> jax.Array:
        shape = (len(parts) * parts[0].shape[0], *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, target.spec.by_rank(), parts)

    return Handoff(parcels, on_ranks(latents), on_ranks(hidden))


def _gather_round(
    source: PrefillInstance,
    target: DecodeInstance,
    parcels: dict[int, list[Parcel]],
    last_hidden: jax.Array | None,
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """Read a round on the prefill devices: decode rank -> (latents, hidden states)."""
    config, block_size = source.model.config, source.settings.block_size
    num_peers, num_tokens, num_places = source.instance.ep_size, round_tokens(target), target.router.num_places
    if last_hidden is None:
        shape = (source.max_sequences, config.hidden_size)
        last_hidden = jax.device_put(np.zeros(shape, source.model.dtype), NamedSharding(source.spec.mesh, _EVERYWHERE))
    by_peer: dict[int, list[int]] = defaultdict(list)
    for rank in parcels:
        by_peer[prefill_tp_rank(rank, num_peers, target.instance.ep_size)].append(rank)
    found: dict[int, tuple[jax.Array, jax.Array]] = {}
    # Each prefill rank sends to one of its decode ranks at a time. Without any it is one turn, for the compilation.
    for turn in itertools.zip_longest(*by_peer.values()) if by_peer else [()]:
        slots = np.full((num_peers, num_tokens), -1, np.int32)
        rows = np.full((num_peers, num_places), -1, np.int32)
        sending = {peer: rank for peer, rank in zip(by_peer, turn, strict=False) if rank is not None}
        for peer, rank in sending.items():
            begin = row = 0
            for parcel in parcels[rank]:
                positions, end = np.arange(parcel.start, parcel.stop, dtype=np.int32), begin + parcel.num_tokens
                slots[peer, begin:end] = slot_mapping(parcel.prefilled.blocks, positions, block_size)
                if parcel.is_last:
                    rows[peer, row] = parcel.prefilled.row
                    row += 1
                begin = end
        taken = _gather(source.cache, last_hidden, slots, rows, spec=source.spec)
        parts = [{shard.device: shard.data for shard in array.addressable_shards} for array in taken]
        for peer, rank in sending.items():
            device = source.instance.devices[peer]
            found[rank] = parts[0][device], parts[1][device]
    return found


def _idle_parts(target: DecodeInstance) -> tuple[list[jax.Array], list[jax.Array]]:
    """What stands for the parts of ranks that get nothing in a round; made once, since it is as large as all parts."""
    if target.idle_parts is None:
        config, dtype, num_ranks = target.model.config, target.model.dtype, target.instance.ep_size
        shapes = (
            (num_ranks, config.num_cache_layers, round_tokens(target), config.latent_width),
            (num_ranks * target.router.num_places, config.hidden_size),
        )
        zeros = jax.jit(lambda: tuple(jnp.zeros(s, dtype) for s in shapes), out_shardings=target.spec.by_rank())
        by_device = [{shard.device: shard.data for shard in array.addressable_shards} for array in zeros()]
        latents, hidden = ([parts[device] for device in target.instance.devices] for parts in by_device)
        target.idle_parts = latents, hidden
    return target.idle_parts


def _record(source: jax.Device, destination: jax.Device, parcel: Parcel, target: DecodeInstance) -> None:
    config, itemsize = target.model.config, target.model.dtype.itemsize
    num_bytes = config.num_cache_layers * parcel.num_tokens * config.latent_width * itemsize
    if target.hidden is not None and parcel.is_last:
        num_bytes += config.hidden_size * itemsize
    fabric.record(_PLANE, _RECORD, source.id, destination.id, num_bytes)
