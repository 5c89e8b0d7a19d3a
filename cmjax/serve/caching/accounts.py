"""Namespaces: what each has on the embedded nodes, and what it may have."""

import dataclasses
import threading
from typing import Protocol

from cmjax.serve.caching.stats import NamespaceStats


class Evicts(Protocol):
    """A node that makes room within a namespace."""

    def oldest(self, namespace: str) -> int | None:
        """When the namespace's value that was used longest ago was used, in nanoseconds; None where it has none."""

    def evict_oldest(self, namespace: str) -> bool:
        """Delete that value; False where there is none."""


@dataclasses.dataclass
class _Account:
    num_bytes: int = 0
    num_keys: int = 0
    num_refused: int = 0


class Accounts:
    """Bytes and keys by namespace over all the embedded nodes. Its lock is the innermost: it calls nobody under it.

    Args:
        default_quota: bytes of each namespace that no other quota has been set for; None: no limit.
    """

    def __init__(self, default_quota: int | None = None) -> None:
        self.default_quota = default_quota
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}
        self._quotas: dict[str, int | None] = {}
        self._nodes: list[Evicts] = []
        self.num_servers = 0  # that share the quotas

    def enroll(self, node: Evicts) -> None:
        """Its values count, and may have to make room."""
        with self._lock:
            self._nodes = [*self._nodes, node]

    def dismiss(self, node: Evicts) -> None:
        """It has none any more."""
        with self._lock:
            self._nodes = [one for one in self._nodes if one is not node]

    def count_server(self, change: int) -> None:
        """One more server shares the quotas, or one less (-1)."""
        with self._lock:
            self.num_servers += change

    def quota(self, namespace: str) -> int | None:
        """Bytes that the namespace may have; None: no limit."""
        return self._quotas.get(namespace, self.default_quota)

    def quotas(self) -> dict[str, int | None]:
        """Those that have been set."""
        with self._lock:
            return dict(self._quotas)

    def set_quota(self, namespace: str, num_bytes: int | None) -> None:
        """From now on it may have so many bytes; what is over that is deleted, those used longest ago first."""
        with self._lock:
            self._quotas[namespace] = num_bytes
        self.enforce(namespace)

    def enforce(self, namespace: str) -> None:
        """Delete what the namespace has over its quota."""
        while self._is_over(namespace) and self._evict_oldest(namespace):
            pass

    def _is_over(self, namespace: str) -> bool:
        quota = self.quota(namespace)
        with self._lock:
            account = self._accounts.get(namespace)
            return quota is not None and account is not None and account.num_bytes > quota

    def make_room(self, namespace: str, num_bytes: int) -> bool:
        """Count one more value, for which the namespace's own oldest ones go; False where it alone is over the quota,
        or others take the room as fast as it is made."""
        while not self._take(namespace, num_bytes):
            quota = self.quota(namespace)
            is_too_large = quota is not None and num_bytes > quota
            if is_too_large or not self._evict_oldest(namespace):
                self.refuse(namespace)
                return False
        return True

    def refuse(self, namespace: str) -> None:
        """Count a value that its quota keeps out."""
        with self._lock:
            self._account(namespace).num_refused += 1

    def _take(self, namespace: str, num_bytes: int) -> bool:
        quota = self.quota(namespace)
        with self._lock:
            account = self._account(namespace)
            if quota is not None and account.num_bytes + num_bytes > quota:
                return False
            account.num_bytes += num_bytes
            account.num_keys += 1
            return True

    def add(self, namespace: str, num_bytes: int) -> None:
        """Count a value that is there already, whatever the quota."""
        with self._lock:
            account = self._account(namespace)
            account.num_bytes += num_bytes
            account.num_keys += 1

    def give_back(self, namespace: str, num_bytes: int) -> None:
        """Count a value less."""
        with self._lock:
            account = self._account(namespace)
            account.num_bytes -= num_bytes
            account.num_keys -= 1

    def _account(self, namespace: str) -> _Account:
        return self._accounts.setdefault(namespace, _Account())

    def _evict_oldest(self, namespace: str) -> bool:
        """On whichever node it is."""
        nodes = self._nodes
        ages = [(age, index) for index, node in enumerate(nodes) if (age := node.oldest(namespace)) is not None]
        return bool(ages) and nodes[min(ages)[1]].evict_oldest(namespace)

    def stats(self) -> tuple[NamespaceStats, ...]:
        """Each namespace now."""
        with self._lock:
            return tuple(
                NamespaceStats(name, one.num_bytes, one.num_keys, self.quota(name), one.num_refused)
                for name, one in sorted(self._accounts.items())
            )
