"""A cluster in virtual time: the planners of the engine with executors that hold tokens in place of latents."""

import dataclasses
import heapq
import itertools
from collections.abc import Callable

from cmjax.schedule.decode import DecodePlanner, DecodeSizes
from cmjax.schedule.planner import Planner
from cmjax.schedule.plans import Executor, Plan, PrefillResult, Result
from cmjax.schedule.prefill import PrefillPlanner, PrefillSizes
from cmjax.schedule.prefill_cache import MOST_PATIENCE_S
from cmjax.schedule.scheduler import Scheduler
from cmjax.schedule.virtual_executors import VirtualDecode, VirtualPrefill, VirtualWire, token_after
from cmjax.schedule.virtual_pool import VirtualBlock, VirtualNames, VirtualPool

__all__ = [
    "VirtualBlock",
    "VirtualCluster",
    "VirtualDecode",
    "VirtualError",
    "VirtualNames",
    "VirtualPool",
    "VirtualPrefill",
    "VirtualWire",
    "token_after",
]


class VirtualError(Exception):
    """What makes a run fail in virtual time."""


@dataclasses.dataclass
class _Unit:
    """An instance: its planner, its executor, and whether a plan is under way."""

    planner: Planner
    executor: Executor
    is_busy: bool = False


@dataclasses.dataclass
class VirtualCluster:
    """Instances that run one plan after another, each for its own virtual time.

    Attributes:
        run_s: seconds that a plan takes.
        commit_s: seconds from its end until it is committed.
        handoff_s: seconds that the n-th round of a hand-off takes; None: it never arrives.
        failure: what makes a plan fail, at its end; None: it works.
        wrap: puts something around an instance's executor; what raises a `VirtualError` there fails.
        timeout_s: of hand-offs.
        scheduler: policy, as in the engine.
        pool: the memory pool of all prefill instances that have one.
        now: seconds.
    """

    run_s: Callable[[Plan], float] = lambda plan: 0.1
    commit_s: Callable[[Plan], float] = lambda plan: 0.0
    handoff_s: Callable[[int], float | None] = lambda index: 0.05
    failure: Callable[[str, Plan], Exception | None] = lambda name, plan: None
    wrap: Callable[[str, Executor], Executor] = lambda name, executor: executor
    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(self.timeout_s)
        self.wire = VirtualWire()
        self.pool = VirtualPool(lambda seconds, action: self.at(self.now + seconds, action))
        self._units: dict[str, _Unit] = {}
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._num_rounds = itertools.count()
        self._has_waited = False  # for deadlines, since a plan was made

    def add_prefill(self, name: str, sizes: PrefillSizes, num_ranks: int = 1) -> PrefillPlanner:
        """Bring up a prefill instance."""
        planner = PrefillPlanner(name, "", num_ranks, sizes, self.scheduler)
        self.scheduler.prefill[name] = planner
        self._bring_up(name, planner, VirtualPrefill(sizes, self.wire, self._arrival_time, self.pool))
        return planner

    def add_decode(self, name: str, sizes: DecodeSizes, *, is_patient: bool = False) -> DecodePlanner:
        """Bring up a decode instance."""
        planner = DecodePlanner(name, "", sizes, self.scheduler, is_patient=is_patient)
        self.scheduler.decode[name] = planner
        self._bring_up(name, planner, VirtualDecode(name, sizes, self.wire, lambda: self.now))
        return planner

    def _bring_up(self, name: str, planner: Planner, executor: Executor) -> None:
        self._units[name] = _Unit(planner, self.wrap(name, executor))
        planner.is_compiled = True

    def remove(self, name: str) -> None:
        """Take an instance out; a plan of it that is under way ends, and comes to nothing."""
        self.scheduler.remove(name)
        del self._units[name]

    def at(self, when: float, action: Callable[[], object]) -> None:
        """Have something happen."""
        heapq.heappush(self._events, (when, next(self._order), action))

    def run(self, until: float = float("inf")) -> None:
        """Let time pass until `until`, or until nothing happens any more."""
        self._start_what_can()
        while self._next_event() <= until and self._events:
            when, _, action = heapq.heappop(self._events)
            self.now = max(self.now, when)
            action()
            self._start_what_can()
        if until < float("inf"):
            self.now = max(self.now, until)

    def _next_event(self) -> float:
        if not self._events and self.scheduler.num_running and not self._has_waited:
            self._has_waited = True
            # What is on its way is lost by then.
            self.at(self.now + 2 * max(self.timeout_s, MOST_PATIENCE_S), lambda: None)
        return self._events[0][0] if self._events else float("inf")

    def _start_what_can(self) -> None:
        for name, unit in list(self._units.items()):
            if not unit.is_busy:
                self._start(name, unit)

    def _start(self, name: str, unit: _Unit) -> None:
        plan = unit.planner.plan(self.now, unit.executor.poll())
        if plan is not None:
            unit.is_busy, self._has_waited = True, False
            run_s = self.run_s(plan)
            self.at(self.now + run_s, lambda: self._end(name, unit, plan, run_s))

    def _end(self, name: str, unit: _Unit, plan: Plan, run_s: float) -> None:
        result, error = None, self.failure(name, plan)
        if error is None:
            try:
                result = unit.executor.run(plan)
            except VirtualError as raised:
                error = raised
        if isinstance(result, PrefillResult):
            result = dataclasses.replace(result, seconds=run_s)
        if seconds := self.commit_s(plan):
            self.at(self.now + seconds, lambda: self._commit(unit, plan, result, error))
        else:
            self._commit(unit, plan, result, error)

    def _commit(self, unit: _Unit, plan: Plan, result: Result, error: Exception | None) -> None:
        unit.is_busy = False
        if error is None:
            unit.planner.commit(plan, result, self.now)
        else:
            unit.planner.fail(plan, error, self.now)

    def _arrival_time(self) -> float | None:
        seconds = self.handoff_s(next(self._num_rounds))
        if seconds is None:
            return None
        self.at(self.now + seconds, lambda: None)
        return self.now + seconds
