"""What an instance stores in the memory pool: blocks on their way there, and those known to be there."""

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np

from cmjax.schedule.blocks import Lease
from cmjax.schedule.pool_plans import Stored, StorePlan
from cmjax.schedule.stats import CacheStats

# Names of blocks that are known to be in the pool.
_MOST_KNOWN = 1 << 16


@dataclasses.dataclass(frozen=True)
class OutgoingBlock:
    """A block that is to be stored; see `StorePlan`. `lease` holds the instance's blocks until it has been read."""

    name: bytes
    namespace: str
    token_ids: np.ndarray
    lease: Lease
    step: int = -1
    hidden_row: int = -1
    rank: int = 0
    next_token: int = -1


class BlockStores:
    """Blocks that are to be stored, in the order they were computed, and the names of those that need not be.

    Args:
        plan_blocks: that a plan stores, at most, of each rank.
        counts: of all instances.
    """

    def __init__(self, plan_blocks: int, counts: CacheStats) -> None:
        self._plan_blocks, self._counts = plan_blocks, counts
        self._waiting: collections.deque[OutgoingBlock] = collections.deque()
        self._under_way: list[OutgoingBlock] = []
        self._known: collections.OrderedDict[bytes, None] = collections.OrderedDict()

    def __contains__(self, name: bytes) -> bool:
        """Whether a block is in the pool, or on its way there, as far as is known."""
        return name in self._known

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be read."""
        return not self._waiting and not self._under_way

    def add(self, block: OutgoingBlock) -> None:
        """Store a block."""
        self._waiting.append(block)
        self.note([block.name])

    def note(self, names: Iterable[bytes]) -> None:
        """The pool has these."""
        for name in names:
            self._known[name] = None
            self._known.move_to_end(name)
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)

    def forget(self, names: Iterable[bytes]) -> None:
        """The pool does not have these: they are stored when they are computed again."""
        for name in names:
            self._known.pop(name, None)

    def clear(self) -> None:
        """Store all anew."""
        self._known.clear()

    def take(self, news: Stored) -> None:
        """Blocks have been stored, or could not be."""
        self._counts.num_stored += news.num_stored
        self._counts.num_failed_stores += len(news.failed)
        self.forget(news.failed)

    def give_up(self) -> None:
        """Let go of what waits: its blocks are needed."""
        waiting, self._waiting = self._waiting, collections.deque()
        for one in waiting:
            one.lease.give_back()
        self.take(Stored(0, tuple(one.name for one in waiting)))

    def plan(self) -> StorePlan | None:
        """What to store next, of one step."""
        if not self._waiting:
            return None
        step, num_taken = self._waiting[0].step, collections.Counter[int]()
        blocks: list[OutgoingBlock] = []
        left: collections.deque[OutgoingBlock] = collections.deque()
        for one in self._waiting:
            if one.step == step and num_taken[one.rank] < self._plan_blocks:
                num_taken[one.rank] += 1
                blocks.append(one)
            else:
                left.append(one)
        self._under_way, self._waiting = blocks, left
        return StorePlan(
            names=tuple(one.name for one in blocks),
            namespaces=tuple(one.namespace for one in blocks),
            token_ids=np.stack([one.token_ids for one in blocks]),
            ranks=np.array([one.rank for one in blocks], np.int32),
            blocks=np.array([one.lease.ids for one in blocks], np.int32),
            step=step,
            hidden_rows=np.array([one.hidden_row for one in blocks], np.int32),
            next_token_ids=np.array([one.next_token for one in blocks], np.int32),
        )

    def commit(self, *, has_failed: bool = False) -> None:
        """The plan has been run: its blocks have been read, or could not be."""
        blocks, self._under_way = self._under_way, []
        for one in blocks:
            one.lease.give_back()
        if has_failed:
            self.take(Stored(0, tuple(one.name for one in blocks)))
