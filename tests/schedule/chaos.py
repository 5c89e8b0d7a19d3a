"""A cluster to which anything may happen, and what must hold whatever does."""

import collections
import dataclasses
import pickle
import random
from typing import Any, Literal, NoReturn

import numpy as np

from cmjax.schedule import (
    MAX_FAILURES,
    MAX_STEP_STOPS,
    NOT_FINITE,
    NOT_FINITE_MESSAGE,
    Attempt,
    BlockChain,
    CacheSizes,
    CacheStats,
    CompilePlan,
    DecodePlan,
    DecodePlanner,
    Executor,
    FetchPlan,
    InstanceChange,
    LoadPlan,
    LookupPlan,
    News,
    Plan,
    Planner,
    PoolPlan,
    PoolRate,
    PrefillPlan,
    PrefillPlanner,
    ReceivePlan,
    Request,
    RequestTimes,
    RequestUpdate,
    RestartPlan,
    Result,
    Role,
    SamplingParams,
    SendPlan,
    SloController,
    StorePlan,
)
from cmjax.schedule.virtual import VirtualBlock, VirtualCluster, VirtualError
from tests.schedule.clusters import BLOCK, decode_sizes, expected_tokens, logprob_of, make_chain, prefill_sizes
from tests.schedule.invariants import check_scheduler

