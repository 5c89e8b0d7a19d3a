"""Traffic: how many calls and bytes each collective, plane and pair of devices has seen."""

import ctypes
import dataclasses
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cmjax.mesh.native import build as native_build


class HasId(Protocol):
    """A device, by its number in the process: a jax.Device, for one."""

    id: int


@dataclasses.dataclass(frozen=True)
class TrafficEntry:
    """One collective on one plane. `num_bytes[source, target]` counts bytes by device id, int64."""

    plane: str
    collective: str
    calls: int
    num_bytes: np.ndarray
    modelled_s: float = 0.0  # the DelayModel's time from the last start to the last completion, summed over calls
    exposed_s: float = 0.0  # the part of it after the last rank was done with its work

    @property
    def wire_bytes(self) -> int:
        """Bytes that left their device."""
        return int(self.num_bytes.sum() - np.trace(self.num_bytes))

    @property
    def local_bytes(self) -> int:
        """Bytes a rank sent to itself."""
        return int(np.trace(self.num_bytes))


@dataclasses.dataclass(frozen=True)
class TrafficSnapshot:
    """The traffic counted up to one moment, one entry per (plane, collective), sorted by both."""

    entries: tuple[TrafficEntry, ...]

    def select(self, plane: str | None = None, collective: str | None = None) -> tuple[TrafficEntry, ...]:
        """The entries of one plane and/or one collective."""
        return tuple(
            entry for entry in self.entries if plane in (None, entry.plane) and collective in (None, entry.collective)
        )

    def calls(self, plane: str | None = None, collective: str | None = None) -> int:
        """Number of exchanges; one exchange among 320 ranks is one call."""
        return sum(entry.calls for entry in self.select(plane, collective))

    def wire_bytes(self, plane: str | None = None, collective: str | None = None) -> int:
        """Bytes that left their device."""
        return sum(entry.wire_bytes for entry in self.select(plane, collective))

    def local_bytes(self, plane: str | None = None, collective: str | None = None) -> int:
        """Bytes that ranks sent to themselves."""
        return sum(entry.local_bytes for entry in self.select(plane, collective))

    def matrix(self, plane: str | None = None, collective: str | None = None) -> np.ndarray:
        """Bytes from each device to each other: int64[devices, devices], source first."""
        chosen = self.select(plane, collective)
        return _sum_matrices([entry.num_bytes for entry in chosen])


class TrafficCounters:
    """Counts what the fabric moves (in C++, when an exchange completes) and what `record` is told. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[tuple[str, str], int] = {}
        self._cells: dict[tuple[str, str], dict[tuple[int, int], int]] = {}

    def record(
        self, plane: str, name: str, src_device: int | HasId, dst_device: int | HasId, num_bytes: int, calls: int = 1
    ) -> None:
        """Counts a copy made outside a compiled step, from one device (or device id) to another."""
        if num_bytes < 0 or calls < 0:
            raise ValueError(f"record: num_bytes and calls must not be negative, got {num_bytes} and {calls}")
        cell = _device_id(src_device), _device_id(dst_device)
        with self._lock:
            self._calls[plane, name] = self._calls.get((plane, name), 0) + calls
            cells = self._cells.setdefault((plane, name), {})
            cells[cell] = cells.get(cell, 0) + num_bytes

    def snapshot(self) -> TrafficSnapshot:
        """What has been counted since the last reset. Exchanges on `lax` collectives are not seen."""
        with self._lock:
            entries = {key: self._recorded(key) for key in self._calls}
        for entry in _native_entries():
            key = entry.plane, entry.collective
            entries[key] = _merge(entries[key], entry) if key in entries else entry
        return TrafficSnapshot(tuple(entries[key] for key in sorted(entries)))

    def reset(self) -> None:
        """Forgets everything counted so far."""
        with self._lock:
            self._calls.clear()
            self._cells.clear()
        if library := _loaded():
            library.cmjax_traffic_reset()

    def _recorded(self, key: tuple[str, str]) -> TrafficEntry:
        cells = self._cells[key]
        size = 1 + max((max(cell) for cell in cells), default=-1)
        num_bytes = np.zeros((size, size), np.int64)
        for (source, target), count in cells.items():
            num_bytes[source, target] = count
        return TrafficEntry(*key, self._calls[key], num_bytes)


def _device_id(device: int | HasId) -> int:
    return int(device) if isinstance(device, int | np.integer) else int(device.id)


def _loaded() -> ctypes.CDLL | None:
    # Reading the counters must not be what compiles the library.
    return native_build.load().library if native_build.load.cache_info().currsize else None


def _native_entries() -> list[TrafficEntry]:
    library = _loaded()
    if library is None:
        return []
    snapshot = library.cmjax_traffic_snapshot()
    try:
        size = library.cmjax_traffic_num_devices(snapshot)
        entries = []
        for i in range(library.cmjax_traffic_size(snapshot)):
            num_bytes = np.zeros((size, size), np.int64)
            library.cmjax_traffic_bytes(snapshot, i, size, num_bytes.ctypes.data)
            entries.append(
                TrafficEntry(
                    plane=library.cmjax_traffic_plane(snapshot, i).decode(),
                    collective=library.cmjax_traffic_collective(snapshot, i).decode(),
                    calls=library.cmjax_traffic_calls(snapshot, i),
                    num_bytes=num_bytes,
                    modelled_s=library.cmjax_traffic_modelled_s(snapshot, i),
                    exposed_s=library.cmjax_traffic_exposed_s(snapshot, i),
                )
            )
        return entries
    finally:
        library.cmjax_traffic_free(snapshot)


def _merge(a: TrafficEntry, b: TrafficEntry) -> TrafficEntry:
    return TrafficEntry(
        a.plane,
        a.collective,
        a.calls + b.calls,
        _sum_matrices([a.num_bytes, b.num_bytes]),
        a.modelled_s + b.modelled_s,
        a.exposed_s + b.exposed_s,
    )


def _sum_matrices(matrices: Sequence[np.ndarray]) -> np.ndarray:
    size = max((len(matrix) for matrix in matrices), default=0)
    total = np.zeros((size, size), np.int64)
    for matrix in matrices:
        total[: len(matrix), : len(matrix)] += matrix
    return total
