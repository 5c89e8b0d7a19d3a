"""A node on a server that speaks Redis' protocol (Valkey, Redis), which processes and machines share."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cmjax.errors import UserError
from cmjax.serve.caching.accounts import Accounts
from cmjax.serve.caching.node import Owns, PoolNode
from cmjax.serve.caching.redis_link import RedisLink
from cmjax.serve.caching.stats import Counters, Meter, NodeStats
from cmjax.serve.caching.values import (
    MAX_PARTS,
    Buffer,
    Parts,
    Place,
    Value,
    bytes_of,
    commit_record,
    head_bytes,
    namespace_digest,
    num_parts_of,
    parts_in,
)

T = TypeVar("T")

_SCANNED_TOGETHER = 1000
_MOST_TOGETHER = 1000  # small values in one message

# KEYS: the value's, the namespace's order of use, its sizes. ARGV: the digest; of a put also what keys of values begin
# with, the bytes of the value, those that the namespace may have, the value, the time. All in one step, so that
# processes that share the server do not undo each other's.
_FORGET = """
local function forget(digest)
  local size = redis.call('HGET', KEYS[3], digest)
  if size then
    redis.call('HDEL', KEYS[3], digest)
    redis.call('HINCRBY', KEYS[3], 'total', -size)
  end
  redis.call('ZREM', KEYS[2], digest)
end
forget(ARGV[1])
"""
_DELETE = _FORGET + "return redis.call('UNLINK', KEYS[1])"
_PUT = (
    _FORGET
    + """
local limit = tonumber(ARGV[4]) - tonumber(ARGV[3])
while tonumber(redis.call('HGET', KEYS[3], 'total') or '0') > limit do
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not oldest then break end
  redis.call('UNLINK', ARGV[2] .. oldest)
  forget(oldest)