TIMEOUT_S = 1.0
LONGEST_PROMPT, MOST_TOKENS = 20, 24
MAX_BLOCKS = -(-(LONGEST_PROMPT + MOST_TOKENS) // BLOCK)
MOST_INSTANCES, MOST_PLANS = 3, 20_000
STAGES = ("waiting", "prefill", "handoff", "decode")
ROLES: tuple[Role, Role] = ("prefill", "decode")

Moment = Literal["before", "after"]
MOMENTS: tuple[Moment, Moment] = ("before", "after")
KINDS = ("greedy", "greedy", "sampled", "stop", "far stop", "logprobs")
PLAN_NAMES = {
    PrefillPlan: "step",
    DecodePlan: "call",
    SendPlan: "send",
    ReceivePlan: "receive",
    CompilePlan: "compile",
    RestartPlan: "restart",
    LookupPlan: "lookup",
    FetchPlan: "fetch",
    LoadPlan: "load",
    StorePlan: "store",
}
# A tier that is worth it, and one that is not.
RATES = {"dram": PoolRate(0.002, 1000.0), "disk": PoolRate(0.01, 10.0)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a history begins with.

    Attributes:
        seed: of what is left to chance: prompts, and how long everything takes.
        num_prefill, num_decode: instances.
        num_places: prompts that share a step, and sequences of a rank.
        num_steps, num_drafts: of a decode call.
        prefill_blocks, decode_blocks: of an instance, of a rank; what is more than enough for one request.
        is_limited: a controller says how many sequences run together.
        is_patient: calls wait until all have arrived.
        is_cached: whether there is a prefix cache, of one kind or another.
    """

    seed: int
    num_prefill: int = 1
    num_decode: int = 1
    num_places: int = 3
    num_steps: int = 2
    num_drafts: int = 0
    prefill_blocks: int = 30
    decode_blocks: int = 20
    is_limited: bool = False
    is_patient: bool = False
    is_cached: bool = False


class Wrapped:
    """An executor as in another process, whose runs may fail before they have any effect, or after."""

    def __init__(self, name: str, inner: Executor, chaos: "Chaos") -> None:
        self._name, self._inner, self._chaos = name, inner, chaos
        self._is_broken = False  # a failed run has taken the cache along

    def run(self, plan: Plan) -> Result:
        plan = pickle.loads(pickle.dumps(plan))
        assert isinstance(plan, RestartPlan) or not self._is_broken
        moment = self._chaos.failing_moment(self._name, plan)
        if moment == "before":
            self._fail(plan, moment)
        self._chaos.sending = plan if isinstance(plan, SendPlan) else None
        result = self._inner.run(plan)
        if moment == "after":
            self._fail(plan, moment)
        self._is_broken = False
        return pickle.loads(pickle.dumps(self._chaos.spoil(self._name, plan, result)))

    def _fail(self, plan: Plan, moment: Moment) -> NoReturn:
        # Of other plans a failing one takes the cache along.
        costs_nothing = isinstance(plan, SendPlan | LookupPlan | FetchPlan | StorePlan)
        costs_nothing = costs_nothing or (isinstance(plan, CompilePlan) and not plan.gives_cache)
        self._is_broken = self._is_broken or not costs_nothing
        raise VirtualError(f"{PLAN_NAMES[type(plan)]} {moment}")

    def poll(self) -> list[News]:
        return self._inner.poll()

    @property
    def expects_arrivals(self) -> bool:
        return self._inner.expects_arrivals


@dataclasses.dataclass
class Told:
    """What the client of a request has been told, and what it must be told in the end."""

    expected: list[int]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    is_cancelled: bool = False
    is_spoilt: bool = False


class Chaos:
    """One history: things happen by `do`, and `finish`, without further faults, must bring everything to its end.

    Args:
        counts: what happened, to which this history adds.
    """

    def __init__(self, layout: Layout, counts: "collections.Counter[str]") -> None:
        self.layout, self.counts = layout, counts
        self.random = random.Random(layout.seed)
        self.cluster = VirtualCluster(
            run_s=self._run_s,
            commit_s=self._commit_s,
            handoff_s=self._handoff_s,
            wrap=self._wrap,
            timeout_s=TIMEOUT_S,
        )
        self.scheduler, self.pool = self.cluster.scheduler, self.cluster.pool
        self.pool.rates, self.pool.tier_of = RATES, lambda name: "disk" if name[0] % 4 == 0 else "dram"
        self.pool.delay_s, self.pool.is_refused = self._pool_s, self._is_refused
        # Prompts begin with one of these, two of which begin alike.
        self._stems = [self._random_tokens(LONGEST_PROMPT) for _ in range(4)]
        self._stems[1][:8] = self._stems[0][:8]
        self._chains: list[BlockChain] = []
        self.cache = self._random_cache() if layout.is_cached else None
        if self.cache is not None:
            self._fill_pool(self.cache.block_tokens)
        self.told: dict[Request, Told] = {}
        self.changes: list[InstanceChange] = []
        self.sending: SendPlan | None = None
        self._failing: dict[str, list[Moment]] = collections.defaultdict(list)  # name of a plan -> of those to come
        self._broken: set[str] = set()  # instances all of whose runs fail
        self._round_fates: collections.deque[str] = collections.deque()
        self._newest_arrival: dict[int, float] = {}  # transfer -> of its rounds
        self._num_to_spoil = 0
        self._pool_fates: dict[str, list[str]] = collections.defaultdict(list)  # name of a plan -> of those to come
        self._num_to_refuse = 0
        self._executors: dict[str, Executor] = {}
        # Name -> the plan under way, and whose is what it names: pool, id -> attempts' ids.
        self._under_way: dict[str, tuple[Plan, dict[tuple[int, int], set[int]]]] = {}
        self._planners: dict[str, Planner] = {}  # all there have ever been
        self._lost_by_hand: set[str] = set()
        self._drained: dict[str, frozenset[int]] = {}  # name -> the attempts that it had when it began to drain
        self._num_plans = 0
        self._last_event = 0.0
        for role, count in zip(ROLES, (layout.num_prefill, layout.num_decode), strict=True):
            for _ in range(count):
                self.add(role)

    def do(self, what: str, *args: Any, delay: float = 0.0) -> None:
        """One of the methods below, now or later; what must hold at any time must hold after it."""

        def act() -> None:
            getattr(self, what)(*args)
            self.check()

        if delay > 0:
            self._last_event = max(self._last_event, self.cluster.now + delay)
            self.cluster.at(self.cluster.now + delay, act)
        else:
            act()

    # -- what happens -------------------------------------------------------------------------------------------------

    def submit_some(self, count: int) -> None:
        """Several requests, whatever they are."""
        for _ in range(count):
            length, max_tokens = self.random.randint(1, LONGEST_PROMPT), self.random.randint(1, MOST_TOKENS)
            kind = self.random.choice(KINDS)
            self.submit(length, max_tokens, self.random.randrange(2), self.random.choice("ab"), kind)

    def submit_alike(self, count: int) -> None:
        """Several long prompts that begin alike."""
        stem = self.random.randrange(len(self._stems))
        for _ in range(count):
            length = self.random.randint(LONGEST_PROMPT // 2, LONGEST_PROMPT)
            self.submit(length, self.random.randint(1, 4), 0, "a", "greedy", stem=stem)

    def submit(
        self, length: int, max_tokens: int, priority: int, tenant: str, kind: str, stem: int | None = None
    ) -> None:
        """A request. `kind`: greedy, sampled, stop (a token that comes), far stop (one that steps do not know), or
        logprobs."""
        prompt, chain = self._random_tokens(length), None
        if (cache := self.cache) is not None:
            # As much as a few blocks, or a token more or less.
            num_shared = self.random.randrange(0, length + 2, BLOCK) + self.random.choice((-1, 0, 0, 1))
            num_shared = min(max(num_shared, 0), length)
            stem = self.random.randrange(len(self._stems)) if stem is None else stem
            prompt[:num_shared] = self._stems[stem][:num_shared]
            chain = make_chain(cache.block_tokens, self.random.choice(("", "", "", "", "other")))
            self._chains.append(chain)
        expected = expected_tokens(prompt, max_tokens)
        options: dict[str, Any] = {}
        if "stop" in kind:
            stop = self.random.choice(expected)
            expected = expected[: expected.index(stop) + 1]
            unused = tuple(range(20_000, 20_000 + MAX_STEP_STOPS))
            options["stop_token_ids"] = (*unused, stop) if kind == "far stop" else (stop,)
        elif kind == "sampled":
            options |= {"temperature": 1.0, "presence_penalty": 0.5, "seed": 7}
        elif kind == "logprobs":
            options |= {"logprobs": 2, "prompt_logprobs": 1}
        request = Request(
            f"request {len(self.told)}",
            prompt,
            SamplingParams(max_tokens=max_tokens, **options),
            priority=priority,
            tenant=tenant,
            times=RequestTimes(self.cluster.now),
            chain=chain,
        )
        self.told[request] = Told(expected)
        self.counts[f"submitted: {kind}"] += 1
        self.scheduler.submit(request)

    def cancel(self, index: int, stage: str) -> None:
        """The client of one of those under way goes, of one at that stage if there is any."""
        alive = [request for request in self.told if request.finish_reason is None]
        alive = [request for request in alive if stage_of(request) == stage] or alive
        if alive:
            request = alive[index % len(alive)]
            self.counts[f"cancelled: {stage_of(request)}"] += 1
            self.told[request].is_cancelled = True
            self.scheduler.cancel(request)

    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.cluster.run(self.cluster.now + seconds)

    def fail_runs(self, kind: str, count: int) -> None:
        """The next plans of a kind fail, whosever they are, before they have any effect or after."""
        self._failing[kind] += self.random.choices(MOMENTS, k=count)

    def hurt(self, what: str, index: int, is_last_spared: bool) -> None:
        """Lose, drain, remove or break down an instance, or compile it anew."""
        planner = self._pick(index)
        if planner is not None and not (is_last_spared and self._alive(planner.role) == [planner]):
            getattr(self, what)(planner)

    def break_down(self, planner: Planner) -> None:
        """All that an instance runs fails from now on."""
        self._broken.add(planner.name)

    def spoil_result(self) -> None:
        """A row of the next result is not finite."""
        self._num_to_spoil += 1

    def decide_rounds(self, fate: str, count: int) -> None:
        """The next rounds sent get lost, or come late, or later than the next ones."""
        self._round_fates.extend([fate] * count)

    def decide_answers(self, kind: str, count: int) -> None:
        """The next answers of the pool to plans of a kind never come, or late."""
        self._pool_fates[kind] += self.random.choices(("lost", "late"), k=count)

    def spoil_pool(self, what: str, count: int) -> None:
        """Some blocks vanish from the pool, others lie in their places, or the next ones are not taken."""
        if what == "refused":
            self._num_to_refuse += count
            return
        for key in self.random.sample(sorted(self.pool.blocks), min(count, len(self.pool.blocks))):
            self.counts[f"blocks of the pool: {what}"] += 1
            block = self.pool.blocks.pop(key)
            if what == "others":
                self.pool.blocks[key] = dataclasses.replace(block, token_ids=block.token_ids + 1)

    def reset_cache(self, index: int) -> None:
        """An instance forgets what it shares."""
        planners = list(self.scheduler.prefill.values())
        if planners:
            planner = planners[index % len(planners)]
            self.counts["resets at work"] += planner.under_way is not None and len(planner.cache._prefixes) > 0
            planner.cache.clear()

    def lose(self, planner: Planner) -> None:
        """An instance is gone."""
        if not planner.is_lost:
            self._count_end(planner, "lost by hand")
            self._lost_by_hand.add(planner.name)
            self.scheduler.lose(planner.name, RuntimeError("gone"))

    def drain(self, planner: Planner) -> None:
        """An instance takes nothing new."""
        self.counts["drained"] += not planner.is_draining
        planner.is_draining = True
        self._drained.setdefault(planner.name, frozenset(planner.attempts))

    def remove(self, planner: Planner) -> None:
        """An instance is taken out."""
        self._count_end(planner, "removed")
        self.cluster.remove(planner.name)

    def compile(self, planner: Planner) -> None:
        """Somebody has an instance compiled anew, or what sends to another one."""
        assert isinstance(planner, PrefillPlanner | DecodePlanner)
        is_send = planner.role == "prefill" and self.random.random() < 0.3
        plan = CompilePlan((), targets=("another",)) if is_send else CompilePlan(planner.variants)
        self.changes.append(planner.change(plan))

    def add(self, role: Role) -> None:
        """Another instance, where there are few."""
        if len(self._alive(role)) >= MOST_INSTANCES:
            return
        self.check()  # those that could not go on for want of one have ended
        name, layout = f"{role}{len(self._planners)}", self.layout
        if role == "prefill":
            # A prompt may be as long as what decode has added to it.
            num_blocks = MAX_BLOCKS + layout.prefill_blocks
            self._planners[name] = self.cluster.add_prefill(
                name, prefill_sizes(num_blocks, step_tokens=12, num_places=layout.num_places, cache=self.cache)
            )
        else:
            sizes = decode_sizes(
                2,
                layout.num_places,
                MAX_BLOCKS + layout.decode_blocks,
                max_blocks=MAX_BLOCKS,
                num_steps=layout.num_steps,
                num_drafts=layout.num_drafts,
                round_tokens=10,
            )
            self._planners[name] = planner = self.cluster.add_decode(name, sizes, is_patient=layout.is_patient)
            if layout.is_limited:
                planner.controller = SloController(0.05, [1, 2, 3][: layout.num_places])
        self.counts[f"added: {role}"] += 1

    # -- what must hold -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """At any time."""
        check_scheduler(self.scheduler)
        for request, update in self.scheduler.take_updates():
            self._take(request, update)
        waiting = set(self.scheduler.waiting)
        running = {attempt.request for one in self.scheduler.planners for attempt in one.attempts.values()}
        alive = {request for request, told in self.told.items() if told.finish_reason is None}
        assert not waiting & running
        assert waiting | running == alive
        assert len(waiting) == len(self.scheduler.waiting)
        for planner in self.scheduler.planners:
            assert planner.is_idle or not planner.is_broken
            assert self._drained.get(planner.name, planner.attempts.keys()) >= planner.attempts.keys()
        for planner in self.scheduler.prefill.values():
            for attempt in planner.attempts.values():
                # It has left its source, or will when that has been told that its last round was sent.
                assert attempt.stage != "decode" or attempt.id in attempt_ids_of(planner.under_way)
        self._check_fences()

    def finish(self) -> None:
        """After all that was to come everything ends without further faults, and nothing is left."""
        self.cluster.run(self._last_event)
        self._failing.clear()
        self._broken.clear()
        self._round_fates.clear()
        self._pool_fates.clear()
        self._num_to_spoil = self._num_to_refuse = 0
        self._run_out()
        for role in ROLES:
            if not self._alive(role):
                waiting = [one for one in self.scheduler.waiting if role == "prefill" or one.will_decode]
                assert not waiting, "nobody can take these, and they wait"
                self.add(role)
        self._run_out()
        for request, told in self.told.items():
            assert told.finish_reason is not None, (request.request_id, "has not ended")
            assert request.token_ids == told.token_ids
            assert request.finish_reason == told.finish_reason
            assert request.attempt is None
        for change in self.changes:
            assert change.is_over
        assert all(planner.under_way is None for planner in self._planners.values())
        scheduler, requests = self.scheduler, self.told
        assert len(scheduler.waiting) == scheduler.num_running == 0
        for planner in scheduler.planners:
            assert planner.is_idle
            assert planner.stats().num_used_blocks == planner.stats().num_running == planner.stats().num_waiting == 0
        for name in scheduler.prefill.keys() - {one.name for one in scheduler.planners if one.is_lost}:
            assert not self._executors[name].fetched, "blocks have been fetched, and are kept for nobody"
        self._check_cache_counts()
        assert scheduler.num_preemptions == sum(request.num_preemptions for request in requests)
        assert scheduler.num_generation_tokens == sum(len(request.token_ids) for request in requests)
        assert scheduler.num_prompt_tokens == sum(len(one.prompt_ids) for one in requests if one.token_ids)
        self.counts["histories"] += 1
        self.counts["preemptions"] += scheduler.num_preemptions
        self.counts["hand-offs failed"] += scheduler.num_failed_handoffs
        self.counts["hand-offs"] += scheduler.num_handoffs
        lost = {name for name, planner in self._planners.items() if planner.is_lost} - self._lost_by_hand
        self.counts["lost by failing three times"] += len(lost)
        self.counts["changes"] += len(self.changes)
        self.counts["changes that failed"] += sum(change.error is not None for change in self.changes)

    def _check_cache_counts(self) -> None:
        """What is counted of the prefix cache adds up, and the pool has nothing that it should not have."""
        cache, size = self.scheduler.cache_counts, self.cache.block_tokens if self.cache else 1
        assert cache.num_hits + cache.num_pool_hits <= cache.num_queried
        assert cache.num_pool_hits <= cache.num_pool_queried <= cache.num_queried - cache.num_hits
        assert self.pool.blocks.keys() <= {(chain.namespace, name) for chain in self._chains for name in chain.names}
        for request in self.told:
            assert request.num_cached_tokens <= len(request.prompt_ids) - 1
            assert request.num_cached_tokens % size == 0
            assert request.num_cached_tokens == 0 or request.sampling.prompt_logprobs is None
            self.counts["requests with cached tokens"] += request.num_cached_tokens > 0
        for field in dataclasses.fields(cache):
            self.counts[f"cache: {field.name}"] += getattr(cache, field.name)
        if self.cache is None:
            assert cache == CacheStats()

    def _run_out(self) -> None:
        self.cluster.run(self.cluster.now + 1000)
        self.check()

    def _take(self, request: Request, update: RequestUpdate) -> None:
        """The client is told."""
        told = self.told[request]
        assert told.finish_reason is None, "told of its end twice"
        told.token_ids += update.token_ids
        assert told.token_ids == told.expected[: len(told.token_ids)], (request.request_id, told)
        if request.sampling.logprobs is not None:
            assert update.logprobs is not None
            assert [one.token_id for one in update.logprobs] == update.token_ids
            assert [one.logprob for one in update.logprobs] == [logprob_of(token) for token in update.token_ids]
        if update.prompt_logprobs is not None:
            first, *others = update.prompt_logprobs
            assert first is None
            assert [one and one.token_id for one in others] == request.prompt_ids[1:]
        told.finish_reason = update.finish_reason
        if update.finish_reason is not None:
            self._check_end(request, told)

    def _check_end(self, request: Request, told: Told) -> None:
        reason, tokens = told.finish_reason, told.token_ids
        is_whole = tokens == told.expected
        is_stopped = bool(tokens) and tokens[-1] in request.sampling.stop_token_ids
        if reason in ("stop", "length"):
            assert is_whole
            assert is_stopped == (reason == "stop")
            self.counts[f"ended: {reason}"] += 1
            self.counts["ended after a failure"] += request.num_failures > 0
        elif reason == "abort":
            assert told.is_cancelled
        else:
            assert reason == "error"
            assert request.error is not None
            self._check_error(request, request.error)
        assert told.is_cancelled == (reason == "abort")

    def _check_error(self, request: Request, error: str) -> None:
        if NOT_FINITE_MESSAGE in error:
            assert self.told[request].is_spoilt
            self.counts["ended: not finite"] += 1
        elif "instance is left" in error:
            role: Role = "prefill" if "no prefill" in error else "decode"
            assert not self._alive(role)
            self.counts["ended: no instance left"] += 1
        else:
            assert request.num_failures == MAX_FAILURES
            self.counts["ended: hit three times"] += 1
        if request.num_failures >= MAX_FAILURES:
            assert request.num_failures == MAX_FAILURES

    def _check_fences(self) -> None:
        """What a plan under way names has no other owner yet."""
        for planner in self.scheduler.planners:
            if planner.under_way is None:
                continue
            plan, owners = self._under_way[planner.name]
            assert plan is planner.under_way
            for attempt in planner.attempts.values():
                for key in held_by(attempt, planner.role):
                    assert attempt.id in owners.get(key, {attempt.id}), (planner.name, key, owners[key], attempt.id)

    def _check_sharing(self, planner: PrefillPlanner) -> None:
        """Attempts that share a block begin alike up to its end, and are of one namespace."""
        found: dict[int, tuple[Attempt, int]] = {}
        for attempt in planner.attempts.values():
            for index, block in enumerate(attempt.prefill.blocks.ids if attempt.prefill else ()):
                other, other_index = found.setdefault(block, (attempt, index))
                if other is not attempt:
                    self.counts["blocks that several share"] += 1
                    stop = (index + 1) * BLOCK
                    assert index == other_index
                    assert stop < min(attempt.num_prefill, other.num_prefill) + (not self.cache.needs_next)
                    assert attempt.request.prefill_slice(0, stop) == other.request.prefill_slice(0, stop)
                    assert attempt.request.chain.namespace == other.request.chain.namespace

    # -- hooks of the cluster -----------------------------------------------------------------------------------------

    def failing_moment(self, name: str, plan: Plan) -> Moment | None:
        """Whether a run fails, and when."""
        kind, moment = PLAN_NAMES[type(plan)], None
        if name in self._broken:
            moment = self.random.choice(MOMENTS)
        elif self._failing[kind]:
            moment = self._failing[kind].pop()
        if moment is not None:
            self.counts[f"failed: {kind} {moment}"] += 1
        return moment

    def spoil(self, name: str, plan: Plan, result: Any) -> Result:
        """Perhaps a result with a row that is not finite."""
        if not self._num_to_spoil or not isinstance(plan, PrefillPlan | DecodePlan):
            return result
        rows = np.flatnonzero(plan.is_last).tolist() if isinstance(plan, PrefillPlan) else range(len(plan.places))
        if not rows:
            return result
        self._num_to_spoil -= 1
        row, token_ids = self.random.choice(list(rows)), result.token_ids.copy()
        token_ids[..., row] = NOT_FINITE
        attempt = self._planners[name].attempts.get(int(plan.attempt_ids[row]))
        if attempt is not None:
            self.told[attempt.request].is_spoilt = True
        self.counts["rows spoilt"] += 1
        return dataclasses.replace(result, token_ids=token_ids)

    def _run_s(self, plan: Plan) -> float:
        """A plan has been made."""
        planner = self._planner_of(plan)
        named = [planner.attempts[one] for one in attempt_ids_of(plan) if one in planner.attempts]
        assert isinstance(plan, LoadPlan) or len(named) == len(
            attempt_ids_of(plan)
        )  # a load may be of one that is over
        owners: dict[tuple[int, int], set[int]] = {key: set() for one in named for key in held_by(one, planner.role)}
        if isinstance(plan, StorePlan):
            owners |= {(id(planner._pool), block): set() for block in plan.blocks.ravel().tolist()}
        for attempt in planner.attempts.values():
            for key in held_by(attempt, planner.role):
                if key in owners:
                    owners[key].add(attempt.id)
        self._under_way[planner.name] = plan, owners
        self._count_plan(plan, named)
        if isinstance(planner, PrefillPlanner):
            self._check_sharing(planner)
        self._num_plans += 1
        assert self._num_plans < MOST_PLANS, "nothing comes to an end"
        is_short = isinstance(plan, SendPlan | ReceivePlan | PoolPlan)
        choices = (0.002, 0.01, 0.03) if is_short else (0.02, 0.05, 0.1)
        return self.random.choice(choices) * (0.5 + self.random.random())

    def _commit_s(self, plan: Plan) -> float:
        """A plan has been run, and will be committed."""
        planner = self._planner_of(plan)
        num_over = sum(attempt_id not in planner.attempts for attempt_id in attempt_ids_of(plan))
        kind = "round" if isinstance(plan, SendPlan | ReceivePlan) else PLAN_NAMES[type(plan)]
        self.counts[f"rows of attempts that are over: {kind}"] += num_over
        return self.random.choice((0.0, 0.0, 0.0, 0.02, 0.1))

    def _handoff_s(self, index: int) -> float | None:
        assert self.sending is not None
        fate = self._round_fates.popleft() if self._round_fates else ""
        if fate:
            self.counts[f"rounds: {fate}"] += 1
        if fate == "lost":
            return None
        seconds = self.random.random() * 0.1 + {"": 0.0, "late": TIMEOUT_S, "overtaken": 0.3}[fate]
        arrival, newest = self.cluster.now + seconds, self._newest_arrival.get(self.sending.transfer_id, 0.0)
        self.counts["rounds: out of order"] += arrival < newest
        self._newest_arrival[self.sending.transfer_id] = max(arrival, newest)
        return seconds

    def _pool_s(self, plan: PoolPlan) -> float | None:
        kind = PLAN_NAMES[type(plan)]
        fate = self._pool_fates[kind].pop() if self._pool_fates[kind] else ""
        if fate:
            self.counts[f"answers to a {kind}: {fate}"] += 1
        return None if fate == "lost" else self.random.random() * 0.08 + (fate == "late") * self.random.choice((0.3, 6))

    def _is_refused(self, name: bytes) -> bool:
        is_refused = self._num_to_refuse > 0
        self._num_to_refuse -= is_refused
        return is_refused

    def _wrap(self, name: str, inner: Executor) -> Executor:
        self._executors[name] = inner
        return Wrapped(name, inner, self)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _fill_pool(self, block_tokens: int) -> None:
        """Somebody has stored what many prompts begin with."""
        for stem in self._stems:
            chain = make_chain(block_tokens)
            chain.extend(stem)
            self._chains.append(chain)
            for name, token_ids in zip(chain.names, chain.token_ids, strict=True):
                self.pool.blocks["", name] = VirtualBlock(token_ids, self.pool.tier_of(name))

    def _random_cache(self) -> CacheSizes:
        return CacheSizes(
            block_tokens=self.random.choice((BLOCK, 2 * BLOCK)),
            needs_next=self.random.random() < 0.5,
            has_pool=self.random.random() < 0.9,
            plan_blocks=self.random.randint(1, 3),
            keeps_generated=self.random.random() < 0.5,
        )

    def _random_tokens(self, length: int) -> list[int]:
        return [self.random.randrange(5000) for _ in range(length)]

    def _alive(self, role: Role) -> list[Planner]:
        return [one for one in self.scheduler.of_role(role) if not (one.is_lost or one.is_draining)]

    def _pick(self, index: int) -> Planner | None:
        planners = self.scheduler.planners
        if index % 2:  # rather one at work
            planners = [one for one in planners if one.under_way is not None] or planners
        return planners[index // 2 % len(planners)] if planners else None

    def _planner_of(self, plan: Plan) -> Planner:
        return next(one for one in self._planners.values() if one.under_way is plan)

    def _count_end(self, planner: Planner, what: str) -> None:
        self.counts[what] += 1
        self.counts[f"{what} at work"] += planner.under_way is not None

    def _count_plan(self, plan: Plan, attempts: list[Attempt]) -> None:
        counts = self.counts
        counts[f"plans: {PLAN_NAMES[type(plan)]}"] += 1
        if isinstance(plan, PrefillPlan):
            counts["chunks that end no prompt"] += int((~plan.is_last).sum())
            counts["prompts computed again"] += sum(attempt.request.is_resumed for attempt in attempts)
            counts["prompts that begin with a prefix"] += int((plan.starts[plan.joins] > 0).sum())
        elif isinstance(plan, DecodePlan):
            counts["calls with growth"] += len(plan.growth.places) > 0
            counts["calls with nothing new"] += len(plan.growth.places) == len(plan.joins.places) == 0
        elif isinstance(plan, SendPlan):
            counts["second and later rounds"] += plan.round > 0
        elif isinstance(plan, ReceivePlan):
            counts["rounds: thrown away"] += len(plan.attempt_ids) == 0
        elif isinstance(plan, LookupPlan):
            counts["lookups of several"] += len(plan.attempt_ids) > 1
        elif isinstance(plan, LoadPlan):
            counts["loads: thrown away"] += len(plan.blocks) == 0
            counts["loads: in parts"] += not plan.is_last
        elif isinstance(plan, StorePlan):
            planner = self._planner_of(plan)
            held = {key for attempt in planner.attempts.values() for key in held_by(attempt, "prefill")}
            counts["stores of attempts that are over"] += any(
                (id(planner._pool), block) not in held for block in plan.blocks.ravel().tolist()
            )


def attempt_ids_of(plan: Plan | None) -> list[int]:
    """Those that a plan names, each once."""
    if isinstance(plan, FetchPlan | LoadPlan):
        return [plan.attempt_id]
    return list(dict.fromkeys(getattr(plan, "attempt_ids", np.zeros(0, np.int64)).tolist()))


def stage_of(request: Request) -> str:
    """Where a request is that has not ended."""
    return request.attempt.stage if request.attempt else "waiting"


def held_by(attempt: Attempt, role: Role) -> list[tuple[int, int]]:
    """What an attempt has of its instance of a role: pool, id."""
    hold = attempt.prefill if role == "prefill" else attempt.decode
    return [(id(lease.pool), one) for lease in (hold.place, hold.blocks) for one in lease.ids] if hold else []
