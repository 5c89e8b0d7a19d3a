"""Prefixes by name: whole blocks of a request's tokens, and which blocks of an instance's cache hold them already."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from cmjax.schedule.blocks import BlockPool, Lease


class BlockNames(Protocol):
    """How cached blocks are named.

    Attributes:
        block_tokens: tokens of a cached block.
    """

    @property
    def block_tokens(self) -> int: ...

    def name(self, parent: bytes, token_ids: np.ndarray) -> bytes:
        """The name of a block of `int32[block_tokens]` after the one with the name `parent`."""
        ...


class BlockChain:
    """The names of a request's cached blocks, each of all tokens up to its end.

    Args:
        root: stands before the first block: it names all but the tokens that the contents depend on, and the namespace.

    Attributes:
        names: of those that have been asked for so far.
        token_ids: of each.
        namespace: of the memory pool.
    """

    def __init__(self, names: BlockNames, root: bytes, namespace: str = "") -> None:
        self._names, self._root, self.namespace = names, root, namespace
        self.names: list[bytes] = []
        self.token_ids: list[np.ndarray] = []

    @property
    def block_tokens(self) -> int:
        """Tokens of a cached block."""
        return self._names.block_tokens

    def copy(self) -> "BlockChain":
        """With the names that there are so far."""
        other = BlockChain.__new__(BlockChain)
        vars(other).update(vars(self))
        other.names, other.token_ids = list(self.names), list(self.token_ids)
        return other

    def extend(self, token_ids: Sequence[int]) -> None:
        """Name the blocks that `token_ids`, all from the first on, fill."""
        size, first = self.block_tokens, len(self.names)
        blocks = np.array(token_ids[first * size : len(token_ids) // size * size], np.int32)
        for block in blocks.reshape(-1, size):
            self.token_ids.append(block)
            self.names.append(self._names.name(self.names[-1] if self.names else self._root, block))


@dataclasses.dataclass(eq=False, slots=True)
class _Known:
    """A cached block that lies in an instance: its tokens, and the blocks of the instance's cache that it fills."""

    token_ids: np.ndarray
    lease: Lease


class PrefixBlocks:
    """Blocks of an instance's cache that are kept for what they hold, shared without a copy, and let go of, the least
    recently used first, where room is needed.

    A cached block is several blocks of the instance side by side. What the MTP module has for a block's last token
    depends on the token after it, which the block's name does not: so a block is known by its name and that token.

    Args:
        pool: the instance's.
        needs_next: whether there is an MTP module.
    """

    def __init__(self, pool: BlockPool, *, needs_next: bool) -> None:
        self._pool, self._needs_next = pool, needs_next
        self._known: collections.OrderedDict[tuple[bytes, int], _Known] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def num_idle(self) -> int:
        """Blocks of the instance that are held for what they hold alone."""
        return sum(len(one.lease.ids) for one in self._known.values() if self._pool.is_sole_holder(one.lease))

    def find(self, name: bytes, token_ids: np.ndarray, next_token: int | None) -> list[int] | None:
        """The instance's blocks that hold a cached block; None where none do, or its tokens are others.

        Args:
            next_token: after it.
        """
        known = self._known.get(self._key(name, next_token))
        if known is None or not np.array_equal(known.token_ids, token_ids):
            return None
        return known.lease.ids

    def add(self, name: bytes, token_ids: np.ndarray, next_token: int | None, blocks: Sequence[int]) -> None:
        """Keep what somebody's blocks hold; nothing where it is kept already, or cannot be shared."""
        key = self._key(name, next_token)
        if key not in self._known and not (self._needs_next and next_token is None):
            self._known[key] = _Known(token_ids, self._pool.share(blocks))

    def touch(self, chain: Iterable[tuple[bytes, int | None]]) -> None:
        """Blocks of one chain, from the first, have been used: each is kept longer than those after it."""
        for name, next_token in reversed(list(chain)):
            key = self._key(name, next_token)
            if key in self._known:
                self._known.move_to_end(key)

    def make_room(self, num_blocks: int) -> bool:
        """Let go of what nobody uses until so many blocks are free; False, and nothing is lost, where they are not."""
        missing = num_blocks - self._pool.num_free
        if missing <= 0:
            return True
        idle = []
        for key, known in self._known.items():
            if self._pool.is_sole_holder(known.lease):
                idle.append(key)
                missing -= len(known.lease.ids)
                if missing <= 0:
                    break
        if missing > 0:
            return False
        for key in idle:
            self._known.pop(key).lease.give_back()
        return True

    def clear(self) -> None:
        """Keep nothing; those that use some of it go on."""
        known, self._known = self._known, collections.OrderedDict()
        for one in known.values():
            one.lease.give_back()

    def _key(self, name: bytes, next_token: int | None) -> tuple[bytes, int]:
        return name, -1 if next_token is None or not self._needs_next else next_token
