"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cmjax.errors import UserError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
FAILED = "the server failed while it made the answer; its log says why"


class ApiError(Exception):
    """What a client is told instead of a result.

    Attributes:
        status: of the response.
        message: one line naming the thing and what would be right.
        param: the field it is about.
        code: for programs, such as "context_length_exceeded".
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response, with `Retry-After` where trying again later makes sense."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Have every error of the app answered in this shape."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_user_error(_: Request, error: Exception) -> JSONResponse:
        return ApiError(400, str(error)).response()

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _of_body(error.errors()[0], request.headers.get("content-type")).response()

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    async def on_anything(request: Request, _: Exception) -> JSONResponse:
        # The log has the error: it is raised again behind the answer.
        state = request.app.state.server
        state.metrics.count_internal_error()
        state.history.note_answer(500)  # this one is sent outside of `Limits`, which sees all others
        response = ApiError(500, FAILED).response()
        response.headers["Connection"] = "close"  # which is what happens to it when the error is raised again
        return response

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(UserError, on_user_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_anything)


def _of_body(found: dict[str, Any], content_type: str | None) -> ApiError:
    """What is wrong with a body, by pydantic's first error and the content type that the client sent."""
    # Alternatives of a union are named in the path; the field itself comes first.
    where = [str(part) for part in found["loc"] if part != "body"]
    if found["type"] == "json_invalid":
        reason = found.get("ctx", {}).get("error", found["msg"])
        return ApiError(400, f"the body is not valid JSON: {reason} (character {where[0] if where else 0})")
    if where:
        return ApiError(400, f"{where[0]}: {found['msg']}", param=where[0])
    kind = (content_type or "").partition(";")[0].strip().lower()
    if found["type"] == "missing":
        return ApiError(400, "there is no body; it must be a JSON object")
    if kind != "application/json" and not kind.endswith("+json"):
        sent = f"it came as {content_type!r}" if content_type else "it came without"
        return ApiError(400, f"the body must be JSON with the header Content-Type: application/json; {sent}")
    return ApiError(400, "the body must be a JSON object")
