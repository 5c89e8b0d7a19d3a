"""The routes of the API, and the limits that stand before them."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

import cmjax
from cmjax.checkpoint import GenerationConfig, Tokenizer
from cmjax.model import check_token_ids, token_id_array
from cmjax.serve.http.answers import Answer
from cmjax.serve.http.backend import Backend
from cmjax.serve.http.errors import FAILED, ApiError, install_handlers
from cmjax.serve.http.fields import check_fields
from cmjax.serve.http.limits import Limits
from cmjax.serve.http.prompts import chat_prompt, completion_prompts, conversation, encode
from cmjax.serve.http.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from cmjax.serve.http.run import Run
from cmjax.serve.http.state import ServerState, refuse_unsupported
from cmjax.serve.http.status import documentation_route, status_routes
from cmjax.serve.http.template import ChatTemplate
from cmjax.serve.settings import ServerSettings

logger = logging.getLogger(__name__)


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
        sampling = asyncio.ensure_future(state.history.follow())
        try:
            yield
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)

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
    _add_completions(app, state)
    _add_tokens(app, state)
    _add_health(app, state)
    app.router.routes.extend([*status_routes(state), documentation_route(app)])
    return app


def _add_completions(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts: texts or token ids, one or several."""
        state.check_model(body.model)
        refuse_unsupported(body)
        prompts = completion_prompts(state, body)
        run = Run(state, body, [prompt.token_ids for prompt in prompts], _tenant(request))
        return await _respond(request, Answer(state, run, body, prompts))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation, by the model's chat template."""
        state.check_model(body.model)
        refuse_unsupported(body)
        prompt = chat_prompt(state, body)
        run = Run(state, body, [prompt.token_ids], _tenant(request))
        return await _respond(request, Answer(state, run, body, [prompt]))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [_described(state)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """A model, if it is served."""
        state.check_model(model)
        return _described(state)


def _described(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.settings.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "cmjax",
        "root": state.settings.model_name,
        "max_model_len": state.engine.settings.max_model_len,
    }


def _add_tokens(app: FastAPI, state: ServerState) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text or of a conversation."""
        state.check_model(body.model)
        check_fields(body.model_extra)
        tokenizer = state.text_tokenizer()
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: give either prompt or messages", param="prompt")
        if body.messages is not None:
            ids = encode(tokenizer, conversation(state, body), bool(body.add_special_tokens))
        else:
            ids = encode(tokenizer, body.prompt or "", body.add_special_tokens is not False)
        strings = [tokenizer.backend.id_to_token(i) for i in ids] if body.return_token_strs else None
        return {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": state.engine.settings.max_model_len,
            "token_strs": strings,
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of token ids."""
        state.check_model(body.model)
        ids = check_token_ids(token_id_array(body.tokens, "tokens"), state.engine.model.config)
        return {"prompt": state.text_tokenizer().decode(ids.tolist(), skip_special_tokens=False)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What a client needs that makes prompts of conversations itself."""
        tokenizer = state.text_tokenizer()
        source = tokenizer.chat_template if state.template is None else state.template.source
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")),
            **tokenizer.special_tokens,
            "chat_template": source,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": state.engine.settings.max_model_len,
        }


def _add_health(app: FastAPI, state: ServerState) -> None:
    @app.get("/health")
    @app.get("/ping", include_in_schema=False)
    async def health() -> Response:
        """200 while the server takes requests."""
        if state.is_draining:
            raise ApiError(503, "the server is shutting down")
        if not state.engine.is_healthy:
            raise ApiError(503, "a role has no instance that works")
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of cmjax."""
        return {"version": cmjax.__version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus."""
        return Response(state.metrics.render(), media_type=state.metrics.content_type)


def _tenant(request: Request) -> str:
    return str(request.scope.get("cmjax.tenant", ""))


# -- answers ----------------------------------------------------------------------------------------------------------


async def _respond(request: Request, answer: Answer) -> Response:
    if answer.body.stream:
        return EventStream(answer)
    work = asyncio.ensure_future(answer.whole())
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(work.result())
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        answer.run.close()


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_event(error: ApiError) -> bytes:
    return b"data: " + bytes(error.response().body) + b"\n\n"


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
                yield answer.event(piece)
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
