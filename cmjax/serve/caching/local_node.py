"""A node in this process: memory in front of files."""

import contextlib
import errno
import threading
import time
from collections.abc import Iterator, Sequence

from cmjax.errors import UserError
from cmjax.serve.caching.accounts import Accounts
from cmjax.serve.caching.node import Owns, PoolNode
from cmjax.serve.caching.stats import Meter, NodeStats
from cmjax.serve.caching.store import FileStore, StoredKey
from cmjax.serve.caching.tiers import Tiers
from cmjax.serve.caching.values import MAX_PARTS, Buffer, Place, Value, bytes_of, copied
from cmjax.serve.caching.write_queue import WriteQueue

_TOGETHER = 256  # keys forgotten under one hold of the lock


class LocalNode(PoolNode):
    """DRAM of this process, in front of a persistent tier where a store is given.

    A value lies in DRAM, on disk or in both, and each tier drops what was used longest ago (`Tiers`). What is put goes
    into DRAM and, on a thread of the node's own, to disk: until it is there the queue holds on to it, evicted or not. A
    get brings a value from disk back into DRAM. Dropping the DRAM copy of what is on disk costs the next get its speed.

    The lock is held over the bookkeeping alone: never while bytes are copied or checked, or a disk is waited for.

    Args:
        name: "node0", ...
        cpu: number of the node in the pool.
        dram_bytes: capacity for the parts of values.
        store: the persistent tier; the node owns it from now on.
        queue_bytes: of what may be on its way to disk, beside `dram_bytes`; None: a quarter of those.
        queue_wait_s: seconds that a put waits for room there, before its value goes without a persistent copy.

    Raises:
        UserError: a capacity is not positive.
    """

    kind = "local"

    def __init__(
        self,
        name: str,
        cpu: int,
        dram_bytes: int,
        store: FileStore | None = None,
        *,
        queue_bytes: int | None = None,
        queue_wait_s: float = 0.5,
    ) -> None:
        if dram_bytes < 1 or (store and store.capacity < 1):
            raise UserError(f"a capacity of {name} is not positive")
        self.name, self.cpu = name, cpu
        self._store = store
        self._queue_bytes = dram_bytes // 4 if queue_bytes is None else queue_bytes
        self._queue_wait_s = queue_wait_s
        self._queue: WriteQueue | None = None
        self._lock = threading.Lock()
        self._tiers = Tiers(dram_bytes, store.capacity if store else 0)
        self._meter = Meter()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Tiers]:
        """The bookkeeping, for as long as nothing is waited for; what it leaves to do is done afterwards."""
        with self._lock:
            yield self._tiers
            removed, demoted = self._tiers.take_chores()
        if self._store:
            for key in removed:
                self._store.remove(key)
            for key, used in demoted:
                self._store.mark_used(key, used)

    def read_epoch(self) -> str | None:
        return self._store.read_epoch() if self._store else None

    def start(self, epoch: str, keep: bool, accounts: Accounts, meter: Meter) -> None:
        self._tiers.accounts, self._meter = accounts, meter
        if self._store:
            if keep:
                with self._locked() as tiers:
                    tiers.register(self._store.scan())
            else:
                self._store.wipe()
            self._store.write_epoch(epoch)
            self._queue = WriteQueue(self._write, self._queue_bytes, self._queue_wait_s, f"pool-{self.name}")
        accounts.enroll(self)
        for namespace in self._tiers.index.namespaces():
            accounts.enforce(namespace)

    def put(self, namespace: str, items: Sequence[tuple[int, Sequence[Buffer]]]) -> list[bool]:
        return [self._put(namespace, digest, parts) for digest, parts in items]

    def _put(self, namespace: str, digest: int, parts: Sequence[Buffer]) -> bool:
        if not 0 < len(parts) <= MAX_PARTS:
            raise ValueError(f"a value of {len(parts)} parts; 1 to {MAX_PARTS} are possible")
        size = sum(bytes_of(part).nbytes for part in parts)
        if self._tiers.index.find(digest) is not None:
            self._forget([(digest, None)])
        value = Value(copied(parts), Place(self.name, self.cpu, "dram", size))
        if size > self._tiers.dram_capacity or not self._tiers.accounts.make_room(namespace, size):
            with self._locked() as tiers:
                tiers.counters.num_refused += 1
            return False
        with self._locked() as tiers:
            key = tiers.insert(namespace, digest, value, self._store is not None and self._store.writing.is_due)
            is_for_disk = tiers.is_unwritten(key)
        if is_for_disk and self._queue and not self._queue.offer(key, value):
            with self._locked() as tiers:
                tiers.not_written(key)
        return True

    def _write(self, key: StoredKey, value: Value) -> None:
        """On the queue's thread."""
        store = self._store
        if store is None or not self._is_wanted(key):
            return
        is_written = store.writing.may_try() and self._try_to_write(store, key, value)
        with self._locked() as tiers:
            if not is_written:
                tiers.not_written(key)
            is_wanted = is_written and tiers.written(key)
        if is_written and not is_wanted:
            store.remove(key)

    def _is_wanted(self, key: StoredKey) -> bool:
        with self._locked() as tiers:
            return tiers.is_unwritten(key)

    def _try_to_write(self, store: FileStore, key: StoredKey, value: Value) -> bool:
        try:
            try:
                store.write(key, value.parts)
            except OSError as error:
                # The disk is smaller than its capacity says, or others fill it.
                if error.errno != errno.ENOSPC or not self._free_disk(key, value):
                    raise
                store.write(key, value.parts)
        except (OSError, MemoryError):
            with self._locked() as tiers:
                tiers.counters.num_errors += 1
            store.writing.failed()
            return False
        store.writing.worked()
        return True

    def _free_disk(self, key: StoredKey, value: Value) -> bool:
        """Delete enough of what was used longest ago for one more value; False where that one itself had to go."""
        needed = FileStore.cost(value.place.num_bytes, key.num_parts)
        with self._locked() as tiers:
            while needed > 0 and (freed := tiers.evict_from_disk()):
                needed -= freed
        return needed <= 0 and self._is_wanted(key)

    def get(self, namespace: str, digests: Sequence[int]) -> list[Value | None]:
        begin = time.perf_counter()
        values: list[Value | None] = [None] * len(digests)
        on_disk: list[tuple[int, StoredKey]] = []
        num_hits = num_bytes = 0
        with self._locked() as tiers:
            for row, digest in enumerate(digests):
                found = tiers.find(digest)
                if found is None:
                    tiers.counters.num_misses += 1
                elif isinstance(found, StoredKey):
                    on_disk.append((row, found))
                else:
                    values[row] = found
                    tiers.counters.hit("dram", found.place.num_bytes)
                    num_hits += 1
                    num_bytes += found.place.num_bytes
        if num_hits:
            self._meter.add("dram", num_hits, num_bytes, time.perf_counter() - begin)
        for row, key in on_disk:
            values[row] = self._read(key)
        return values

    def _read(self, key: StoredKey) -> Value | None:
        """A value on disk, which comes back into DRAM."""
        store, begin = self._store, time.perf_counter()
        parts, is_broken = None, store is None or not store.reading.may_try()
        if store and not is_broken:
            try:
                parts = store.read(key)
                store.reading.worked()
            except (OSError, MemoryError):
                is_broken = True
                store.reading.failed()
        if parts is None or store is None:
            self._missed(key, is_broken)
            return None
        size = sum(part.nbytes for part in parts)
        with self._locked() as tiers:
            used = tiers.promote(key, Value(parts, Place(self.name, self.cpu, "dram", size)))
            tiers.counters.hit("disk", size)
        if used is not None:
            store.mark_used(key, used)
        self._meter.add("disk", 1, size, time.perf_counter() - begin)
        return Value(parts, Place(self.name, self.cpu, "disk", size))

    def _missed(self, key: StoredKey, is_broken: bool) -> None:
        """A value could not be read: the disk is broken, or the file is not what it should be."""
        with self._locked() as tiers:
            slot = tiers.slot(key)
            # Else it was deleted meanwhile, or evicted from the disk.
            is_corrupt = not is_broken and slot is not None and slot in tiers.index.on_disk
            tiers.counters.num_misses += 1
            tiers.counters.num_errors += is_broken
            tiers.counters.num_corrupt += is_corrupt
            if is_corrupt and slot is not None:
                tiers.remove(slot)

    def contains(self, namespace: str, digests: Sequence[int]) -> list[Place | None]:
        with self._locked() as tiers:
            return [tiers.place(digest, self.name, self.cpu) for digest in digests]

    def delete(self, namespace: str, digests: Sequence[int]) -> list[bool]:
        return self._forget([(digest, None) for digest in digests])

    def _forget(self, wanted: Sequence[tuple[int, int | None]]) -> list[bool]:
        """Delete keys (digest, version; None: whichever it has); whether each was there."""
        was_there = []
        for first in range(0, len(wanted), _TOGETHER):
            with self._locked() as tiers:
                for digest, version in wanted[first : first + _TOGETHER]:
                    slot = tiers.index.find(digest)
                    is_it = slot is not None and version in (None, tiers.index.versions[slot])
                    was_there.append(is_it)
                    if slot is not None and is_it:
                        tiers.remove(slot)
        return was_there

    def clear(self, namespace: str | None) -> None:
        self._forget(self._all_keys(namespace))

    def retain(self, owns: Owns) -> None:
        self._forget([(digest, version) for digest, version in self._all_keys(None) if not owns(digest)])

    def _all_keys(self, namespace: str | None) -> list[tuple[int, int | None]]:
        with self._locked() as tiers:
            index = tiers.index
            return [(index.digests[slot], index.versions[slot]) for slot in index.slots(namespace)]

    def oldest(self, namespace: str) -> int | None:
        """For `Accounts`: when the namespace's value that was used longest ago was used; None where it has none."""
        with self._locked() as tiers:
            slot = tiers.index.oldest(namespace)
            return None if slot is None else tiers.index.used[slot]

    def evict_oldest(self, namespace: str) -> bool:
        """For `Accounts`: delete that value; False where there is none."""
        with self._locked() as tiers:
            slot = tiers.index.oldest(namespace)
            if slot is None:
                return False
            tiers.counters.evicted("quota")
            tiers.remove(slot)
            return True

    def stats(self) -> NodeStats:
        store, queue = self._store, self._queue
        with self._locked() as tiers:
            return NodeStats(
                self.name,
                self.cpu,
                self.kind,
                store is None or (store.reading.is_up and store.writing.is_up),
                len(tiers.index),
                tiers.num_dram_bytes,
                tiers.dram_capacity,
                tiers.num_disk_bytes,
                tiers.disk_capacity,
                queue.num_bytes if queue else 0,
                tiers.counters.copy(),
            )

    def flush(self) -> None:
        if self._queue:
            self._queue.flush()

    def close(self) -> None:
        if self._queue:
            self._queue.close()
        with self._locked() as tiers:
            tiers.accounts.dismiss(self)
            index = tiers.index
            in_dram = [(tiers.key(slot), index.used[slot]) for slot in tiers.dram if slot in index.on_disk]
            for slot in index.slots():
                tiers.accounts.give_back(index.namespace(slot), index.num_bytes[slot])
            self._tiers = Tiers(tiers.dram_capacity, tiers.disk_capacity)
        if self._store:
            for key, used in in_dram:
                self._store.mark_used(key, used)
            self._store.close()
