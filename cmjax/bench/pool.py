"""The memory pool beside plain copies of memory: blocks of 1 MB, values of 4 KB, and the index of ten million keys.

Every figure is a median over rounds, in which all contenders take turns (`in_turn`).
"""

import dataclasses
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

import cmjax
from cmjax.bench.report import in_turn, machine
from cmjax.bench.tables import define, new_table
from cmjax.serve.caching import FileStore, LocalNode, MemoryPool, RedisNode
from cmjax.text import JsonObject

BLOCK_BYTES, SMALL_BYTES = 1 << 20, 1 << 12
BATCH = 64  # small values in one call
INDEX_KEYS = 10_000_000
BOUNDS = {"put, DRAM, full": 0.5, "get, DRAM, copied out": 0.5}
DEFINITIONS = {
    "copy": "numpy copies blocks of 1 MB between two areas that no cache holds",
    "share": "GB/s over those of the copy, medians of the rounds",
    "put, DRAM, filling": "into memory that the process has not had before: most of it is the system giving it out",
    "put, DRAM, full": "each block makes another one leave, whose memory it gets",
    "put, DRAM and disk": "and waiting until the disk has all; not synced",
    "get, DRAM": "the views alone; copied out: and their bytes once, as a device would",
    "get, disk": "read from files that the system has in memory, and checked",
    "operations": "calls of one value each, and of 64",
}


@dataclasses.dataclass(frozen=True)
class IndexResult:
    """An index of many keys, in a process of its own.

    Attributes:
        bytes_a_key: growth of its resident memory over the keys.
        seconds: to add them, all of them on disk.
        touch_us: microseconds to find one and make it the one used last.
    """

    num_keys: int
    bytes_a_key: float
    seconds: float
    touch_us: float


@dataclasses.dataclass(frozen=True)
class PoolResult:
    """What was measured.

    Attributes:
        copy_gb_per_s: of memory, in blocks.
        blocks: way -> GB/s, for blocks of 1 MB.
        small: way -> operations a second, for values of 4 KB.
        index: None where it was not asked for.
        server: address of the Redis server; None: there was none.
    """

    copy_gb_per_s: float
    blocks: dict[str, float]
    small: dict[str, float]
    index: IndexResult | None
    server: str | None

    def share(self, way: str) -> float:
        """GB/s over those of the copy."""
        return self.blocks[way] / self.copy_gb_per_s


class _Blocks:
    """Blocks with keys, and where a reader copies them to."""

    def __init__(self, count: int, num_bytes: int) -> None:
        rng = np.random.default_rng(0)
        self.values = rng.integers(0, 256, (count, num_bytes), np.uint8)
        self.out = np.zeros_like(self.values)
        self.items = [(index.to_bytes(8, "little"), [value]) for index, value in enumerate(self.values)]
        self.keys = [key for key, _ in self.items]

    def copy(self) -> None:
        for source, target in zip(self.values, self.out, strict=True):
            np.copyto(target, source)

    def put(self, pool: MemoryPool, step: int) -> None:
        for first in range(0, len(self.items), step):
            assert all(pool.put("bench", self.items[first : first + step]))

    def put_through(self, pool: MemoryPool, step: int) -> None:
        self.put(pool, step)
        pool.flush()

    def get(self, pool: MemoryPool, step: int) -> None:
        for first in range(0, len(self.keys), step):
            assert None not in pool.get("bench", self.keys[first : first + step])

    def get_copied(self, pool: MemoryPool, step: int) -> None:
        for first in range(0, len(self.keys), step):
            for row, value in enumerate(pool.get("bench", self.keys[first : first + step]), first):
                assert value is not None
                np.copyto(self.out[row], np.frombuffer(value.parts[0], np.uint8))


