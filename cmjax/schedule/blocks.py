"""Ids that are taken and given back: the blocks of a cache, the places of a rank."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike

from cmjax.errors import UserError


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` tokens fill."""
    return -(-num_tokens // block_size)


def slot_mapping(blocks: Sequence[int] | np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """Return the slot of each position, `int32`: `blocks[position // block_size] * block_size + offset`.

    Example: with blocks [7, 2] of 4 tokens, position 5 is slot 9.
    """
    table = np.asarray(blocks, np.int32)
    return (table[positions // block_size] * block_size + positions % block_size).astype(np.int32)


class Fence:
    """Keeps what is given back out of use while a plan is under way.

    An executor reads and writes what its plan names without any lock. So nothing of an instance gets another owner
    before the plan has been committed, whatever becomes of the attempts in it meanwhile.
    """

    def __init__(self) -> None:
        self._is_closed = False
        self._waiting: list[Lease] = []

    def close(self) -> None:
        """A plan is under way."""
        self._is_closed = True

    def open(self) -> None:
        """It has been committed: what was given back meanwhile is free."""
        self._is_closed = False
        waiting, self._waiting = self._waiting, []
        for lease in waiting:
            lease.pool.free(lease.ids)

    def pass_back(self, lease: "Lease") -> None:
        """Free what a lease had, now or when the fence opens."""
        if self._is_closed:
            self._waiting.append(lease)
        else:
            lease.pool.free(lease.ids)


class BlockPool:
    """Ids `0 .. num_blocks - 1`, each free or held by one or more leases. Freed ones are used again in the order they
    were freed. Taking and giving back cost time by what is taken and given back alone.

    Args:
        num_blocks: how many there are.
        fence: of the instance whose blocks they are; None: what is given back is free at once.
    """

    def __init__(self, num_blocks: int, fence: Fence | None = None) -> None:
        if num_blocks < 1:
            raise UserError(f"num_blocks {num_blocks} is not positive")
        self.num_blocks = num_blocks
        self.fence = fence or Fence()
        self._free = collections.deque(range(num_blocks))
        self._num_holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    def take(self, count: int) -> "Lease":
        """Take `count` blocks; asking for more than `num_free` is an error of the caller."""
        return Lease(self, self.allocate(count))

    def share(self, blocks: Sequence[int]) -> "Lease":
        """Another lease of blocks that somebody holds: they are free when all their leases have been given back."""
        self.hold(blocks)
        return Lease(self, list(blocks))

    def is_sole_holder(self, lease: "Lease") -> bool:
        """Whether no other lease has any of its blocks."""
        return all(self._num_holders[block] == 1 for block in lease.ids)

    def allocate(self, count: int) -> list[int]:
        """Ids for a lease of this pool."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} of {self.num_blocks} are free")
        taken = [self._free.popleft() for _ in range(count)]
        for block in taken:
            self._num_holders[block] = 1
        return taken

    def hold(self, blocks: Sequence[int]) -> None:
        """One more lease holds these."""
        for block in blocks:
            self._num_holders[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One lease less holds these; those that nobody holds any more are free."""
        for block in blocks:
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self._free.append(block)


class Lease:
    """Blocks of one pool in somebody's hands, given back once.

    Attributes:
        pool: whose they are, and where they go back to.
        ids: the blocks, in the order their tokens fill them.
    """

    __slots__ = ("_is_over", "ids", "pool")

    def __init__(self, pool: BlockPool, ids: list[int]) -> None:
        self.pool, self.ids, self._is_over = pool, ids, False

    def extend(self, count: int) -> list[int]:
        """Take `count` more of the pool; returns them."""
        more = self.pool.allocate(count)
        self.ids += more
        return more

    def share(self) -> "Lease":
        """Another lease of the same blocks: they are free when all their leases have been given back."""
        return self.pool.share(self.ids)

    def give_back(self) -> None:
        """Let go of the blocks; a second time is an error of the caller."""
        if self._is_over:
            raise ValueError(f"blocks {self.ids} have been given back already")
        self._is_over = True
        self.pool.fence.pass_back(self)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one after another.

    Attributes:
        values: `[sum of lengths]`.
        lengths: `int32[rows]`.
    """

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]], dtype: DTypeLike = np.int32) -> "Ragged":
        """From one sequence a row."""
        values = np.array([value for row in rows for value in row], dtype)
        return cls(values, np.array([len(row) for row in rows], np.int32))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each row's values."""
        yield from np.split(self.values, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else ()

    def write_into(self, table: np.ndarray, rows: np.ndarray, first: np.ndarray | int = 0) -> None:
        """Put each row's values into a row of `table[any, width]`, from column `first` on (`int32[rows]` or one for
        all)."""
        starts = np.cumsum(self.lengths) - self.lengths
        columns = np.arange(len(self.values)) + np.repeat(
            np.broadcast_to(first, self.lengths.shape) - starts, self.lengths
        )
        table[np.repeat(rows, self.lengths), columns] = self.values
