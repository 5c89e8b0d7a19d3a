"""How late the event loop is: what a request would wait for it at any moment, sampled at fixed times."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

_PERIOD_S = 0.01
_WINDOW_S = 60.0


class LoopLag:
    """Samples of a loop's lag, of the last minute.

    The loop is asked to wake up at fixed times, a hundredth of a second apart. A loop that is held for a second misses
    a hundred of them, and each counts with what it had to wait: the quantiles are those of a request that comes at any
    moment, not of the wake-ups that happened.

    Args:
        observe: called with each sample, in seconds.
        clock: seconds, monotonic.
    """

    def __init__(self, observe: Callable[[float], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._observe, self._clock = observe, clock
        self._samples: deque[float] = deque(maxlen=int(_WINDOW_S / _PERIOD_S))
        self._due = clock() + _PERIOD_S

    async def watch(self) -> None:
        """Sample until cancelled."""
        self._due = self._clock() + _PERIOD_S
        while True:
            await asyncio.sleep(max(self._due - self._clock(), 0))
            self.take()

    def take(self) -> None:
        """Take the samples that are due by now."""
        now = self._clock()
        self._due = max(self._due, now - _WINDOW_S)  # more than the window holds is nobody's business
        while self._due <= now:
            self._samples.append(now - self._due)
            self._observe(now - self._due)
            self._due += _PERIOD_S

    def quantiles(self) -> dict[str, float]:
        """`p50`, `p99`, `p999`, `max` in seconds, and `count` of samples; zeros where there are none."""
        ordered = sorted(self._samples)
        most = len(ordered) - 1
        named = {"p50": 0.5, "p99": 0.99, "p999": 0.999, "max": 1.0}
        found = {name: ordered[round(share * most)] if ordered else 0.0 for name, share in named.items()}
        return found | {"count": len(ordered)}
