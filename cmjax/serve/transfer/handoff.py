"""The KV hand-off from a prefill instance to the ranks of a decode instance (paper section 4.3.3).

With MLA's single latent head every prefill rank holds the same latents, so the source is free to choose; a fixed map
spreads the decode ranks evenly over the prefill ranks. A prompt travels in rounds of some tokens: the prefill side
reads and sends them one after another, and the decode side writes what has arrived between two of its calls. The copies
count as traffic of the RDMA plane, apart from the exchanges of decode.
"""

import dataclasses
import functools
import itertools
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cmjax.mesh import EP_AXIS, Instance, fabric
from cmjax.model import Model
from cmjax.schedule import Arrival, Segments, make_segments, plan_rounds, slot_mapping
from cmjax.serve.instances.executor import Executor, bucket
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps.prefill import StepSpec

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


# What stands for the parts of ranks that get nothing in a round: latents and hidden states of each rank.
IdleParts = tuple[list[jax.Array], list[jax.Array]]


class Receiver(Protocol):
    """What a hand-off needs of the decode executor that it goes to."""

    model: Model
    instance: Instance
    settings: EngineSettings
    spec: StepSpec
    num_places: int
    cache: jax.Array
    hidden: jax.Array | None
    idle_parts: IdleParts | None


@dataclasses.dataclass(frozen=True)
class Payload:
    """One round of a hand-off on its way: for every decode rank at most so many tokens.

    Attributes:
        latents: `[decode ranks, layers, tokens, width]`, on the decode devices, perhaps not yet there.
        hidden: `[decode ranks * places, hidden]`, the last hidden states of the prompts that end.
    """

    latents: jax.Array
    hidden: jax.Array

    @property
    def is_ready(self) -> bool:
        """Whether it has arrived."""
        arrays: tuple[Any, ...] = (self.latents, self.hidden)  # their stub lacks `is_ready`
        return all(array.is_ready() for array in arrays)


