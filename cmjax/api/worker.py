"""A process that takes large bodies: what it does cannot hold anybody else up, not even by the interpreter's lock.

`main` answers over a socket, one body after another, until the other end is closed. Either way a frame is a length (8
bytes, little-endian) and so many bytes, a pickle but for a body itself. A reply is several frames, so that the other
end can unpickle each in no time; an empty one ends it.
"""

import dataclasses
import logging
import pickle
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

from cmjax.api.errors import ApiError
from cmjax.api.prompts import Prompt
from cmjax.api.served import Served
from cmjax.api.taking import Asked, Taken, take

logger = logging.getLogger(__name__)

LENGTH = struct.Struct("<Q")
_PROMPTS_AT_ONCE = 256


def parts_of(taken: Taken) -> Iterator[object]:
    """What was taken, in parts; `whole` puts them together again."""
    if not isinstance(taken, Asked):
        yield from taken
        return
    yield dataclasses.replace(taken, prompts=[], samplings=[])
    for begin in range(0, len(taken.prompts), _PROMPTS_AT_ONCE):
        end = begin + _PROMPTS_AT_ONCE
        yield taken.prompts[begin:end], taken.samplings[begin:end]


def whole(parts: list[Any]) -> Taken:
    """The inverse of `parts_of`."""
    first, *rest = parts
    if not isinstance(first, Asked):
        return parts
    prompts: list[Prompt] = [prompt for some, _ in rest for prompt in some]
    return dataclasses.replace(first, prompts=prompts, samplings=[one for _, some in rest for one in some])


def main(fd: int) -> None:
    """Serve the socket with this file descriptor; the first frame is what is served, a pickled `Served`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the server says when it is over
    with socket.socket(fileno=fd) as channel:
        served: Served = pickle.loads(_received(channel))
        while True:
            try:
                kind, content_type = pickle.loads(_received(channel))
            except EOFError:
                return
            raw = _received(channel)
            try:
                for part in parts_of(take(served, kind, content_type, raw)):
                    _send(channel, pickle.dumps(part))
            except ApiError as error:
                _send(channel, pickle.dumps(error))
            except Exception as error:  # a mistake of ours: the server tells the client, and serves on
                logger.exception("a large body could not be taken")
                _send(channel, pickle.dumps(RuntimeError(repr(error))))
            del raw
            _send(channel, b"")


def _send(channel: socket.socket, frame: bytes) -> None:
    channel.sendall(LENGTH.pack(len(frame)))
    channel.sendall(frame)


def _received(channel: socket.socket) -> bytes:
    """The next frame; EOFError where there is none."""
    (length,) = LENGTH.unpack(_exactly(channel, LENGTH.size))
    return _exactly(channel, length)


def _exactly(channel: socket.socket, size: int) -> bytes:
    found = bytearray(size)
    view = memoryview(found)
    while view:
        count = channel.recv_into(view)
        if not count:
            raise EOFError("the other end is closed")
        view = view[count:]
    return bytes(found)
