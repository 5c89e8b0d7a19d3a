"""Executors in virtual time: they compute with tokens in place of latents.

A cache of such an executor holds the token of each slot, and whose it is, and the next token follows from what it holds
at all the slots of a sequence: blocks that were mixed up, or tokens that are missing, show at once.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from cmjax.schedule.blocks import slot_mapping
from cmjax.schedule.decode import DecodeSizes
from cmjax.schedule.plans import (
    Arrival,
    DecodePlan,
    DecodeResult,
    News,
    Plan,
    PrefillPlan,
    PrefillResult,
    ReceivePlan,
    RestartPlan,
    Result,
    SendPlan,
)
from cmjax.schedule.prefill import PrefillSizes
from cmjax.schedule.sampling import MAX_LOGPROBS, LogprobArrays

_NO_LOAD = np.zeros((0, 0), np.int64)
# A sequence that a cache holds: its length, and the sum of its tokens, which the next one follows from.
Sums = tuple[int, int]
# What a round of a transfer brings: each segment's attempt, its tokens, and whether its prompt's last hidden state is
# with it, by the decode rank and the place in the round that it goes to.
Payload = dict[tuple[int, int], tuple[int, np.ndarray, bool]]


def token_after(tokens: Sequence[int] | np.ndarray) -> int:
    """The "model": the next token follows from all before it, so that a lost or doubled one shows."""
    return _token_after(int(tokens[-1]), len(tokens), int(np.sum(tokens)))


def _token_after(last: int, length: int, total: int) -> int:
    return (31 * last + 7 * length + total) % 9973


def _logprobs(token_ids: np.ndarray) -> LogprobArrays | None:
    """Of tokens in a row; None where nobody asks."""
    if not len(token_ids):
        return None
    shape = len(token_ids), MAX_LOGPROBS
    top_ids = np.broadcast_to(np.arange(MAX_LOGPROBS, dtype=np.int32), shape)
    return LogprobArrays(-token_ids.astype(np.float32), np.ones(len(token_ids), np.int32), top_ids, -top_ids * 1.0)


class VirtualWire:
    """Rounds on their way, each until it is thrown away or written."""

    def __init__(self) -> None:
        self._rounds: dict[str, dict[Arrival, tuple[float, Payload]]] = {}

    def put(self, target: str, key: Arrival, payload: Payload, when: float) -> None:
        """A round that arrives at `when`."""
        self._rounds.setdefault(target, {})[key] = when, payload

    def arrived(self, target: str, now: float, known: set[Arrival]) -> list[Arrival]:
        """Those that are there and were not known, as they came."""
        found = [(when, key) for key, (when, _) in self._rounds.get(target, {}).items() if when <= now]
        return [key for _, key in sorted(found) if key not in known]

    def take(self, target: str, key: Arrival) -> Payload:
        """A round that is there."""
        return self._rounds[target].pop(key)[1]

    def clear(self, target: str, now: float) -> None:
        """Throw away what has arrived somewhere."""
        for key in self.arrived(target, now, set()):
            self.take(target, key)


class VirtualCache:
    """The token of each slot, and the attempt that it was written for; nobody reads another's."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._tokens = np.full(num_blocks * block_size, -1, np.int64)
        self._owners = np.full(num_blocks * block_size, -1, np.int64)

    def write(self, attempt_id: int, blocks: np.ndarray, start: int, tokens: np.ndarray) -> None:
        """Put tokens where those blocks hold position `start` and following."""
        slots = slot_mapping(blocks, np.arange(start, start + len(tokens)), self._block_size)
        self._tokens[slots], self._owners[slots] = tokens, attempt_id

    def read(self, attempt_id: int, blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
        """What is at positions `[start, stop)` of an attempt."""
        slots = slot_mapping(blocks, np.arange(start, stop), self._block_size)
        if not (self._owners[slots] == attempt_id).all():
            raise AssertionError(f"attempt {attempt_id} reads what {self._owners[slots]} wrote")
        return self._tokens[slots]


class VirtualPrefill:
    """The executor of a prefill instance."""

    def __init__(self, sizes: PrefillSizes, wire: VirtualWire, arrives_at: Callable[[], float | None]) -> None:
        self.sizes, self._wire, self._arrives_at = sizes, wire, arrives_at
        self._restart()

    def _restart(self) -> None:
        self._cache = VirtualCache(self.sizes.num_blocks, self.sizes.block_size)
        self._blocks: dict[int, np.ndarray] = {}  # by place
        self._ends: dict[int, np.ndarray] = {}  # step -> the last token of each row

    def poll(self) -> list[News]:
        """Nothing arrives here."""
        return []

    @property
    def expects_arrivals(self) -> bool:
        """See `Executor`."""
        return False

    def run(self, plan: Plan) -> Result:
        """See `Executor`."""
        if isinstance(plan, PrefillPlan):
            return self._step(plan)
        if isinstance(plan, SendPlan):
            self._send(plan)
        elif isinstance(plan, RestartPlan):
            self._restart()
        return None

    def _step(self, plan: PrefillPlan) -> PrefillResult:
        assert len(plan.token_ids) == len(plan.next_token_ids) <= plan.variant.num_tokens
        assert len(set(plan.places.tolist())) == len(plan.places)
        self._blocks |= dict(zip(plan.places[plan.joins].tolist(), plan.blocks, strict=True))
        self._ends = {step: ends for step, ends in self._ends.items() if step >= plan.oldest_step}
        found, begin = [], 0
        rows = (plan.attempt_ids.tolist(), plan.places.tolist(), plan.starts.tolist(), plan.stops.tolist())
        for attempt_id, place, start, stop in zip(*rows, strict=True):
            blocks = self._blocks[place]
            self._cache.write(attempt_id, blocks, start, plan.token_ids[begin : begin + stop - start])
            found.append(token_after(self._cache.read(attempt_id, blocks, 0, stop)))
            begin += stop - start
        token_ids, bounds = np.array(found, np.int32), np.cumsum(plan.stops - plan.starts)
        self._ends[plan.number] = plan.token_ids[bounds - 1]
        is_asked = np.isin(np.repeat(np.arange(len(found)), plan.stops - plan.starts), plan.prompt_logprob_rows)
        logprobs = _logprobs(token_ids[plan.logprob_rows])
        return PrefillResult(token_ids, _NO_LOAD, 0.0, logprobs, _logprobs(plan.next_token_ids[is_asked]))

    def _send(self, plan: SendPlan) -> None:
        payload, parts = {}, plan.segments
        for index, blocks in enumerate(parts.blocks):
            attempt_id, start = int(plan.attempt_ids[index]), int(parts.starts[index])
            offset = start % self.sizes.block_size
            tokens = self._cache.read(attempt_id, blocks, offset, offset + int(parts.stops[index]) - start)
            has_hidden = plan.step_rows[index] >= 0
            if has_hidden:
                assert self._ends[plan.step][plan.step_rows[index]] == tokens[-1]
            payload[int(parts.ranks[index]), int(parts.begins[index])] = attempt_id, tokens, bool(has_hidden)
        when = self._arrives_at()
        if when is not None:
            self._wire.put(plan.target, (plan.transfer_id, plan.round), payload, when)


@dataclasses.dataclass
class _Row:
    """A row of a decode executor."""

    attempt_id: int
    token_id: int
    position: int
    last_position: int
    blocks: np.ndarray


class VirtualDecode:
    """The executor of a decode instance. Of k drafts a step keeps none, one, ... k in turn."""

    def __init__(self, name: str, sizes: DecodeSizes, wire: VirtualWire, clock: Callable[[], float]) -> None:
        self.name, self.sizes, self._wire, self._clock = name, sizes, wire, clock
        self._restart()

    def _restart(self) -> None:
        sizes = self.sizes
        self._wire.clear(self.name, self._clock())
        self._caches = [VirtualCache(sizes.num_blocks, sizes.block_size) for _ in range(sizes.num_ranks)]
        self._hidden = np.full(sizes.num_ranks * sizes.num_places, -1, np.int64)  # whose lies at each place
        self._rows: dict[int, _Row] = {}
        self._known: set[Arrival] = set()

    def poll(self) -> list[News]:
        """See `Executor`."""
        arrived = self._wire.arrived(self.name, self._clock(), self._known)
        self._known |= set(arrived)
        return [*arrived]

    @property
    def expects_arrivals(self) -> bool:
        """See `Executor`."""
        return bool(self._wire.arrived(self.name, float("inf"), self._known))

    def run(self, plan: Plan) -> Result:
        """See `Executor`."""
        if isinstance(plan, DecodePlan):
            return self._call(plan)
        if isinstance(plan, ReceivePlan):
            self._receive(plan)
        elif isinstance(plan, RestartPlan):
            self._restart()
        return None

    def _receive(self, plan: ReceivePlan) -> None:
        key = plan.transfer_id, plan.round
        self._known.remove(key)
        payload, parts = self._wire.take(self.name, key), plan.segments
        for index, blocks in enumerate(parts.blocks):
            rank, start, stop = int(parts.ranks[index]), int(parts.starts[index]), int(parts.stops[index])
            attempt_id, tokens, has_hidden = payload[rank, int(parts.begins[index])]
            assert attempt_id == plan.attempt_ids[index]
            assert len(tokens) == stop - start
            self._caches[rank].write(attempt_id, blocks, start % self.sizes.block_size, tokens)
            if plan.places[index] >= 0:
                assert has_hidden
                self._hidden[rank * self.sizes.num_places + plan.places[index]] = attempt_id

    def _call(self, plan: DecodePlan) -> DecodeResult:
        assert (np.diff(plan.places) > 0).all()
        assert max(np.bincount(plan.places // self.sizes.num_places).tolist()) <= plan.variant.num_slots
        joins, growth = plan.joins, plan.growth
        attempt_of = dict(zip(plan.places.tolist(), plan.attempt_ids.tolist(), strict=True))
        for index, (place, blocks) in enumerate(zip(joins.places.tolist(), joins.blocks, strict=True)):
            columns = (joins.token_ids, joins.positions, joins.last_positions)
            token_id, position, last_position = (int(column[index]) for column in columns)
            self._rows[place] = _Row(attempt_of[place], token_id, position, last_position, blocks)
        for index, (place, blocks) in enumerate(zip(growth.places.tolist(), growth.blocks, strict=True)):
            row = self._rows[place]
            assert len(row.blocks) == growth.first[index]
            row.blocks, row.last_position = np.concatenate([row.blocks, blocks]), int(growth.last_positions[index])
        for place, attempt_id in attempt_of.items():
            assert self._rows[place].attempt_id == self._hidden[place] == attempt_id
        found = [self._steps(place, plan.variant.num_steps) for place in plan.places.tolist()]
        token_ids = np.array(found, np.int32).T
        return DecodeResult(token_ids, _NO_LOAD, 0.0, _logprobs(token_ids[:, plan.logprob_rows].reshape(-1)))

    def _steps(self, place: int, num_steps: int) -> list[int]:
        row, cache, width = self._rows[place], self._caches[place // self.sizes.num_places], self.sizes.num_drafts + 1
        total, found = int(cache.read(row.attempt_id, row.blocks, 0, row.position).sum()), []
        written = []
        for _ in range(num_steps):
            kept = min(row.position % width + 1, row.last_position - row.position + 1)
            for _ in range(kept):
                written.append(row.token_id)
                total += row.token_id
                row.position += 1
                row.token_id = _token_after(row.token_id, row.position, total)
                found.append(row.token_id)
            found += [-1] * (width - kept)
        cache.write(row.attempt_id, row.blocks, row.position - len(written), np.array(written, np.int64))
        return found
