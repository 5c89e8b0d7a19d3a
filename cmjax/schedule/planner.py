"""What the planners of all roles share: one plan at a time, made and committed with the engine's lock held."""

import abc
import collections
import dataclasses
from collections.abc import Sequence
from typing import Protocol

from cmjax.schedule.autotune import Autotune
from cmjax.schedule.block_stores import BlockStores
from cmjax.schedule.blocks import Fence
from cmjax.schedule.plans import CompilePlan, News, Plan, RestartPlan, Result, SendPlan
from cmjax.schedule.pool_plans import FetchPlan, LookupPlan, StorePlan
from cmjax.schedule.request import Attempt, Request
from cmjax.schedule.stats import CacheStats, InstanceStats, Role, SlotLoad, Status
from cmjax.schedule.transfer import Transfer

# An instance whose runs fail so often in a row is given up.
MAX_FAILURES_IN_A_ROW = 3


class Owner(Protocol):
    """What planners tell of requests, to whom all of them belong: the scheduler."""

    def finish(self, request: Request) -> None:
        """It has all its tokens."""
        ...

    def refuse(self, request: Request, error: str) -> None:
        """It ends with an error of its own making."""
        ...

    def hit(self, attempt: Attempt, error: str, at: str) -> None:
        """An attempt ends through a failure at an instance; its request starts over, or ends with `error`."""
        ...

    def preempt(self, attempt: Attempt) -> None:
        """An attempt makes room for more urgent ones; its request starts over."""
        ...

    def generated(self, taken: Sequence[tuple[Request, int]], num_prompt_tokens: int = 0) -> None:
        """Requests have got so many tokens each; `num_prompt_tokens`: of prompts whose first they are."""
        ...

    def hand_off(self, source: str, target: str, step: int, ended: Sequence[tuple[Attempt, int]], now: float) -> None:
        """Prompts that a step has ended, with their rows in it, are to travel."""
        ...

    def sending_failed(self, transfer_id: int, error: str) -> None:
        """A round of a hand-off could not be sent."""
        ...

    def arrived(self, attempt: Attempt) -> None:
        """A prompt is whole at its decode instance."""
        ...

    def transfer(self, transfer_id: int) -> Transfer | None:
        """A hand-off that somebody still waits for."""
        ...

    @property
    def cache_counts(self) -> CacheStats:
        """What is counted of the prefix cache, to be counted on."""
        ...

    def tick(self, now: float) -> None:
        """Look at deadlines, and admit what has room."""
        ...


@dataclasses.dataclass(eq=False)
class InstanceChange:
    """A change of an instance itself that somebody waits for.

    Attributes:
        plan: what is done.
        is_over: whether it has been done, or never will be.
        error: why not.
    """

    plan: CompilePlan | RestartPlan
    is_over: bool = False
    error: BaseException | None = None

    def end(self, error: BaseException | None = None) -> None:
        """It has been done, or failed."""
        self.is_over, self.error = True, error


