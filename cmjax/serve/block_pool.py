"""Bookkeeping of cache blocks: which are free, and where a request's tokens go. Plain Python, no arrays of JAX."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cmjax.errors import UserError


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` tokens fill."""
    return -(-num_tokens // block_size)


def slot_mapping(blocks: Sequence[int], positions: np.ndarray, block_size: int) -> np.ndarray:
    """Return the slot of each position, `int32`: `blocks[position // block_size] * block_size + offset`.

    Example: with blocks [7, 2] of 4 tokens, position 5 is slot 9.
    """
    table = np.asarray(blocks, np.int32)
    return (table[positions // block_size] * block_size + positions % block_size).astype(np.int32)


@dataclasses.dataclass
class BlockPool:
    """The blocks of one cache. Freed blocks are used again in the order they were freed.

    Attributes:
        num_blocks: how many there are; ids are `0 .. num_blocks - 1`.
    """

    num_blocks: int
    _free: list[int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise UserError(f"num_blocks {self.num_blocks} is not positive")
        self._free = list(range(self.num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` blocks; asking for more than `num_free` is an error of the caller."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} of {self.num_blocks} are free")
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back; one that is free already, or is no block of the pool, is an error of the caller."""
        back = set(blocks)
        if len(back) != len(blocks) or back & set(self._free) or not back <= set(range(self.num_blocks)):
            raise ValueError(f"cannot free {list(blocks)}: not all of them are allocated blocks of this pool")
        self._free.extend(blocks)
