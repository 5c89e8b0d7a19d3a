"""uvicorn's HTTP connections, with an end to waiting for a client that does not go on with its request."""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cmjax.api import ApiError
from cmjax.serve.http.errors import error_response


def patient_protocol(patience_s: float, count: Callable[[int], None]) -> type[HttpToolsProtocol]:
    """A protocol for `uvicorn.Config(http=...)`: heads of requests must come within `patience_s` seconds.

    A body that the application waits for is the application's business; one that nobody reads any more, because the
    answer has been given without it, has as long.

    Args:
        patience_s: for the head of a request, from its first byte or the beginning of the connection, and for the
            rest of it after that.
        count: called with the status of what is answered here, without the application.
    """

    class Patient(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _has_begun = False
        _has_head = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # the transport as uvicorn has it
            super().connection_made(transport)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._has_begun, self._has_head = True, False
            self._wait()

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._has_head = True
            self._wait()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._has_begun = False
            self._stop()

        def send_400_response(self, msg: str) -> None:
            self._stop()
            count(400)
            super().send_400_response(msg)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _wait(self) -> None:
            self._stop()
            self._timer = asyncio.get_running_loop().call_later(patience_s, self._late)

        def _late(self) -> None:
            self._timer = None
            if self.transport.is_closing():
                return
            cycle: RequestResponseCycle | None = self.cycle
            if cycle is not None and not cycle.response_complete:
                self._wait()  # an answer is on its way, or the application waits for the body
                return
            if self._has_begun and not self._has_head:
                self._refuse()
            self.transport.close()

        def _refuse(self) -> None:
            count(408)
            response = error_response(ApiError(408, f"the head of the request did not come within {patience_s:g} s"))
            head = b"".join(b"%s: %s\r\n" % one for one in response.raw_headers)
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\n" + head + b"\r\n" + bytes(response.body))

    return Patient
