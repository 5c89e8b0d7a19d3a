"""The OpenAI-compatible HTTP API; needs the extra `cmjax[serve]`."""

from cmjax.serve.http.app import create_app
from cmjax.serve.http.keys import known_keys
from cmjax.serve.http.server import make_server, run_server
from cmjax.serve.http.waiting import WaitingRoom, waiting_room
from cmjax.serve.settings import ListenSettings, ServerSettings

__all__ = [
    "ListenSettings",
    "ServerSettings",
    "WaitingRoom",
    "create_app",
    "known_keys",
    "make_server",
    "run_server",
    "waiting_room",
]
