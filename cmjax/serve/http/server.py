"""Running the app: uvicorn, and a way down that finishes what runs."""

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cmjax.serve.http.state import ServerState
from cmjax.serve.settings import ListenSettings


class _Server(uvicorn.Server):
    """Takes nothing new from the first signal on, on connections that are open already too."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        state: ServerState = self.config.app.state.server  # type: ignore[union-attr]  # never an import string
        state.is_draining = True
        super().handle_exit(sig, frame)


def run_server(app: FastAPI, listen: ListenSettings, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs, within the drain timeout; a second signal ends at once.

    Args:
        app: from `create_app`.
        listen: where, and for how long at the end.
        on_ready: called with the address once requests are taken.
    """
    config = uvicorn.Config(
        app,
        host=listen.host,
        port=listen.port,
        uds=listen.uds,
        log_level=listen.log_level,
        access_log=listen.log_level == "debug",
        timeout_graceful_shutdown=max(int(listen.drain_timeout_s), 1),
    )
    server = _Server(config)
    if on_ready is not None:
        startup = server.startup

        async def start_and_tell(sockets: list[socket.socket] | None = None) -> None:
            await startup(sockets)
            if server.started:
                listening = [s.getsockname() for one in server.servers for s in one.sockets]
                on_ready(listen.uds or f"http://{listen.host}:{listening[0][1]}")

        server.startup = start_and_tell  # type: ignore[method-assign]  # uvicorn has no hook for it
    # uvicorn raises the signal again when it is done, which would end the process before what comes after.
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(one, lambda *_: None) for one in signals]
    try:
        server.run()
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
