"""Context caching (paper section 4.4.2): blocks of latents between instances and the memory pool, beside steps."""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cmjax.schedule import BlockChain, Fetched, FetchPlan, Found, LookupPlan, PoolBlock, PoolNews, PoolRate, Stored
from cmjax.serve.caching.keys import CacheKeys
from cmjax.serve.caching.pool import MemoryPool, Place, Value
from cmjax.serve.caching.settings import CacheSettings

logger = logging.getLogger(__name__)

# Bytes of blocks on their way to the pool; those that come while there are more are not stored.
MAX_STORING_BYTES = 2**30
# What requests wait for has threads of its own: a slow store must not hold up a lookup.
_NUM_THREADS, _NUM_STORING_THREADS = 4, 2
_NEWEST = 0.3  # weight of the newest measurement
_MANY_BYTES = 1 << 20

BlockEnd = np.ndarray | int | None


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """What a cached block holds.

    Attributes:
        block_tokens: its tokens.
        num_layers: of the cache, the MTP module's last where there is one.
        width: of a latent.
        dtype: of latents and hidden states.
        hidden_size: of the hidden state of its last token, from which the MTP module's latent of that token follows
            once the next token is known; 0 without an MTP module.
    """

    block_tokens: int
    num_layers: int
    width: int
    dtype: np.dtype
    hidden_size: int = 0

    @property
    def num_bytes(self) -> int:
        """Of a block in the pool, its tokens included."""
        values = self.block_tokens * self.num_layers * self.width + self.hidden_size
        return values * self.dtype.itemsize + 4 * self.block_tokens

    def parts(self, token_ids: np.ndarray, latents: np.ndarray, end: BlockEnd) -> tuple[np.ndarray, ...]:
        """A block as the pool has it: `int32[block_tokens]`, `[block_tokens, layers, width]`, and of its last token the
        hidden state `[hidden]`, or the next token, which the MTP module's latent in the block goes by then."""
        parts = [token_ids, latents]
        if isinstance(end, int):
            parts += [np.zeros(0, np.uint8), np.array([end], np.int32)]
        elif end is not None:
            parts.append(end)
        return tuple(np.ascontiguousarray(one).view(np.uint8) for one in parts)

    def read(self, value: Value, token_ids: np.ndarray, next_token: int) -> "CachedBlock | None":
        """What the pool has; None where that is not a block of these tokens, or goes by another token after them."""
        expected = [4 * self.block_tokens, self.block_tokens * self.num_layers * self.width * self.dtype.itemsize]
        has_next = len(value.parts) == 4
        if self.hidden_size:
            expected += [0, 4] if has_next else [self.hidden_size * self.dtype.itemsize]
        if [len(part) for part in value.parts] != expected:
            return None
        if not np.array_equal(np.frombuffer(value.parts[0], np.int32), token_ids):
            return None
        if has_next and np.frombuffer(value.parts[3], np.int32)[0] != next_token:
            return None
        latents = np.frombuffer(value.parts[1], np.uint8).view(self.dtype)
        has_hidden = self.hidden_size > 0 and not has_next
        hidden = np.frombuffer(value.parts[2], np.uint8).view(self.dtype) if has_hidden else None
        return CachedBlock(latents.reshape(self.block_tokens, self.num_layers, self.width), hidden)


@dataclasses.dataclass(frozen=True)
class CachedBlock:
    """A block that has been fetched.

    Attributes:
        latents: `[block_tokens, layers, width]`, read only.
        hidden: `[hidden]` of its last token; None where no latent follows from it any more.
    """

    latents: np.ndarray
    hidden: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Link:
    """How blocks move between the pool and an instance.

    Attributes:
        delay_s: seconds that so many bytes take, where that is modelled; 0 where it is not.
        account: puts bytes to the account of the plane: (is it a fetch, the pool's CPU, bytes).
    """

    delay_s: Callable[[int], float]
    account: Callable[[bool, int, int], None]


