"""The planner of a prefill instance: which prompts share a step, and what is sent after it (paper section 4.1)."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cmjax.schedule.autotune import StepTimes
from cmjax.schedule.block_stores import BlockStores
from cmjax.schedule.blocks import BlockPool, Ragged, blocks_for
from cmjax.schedule.fetch_policy import FetchPolicy
from cmjax.schedule.planner import Owner, Planner
from cmjax.schedule.plans import CompilePlan, News, Plan, PrefillPlan, PrefillResult, PrefillVariant, Result, SendPlan
from cmjax.schedule.pool_plans import FetchPlan, LookupPlan, PoolPlan, StorePlan
from cmjax.schedule.prefill_cache import CacheSizes, PrefillCache
from cmjax.schedule.request import Attempt, PrefillHold, sampling_rows
from cmjax.schedule.sampling import NOT_FINITE, SamplingShape, token_problem
from cmjax.schedule.stats import InstanceStats, Role
from cmjax.schedule.transfer import Transfer


@dataclasses.dataclass(frozen=True)
class PrefillSizes:
    """Sizes of a prefill instance.

    Attributes:
        num_blocks, block_size: of its cache, which every rank holds whole.
        num_places: prompts that share a step, at most.
        variants: what its step is compiled for, ascending.
        microbatches: numbers of them to choose from.
        cache: of prefixes; None: nothing is cached.
    """

    num_blocks: int
    block_size: int
    num_places: int
    variants: tuple[PrefillVariant, ...]
    microbatches: tuple[int, ...] = (1,)
    cache: CacheSizes | None = None


class Chunk(NamedTuple):
    """Tokens `[start, stop)` of an attempt's prompt, computed in one step."""

    attempt: Attempt
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with it."""
        return self.stop == self.attempt.num_prefill


class PrefillPlanner(Planner):
    """Prompts of a prefill instance: those that wait, and those under way, in the order they will be computed.

    A step computes the first prompts, whole where its tokens last, the last one cut; of the sizes that are compiled it
    has the one by which what waits is done soonest. A prompt needs the blocks of all
    its tokens; one that finds none waits, and those behind it. Those whose prefix is looked up or fetched are left out
    meanwhile. What a step has ended is sent before the next one.
    """

    role: Role = "prefill"

    def __init__(self, name: str, model: str, num_ranks: int, sizes: PrefillSizes, owner: Owner) -> None:
        super().__init__(name, model, num_ranks, sizes.microbatches, owner)
        self.sizes, self.variants = sizes, sizes.variants
        self._times, self._policy = StepTimes(), FetchPolicy()
        self._renew()

    # -- for the scheduler --------------------------------------------------------------------------------------------

    @property
    def load(self) -> int:
        """Tokens that are still to be computed."""
        return self._num_tokens_left

    @property
    def has_room(self) -> bool:
        """Whether it should be given more: it has about two steps of work, so that what waits can still be put in
        another order, or elsewhere."""
        return self.status == "ready" and self._num_tokens_left < 2 * self.variants[-1].num_tokens

    @property
    def stores(self) -> BlockStores:
        return self.cache.stores

    def add(self, attempt: Attempt) -> None:
        """Put an attempt at the end of the queue."""
        self.attempts[attempt.id] = self._queue[attempt.id] = attempt
        self._num_tokens_left += attempt.num_prefill
        self.cache.add(attempt)

    def send(self, transfer: Transfer) -> None:
        """Send what a step has ended."""
        self._outgoing.append(transfer)

    def drop(self, attempt: Attempt) -> None:
        self.attempts.pop(attempt.id, None)
        self.cache.drop(attempt)
        if self._queue.pop(attempt.id, None) is not None:
            self._num_tokens_left -= attempt.num_prefill - attempt.num_computed

    def stats(self) -> InstanceStats:
        num_running = sum(attempt.prefill is not None for attempt in self._queue.values())
        return InstanceStats(
            name=self.name,
            role=self.role,
            status=self.status,
            ep_size=self.num_ranks,
            num_running=num_running,
            num_waiting=len(self._queue) - num_running,
            num_blocks=self._pool.num_blocks,
            num_used_blocks=self._pool.num_blocks - self._pool.num_free - self.cache.num_idle,
            num_calls=self.num_calls,
            num_tokens=self.num_tokens,
            busy_s=self.busy_s,
            expert_imbalance=self.slot_load.imbalance(self.num_ranks),
        )

    # -- plan ---------------------------------------------------------------------------------------------------------

    def _take_arrivals(self, arrivals: Sequence[News]) -> None:
        for news in arrivals:
            assert not isinstance(news, tuple)  # no hand-off ends here
            self.cache.take(news)

    def _plan_urgent(self) -> Plan | None:
        while self._outgoing:
            plan = self._outgoing[0].next_send(self.sizes.block_size)
            if plan is not None:
                return plan
            self._outgoing.popleft()
        return None

    def _plan_work(self, now: float) -> Plan | None:
        self.cache.settle(now)
        chunks = list(self._next_chunks(now))
        # All that a step has computed is read before the next one.
        pool_plan = self.cache.plan(now) or self.stores.plan()
        if pool_plan is not None:
            return pool_plan
        return self._plan_step(chunks, now) if chunks else None

    def _next_chunks(self, now: float) -> Iterable[Chunk]:
        """What the next step computes; those that begin get their blocks, and so do those behind them that the pool has
        something for.

        Example: prompts of 5 and 4 tokens with 6 tokens a step give the tokens 0 to 4 and 0, then 1 to 3.
        """
        sizes = sorted({one.num_tokens for one in self.variants})
        num_left, is_full = self._times.first_step(min(self._num_tokens_left, sizes[-1]), sizes), False
        for attempt in itertools.islice(self._queue.values(), self.sizes.num_places):
            if self.cache.is_asking(attempt) or (num_left == 0 and not self.cache.has_found(attempt)):
                continue
            if attempt.prefill is None:
                # Nobody begins before one that finds no room; those that have begun while it was asking go on.
                is_full = is_full or not self._begin(attempt, now)
            if attempt.prefill is None or num_left == 0 or self.cache.is_waiting(attempt):
                continue
            chunk = Chunk(attempt, attempt.num_computed, min(attempt.num_prefill, attempt.num_computed + num_left))
            num_left -= chunk.stop - chunk.start
            yield chunk

    def _begin(self, attempt: Attempt, now: float) -> bool:
        """Give an attempt its place and blocks, some of them with its prefix; False where there is no room."""
        if not self._places.num_free:
            return False
        needed = blocks_for(attempt.num_prefill, self.sizes.block_size)
        blocks = self.cache.hold(attempt, needed, now)
        if blocks is None:
            return False
        attempt.prefill = PrefillHold(self._places.take(1), blocks)
        self._num_tokens_left -= attempt.num_computed
        return True

    def _plan_step(self, chunks: Sequence[Chunk], now: float) -> PrefillPlan:
        requests = [chunk.attempt.request for chunk in chunks]
        token_ids: list[int] = []
        next_token_ids: list[int] = []
        for (attempt, start, stop), request in zip(chunks, requests, strict=True):
            token_ids += request.prefill_slice(start, stop)
            next_token_ids += request.prefill_slice(start + 1, min(stop + 1, attempt.num_prefill))
            if stop == attempt.num_prefill:
                next_token_ids.append(-1)
        needed = SamplingShape.for_all(one.sampling for one in requests)
        is_plain = not needed.is_sampled and needed.num_logprobs is None
        variant = self._variant_for(len(token_ids), needed)
        begins = [row for row, chunk in enumerate(chunks) if not _held(chunk.attempt).has_joined]
        for row in begins:
            self._note_begin(chunks[row].attempt, now)
        wants_first = [
            chunk.is_last and one.sampling.logprobs is not None and not one.is_resumed
            for chunk, one in zip(chunks, requests, strict=True)
        ]
        wants_prompt = [one.sampling.prompt_logprobs is not None and not one.is_resumed for one in requests]
        return PrefillPlan(
            number=self._next_number(),
            variant=variant,
            microbatches=self.autotune.choice,
            attempt_ids=np.array([chunk.attempt.id for chunk in chunks], np.int64),
            places=np.array([_held(chunk.attempt).place.ids[0] for chunk in chunks], np.int32),
            starts=np.array([chunk.start for chunk in chunks], np.int32),
            stops=np.array([chunk.stop for chunk in chunks], np.int32),
            is_last=np.array([chunk.is_last for chunk in chunks]),
            token_ids=np.array(token_ids, np.int32),
            next_token_ids=np.array(next_token_ids, np.int32),
            joins=np.array(begins, np.int32),
            blocks=Ragged.of([_held(chunks[row].attempt).blocks.ids for row in begins]),
            sampling=None if is_plain else sampling_rows(requests),
            logprob_rows=np.flatnonzero(wants_first).astype(np.int32),
            prompt_logprob_rows=np.flatnonzero(wants_prompt).astype(np.int32),
            oldest_step=min((one.step for one in self._outgoing), default=self._num_plans),
        )

    def _note_begin(self, attempt: Attempt, now: float) -> None:
        """The first step of an attempt."""
        _held(attempt).has_joined = True
        request = attempt.request
        request.times.scheduled = now if request.times.scheduled is None else request.times.scheduled
        if not request.is_resumed:
            request.num_cached_tokens = attempt.num_computed

    def _variant_for(self, num_tokens: int, needed: SamplingShape) -> PrefillVariant:
        """The least that can do what is needed, then the smallest that so many tokens fit."""
        shapes = list(dict.fromkeys(one.sampling for one in self.variants))
        fitting = [one for one in self.variants if one.num_tokens >= num_tokens and one.sampling.covers(needed)]
        if not fitting:
            raise ValueError(f"{self.name}: no step is compiled for {num_tokens} tokens with {needed}")
        return min(fitting, key=lambda one: (shapes.index(one.sampling), one.num_tokens))

    # -- commit -------------------------------------------------------------------------------------------------------

    def _commit_work(self, plan: Plan, result: Result, now: float) -> None:
        if isinstance(plan, SendPlan):
            self._commit_send(plan)
        elif isinstance(plan, PrefillPlan):
            assert isinstance(result, PrefillResult)
            self._commit_step(plan, result, now)
        else:
            assert isinstance(plan, PoolPlan)
            self._num_tokens_left -= self.cache.commit(plan)

    def _fail_pool(self, plan: LookupPlan | FetchPlan | StorePlan) -> None:
        self.cache.commit(plan, has_failed=True)

    def _commit_send(self, plan: SendPlan) -> None:
        """Those whose last tokens have been read need their blocks here no longer."""
        for attempt_id in plan.attempt_ids[plan.segments.hidden_rows >= 0].tolist():
            attempt = self.attempts.pop(attempt_id, None)
            if attempt is not None:
                self.cache.drop(attempt)
                attempt.leave_source()

    def _commit_step(self, plan: PrefillPlan, result: PrefillResult, now: float) -> None:
        self.stepped()
        self.num_tokens += len(plan.token_ids)
        self.slot_load.add(result.slot_load)
        self._times.add(plan.variant.num_tokens, result.seconds)
        if plan.variant.num_tokens == self.variants[-1].num_tokens:
            self.autotune.add(plan.microbatches, result.seconds)
        self._note_logprobs(plan, result)
        travelling: dict[str, list[tuple[Attempt, int]]] = collections.defaultdict(list)
        begins = np.cumsum(plan.stops - plan.starts) - (plan.stops - plan.starts)
        rows = zip(plan.attempt_ids.tolist(), plan.stops.tolist(), begins.tolist(), strict=True)
        for row, (attempt_id, stop, begin) in enumerate(rows):
            attempt = self.attempts.get(attempt_id)
            if attempt is None:
                continue
            start, attempt.num_computed = attempt.num_computed, stop
            self._num_tokens_left -= stop - start
            if result.token_ids[row] != NOT_FINITE:
                self.cache.computed(attempt, start, stop, plan.number, begin)
            if stop == attempt.num_prefill:
                del self._queue[attempt_id]
                if self._take_first_token(attempt, int(result.token_ids[row]), now):
                    assert attempt.target is not None
                    travelling[attempt.target].append((attempt, row))
        for target, ended in travelling.items():
            self.owner.hand_off(self.name, target, plan.number, ended, now)

    def _take_first_token(self, attempt: Attempt, token_id: int, now: float) -> bool:
        """Give a request the token that its prefill has made; whether it goes on to decode."""
        request = attempt.request
        if problem := token_problem(token_id):
            self.owner.refuse(request, f"{request.request_id}: {problem}")
            return False
        if not request.is_resumed:
            request.times.prefilled = now
            request.append([token_id])
            self.owner.generated([(request, 1)], num_prompt_tokens=len(request.prompt_ids))
        if request.finish_reason is not None:
            self.owner.finish(request)
            return False
        return True

    def _note_logprobs(self, plan: PrefillPlan, result: PrefillResult) -> None:
        """Give requests the log probabilities that they asked for, of prompts and of first tokens."""
        begin = 0
        for row in plan.prompt_logprob_rows.tolist():
            start, stop = int(plan.starts[row]), int(plan.stops[row])
            attempt = self.attempts.get(int(plan.attempt_ids[row]))
            if attempt is not None:
                assert result.prompt_logprobs is not None
                request = attempt.request
                num_top = request.sampling.prompt_logprobs or 0
                following = request.prompt_ids[start + 1 : stop + 1]
                # Computed once more after a failure, they replace what was there.
                request.prompt_logprobs[start + 1 :] = [
                    result.prompt_logprobs.at(begin + index, token, num_top) for index, token in enumerate(following)
                ]
            begin += stop - start
        for index, row in enumerate(plan.logprob_rows.tolist()):
            attempt = self.attempts.get(int(plan.attempt_ids[row]))
            if attempt is not None:
                assert result.logprobs is not None
                num_top = attempt.request.sampling.logprobs or 0
                attempt.request.logprobs = [result.logprobs.at(index, int(result.token_ids[row]), num_top)]

    def _commit_change(self, plan: Plan) -> None:
        if isinstance(plan, CompilePlan) and plan.variants:
            before = self.variants[-1].num_tokens
            self.variants = tuple(one for one in plan.variants if isinstance(one, PrefillVariant))
            self._note_largest(before, self.variants[-1].num_tokens)

    def _renew(self) -> None:
        sizes = self.sizes
        self._pool = BlockPool(sizes.num_blocks, self.fence)
        self.cache = PrefillCache(
            sizes.cache,
            self._pool,
            sizes.block_size,
            self.owner.cache_counts,
            policy=self._policy,
            times=self._times,
        )
        self._places = BlockPool(sizes.num_places, self.fence)
        self._queue: dict[int, Attempt] = {}
        self._outgoing: collections.deque[Transfer] = collections.deque()
        self._num_tokens_left = 0


def _held(attempt: Attempt) -> PrefillHold:
    assert attempt.prefill is not None
    return attempt.prefill
