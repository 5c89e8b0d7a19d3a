"""Latents and hidden states of a round: read on the prefill devices, moved, and written on the decode devices."""

import functools
import itertools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from cmjax.mesh import fabric
from cmjax.model import as_stored, token_bytes
from cmjax.schedule import Segments, make_segments
from cmjax.serve.steps import BY_RANK, EVERYWHERE, StepSpec
from cmjax.serve.transfer.rounds import prefill_tp_rank, round_tokens, segment_slots
from cmjax.serve.transfer.wire import Holder, IdleParts, Payload, Receiver


@functools.partial(jax.jit, static_argnames=("spec",))
def _gather(
    cache: jax.Array, last_hidden: jax.Array, slots: jax.Array, rows: jax.Array, *, spec: StepSpec
) -> tuple[jax.Array, jax.Array]:
    """On every prefill rank: the latents in the slots `[R, tokens]`, and the hidden states in the rows `[R, requests]`.

    Returns `([R, layers, tokens, width], [R * requests, hidden])`, one part a rank.
    """

    def rank(cache: jax.Array, last_hidden: jax.Array, slots: jax.Array, rows: jax.Array) -> tuple:
        latents = jnp.take(cache, slots[0], axis=2, mode="clip")[..., : spec.rank.config.latent_width]
        return latents, jnp.take(last_hidden, rows[0], axis=0, mode="clip")

    in_specs = (BY_RANK, EVERYWHERE, BY_RANK, BY_RANK)
    return spec.on_ranks(rank, in_specs, BY_RANK)(cache, last_hidden, slots, rows)


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
        cache = cache.at[0, :, index].set(as_stored(latents[0], cache).transpose(1, 0, 2), mode="drop")
        if kept is not None:
            index = jnp.where(places[0] < 0, kept.shape[0], places[0])
            kept = kept.at[index, 0].set(hidden, mode="drop")
        return cache, kept

    return spec.on_ranks(rank, BY_RANK, BY_RANK)(cache, kept, latents, slots, hidden, places)


def read(
    source: Holder, target: Receiver, segments: Segments, step_rows: np.ndarray, last_hidden: jax.Array
) -> Payload:
    """Read a round on the prefill devices, and start moving it to its decode devices. What is read is that of the
    source's programs so far: its blocks may be used again by its next step.

    Args:
        segments: with the source's blocks.
        step_rows: `int32[segments]`, which rows of `last_hidden` go along, -1 for none.
        last_hidden: of the step that ended these prompts.
    """
    devices = target.instance.devices
    found = _gather_round(source, target, segments, step_rows, last_hidden)
    moved = jax.device_put([*found.values()], [(devices[rank],) * 2 for rank in found])
    num_peers, num_ranks = source.instance.ep_size, target.instance.ep_size
    for rank, length, row in zip(segments.ranks, segments.stops - segments.starts, step_rows, strict=True):
        device = source.instance.devices[prefill_tp_rank(int(rank), num_peers, num_ranks)]
        _record(device, devices[rank], int(length), target, has_hidden=row >= 0)
    return _assemble(target, dict(zip(found, moved, strict=True)))


def write(target: Receiver, payload: Payload, segments: Segments, places: np.ndarray) -> None:
    """Write a round into the cache of `target`; what is in no segment is left out.

    Args:
        segments: with the target's blocks.
        places: `int32[segments]`, places of their ranks that get a hidden state, -1 for none.
    """
    num_ranks, num_tokens = target.instance.ep_size, round_tokens(target.settings)
    slots = np.full((num_ranks, num_tokens), -1, np.int32)
    hidden_places = np.full((num_ranks, target.num_places), -1, np.int32)
    for index, found in enumerate(segment_slots(segments, target.settings.block_size)):
        rank, begin = segments.ranks[index], segments.begins[index]
        slots[rank, begin : begin + len(found)] = found
        if places[index] >= 0:
            hidden_places[rank, segments.hidden_rows[index]] = places[index]
    target.cache, target.hidden = _insert(
        target.cache, target.hidden, payload.latents, slots, payload.hidden, hidden_places, spec=target.spec
    )


