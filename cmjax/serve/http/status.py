"""The status page at `/`: instances, load, planes and traffic, live."""

import dataclasses
import time
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from cmjax.serve.http.backend import Backend


def status_routes(engine: Backend, model_name: str) -> list[Route]:
    """`/`, a page that needs nothing from elsewhere, and `/status.json`, which it asks every second."""
    page = files("cmjax.serve.http").joinpath("status.html").read_text(encoding="utf-8")
    began = time.monotonic()

    async def show(_: Request) -> HTMLResponse:
        return HTMLResponse(page)

    async def status(_: Request) -> JSONResponse:
        stats = engine.stats()
        fields = dataclasses.asdict(stats)
        return JSONResponse(
            {"model": model_name, "uptime_s": time.monotonic() - began, "kv_usage": stats.kv_usage, **fields}
        )

    return [Route("/", show), Route("/status.json", status)]
