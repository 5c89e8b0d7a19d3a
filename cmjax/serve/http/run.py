"""The requests of one HTTP call in the engine: submitted together, their tokens turned into text as they come."""

import asyncio
import dataclasses
import re
import time
from collections.abc import AsyncIterator, Sequence

from cmjax.api import ApiError, Asked, CompletionRequest, Prompt, choice_seed
from cmjax.checkpoint import Detokenizer
from cmjax.errors import UserError
from cmjax.serve import RequestHandle, RequestUpdate, SamplingParams, TokenLogprobs
from cmjax.serve.http.state import SHUTTING_DOWN, ServerState
from cmjax.serve.http.stops import StopStrings

_TURN_S = 0.002  # for so long requests are submitted, or ended, at a stretch; other calls have their turn then


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one update adds to a choice.

    Attributes:
        index: of the choice.
        text: what may be shown.
        token_ids, logprobs: that the update brought, up to where a stop string ends it.
        starts: where each token begins in the choice's text, in characters.
        prompt_logprobs: with a choice's first piece, where asked for.
        finish_reason: "stop" or "length" with the last.
        stop_reason: the stop string or token that ended it; None for the model's own end.
    """

    index: int
    text: str
    token_ids: list[int]
    starts: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class _Choice:
    """One continuation: its request, and its text so far."""

    def __init__(
        self,
        handle: RequestHandle,
        sampling: SamplingParams,
        detokenizer: Detokenizer | None,
        stops: StopStrings,
        shows_stops: bool,
    ) -> None:
        self.handle, self.sampling, self.detokenizer, self.stops = handle, sampling, detokenizer, stops
        self.shows_stops = shows_stops
        self.num_tokens = 0
        self.finish_reason: str | None = None  # what the client is told
        self.has_left = False
        self.first_at: float | None = None
        self.last_at = 0.0

    def gap(self, at: float) -> float | None:
        """Seconds since the chunk before one that came at `at`; None for the first."""
        gap = None if self.first_at is None else at - self.last_at
        self.first_at, self.last_at = self.first_at or at, at
        return gap

    @property
    def is_done(self) -> bool:
        """Whether it has come to its end."""
        return self.finish_reason is not None

    @property
    def decode_s(self) -> float:
        """Seconds from the first chunk to the last."""
        return 0.0 if self.first_at is None else self.last_at - self.first_at

    def take(self, index: int, update: RequestUpdate, own_stops: Sequence[int], keeps_tokens: bool) -> Piece:
        """The piece that an update is; the choice may be done with it."""
        text, used, found, starts = "", 0, None, []
        ends_by_token = update.finish_reason == "stop"
        tokens = update.token_ids if keeps_tokens else []
        for place, token in enumerate(tokens):
            used = place + 1
            starts.append(0 if self.detokenizer is None else self.detokenizer.num_characters)
            if ends_by_token and used == len(tokens) and not self.shows_stops:
                break  # the token that ends a request is not part of its text
            if self.detokenizer is not None:
                may_end = self.num_tokens + used > self.sampling.min_tokens
                shown, found = self.stops.feed(self.detokenizer.feed(token), may_end)
                text += shown
                if found is not None:
                    break
        finish_reason: str | None = update.finish_reason
        stop_reason: str | int | None = found
        if found is not None:
            finish_reason = "stop"
            if update.finish_reason is None:
                self.handle.cancel()
        elif finish_reason is not None:
            if self.detokenizer is not None:
                may_end = self.num_tokens + used > self.sampling.min_tokens
                shown, found = self.stops.feed(self.detokenizer.flush(), may_end)
                text += shown + self.stops.flush()
                stop_reason = found
                finish_reason = "stop" if found is not None else finish_reason
            if ends_by_token and tokens and tokens[-1] in own_stops:
                stop_reason = tokens[-1]
        self.finish_reason = finish_reason
        self.num_tokens += used
        logprobs = None if update.logprobs is None else update.logprobs[:used]
        return Piece(index, text, tokens[:used], starts, logprobs, update.prompt_logprobs, finish_reason, stop_reason)


def _of_client(message: str) -> str:
    """An engine's message without the name that the engine has for a request."""
    return re.sub(r"^request \d+(:?) ", lambda found: "" if found[1] else "the prompt ", message)


