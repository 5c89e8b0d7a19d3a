"""The OpenAI-compatible HTTP API; needs the extra `cmjax[serve]`."""

from cmjax.serve.http.app import create_app
from cmjax.serve.http.server import run_server
from cmjax.serve.http.state import ServerSettings

__all__ = ["ServerSettings", "create_app", "run_server"]