class Wire:
    """The rounds on their way between the executors of one process, by the one they go to. Used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._receivers: dict[str, Receiver] = {}
        self._rounds: dict[Receiver, OrderedDict[Arrival, Payload]] = defaultdict(OrderedDict)
        self._known: dict[Receiver, set[Arrival]] = defaultdict(set)

    def register(self, name: str, receiver: Receiver) -> None:
        """Rounds can be sent to it by name."""
        with self._lock:
            self._receivers[name] = receiver

    def unregister(self, name: str) -> None:
        """It has been taken out, if it was there."""
        with self._lock:
            receiver = self._receivers.pop(name, None)
            if receiver is not None:
                self._rounds.pop(receiver, None)
                self._known.pop(receiver, None)

    def receiver(self, name: str) -> Receiver:
        """An executor by name.

        Raises:
            RuntimeError: it has been taken out.
        """
        with self._lock:
            if name not in self._receivers:
                raise RuntimeError(f"there is no decode instance {name}")
            return self._receivers[name]

    def put(self, name: str, key: Arrival, payload: Payload) -> None:
        """A round is on its way."""
        with self._lock:
            if name not in self._receivers:
                raise RuntimeError(f"there is no decode instance {name}")
            self._rounds[self._receivers[name]][key] = payload

    def arrived(self, receiver: Receiver) -> list[Arrival]:
        """Rounds that have arrived since the last call, in the order they were sent."""
        with self._lock:
            known, found = self._known[receiver], []
            for key, payload in self._rounds[receiver].items():
                if key not in known and payload.is_ready:
                    found.append(key)
            known |= set(found)
        return found

    def is_expected(self, receiver: Receiver) -> bool:
        """Whether rounds are on their way that have not arrived."""
        with self._lock:
            return len(self._rounds[receiver]) > len(self._known[receiver])

    def take(self, receiver: Receiver, key: Arrival) -> Payload:
        """A round that has arrived."""
        with self._lock:
            self._known[receiver].discard(key)
            return self._rounds[receiver].pop(key)

    def clear(self, receiver: Receiver) -> None:
        """Throw away what is on its way to one."""
        with self._lock:
            self._rounds.pop(receiver, None)
            self._known.pop(receiver, None)


def round_tokens(settings: EngineSettings) -> int:
    """Tokens that a decode rank receives in one round."""
    return min(MAX_ROUND_TOKENS, bucket(settings.max_model_len, settings.block_size))


def read(
    source: Executor,
    target: Receiver,
    segments: Segments,
    step_rows: np.ndarray,
    last_hidden: jax.Array,
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
    for index, found in enumerate(_slots(segments, target.settings.block_size)):
        rank, begin = segments.ranks[index], segments.begins[index]
        slots[rank, begin : begin + len(found)] = found
        if places[index] >= 0:
            hidden_places[rank, segments.hidden_rows[index]] = places[index]
    target.cache, target.hidden = _insert(
        target.cache, target.hidden, payload.latents, slots, payload.hidden, hidden_places, spec=target.spec
    )


def compile_read(source: Executor, target: Receiver) -> None:
    """Compile what the prefill side of a hand-off runs, by reading nothing."""
    shape = (source.num_places, source.model.config.hidden_size)
    everywhere = NamedSharding(source.spec.mesh, _EVERYWHERE)
    last_hidden = jax.device_put(np.zeros(shape, source.model.dtype), everywhere)
    nothing = make_segments([], lambda part: [], source.settings.block_size)
    _gather_round(source, target, nothing, np.zeros(0, np.int32), last_hidden)


def compile_write(target: Receiver) -> None:
    """Compile what the decode side of a hand-off runs, by writing nothing."""
    nothing = make_segments([], lambda part: [], target.settings.block_size)
    write(target, _assemble(target, {}), nothing, np.zeros(0, np.int32))


class Move(NamedTuple):
    """A prompt to hand over by hand: its tokens' blocks at the source and its row in the step that ended it, and the
    rank, place and blocks it goes to."""

    num_tokens: int
    source_blocks: Sequence[int]
    step_row: int
    rank: int
    place: int
    target_blocks: Sequence[int]


def hand_off(source: Executor, target: Receiver, moves: Sequence[Move], last_hidden: jax.Array) -> None:
    """Copy prompts' latents (the MTP layer's included) and last hidden states to decode places, and wait for them.

    An engine does the same by plans, beside its steps.
    """
    rounds = plan_rounds([one.rank for one in moves], [one.num_tokens for one in moves], round_tokens(target.settings))
    for parts in rounds:
        ends = [part.hidden_row >= 0 for part in parts]
        rows = [moves[part.prompt].step_row if end else -1 for part, end in zip(parts, ends, strict=True)]
        places = [moves[part.prompt].place if end else -1 for part, end in zip(parts, ends, strict=True)]
        here = make_segments(parts, lambda part: moves[part.prompt].source_blocks, source.settings.block_size)
        there = make_segments(parts, lambda part: moves[part.prompt].target_blocks, target.settings.block_size)
        payload = read(source, target, here, np.array(rows, np.int32), last_hidden)
        write(target, payload, there, np.array(places, np.int32))


def _slots(segments: Segments, block_size: int) -> list[np.ndarray]:
    """The slots of each segment's tokens."""
    found = []
    for start, stop, blocks in zip(segments.starts, segments.stops, segments.blocks, strict=True):
        first = start // block_size * block_size
        found.append(slot_mapping(blocks, np.arange(start - first, stop - first), block_size))
    return found


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
    source: Executor,
    target: Receiver,
    segments: Segments,
    step_rows: np.ndarray,
    last_hidden: jax.Array,
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """Read a round on the prefill devices: decode rank -> (latents, hidden states)."""
    num_peers, num_tokens = source.instance.ep_size, round_tokens(target.settings)
    by_peer: dict[int, list[int]] = defaultdict(list)
    for rank in np.unique(segments.ranks).tolist():
        by_peer[prefill_tp_rank(rank, num_peers, target.instance.ep_size)].append(rank)
    slots_of = _slots(segments, source.settings.block_size)
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
    config, itemsize = target.model.config, target.model.dtype.itemsize
    num_bytes = config.num_cache_layers * num_tokens * config.latent_width * itemsize
    if target.hidden is not None and has_hidden:
        num_bytes += config.hidden_size * itemsize
    fabric.record(_PLANE, _RECORD, source.id, destination.id, num_bytes)
