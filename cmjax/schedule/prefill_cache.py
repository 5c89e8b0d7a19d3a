"""The prefix cache of a prefill instance (paper section 4.4.2): what its prompts need not compute, because it lies in
the instance's own blocks or in the memory pool, and what it stores there."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from cmjax.schedule.autotune import StepTimes
from cmjax.schedule.block_stores import BlockStores, OutgoingBlock
from cmjax.schedule.blocks import BlockPool, Lease
from cmjax.schedule.fetch_policy import FetchPolicy, PoolBlock, PoolRate
from cmjax.schedule.pool_plans import FetchPlan, Found, LoadPlan, LookupPlan, PoolNews, PoolPlan, Stored, StorePlan
from cmjax.schedule.prefix import BlockChain, PrefixBlocks
from cmjax.schedule.request import Attempt
from cmjax.schedule.stats import CacheStats

# A fetch may take twice as long as computing what it is of, and `LEAST_PATIENCE_S` at least, before that is done
# instead; a lookup as long as a fetch of all that it might find, and `MOST_PATIENCE_S` at most.
LEAST_PATIENCE_S, MOST_PATIENCE_S = 0.1, 5.0


@dataclasses.dataclass(frozen=True)
class CacheSizes:
    """Sizes of a prefix cache.

    Attributes:
        block_tokens: of a cached block; a multiple of the instance's block size.
        needs_next: whether there is an MTP module, see `PrefixBlocks`.
        has_pool: whether there is a memory pool.
        plan_blocks: cached blocks that a plan loads or stores, at most.
        is_priced: whether what is expected to take longer than computing it is left where it is.
        keeps_generated: whether blocks with tokens that the model made are stored.
    """

    block_tokens: int
    needs_next: bool = False
    has_pool: bool = True
    plan_blocks: int = 16
    is_priced: bool = True
    keeps_generated: bool = False


@dataclasses.dataclass(eq=False, slots=True)
class _Pull:
    """Blocks that an attempt wants of the pool.

    Attributes:
        first: the first of them, among the cached blocks of its prompt.
        names: of all from there on that it could use.
        deadline: when it is computed instead.
        num_blocks: that are fetched.
        num_arrived, num_loaded: of these.
    """

    attempt: Attempt
    first: int
    names: tuple[bytes, ...]
    stage: Literal["new", "lookup", "found", "wanted", "fetch", "load"] = "new"
    deadline: float = float("inf")
    found: tuple[PoolBlock, ...] = ()
    num_blocks: int = 0
    num_arrived: int = 0
    num_loaded: int = 0

    @property
    def fetched(self) -> tuple[PoolBlock, ...]:
        """Of those found, those that are fetched."""
        return self.found[: self.num_blocks]


class PrefillCache:
    """What is known of prefixes by one instance, and its transfers from and to the pool.

    Args:
        sizes: None: nothing is cached.
        pool: the blocks of the instance; block_size: tokens of each.
        counts: of all instances.
        policy, times: what has been learnt of the pool and of steps, which outlives a failure of the instance.
    """

    def __init__(
        self,
        sizes: CacheSizes | None,
        pool: BlockPool,
        block_size: int,
        counts: CacheStats,
        *,
        policy: FetchPolicy,
        times: StepTimes,
    ) -> None:
        self._sizes, self._pool, self._counts, self._policy, self._times = sizes, pool, counts, policy, times
        self._block_tokens = sizes.block_tokens if sizes else 1
        self._per_block = self._block_tokens // block_size
        self._prefixes = PrefixBlocks(pool, needs_next=bool(sizes and sizes.needs_next))
        self._rates: Mapping[str, PoolRate] = {}
        self._pulls: dict[int, _Pull] = {}
        self._unwanted: list[int] = []  # attempts whose blocks have come too late
        self.stores = BlockStores(sizes.plan_blocks if sizes else 1, counts)

    # -- of the planner -----------------------------------------------------------------------------------------------

    @property
    def num_idle(self) -> int:
        """Blocks of the instance that nobody uses, kept for what they hold."""
        return self._prefixes.num_idle

    def add(self, attempt: Attempt) -> None:
        """An attempt has come: name its blocks, and see to those that the instance does not have."""
        chain = attempt.request.chain
        if self._sizes is None or chain is None:
            return
        if len(chain.names) < attempt.num_prefill // self._block_tokens:
            chain.extend(attempt.request.prefill_slice(0, attempt.num_prefill))
        first, most = len(self._shared(attempt)), self._most(attempt)
        if self._sizes.has_pool and self._chain(attempt) is not None and first < most:
            self._pulls[attempt.id] = _Pull(attempt, first, tuple(chain.names[first:most]))

    def is_waiting(self, attempt: Attempt) -> bool:
        """Whether what the pool has of it may still come."""
        return attempt.id in self._pulls

    def is_asking(self, attempt: Attempt) -> bool:
        """Whether it is not known yet what the pool has of it."""
        pull = self._pulls.get(attempt.id)
        return pull is not None and pull.stage in ("new", "lookup")

    def has_found(self, attempt: Attempt) -> bool:
        """Whether the pool has some of it that can be fetched once there are blocks for it."""
        pull = self._pulls.get(attempt.id)
        return pull is not None and pull.stage == "found" and bool(pull.found)

    def hold(self, attempt: Attempt, num_blocks: int, now: float) -> Lease | None:
        """Blocks for an attempt's tokens, those that hold its prefix first; what the pool has of it, and is worth it,
        will be fetched. None, and nothing is held, where there are too few."""
        shared = self._shared(attempt)
        blocks = [block for ids in shared for block in ids]
        lease = self._pool.share(blocks)
        if not self._prefixes.make_room(num_blocks - len(blocks)):
            lease.give_back()
            return None
        lease.extend(num_blocks - len(blocks))
        attempt.num_computed = len(shared) * self._block_tokens
        if self._chain(attempt) is not None and not attempt.request.is_resumed:
            self._counts.num_queried += attempt.num_prefill
            self._counts.num_hits += attempt.num_computed
        pull = self._pulls.get(attempt.id)
        if pull is not None and len(shared) < pull.first:
            # The instance has let go of some meanwhile: the pool is asked for these, too.
            names = self._chain_of(attempt).names[len(shared) : self._most(attempt)]
            self._pulls[attempt.id] = _Pull(attempt, len(shared), tuple(names))
        elif pull is not None:
            self._choose(pull, len(shared), now)
        return lease

    def computed(self, attempt: Attempt, start: int, stop: int, step: int, row: int) -> None:
        """A step has computed tokens `[start, stop)` of an attempt, the first of them its token `row`: what blocks they
        fill is kept, and stored."""
        chain, size = attempt.request.chain, self._block_tokens
        if chain is None or self._sizes is None:
            return
        for index in range(start // size, stop // size):
            self._keep(attempt, index)
            if self._is_to_be_stored(attempt, index):
                lease = self._pool.share(self._blocks(attempt, index))
                name, token_ids = chain.names[index], chain.token_ids[index]
                hidden_row = row + (index + 1) * size - 1 - start
                self.stores.add(OutgoingBlock(name, chain.namespace, token_ids, lease, step, hidden_row))

    def drop(self, attempt: Attempt) -> None:
        """An attempt gives back what it holds: it is over, or has been sent."""
        if self._sizes is not None and attempt.request.chain is not None and attempt.prefill is not None:
            self._touch(attempt, attempt.num_computed // self._block_tokens)
        pull = self._pulls.pop(attempt.id, None)
        if pull is not None and pull.stage == "load":
            self._unwanted.append(attempt.id)

    def clear(self) -> None:
        """Keep nothing, and store all anew."""
        self._prefixes.clear()
        self.stores.clear()

    # -- plans --------------------------------------------------------------------------------------------------------

    def take(self, news: PoolNews) -> None:
        """Something has come of what was asked of the pool."""
        if isinstance(news, Stored):
            self.stores.take(news)
            return
        pull = self._pulls.get(news.attempt_id)
        if isinstance(news, Found):
            self._rates = news.rates or self._rates
            if pull is not None and pull.stage == "lookup":
                self._take_found(pull, news)
        elif pull is None or pull.stage != "fetch":
            self._unwanted.append(news.attempt_id)
        else:
            self._counts.num_failed_loads += pull.num_blocks - news.num_blocks
            pull.num_arrived, pull.stage = news.num_blocks, "load"
            self._policy.note(pull.fetched, is_late=False)
            self.stores.forget(pull.names[news.num_blocks : pull.num_blocks])
            if not news.num_blocks:
                self._end(pull)

    def plan(self, now: float) -> PoolPlan | None:
        """What to ask of the pool, or to write into the cache; nothing of it takes long."""
        if self._unwanted:
            return self._throw_away(self._unwanted.pop())
        new = [pull for pull in self._pulls.values() if pull.stage == "new"]
        if new:
            for pull in new:
                patience_s = min(self._patience_s(len(pull.names)), MOST_PATIENCE_S)
                pull.stage, pull.deadline = "lookup", now + patience_s
            return LookupPlan(
                attempt_ids=np.array([pull.attempt.id for pull in new], np.int64),
                namespaces=tuple(self._chain_of(pull.attempt).namespace for pull in new),
                names=tuple(pull.names for pull in new),
            )
        by_stage = {pull.stage: pull for pull in reversed(self._pulls.values())}
        if "wanted" in by_stage:
            return self._plan_fetch(by_stage["wanted"])
        return self._plan_load(by_stage["load"]) if "load" in by_stage else None

    def commit(self, plan: PoolPlan, *, has_failed: bool = False) -> int:
        """A plan has been run; returns the tokens that an attempt need not compute any more."""
        if isinstance(plan, StorePlan):
            self.stores.commit(has_failed=has_failed)
        elif isinstance(plan, LoadPlan):
            return self._commit_load(plan)
        elif has_failed:
            ids = plan.attempt_ids.tolist() if isinstance(plan, LookupPlan) else [plan.attempt_id]
            for pull in [self._pulls[one] for one in ids if one in self._pulls]:
                self._give_up(pull)
        return 0

    # -- inside -------------------------------------------------------------------------------------------------------

    def _chain(self, attempt: Attempt) -> BlockChain | None:
        """Of an attempt that may skip tokens; log probabilities of a prompt are those of a step that computes it."""
        request = attempt.request
        is_scored = request.sampling.prompt_logprobs is not None and not request.is_resumed
        return None if self._sizes is None or is_scored else request.chain

    def _chain_of(self, attempt: Attempt) -> BlockChain:
        chain = attempt.request.chain
        assert chain is not None
        return chain

    def _most(self, attempt: Attempt) -> int:
        """Cached blocks that it could use: one token at least is computed, since the first new one follows from it."""
        return (attempt.num_prefill - 1) // self._block_tokens

    def _next_token(self, attempt: Attempt, index: int) -> int | None:
        end = (index + 1) * self._block_tokens
        return attempt.request.prefill_slice(end, end + 1)[0] if end < attempt.num_prefill else None

    def _next_tokens(self, attempt: Attempt, blocks: Iterable[int]) -> np.ndarray:
        """`int32[n]`, after blocks that are not the end of a prompt."""
        return np.array([self._next_token(attempt, index) for index in blocks], np.int32)

    def _blocks(self, attempt: Attempt, index: int) -> list[int]:
        assert attempt.prefill is not None
        return attempt.prefill.blocks.ids[index * self._per_block : (index + 1) * self._per_block]

    def _shared(self, attempt: Attempt) -> list[list[int]]:
        """The instance's blocks that hold its prefix, a list a cached block."""
        chain, found = self._chain(attempt), []
        for index in range(self._most(attempt) if chain else 0):
            assert chain is not None
            blocks = self._prefixes.find(chain.names[index], chain.token_ids[index], self._next_token(attempt, index))
            if blocks is None:
                break
            found.append(blocks)
        return found

    def _keep(self, attempt: Attempt, index: int) -> None:
        chain = self._chain_of(attempt)
        next_token = self._next_token(attempt, index)
        self._prefixes.add(chain.names[index], chain.token_ids[index], next_token, self._blocks(attempt, index))

    def _touch(self, attempt: Attempt, num_blocks: int) -> None:
        names = self._chain_of(attempt).names
        self._prefixes.touch((names[index], self._next_token(attempt, index)) for index in range(num_blocks))

    def _is_to_be_stored(self, attempt: Attempt, index: int) -> bool:
        assert self._sizes is not None
        is_prompt = (index + 1) * self._block_tokens <= len(attempt.request.prompt_ids)
        is_new = self._chain_of(attempt).names[index] not in self.stores
        return self._sizes.has_pool and is_new and (is_prompt or self._sizes.keeps_generated)

    def _take_found(self, pull: _Pull, news: Found) -> None:
        self._counts.num_failed_lookups += news.has_failed
        pull.found, pull.stage = news.blocks, "found"
        self.stores.note(pull.names[: len(news.blocks)])
        self.stores.forget(pull.names[len(news.blocks) :])  # the pool has let go of them

    @property
    def _block_s(self) -> float | None:
        """Seconds that computing a cached block takes, where that is known and asked."""
        token_s = self._times.token_s if self._sizes and self._sizes.is_priced else None
        return None if token_s is None else token_s * self._block_tokens

    def _patience_s(self, num_blocks: int) -> float:
        block_s = self._block_s
        return MOST_PATIENCE_S if block_s is None else max(2 * num_blocks * block_s, LEAST_PATIENCE_S)

    def _choose(self, pull: _Pull, num_shared: int, now: float) -> None:
        """Fetch what is worth it, after the blocks that the instance has by now."""
        found = pull.found[num_shared - pull.first :]
        count = self._policy.choose(found, self._rates, self._block_s)
        self._counts.num_declined += len(found) - count
        if not pull.attempt.request.is_resumed:
            self._counts.num_pool_queried += pull.attempt.num_prefill - num_shared * self._block_tokens
        if not count:
            self._end(pull)
            return
        self._counts.num_fetches += 1
        pull.names, pull.found, pull.first = pull.names[num_shared - pull.first :], found, num_shared
        pull.stage, pull.num_blocks, pull.deadline = "wanted", count, now + self._patience_s(count)

    def _plan_fetch(self, pull: _Pull) -> FetchPlan:
        chain, stop = self._chain_of(pull.attempt), pull.first + pull.num_blocks
        pull.stage = "fetch"
        return FetchPlan(
            attempt_id=pull.attempt.id,
            namespace=chain.namespace,
            names=tuple(chain.names[pull.first : stop]),
            token_ids=np.stack(chain.token_ids[pull.first : stop]),
            next_token_ids=self._next_tokens(pull.attempt, range(pull.first, stop)),
        )

    def _plan_load(self, pull: _Pull) -> LoadPlan:
        assert self._sizes is not None
        first = pull.num_loaded
        stop = min(pull.num_arrived, first + self._sizes.plan_blocks)
        blocks = range(pull.first + first, pull.first + stop)
        return LoadPlan(
            attempt_id=pull.attempt.id,
            first=first,
            blocks=np.array([self._blocks(pull.attempt, index) for index in blocks], np.int32),
            last_positions=np.array([(index + 1) * self._block_tokens - 1 for index in blocks], np.int32),
            next_token_ids=self._next_tokens(pull.attempt, blocks),
            is_last=stop == pull.num_arrived,
        )

    def _throw_away(self, attempt_id: int) -> LoadPlan:
        nothing = np.zeros(0, np.int32)
        return LoadPlan(attempt_id, 0, nothing.reshape(0, self._per_block), nothing, nothing, is_last=True)

    def _commit_load(self, plan: LoadPlan) -> int:
        pull = self._pulls.get(plan.attempt_id)
        if pull is None or not len(plan.blocks):
            return 0
        for index in range(pull.first + pull.num_loaded, pull.first + pull.num_loaded + len(plan.blocks)):
            self._keep(pull.attempt, index)
        pull.num_loaded += len(plan.blocks)
        num_tokens = len(plan.blocks) * self._block_tokens
        pull.attempt.num_computed += num_tokens
        if not pull.attempt.request.is_resumed:
            self._counts.num_pool_hits += num_tokens
        if plan.is_last:
            self._end(pull)
        return num_tokens

    def settle(self, now: float) -> None:
        """Wait no longer for what has not come in time; decide on what has been found for those that have blocks."""
        for pull in list(self._pulls.values()):
            if pull.stage in ("lookup", "fetch") and now > pull.deadline:
                self._policy.note(pull.fetched, is_late=True)
                self._give_up(pull)
            elif pull.stage == "found" and pull.attempt.prefill is not None:
                self._choose(pull, pull.first, now)

    def _give_up(self, pull: _Pull) -> None:
        """What an attempt waits for does not come."""
        self._counts.num_failed_lookups += pull.stage == "lookup"
        self._counts.num_failed_loads += pull.num_blocks
        self._end(pull)

    def _end(self, pull: _Pull) -> None:
        """Nothing more comes for an attempt."""
        self._pulls.pop(pull.attempt.id, None)
