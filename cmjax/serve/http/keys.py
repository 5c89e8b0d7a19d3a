"""Keys that clients must send, and what each of them shares with others."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from cmjax.errors import UserError
from cmjax.serve.settings import ServerSettings

_VARIABLES = ("CMJAX_API_KEY", "VLLM_API_KEY")


def known_keys(settings: ServerSettings, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the options and of the file; where there are none, that of the environment.

    Raises:
        UserError: a key is empty, or the file cannot be read or has none.
    """
    keys = list(settings.api_keys)
    if any(not key.strip() for key in keys):
        raise UserError("--api-key: a key is empty, so that anybody would have it")
    if settings.api_key_file is not None:
        keys += _read(settings.api_key_file)
    if not keys:
        keys = [key for name in _VARIABLES if (key := environment.get(name, "").strip())][:1]
    return tuple(dict.fromkeys(key.strip() for key in keys))


def namespace_of(key: str) -> str:
    """The prefix cache's namespace of a client with this key: the same one after a restart, and it does not tell the
    key, for it is written to logs, disks and the status page."""
    return hashlib.blake2b(key.encode(), digest_size=16, person=b"cmjax namespace").hexdigest()


def _read(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"--api-key-file {file}: {reason}") from error
    keys = [key for line in lines if (key := line.strip())]
    if not keys:
        raise UserError(f"--api-key-file {file}: there is no key in it")
    return keys