end
redis.call('SET', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[2], ARGV[6], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
redis.call('HINCRBY', KEYS[3], 'total', ARGV[3])
"""
)


class RedisNode(PoolNode):
    """Values as strings on a server. Which of them leave when its memory is full is the server's to decide: give it
    `maxmemory` and `maxmemory-policy allkeys-lru`.

    Keys begin with `cmjax:` and the pool's name, and nothing else on the server is ever touched.

    A namespace's quota is kept by a script on the server, for the values that are put while there is one: it counts
    their bytes and deletes those used longest ago. It holds approximately: each of a pool's servers takes an equal
    share, and values that the server itself evicts count until their turn comes.

    Args:
        url: redis://[[user]:password@]host[:port][/database], rediss:// for TLS, unix://path.
        cpu: number of the node in the pool.
        pool_name: pools of other names on the same server are apart.
        is_shared: other processes use the pool on this server too: whatever epoch it bears is the pool's.
        timeout_s: seconds that an answer may take.
        connect_timeout_s: seconds that a connection may take.
        chunk_bytes: about so many travel in one message.

    Raises:
        UserError: the URL is none, the name has other characters than letters, digits and `._-`, or the client library
            is not installed.
    """

    kind = "redis"

    def __init__(
        self,
        url: str,
        cpu: int = 0,
        *,
        pool_name: str = "cmjax",
        is_shared: bool = False,
        timeout_s: float = 2.0,
        connect_timeout_s: float = 0.5,
        chunk_bytes: int = 8_000_000,
    ) -> None:
        if not re.fullmatch(r"[\w.-]+", pool_name, re.ASCII):
            raise UserError(f"pool name {pool_name!r} has other characters than letters, digits and ._-")
        self._prefix = f"cmjax:{pool_name}:"
        self._link = RedisLink(url, f"{self._prefix}epoch", is_shared, (timeout_s, connect_timeout_s), self._clear_now)
        self.name = self._link.name
        self.cpu, self.is_shared = cpu, is_shared
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()  # over what follows
        self._counters = Counters()
        self._size = 1_000_000.0  # bytes of a large one of the values seen lately: sets how many are asked for at once
        self._accounts, self._meter = Accounts(), Meter()

    def _key(self, namespace: str, digest: int) -> str:
        return f"{self._values_of(namespace)}{digest:032x}"

    def _values_of(self, namespace: str) -> str:
        return f"{self._prefix}v:{namespace_digest(namespace)}:"

    def _order_of(self, namespace: str) -> tuple[str, str]:
        """Keys of a namespace's order of use and sizes."""
        name = namespace_digest(namespace)
        return f"{self._prefix}used:{name}", f"{self._prefix}sizes:{name}"

    def read_epoch(self) -> str | None:
        with self._link.as_os_error():
            return self._link.read_epoch()

    def start(self, epoch: str, keep: bool, accounts: Accounts, meter: Meter) -> None:
        with self._link.as_os_error():
            if not keep:
                self._clear_now(None)
            self._link.write_epoch(epoch)
        accounts.count_server(1)
        self._accounts, self._meter = accounts, meter

    def memory_limit(self) -> int:
        """Bytes that the server may use; 0: no limit, or it does not say.

        Raises:
            OSError: it cannot be asked.
        """
        with self._link.as_os_error():
            return int(self._link.client.info("memory").get("maxmemory", 0))

    def _scan(self, pattern: str) -> Iterator[list[bytes]]:
        """Keys of the pool that look like this, a thousand or so at a time."""
        cursor = 0
        while True:
            cursor, found = self._link.client.scan(cursor, match=self._prefix + pattern, count=_SCANNED_TOGETHER)
            if found:
                yield found
            if cursor == 0:
                return

    def _ask(self, work: Callable[[], T], otherwise: T) -> T:
        """As `RedisLink.ask`; failures are counted."""
        answer, is_failure = self._link.ask(work, otherwise)
        if is_failure:
            with self._lock:
                self._counters.num_errors += 1
        return answer

    def put(self, namespace: str, items: Sequence[tuple[int, Sequence[Buffer]]]) -> list[bool]:
        done: list[bool] = []
        chunk: list[tuple[int, Parts]] = []
        size = 0
        for digest, parts in items:
            if not 0 < len(parts) <= MAX_PARTS:
                raise ValueError(f"a value of {len(parts)} parts; 1 to {MAX_PARTS} are possible")
            chunk.append((digest, tuple(memoryview(bytes_of(part)) for part in parts)))
            size += sum(part.nbytes for part in chunk[-1][1])
            if size >= self._chunk_bytes or len(chunk) == _MOST_TOGETHER:
                done += self._put_chunk(namespace, chunk)
                chunk, size = [], 0
        return done + (self._put_chunk(namespace, chunk) if chunk else [])

    def _put_chunk(self, namespace: str, items: list[tuple[int, Parts]]) -> list[bool]:
        quota = self._accounts.quota(namespace)
        sizes = [sum(part.nbytes for part in parts) for _, parts in items]

        def work() -> list[object]:
            pipeline = self._link.client.pipeline(transaction=False)
            for (digest, parts), size in zip(items, sizes, strict=True):
                data = b"".join((commit_record(digest, parts), *parts))
                if quota is None:
                    pipeline.set(self._key(namespace, digest), data)
                    continue
                keys = (self._key(namespace, digest), *self._order_of(namespace))
                if size > quota:
                    pipeline.eval(_DELETE, len(keys), *keys, f"{digest:032x}")
                    continue
                limit = max(size, quota // self._accounts.num_servers)
                told = (f"{digest:032x}", self._values_of(namespace), size, limit, data, time.time())
                pipeline.eval(_PUT, len(keys), *keys, *told)
            return pipeline.execute(raise_on_error=False)

        answers: list[object] = self._ask(work, [])
        too_large = [quota is not None and size > quota for size in sizes]
        done = [not isinstance(answer, Exception) for answer in answers] or [False] * len(items)
        done = [is_in and not is_large for is_in, is_large in zip(done, too_large, strict=True)]
        for _ in filter(None, too_large):
            self._accounts.refuse(namespace)
        with self._lock:
            self._counters.num_puts += sum(done)
            self._counters.num_refused += sum(too_large) + sum(isinstance(one, Exception) for one in answers)
            self._counters.bytes_written += sum(size for size, is_in in zip(sizes, done, strict=True) if is_in)
            self._size = max(self._size, *sizes)
        return done

    def get(self, namespace: str, digests: Sequence[int]) -> list[Value | None]:
        values: list[Value | None] = []
        while len(values) < len(digests):
            together = min(max(1, int(self._chunk_bytes / self._size)), _MOST_TOGETHER)
            values += self._get_chunk(namespace, digests[len(values) : len(values) + together])
        return values

    def _get_chunk(self, namespace: str, digests: Sequence[int]) -> list[Value | None]:
        begin = time.perf_counter()
        keys = [self._key(namespace, digest) for digest in digests]
        missing: list[bytes | None] = [None] * len(keys)
        answers = self._ask(lambda: self._link.client.mget(keys), missing)
        values: list[Value | None] = []
        corrupt: list[int] = []
        for digest, answer in zip(digests, answers, strict=True):
            parts = None if answer is None else parts_in(digest, memoryview(answer))
            if answer is not None and parts is None:
                corrupt.append(digest)
            size = sum(part.nbytes for part in parts or ())
            values.append(None if parts is None else Value(parts, Place(self.name, self.cpu, "redis", size)))
        found = [value.place.num_bytes for value in values if value is not None]
        if found:
            self._meter.add("redis", len(found), sum(found), time.perf_counter() - begin)
        with self._lock:
            for size in found:
                self._counters.hit("redis", size)
            self._counters.num_misses += len(values) - len(found)
            self._counters.num_corrupt += len(corrupt)
            self._size = max(self._size / 2, *found, 1)
        if corrupt:
            self._ask(lambda: self._delete_now(namespace, corrupt), [False])
        if found and self._accounts.quota(namespace) is not None:
            now = time.time()
            used = {f"{digest:032x}": now for digest, value in zip(digests, values, strict=True) if value is not None}
            self._ask(lambda: self._link.client.zadd(self._order_of(namespace)[0], used, xx=True), None)
        return values

    def contains(self, namespace: str, digests: Sequence[int]) -> list[Place | None]:
        def work() -> list[Any]:
            pipeline = self._link.client.pipeline(transaction=False)
            for digest in digests:
                pipeline.strlen(self._key(namespace, digest))
                pipeline.getrange(self._key(namespace, digest), 0, 7)
            return pipeline.execute()

        missing: list[Any] = [0, b""] * len(digests)
        answers = self._ask(work, missing)
        places: list[Place | None] = []
        for length, start in zip(answers[::2], answers[1::2], strict=True):
            num_parts = num_parts_of(start)
            size = length - head_bytes(num_parts)
            places.append(Place(self.name, self.cpu, "redis", size) if num_parts and size >= 0 else None)
        return places

    def delete(self, namespace: str, digests: Sequence[int]) -> list[bool]:
        answers = self._ask(lambda: self._delete_now(namespace, digests), None)
        if answers is None:
            self._link.owe(namespace)
        return answers or [False] * len(digests)

    def _delete_now(self, namespace: str, digests: Sequence[int]) -> list[bool]:
        pipeline = self._link.client.pipeline(transaction=False)
        for digest in digests:
            if self._accounts.quota(namespace) is None:
                pipeline.unlink(self._key(namespace, digest))
            else:
                keys = (self._key(namespace, digest), *self._order_of(namespace))
                pipeline.eval(_DELETE, len(keys), *keys, f"{digest:032x}")
        return [bool(answer) for answer in pipeline.execute()]

    def clear(self, namespace: str | None) -> None:
        if not self._ask(lambda: self._clear_now(namespace), False):
            self._link.owe(namespace)

    def _clear_now(self, namespace: str | None) -> bool:
        name = "*" if namespace is None else namespace_digest(namespace)
        for pattern in (f"v:{name}:*", f"used:{name}", f"sizes:{name}"):
            for some in self._scan(pattern):
                self._link.client.unlink(*some)
        return True

    def retain(self, owns: Owns) -> None:
        def work() -> bool:
            for some in self._scan("v:*"):
                strays = [key for key in some if not owns(int(key[-32:], 16))]
                if strays:
                    self._link.client.unlink(*strays)
            return True

        if not self._ask(work, False):
            self._link.owe(None)

    def stats(self) -> NodeStats:
        def work() -> tuple[int, int, int]:
            memory = self._link.client.info("memory")
            return self._link.client.dbsize(), memory["used_memory"], memory.get("maxmemory", 0)

        num_keys, used, limit = self._ask(work, (0, 0, 0))
        with self._lock:
            counters = self._counters.copy()
        return NodeStats(
            self.name, self.cpu, self.kind, self._link.health.is_up, num_keys, used, limit, 0, 0, 0, counters
        )

    def flush(self) -> None:
        """What was put is on the server already."""

    def close(self) -> None:
        if self._link.close():
            self._accounts.count_server(-1)