class Run:
    """All choices of one call: `start` it, and `close` it in any case.

    Attributes:
        prompts: with their token ids.
        num_choices: for each prompt; choice i belongs to prompt i // num_choices.
        num_prompt_tokens: of all prompts, each counted once.
        num_cached_tokens: of all prompts so far, what the first choice of each found in the prefix cache.
        num_completion_tokens: of all choices so far.
    """

    def __init__(self, state: ServerState, asked: Asked, tenant: str) -> None:
        body = self.body = asked.body
        self.state, self.prompts, self.num_choices = state, asked.prompts, body.n
        self.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        self.num_cached_tokens = self.num_completion_tokens = 0
        self._samplings, self._tenant = asked.samplings, tenant
        self._namespace, self._salt = state.namespaces.get(tenant, ""), body.cache_salt or ""
        self._keeps_tokens = not (isinstance(body, CompletionRequest) and body.max_tokens == 0)
        self._updates: asyncio.Queue[tuple[int, RequestUpdate, float]] = asyncio.Queue()
        self._choices: list[_Choice] = []
        self._counted: set[int] = set()  # prompts
        self._num_admitted = 0
        self._is_closed = False
        self._stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])

    async def start(self) -> None:
        """Submit the requests; where that takes a while, others have their turn meanwhile.

        Raises:
            ApiError: what they ask for cannot be had; nothing is under way then.
        """
        self.state.admit(len(self.prompts) * self.num_choices)
        self._num_admitted = len(self.prompts) * self.num_choices
        try:
            self.state.can_cut(self)
            turn = _Turn()
            for prompt, sampling in zip(self.prompts, self._samplings, strict=True):
                for choice in range(self.num_choices):
                    # Without a seed of the client's, every choice of every prompt has one of its own.
                    seed = choice_seed(self.body.seed, choice)
                    self._submit(prompt, dataclasses.replace(sampling, seed=seed))
                    await turn.over()
        except BaseException:
            self.close()
            raise

    def _submit(self, prompt: Prompt, sampling: SamplingParams) -> None:
        loop, index, tokenizer = asyncio.get_running_loop(), len(self._choices), self.state.served.tokenizer
        ids, body = prompt.token_ids, self.body
        try:
            handle = self.state.engine.submit(
                ids,
                sampling,
                priority=body.priority,
                tenant=self._tenant,
                namespace=self._namespace,
                cache_salt=self._salt,
            )
        except UserError as error:
            raise ApiError(400, _of_client(str(error))) from error
        detokenizer = None if tokenizer is None else Detokenizer(tokenizer, body.skip_special_tokens, ids)
        stops = StopStrings(self._stops, is_shown=body.include_stop_str_in_output)
        self._choices.append(_Choice(handle, sampling, detokenizer, stops, body.include_stop_str_in_output))

        def forward(update: RequestUpdate) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._updates.put_nowait, (index, update, time.monotonic()))

        handle.listen(forward)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What comes, in the order it comes, until all choices are done.

        Raises:
            ApiError: 500, a request ended with an error; 503, the server ended it.
        """
        num_open, own_stops = len(self._choices), self.body.stop_token_ids or ()
        while num_open:
            index, update, at = await self._updates.get()
            choice = self._choices[index]
            if choice.is_done:
                continue
            if update.finish_reason == "error":
                raise ApiError(500, _of_client(update.error or "the request failed"))
            if update.finish_reason == "abort":
                raise ApiError(503, f"the request was cancelled: {SHUTTING_DOWN}")
            num_before = choice.num_tokens
            piece = choice.take(index, update, own_stops, self._keeps_tokens)
            if update.token_ids:
                self._count(index, update, choice.num_tokens - num_before, at)
            if piece.finish_reason is not None:
                num_open -= 1
                self._end(choice)
            if piece.text or piece.token_ids or piece.finish_reason or piece.prompt_logprobs:
                yield piece

    def _count(self, index: int, update: RequestUpdate, num_tokens: int, at: float) -> None:
        self.num_completion_tokens += num_tokens
        prompt, place = divmod(index, self.num_choices)
        if prompt not in self._counted:
            self._counted.add(prompt)
            self.state.metrics.count_prompt(len(self.prompts[prompt].token_ids))
        if place == 0 and self._choices[index].first_at is None:  # the others may find what this one has computed
            self.num_cached_tokens += update.num_cached_tokens
            self.state.metrics.count_cached(update.num_cached_tokens)
        self.state.metrics.count_chunk(num_tokens, self._choices[index].gap(at))

    def cut(self) -> None:
        """End what is under way; who waits for it is told."""
        for choice in self._choices:
            choice.handle.cancel()

    def close(self) -> None:
        """Cancel what is still under way, and count it as over; where that is much, behind the back of the caller."""
        if self._is_closed:
            return
        self._is_closed = True
        self.state.leave(self._num_admitted - len(self._choices))
        left = [choice for choice in self._choices if not choice.has_left]
        if left:
            self.state.in_background(self._end_all(left))

    async def _end_all(self, choices: Sequence[_Choice]) -> None:
        turn = _Turn()
        for choice in choices:
            self._end(choice)
            await turn.over()

    def _end(self, choice: _Choice) -> None:
        """A choice is over, whether it is done or not."""
        reason = choice.finish_reason
        if reason is None:
            choice.handle.cancel()
            reason = choice.handle.finish_reason or "abort"
        choice.has_left = True
        self.state.leave(1)
        self.state.history.note_request(choice.handle)
        self.state.metrics.observe(
            choice.handle.times,
            num_tokens=choice.num_tokens,
            decode_s=choice.decode_s,
            max_tokens=choice.sampling.max_tokens,
            n=self.num_choices,
            success_reason=reason,
        )


class _Turn:
    """A turn in the event loop, which ends before others have to wait."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    async def over(self) -> None:
        """Let others have theirs, if it has been long enough."""
        if time.monotonic() - self._since > _TURN_S:
            await asyncio.sleep(0)
            self._since = time.monotonic()