def run(
    *,
    num_blocks: int = 400,
    num_small: int = 20_000,
    rounds: int = 5,
    num_index_keys: int = INDEX_KEYS,
    server: str | None = None,
    folder: str | None = None,
) -> PoolResult:
    """Measure.

    Args:
        num_blocks: of 1 MB; more than the caches of the processor hold.
        num_small: values of 4 KB.
        rounds: timed runs of each contender.
        num_index_keys: of the index; 0 leaves it out.
        server: URL of a Redis or Valkey server; None: one is started where redis-server is installed.
        folder: where the persistent tier is made and removed again; None: the system's for temporary files.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary)
        process = None if server else _start_server(path)
        url = server or (f"unix://{path}/redis.sock" if process else None)
        try:
            blocks, small = _Blocks(num_blocks, BLOCK_BYTES), _Blocks(num_small, SMALL_BYTES)
            seconds = {name: float(np.median(taken)) for name, taken in _of_blocks(blocks, path, url, rounds).items()}
            size = num_blocks * BLOCK_BYTES / 1e9
            per_s = {name: size / taken for name, taken in seconds.items()}
            operations = {
                name: num_small / float(np.median(taken)) for name, taken in _of_small(small, path, url, rounds).items()
            }
        finally:
            if process:
                process.kill()
                process.communicate()
    index = measure_index(num_index_keys) if num_index_keys else None
    return PoolResult(per_s.pop("copy"), per_s, operations, index, url)


def _start_server(folder: Path) -> subprocess.Popen[bytes] | None:
    if shutil.which("redis-server") is None:
        return None
    command = ["redis-server", "--port", "0", "--unixsocket", f"{folder}/redis.sock", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder)
    assert process.stdout is not None
    for line in process.stdout:
        if b"Ready to accept connections" in line or b"ready to accept connections" in line:
            return process
    raise RuntimeError(f"redis-server ended with status {process.wait()} at its start")


def _in_turn(
    contenders: dict[str, Callable[[], object]], pools: Sequence[MemoryPool], rounds: int
) -> dict[str, list[float]]:
    try:
        return in_turn(contenders, rounds)
    finally:
        for pool in pools:
            pool.clear()
            pool.close()


def _of_blocks(blocks: _Blocks, folder: Path, url: str | None, rounds: int) -> dict[str, list[float]]:
    size = blocks.values.nbytes
    roomy = MemoryPool([LocalNode("node0", 0, size + 1)])
    # The next block always finds the one of half a round before gone.
    full = MemoryPool([LocalNode("node0", 0, size // 2)])
    disk = MemoryPool([_with_disk(folder / "through", size + 1, size)])
    # A cold read: DRAM holds one block, so that none is found there.
    cold = MemoryPool([_with_disk(folder / "cold", BLOCK_BYTES, size)])
    blocks.put(roomy, 1)
    blocks.put_through(cold, 1)
    contenders: dict[str, Callable[[], object]] = {
        "copy": blocks.copy,
        "put, DRAM, filling": functools.partial(_fill, blocks),
        "put, DRAM, full": functools.partial(blocks.put, full, 1),
        "put, DRAM and disk": functools.partial(blocks.put_through, disk, 1),
        "get, DRAM": functools.partial(blocks.get, roomy, 1),
        "get, DRAM, copied out": functools.partial(blocks.get_copied, roomy, 1),
        "get, disk": functools.partial(blocks.get, cold, 1),
    }
    pools = [roomy, full, disk, cold]
    if url:
        remote = MemoryPool([RedisNode(url, pool_name="cmjax-bench")])
        contenders["put, Redis"] = functools.partial(blocks.put, remote, 16)
        contenders["get, Redis"] = functools.partial(blocks.get, remote, 16)
        pools.append(remote)
    return _in_turn(contenders, pools, rounds)


def _with_disk(folder: Path, dram_bytes: int, size: int) -> LocalNode:
    return LocalNode("node0", 0, dram_bytes, FileStore(folder, 2 * size), queue_bytes=size, queue_wait_s=60)


def _fill(blocks: _Blocks) -> None:
    pool = MemoryPool([LocalNode("node0", 0, blocks.values.nbytes)])
    blocks.put(pool, 1)
    pool.close()


def _of_small(small: _Blocks, folder: Path, url: str | None, rounds: int) -> dict[str, list[float]]:
    size = small.values.nbytes
    dram = MemoryPool([LocalNode("node0", 0, size)])
    disk = MemoryPool([_with_disk(folder / "small", size, 4 * size)])
    contenders: dict[str, Callable[[], object]] = {}
    for where, pool in (("DRAM", dram), ("DRAM and disk", disk)):
        put = small.put if pool is dram else small.put_through
        contenders[f"put, {where}"] = functools.partial(put, pool, 1)
        contenders[f"put, {where}, {BATCH} a call"] = functools.partial(put, pool, BATCH)
    contenders["get, DRAM"] = functools.partial(small.get, dram, 1)
    contenders[f"get, DRAM, {BATCH} a call"] = functools.partial(small.get, dram, BATCH)
    pools = [dram, disk]
    if url:
        remote = MemoryPool([RedisNode(url, pool_name="cmjax-bench")])
        for step, name in ((1, ""), (BATCH, f", {BATCH} a call")):
            contenders[f"put, Redis{name}"] = functools.partial(small.put, remote, step)
            contenders[f"get, Redis{name}"] = functools.partial(small.get, remote, step)
        pools.append(remote)
    return _in_turn(contenders, pools, rounds)


_INDEX = """
import random, sys, time
import psutil
from cmjax.serve.caching.index import Index

