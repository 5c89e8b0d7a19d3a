"""Sending a trace to an engine or to a server, and timing what comes back."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from cmjax.bench.trace import TraceRequest
from cmjax.errors import UserError
from cmjax.options import check_bounds, option
from cmjax.serve import Engine
from cmjax.text import JsonObject

if TYPE_CHECKING:
    import aiohttp

# Of an answer, as it comes: a chunk's token ids; None, a chunk whose ids are not told; the number of all its tokens.
Part = list[int] | int | None


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
    idle_s: float = option(
        5.0, "Seconds that the server's event loop is watched before the load.", flag="--idle-s", minimum=0
    )
    large_bodies: int = option(
        0,
        "Bodies sent beside the load, one after another: in turn a text, token ids, a chat of one message and one of "
        "many.",
        flag="--large-bodies",
        minimum=0,
    )
    large_body_bytes: int = option(
        15_000_000, "Size of each; the option is in MB.", flag="--large-body-mb", minimum=1000, scale=1e6
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.url and self.compare:
            raise UserError("--compare brings up a server of its own: leave out --url")
        if self.large_bodies and not self.url:
            raise UserError("--large-bodies are for a server: give --url")


@dataclasses.dataclass
class Record:
    """What became of one request; times in seconds from the start of the load, by a monotonic clock.

    Attributes:
        sent: when it was sent.
        chunks: when each chunk of tokens came.
        counts: tokens of each chunk.
        token_ids: themselves, where the server says them.
        error: why it failed; None where it was complete.
    """

    num_input: int
    sent: float = 0.0
    chunks: list[float] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def num_output(self) -> int:
        """Tokens that came."""
        return sum(self.counts)

    @property
    def is_complete(self) -> bool:
        """Whether all of it came."""
        return self.error is None

    async def fill(self, answer: AsyncIterator[Part], clock: Callable[[], float]) -> None:
        """Take note of an answer while it comes; raises what it raises."""
        total = 0
        async for part in answer:
            if isinstance(part, int):
                total = part
            elif part is None or part:
                self.chunks.append(clock())
                self.counts.append(len(part or ()))
                self.token_ids += part or ()
        if not self.chunks:
            raise RuntimeError("no tokens came")
        # Tokens that no chunk has named are in those that name none, in equal parts, or else in the last one.
        nameless = [place for place, count in enumerate(self.counts) if not count] or [len(self.counts) - 1]
        rest, shares = max(total - self.num_output, 0), len(nameless)
        for index, place in enumerate(nameless):
            self.counts[place] += rest * (index + 1) // shares - rest * index // shares
        if not self.num_output:
            raise RuntimeError("the server says neither the ids nor the number of the tokens that it sent")


class Target(Protocol):
    """Whatever answers requests."""

    def send(self, request: TraceRequest) -> AsyncIterator[Part]:
        """The parts of an answer; raises where it fails."""
        ...


class EngineTarget:
    """An engine in this process, which has been started."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def send(self, request: TraceRequest) -> AsyncIterator[Part]:
        """See `Target`."""
        handle = self._engine.submit(
            request.prompt_ids, request.params, priority=request.priority, tenant=request.tenant
        )
        async for update in handle:
            if update.finish_reason in ("error", "abort"):
                raise RuntimeError(update.error or "the request was cancelled")
            yield update.token_ids


class UrlTarget:
    """A server with OpenAI's API: this project's, vLLM's or another. Enter it in the event loop that will use it.

    Args:
        url: such as http://127.0.0.1:8000.
        model: its name there; None: the first that the server names.
        api_key: sent as a bearer token.
        streams: ask for events, or for the whole answer at once.

    Raises:
        UserError: on entering, where the server does not name a model.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None, streams: bool = True) -> None:
        self.url, self._streams, self.model = url.rstrip("/"), streams, model
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def of(cls, client: ClientSettings) -> "UrlTarget":
        """The server of these settings, which name one."""
        assert client.url is not None
        return cls(client.url, model=client.model, api_key=client.api_key, streams=not client.whole)

    async def __aenter__(self) -> "UrlTarget":
        try:
            import aiohttp
        except ImportError as error:
            raise UserError(f"--url needs pip install 'cmjax[serve]' ({error})") from error

        # As many connections as requests, and no limit to how long an answer may take.
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None, sock_connect=None)
        self._session = aiohttp.ClientSession(headers=self.headers, connector=connector, timeout=timeout)
        if self.model is None:
            try:
                async with self._session.get(f"{self.url}/v1/models") as answer:
                    answer.raise_for_status()
                    self.model = (await answer.json())["data"][0]["id"]
            except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
                await self._session.close()
                what = f"{type(error).__name__}: {error}"
                raise UserError(f"{self.url} does not answer as a server should: {what}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    @property
    def session(self) -> "aiohttp.ClientSession":
        """Of the connections, while it is entered."""
        assert self._session is not None
        return self._session

    async def get_text(self, path: str) -> str | None:
        """A page of the server; None where it cannot be had."""
        import aiohttp

        try:
            async with self.session.get(self.url + path) as answer:
                return await answer.text(errors="replace") if answer.status == 200 else None
        except aiohttp.ClientError:
            return None

    def body(self, request: TraceRequest) -> JsonObject:
        """What is sent: of the sampling only what the request says, so that the server's own defaults hold."""
        body = {
            "model": self.model,
            "prompt": request.prompt_ids,
            "max_tokens": request.max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            **request.sampling,
        }
        if request.priority:
            body["priority"] = request.priority
        if self._streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    async def send(self, request: TraceRequest) -> AsyncIterator[Part]:
        """See `Target`."""
        async with self.session.post(f"{self.url}/v1/completions", json=self.body(request)) as answer:
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {(await answer.text(errors='replace'))[:200]}")
            if not self._streams:
                found = await answer.json()
                yield found["choices"][0].get("token_ids")
                yield int(found["usage"]["completion_tokens"])
                return
            is_done = False
            async for event in _events(answer.content.iter_any()):
                if event == b"[DONE]":
                    is_done = True
                    continue  # to the end of the stream, so that the connection can be used again
                chunk = json.loads(event)
                if "error" in chunk:
                    raise RuntimeError(str(chunk["error"].get("message", chunk["error"])))
                if chunk.get("usage"):
                    yield int(chunk["usage"]["completion_tokens"])
                for choice in chunk["choices"]:
                    ids = choice.get("token_ids")
                    if ids or (ids is None and choice.get("text")):
                        yield ids
            if not is_done:
                raise RuntimeError("the stream ended before it was complete")


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
    on_progress: Callable[[], None] | None = None,
) -> tuple[list[Record], float]:
    """Send each request when it arrives, at most `max_concurrency` at a time; `(records, seconds in all)`."""
    gate = asyncio.Semaphore(max_concurrency or max(len(trace), 1))
    begin = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - begin

    async def one(request: TraceRequest) -> Record:
        await asyncio.sleep(max(request.arrival_s - clock(), 0))
        record = Record(len(request.prompt_ids))
        async with gate:
            record.sent = clock()
            try:
                await record.fill(target.send(request), clock)
            except Exception as error:
                record.error = f"{type(error).__name__}: {error}"
        if on_progress is not None:
            on_progress()
        return record

    records = list(await asyncio.gather(*map(one, trace)))
    return records, clock()