class ContextCache:
    """The pool as a place for blocks of one model, and the threads that move them; one for all instances.

    Args:
        ranks_per_node: of the machine: they share the links of their node.

    Attributes:
        newest: the prompt that was named last: what stands before it, its tokens, their names.
    """

    def __init__(
        self,
        settings: CacheSettings,
        pool: MemoryPool,
        layout: BlockLayout,
        keys: CacheKeys,
        ranks_per_node: int,
    ) -> None:
        self.settings, self.pool, self.layout, self.keys = settings, pool, layout, keys
        self.ranks_per_node = ranks_per_node
        self.threads = ThreadPoolExecutor(_NUM_THREADS, "context-cache")
        self.storing_threads = ThreadPoolExecutor(_NUM_STORING_THREADS, "context-cache-store")
        self.newest: tuple[bytes, list[int], BlockChain] | None = None
        self._lock = threading.Lock()
        self._storing_bytes = 0

    def claim(self, num_bytes: int) -> bool:
        """Whether so many bytes may be on their way to the pool, too; `release` them then."""
        with self._lock:
            if self._storing_bytes and self._storing_bytes + num_bytes > MAX_STORING_BYTES:
                return False
            self._storing_bytes += num_bytes
            return True

    def release(self, num_bytes: int) -> None:
        """They are no longer on their way."""
        with self._lock:
            self._storing_bytes -= num_bytes

    def close(self) -> None:
        """End what is under way, and the pool."""
        for threads in (self.threads, self.storing_threads):
            threads.shutdown(wait=True, cancel_futures=True)
        self.pool.close()


