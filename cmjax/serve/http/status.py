"""Pages for people that load nothing from elsewhere: what the server does, at `/`, and what it takes, at `/docs`."""

import dataclasses
import html
import time
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from cmjax.serve.http.backend import Backend
from cmjax.serve.http.lag import LoopLag


def status_routes(engine: Backend, model_name: str, lag: LoopLag) -> list[Route]:
    """`/`, a page that needs nothing from elsewhere, and `/status.json`, which it asks every second."""
    page = files("cmjax.serve.http").joinpath("status.html").read_text(encoding="utf-8")
    began = time.monotonic()

    async def show(_: Request) -> HTMLResponse:
        return HTMLResponse(page)

    async def status(_: Request) -> JSONResponse:
        stats = engine.stats()
        fields = dataclasses.asdict(stats)
        return JSONResponse(
            {
                "model": model_name,
                "uptime_s": time.monotonic() - began,
                "kv_usage": stats.kv_usage,
                "event_loop_lag_s": lag.quantiles(),
                **fields,
            }
        )

    return [Route("/", show), Route("/status.json", status)]


def documentation_route(app: FastAPI) -> Route:
    """`/docs`: the paths and fields of `/openapi.json`."""

    async def show(_: Request) -> HTMLResponse:
        return HTMLResponse(_documentation(app.openapi()))

    return Route("/docs", show)


def _documentation(schema: dict[str, Any]) -> str:
    described = schema.get("components", {}).get("schemas", {})
    parts = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation.get('description', ''))}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            fields = described.get(body.get("$ref", "").rpartition("/")[2], {}).get("properties", {})
            rows = [(html.escape(name), html.escape(_kind(field))) for name, field in fields.items()]
            parts += ["<table>", *(f"<tr><td><code>{name}</code><td>{kind}" for name, kind in rows), "</table>"]
    return _PAGE.format(title=html.escape(schema["info"]["title"]), body="\n".join(parts))


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(one) for one in field["anyOf"]))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    kind = field.get("type") or field.get("$ref", "anything").rpartition("/")[2]
    return f"{kind}, {field['default']!r}" if "default" in field else kind


_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}: the API</title>
<style>body {{ font: 15px/1.5 sans-serif; max-width: 50em; margin: 2em auto }} td {{ padding-right: 2em }}</style>
<h1>{title}: the API</h1>
<p>The whole schema: <a href="openapi.json">/openapi.json</a>.</p>
{body}
"""
