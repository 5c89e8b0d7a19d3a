"""Sending a trace to an engine or to a server, and timing what comes back."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from cmjax.bench.trace import TraceRequest
from cmjax.errors import UserError
from cmjax.options import check_bounds, option
from cmjax.serve import Engine, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """Where requests are sent, and how."""

    url: str | None = option(None, "A server.", flag="--url", unset="an engine in this process, with the options below")
    api_key: str | None = option(None, "For the server.", flag="--api-key")
    model: str | None = option(None, "The model's name there.", flag="--served-model-name", unset="the first it names")
    whole: bool = option(False, "Ask the server for whole answers in place of streams.", flag="--whole")
    compare: bool = option(False, "The same load on the engine, and over HTTP, whole and streamed.", flag="--compare")
    max_concurrency: int | None = option(
        None, "Requests under way, at most.", flag="--max-concurrency", minimum=1, unset="all"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.url and self.compare:
            raise UserError("--compare brings up a server of its own: leave out --url")


@dataclasses.dataclass
class Record:
    """What became of one request; times in seconds from the start of the load, by a monotonic clock.

    Attributes:
        sent: when it was sent.
        chunks: when each chunk of tokens came; a chunk may hold several tokens.
        num_output: tokens that came.
        token_ids: themselves, where the server says them.
        error: why it failed; None where it was complete.
    """

    num_input: int
    sent: float = 0.0
    chunks: list[float] = dataclasses.field(default_factory=list)
    num_output: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all of it came."""
        return self.error is None


class Target(Protocol):
    """Whatever answers requests."""

    def send(self, request: TraceRequest) -> AsyncIterator[list[int] | int]:
        """The chunks of an answer: token ids, or how many there are; raises where it fails."""
        ...


class EngineTarget:
    """An engine in this process, which has been started."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def send(self, request: TraceRequest) -> AsyncIterator[list[int] | int]:
        """See `Target`."""
        handle = self._engine.submit(
            request.prompt_ids,
            SamplingParams(max_tokens=request.max_tokens),
            priority=request.priority,
            tenant=request.tenant,
        )
        async for update in handle:
            if update.finish_reason in ("error", "abort"):
                raise RuntimeError(update.error or "the request was cancelled")
            yield update.token_ids


class UrlTarget:
    """A server with OpenAI's API: this project's, vLLM's or another.

    Args:
        url: such as http://127.0.0.1:8000.
        model: its name there; None: the first that the server names.
        api_key: sent as a bearer token.
        streams: ask for events, or for the whole answer at once.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None, streams: bool = True) -> None:
        self._url, self._streams, self.model = url.rstrip("/"), streams, model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def open(self) -> "UrlTarget":
        """Open a session, in the event loop that will use it, and ask the server for its model's name."""
        import aiohttp

        # As many connections as requests, and no limit to how long an answer may take.
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None, sock_connect=None)
        self._session = aiohttp.ClientSession(headers=self._headers, connector=connector, timeout=timeout)
        if self.model is None:
            async with self._session.get(f"{self._url}/v1/models") as answer:
                answer.raise_for_status()
                self.model = (await answer.json())["data"][0]["id"]
        return self

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def send(self, request: TraceRequest) -> AsyncIterator[list[int] | int]:
        """See `Target`."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": request.prompt_ids,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "priority": request.priority,
            "return_token_ids": True,
        }
        if self._streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._session.post(f"{self._url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {(await answer.text(errors='replace'))[:200]}")
            if not self._streams:
                found = await answer.json()
                yield found["choices"][0].get("token_ids") or int(found["usage"]["completion_tokens"])
                return
            total, told, is_done = 0, 0, False
            async for event in _events(answer.content.iter_any()):
                if event == b"[DONE]":
                    is_done = True
                    break
                chunk = json.loads(event)
                if "error" in chunk:
                    raise RuntimeError(str(chunk["error"].get("message", chunk["error"])))
                if chunk.get("usage"):
                    total = int(chunk["usage"]["completion_tokens"])
                for choice in chunk["choices"]:
                    ids = choice.get("token_ids")
                    if ids:
                        told += len(ids)
                        yield ids
                    elif ids is None and choice.get("text"):
                        yield 0  # a server that does not say how many: its usage does, at the end
            if not is_done:
                raise RuntimeError("the stream ended before it was complete")
            if total > told:
                yield total - told


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The `data:` of server-sent events."""
    held = b""
    async for part in parts:
        *lines, held = (held + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def run_load(
    trace: Sequence[TraceRequest],
    target: Target,
    *,
    max_concurrency: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[Record], float]:
    """Send each request when it arrives, at most `max_concurrency` at a time; `(records, seconds in all)`."""
    gate = asyncio.Semaphore(max_concurrency or max(len(trace), 1))
    begin = time.perf_counter()

    async def one(request: TraceRequest) -> Record:
        await asyncio.sleep(max(request.arrival_s - (time.perf_counter() - begin), 0))
        record = Record(len(request.prompt_ids))
        async with gate:
            record.sent = time.perf_counter() - begin
            try:
                async for chunk in target.send(request):
                    count = chunk if isinstance(chunk, int) else len(chunk)
                    if count or isinstance(chunk, int):
                        record.chunks.append(time.perf_counter() - begin)
                        record.num_output += count
                        record.token_ids += [] if isinstance(chunk, int) else chunk
                if not record.num_output:
                    record.error = "no tokens came"
            except Exception as error:
                record.error = f"{type(error).__name__}: {error}"
        if on_progress is not None:
            on_progress(record.num_output)
        return record

    records = list(await asyncio.gather(*map(one, trace)))
    return records, time.perf_counter() - begin
