"""The threads that run steps: one for each instance. They carry out what the scheduler decides, and tell it what came
of it; prefill and decode instances work at the same time, on devices of their own (paper section 4.1).
"""

import collections
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from cmjax.serve import transfer
from cmjax.serve.core import Core
from cmjax.serve.decode_instance import DecodeInstance
from cmjax.serve.instance import NOT_FINITE_MESSAGE
from cmjax.serve.prefill_instance import Prefilled, PrefillInstance
from cmjax.serve.request import Chunk, Request
from cmjax.serve.sampling import SamplingRoom
from cmjax.serve.scheduler import DecodePeer, PrefillPeer
from cmjax.serve.slo import SloController
from cmjax.serve.stats import InstanceStats

logger = logging.getLogger(__name__)

# An instance whose steps fail so often in a row is given up.
MAX_FAILURES_IN_A_ROW = 3
# Rounds of a hand-off that are written between two decode calls: a long prompt must not hold decode up.
MAX_ROUNDS_PER_CALL = 4
# How often a thread looks for what nobody tells it of: copies that have arrived, and those that never will.
_POLL_S = 0.005
_IDLE_S = 0.25


class Worker(threading.Thread):
    """An instance's thread: does what there is to do, and between that the tasks that others ask for."""

    instance: PrefillInstance | DecodeInstance

    def __init__(self, name: str, core: Core) -> None:
        super().__init__(name=name, daemon=True)
        self.core = core
        self.is_stopping = False
        self.num_calls = 0
        self.num_tokens = 0
        self.busy_s = 0.0
        self._num_failures = 0
        self._tasks: list[tuple[Callable[[], None], Future[None]]] = []

    def stop(self) -> None:
        """End after the step under way."""
        with self.core.changed:
            self.is_stopping = True
            self.core.changed.notify_all()

    def run_task(self, task: Callable[[], None]) -> "Future[None]":
        """Have the thread do something between two steps."""
        future: Future[None] = Future()
        with self.core.changed:
            self._tasks.append((task, future))
            self.core.changed.notify_all()
        return future

    def run(self) -> None:
        while True:
            with self.core.changed:
                while not (self.is_stopping or self._tasks or self.has_work()):
                    self.core.changed.wait(self.poll_s())
                tasks, self._tasks = self._tasks, []
                if self.is_stopping:
                    for _, future in tasks:
                        future.cancel()
                    return
            for task, future in tasks:
                try:
                    with self.core.device_lock:
                        task()
                    future.set_result(None)
                except BaseException as error:
                    future.set_exception(error)
            if not tasks:
                self._guarded_work()

    def _guarded_work(self) -> None:
        begin = time.perf_counter()
        try:
            self.work()
            self._num_failures = 0
        except Exception as error:
            logger.exception("%s: a step failed", self.name)
            self._failed(error)
        self.busy_s += time.perf_counter() - begin

    def _failed(self, error: Exception) -> None:
        """What the instance held is lost, a cache given to a failed step with it; it starts afresh, unless that has
        happened too often."""
        core, self._num_failures = self.core, self._num_failures + 1
        is_lost = self._num_failures >= MAX_FAILURES_IN_A_ROW
        with core.changed:
            core.last_error = error
            core.scheduler.lose(self.name, f"{self.name} failed: {error}", "lost" if is_lost else "draining")
            core.publish()
        if not is_lost:
            with core.device_lock:
                self.instance.reset()
            with core.changed:
                self.rejoin()
                core.scheduler.admit()
                core.changed.notify_all()
        self.is_stopping |= is_lost

    def compile_for_serving(self, rooms: Sequence[SamplingRoom]) -> "Future[None]":
        """Have the thread compile the steps of a server."""
        return self.run_task(lambda: self.instance.warm_up_serving(rooms))

    def has_work(self) -> bool:
        """Whether there is something to do; called with the lock held."""
        raise NotImplementedError

    def stats(self) -> InstanceStats:
        """What the instance does; called with the lock held."""
        raise NotImplementedError

    def work(self) -> None:
        """Do it."""
        raise NotImplementedError

    def rejoin(self) -> None:
        """Tell the scheduler of the instance, empty and ready; called with the lock held."""
        raise NotImplementedError

    def poll_s(self) -> float:
        """How long to wait for being told of something."""
        return _IDLE_S


