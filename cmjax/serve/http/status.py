"""Pages for people that load nothing from elsewhere: what the server does, at `/`, and what it takes, at `/docs`."""

import asyncio
import dataclasses
import html
from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

import cmjax
from cmjax.api import ApiError
from cmjax.model import placed_layer_names
from cmjax.serve.http.history import SPAN_S
from cmjax.serve.http.state import ServerState
from cmjax.text import JsonObject


def status_routes(state: ServerState) -> list[Route]:
    """`/`, a page that needs nothing from elsewhere, and what it asks for: `/status.json`, the present, every second;
    `/status/history.json` and `/status/experts.json` now and then."""
    page = files("cmjax.serve.http").joinpath("status.html").read_text(encoding="utf-8")
    engine, past = state.engine, state.history

    async def show(_: Request) -> HTMLResponse:
        return HTMLResponse(page)

    async def status(_: Request) -> JSONResponse:
        stats, pool = engine.stats(), engine.pool
        own = {
            "model": state.settings.model_name,
            "version": cmjax.__version__,
            "uptime_s": past.uptime_s,
            "kv_usage": stats.kv_usage,
            "event_loop_lag_s": state.lag.quantiles(),
            "num_refused": past.num_refused,
            "num_failed": past.num_failed,
            "recent": past.recent(),
            # In a thread: a server of the pool may take a while to answer.
            "pool": None if pool is None else dataclasses.asdict(await asyncio.to_thread(pool.stats)),
        }
        return JSONResponse(own | dataclasses.asdict(stats))

    async def history(request: Request) -> JSONResponse:
        given = request.query_params.get("after_s", "-1")
        try:
            after_s = float(given)
        except ValueError as error:
            raise ApiError(400, f"after_s: {given!r} is no number of seconds", param="after_s") from error
        samples = [vars(one) for one in past.since(after_s)]
        return JSONResponse({"span_s": SPAN_S, "uptime_s": past.uptime_s, "samples": samples})

    def experts_now() -> JSONResponse:
        names = placed_layer_names(engine.model.config)
        load = engine.expert_load().items()
        return JSONResponse({role: dict(zip(names, rows.tolist(), strict=True)) for role, rows in load})

    async def experts(_: Request) -> JSONResponse:
        return await asyncio.to_thread(experts_now)  # hundreds of experts a layer

    return [
        Route("/", show),
        Route("/status.json", status),
        Route("/status/history.json", history),
        Route("/status/experts.json", experts),
    ]


def documentation_route(app: FastAPI) -> Route:
    """`/docs`: the paths and fields of `/openapi.json`."""

    async def show(_: Request) -> HTMLResponse:
        return HTMLResponse(_documentation(app.openapi()))

    return Route("/docs", show)


def _documentation(schema: JsonObject) -> str:
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


def _kind(field: JsonObject) -> str:
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
