"""The persistent tier of an embedded node: a file for each value, in folders by namespace.

Measured on 28 November 2026 (2 cores shared with others, Linux 6.18, ext4; two runs of the same values through each,
one at a time, nothing synced, before checksums):

| | write 1 MB | read 1 MB | delete and write 1 MB | write 4 KB | read 4 KB | its files cut, or bits flipped |
|---|---|---|---|---|---|---|
| files, as here | 1.3-3.2 GB/s | 4.7-7.7 GB/s | 1.4-2.7 GB/s | 6,000-17,000/s | 93,000-122,000/s | misses |
| tensorstore's `file` | 1.1-1.4 | 2.3-3.6 | 0.9-1.4 | 2,500-12,000 | 11,000-54,000 | not tried |
| lmdb | 1.7-3.0 | 7.8-8.8 | 3.5-3.7 | 72,000-117,000 | 170,000-255,000 | SIGBUS 8 of 8, SIGABRT 2 of 8 |

lmdb is the fastest for small values, but it reads through a memory map and trusts its pages: a file that is cut short
under it kills the process (so do, in two of eight runs, 200 bits flipped in the
heads of its pages), and a cache must never do that. The file store of tensorstore keeps plain files too, and
copies every value once more each way. A block of a prefix cache is a megabyte or so, where files lose nothing.

Nothing is synced: a power cut may cost the last values, and what it left half-written does not match its checksum.
"""

import contextlib
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmjax.errors import UserError
from cmjax.serve.caching.health import Health
from cmjax.serve.caching.values import (
    MAX_PARTS,
    Parts,
    body_bytes,
    checked_parts,
    commit_record,
    head_bytes,
    namespace_digest,
)

_PAGE = 4096  # what file systems give out at a time
_UNDER_WAY = ".part"


class StoredKey(NamedTuple):
    """What names one version of a value in the store.

    Attributes:
        namespace, digest: whose it is.
        version: no two values of one digest have the same.
        num_parts: of the value.
    """

    namespace: str
    digest: int
    version: int
    num_parts: int


class Found(NamedTuple):
    """A value that a scan found: its name, the bytes of its parts, and when it was last used, in nanoseconds."""

    key: StoredKey
    num_bytes: int
    used: int


