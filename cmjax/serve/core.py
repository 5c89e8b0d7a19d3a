"""What the threads of an engine share: the scheduler under one lock, the way of tokens to the clients, the counts."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from cmjax.serve import transfer
from cmjax.serve.decode_instance import DecodeInstance
from cmjax.serve.handle import RequestUpdate
from cmjax.serve.prefill_instance import Prefilled, PrefillInstance
from cmjax.serve.request import Request
from cmjax.serve.scheduler import Scheduler

Send = Callable[[PrefillInstance, DecodeInstance, Sequence[Prefilled]], Iterator[transfer.Handoff]]


class Activity:
    """Seconds in which at least one thread was at something, and how much of it was done."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self.steps = 0
        self._lock = threading.Lock()
        self._active = 0
        self._since = 0.0

    def reset(self) -> None:
        """Count from nothing; nobody is at it."""
        self.seconds, self.tokens, self.steps = 0.0, 0, 0

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
    """What the threads of an engine share. `changed` is held to touch the scheduler, the requests and their handles.

    Attributes:
        clock: seconds, monotonic.
        send: the copy between instances, `transfer.send`; a test may put a failing one here.
        device_lock: held while a step runs, where instances share devices: programs that two threads start on the same
            devices could queue in different orders.
    """

    scheduler: Scheduler
    clock: Callable[[], float] = time.monotonic
    send: Send = transfer.send
    device_lock: contextlib.AbstractContextManager = dataclasses.field(default_factory=contextlib.nullcontext)
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    prefill: Activity = dataclasses.field(default_factory=Activity)
    handoff: Activity = dataclasses.field(default_factory=Activity)
    decode: Activity = dataclasses.field(default_factory=Activity)
    num_handoffs: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    last_error: BaseException | None = None

    def take_error(self) -> BaseException | None:
        """Return and forget what made an instance or a hand-off fail last."""
        error, self.last_error = self.last_error, None
        return error

    def publish(self, requests: Sequence[Request] = ()) -> None:
        """Tell the clients of these requests, and of those that have ended, what is new; then wake everybody."""
        now = self.clock()
        for request in dict.fromkeys([*requests, *self.scheduler.take_ended()]):
            if request.handle is None or request.handle.finish_reason is not None:
                continue
            update = _update_for(request)
            self.num_generation_tokens += len(update.token_ids)
            request.handle.update(update, now)
        self.changed.notify_all()


def _update_for(request: Request) -> RequestUpdate:
    assert request.handle is not None
    known = len(request.handle.token_ids)
    logprobs = prompt_logprobs = None
    if request.sampling.logprobs is not None:
        logprobs = request.logprobs[known : len(request.token_ids)]
    if request.sampling.prompt_logprobs is not None and known == 0 and request.token_ids:
        prompt_logprobs = request.prompt_logprobs
    has_ended = request.stage == "done"
    return RequestUpdate(
        request.token_ids[known:],
        logprobs,
        prompt_logprobs,
        request.finish_reason if has_ended else None,
        request.error,
    )
