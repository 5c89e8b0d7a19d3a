"""Names of cached blocks: keyed, cryptographic and whole, so that nobody can make two prompts share a block that have
different ones, nor tell from a name what it is of."""

import contextlib
import functools
import os
import secrets
import stat
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import blake3
import numpy as np

from cmjax.errors import UserError

KEY_BYTES = 32
# What a block consists of, and in which order; counts up with every change of it.
LAYOUT_VERSION = 1


class CacheKeys:
    """Names blocks of `block_tokens` tokens by all that their contents depend on; see `cmjax.schedule.BlockNames`.

    A name is the BLAKE3 hash, under a secret key, of its parent's name and its tokens; what stands before the first
    block is the hash of everything else.

    Args:
        secret: 32 bytes; whoever shares them shares blocks.
        block_tokens: of a cached block.
        fields: name -> value of all but the tokens that changes the contents: weights, config, formats.
    """

    def __init__(self, secret: bytes, block_tokens: int, fields: Mapping[str, str]) -> None:
        self._secret, self._block_tokens = secret, block_tokens
        self._fields = {"layout": str(LAYOUT_VERSION), "block_tokens": str(block_tokens), **fields}
        self.root = functools.lru_cache(maxsize=4096)(self._root)

    @property
    def block_tokens(self) -> int:
        """Tokens of a cached block."""
        return self._block_tokens

    def _root(self, namespace: str, cache_salt: str) -> bytes:
        """What stands before the first block of a prompt."""
        fields = {**self._fields, "namespace": namespace, "cache_salt": cache_salt}
        return self._hash(
            b"root", *(part.encode("utf-8", "surrogatepass") for pair in sorted(fields.items()) for part in pair)
        )

    def name(self, parent: bytes, token_ids: np.ndarray) -> bytes:
        """32 bytes; `token_ids`: `int32[block_tokens]`."""
        return self._hash(b"block", parent, np.ascontiguousarray(token_ids, "<i4").tobytes())

    def _hash(self, *parts: bytes) -> bytes:
        """Each part after its length, so that no two lists of parts are one text."""
        return blake3.blake3(b"".join(struct.pack("<Q", len(one)) + one for one in parts), key=self._secret).digest()


def read_or_make_key(path: Path | None) -> bytes:
    """The secret of a pool: made once, and kept for its owner's eyes only; None: one that ends with this process.

    Raises:
        UserError: the file cannot be read or made, holds something else, or others may read it.
    """
    if path is None:
        return secrets.token_bytes(KEY_BYTES)
    try:
        if not path.exists():
            _make(path)
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"{path}: others may read the key of the prefix cache: chmod 600 it")
        key = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the key of the prefix cache: {error.strerror}") from error
    if len(key) != KEY_BYTES:
        raise UserError(f"{path}: a key of the prefix cache has {KEY_BYTES} bytes, this has {len(key)}")
    return key


def _make(path: Path) -> None:
    """Whole or not at all, and never in place of one that another process has made meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
