"""The memory that an instance's devices may fill, and its pages."""

import ctypes
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import psutil


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is free for arrays.

    Attributes:
        free_bytes: of each device; infinite where the platform does not say.
        is_shared: virtual devices take it all from one host, where pages that nothing touches cost nothing.
    """

    free_bytes: float
    is_shared: bool = False

    @classmethod
    def of(cls, devices: Sequence[jax.Device]) -> "Memory":
        """That of devices of one kind: the host's for virtual ones, else what the fullest of them has left."""
        if devices[0].platform == "cpu":
            return cls(psutil.virtual_memory().available, is_shared=True)
        return cls(min(map(_left, devices)))


def _left(device: jax.Device) -> float:
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)


_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1
_TOLD = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages(arrays: Any) -> int:
    """Have the host keep what it holds of a tree of arrays in huge pages, where it gives them: what is read from end to
    end then misses the table of pages less often. Values and addresses stay. Waits for the arrays.

    Returns:
        The bytes that are in them then: of arrays on CPU devices, without the ends that fill no huge page; 0 where the
        system has none, or is told not to use any.
    """
    if not _TOLD.exists() or "[never]" in _TOLD.read_text():
        return 0
    total, seen = 0, set()
    for array in jax.tree.leaves(arrays):
        shard_bytes = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        if shard_bytes < _HUGE_PAGE or next(iter(array.sharding.device_set)).platform != "cpu":
            continue
        for shard in array.addressable_shards:
            first = shard.data.unsafe_buffer_pointer()
            begin, end = -(-first // _HUGE_PAGE) * _HUGE_PAGE, (first + shard_bytes) // _HUGE_PAGE * _HUGE_PAGE
            if begin < end and begin not in seen:
                seen.add(begin)  # a replicated array may be one buffer for all devices
                # At once: pages that are there already would not be looked at soon. What is refused stays as it is.
                total += 0 if _madvise()(begin, end - begin, _MADV_COLLAPSE) else end - begin
    return total


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    """The C library's; 0 where the system did it."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
