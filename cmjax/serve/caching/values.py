"""What the pool holds: values of several parts, where they lie, and the record that guards one outside of DRAM.

A value is several parts (latents, a hidden state) that are visible only together. In DRAM that is so because the index
gets it last. On disk and on a Redis server the parts come after a commit record, and what does not match its record is
no value:

    magic, layout version, number of parts, digest of namespace and key | length of each part | checksum | parts

The checksum is over all the rest. BLAKE3 reads 5.0 GB/s on one core where CRC-32 of zlib reads 2.6 (1 MB blocks,
28 November 2026, 2 cores), and it also tells a value from one that was put under another key.
"""

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np
from blake3 import blake3

Buffer = bytes | bytearray | memoryview | np.ndarray  # contiguous
Parts = tuple[memoryview, ...]  # bytes, read-only
Tier = str  # "dram", "disk", "redis"

MAX_PARTS = 1024

_MAGIC, _LAYOUT = b"cmjV", 1
_HEAD = struct.Struct("<4sHH16s")
_CHECKSUM_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a key lies.

    Attributes:
        node: "node0", or the address of a server.
        cpu: number of the node in the pool, which CPU of the machine it stands for.
        tier: "dram", "disk" or "redis".
        num_bytes: of all parts.
    """

    node: str
    cpu: int
    tier: Tier
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """What was put under a key, and where it was found.

    Attributes:
        parts: bytes, read-only; they stay as they are for as long as somebody holds them.
        place: where it was found.
    """

    parts: Parts
    place: Place


def digest_of(namespace: str, key: bytes) -> int:
    """128 bits that stand for a key of a namespace everywhere below; no two are taken to share them."""
    name = namespace.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake3(struct.pack("<I", len(name)) + name + key).digest(length=16), "little")


def namespace_digest(namespace: str) -> str:
    """32 hexadecimal digits that stand for a namespace in names of folders and of keys on servers."""
    return blake3(namespace.encode("utf-8", "surrogatepass")).hexdigest(length=16)


def bytes_of(part: Buffer) -> np.ndarray:
    """The bytes of a part, `uint8[any]`, without a copy.

    Raises:
        ValueError: they are not contiguous.
    """
    if not isinstance(part, np.ndarray):
        return np.frombuffer(part, np.uint8)
    if not part.flags.c_contiguous:
        raise ValueError(f"a part of shape {part.shape} is not contiguous")
    return part.reshape(-1).view(np.uint8)


def copied(parts: Sequence[Buffer]) -> Parts:
    """The parts in memory of their own."""
    return tuple(map(_copied, parts))


def _copied(part: Buffer) -> memoryview:
    own = bytes_of(part).copy()
    own.flags.writeable = False  # of the array too, so that no view of it can be made writable again
    return memoryview(own)


def head_bytes(num_parts: int) -> int:
    """Length of the commit record before so many parts."""
    return _HEAD.size + 8 * num_parts + _CHECKSUM_BYTES


def num_parts_of(start: bytes) -> int:
    """Number of parts of the record with this start (8 bytes are enough); 0 where it is the start of none."""
    magic, layout, num_parts = struct.unpack_from("<4sHH", start.ljust(8, b"\0"))
    return num_parts if (magic, layout) == (_MAGIC, _LAYOUT) else 0


def commit_record(digest: int, parts: Sequence[memoryview]) -> bytes:
    """What stands before the parts."""
    lengths = [part.nbytes for part in parts]
    record = _HEAD.pack(_MAGIC, _LAYOUT, len(parts), digest.to_bytes(16, "little"))
    record += struct.pack(f"<{len(parts)}Q", *lengths)
    return record + _checksum(record, parts)


def body_bytes(digest: int, record: memoryview) -> int | None:
    """Bytes of all the parts after a commit record; None where it is none, or another key's."""
    num_parts = num_parts_of(bytes(record[:8]))
    is_whole = num_parts > 0 and len(record) == head_bytes(num_parts)
    if not is_whole or record[8 : _HEAD.size] != digest.to_bytes(16, "little"):
        return None
    return sum(_lengths(record))


def checked_parts(record: memoryview, body: memoryview) -> Parts | None:
    """The parts that follow a commit record (`body_bytes` has found nothing amiss with it); None where they are not
    what was put."""
    lengths, begin, parts = _lengths(record), 0, []
    for length in lengths:
        parts.append(body[begin : begin + length])
        begin += length
    is_right = begin == len(body) and record[-_CHECKSUM_BYTES:] == _checksum(record[:-_CHECKSUM_BYTES], parts)
    return tuple(parts) if is_right else None


def parts_in(digest: int, data: memoryview) -> Parts | None:
    """The parts in a commit record and all that follows it; None where they are not what was put under this key."""
    begin = head_bytes(num_parts_of(bytes(data[:8])))
    record, body = data[:begin], data[begin:]
    return None if body_bytes(digest, record) != len(body) else checked_parts(record, body)


def _lengths(record: memoryview) -> tuple[int, ...]:
    return struct.unpack_from(f"<{num_parts_of(bytes(record[:8]))}Q", record, _HEAD.size)


def _checksum(record: bytes | memoryview, parts: Sequence[memoryview]) -> bytes:
    hasher = blake3(record)
    for part in parts:
        hasher.update(part)
    return hasher.digest(length=_CHECKSUM_BYTES)
