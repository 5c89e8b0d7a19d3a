"""The requests of one HTTP call in the engine: submitted together, their tokens turned into text as they come."""

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator, Sequence

from cmjax.checkpoint import Detokenizer
from cmjax.errors import UserError
from cmjax.serve import RequestHandle, RequestUpdate, SamplingParams, TokenLogprobs
from cmjax.serve.http.errors import ApiError
from cmjax.serve.http.prompts import bad_words
from cmjax.serve.http.protocol import CompletionRequest, Sampled
from cmjax.serve.http.state import ServerState, choice_seed
from cmjax.serve.http.stops import StopStrings


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
        self.is_done = False

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
        self.is_done = finish_reason is not None
        self.num_tokens += used
        logprobs = None if update.logprobs is None else update.logprobs[:used]
        return Piece(index, text, tokens[:used], starts, logprobs, update.prompt_logprobs, finish_reason, stop_reason)


def _of_client(message: str) -> str:
    """An engine's message without the name that the engine has for a request."""
    return re.sub(r"^request \d+(:?) ", lambda found: "" if found[1] else "the prompt ", message)


class Run:
    """All choices of one call; `close` it in any case.

    Attributes:
        prompts: token ids.
        num_choices: for each prompt; choice i belongs to prompt i // num_choices.
    """

    def __init__(self, state: ServerState, body: Sampled, prompts: Sequence[list[int]], tenant: str) -> None:
        """Submit the requests.

        Raises:
            ApiError: what they ask for cannot be had; nothing is under way then.
        """
        self.state, self.body, self.prompts, self.num_choices = state, body, prompts, body.n
        self._keeps_tokens = not (isinstance(body, CompletionRequest) and body.max_tokens == 0)
        self._updates: asyncio.Queue[tuple[int, RequestUpdate]] = asyncio.Queue()
        self._choices: list[_Choice] = []
        self._is_closed = False
        self._bad_words = bad_words(state, body)
        self._stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
        if self._stops:
            state.text_tokenizer()
        state.check_priority(body.priority)
        state.admit(len(prompts) * body.n)
        try:
            # All that can be said against any of them is said before the first is under way.
            samplings = [state.sampling(body, len(prompt), self._bad_words) for prompt in prompts]
            for prompt, sampling in zip(prompts, samplings, strict=True):
                for choice in range(body.n):
                    seed = sampling.seed if choice == 0 else choice_seed(body.seed, choice)
                    self._submit(prompt, dataclasses.replace(sampling, seed=seed), tenant)
        except BaseException:
            self.close()
            raise

    def _submit(self, prompt: list[int], sampling: SamplingParams, tenant: str) -> None:
        loop, index, tokenizer = asyncio.get_running_loop(), len(self._choices), self.state.tokenizer
        try:
            handle = self.state.engine.submit(prompt, sampling, priority=self.body.priority, tenant=tenant)
        except UserError as error:
            raise ApiError(400, _of_client(str(error))) from error
        detokenizer = None if tokenizer is None else Detokenizer(tokenizer, self.body.skip_special_tokens, prompt)
        shows_stops = self.body.include_stop_str_in_output
        stops = StopStrings(self._stops, is_shown=shows_stops)
        self._choices.append(_Choice(handle, sampling, detokenizer, stops, shows_stops))

        def forward(update: RequestUpdate) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        handle.listen(forward)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def num_completion_tokens(self) -> int:
        """Of all choices so far."""
        return sum(choice.num_tokens for choice in self._choices)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What comes, in the order it comes, until all choices are done.

        Raises:
            ApiError: 500, a request ended with an error; 503, the server ended it.
        """
        num_open, own_stops = len(self._choices), self.body.stop_token_ids or ()
        while num_open:
            index, update = await self._updates.get()
            choice = self._choices[index]
            if choice.is_done:
                continue
            if update.finish_reason == "error":
                raise ApiError(500, _of_client(update.error or "the request failed"))
            if update.finish_reason == "abort":
                raise ApiError(503, "the request was cancelled: the server is shutting down")
            piece = choice.take(index, update, own_stops, self._keeps_tokens)
            num_open -= choice.is_done
            if piece.text or piece.token_ids or piece.finish_reason or piece.prompt_logprobs:
                yield piece

    def close(self) -> None:
        """Cancel what is still under way, and count it as over."""
        if self._is_closed:
            return
        self._is_closed = True
        self.state.leave(len(self.prompts) * self.num_choices)
        for choice in self._choices:
            reason = choice.handle.finish_reason
            if not choice.is_done:
                choice.handle.cancel()
                reason = reason or "abort"
            self.state.history.note_request(choice.handle)
            self.state.metrics.observe(
                choice.handle,
                max_tokens=choice.sampling.max_tokens,
                n=self.num_choices,
                success_reason="stop" if choice.is_done and reason in (None, "abort") else reason or "abort",
            )