def compile_read(source: Holder, target: Receiver) -> None:
    """Compile what the prefill side of a hand-off runs, by reading nothing."""
    shape = (source.num_places, source.model.config.hidden_size)
    everywhere = NamedSharding(source.spec.mesh, EVERYWHERE)
    last_hidden = jax.device_put(np.zeros(shape, source.model.dtype), everywhere)
    nothing = make_segments([], lambda part: [], source.settings.block_size)
    _gather_round(source, target, nothing, np.zeros(0, np.int32), last_hidden)


def compile_write(target: Receiver) -> None:
    """Compile what the decode side of a hand-off runs, by writing nothing."""
    nothing = make_segments([], lambda part: [], target.settings.block_size)
    write(target, _assemble(target, {}), nothing, np.zeros(0, np.int32))


def _assemble(target: Receiver, moved: dict[int, tuple[jax.Array, jax.Array]]) -> Payload:
    """One array of all ranks' parts; ranks that get nothing have idle ones."""
    latents, hidden = (list(parts) for parts in _idle_parts(target))
    for rank, parts in moved.items():
        latents[rank], hidden[rank] = parts

    def on_ranks(parts: list[jax.Array]) -> jax.Array:
        shape = (len(parts) * parts[0].shape[0], *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, target.spec.by_rank(), parts)

    return Payload(on_ranks(latents), on_ranks(hidden))


def _gather_round(
    source: Holder, target: Receiver, segments: Segments, step_rows: np.ndarray, last_hidden: jax.Array
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """Read a round on the prefill devices: decode rank -> (latents, hidden states)."""
    num_peers, num_tokens = source.instance.ep_size, round_tokens(target.settings)
    by_peer: dict[int, list[int]] = defaultdict(list)
    for rank in np.unique(segments.ranks).tolist():
        by_peer[prefill_tp_rank(rank, num_peers, target.instance.ep_size)].append(rank)
    slots_of = segment_slots(segments, source.settings.block_size)
    of_rank: dict[int, list[int]] = defaultdict(list)
    for index, rank in enumerate(segments.ranks.tolist()):
        of_rank[rank].append(index)
    found: dict[int, tuple[jax.Array, jax.Array]] = {}
    # Each prefill rank sends to one of its decode ranks at a time. Without any it is one turn, for the compilation.
    for turn in itertools.zip_longest(*by_peer.values()) if by_peer else [()]:
        slots = np.full((num_peers, num_tokens), -1, np.int32)
        rows = np.full((num_peers, target.num_places), -1, np.int32)
        sending = {peer: rank for peer, rank in zip(by_peer, turn, strict=False) if rank is not None}
        for peer, rank in sending.items():
            for index in of_rank[rank]:
                begin = segments.begins[index]
                slots[peer, begin : begin + len(slots_of[index])] = slots_of[index]
                if step_rows[index] >= 0:
                    rows[peer, segments.hidden_rows[index]] = step_rows[index]
        taken = _gather(source.cache, last_hidden, slots, rows, spec=source.spec)
        parts = [{shard.device: shard.data for shard in array.addressable_shards} for array in taken]
        for peer, rank in sending.items():
            device = source.instance.devices[peer]
            found[rank] = parts[0][device], parts[1][device]
    return found


def _idle_parts(target: Receiver) -> IdleParts:
    """Made once, since it is as large as all parts."""
    if target.idle_parts is None:
        config, dtype, num_ranks = target.model.config, target.model.dtype, target.instance.ep_size
        shapes = (
            (num_ranks, config.num_cache_layers, round_tokens(target.settings), config.latent_width),
            (num_ranks * target.num_places, config.hidden_size),
        )
        zeros = jax.jit(lambda: tuple(jnp.zeros(s, dtype) for s in shapes), out_shardings=target.spec.by_rank())
        by_device = [{shard.device: shard.data for shard in array.addressable_shards} for array in zeros()]
        latents, hidden = ([parts[device] for device in target.instance.devices] for parts in by_device)
        target.idle_parts = latents, hidden
    return target.idle_parts


def _record(
    source: jax.Device, destination: jax.Device, num_tokens: int, target: Receiver, *, has_hidden: bool
) -> None:
    config, dtype = target.model.config, target.model.dtype
    num_bytes = num_tokens * token_bytes(config, dtype)
    if target.hidden is not None and has_hidden:
        num_bytes += config.hidden_size * dtype.itemsize
    fabric.record("rdma", "kv_handoff", source.id, destination.id, num_bytes)
