"""Bodies as they come in: in pieces, at most so large, within a time."""

import asyncio

from starlette.requests import Request

from cmjax.api import ApiError
from cmjax.serve.settings import ServerSettings


async def read_body(request: Request, settings: ServerSettings) -> list[bytes]:
    """The body of a request, in the pieces in which it came.

    The time is for the whole of it: whoever sends a byte now and then would hold what came before for ever.

    Raises:
        ApiError: 413, it is larger than may be; 408, the rest does not come.
        ClientGoneError: before the end of it.
    """
    limit, patience_s = settings.max_body_bytes, settings.receive_timeout_s
    too_large = ApiError(413, f"the body is larger than {limit:,} bytes")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(patience_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > limit:
                    raise too_large
                if not message.get("more_body"):
                    return pieces
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {patience_s:g} s: {size:,} bytes of it did") from error


class ClientGoneError(Exception):
    """Nobody waits for an answer any more."""
