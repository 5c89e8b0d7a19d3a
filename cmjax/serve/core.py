"""What the threads of an engine share: the scheduler under one lock, and the way of tokens to the clients."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

from cmjax.schedule import Request, Scheduler
from cmjax.serve.handle import RequestHandle


class Activity:
    """Seconds in which at least one thread was at something."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._active = 0
        self._since = 0.0

    def reset(self) -> None:
        """Count from nothing; nobody is at it."""
        self.seconds = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._active += 1
            if self._active == 1:
                self._since = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                if self._active == 0:
                    self.seconds += time.perf_counter() - self._since


@dataclasses.dataclass
class Core:
    """What the threads of an engine share. `changed` is held to touch the scheduler, the requests and what is here.

    Attributes:
        clock: seconds, monotonic.
        device_lock: held while a plan runs, where instances share devices: programs that two threads start on the same
            devices could queue in different orders.
        handles: of the requests under way that have a client.
        activities: what the instances spend their time with, by `kind` of plan.
    """

    scheduler: Scheduler
    clock: Callable[[], float] = time.monotonic
    device_lock: contextlib.AbstractContextManager = dataclasses.field(default_factory=contextlib.nullcontext)
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    handles: dict[Request, RequestHandle] = dataclasses.field(default_factory=dict)
    activities: dict[str, Activity] = dataclasses.field(
        default_factory=lambda: {kind: Activity() for kind in ("prefill", "handoff", "decode", "change", "cache")}
    )
    _delivering: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def wake(self) -> None:
        """Have the loops look for news; from any thread."""
        with self.changed:
            self.changed.notify_all()

    def deliver(self) -> None:
        """Tell the clients what is new, without the lock. One thread at a time does, so that each client's updates stay
        in order; it takes along what comes meanwhile."""
        while self.scheduler.has_updates and self._delivering.acquire(blocking=False):
            try:
                with self.changed:
                    updates = [(one, self.handles.get(one), update) for one, update in self.scheduler.take_updates()]
                now = self.clock()
                for _, handle, update in updates:
                    if handle is not None:
                        handle.update(update, now)
                with self.changed:
                    for request, _, update in updates:
                        if update.finish_reason is not None:
                            self.handles.pop(request, None)
                    self.changed.notify_all()
            finally:
                self._delivering.release()
