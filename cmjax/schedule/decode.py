"""The planner of a decode instance: ranks and blocks of sequences, and which run together (paper section 4.1)."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from cmjax.schedule.block_stores import BlockStores
from cmjax.schedule.blocks import Ragged
from cmjax.schedule.decode_places import DecodePlaces
from cmjax.schedule.generated_blocks import GeneratedBlocks
from cmjax.schedule.planner import Owner, Planner
from cmjax.schedule.plans import (
    Arrival,
    CompilePlan,
    DecodeGrowth,
    DecodeJoins,
    DecodePlan,
    DecodeResult,
    DecodeVariant,
    News,
    Plan,
    ReceivePlan,
    RestartPlan,
    Result,
)
from cmjax.schedule.pool_plans import FetchPlan, LookupPlan, Stored, StorePlan
from cmjax.schedule.prefill_cache import CacheSizes
from cmjax.schedule.request import Attempt, Request, sampling_rows
from cmjax.schedule.sampling import SamplingShape, token_problem
from cmjax.schedule.slo import SloController
from cmjax.schedule.stats import InstanceStats, Role
from cmjax.schedule.transfer import empty_receive

# Rounds of a hand-off that are written between two decode calls: a long prompt must not hold decode up.
MAX_ROUNDS_PER_CALL = 4


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Sizes of a decode instance.

    Attributes:
        num_ranks, num_places: sequences that a rank can have, those whose latents are still on their way included.
        num_blocks, block_size: of a rank's cache.
        max_blocks: those of the longest request.
        num_drafts: tokens guessed ahead in a step.
        round_tokens: that a rank receives in a round of a hand-off, at most.
        variants: what its call is compiled for, ascending.
        microbatches: numbers of them to choose from.
        cache: of prefixes, which generated tokens go into; None: nothing is cached.
    """

    num_ranks: int
    num_places: int
    num_blocks: int
    block_size: int
    max_blocks: int
    variants: tuple[DecodeVariant, ...]
    num_drafts: int = 0
    round_tokens: int = 256
    microbatches: tuple[int, ...] = (1,)
    cache: CacheSizes | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """A decode call: when it began and ended, by the engine's clock in seconds, and how many sequences took part."""

    begin: float
    end: float
    num_seqs: int