count = int(sys.argv[1])
process = psutil.Process()
index, rng = Index(), random.Random(0)
before, begin = process.memory_info().rss, time.perf_counter()
for number in range(1, count + 1):
    slot = index.add("bench", rng.getrandbits(128), 1 << 20, 2, number, number)
    index.on_disk.append(Index.DISK, slot)
seconds = time.perf_counter() - begin
grown = process.memory_info().rss - before
digests = rng.sample([one for one in index.digests if one], min(count, 100_000))
begin = time.perf_counter()
for number, digest in enumerate(digests, count + 1):
    index.touch(index.find(digest), number)
touch = (time.perf_counter() - begin) / len(digests)
print(grown / count, seconds, touch * 1e6)
"""


def measure_index(num_keys: int = INDEX_KEYS) -> IndexResult:
    """An index of so many keys, in a process of its own, so that its memory can be told from the rest."""
    command = [sys.executable, "-c", _INDEX, str(num_keys)]
    root = Path(cmjax.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    bytes_a_key, seconds, touch_us = map(float, done.stdout.split())
    return IndexResult(num_keys, bytes_a_key, seconds, touch_us)


def report(result: PoolResult) -> JsonObject:
    """The result, ready for JSON, with the machine and the bounds."""
    shares = {way: result.share(way) for way in result.blocks}
    return {
        "benchmark": "pool",
        "machine": machine(),
        "results": dataclasses.asdict(result) | {"shares": shares},
        "bounds": BOUNDS,
        "definitions": DEFINITIONS,
    }


def tables(result: PoolResult) -> list[Table]:
    """Blocks, small values, and the index."""
    blocks = new_table("Blocks of 1 MB", "", "GB/s", "share of a copy", "bound", numbers_from=1)
    blocks.add_row("copy", f"{result.copy_gb_per_s:.2f}", "", "")
    for way, per_s in result.blocks.items():
        bound = f"{BOUNDS[way]:.0%}" if way in BOUNDS else ""
        blocks.add_row(way, f"{per_s:.2f}", f"{result.share(way):.0%}", bound)
    small = new_table("Values of 4 KB", "", "operations a second", numbers_from=1)
    for way, per_s in result.small.items():
        small.add_row(way, f"{per_s:,.0f}")
    found = [blocks, define(small, DEFINITIONS)]
    if result.index:
        index = new_table("Index", "keys", "bytes a key", "seconds to add them", "us a use", numbers_from=0)
        one = result.index
        index.add_row(f"{one.num_keys:,}", f"{one.bytes_a_key:.0f}", f"{one.seconds:.1f}", f"{one.touch_us:.1f}")
        found.insert(1, index)
    return found