class PrefillWorker(Worker):
    """Runs a prefill instance."""

    def __init__(self, name: str, core: Core, instance: PrefillInstance, targets: "dict[str, DecodeWorker]") -> None:
        super().__init__(name, core)
        self.instance: PrefillInstance = instance
        self.targets = targets
        self._chunks: list[Chunk] = []

    def rejoin(self) -> None:
        self.core.scheduler.prefill[self.name] = PrefillPeer(self.instance.router, self.instance.num_step_tokens)

    def stats(self) -> InstanceStats:
        router = self.instance.router
        num_running = sum(bool(request.prefill_blocks) for request in router.queue)
        return InstanceStats(
            name=self.name,
            role="prefill",
            status=self.core.scheduler.prefill[self.name].status,
            ep_size=self.instance.instance.ep_size,
            num_running=num_running,
            num_waiting=len(router.queue) - num_running,
            num_blocks=router.pool.num_blocks,
            num_used_blocks=router.pool.num_blocks - router.pool.num_free,
            num_calls=self.num_calls,
            num_tokens=self.num_tokens,
            busy_s=self.busy_s,
        )

    def has_work(self) -> bool:
        if self.core.scheduler.prefill[self.name].status == "lost":
            return False
        self._chunks = self.instance.router.next_step(self.instance.num_step_tokens, self.instance.max_sequences)
        now = self.core.clock()
        for chunk in self._chunks:
            if chunk.request.handle is not None:
                chunk.request.handle.times.scheduled = chunk.request.handle.times.scheduled or now
        return bool(self._chunks)

    def work(self) -> None:
        core = self.core
        with core.device_lock, core.prefill():
            found = self.instance.compute(self._chunks)
        with core.changed:
            self.num_calls += 1
            self.num_tokens += sum(chunk.stop - chunk.start for chunk in self._chunks)
            ended = set(self.instance.router.computed(self._chunks))
            travelling = [one for one in found if one.request in ended and self._first_token(one)]
            core.publish([one.request for one in found if one.request in ended])
        by_target: dict[str, list[Prefilled]] = {}
        for one in travelling:
            by_target.setdefault(one.request.decode_name, []).append(one)
        for name, group in by_target.items():
            self._send(self.targets[name], group)
        with core.changed:
            for one in travelling:
                self.instance.router.release(one.request)
            core.scheduler.admit()
            core.changed.notify_all()

    def _first_token(self, one: Prefilled) -> bool:
        """Give a request the token that its prefill made; whether it goes on to decode."""
        core, request = self.core, one.request
        if not one.is_finite:
            core.scheduler.fail(request, f"{request.request_id}: {NOT_FINITE_MESSAGE}")
            return False
        if not request.is_resumed:
            request.append([one.token_id])
            core.num_prompt_tokens += len(request.prompt_ids)
            core.prefill.tokens += len(request.prompt_ids)
            core.scheduler.generated(request, 1)
            if request.handle is not None:
                request.handle.times.prefilled = core.clock()
        if request.finish_reason is not None:
            core.scheduler.finish(request)
            return False
        core.scheduler.prefilled(request, core.clock())
        return True

    def _send(self, target: "DecodeWorker", group: Sequence[Prefilled]) -> None:
        core = self.core
        try:
            with core.device_lock, core.handoff():
                for handoff in core.send(self.instance, target.instance, group):
                    with core.changed:
                        target.inbox.append(handoff)
                        core.changed.notify_all()
        except Exception as error:
            logger.exception("%s: a hand-off to %s failed", self.name, target.name)
            with core.changed:
                core.last_error = error
                for one in group:
                    if one.request.stage == "handoff":
                        core.scheduler.num_failed_handoffs += 1
                        message = f"{one.request.request_id}: its KV could not be sent to {target.name}: {error}"
                        core.scheduler.send_again(one.request, message)
                core.publish()


@dataclasses.dataclass(frozen=True)
class Call:
    """A decode call: when it began and ended, by the engine's clock in seconds, and how many sequences took part."""

    begin: float
    end: float
    num_seqs: int