class DecodePlanner(Planner):
    """Sequences of a decode instance: which run together, and what becomes of their tokens.

    Attributes:
        is_patient: wait with a call until all that have a place have arrived: fewer and fuller calls, for a list of
            prompts that are all there from the start.
        controller: sets how many sequences of a rank run together; None: all that have a place.
        calls: the newest ones.
        num_steps: of all calls.
        kept_drafts: `int64[k + 1]`, in how many of the requests' steps 0, 1, ... k drafts were kept.
    """

    role: Role = "decode"

    def __init__(self, name: str, model: str, sizes: DecodeSizes, owner: Owner, *, is_patient: bool = False) -> None:
        super().__init__(name, model, sizes.num_ranks, sizes.microbatches, owner)
        self.sizes, self.is_patient = sizes, is_patient
        self.variants = sizes.variants
        self.controller: SloController | None = None
        self.num_steps = 0
        self.calls: collections.deque[Call] = collections.deque(maxlen=4096)
        self.kept_drafts = np.zeros(sizes.num_drafts + 1, np.int64)
        self._renew()

    def _renew(self) -> None:
        sizes, size = self.sizes, self.sizes.num_ranks * self.sizes.num_places
        self._places = DecodePlaces(
            sizes.num_ranks, sizes.num_places, sizes.num_blocks, sizes.block_size, sizes.max_blocks, self.fence
        )
        self.attempts = self._places.attempts
        self._arrivals: collections.deque[Arrival] = collections.deque()
        self._num_received = 0  # rounds since the last call
        self._has_stored = False  # generated blocks since the last call
        self.generated = GeneratedBlocks(sizes.cache, sizes.block_size, sizes.num_drafts, self.owner.cache_counts)
        self._last_end: float | None = None  # of the last call, while the next one follows on it
        # By place, too: whether the executor has its row, which shape it needs, blocks it has not been told of.
        self._has_joined = np.zeros(size, bool)
        self._wants_logprobs = np.zeros(size, bool)
        self._shape_idx = np.zeros(size, np.int64)
        self._grown: dict[int, tuple[int, list[int]]] = {}  # place -> (blocks that its row has, those since)

    # -- for the scheduler --------------------------------------------------------------------------------------------

    @property
    def num_attempts(self) -> int:
        """Those that have a place."""
        return len(self.attempts)

    @property
    def num_running(self) -> int:
        """Those of them whose latents have arrived."""
        return int(self._places.is_running.sum())

    @property
    def stores(self) -> BlockStores:
        return self.generated.stores

    @property
    def num_per_rank(self) -> np.ndarray:
        """`int64[ranks]`, attempts of each rank."""
        return self._places.num_per_rank

    @property
    def load(self) -> float:
        """Share of the places that are taken."""
        return len(self.attempts) / (self.sizes.num_ranks * self.sizes.num_places)

    @property
    def limit(self) -> int:
        """Sequences that a rank decodes together, at most."""
        most = min(self.sizes.num_places, self.variants[-1].num_slots)
        return most if self.controller is None else min(most, self.controller.limit)

    @property
    def call_tokens(self) -> int:
        """What a sequence can gain in a call."""
        return self.variants[-1].num_steps * (self.sizes.num_drafts + 1)

    def reserve(self, attempt: Attempt) -> bool:
        """Give an attempt a place and blocks; False where there is no room, see `DecodePlaces.reserve`."""
        sampling = attempt.request.sampling
        shape_idx = self._shape_index(SamplingShape.for_all([sampling]))
        place = self._places.reserve(attempt, self.call_tokens, self.limit)
        if place is None:
            return False
        self._has_joined[place] = False
        self._wants_logprobs[place] = sampling.logprobs is not None
        self._shape_idx[place] = shape_idx
        return True

    def drop(self, attempt: Attempt) -> None:
        place = self._places.drop(attempt)
        if place is not None:
            self._grown.pop(place, None)

    def stats(self) -> InstanceStats:
        num_blocks, num_running = self.sizes.num_ranks * self.sizes.num_blocks, self.num_running
        return InstanceStats(
            name=self.name,
            role=self.role,
            status=self.status,
            ep_size=self.num_ranks,
            num_running=num_running,
            num_waiting=len(self.attempts) - num_running,
            num_blocks=num_blocks,
            num_used_blocks=num_blocks - self._places.num_free_blocks,
            num_calls=self.num_calls,
            num_tokens=self.num_tokens,
            busy_s=self.busy_s,
            num_places=self.sizes.num_ranks * self.sizes.num_places,
            seqs_per_rank=self.limit,
            expert_imbalance=self.slot_load.imbalance(self.num_ranks),
        )

    # -- plan ---------------------------------------------------------------------------------------------------------

    def _take_arrivals(self, arrivals: Sequence[News]) -> None:
        for news in arrivals:
            if isinstance(news, tuple):
                self._arrivals.append(news)
            elif isinstance(news, Stored):
                self.stores.take(news)

    def _fail_pool(self, plan: LookupPlan | FetchPlan | StorePlan) -> None:
        self.stores.commit(has_failed=True)

    def _plan_urgent(self) -> Plan | None:
        return None

    def _plan_work(self, now: float) -> Plan | None:
        can_call = self._can_call()
        if self._arrivals and not (can_call and self._num_received == MAX_ROUNDS_PER_CALL):
            return self._plan_receive()
        self._num_received = 0
        if not (can_call and self._has_stored) and (plan := self.stores.plan()) is not None:
            self._has_stored = True
            return plan
        if not can_call:
            self._last_end = None
            return None
        self._has_stored = False
        self._grow()
        places = self._places.most_urgent(self.limit)
        if not len(places):
            # Blocks are so few that all had to go; they come back once they have been prefilled.
            return self._plan_receive() if self._arrivals else None
        return self._plan_call(places)

    def _plan_receive(self) -> ReceivePlan:
        self._num_received += 1
        transfer_id, number = self._arrivals.popleft()
        transfer = self.owner.transfer(transfer_id)
        return (
            empty_receive(transfer_id, number) if transfer is None else transfer.receive(number, self.sizes.block_size)
        )

    def _can_call(self) -> bool:
        num_running = self.num_running
        return num_running > 0 and not (self.is_patient and num_running < len(self.attempts))

    def _grow(self) -> None:
        self.generated.make_room(self._places)
        for place, more in self._places.grow(self.call_tokens, self.owner.preempt):
            if self._has_joined[place]:
                had = int(self._places.num_blocks[place]) - len(more)
                first, known = self._grown.get(place, (had, []))
                self._grown[place] = (first, known + more)

    def _plan_call(self, places: np.ndarray) -> DecodePlan:
        most = max(np.bincount(places // self.sizes.num_places).tolist())
        variant = self._variant_for(most, int(self._shape_idx[places].max()))
        joins = places[~self._has_joined[places]]
        self._has_joined[joins] = True
        is_split = variant.num_slots % 2 == 0
        return DecodePlan(
            number=self._next_number(),
            variant=variant,
            microbatches=self.autotune.choice if is_split else min(self.sizes.microbatches),
            attempt_ids=self._places.ids[places],
            places=places.astype(np.int32),
            joins=self._joins(joins),
            growth=self._growth(places),
            logprob_rows=np.flatnonzero(self._wants_logprobs[places]).astype(np.int32),
        )

    def _joins(self, places: np.ndarray) -> DecodeJoins:
        attempts = self._places.at(places)
        requests = [attempt.request for attempt in attempts]
        return DecodeJoins(
            places=places.astype(np.int32),
            token_ids=np.array([one.token_ids[-1] for one in requests], np.int32),
            positions=self._places.num_cached[places].astype(np.int32),
            last_positions=self._places.last_positions(places),
            blocks=Ragged.of([attempt.decode.blocks.ids for attempt in attempts if attempt.decode is not None]),
            sampling=sampling_rows(requests),
            history=Ragged.of([one.token_ids if one.sampling.has_penalties else () for one in requests]),
        )

    def _growth(self, planned: np.ndarray) -> DecodeGrowth:
        is_planned = np.zeros(len(self._has_joined), bool)
        is_planned[planned] = True
        places = [place for place in self._grown if is_planned[place]]
        grown = [self._grown.pop(place) for place in places]
        index = np.array(places, np.int64)
        return DecodeGrowth(
            places=index.astype(np.int32),
            first=np.array([first for first, _ in grown], np.int32),
            blocks=Ragged.of([blocks for _, blocks in grown]),
            last_positions=self._places.last_positions(index),
        )

    def _variant_for(self, num_slots: int, shape_index: int) -> DecodeVariant:
        """The smallest that so many sequences of a rank fit, of those with a shape, or where none of them is compiled
        yet, with the next one."""
        shapes = self._variant_shapes()
        sizes = [(shapes.index(one.sampling), one.num_slots) for one in self.variants]
        fitting = [size for size in sizes if size[0] >= shape_index and size[1] >= num_slots]
        return self.variants[sizes.index(min(fitting))]

    def _variant_shapes(self) -> list[SamplingShape]:
        """The different ones, each with room for all before it."""
        return list(dict.fromkeys(one.sampling for one in self.variants))

    def _shape_index(self, needed: SamplingShape) -> int:
        for index, shape in enumerate(self._variant_shapes()):
            if shape.covers(needed):
                return index
        raise ValueError(f"{self.name}: no call is compiled for {needed}")

    # -- commit -------------------------------------------------------------------------------------------------------

    def _commit_work(self, plan: Plan, result: Result, now: float) -> None:
        if isinstance(plan, ReceivePlan):
            self._commit_receive(plan)
        elif isinstance(plan, StorePlan):
            self.stores.commit()
        else:
            assert isinstance(plan, DecodePlan)
            assert isinstance(result, DecodeResult)
            self._commit_call(plan, result, now)

    def _commit_receive(self, plan: ReceivePlan) -> None:
        transfer = self.owner.transfer(plan.transfer_id)
        if transfer is None:
            return
        lengths = plan.segments.stops - plan.segments.starts
        for attempt_id, length in zip(plan.attempt_ids.tolist(), lengths.tolist(), strict=True):
            if attempt_id in transfer.missing:
                transfer.missing[attempt_id] -= length
                if transfer.missing[attempt_id] == 0:
                    attempt = self.attempts[attempt_id]
                    self._places.is_running[self._places.place_of(attempt)] = True
                    self.owner.arrived(attempt)

    def _commit_call(self, plan: DecodePlan, result: DecodeResult, now: float) -> None:
        self.stepped()
        self.num_steps += plan.variant.num_steps
        self.slot_load.add(result.slot_load)
        if plan.variant.num_slots == self.variants[-1].num_slots:
            self.autotune.add(plan.microbatches, result.seconds / plan.variant.num_steps)
        counts, is_alive = self._take_tokens(plan, result)
        num_taken = int(counts.sum())
        self.num_tokens += num_taken
        self._places.num_cached[plan.places[is_alive]] += counts[is_alive]
        self._note_drafts(plan, result, is_alive)
        self.calls.append(Call(self._began, now, len(plan.places)))
        begin, self._last_end = self._began if self._last_end is None else self._last_end, now
        if self.controller is not None:
            most = max(np.bincount(plan.places // self.sizes.num_places).tolist())
            self.controller.observe(most, now - begin, num_taken / len(plan.places))

    def _take_tokens(self, plan: DecodePlan, result: DecodeResult) -> tuple[np.ndarray, np.ndarray]:
        """Give requests their tokens; `(how many each row has taken, whether its attempt was not over)`."""
        columns, attempt_of = result.token_ids.T.tolist(), self.attempts.get
        least = int(result.token_ids.min(initial=0))
        log_index = {row: index for index, row in enumerate(plan.logprob_rows.tolist())}
        counts, is_alive = [0] * len(columns), [False] * len(columns)
        taken: list[tuple[Request, int]] = []
        for row, (attempt_id, column) in enumerate(zip(plan.attempt_ids.tolist(), columns, strict=True)):
            attempt = attempt_of(attempt_id)
            if attempt is None:
                continue
            request = attempt.request
            if least < 0:
                # -1 is a gap, and what is below it a problem: hardly ever there, and thousands of columns to look at.
                if least < -1 and (problem := next(filter(None, map(token_problem, column)), None)):
                    self.owner.refuse(request, f"{request.request_id}: {problem}")
                    continue
                column = [token for token in column if token >= 0]
            counts[row] = count = request.append(column)
            is_alive[row] = True
            taken.append((request, count))
            if row in log_index:
                self._note_logprobs(attempt, result, row, log_index[row], count)
        self.owner.generated(taken)
        for request, _ in taken:
            if request.finish_reason is not None:
                self.generated.ended(request)
                self.owner.finish(request)
        return np.array(counts, np.int64), np.array(is_alive)

    def _note_logprobs(self, attempt: Attempt, result: DecodeResult, row: int, index: int, count: int) -> None:
        assert result.logprobs is not None
        request, column = attempt.request, result.token_ids[:, row]
        num_top, width = request.sampling.logprobs or 0, len(result.logprobs.chosen) // len(column)
        request.logprobs[len(request.token_ids) - count :] = [
            result.logprobs.at(step * width + index, int(column[step]), num_top)
            for step in np.flatnonzero(column >= 0)[:count].tolist()
        ]

    def _note_drafts(self, plan: DecodePlan, result: DecodeResult, is_alive: np.ndarray) -> None:
        width = self.sizes.num_drafts + 1
        per_step = (result.token_ids >= 0).reshape(plan.variant.num_steps, width, -1).sum(1)[:, is_alive]
        self.kept_drafts += np.bincount(per_step[per_step > 0] - 1, minlength=width)

    def _commit_change(self, plan: Plan) -> None:
        if isinstance(plan, RestartPlan):
            self._arrivals.clear()  # what had arrived before it is gone
        if isinstance(plan, CompilePlan) and plan.variants:
            before = self.variants[-1].num_slots
            self.variants = tuple(one for one in plan.variants if isinstance(one, DecodeVariant))
            self._note_largest(before, self.variants[-1].num_slots)
            for attempt in self.attempts.values():
                needed = SamplingShape.for_all([attempt.request.sampling])
                self._shape_idx[self._places.place_of(attempt)] = self._shape_index(needed)
