"""The keys of a node: what is known of each, and the order they were used in, in some 175 bytes a key.

Python objects for each of ten million keys would take gigabytes. So a key has a number (its slot), what is known of it
stands in arrays at that number, and the orders of use are lists linked through arrays as well.
"""

import itertools
from array import array
from collections.abc import Iterator

import numpy as np

_NONE = -1


class Chain:
    """Numbers in rings, each number in one at most. A ring has a head, a number of its own that is not in the order.

    Everything but `grow` costs the same however many there are.
    """

    def __init__(self) -> None:
        self._before = array("i")
        self._after = array("i")

    def grow(self) -> None:
        """There is one more number, in no ring."""
        self._before.append(_NONE)
        self._after.append(_NONE)

    def start(self, head: int) -> None:
        """Make this number the head of an empty ring."""
        self._before[head] = self._after[head] = head

    def __contains__(self, number: int) -> bool:
        return self._after[number] != _NONE

    def append(self, head: int, number: int) -> None:
        """Put a number that is in no ring at the end of one."""
        last = self._before[head]
        self._after[last] = self._before[head] = number
        self._before[number], self._after[number] = last, head

    def remove(self, number: int) -> None:
        """Take a number out of its ring."""
        before, after = self._before[number], self._after[number]
        self._after[before], self._before[after] = after, before
        self._before[number] = self._after[number] = _NONE

    def first(self, head: int) -> int | None:
        """The number that has been in a ring for longest; None where it is empty."""
        number = self._after[head]
        return None if number == head else number

    def of(self, head: int) -> Iterator[int]:
        """The numbers of a ring, the first one first; it must not change meanwhile."""
        number = self._after[head]
        while number != head:
            yield number
            number = self._after[number]


class Index:
    """Digest -> slot, and what stands at the slots. Not locked: its node does that.

    Attributes:
        digests: of the key at a slot.
        num_bytes, num_parts: of its value.
        versions: a number that no other value has, and no earlier one of the key.
        used: when it was last used, in nanoseconds since 1970 and never twice the same.
        on_disk: the slots with a copy on disk, in order of use; `DISK` is the head.
    """

    DISK = 0

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._heads: dict[str, int] = {}
        self._spaces = array("i")  # slot -> head of its namespace
        self._names: dict[int, str] = {}
        self._by_space = Chain()
        self.digests: list[int] = []
        self.num_bytes = array("q")
        self.num_parts = array("H")
        self.versions = array("q")
        self.used = array("q")
        self.on_disk = Chain()
        self.on_disk.start(self._new_slot())

    def __len__(self) -> int:
        return len(self._slots)

    def _new_slot(self) -> int:
        if self._free:
            return self._free.pop()
        for one in (self.num_bytes, self.num_parts, self.versions, self.used):
            one.append(0)
        self._spaces.append(_NONE)
        self.digests.append(0)
        self._by_space.grow()
        self.on_disk.grow()
        return len(self.digests) - 1

    def _head(self, namespace: str) -> int:
        head = self._heads.get(namespace)
        if head is None:
            head = self._heads[namespace] = self._new_slot()
            self._names[head] = namespace
            self._by_space.start(head)
        return head

    def find(self, digest: int) -> int | None:
        """The slot of a key; None where it is not here."""
        return self._slots.get(digest)

    def add(self, namespace: str, digest: int, num_bytes: int, num_parts: int, version: int, used: int) -> int:
        """A key that is not here yet, as the one used last; returns its slot."""
        slot = self._slots[digest] = self._new_slot()
        head = self._head(namespace)
        self.digests[slot], self.num_bytes[slot], self.num_parts[slot] = digest, num_bytes, num_parts
        self.versions[slot], self.used[slot] = version, used
        self._spaces[slot] = head
        self._by_space.append(head, slot)
        return slot

    def touch(self, slot: int, used: int) -> None:
        """It is used now."""
        self.used[slot] = used
        self._by_space.remove(slot)
        self._by_space.append(self._spaces[slot], slot)
        if slot in self.on_disk:
            self.on_disk.remove(slot)
            self.on_disk.append(self.DISK, slot)

    def sort(self) -> None:
        """Bring the orders in line with `used`, after keys have been added in another one."""
        order = np.argsort(np.array(self.used), kind="stable")
        for slot in order.tolist():
            if self._slots.get(self.digests[slot]) == slot:
                self.touch(slot, self.used[slot])

    def remove(self, slot: int) -> None:
        """Forget a key; its slot is free."""
        del self._slots[self.digests[slot]]
        self._by_space.remove(slot)
        if slot in self.on_disk:
            self.on_disk.remove(slot)
        self.versions[slot] = 0
        self._free.append(slot)

    def namespace(self, slot: int) -> str:
        """Of the key at a slot."""
        return self._names[self._spaces[slot]]

    def namespaces(self) -> list[str]:
        """Those that have or had keys here."""
        return list(self._heads)

    def oldest(self, namespace: str) -> int | None:
        """Slot of the namespace's key that was used longest ago."""
        head = self._heads.get(namespace)
        return None if head is None else self._by_space.first(head)

    def slots(self, namespace: str | None = None) -> Iterator[int]:
        """Those of a namespace's keys (None: of all), those used longest ago first in each."""
        if namespace is None:
            return itertools.chain.from_iterable(map(self._by_space.of, self._heads.values()))
        head = self._heads.get(namespace)
        return iter(()) if head is None else self._by_space.of(head)
