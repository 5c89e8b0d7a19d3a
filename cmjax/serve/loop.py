"""An instance at work: its planner, its executor, and the thread that takes them in turns."""

import logging
import threading

from cmjax.schedule import Executor, FetchPlan, LookupPlan, Plan, Planner, Result
from cmjax.serve.core import Core

logger = logging.getLogger(__name__)

# How often a thread looks for what nobody tells it of: rounds that have arrived, and deadlines.
_POLL_S = 0.005
_IDLE_S = 0.25


class InstanceLoop:
    """Plan with the lock, run without it, commit with it again; whatever the role.

    Attributes:
        planner, executor: of the instance.
        is_stopping: to end after the plan under way.
    """

    def __init__(self, core: Core, planner: Planner, executor: Executor) -> None:
        self.core, self.planner, self.executor = core, planner, executor
        self.is_stopping = False
        self._thread: threading.Thread | None = None
        planner.is_closed = True  # until it is started

    @property
    def name(self) -> str:
        """Of the instance."""
        return self.planner.name

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self.is_stopping = self.planner.is_closed = False
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the plan under way; with the lock held. What was to be done to the instance will not be."""
        self.is_stopping = True
        self.planner.close(RuntimeError(f"{self.name} has been stopped"))
        self.core.changed.notify_all()

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None:
            self._thread.join()

    def turn(self, patience_s: float = _IDLE_S) -> Plan | None:
        """Make a plan, run it and commit what came of it; None, after a while, where there was nothing to do."""
        core = self.core
        core.deliver()
        with core.changed:
            if self.is_stopping:
                return None
            # Polled with the lock: whoever has news after this finds the loop waiting, and wakes it.
            plan = self.planner.plan(core.clock(), self.executor.poll())
            if plan is None:
                is_urgent = self.executor.expects_arrivals or core.scheduler.has_updates
                core.changed.wait(min(_POLL_S, patience_s) if is_urgent else patience_s)
                return None
        self._carry_out(plan)
        return plan

    def _carry_out(self, plan: Plan) -> None:
        core, result, failure = self.core, None, None
        try:
            result = self._execute(plan)
        except Exception as error:
            logger.exception("%s: a step failed (%s)", self.name, plan.kind)
            failure = error
        with core.changed:
            if failure is None:
                self.planner.commit(plan, result, core.clock())
            else:
                self.planner.fail(plan, failure, core.clock())
            core.scheduler.tick(core.clock())
            core.changed.notify_all()
        core.deliver()

    def _execute(self, plan: Plan) -> Result:
        if isinstance(plan, LookupPlan | FetchPlan):  # they only begin something, on no device
            return self.executor.run(plan)
        with self.core.device_lock, self.core.activities[plan.kind]():
            return self.executor.run(plan)

    def _run(self) -> None:
        try:
            while not (self.is_stopping or self.planner.is_lost):
                self.turn()
        except BaseException as error:
            # Not a failing step but a mistake in the bookkeeping: nothing of the instance can be trusted.
            logger.exception("%s: its thread ends", self.name)
            with self.core.changed:
                self._lose(error)
        with self.core.changed:
            self.core.changed.notify_all()
        self.core.deliver()

    def _lose(self, error: BaseException) -> None:
        try:
            self.core.scheduler.lose(self.name, error)
        except Exception:  # a second mistake in the bookkeeping: the thread ends either way, and must say so
            logger.exception("%s: what it held could not be given back", self.name)
