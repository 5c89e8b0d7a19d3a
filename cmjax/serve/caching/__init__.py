"""The memory pool: values under keys, over DRAM, disks and servers (paper, section 4.4)."""

from cmjax.serve.caching.accounts import Accounts
from cmjax.serve.caching.controller import Controller
from cmjax.serve.caching.local_node import LocalNode
from cmjax.serve.caching.node import PoolNode
from cmjax.serve.caching.opening import open_pool
from cmjax.serve.caching.pool import MemoryPool
from cmjax.serve.caching.redis_node import RedisNode
from cmjax.serve.caching.settings import CacheSettings
from cmjax.serve.caching.stats import Counters, NamespaceStats, NodeStats, PoolStats, Rate
from cmjax.serve.caching.store import FileStore
from cmjax.serve.caching.values import Buffer, Place, Tier, Value

__all__ = [
    "Accounts",
    "Buffer",
    "CacheSettings",
    "Controller",
    "Counters",
    "FileStore",
    "LocalNode",
    "MemoryPool",
    "NamespaceStats",
    "NodeStats",
    "Place",
    "PoolNode",
    "PoolStats",
    "Rate",
    "RedisNode",
    "Tier",
    "Value",
    "open_pool",
]
