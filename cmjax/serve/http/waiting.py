"""A port that answers from the first second, while the engine behind it comes up."""

import contextlib
import math
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import Receive, Scope, Send

from cmjax.api import ApiError
from cmjax.errors import UserError
from cmjax.serve.http.errors import error_response
from cmjax.serve.settings import ListenSettings
from cmjax.serve.startup import StartProgress

_MOST_PATIENCE_S = 60
_BACKLOG = 2048


class WaitingRoom:
    """Tells whoever comes, with status 503, how far the engine is.

    Attributes:
        socket: it listens; for the server that takes over.
    """

    def __init__(self, listening: socket.socket) -> None:
        self.socket = listening
        self._progress: StartProgress | None = None
        config = uvicorn.Config(self._answer, interface="asgi3", log_config=None, lifespan="off")
        self._server = uvicorn.Server(config)
        # A descriptor of its own: uvicorn closes what it was given, and the socket must go on listening.
        own = listening.dup()
        self._thread = threading.Thread(target=self._server.run, args=([own],), name="waiting", daemon=True)
        self._thread.start()

    def tell(self, progress: StartProgress) -> None:
        """Take note of how far the engine is."""
        self._progress = progress

    def close(self) -> None:
        """Answer nobody any more; who connects from now on waits for the server that takes over."""
        self._server.should_exit = True
        self._thread.join()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        progress = self._progress
        how_far = "loading the model" if progress is None else str(progress)
        response = error_response(ApiError(503, f"the server is starting: {how_far}"))
        left_s = None if progress is None else progress.left_s
        response.headers["Retry-After"] = str(min(math.ceil(left_s or 1), _MOST_PATIENCE_S))
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


@contextlib.contextmanager
def waiting_room(listen: ListenSettings) -> Iterator[WaitingRoom]:
    """Listen where a server is to be, and answer there until it is, or this ends with an error.

    Raises:
        UserError: somebody else listens there, or nobody may.
    """
    listening = _listen(listen)
    room = WaitingRoom(listening)
    try:
        yield room
    except BaseException:
        room.close()
        listening.close()
        raise
    finally:
        if listen.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(listen.uds)


def _listen(listen: ListenSettings) -> socket.socket:
    where = listen.uds or f"{listen.host}:{listen.port}"
    try:
        if listen.uds is None:
            family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
            return socket.create_server((listen.host, listen.port), family=family, backlog=_BACKLOG)
        return _listen_at(Path(listen.uds))
    except OSError as error:
        raise UserError(f"cannot listen on {where}: {error.strerror or error}") from error


def _listen_at(path: Path) -> socket.socket:
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        path.unlink()  # of a server that was killed
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(str(path))
        path.chmod(0o666)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
