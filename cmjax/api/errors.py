"""What a client is told instead of a result, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from cmjax.text import JsonObject

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
FAILED = "the server failed while it made the answer; its log says why"


class ApiError(Exception):
    """An error that is a client's, or that a client is told of.

    Attributes:
        status: of the response.
        message: one line naming the thing and what would be right.
        param: the field it is about.
        code: for programs, such as "context_length_exceeded".
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def __reduce__(self) -> tuple[type["ApiError"], tuple[object, ...]]:
        return ApiError, (self.status, self.message, self.param, self.code)

    def body(self) -> JsonObject:
        """The JSON of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def clipped(text: object) -> str:
    """What a client sent, as an error shows it: its representation, cut where it is long."""
    shown = repr(text[:80] + "..." if isinstance(text, str) and len(text) > 80 else text)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