class FileStore:
    """Values as files. It keeps to nobody's capacity: its node counts (`cost`), and says what goes.

    `write` and `remove` never touch another version than the one they name, so they need no lock between them.

    Args:
        folder: of this store alone; made where there is none.
        capacity: bytes that its files may fill.

    Raises:
        UserError: the folder cannot be made, written to, or is in use by another pool.
    """

    def __init__(self, folder: str | os.PathLike[str], capacity: int) -> None:
        self.folder, self.capacity = Path(folder), capacity
        self.reading, self.writing = Health(), Health()  # a full disk can still be read
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # values are what people have written
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UserError(f"the cache folder {self.folder} cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UserError(f"the cache folder {self.folder} is in use by another process") from error

    @staticmethod
    def cost(num_bytes: int, num_parts: int) -> int:
        """Bytes of the disk that a value of so many takes."""
        return -(-(num_bytes + head_bytes(num_parts)) // _PAGE) * _PAGE

    def read_epoch(self) -> str | None:
        """The token of the segment; None where it has none."""
        try:
            return (self.folder / "epoch").read_text(encoding="ascii")
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def write_epoch(self, epoch: str) -> None:
        """Give the segment this token."""
        replace_file(self.folder / "epoch", epoch.encode("ascii"))

    def wipe(self) -> None:
        """Delete every value, and nothing that is not a store's."""
        (self.folder / "epoch").unlink(missing_ok=True)
        for path in self._namespace_folders():
            shutil.rmtree(path)

    def _namespace_folders(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _is_hex(path.name, 32) and path.is_dir()]

    def scan(self) -> Iterator[Found]:
        """Every value there seems to be; what cannot be one is deleted. Their checksums are read when they are."""
        for folder in self._namespace_folders():
            try:
                namespace = (folder / "name").read_bytes().decode("utf-8", "surrogatepass")
            except (OSError, UnicodeDecodeError):
                namespace = ""
            if namespace_digest(namespace) != folder.name:
                shutil.rmtree(folder)
                continue
            for inner in (path for path in folder.iterdir() if _is_hex(path.name, 2)):
                yield from self._scan_folder(namespace, inner)

    def _scan_folder(self, namespace: str, folder: Path) -> Iterator[Found]:
        with os.scandir(folder) as entries:
            for entry in entries:
                key, status = _key_from(namespace, folder.name, entry.name), entry.stat(follow_symlinks=False)
                num_bytes = status.st_size - head_bytes(key.num_parts) if key else -1
                if key is None or num_bytes < 0:
                    os.unlink(entry.path)
                else:
                    yield Found(key, num_bytes, status.st_mtime_ns)

    def path(self, key: StoredKey) -> str:
        """The file of a value."""
        digest = f"{key.digest:032x}"
        inner = f"{namespace_digest(key.namespace)}/{digest[:2]}/{digest[2:]}"
        return f"{self.folder}/{inner}-{key.version:016x}-{key.num_parts}"

    def write(self, key: StoredKey, parts: Parts) -> None:
        """Make a value's file: it has its name when it is whole.

        Raises:
            OSError: the disk is full, or broken; nothing of it is left.
        """
        path = self.path(key)
        try:
            with self._new_file(key.namespace, path + _UNDER_WAY) as file:
                for piece in (memoryview(commit_record(key.digest, parts)), *parts):
                    written = 0
                    while written < len(piece):
                        written += file.write(piece[written:])
            os.rename(path + _UNDER_WAY, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(path + _UNDER_WAY)
            raise

    def _new_file(self, namespace: str, path: str) -> io.FileIO:
        with contextlib.suppress(FileNotFoundError):
            return io.FileIO(path, "wb")
        inner = Path(path).parent
        inner.mkdir(parents=True, exist_ok=True)
        if not (inner.parent / "name").exists():
            replace_file(inner.parent / "name", namespace.encode("utf-8", "surrogatepass"))
        return io.FileIO(path, "wb")

    def read(self, key: StoredKey) -> Parts | None:
        """A value's parts; None where the file is not what was written, or gone.

        Raises:
            OSError: the disk is broken.
        """
        try:
            with io.FileIO(self.path(key)) as file:
                head = memoryview(file.read(head_bytes(key.num_parts)))
                num_bytes = body_bytes(key.digest, head)
                if num_bytes is None or os.fstat(file.fileno()).st_size != len(head) + num_bytes:
                    return None
                body = np.empty(num_bytes, np.uint8)
                size = 0
                while size < num_bytes and (more := file.readinto(memoryview(body)[size:])):
                    size += more
        except FileNotFoundError:
            return None
        body.flags.writeable = False
        return checked_parts(head, memoryview(body)[:size])

    def mark_used(self, key: StoredKey, used: int) -> None:
        """So that a later scan finds when it was used; not being able to costs only that."""
        with contextlib.suppress(OSError):
            os.utime(self.path(key), ns=(used, used))

    def remove(self, key: StoredKey) -> None:
        """Delete a value's file, where there is one; what cannot be deleted is found at the next scan."""
        with contextlib.suppress(OSError):
            os.unlink(self.path(key))

    def close(self) -> None:
        """Let others use the folder."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + _UNDER_WAY)
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and not set(text) - set("0123456789abcdef")


def _key_from(namespace: str, start: str, name: str) -> StoredKey | None:
    """What a file name says; None where it is not one of a value."""
    digest, _, rest = name.partition("-")
    version, _, num_parts = rest.partition("-")
    if not (_is_hex(digest, 30) and _is_hex(version, 16) and num_parts.isdecimal() and num_parts.isascii()):
        return None
    if not 0 < int(num_parts) <= MAX_PARTS:
        return None
    return StoredKey(namespace, int(start + digest, 16), int(version, 16), int(num_parts))
