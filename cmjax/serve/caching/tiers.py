"""The two tiers of an embedded node as bookkeeping: what lies where, and what goes when room is needed."""

import collections
import time
from collections.abc import Iterable
from typing import NamedTuple

from cmjax.serve.caching.accounts import Accounts
from cmjax.serve.caching.index import Index
from cmjax.serve.caching.stats import Counters
from cmjax.serve.caching.store import FileStore, Found, StoredKey
from cmjax.serve.caching.values import Place, Value


class Chores(NamedTuple):
    """What the bookkeeping leaves to be done: files to delete, and files whose time of use is to be set."""

    removed: list[StoredKey]
    demoted: list[tuple[StoredKey, int]]


class Tiers:
    """Least recently used values leave first, in each tier by itself; a value that is in neither is forgotten.

    A value counts to the disk from the moment it is put, and is held in memory until it is there. Not locked, and no
    bytes are copied or files touched here: its node does that.

    Args:
        dram_capacity: bytes of the parts of values.
        disk_capacity: bytes of files, whole pages; 0: no persistent tier.
    """

    def __init__(self, dram_capacity: int, disk_capacity: int) -> None:
        self.dram_capacity, self.disk_capacity = dram_capacity, disk_capacity
        self.num_dram_bytes = self.num_disk_bytes = 0
        self.counters = Counters()
        self.accounts = Accounts()
        self.index = Index()
        self.dram: collections.OrderedDict[int, Value] = collections.OrderedDict()  # slot -> value, in order of use
        self.unwritten: dict[int, Value] = {}  # slot -> value that counts to the disk and is not there yet
        self._chores = Chores([], [])
        self._clock = 0

    def take_chores(self) -> Chores:
        """What has come up since they were taken last."""
        chores, self._chores = self._chores, Chores([], [])
        return chores

    def register(self, found: Iterable[Found]) -> None:
        """Take in what lies on disk; what is over the capacity goes, the values used last stay."""
        index = self.index
        for key, num_bytes, used in found:
            slot = index.find(key.digest)
            if slot is not None:  # the process died while it replaced one by the other
                if index.versions[slot] > key.version:
                    self._chores.removed.append(key)
                    continue
                self.remove(slot)
            slot = index.add(key.namespace, key.digest, num_bytes, key.num_parts, key.version, used)
            index.on_disk.append(index.DISK, slot)
            self.num_disk_bytes += self._disk_cost(slot)
            self.accounts.add(key.namespace, num_bytes)
            self._clock = max(self._clock, key.version)
        index.sort()
        self._make_disk_room(0)

    def insert(self, namespace: str, digest: int, value: Value, is_for_disk: bool) -> StoredKey:
        """A value takes the place of what its key had. Whoever calls has counted it in `accounts`, and it fits DRAM."""
        slot = self.index.find(digest)
        if slot is not None:
            self.remove(slot)
        now, size = self._now(), value.place.num_bytes
        slot = self.index.add(namespace, digest, size, len(value.parts), now, now)
        self._into_dram(slot, value)
        if is_for_disk and (cost := self._disk_cost(slot)) <= self.disk_capacity:
            self._make_disk_room(cost)
            self.index.on_disk.append(self.index.DISK, slot)
            self.num_disk_bytes += cost
            self.unwritten[slot] = value
        elif self.disk_capacity:
            self.counters.num_unwritten += 1
        self.counters.num_puts += 1
        self.counters.bytes_written += size
        return self.key(slot)

    def _now(self) -> int:
        """Nanoseconds since 1970, always more than before."""
        self._clock = max(self._clock + 1, time.time_ns())
        return self._clock

    def find(self, digest: int) -> Value | StoredKey | None:
        """A key's value, where it is in memory, or what it is called on disk; it is the one used last now."""
        slot = self.index.find(digest)
        if slot is None:
            return None
        self.index.touch(slot, self._now())
        value = self.dram.get(slot)
        if value is not None:
            self.dram.move_to_end(slot)
        elif (value := self.unwritten.get(slot)) is not None:
            self._into_dram(slot, value)
        return value or self.key(slot)

    def promote(self, key: StoredKey, value: Value) -> int | None:
        """Take into DRAM what was read from disk, where it fits; returns when it was used last, None where it is gone
        meanwhile."""
        slot = self.slot(key)
        if slot is None:
            return None
        if slot not in self.dram and value.place.num_bytes <= self.dram_capacity:
            self._into_dram(slot, value)
        return self.index.used[slot]

    def place(self, digest: int, name: str, cpu: int) -> Place | None:
        """Where a key's value lies."""
        slot = self.index.find(digest)
        if slot is None:
            return None
        is_in_memory = slot in self.dram or slot in self.unwritten
        return Place(name, cpu, "dram" if is_in_memory else "disk", self.index.num_bytes[slot])

    def key(self, slot: int) -> StoredKey:
        """What names the value at a slot on disk."""
        index = self.index
        return StoredKey(index.namespace(slot), index.digests[slot], index.versions[slot], index.num_parts[slot])

    def slot(self, key: StoredKey) -> int | None:
        """Where this version of a value is; None where it is gone or replaced."""
        slot = self.index.find(key.digest)
        return slot if slot is not None and self.index.versions[slot] == key.version else None

    def is_unwritten(self, key: StoredKey) -> bool:
        """The value still is to come to the disk."""
        return self.slot(key) in self.unwritten

    def written(self, key: StoredKey) -> bool:
        """It is there; False where it was deleted, replaced or evicted meanwhile."""
        slot = self.slot(key)
        return slot is not None and self.unwritten.pop(slot, None) is not None

    def not_written(self, key: StoredKey) -> None:
        """It will not come there."""
        slot = self.slot(key)
        if slot is not None and slot in self.unwritten:
            self.counters.num_lost += slot not in self.dram
            self._off_disk(slot)

    def remove(self, slot: int) -> None:
        """Forget a value in both tiers."""
        index = self.index
        value = self.dram.pop(slot, None)
        if value is not None:
            self.num_dram_bytes -= value.place.num_bytes
        if slot in index.on_disk:
            self.num_disk_bytes -= self._disk_cost(slot)
            if self.unwritten.pop(slot, None) is None:
                self._chores.removed.append(self.key(slot))
        self.accounts.give_back(index.namespace(slot), index.num_bytes[slot])
        index.remove(slot)

    def _into_dram(self, slot: int, value: Value) -> None:
        while self.num_dram_bytes + value.place.num_bytes > self.dram_capacity:
            self._evict_from_dram()
        self.dram[slot] = value
        self.num_dram_bytes += value.place.num_bytes

    def _evict_from_dram(self) -> None:
        slot, value = self.dram.popitem(last=False)
        self.num_dram_bytes -= value.place.num_bytes
        self.counters.evicted("dram")
        if slot not in self.index.on_disk:
            self.counters.num_lost += self.disk_capacity > 0
            self.remove(slot)
        elif slot not in self.unwritten:
            self._chores.demoted.append((self.key(slot), self.index.used[slot]))

    def _disk_cost(self, slot: int) -> int:
        return FileStore.cost(self.index.num_bytes[slot], self.index.num_parts[slot])

    def _make_disk_room(self, cost: int) -> None:
        while self.num_disk_bytes + cost > self.disk_capacity and self.evict_from_disk():
            pass

    def evict_from_disk(self) -> int:
        """Returns the bytes of the disk that are free once the chores are done; 0 where nothing is left to evict."""
        slot = self.index.on_disk.first(self.index.DISK)
        if slot is None:
            return 0
        self.counters.evicted("disk")
        cost = self._disk_cost(slot)
        self._off_disk(slot)
        return cost

    def _off_disk(self, slot: int) -> None:
        """A value is no longer on disk, nor on its way there."""
        self.index.on_disk.remove(slot)
        self.num_disk_bytes -= self._disk_cost(slot)
        if self.unwritten.pop(slot, None) is None:
            self._chores.removed.append(self.key(slot))
        else:
            self.counters.num_unwritten += 1
        if slot not in self.dram:
            self.remove(slot)
