"""JSON in pieces, so that nobody has to wait for the whole of a long one."""

import functools
import json
from collections.abc import Iterator

_LIST_AT_ONCE = 256  # numbers or short texts
_LISTS_AT_ONCE = 8  # items that hold others, as the log probabilities of a place do: some 10 KB
_TEXT_AT_ONCE = 1 << 20  # characters
_dumps = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_pieces(value: object) -> Iterator[bytes]:
    """A value as compact JSON, in pieces of which each takes about a millisecond at most: lists of many
    things are cut, and texts."""
    if isinstance(value, dict) and any(isinstance(one, dict | list | str) for one in value.values()):
        yield b"{"
        for place, (name, one) in enumerate(value.items()):
            yield f"{',' if place else ''}{_dumps(name)}:".encode()
            yield from json_pieces(one)
        yield b"}"
    elif isinstance(value, list) and len(value) > _LIST_AT_ONCE:
        step = _LISTS_AT_ONCE if isinstance(value[-1], dict | list) else _LIST_AT_ONCE
        for begin in range(0, len(value), step):
            yield b"," if begin else b"["
            yield _dumps(value[begin : begin + step])[1:-1].encode()
        yield b"]"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for place, one in enumerate(value):
            yield b"," if place else b"["
            yield from json_pieces(one)
        yield b"]"
    elif isinstance(value, str) and len(value) > _TEXT_AT_ONCE:
        yield b'"'
        for begin in range(0, len(value), _TEXT_AT_ONCE):
            yield _dumps(value[begin : begin + _TEXT_AT_ONCE])[1:-1].encode()
        yield b'"'
    else:
        yield _dumps(value).encode()


def gathered(pieces: Iterator[bytes], least: int = 1 << 16) -> Iterator[bytes]:
    """The same bytes in pieces of `least` bytes or more, but for the last."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= least:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)
