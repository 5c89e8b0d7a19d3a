"""Executors in virtual time: they compute with tokens in place of latents.

A cache of such an executor holds the token of each slot, and whose its block is, and the next token follows from what
it holds at all the slots of a sequence: blocks that were mixed up, or tokens that are missing, show at once.
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
from cmjax.schedule.pool_plans import Fetched, FetchPlan, LoadPlan, LookupPlan, StorePlan
from cmjax.schedule.prefill import PrefillSizes
from cmjax.schedule.sampling import MAX_LOGPROBS, LogprobArrays
from cmjax.schedule.virtual_pool import VirtualPool

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
    """The token of each slot, and the attempts that each block is of.

    Who writes takes a block for itself, with nothing in it, and who joins with blocks that hold something takes part in
    them: a block that is given to a new owner while somebody still reads it shows when either of them reads again.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._tokens = np.full((num_blocks, block_size), -1, np.int64)
        self._owners: list[set[int]] = [set() for _ in range(num_blocks)]

    def write(self, attempt_id: int, blocks: np.ndarray, start: int, tokens: np.ndarray) -> None:
        """Put tokens where those blocks hold position `start` and following."""
        slots = self.slots(blocks, start, start + len(tokens))
        for block in set((slots // self._block_size).tolist()):
            if self._owners[block] != {attempt_id}:
                self._owners[block], self._tokens[block] = {attempt_id}, -1
        self._tokens.reshape(-1)[slots] = tokens

    def join(self, attempt_id: int, blocks: np.ndarray, stop: int) -> None:
        """An attempt begins with what lies at positions `[0, stop)`, whoever wrote it."""
        for block in blocks[: stop // self._block_size].tolist():
            self._owners[block].add(attempt_id)

    def read(self, attempt_id: int, blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
        """What is at positions `[start, stop)` of an attempt."""
        slots = self.slots(blocks, start, stop)
        for block in set((slots // self._block_size).tolist()):
            if attempt_id not in self._owners[block]:
                raise AssertionError(f"attempt {attempt_id} reads what {self._owners[block]} wrote")
        return self.contents(slots)

    def contents(self, slots: np.ndarray) -> np.ndarray:
        """What is at some slots, whosever they are."""
        tokens = self._tokens.reshape(-1)[slots]
        if (tokens < 0).any():
            raise AssertionError(f"nothing was written at {slots[tokens < 0]}")
        return tokens

    def slots(self, blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Where those blocks hold positions `[start, stop)`."""
        return slot_mapping(blocks, np.arange(start, stop), self._block_size)


class VirtualEntries:
    """What the MTP module has of each slot: that follows from the position, its token and the one after it."""

    def __init__(self, num_slots: int) -> None:
        self._entries = np.full((num_slots, 3), -1, np.int64)

    def write(self, slots: np.ndarray, start: int, tokens: np.ndarray, next_tokens: np.ndarray) -> None:
        """Of positions `start` and following."""
        self._entries[slots] = np.stack([np.arange(start, start + len(tokens)), tokens, next_tokens], 1)

    def check(self, slots: np.ndarray, tokens: np.ndarray, next_token: int) -> None:
        """Those of a sequence's first positions are right."""
        expected = np.stack([np.arange(len(tokens)), tokens, [*tokens[1:], next_token]], 1)
        if not np.array_equal(self._entries[slots], expected):
            raise AssertionError(f"MTP entries {self._entries[slots].tolist()} in place of {expected.tolist()}")


class VirtualPrefill:
    """The executor of a prefill instance.

    Attributes:
        fetched: attempt -> blocks that have been fetched and not all written yet.
    """

    def __init__(
        self, sizes: PrefillSizes, wire: VirtualWire, arrives_at: Callable[[], float | None], pool: VirtualPool
    ) -> None:
        self.sizes, self._wire, self._arrives_at, self._pool = sizes, wire, arrives_at, pool
        self._news: list[News] = []
        self._num_expected = 0
        self._restart()

    def _restart(self) -> None:
        sizes = self.sizes
        self._cache = VirtualCache(sizes.num_blocks, sizes.block_size)
        self._entries = VirtualEntries(sizes.num_blocks * sizes.block_size)
        self._blocks: dict[int, np.ndarray] = {}  # by place
        self._steps: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # step -> its tokens, and the last of each row
        self.fetched: dict[int, list[np.ndarray]] = {}

    def poll(self) -> list[News]:
        """See `Executor`."""
        news, self._news = self._news, []
        return news

    @property
    def expects_arrivals(self) -> bool:
        """See `Executor`."""
        return self._num_expected > 0

    def run(self, plan: Plan) -> Result:
        """See `Executor`."""
        if isinstance(plan, PrefillPlan):
            return self._step(plan)
        if isinstance(plan, SendPlan):
            self._send(plan)
        elif isinstance(plan, LookupPlan):
            self._num_expected += self._pool.lookup(plan, self._tell)
        elif isinstance(plan, FetchPlan):
            self._num_expected += self._pool.fetch(plan, self._take_fetched)
        elif isinstance(plan, LoadPlan):
            self._load(plan)
        elif isinstance(plan, StorePlan):
            self._store(plan)
        elif isinstance(plan, RestartPlan):
            self._restart()
        return None

    def _step(self, plan: PrefillPlan) -> PrefillResult:
        assert len(plan.token_ids) == len(plan.next_token_ids) <= plan.variant.num_tokens
        assert len(set(plan.places.tolist())) == len(plan.places)
        self._steps = {step: kept for step, kept in self._steps.items() if step >= plan.oldest_step}
        for row, blocks in zip(plan.joins.tolist(), plan.blocks, strict=True):
            self._blocks[int(plan.places[row])] = blocks
            self._cache.join(int(plan.attempt_ids[row]), blocks, int(plan.starts[row]))
        found, begin = [], 0
        rows = (plan.attempt_ids.tolist(), plan.places.tolist(), plan.starts.tolist(), plan.stops.tolist())
        for attempt_id, place, start, stop in zip(*rows, strict=True):
            blocks, end = self._blocks[place], begin + stop - start
            tokens, next_tokens = plan.token_ids[begin:end], plan.next_token_ids[begin:end]
            self._cache.write(attempt_id, blocks, start, tokens)
            self._entries.write(self._cache.slots(blocks, start, stop), start, tokens, next_tokens)
            tokens, begin = self._cache.read(attempt_id, blocks, 0, stop), end
            if self._has_mtp:
                self._entries.check(self._cache.slots(blocks, 0, stop), tokens, int(next_tokens[-1]))
            found.append(token_after(tokens))
        token_ids, bounds = np.array(found, np.int32), np.cumsum(plan.stops - plan.starts)
        self._steps[plan.number] = plan.token_ids, plan.token_ids[bounds - 1]
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
                assert self._steps[plan.step][1][plan.step_rows[index]] == tokens[-1]
            payload[int(parts.ranks[index]), int(parts.begins[index])] = attempt_id, tokens, bool(has_hidden)
        when = self._arrives_at()
        if when is not None:
            self._wire.put(plan.target, (plan.transfer_id, plan.round), payload, when)

    @property
    def _has_mtp(self) -> bool:
        return self.sizes.cache is None or self.sizes.cache.needs_next

    def _tell(self, news: News) -> None:
        self._news.append(news)
        self._num_expected -= 1

    def _take_fetched(self, news: Fetched, blocks: list[np.ndarray]) -> None:
        self._tell(news)
        if blocks:
            self.fetched[news.attempt_id] = blocks

    def _load(self, plan: LoadPlan) -> None:
        rows = zip(plan.blocks, plan.last_positions.tolist(), plan.next_token_ids.tolist(), strict=True)
        for index, (blocks, last_position, next_token) in enumerate(rows, plan.first):
            tokens = self.fetched[plan.attempt_id][index]
            self._cache.write(plan.attempt_id, blocks, 0, tokens)
            slots = self._cache.slots(blocks, 0, len(tokens))
            self._entries.write(slots, last_position + 1 - len(tokens), tokens, np.array([*tokens[1:], next_token]))
        if plan.is_last:
            self.fetched.pop(plan.attempt_id, None)

    def _store(self, plan: StorePlan) -> None:
        found = []
        for blocks, token_ids, hidden_row in zip(plan.blocks, plan.token_ids, plan.hidden_rows.tolist(), strict=True):
            tokens = self._cache.contents(self._cache.slots(blocks, 0, len(token_ids)))
            assert np.array_equal(tokens, token_ids)
            assert self._steps[plan.step][0][hidden_row] == tokens[-1]
            found.append(tokens)
        self._num_expected += self._pool.store(plan, np.array(found), self._tell)


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
