"""A pool made of settings."""

import contextlib
from collections.abc import Collection
from pathlib import Path

from cmjax.errors import UserError
from cmjax.serve.caching.local_node import LocalNode
from cmjax.serve.caching.node import PoolNode
from cmjax.serve.caching.pool import MemoryPool
from cmjax.serve.caching.redis_node import RedisNode
from cmjax.serve.caching.settings import CacheSettings
from cmjax.serve.caching.store import FileStore

_PARTS = 16  # of a block at most, for the records before them


def open_pool(settings: CacheSettings, block_bytes: int) -> MemoryPool:
    """The pool that the settings describe.

    Args:
        block_bytes: of the largest value, all parts together; every tier must be able to hold one.

    Raises:
        UserError: one line that names the setting and what would do: a tier that cannot hold a block, a folder that
            cannot be written to or is in use, a server that cannot be reached.
    """
    _check_quota(settings, block_bytes)
    with contextlib.ExitStack() as stack:
        nodes: list[PoolNode] = []
        for cpu in range(len(settings.nodes) or settings.num_nodes):
            is_server = bool(settings.nodes)
            node = _server(settings, cpu, block_bytes) if is_server else _embedded(settings, cpu, block_bytes)
            nodes.append(node)
            stack.callback(node.close)
        if settings.folder is not None:
            _wipe_leftovers(Path(settings.folder), {node.name for node in nodes})
        pool = MemoryPool(nodes, folder=settings.folder, namespace_bytes=settings.namespace_bytes)
        stack.pop_all()  # the pool closes them
        return pool


def _check_quota(settings: CacheSettings, block_bytes: int) -> None:
    quota = settings.namespace_bytes
    if quota is not None and quota < block_bytes:
        raise UserError(
            f"--cache-namespace-gb {quota / 1e9:g} cannot hold one block of {block_bytes} bytes: give "
            f"{_gb(block_bytes)} or more"
        )


def _embedded(settings: CacheSettings, cpu: int, block_bytes: int) -> LocalNode:
    count, name = settings.num_nodes, f"node{cpu}"
    tiers = [("--cache-dram-gb", settings.dram_bytes, block_bytes)]
    if settings.folder is not None:
        tiers.append(("--cache-disk-gb", settings.disk_bytes, FileStore.cost(block_bytes, _PARTS)))
    for flag, capacity, needed in tiers:
        if capacity // count < needed:
            over = f" over {count} nodes" if count > 1 else ""
            raise UserError(
                f"{flag} {capacity / 1e9:g}{over} cannot hold one block of {block_bytes} bytes on each: give "
                f"{_gb(needed * count)} or more"
            )
    store = None
    if settings.folder is not None:
        store = FileStore(Path(settings.folder) / name, settings.disk_bytes // count)
    return LocalNode(name, cpu, settings.dram_bytes // count, store)


def _wipe_leftovers(folder: Path, names: Collection[str]) -> None:
    """Nodes that the pool had when it had more of them: nobody would count what they take of the disk."""
    for path in folder.glob("node*"):
        if path.is_dir() and path.name not in names and path.name.removeprefix("node").isdigit():
            store = FileStore(path, 0)
            store.wipe()
            store.close()


def _server(settings: CacheSettings, cpu: int, block_bytes: int) -> RedisNode:
    node = RedisNode(settings.nodes[cpu], cpu, is_shared=True)
    try:
        limit = node.memory_limit()
    except OSError as error:
        raise UserError(f"--cache-node {node.name} cannot be used: {error}") from error
    if 0 < limit < block_bytes:
        raise UserError(f"--cache-node {node.name} has a maxmemory of {limit} bytes: a block takes {block_bytes}")
    return node


def _gb(num_bytes: int) -> str:
    """Gigabytes, rounded up so that they are enough."""
    return f"{-(-num_bytes // 1000) / 1e6:.6f}".rstrip("0").rstrip(".")
