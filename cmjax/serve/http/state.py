"""What the handlers of a server share: the engine, the intake of bodies, what is open, and what is counted."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterator, Mapping
from typing import Any, Protocol

from cmjax.api import ApiError, ChatTemplate, Intake, Served
from cmjax.checkpoint import GenerationConfig, Tokenizer
from cmjax.errors import UserError
from cmjax.serve import SamplingParams
from cmjax.serve.http.backend import Backend
from cmjax.serve.http.history import History
from cmjax.serve.http.keys import namespace_of
from cmjax.serve.http.lag import LoopLag
from cmjax.serve.http.metrics import Metrics
from cmjax.serve.settings import API_DEFAULTS, ServerSettings


class Cuttable(Protocol):
    """What can be ended before its time."""

    def cut(self) -> None:
        """End it; its client is told."""
        ...


class ServerState:
    """An engine behind HTTP.

    Attributes:
        engine: started.
        served: what requests are checked against.
        intake: takes bodies.
        metrics, history, lag: what is counted for Prometheus and for the status page, and the event loop's lag.
        namespaces: of the prefix cache, by the key of a client; who is in none of them is in "".
        is_draining: nothing new is taken any more.
        num_active: requests of the engine that are under way.
    """

    def __init__(
        self,
        engine: Backend,
        settings: ServerSettings,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        generation: GenerationConfig | None = None,
    ) -> None:
        """Raises `UserError` where `generation`, what holds for fields that requests leave out, cannot be had."""
        self.engine, self.settings = engine, settings
        defaults, eos_ids = _generation(engine, generation or GenerationConfig())
        self.served = Served(
            model_name=settings.model_name,
            vocab_size=engine.model.config.vocab_size,
            max_model_len=engine.settings.max_model_len,
            max_requests=settings.max_concurrent_requests,
            min_priority=settings.min_priority,
            default_max_tokens=settings.default_max_tokens,
            defaults=defaults,
            eos_ids=eos_ids,
            tokenizer=tokenizer,
            template=template,
        )
        if tokenizer is not None:
            tokenizer.least_tokens("")  # looks at the whole vocabulary, once: not when the first request comes
        self.intake = Intake(self.served)
        self.created = int(time.time())
        self.metrics = Metrics(engine, settings.model_name, settings.metrics_prefix)
        self.lag = LoopLag(self.metrics.observe_lag)
        self.history = History(engine)
        shared = settings.share_prefix_cache
        self.namespaces = {} if shared else {key: namespace_of(key) for key in settings.api_keys}
        self.is_draining = False
        self.num_active = 0
        self._open: dict[asyncio.Task[object], Cuttable | None] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._token_texts: dict[int, str] = {}

    # -- what is open -------------------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Calls that have not been answered to their end."""
        return len(self._open)

    @contextlib.contextmanager
    def open_call(self) -> Iterator[None]:
        """The task that is running answers a call."""
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = None
        try:
            yield
        finally:
            del self._open[task]

    def can_cut(self, answer: Cuttable) -> None:
        """The call that is being answered ends by `answer.cut()`; before, by cancelling its task."""
        task = asyncio.current_task()
        if task in self._open:
            self._open[task] = answer

    def cut(self) -> int:
        """End all that is open, and return how many calls that is."""
        for task, answer in list(self._open.items()):
            if answer is None:
                task.cancel()
            else:
                answer.cut()
        return len(self._open)

    def in_background(self, work: Awaitable[None]) -> None:
        """Have something done that no answer waits for."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Finish what is done in the background, and end the intake."""
        await asyncio.gather(*self._background)
        self.intake.close()

    def admit(self, num_requests: int) -> None:
        """Count requests as under way, until `leave`; 429 beyond the limit."""
        limit = self.settings.max_concurrent_requests
        if self.num_active + num_requests > limit:
            raise ApiError(429, f"{self.num_active} requests are under way, at most {limit} may be: try again later")
        self.num_active += num_requests

    def leave(self, num_requests: int) -> None:
        """So many requests are over."""
        self.num_active -= num_requests

    # -- text ---------------------------------------------------------------------------------------------------------

    def token_text(self, token_id: int) -> str:
        """The text of one token; its entry in the vocabulary, where it is part of a character."""
        text = self._token_texts.get(token_id)
        if text is None:
            tokenizer = self.served.text_tokenizer()
            try:
                text = tokenizer.token_bytes(token_id).decode()
            except UnicodeDecodeError:
                text = ""
            text = text or tokenizer.backend.id_to_token(token_id) or f"token_id:{token_id}"
            self._token_texts[token_id] = text
        return text


SHUTTING_DOWN = "the server is shutting down"


def _generation(engine: Backend, generation: GenerationConfig) -> tuple[Mapping[str, float], tuple[int, ...]]:
    """Sampling for what requests leave out, and the tokens that end a text."""
    generation.check(engine.model.config.vocab_size)
    defaults: dict[str, Any] = {**API_DEFAULTS, **generation.defaults}
    try:
        SamplingParams(**defaults)
    except UserError as error:
        raise UserError(f"{generation.where}: {error}") from error
    if generation.eos_token_ids is not None:
        return defaults, generation.eos_token_ids
    eos = engine.model.config.eos_token_id
    return defaults, (eos,) if isinstance(eos, int) else tuple(eos or ())
