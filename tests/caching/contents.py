"""Values that say what they are, so that a mix-up shows; and pools over folders."""

import random
import struct
from pathlib import Path

from cmjax.serve.caching import FileStore, LocalNode, MemoryPool, Value


def parts_of(key: bytes, turn: int = 0, size: int = 100) -> list[bytes]:
    """Two parts that name their key and the turn they were put in; `size` bytes in all."""
    head = struct.pack("<qI", turn, len(key)) + key
    body = random.Random(f"{key!r} {turn}").randbytes(size - len(head))
    return [head + body[: len(body) // 3], body[len(body) // 3 :]]


def turn_of(key: bytes, value: Value, size: int = 100) -> int:
    """The turn in which a value was put; fails where it is not what was put under the key in that turn."""
    turn = struct.unpack_from("<q", value.parts[0])[0]
    assert [bytes(part) for part in value.parts] == parts_of(key, turn, size)
    return turn


def local_node(folder: Path | None, name: str = "node0", *, dram: int = 1000, disk: int = 10, **options) -> LocalNode:
    """A node with `disk` pages of disk (a small value takes one), or without where there is no folder."""
    store = None if folder is None else FileStore(folder / name, disk * 4096)
    return LocalNode(name, 0, dram, store, **options)


def open_over(folder: Path, **options) -> MemoryPool:
    """A pool of one node with its files and its record in a folder."""
    return MemoryPool([local_node(folder, **options)], folder=folder)


def files_in(folder: Path) -> list[Path]:
    """The files of values."""
    return sorted(path for path in folder.rglob("*-*-*") if path.is_file())
