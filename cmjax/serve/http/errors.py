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

    async def on_invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        # Alternatives of a union are named in the path; the field itself comes first.
        param = where[0] if where else None
        message = f"{param}: {first['msg']}" if param else f"the body is no request: {first['msg']}"
        return ApiError(400, message, param=param).response()

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    async def on_anything(request: Request, _: Exception) -> JSONResponse:
        # The log has the error: it is raised again behind the answer.
        request.app.state.server.metrics.count_internal_error()
        return ApiError(500, FAILED).response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(UserError, on_user_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_anything)
