"""What the pool says of itself, for the metrics and the status page."""

import dataclasses
import threading

from cmjax.serve.caching.values import Tier

_KEPT = 0.95  # of what was measured before, at each new measurement


@dataclasses.dataclass
class Counters:
    """Of a node, since it was made.

    Attributes:
        num_puts: values that were put.
        num_refused: values that no tier could hold, or that a server would not take.
        hits: tier -> values found there.
        num_misses: values that were not found.
        bytes_read, bytes_written: of values, got and put.
        evictions: tier -> values that left it to make room; those of "dram" that are on disk are still found there.
        num_lost: of those evicted from DRAM, the ones that were nowhere else.
        num_unwritten: values that never came to the disk: it was full, broken, or slower than they came.
        num_corrupt: values that were not what had been put, or gone: they were deleted, and are misses.
        num_errors: what the disk or the server failed in.
    """

    num_puts: int = 0
    num_refused: int = 0
    hits: dict[Tier, int] = dataclasses.field(default_factory=dict)
    num_misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    evictions: dict[Tier, int] = dataclasses.field(default_factory=dict)
    num_lost: int = 0
    num_unwritten: int = 0
    num_corrupt: int = 0
    num_errors: int = 0

    def hit(self, tier: Tier, num_bytes: int) -> None:
        """A value was found."""
        self.hits[tier] = self.hits.get(tier, 0) + 1
        self.bytes_read += num_bytes

    def evicted(self, tier: Tier) -> None:
        """A value has made room."""
        self.evictions[tier] = self.evictions.get(tier, 0) + 1

    def copy(self) -> "Counters":
        """As they are now."""
        return dataclasses.replace(self, hits=dict(self.hits), evictions=dict(self.evictions))


@dataclasses.dataclass(frozen=True)
class NodeStats:
    """A node now.

    Attributes:
        name, cpu: as in `Place`.
        kind: "local" or "redis".
        is_up: its disk or server answered when it was last asked.
        num_keys: it has; of a server, all of its database.
        dram_bytes, dram_capacity: of values in memory; of a server, all that it uses and may use (0: no limit).
        disk_bytes, disk_capacity: of files, whole pages of the disk; 0 without a persistent tier.
        queued_bytes: of values on their way to the disk.
        counters: since the node was made.
    """

    name: str
    cpu: int
    kind: str
    is_up: bool
    num_keys: int
    dram_bytes: int
    dram_capacity: int
    disk_bytes: int
    disk_capacity: int
    queued_bytes: int
    counters: Counters


@dataclasses.dataclass(frozen=True)
class NamespaceStats:
    """A namespace on the embedded nodes now.

    Attributes:
        num_bytes, num_keys: of its values, each counted once whatever tiers it is in.
        quota: bytes it may have; None: as many as there is room for.
        num_refused: values that were larger than the quota.
    """

    namespace: str
    num_bytes: int
    num_keys: int
    quota: int | None
    num_refused: int


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """The pool now; `version` counts the changes of its membership."""

    version: int
    nodes: tuple[NodeStats, ...]
    namespaces: tuple[NamespaceStats, ...]


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast a tier has been lately; moving averages over its gets.

    Attributes:
        latency_s: seconds from asking for a value to having it, its bytes included.
        bytes_per_s: over that time.
    """

    latency_s: float
    bytes_per_s: float


class Meter:
    """Measures the gets of each tier."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[Tier, tuple[float, float, float]] = {}  # values, bytes, seconds; older ones fade

    def add(self, tier: Tier, num_values: int, num_bytes: int, seconds: float) -> None:
        """So many values have been got."""
        with self._lock:
            values, size, time = self._sums.get(tier, (0.0, 0.0, 0.0))
            new = (_KEPT * values + num_values, _KEPT * size + num_bytes, _KEPT * time + seconds)
            self._sums[tier] = new

    def rates(self) -> dict[Tier, Rate]:
        """Of the tiers that have been measured."""
        with self._lock:
            sums = dict(self._sums)
        return {tier: Rate(time / values, size / time) for tier, (values, size, time) in sums.items() if time > 0}
