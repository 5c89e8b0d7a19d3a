"""What every node of the pool can do."""

import abc
from collections.abc import Callable, Sequence

from cmjax.serve.caching.accounts import Accounts
from cmjax.serve.caching.stats import Meter, NodeStats
from cmjax.serve.caching.values import Buffer, Place, Value

Owns = Callable[[int], bool]  # digest -> whether it belongs on this node


class PoolNode(abc.ABC):
    """A place for values; thread-safe. Keys are digests of namespace and key (`digest_of`).

    Between `start` and `close`, nothing that happens to a disk or a server comes out as an exception: it is a miss or a
    False, and counted. A put that returned False has left what was under the key before, or nothing.

    Attributes:
        name: unlike that of every other node.
        cpu: number of the node in the pool.
        kind: "local" or "redis".
        is_shared: other processes use its segment too, so that whatever epoch it bears is the pool's.
    """

    name: str
    cpu: int
    kind: str
    is_shared: bool = False

    @abc.abstractmethod
    def read_epoch(self) -> str | None:
        """The token that its segment bears; None where it bears none, or there is nothing that outlives the process.

        Raises:
            OSError: it cannot be read.
        """

    @abc.abstractmethod
    def start(self, epoch: str, keep: bool, accounts: Accounts, meter: Meter) -> None:
        """Begin, with the segment under this token.

        Args:
            keep: register what lies in the segment; else wipe it.
            accounts: where its namespaces are counted.
            meter: where its gets are measured.

        Raises:
            OSError: it cannot be read or written.
        """

    @abc.abstractmethod
    def put(self, namespace: str, items: Sequence[tuple[int, Sequence[Buffer]]]) -> list[bool]:
        """Put values in place of what is there; whether each is there now."""

    @abc.abstractmethod
    def get(self, namespace: str, digests: Sequence[int]) -> list[Value | None]:
        """The values, and make them the ones used last."""

    @abc.abstractmethod
    def contains(self, namespace: str, digests: Sequence[int]) -> list[Place | None]:
        """Where the values lie; their order of use stays."""

    @abc.abstractmethod
    def delete(self, namespace: str, digests: Sequence[int]) -> list[bool]:
        """Delete the values; whether each was there."""

    @abc.abstractmethod
    def clear(self, namespace: str | None) -> None:
        """Delete a namespace's values that were put before (None: everybody's)."""

    @abc.abstractmethod
    def retain(self, owns: Owns) -> None:
        """Delete what does not belong here any more: were it to belong here again later, it might be out of date."""

    @abc.abstractmethod
    def stats(self) -> NodeStats:
        """The node now."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Wait until what was put before is in the persistent tier, or will never be."""

    @abc.abstractmethod
    def close(self) -> None:
        """End; what is in the persistent tier stays there."""