class DecodeWorker(Worker):
    """Runs a decode instance: takes what has arrived, calls the step, hands out tokens, and frees what has ended.

    Attributes:
        inbox: rounds on their way here, in the order they were sent.
        num_steps: of a call.
        is_patient: wait with a call until all that have a place have arrived: fewer and fuller calls, for a list of
            prompts that are all there from the start.
        controller: sets how many sequences of a rank run together; None: all that have a place.
        calls: the newest ones, see `Call`.
    """

    def __init__(
        self, name: str, core: Core, instance: DecodeInstance, num_steps: int, *, is_patient: bool = False
    ) -> None:
        super().__init__(name, core)
        self.instance: DecodeInstance = instance
        self.inbox: list[transfer.Handoff] = []
        self.num_steps = num_steps
        self.is_patient = is_patient
        self.controller: SloController | None = None
        self.calls: collections.deque[Call] = collections.deque(maxlen=4096)
        self._last_end: float | None = None  # of the last call, while the next one follows on it
        self._cancelled: set[Request] = set()
        self._in_call: set[Request] = set()

    def rejoin(self) -> None:
        self.inbox = []
        call_tokens = self.num_steps * (self.instance.num_drafts + 1)
        self.core.scheduler.decode[self.name] = DecodePeer(self.instance.router, call_tokens)
        if self.controller is not None:
            self.instance.router.limit = self.controller.limit

    def stats(self) -> InstanceStats:
        router = self.instance.router
        num_running, num_blocks = len(router.running()), router.num_ranks * router.num_blocks
        return InstanceStats(
            name=self.name,
            role="decode",
            status=self.core.scheduler.decode[self.name].status,
            ep_size=self.instance.instance.ep_size,
            num_running=num_running,
            num_waiting=router.num_requests - num_running,
            num_blocks=num_blocks,
            num_used_blocks=num_blocks - sum(pool.num_free for pool in router.pools),
            num_calls=self.num_calls,
            num_tokens=self.num_tokens,
            busy_s=self.busy_s,
            num_places=router.num_ranks * router.num_places,
            seqs_per_rank=router.limit,
        )

    def cancel(self, request: Request) -> None:
        """End a request, now or when the call that it takes part in is over; called with the lock held."""
        if request in self._in_call:
            self._cancelled.add(request)
        else:
            self.core.scheduler.cancel(request)

    def poll_s(self) -> float:
        return _POLL_S if self.inbox else _IDLE_S

    def has_work(self) -> bool:
        scheduler = self.core.scheduler
        if scheduler.decode[self.name].status == "lost":
            return False
        scheduler.expire(self.core.clock())
        scheduler.admit()
        if scheduler.has_ended:
            self.core.publish()
        if self.inbox and self.inbox[0].is_ready:
            return True
        return self._may_call()

    def _may_call(self) -> bool:
        num_running = len(self.instance.router.running())
        may_call = num_running > 0 and not (self.is_patient and num_running < self.instance.router.num_requests)
        if not may_call:
            self._last_end = None
        return may_call

    def work(self) -> None:
        core = self.core
        self._take_arrivals()
        with core.changed:
            if not self._may_call():
                return
            core.scheduler.before_call(self.name)
            batch = self.instance.router.batch()
            self._in_call = {request for some in batch for request in some}
        begin = core.clock() if self._last_end is None else self._last_end
        call_began = core.clock()
        with core.device_lock, core.decode():
            decoded = self.instance.call(self.num_steps, batch)
        with core.changed:
            self.calls.append(Call(call_began, core.clock(), len(decoded)))
            num_taken = sum(one.num_tokens for one in decoded)
            self.num_calls += 1
            self.num_tokens += num_taken
            core.decode.tokens += num_taken
            core.decode.steps += self.num_steps
            for one in decoded:
                self._settle(one.request, one.num_tokens, one.is_finite)
            self._in_call, self._cancelled = set(), set()
            if self.controller is not None:
                most = max(map(len, batch))
                self._last_end = core.clock()
                self.controller.observe(most, self._last_end - begin, num_taken / max(len(decoded), 1))
                self.instance.router.limit = self.controller.limit
            core.scheduler.admit()
            core.publish([one.request for one in decoded])

    def _settle(self, request: Request, num_tokens: int, is_finite: bool) -> None:
        scheduler = self.core.scheduler
        scheduler.generated(request, num_tokens)
        if not is_finite:
            scheduler.fail(request, f"{request.request_id}: {NOT_FINITE_MESSAGE}")
        elif request.finish_reason is not None:
            scheduler.finish(request)
        elif request in self._cancelled:
            scheduler.cancel(request)

    def _take_arrivals(self) -> None:
        core = self.core
        for _ in range(MAX_ROUNDS_PER_CALL):
            with core.changed:
                if not (self.inbox and self.inbox[0].is_ready):
                    return
                handoff = self.inbox.pop(0)
            with core.device_lock, core.handoff():
                arrived = transfer.insert(self.instance, handoff)
            with core.changed:
                for request in arrived:
                    if request.stage == "handoff" and request.decode_name == self.name:
                        core.num_handoffs += 1
                        core.scheduler.handed_off(request)


def warm_up_handoff(prefill: Mapping[str, PrefillWorker], decode: Mapping[str, DecodeWorker]) -> None:
    """Compile the copies between the instances, each side's by its own thread."""
    for target in decode.values():
        for source in prefill.values():
            pair = (source.instance, target.instance)
            source.run_task(functools.partial(transfer.warm_up_source, *pair)).result()
        target.run_task(functools.partial(transfer.warm_up_target, target.instance)).result()
