"""Whether blocks are fetched from the memory pool or computed again: whichever is expected to take less time."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class PoolRate:
    """What fetches of a tier have been measured to take: `latency_s` each, and then bytes by `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Of a fetch of so many bytes."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclasses.dataclass(frozen=True)
class PoolBlock:
    """A block that the pool has: in which tier ("dram", "disk", "redis"), and its bytes."""

    tier: str
    num_bytes: int


class FetchPolicy:
    """Prices a fetch against computing the same tokens, so that a slow tier costs no more than having no pool.

    What has not been measured is tried. A tier that was too late is left alone, whatever its figures say. One that has
    lost so often in a row is tried again with one block: that may have been a bad moment.
    """

    RETRY_AFTER = 32

    def __init__(self) -> None:
        self._num_declined: dict[str, int] = defaultdict(int)
        self._late: set[str] = set()

    def note(self, fetched: Iterable[PoolBlock], *, is_late: bool) -> None:
        """A fetch of these blocks has come, or was given up."""
        for block in fetched:
            (self._late.add if is_late else self._late.discard)(block.tier)

    def choose(self, found: Sequence[PoolBlock], rates: Mapping[str, PoolRate], compute_s: float | None) -> int:
        """How many of the blocks found, from the first on, to fetch: as many as save the most time.

        Args:
            rates: measured, by tier.
            compute_s: that computing one block takes; None where it is not known.
        """
        if compute_s is None:
            return len(found)
        best, best_saved = 0, 0.0
        rates = {**rates, **dict.fromkeys(self._late, PoolRate(math.inf, 1.0))}
        by_tier: dict[str, int] = defaultdict(int)
        for count, block in enumerate(found, 1):
            by_tier[block.tier] += block.num_bytes
            fetch_s = sum(rates[tier].seconds(size) for tier, size in by_tier.items() if tier in rates)
            if count * compute_s - fetch_s > best_saved:
                best, best_saved = count, count * compute_s - fetch_s
        for block in found[:best]:
            self._num_declined[block.tier] = 0
        return best + (best < len(found) and self._is_retried(found[best].tier))

    def _is_retried(self, tier: str) -> bool:
        """Whether the first block that is not worth it is fetched all the same."""
        self._num_declined[tier] += 1
        is_retried = self._num_declined[tier] == self.RETRY_AFTER
        if is_retried:
            self._num_declined[tier] = 0
        return is_retried