class PoolPort:
    """What one instance has to do with the pool; its methods return at once, and what comes of them is news.

    Attributes:
        on_news: called, from any thread, when there are some.
    """

    def __init__(self, context: ContextCache, link: Link) -> None:
        self.context, self._link = context, link
        self.on_news: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._news: collections.deque[PoolNews] = collections.deque()
        self._fetched: dict[int, list[CachedBlock]] = {}
        self._num_pending = 0
        self._age = 0  # counts up when all is forgotten
        self._load_s: float | None = None

    def poll(self) -> list[PoolNews]:
        """News since the last call."""
        with self._lock:
            news, self._news = list(self._news), collections.deque()
        return news

    @property
    def expects_news(self) -> bool:
        """Whether something is under way, or has not been polled."""
        with self._lock:
            return self._num_pending > 0 or bool(self._news)

    def forget(self) -> None:
        """Nobody waits for anything any more."""
        with self._lock:
            self._age += 1
            self._news.clear()
            self._fetched.clear()

    def lookup(self, plan: LookupPlan) -> None:
        """Begin to look for blocks."""
        rows = list(zip(plan.attempt_ids.tolist(), plan.namespaces, plan.names, strict=True))
        self._begin(
            lambda: [self._look(*row) for row in rows], lambda: [Found(row[0], (), {}, has_failed=True) for row in rows]
        )

    def fetch(self, plan: FetchPlan) -> None:
        """Begin to fetch blocks."""
        age = self._age
        self._begin(lambda: [self._fetch(plan, age)], lambda: [Fetched(plan.attempt_id, 0)])

    def fetched(self, attempt_id: int, first: int, count: int, *, is_last: bool) -> list[CachedBlock]:
        """Some of what has been fetched; after the last nothing of it is kept."""
        with self._lock:
            blocks = self._fetched.get(attempt_id, [])[first : first + count]
            if is_last:
                self._fetched.pop(attempt_id, None)
        return blocks

    def loaded(self, seconds: float) -> None:
        """Blocks have been written into the instance's cache: part of what a fetch takes, however many they are."""
        self._load_s = seconds if self._load_s is None else self._load_s + _NEWEST * (seconds - self._load_s)

    def store(
        self,
        names: Sequence[bytes],
        namespaces: Sequence[str],
        token_ids: np.ndarray,
        read: Callable[[], tuple[np.ndarray, Sequence[BlockEnd]]],
    ) -> None:
        """Begin to store blocks.

        Args:
            token_ids: `int32[n, block_tokens]`.
            read: waits for `[n, block_tokens, layers, width]`, and the end of each, see `BlockLayout.parts`.
        """
        num_bytes = len(names) * self.context.layout.num_bytes
        if not self.context.claim(num_bytes):
            self._tell([Stored(0, tuple(names))])
            return

        def work() -> list[PoolNews]:
            try:
                return [self._store(names, namespaces, token_ids, *read())]
            finally:
                self.context.release(num_bytes)

        self._begin(work, lambda: [Stored(0, tuple(names))], self.context.storing_threads)

    # -- in threads ---------------------------------------------------------------------------------------------------

    def _begin(
        self,
        work: Callable[[], Sequence[PoolNews]],
        failed: Callable[[], Sequence[PoolNews]],
        threads: ThreadPoolExecutor | None = None,
    ) -> None:
        def run() -> None:
            try:
                news = work()
            except Exception:  # whatever it is, an instance can do without the pool
                logger.exception("the memory pool failed")
                news = failed()
            self._tell(news, ended=1, age=age)

        with self._lock:
            age = self._age
            self._num_pending += 1
        try:
            (threads or self.context.threads).submit(run)
        except RuntimeError:  # it has been closed
            self._tell(failed(), ended=1, age=age)

    def _tell(self, news: Sequence[PoolNews], ended: int = 0, age: int | None = None) -> None:
        with self._lock:
            self._num_pending -= ended
            if age in (None, self._age):
                self._news.extend(news)
        self.on_news()

    def _look(self, attempt_id: int, namespace: str, names: Sequence[bytes]) -> Found:
        blocks = []
        for place in self.context.pool.contains(namespace, names):
            if place is None:
                break
            blocks.append(PoolBlock(place.tier, place.num_bytes))
        return Found(attempt_id, tuple(blocks), self._rates())

    def _fetch(self, plan: FetchPlan, age: int) -> Fetched:
        layout, blocks, places = self.context.layout, [], []
        begin = time.perf_counter()
        values = self.context.pool.get(plan.namespace, plan.names)
        for value, token_ids, next_token in zip(values, plan.token_ids, plan.next_token_ids.tolist(), strict=True):
            block = None if value is None else layout.read(value, token_ids, next_token)
            if value is None or block is None:
                break
            blocks.append(block)
            places.append(value.place)
        by_cpu = _bytes_by_cpu(places)
        _wait(begin, sum(map(self._link.delay_s, by_cpu.values())))
        for cpu, num_bytes in by_cpu.items():
            self._link.account(True, cpu, num_bytes)
        with self._lock:
            if age == self._age:
                self._fetched[plan.attempt_id] = blocks
        return Fetched(plan.attempt_id, len(blocks))

    def _store(
        self,
        names: Sequence[bytes],
        namespaces: Sequence[str],
        token_ids: np.ndarray,
        latents: np.ndarray,
        ends: Sequence[BlockEnd],
    ) -> Stored:
        failed: list[bytes] = []
        num_put, delay_s = 0, 0.0
        pool, begin = self.context.pool, time.perf_counter()
        for namespace in dict.fromkeys(namespaces):
            rows = [row for row, one in enumerate(namespaces) if one == namespace]
            known = pool.contains(namespace, [names[row] for row in rows])
            rows = [row for row, place in zip(rows, known, strict=True) if self._is_wanted(ends[row], place)]
            parts = [self.context.layout.parts(token_ids[row], latents[row], ends[row]) for row in rows]
            items = list(zip([names[row] for row in rows], parts, strict=True))
            done = pool.put(namespace, items)
            num_put += sum(done)
            failed += [names[row] for row, is_done in zip(rows, done, strict=True) if not is_done]
            places = [one for one in pool.contains(namespace, [names[row] for row in rows]) if one is not None]
            for cpu, num_bytes in _bytes_by_cpu(places).items():
                delay_s += self._link.delay_s(num_bytes)
                self._link.account(False, cpu, num_bytes)
        _wait(begin, delay_s)
        return Stored(num_put, tuple(failed))

    def _is_wanted(self, end: BlockEnd, place: Place | None) -> bool:
        """Whether to store a block that the pool has at some place: one that goes by a next token is replaced."""
        is_better = isinstance(end, np.ndarray) and place is not None
        return place is None or (is_better and place.num_bytes != self.context.layout.num_bytes)

    def _rates(self) -> dict[str, PoolRate]:
        """What fetches take by tier: what the pool measures, the modelled delay, and writing into the cache."""
        latency_s = self._link.delay_s(1) + (self._load_s or 0.0)
        byte_s = (self._link.delay_s(1 + _MANY_BYTES) - self._link.delay_s(1)) / _MANY_BYTES
        rates = self.context.pool.rates()
        return {tier: PoolRate(latency_s, 1 / (1 / rate.bytes_per_s + byte_s)) for tier, rate in rates.items()}


def _bytes_by_cpu(places: Sequence[Place]) -> dict[int, int]:
    total: dict[int, int] = collections.defaultdict(int)
    for place in places:
        total[place.cpu] += place.num_bytes
    return total


def _wait(begin: float, seconds: float) -> None:
    """Until `seconds` have passed since `begin`."""
    left = begin + seconds - time.perf_counter()
    if left > 0:
        time.sleep(left)
