"""The way down of a server: what runs is finished within a time, what is not is cut, and that is told."""

from collections.abc import Callable
from typing import Protocol

_GRACE_S = 2.0  # for those that are cut to tell their clients; one that does not read is not waited for


class Calls(Protocol):
    """What is open."""

    is_draining: bool

    @property
    def num_open(self) -> int:
        """Calls that have not been answered to their end."""
        ...

    def cut(self) -> int:
        """End all that is open, and return how many calls that is."""
        ...


class Drain:
    """From the first signal to the end.

    Attributes:
        num_cut: calls that had not been answered to their end in time.
        seconds: for which what runs had the time to end.
    """

    def __init__(self, calls: Calls, timeout_s: float, clock: Callable[[], float]) -> None:
        self._calls, self._timeout_s, self._clock = calls, timeout_s, clock
        self._began = 0.0
        self._end: float | None = None
        self._is_cut = False
        self.num_cut, self.seconds = 0, 0.0

    def signal(self) -> None:
        """A signal has come: nothing new from now on; a second one: nothing is waited for either."""
        now = self._clock()
        if not self._calls.is_draining:
            self._calls.is_draining = True
            self._began, self._end = now, now + self._timeout_s
        elif not self._is_cut:
            self._end = now

    def is_over(self) -> bool:
        """Whether the server may end now; asked again and again, it cuts what is open when the time is over."""
        if self._end is None:
            return False
        if self._calls.num_open == 0:
            return True
        if self._clock() < self._end:
            return False
        if self._is_cut:
            return True
        self._is_cut = True
        self.seconds = self._clock() - self._began
        self._end = self._clock() + _GRACE_S
        self.num_cut = self._calls.cut()
        return False
