"""Whether what lies outside of this process answers: after a failure it is left alone for a while."""

import threading
import time

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 15.0


class Health:
    """Of a server or a disk. After a failure nobody tries it for a pause, which doubles each time; then one caller
    does, so that a dead server does not cost every call its timeout.

    Args:
        first_pause_s, longest_pause_s: seconds.
    """

    def __init__(self, first_pause_s: float = FIRST_PAUSE_S, longest_pause_s: float = LONGEST_PAUSE_S) -> None:
        self._lock = threading.Lock()
        self._first_pause_s, self._longest_pause_s = first_pause_s, longest_pause_s
        self._pause_s = 0.0
        self._retry_at = 0.0

    @property
    def is_up(self) -> bool:
        """Nothing has failed since it last worked."""
        return self._pause_s == 0

    @property
    def is_due(self) -> bool:
        """The next who asks may try."""
        return self.is_up or time.monotonic() >= self._retry_at

    def may_try(self) -> bool:
        """Whether the caller may: always while it is up, one caller a pause while it is not."""
        if self.is_up:
            return True
        with self._lock:
            now = time.monotonic()
            if now < self._retry_at:
                return False
            self._retry_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
            return True

    def failed(self) -> None:
        """A try has failed."""
        with self._lock:
            self._pause_s = self._pause_s or self._first_pause_s
            self._retry_at = max(self._retry_at, time.monotonic() + self._pause_s)

    def worked(self) -> None:
        """A try has worked."""
        if not self.is_up:
            with self._lock:
                self._pause_s = 0.0
