"""What stands before the routes: keys, a server that is about to end, HEAD, the id of a request, and the count of
responses."""

import asyncio
import hmac
import uuid

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmjax.api import ApiError
from cmjax.serve.http.errors import error_response
from cmjax.serve.http.state import SHUTTING_DOWN, ServerState

_NEVER_GUARDED = ("/health", "/ping", "/metrics")
_ALWAYS_GUARDED = ("/tokenize", "/detokenize", "/reset_prefix_cache")
# What may still be asked of a server that drains: how it does.
_WHILE_DRAINING = ("/metrics", "/", "/status.json", "/status/history.json", "/status/experts.json")


class Limits:
    """Asks for keys, gives each request an id, which its response bears too, and takes nothing while draining."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; the server itself leaves the body out
            scope = {**scope, "method": "GET"}
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id") or uuid.uuid4().hex.encode()
        is_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_begun
            if message["type"] == "http.response.start":
                is_begun = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        try:
            if self.state.is_draining and scope["path"] not in _WHILE_DRAINING:
                raise ApiError(503, SHUTTING_DOWN)
            self._check_key(scope, headers)
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_id)
            return
        try:
            with self.state.open_call():
                await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if is_begun or not self.state.is_draining:
                raise
            cut = ApiError(503, f"the request was cancelled: {SHUTTING_DOWN}")
            await error_response(cut)(scope, receive, send_with_id)

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        keys = self.state.settings.api_keys
        if not keys or not self._is_guarded(scope["path"]):
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        known = [key for key in keys if hmac.compare_digest(key.encode(), given.strip())]
        if kind.lower() != b"bearer" or not known:
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )
        scope["cmjax.tenant"] = known[0]

    def _is_guarded(self, path: str) -> bool:
        if path in _ALWAYS_GUARDED or path.startswith("/v1"):
            return True
        return path not in _NEVER_GUARDED and not self.state.settings.open_pages


class Counted:
    """Counts responses by method, route and status, whoever makes them: the routes, the limits, a preflight, a failure.

    A client that goes before its answer is counted as 499.
    """

    def __init__(self, app: ASGIApp, state: ServerState, routes: list[BaseRoute]) -> None:
        self.app, self.state, self.routes = app, state, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, handler, is_counted = scope["method"], self._handler(scope), False

        async def counting(message: Message) -> None:
            nonlocal is_counted
            if message["type"] == "http.response.start":
                is_counted = True
                self._count(method, handler, message["status"])
            await send(message)

        try:
            await self.app(scope, receive, counting)
        except Exception:
            if not is_counted:  # it is answered further out
                self._count(method, handler, 500)
            raise

    def _count(self, method: str, handler: str, status: int) -> None:
        self.state.metrics.count_response(method, handler, status)
        self.state.history.note_answer(status)

    def _handler(self, scope: Scope) -> str:
        """The path of the route that a request is for, as it is written; a client's own could be any number."""
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        found = (route for route in self.routes if route.matches(asked)[0] is not Match.NONE)
        return str(getattr(next(found, None), "path", "none"))
