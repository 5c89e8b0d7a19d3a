"""What a server has seen of late, for its status page: samples of its engine, times of its last requests, errors."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from cmjax.serve import RequestHandle
from cmjax.serve.http.backend import Backend

SPAN_S = 1800.0  # how far back samples go
PERIOD_S = 5.0  # between two of them
RECENT_S = 300.0  # how long the times of a request count
MAX_REQUESTS = 2000  # whose times are kept

CLIENT_GONE = 499  # nobody gets this answer, so it is no error


@dataclasses.dataclass(frozen=True)
class Times:
    """Of a request that is over, in seconds.

    Attributes:
        at: when it was over, by the history's clock.
        ttft: from its arrival to its first token; None: it got none.
        tpot: from its first token to its last, over the tokens but the first; None: they came all at once.
    """

    at: float
    ttft: float | None
    tpot: float | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """The server at a moment.

    Attributes:
        at_s: seconds since its start.
        num_running, num_waiting, kv_usage, num_generation_tokens: see `EngineStats`.
        num_looked_up, num_cached: prompt tokens that the prefix cache was asked for, and those it had.
        ttft_s, tpot_s: medians of the requests that ended since the sample before; None where none did.
        num_refused, num_failed: answers with a status of 4xx and of 5xx since the start.
    """

    at_s: float
    num_running: int
    num_waiting: int
    kv_usage: float
    num_generation_tokens: int
    num_looked_up: int
    num_cached: int
    ttft_s: float | None
    tpot_s: float | None
    num_refused: int
    num_failed: int


class History:
    """Kept in a ring of `SPAN_S`, so that it stays small however long the server runs. For the event loop's thread.

    Attributes:
        num_refused, num_failed: answers with a status of 4xx and of 5xx, and streams that ended with such an error.
    """

    def __init__(self, engine: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock, self._began = engine, clock, clock()
        self._samples: collections.deque[Sample] = collections.deque(maxlen=int(SPAN_S / PERIOD_S))
        self._requests: collections.deque[Times] = collections.deque(maxlen=MAX_REQUESTS)
        self._sampled = self._began
        self.num_refused = self.num_failed = 0

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    def note_answer(self, status: int) -> None:
        """An answer had this status, or was a stream that ended with an error of this status."""
        self.num_refused += 400 <= status < 500 and status != CLIENT_GONE
        self.num_failed += status >= 500

    def note_request(self, handle: RequestHandle) -> None:
        """A request is over."""
        times, num_tokens = handle.times, len(handle.token_ids)
        ttft = tpot = None
        if times.first_token is not None and times.last_token is not None:
            ttft = times.first_token - times.arrival
            tpot = (times.last_token - times.first_token) / max(num_tokens - 1, 1) or None
        self._requests.append(Times(self._clock(), ttft, tpot))

    async def follow(self) -> None:
        """Take a sample every `PERIOD_S` seconds, until it is cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(PERIOD_S)

    def sample(self) -> None:
        """Take a sample."""
        now, stats = self._clock(), self._engine.stats()
        ended = [one for one in self._requests if one.at > self._sampled]
        ttft, tpot = (float(np.median(values)) if values else None for values in _times(ended))
        self._sampled = now
        self._samples.append(
            Sample(
                at_s=now - self._began,
                num_running=stats.num_running,
                num_waiting=stats.num_waiting,
                kv_usage=stats.kv_usage,
                num_generation_tokens=stats.num_generation_tokens,
                num_looked_up=stats.cache.num_queried,
                num_cached=stats.cache.num_hits + stats.cache.num_pool_hits,
                ttft_s=ttft,
                tpot_s=tpot,
                num_refused=self.num_refused,
                num_failed=self.num_failed,
            )
        )

    def since(self, after_s: float) -> list[Sample]:
        """The samples taken later than so many seconds after the start."""
        return [one for one in self._samples if one.at_s > after_s]

    def recent(self) -> dict[str, object]:
        """Median and p99 of the times of the requests that ended within `RECENT_S`, in seconds; None without any."""
        now = self._clock()
        ended = [one for one in self._requests if one.at > now - RECENT_S]
        ttft, tpot = map(_quantiles, _times(ended))
        return {"span_s": RECENT_S, "num_requests": len(ended), "ttft_s": ttft, "tpot_s": tpot}


def _times(requests: Sequence[Times]) -> tuple[list[float], list[float]]:
    """All there are of `ttft`, and of `tpot`."""
    ttft = [one.ttft for one in requests if one.ttft is not None]
    return ttft, [one.tpot for one in requests if one.tpot is not None]


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    median, p99 = np.percentile(values, (50, 99))
    return {"p50": float(median), "p99": float(p99)}
