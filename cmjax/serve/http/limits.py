"""What stands before the routes: keys, the size of bodies, HEAD, and the id of a request."""

import hmac
import json
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmjax.serve.http.errors import ApiError
from cmjax.serve.http.state import ServerState

_NEVER_GUARDED = ("/health", "/ping", "/metrics")
_ALWAYS_GUARDED = ("/tokenize", "/detokenize")


class Limits:
    """Asks for keys, bounds bodies, and gives each request an id, which its response bears too."""

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

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
                self.state.history.note_answer(message["status"])
            await send(message)

        try:
            self._check_key(scope, headers)
            body_receive = await self._limited(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
            return
        await self.app(scope, body_receive, send_with_id)

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

    async def _limited(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Read the body, at most so much of it; then hand it on, and after it what else the client does."""
        limit = self.state.settings.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit:,} bytes")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise too_large
        if not length and b"transfer-encoding" not in headers:
            return receive
        parts, size = [], 0
        while True:
            message = await receive()
            parts.append(message)
            size += len(message.get("body", b""))
            if size > limit:
                raise too_large
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break
        _check_text(b"".join(part.get("body", b"") for part in parts))
        messages = iter(parts)

        async def replay() -> Message:
            message = next(messages, None)
            return await receive() if message is None else message

        return replay


def _check_text(body: bytes) -> None:
    """400 for what is no UTF-8, and for half of a surrogate pair, which JSON can write and no text can have."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error.reason} at byte {error.start}") from error
    # Zeros: `json` takes them for another encoding.
    if not any(mark in body for mark in (b"\\ud", b"\\uD", b"\0")):
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        message = (
            f"the body is not Unicode text: it has half of a surrogate pair, \\u{ord(error.object[error.start]):x}"
        )
        raise ApiError(400, message) from error
    except (ValueError, RecursionError):
        return  # the routes say what is wrong with it
