"""What is on its way to the persistent tier of a node, and the thread that brings it there."""

import collections
import threading
from collections.abc import Callable

from cmjax.serve.caching.store import StoredKey
from cmjax.serve.caching.values import Value


class WriteQueue:
    """Values in the order they were put, bounded in bytes.

    Args:
        write: brings one to the disk; raises nothing.
        capacity: bytes that may wait; a value larger than that is let in alone.
        wait_s: seconds that `offer` waits for room.
        name: of the thread.
    """

    def __init__(self, write: Callable[[StoredKey, Value], None], capacity: int, wait_s: float, name: str) -> None:
        self._write, self._capacity, self._wait_s = write, capacity, wait_s
        self._items: collections.deque[tuple[StoredKey, Value]] = collections.deque()
        self._changed = threading.Condition()
        self._num_offered = self._num_done = 0
        self._stalled_at = -1  # what had been done when somebody waited in vain
        self._is_closed = False
        self.num_bytes = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def offer(self, key: StoredKey, value: Value) -> bool:
        """Take a value in; False where there is no room in time. While the disk hangs only the first one waits."""
        size = value.place.num_bytes
        with self._changed:
            wait_s = 0.0 if self._num_done == self._stalled_at else self._wait_s
            if self._is_closed or not self._changed.wait_for(lambda: self._has_room(size), wait_s):
                self._stalled_at = self._num_done
                return False
            self._items.append((key, value))
            self.num_bytes += size
            self._num_offered += 1
            self._changed.notify_all()
            return True

    def _has_room(self, size: int) -> bool:
        return self.num_bytes + size <= self._capacity or self._num_done == self._num_offered

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._is_closed)
                if not self._items:
                    return
                key, value = self._items.popleft()
            self._write(key, value)
            with self._changed:
                self.num_bytes -= value.place.num_bytes
                self._num_done += 1
                self._changed.notify_all()
            del key, value  # while waiting it must not keep what may have been evicted

    def flush(self) -> None:
        """Wait until all that was taken in before is done."""
        with self._changed:
            target = self._num_offered
            self._changed.wait_for(lambda: self._num_done >= target)

    def close(self) -> None:
        """Take no more in, write what is there, end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
