"""The memory that an instance's devices may fill."""

import dataclasses
import math
from collections.abc import Sequence

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
