"""What a client holds of a request under way: its new tokens as they come, its end, and the way to cancel it."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from cmjax.schedule import FinishReason, RequestOutput, RequestTimes, RequestUpdate, TokenLogprobs

logger = logging.getLogger(__name__)


class RequestError(Exception):
    """A request ended without its result: the message says why."""


class RequestHandle:
    """A submitted request. Read its updates once, with `for` in a thread or `async for` in an event loop.

    Attributes:
        request_id: unique in its engine.
        prompt_ids: as submitted.
        token_ids: generated so far.
        finish_reason: None while it runs.
        times: see `RequestTimes`.
        num_preemptions: how often it had to give its blocks back and start over from its tokens.
        num_cached_tokens: of its prompt, those that were in the prefix cache.
    """

    def __init__(self, request_id: str, prompt_ids: list[int], times: RequestTimes, cancel: Callable[[], None]) -> None:
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.times = times
        self.num_preemptions = self.num_cached_tokens = 0
        self._logprobs: list[TokenLogprobs] | None = None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._cancel = cancel
        self._lock = threading.Lock()
        self._listener: Callable[[RequestUpdate], None] | None = None
        self._unheard: list[RequestUpdate] = []
        self._is_passing = False
        self._done = threading.Event()

    def cancel(self) -> None:
        """End the request with `finish_reason` "abort", if it still runs; its place and blocks are free at the end of
        the call under way. Returns at once, from any thread."""
        self._cancel()

    def listen(self, listener: Callable[[RequestUpdate], None]) -> None:
        """Have `listener` called with every update, those that came before first; in the engine's thread, so it must
        not take long. What it raises is logged."""
        with self._lock:
            if self._listener is not None:
                raise RuntimeError(f"request {self.request_id} has a listener already")
            self._listener = listener
        self._pass_on()

    def __iter__(self) -> Iterator[RequestUpdate]:
        updates: queue.SimpleQueue[RequestUpdate] = queue.SimpleQueue()
        self.listen(updates.put)
        while True:
            update = updates.get()
            yield update
            if update.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[RequestUpdate]:
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[RequestUpdate] = asyncio.Queue()

        def forward(update: RequestUpdate) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(updates.put_nowait, update)

        self.listen(forward)
        while True:
            update = await updates.get()
            yield update
            if update.finish_reason is not None:
                return

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end, at most `timeout` seconds.

        Raises:
            RequestError: the request ended with an error or was cancelled.
            TimeoutError: it has not ended.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"request {self.request_id} has not ended within {timeout} s")
        if self.finish_reason not in ("stop", "length"):
            raise RequestError(self.error or f"request {self.request_id} was cancelled")
        return RequestOutput(self.prompt_ids, self.token_ids, self.finish_reason, self._logprobs, self._prompt_logprobs)

    def update(self, update: RequestUpdate, now: float) -> None:
        """Take note of an update and pass it on; called by the engine alone."""
        with self._lock:
            self.token_ids += update.token_ids
            self.num_preemptions, self.num_cached_tokens = update.num_preemptions, update.num_cached_tokens
            if update.logprobs is not None:
                self._logprobs = self._logprobs or []
                self._logprobs += update.logprobs
            if update.prompt_logprobs is not None:
                self._prompt_logprobs = update.prompt_logprobs
            if update.token_ids:
                self.times.first_token = self.times.first_token or now
                self.times.last_token = now
            if update.finish_reason is not None:
                self.finish_reason, self.error = update.finish_reason, update.error
                self.times.finished = now
            self._unheard.append(update)
        self._pass_on()
        if update.finish_reason is not None:
            self._done.set()

    def _pass_on(self) -> None:
        """Have the listener called with what it has not heard, in order, without the lock: it may cancel the request,
        and so bring about the next update. One thread at a time does, and takes along what comes meanwhile."""
        while True:
            with self._lock:
                listener = self._listener
                if listener is None or self._is_passing or not self._unheard:
                    return
                self._is_passing, unheard, self._unheard = True, self._unheard, []
            for update in unheard:
                try:
                    listener(update)
                except Exception:  # the client's own: it must not cost the others theirs
                    logger.exception("request %s: its listener failed", self.request_id)
            with self._lock:
                self._is_passing = False
