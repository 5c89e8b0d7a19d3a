"""Where bodies are taken: small ones in the event loop, others in a thread, large ones in a process of their own."""

import asyncio
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cmjax.api.protocol import Kind
from cmjax.api.served import Served
from cmjax.api.taking import Taken, take
from cmjax.api.worker import LENGTH, whole

# Half a millisecond at 2 MB/s, which is about what it costs to hand it to a thread.
INLINE_BYTES = 1024
# Parsing and checking keep the interpreter's lock, as a list of so many bytes does for a few milliseconds.
THREAD_BYTES = 1 << 16
_THREADS = 2


class IntakeError(Exception):
    """The process that takes large bodies failed."""


class Intake:
    """Takes bodies, so that none of them holds up the event loop.

    The process is started with the first large body, and again after it has ended for whatever reason; large bodies
    take turns, in the order they came. `close` it when nothing more comes.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._threads = ThreadPoolExecutor(_THREADS, "intake")
        self._turn = asyncio.Lock()
        self._worker: _Worker | None = None

    @property
    def process(self) -> "subprocess.Popen[bytes] | None":
        """That for large bodies, where one runs."""
        return None if self._worker is None else self._worker.process

    @property
    def is_busy(self) -> bool:
        """Whether a large body is being taken."""
        return self._turn.locked()

    async def take(self, kind: Kind, content_type: str, pieces: Sequence[bytes]) -> Taken:
        """What a body asks for; see `cmjax.api.take`.

        Raises:
            ApiError: what is wrong with it.
            IntakeError: its process failed; the next one gets another.
        """
        size = sum(map(len, pieces))
        if size > THREAD_BYTES:
            async with self._turn:
                return await self._by_process(kind, content_type, pieces, size)
        raw = b"".join(pieces)
        if size <= INLINE_BYTES:
            return take(self._served, kind, content_type, raw)
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, take, self._served, kind, content_type, raw
        )

    async def _by_process(self, kind: Kind, content_type: str, pieces: Sequence[bytes], size: int) -> Taken:
        worker = self._worker = self._worker or await self._started()
        try:
            parts = await worker.ask((kind, content_type), pieces, size)
        except (OSError, EOFError) as error:
            self._worker = None
            status = await asyncio.to_thread(worker.end)
            raise IntakeError(f"the process that takes large bodies ended (status {status})") from error
        except BaseException:  # nobody waits for the answer any more, which would come as the next one's
            self._worker = None
            self._threads.submit(worker.end)
            raise
        if isinstance(parts[0], RuntimeError):
            raise IntakeError(f"a large body could not be taken: {parts[0]}")
        if isinstance(parts[0], Exception):
            raise parts[0]
        return whole(parts)

    async def _started(self) -> "_Worker":
        starting = asyncio.ensure_future(asyncio.to_thread(_Worker, self._served))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(lambda done: self._threads.submit(done.result().end))
            raise

    def close(self) -> None:
        """End the process and the threads."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """The process, and this end of its socket."""

    def __init__(self, served: Served) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from cmjax.api.worker import main; main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # a terminal's Ctrl-C is the server's
            )
        frame = pickle.dumps(served)
        try:
            self._channel.sendall(LENGTH.pack(len(frame)))
            self._channel.sendall(frame)
        except OSError as error:
            raise IntakeError(f"the process that takes large bodies did not start (status {self.end()})") from error
        self._channel.setblocking(False)

    async def ask(self, head: object, pieces: Sequence[bytes], size: int) -> list[Any]:
        """The parts of the reply to a body. OSError or EOFError: the process has ended."""
        loop = asyncio.get_running_loop()
        described = pickle.dumps(head)
        for piece in (LENGTH.pack(len(described)), described, LENGTH.pack(size), *pieces):
            await loop.sock_sendall(self._channel, piece)
        parts = []
        while frame := await self._received():
            parts.append(pickle.loads(frame))
        return parts

    async def _received(self) -> memoryview:
        (length,) = LENGTH.unpack(await self._exactly(LENGTH.size))
        return await self._exactly(length)

    async def _exactly(self, size: int) -> memoryview:
        loop, found = asyncio.get_running_loop(), memoryview(bytearray(size))
        rest = found
        while rest:
            count = await loop.sock_recv_into(self._channel, rest)
            if not count:
                raise EOFError
            rest = rest[count:]
        return found

    def end(self) -> int:
        """End it where it has not ended, and say how; takes milliseconds."""
        self._channel.close()
        self.process.kill()
        return self.process.wait()
