"""The memory pool: one key-value store over the DRAM and the disks of its nodes (paper, section 4.4)."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cmjax.serve.caching.accounts import Accounts
from cmjax.serve.caching.controller import Controller
from cmjax.serve.caching.node import PoolNode
from cmjax.serve.caching.stats import Meter, PoolStats, Rate
from cmjax.serve.caching.values import Buffer, Place, Tier, Value, digest_of

T = TypeVar("T")


class MemoryPool:
    """What the serving side sees of the pool; thread-safe.

    Values are parts under a key in a namespace. They lie on the nodes by consistent hashing and leave them, those used
    longest ago first, when there is no more room: whoever puts one may find it or not, but never another one. Nothing
    that happens to a disk or a server is an exception: it is a miss or a False, and counted in `stats`.

    Args:
        nodes: of the pool; they come together, so that what they have from before is judged once, and the pool closes
            them.
        folder: for the controller's record; None: it is kept nowhere, and what lies on the nodes is wiped.
        namespace_bytes: quota of each namespace that no other is set for; None: no limit.
        num_threads: of the asynchronous calls.
        adopt: register what lies on the nodes, whatever epoch it bears.

    Raises:
        UserError: a node cannot be used.
    """

    def __init__(
        self,
        nodes: Sequence[PoolNode] = (),
        *,
        folder: str | os.PathLike[str] | None = None,
        namespace_bytes: int | None = None,
        num_threads: int = 4,
        adopt: bool = False,
    ) -> None:
        self._accounts, self._meter = Accounts(namespace_bytes), Meter()
        self._controller = Controller(None if folder is None else Path(folder), self._accounts, self._meter)
        if nodes:
            self._controller.join(nodes, adopt)
        self._threads = ThreadPoolExecutor(num_threads, "pool")

    def put(self, namespace: str, items: Sequence[tuple[bytes, Sequence[Buffer]]]) -> list[bool]:
        """Put values under keys, in place of what is there; they are copied.

        Args:
            items: of `(key, parts)`.

        Returns:
            For each whether it is there now. False: it is larger than the quota or the memory of its node, or the
            server that it belongs on did not take it; then there is what was there before, or nothing.

        Raises:
            ValueError: a value has no parts, too many, or some that are not contiguous.
        """
        digests = [digest_of(namespace, key) for key, _ in items]

        def work(node: PoolNode, rows: list[int]) -> list[bool]:
            return node.put(namespace, [(digests[row], items[row][1]) for row in rows])

        return self._on_nodes(digests, work, False)

    def get(self, namespace: str, keys: Sequence[bytes]) -> list[Value | None]:
        """The values under keys, None for a miss. Those in DRAM are not copied."""
        return self._of_keys(namespace, keys, lambda node, digests: node.get(namespace, digests), None)

    def contains(self, namespace: str, keys: Sequence[bytes]) -> list[Place | None]:
        """Where the values under keys lie, None for a miss; when they were used last stays as it is."""
        return self._of_keys(namespace, keys, lambda node, digests: node.contains(namespace, digests), None)

    def delete(self, namespace: str, keys: Sequence[bytes]) -> list[bool]:
        """Delete the values under keys; whether each was there. One on a server that does not answer is deleted before
        that is used again."""
        return self._of_keys(namespace, keys, lambda node, digests: node.delete(namespace, digests), False)

    def _of_keys(
        self,
        namespace: str,
        keys: Sequence[bytes],
        work: Callable[[PoolNode, list[int]], list[T]],
        otherwise: T,
    ) -> list[T]:
        digests = [digest_of(namespace, key) for key in keys]
        return self._on_nodes(digests, lambda node, rows: work(node, [digests[row] for row in rows]), otherwise)

    def _on_nodes(self, digests: list[int], work: Callable[[PoolNode, list[int]], list[T]], otherwise: T) -> list[T]:
        """Each node does its share (`rows` of the digests); `otherwise` where there is no node."""
        results = [otherwise] * len(digests)
        with self._controller.view() as view:
            for node, rows in view.by_node(digests):
                for row, result in zip(rows, work(node, rows), strict=True):
                    results[row] = result
        return results

    def put_async(self, namespace: str, items: Sequence[tuple[bytes, Sequence[Buffer]]]) -> Future[list[bool]]:
        """As `put`, on a thread of the pool; the parts must stay as they are until it is done."""
        return self._threads.submit(self.put, namespace, items)

    def get_async(self, namespace: str, keys: Sequence[bytes]) -> Future[list[Value | None]]:
        """As `get`, on a thread of the pool."""
        return self._threads.submit(self.get, namespace, keys)

    def contains_async(self, namespace: str, keys: Sequence[bytes]) -> Future[list[Place | None]]:
        """As `contains`, on a thread of the pool."""
        return self._threads.submit(self.contains, namespace, keys)

    def delete_async(self, namespace: str, keys: Sequence[bytes]) -> Future[list[bool]]:
        """As `delete`, on a thread of the pool."""
        return self._threads.submit(self.delete, namespace, keys)

    def clear(self, namespace: str | None = None) -> None:
        """Delete all that was put into a namespace before (None: into all)."""
        with self._controller.view() as view:
            for node in view.nodes.values():
                node.clear(namespace)

    def set_quota(self, namespace: str, num_bytes: int | None) -> None:
        """Bytes that a namespace may have from now on (None: no limit); what it has over that goes.

        Raises:
            UserError: the folder cannot be written to; until the end of the process the quota holds.
        """
        self._controller.set_quota(namespace, num_bytes)

    def join(self, node: PoolNode, *, adopt: bool = False) -> None:
        """Take a node in: about one in n + 1 of the keys belong there from now on, and are misses at first.

        Args:
            adopt: register what lies on it, whatever epoch it bears.

        Raises:
            UserError: it cannot be used, or there is one of this name.
        """
        self._controller.join([node], adopt)

    def leave(self, name: str) -> None:
        """Let a node go, and close it: its keys are misses from now on.

        Raises:
            UserError: there is no such node.
        """
        self._controller.leave(name)

    def stats(self) -> PoolStats:
        """The pool now."""
        with self._controller.view() as view:
            nodes = tuple(node.stats() for node in view.nodes.values())
            return PoolStats(view.version, nodes, self._accounts.stats())

    def rates(self) -> dict[Tier, Rate]:
        """How fast gets have been lately, by the tier they found values in; tiers not measured yet are left out."""
        return self._meter.rates()

    def flush(self) -> None:
        """Wait until all that was put is in the persistent tier, or will never be."""
        with self._controller.view() as view:
            for node in view.nodes.values():
                node.flush()

    def close(self) -> None:
        """End, once what is under way is done; everything is a miss from now on."""
        self._threads.shutdown()
        self._controller.close()
