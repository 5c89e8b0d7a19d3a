"""Running the app: uvicorn, and a way down that finishes what runs."""

import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cmjax.serve.http.drain import Drain
from cmjax.serve.http.patience import patient_protocol
from cmjax.serve.http.state import ServerState
from cmjax.serve.settings import ListenSettings


class DrainingServer(uvicorn.Server):
    """Ends when it has drained.

    Attributes:
        drain: how far it is on its way down.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, on_ready: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self.drain, self._on_ready = drain, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell where."""
        await super().startup(sockets)
        if self.started and self._on_ready is not None:
            listening = [s.getsockname() for one in self.servers for s in one.sockets]
            self._on_ready(self.config.uds or f"http://{self.config.host}:{listening[0][1]}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The listening socket stays open until the end, so that who comes is told."""
        self.drain.signal()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; every tenth of a second."""
        return await super().on_tick(counter) or self.drain.is_over()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all; who has been cut and does not read is not waited for."""
        for connection in list(self.server_state.connections):
            cycle = connection.cycle  # type: ignore[union-attr]  # the protocol is ours
            if self.drain.num_cut and cycle is not None and not cycle.response_complete:
                connection.transport.abort()  # type: ignore[union-attr]  # see above
        await super().shutdown(sockets)


def make_server(app: FastAPI, listen: ListenSettings, on_ready: Callable[[str], None] | None = None) -> DrainingServer:
    """A server for an app from `create_app`; see `run_server`."""
    state: ServerState = app.state.server
    config = uvicorn.Config(
        app,
        host=listen.host,
        port=listen.port,
        uds=listen.uds,
        http=patient_protocol(
            state.settings.receive_timeout_s, lambda status: state.metrics.count_response("other", "none", status)
        ),
        log_level=listen.log_level,
        access_log=listen.log_level == "debug",
        timeout_graceful_shutdown=5,  # nothing is open then, but for what is about to end
        lifespan="on",
    )
    return DrainingServer(config, Drain(state, listen.drain_timeout_s, time.monotonic), on_ready)


def run_server(
    app: FastAPI,
    listen: ListenSettings,
    on_ready: Callable[[str], None] | None = None,
    listening: socket.socket | None = None,
) -> Drain:
    """Serve until SIGTERM or SIGINT, then finish what runs, within the drain timeout; a second signal ends at once.

    Args:
        app: from `create_app`.
        listen: where, and for how long at the end.
        on_ready: called with the address once requests are taken.
        listening: the socket, where there is one already; see `waiting_room`.

    Returns:
        How it ended: what had to be cut.
    """
    server = make_server(app, listen, on_ready)
    server.run(None if listening is None else [listening])
    return server.drain
