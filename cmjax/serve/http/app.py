"""The routes of the API, and what stands before them."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

import cmjax
from cmjax.api import BODIES, FAILED, INLINE_BYTES, ApiError, Asked, ChatTemplate, Kind, Taken, gathered, json_pieces
from cmjax.checkpoint import GenerationConfig, Tokenizer
from cmjax.serve.http.answers import Answer
from cmjax.serve.http.backend import Backend
from cmjax.serve.http.bodies import ClientGoneError, read_body
from cmjax.serve.http.errors import error_response, install_handlers
from cmjax.serve.http.limits import Counted, Limits
from cmjax.serve.http.run import Run
from cmjax.serve.http.state import SHUTTING_DOWN, ServerState
from cmjax.serve.http.status import documentation_route, status_routes
from cmjax.serve.settings import ServerSettings
from cmjax.text import JsonObject

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_SCHEMAS = "#/components/schemas/"


def create_app(
    engine: Backend,
    settings: ServerSettings,
    tokenizer: Tokenizer | None = None,
    template: ChatTemplate | None = None,
    generation: GenerationConfig | None = None,
) -> FastAPI:
    """The ASGI application over an engine that has been started; its `state.server` is the `ServerState`."""
    state = ServerState(engine, settings, tokenizer, template, generation)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        watching = [asyncio.ensure_future(one) for one in (state.lag.watch(), state.history.follow())]
        try:
            yield
        finally:
            for one in watching:
                one.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await state.close()

    # The pages of FastAPI load scripts from elsewhere.
    app = FastAPI(title="cmjax", version=cmjax.__version__, docs_url=None, redoc_url=None, lifespan=life)
    app.state.server = state
    install_handlers(app)
    app.add_middleware(Limits, state=state)
    # Outside of the limits: a preflight has no key, and an error is for the script to see too.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=settings.allowed_methods,
        allow_headers=settings.allowed_headers,
        allow_credentials=settings.allow_credentials,
    )
    app.add_middleware(Counted, state=state, routes=app.router.routes)
    _add_completions(app, state)
    _add_tokens(app, state)
    _add_operations(app, state)
    _describe_bodies(app)
    app.router.routes.extend([*status_routes(state), documentation_route(app)])
    return app


# -- bodies -----------------------------------------------------------------------------------------------------------


async def _taken(state: ServerState, request: Request, kind: Kind) -> Taken:
    """What the body of a request asks for. Routes take the bytes themselves: FastAPI would parse them in the loop."""
    pieces = await read_body(request, state.settings)
    work = state.intake.take(kind, request.headers.get("content-type", ""), pieces)
    if sum(map(len, pieces)) <= INLINE_BYTES:
        return await work  # over before anybody could go
    return await _unless_gone(request.receive, work)


def _body(kind: Kind) -> JsonObject:
    """What the schema says of a route's body."""
    schema = {"$ref": _SCHEMAS + BODIES[kind].__name__}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe_bodies(app: FastAPI) -> None:
    """Put the models of bodies into `/openapi.json`, which has those of FastAPI's own parsing only."""
    _, described = models_json_schema(
        [(model, "validation") for model in BODIES.values()], ref_template=_SCHEMAS + "{model}"
    )

    def openapi() -> JsonObject:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(described["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend its schema


# -- routes -----------------------------------------------------------------------------------------------------------


def _add_completions(app: FastAPI, state: ServerState) -> None:
    async def complete(request: Request, kind: Kind) -> Response:
        asked = await _taken(state, request, kind)
        assert isinstance(asked, Asked)
        run = Run(state, asked, _tenant(request))
        await run.start()
        return await _respond(request, Answer(state, run))

    @app.post("/v1/completions", openapi_extra=_body("completion"))
    async def completions(request: Request) -> Response:
        """Continue prompts: texts or token ids, one or several."""
        return await complete(request, "completion")

    @app.post("/v1/chat/completions", openapi_extra=_body("chat"))
    async def chat(request: Request) -> Response:
        """Continue a conversation, by the model's chat template."""
        return await complete(request, "chat")

    @app.get("/v1/models")
    async def models() -> JsonObject:
        """The one model that is served."""
        return {"object": "list", "data": [_described(state)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> JsonObject:
        """A model, if it is served."""
        state.served.check_model(model)
        return _described(state)


def _described(state: ServerState) -> JsonObject:
    return {
        "id": state.settings.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "cmjax",
        "root": state.settings.model_name,
        "max_model_len": state.engine.settings.max_model_len,
    }


def _add_tokens(app: FastAPI, state: ServerState) -> None:
    async def answer(request: Request, kind: Kind) -> Response:
        pieces = await _taken(state, request, kind)
        assert isinstance(pieces, list)
        return JSONPieces(pieces)

    @app.post("/tokenize", openapi_extra=_body("tokenize"))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or of a conversation."""
        return await answer(request, "tokenize")

    @app.post("/detokenize", openapi_extra=_body("detokenize"))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await answer(request, "detokenize")

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> JsonObject:
        """What a client needs that makes prompts of conversations itself."""
        tokenizer, template = state.served.text_tokenizer(), state.served.template
        source = tokenizer.chat_template if template is None else template.source
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")),
            **tokenizer.special_tokens,
            "chat_template": source,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": state.engine.settings.max_model_len,
        }


def _add_operations(app: FastAPI, state: ServerState) -> None:
    @app.get("/health")
    @app.get("/ping", include_in_schema=False)
    async def health() -> Response:
        """200 while the server takes requests."""
        if state.is_draining:
            raise ApiError(503, SHUTTING_DOWN)
        if not state.engine.is_healthy:
            raise ApiError(503, "a role has no instance that works")
        return Response()

    resetting = asyncio.Lock()  # those who wait for others take no thread

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        """Forget all cached blocks, those of the instances and of the memory pool, of all clients."""
        async with resetting:
            await asyncio.to_thread(state.engine.reset_prefix_cache)
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of cmjax."""
        return {"version": cmjax.__version__}

    @app.get("/metrics")
    def metrics() -> Response:
        """Prometheus."""
        # FastAPI runs it in a thread: a server of the memory pool may take a while to answer.
        return Response(state.metrics.render(), media_type=state.metrics.content_type)


def _tenant(request: Request) -> str:
    return str(request.scope.get("cmjax.tenant", ""))


# -- answers ----------------------------------------------------------------------------------------------------------


async def _respond(request: Request, answer: Answer) -> Response:
    if answer.body.stream:
        return EventStream(answer)
    try:
        found = await _unless_gone(request.receive, answer.whole())
        pieces: list[bytes] = []
        for piece in gathered(json_pieces(found)):
            pieces.append(piece)
            await asyncio.sleep(0)  # a long one is made bit by bit
        return JSONPieces(pieces)
    finally:
        answer.run.close()


async def _unless_gone(receive: Callable[[], Awaitable[Message]], work: Awaitable[Result]) -> Result:
    """The result of some work, which ends where the client goes; ClientGoneError then."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError
        return doing.result()
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JSONPieces(Response):
    """JSON that is there in pieces; they are never put together."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes]) -> None:
        super().__init__()
        self.headers["content-length"] = str(sum(map(len, pieces)))
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _error_event(error: ApiError) -> bytes:
    return b"data: " + bytes(error_response(error).body) + b"\n\n"


class EventStream(Response):
    """Server-sent events, until the answer is complete or the client has gone; either way its requests are closed."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.answer = answer

    async def _events(self) -> AsyncIterator[bytes]:
        answer = self.answer
        try:
            for event in answer.first_events():
                yield event
            async for piece in answer.run.pieces():
                yield await answer.event(piece)
            last = answer.last_event()
            if last is not None:
                yield last
        except ApiError as error:
            # The status has been sent; the event says that what came before is no result.
            answer.state.history.note_answer(error.status)
            yield _error_event(error)
        except Exception:  # whatever it is: the status has been sent, and a stream must end as streams do
            logger.exception("a stream ends with an error of the server's own")
            answer.state.metrics.count_internal_error()
            answer.state.history.note_answer(500)
            yield _error_event(ApiError(500, FAILED))
        yield b"data: [DONE]\n\n"

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            self.answer.run.close()