class Planner(abc.ABC):
    """The bookkeeping of one instance. `plan`, then `commit` or `fail`; in between the plan runs without the lock.

    Attributes:
        name, role: of the instance.
        model: the name of the model that it runs.
        num_ranks: its devices.
        attempts: id -> those that hold something here.
        under_way: the plan that runs.
        changes: what is to be done to the instance itself, before anything else.
        is_compiled: it can take requests; is_draining: it takes no new ones; is_lost: it has been given up.
        is_closed: nobody carries out its plans, so that no change will be made.
        is_broken: its cache has been lost, and it has not been started afresh.
        slot_load: rows that its experts received.
        num_calls, num_tokens, busy_s: of its steps; `busy_s` of all runs.
        last_error: what made it fail last.
    """

    role: Role

    def __init__(self, name: str, model: str, num_ranks: int, microbatches: Sequence[int], owner: Owner) -> None:
        self.name, self.model, self.num_ranks, self.owner = name, model, num_ranks, owner
        self.autotune, self._microbatches = Autotune(microbatches), microbatches
        self.attempts: dict[int, Attempt] = {}
        self.under_way: Plan | None = None
        self.changes: collections.deque[InstanceChange] = collections.deque()
        self.is_compiled = self.is_draining = self.is_lost = self.is_closed = self.is_broken = False
        self.slot_load = SlotLoad()
        self.num_calls = self.num_tokens = 0
        self.busy_s = 0.0
        self.last_error: BaseException | None = None
        self._num_failures = 0
        self._num_plans = 0
        self._began = 0.0
        self.fence = Fence()

    # -- plan, commit, fail -------------------------------------------------------------------------------------------

    def plan(self, now: float, arrivals: Sequence[News] = ()) -> Plan | None:
        """What to run next; None where there is nothing to do. `arrivals`: what has arrived here, see `Executor`."""
        assert self.under_way is None
        if self.is_lost:
            return None
        self.owner.tick(now)
        self._take_arrivals(arrivals)
        plan = self._next_plan(now)
        if plan is not None:
            self.under_way, self._began = plan, now
            self.fence.close()
        return plan

    def _next_plan(self, now: float) -> Plan | None:
        # Nothing comes before a new cache, and what travels has a deadline that a compilation may not keep.
        if not self.is_broken and (urgent := self._plan_urgent()) is not None:
            return urgent
        return self.changes[0].plan if self.changes else self._plan_work(now)

    def commit(self, plan: Plan, result: Result, now: float) -> None:
        """Take what came of a plan; what belongs to attempts that are over is dropped."""
        assert plan is self.under_way
        self._end_run(now)
        if isinstance(plan, CompilePlan | RestartPlan):
            self.is_broken &= not isinstance(plan, RestartPlan)
            self._commit_change(plan)
            self._end_change(plan)
        else:
            self._commit_work(plan, result, now)
        self.fence.open()

    def fail(self, plan: Plan, error: BaseException, now: float) -> None:
        """A run has failed. All that the instance held is lost, a cache given to the run with it: its requests start
        over, and it starts afresh, unless that has happened too often. Of a round that could not be sent only the
        hand-off is lost, what the memory pool cannot do is done without it, and a compilation that gives away no cache
        costs nobody anything."""
        assert plan is self.under_way
        self._end_run(now)
        self.last_error = error
        if isinstance(plan, SendPlan):
            self.owner.sending_failed(plan.transfer_id, str(error))
            self._commit_work(plan, None, now)  # those that have arrived all the same need nothing here any more
            self.fence.open()
            return
        if isinstance(plan, LookupPlan | FetchPlan | StorePlan):
            self._fail_pool(plan)
            self.fence.open()
            return
        self._end_change(plan, error)
        if isinstance(plan, CompilePlan) and not plan.gives_cache:
            self.fence.open()
            return
        self._num_failures += not isinstance(plan, CompilePlan)
        self.is_broken = True
        self._forget_all(f"{self.name} failed: {error}")
        if self._num_failures >= MAX_FAILURES_IN_A_ROW:
            self.lose(error)
            self.owner.tick(now)  # it may have been the last one that could take what waits
        elif not self.is_lost:
            self.changes.appendleft(InstanceChange(RestartPlan()))

    def lose(self, error: BaseException) -> None:
        """Give the instance up."""
        if self.is_lost:
            return
        self.is_lost, self.is_broken, self.last_error = True, True, error
        self._forget_all(f"{self.name} failed: {error}")
        self.end_changes(error)

    def close(self, error: BaseException) -> None:
        """Nobody carries out plans any more."""
        self.is_closed = True
        self.end_changes(error)

    def end_changes(self, error: BaseException) -> None:
        """Nobody waits any longer for changes that will not be made."""
        while self.changes:
            self.changes.popleft().end(error)

    def change(self, plan: CompilePlan) -> InstanceChange:
        """Have something done to the instance; the change says when."""
        change = InstanceChange(plan)
        if self.is_lost or self.is_closed:
            change.end(self.last_error if self.is_lost else RuntimeError(f"{self.name} does not run"))
        else:
            self.changes.append(change)
        return change

    def stepped(self) -> None:
        """A step has worked: the instance does."""
        self._num_failures = 0
        self.num_calls += 1

    # -- for the scheduler --------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """See `InstanceStats`."""
        if self.is_lost:
            return "lost"
        if self.is_draining:
            return "draining"
        return "ready" if self.is_compiled and not self.is_broken else "starting"

    @property
    @abc.abstractmethod
    def stores(self) -> BlockStores:
        """What is still to be given to the memory pool."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is here."""
        return not self.attempts

    @abc.abstractmethod
    def drop(self, attempt: Attempt) -> None:
        """An attempt ends, or leaves: forget it. Its leases are its own to give back."""

    @abc.abstractmethod
    def stats(self) -> InstanceStats:
        """What the instance does at present."""

    # -- of each role -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _plan_urgent(self) -> Plan | None:
        """What goes before changes of the instance."""

    @abc.abstractmethod
    def _plan_work(self, now: float) -> Plan | None:
        """The next step, or the next half of a hand-off's round."""

    @abc.abstractmethod
    def _commit_work(self, plan: Plan, result: Result, now: float) -> None:
        """Take what came of it."""

    @abc.abstractmethod
    def _commit_change(self, plan: Plan) -> None:
        """Something has been done to the instance."""

    @abc.abstractmethod
    def _renew(self) -> None:
        """Nothing is held any more: all blocks and places are free."""

    @abc.abstractmethod
    def _take_arrivals(self, arrivals: Sequence[News]) -> None:
        """Something has arrived here."""

    @abc.abstractmethod
    def _fail_pool(self, plan: LookupPlan | FetchPlan | StorePlan) -> None:
        """Something could not even be asked of the memory pool."""

    # -- inside -------------------------------------------------------------------------------------------------------

    def _note_largest(self, before: int, now: int) -> None:
        """The largest step has another size now: how many microbatches are best for it is to be found anew."""
        if now != before:
            self.autotune = Autotune(self._microbatches)

    def _next_number(self) -> int:
        self._num_plans += 1
        return self._num_plans

    def _end_run(self, now: float) -> None:
        self.under_way = None
        self.busy_s += now - self._began

    def _end_change(self, plan: Plan, error: BaseException | None = None) -> None:
        # Nobody waits for one whose instance has been given up meanwhile.
        if self.changes and plan is self.changes[0].plan:
            self.changes.popleft().end(error)

    def _forget_all(self, error: str) -> None:
        # The last one first: each goes to the head of the queue it came from.
        for attempt in list(self.attempts.values())[::-1]:
            self.owner.hit(attempt, error, self.name)
        assert not self.attempts
        self.fence = Fence()
        self._renew()
