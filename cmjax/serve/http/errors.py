"""Errors as responses: whatever goes wrong is answered in OpenAI's shape."""

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from cmjax.api import FAILED, ApiError
from cmjax.serve.http.bodies import ClientGoneError


def error_response(error: ApiError) -> JSONResponse:
    """The response, with `Retry-After` where trying again later makes sense. Where the client is late with the rest of
    its request, or the server is about to end, the connection ends too."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status in (408, 503):
        headers["Connection"] = "close"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Have every error of the app answered in this shape."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def on_gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; it is counted

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = error_response(ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    async def on_anything(request: Request, _: Exception) -> JSONResponse:
        # The log has the error: it is raised again behind the answer.
        request.app.state.server.metrics.count_internal_error()
        response = error_response(ApiError(500, FAILED))
        response.headers["Connection"] = "close"  # which is what happens to it when the error is raised again
        return response

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(ClientGoneError, on_gone)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_anything)
