"""Requests: what a client asks for, what becomes of it, and each attempt at it."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Literal

from cmjax.schedule.blocks import Lease
from cmjax.schedule.prefix import BlockChain
from cmjax.schedule.sampling import SamplingParams, SamplingRows, TokenLogprobs

# "abort": the client cancelled it; "error": it ended without a result.
FinishReason = Literal["length", "stop", "abort", "error"]
Stage = Literal["prefill", "handoff", "decode"]


@dataclasses.dataclass
class RequestTimes:
    """When what happened to a request, in seconds of the engine's clock; None for what has not happened.

    Attributes:
        arrival: it was submitted.
        scheduled: its first prefill step began.
        prefilled: its first token was there.
        first_token, last_token: the client got its first, and its newest, tokens.
        finished: it ended.
    """

    arrival: float
    scheduled: float | None = None
    prefilled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A finished request: `token_ids` continue `prompt_ids`.

    Attributes:
        logprobs: of each of `token_ids`, where asked for.
        prompt_logprobs: of each of `prompt_ids`, where asked for; None for the first, which nothing predicts.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclasses.dataclass(slots=True)
class RequestUpdate:
    """What is new of a request.

    Attributes:
        token_ids: since the last update; several where a call has several steps or keeps drafts, perhaps none.
        logprobs: of each of them, where asked for.
        prompt_logprobs: of each prompt token (None for the first), with the first update only, where asked for.
        finish_reason: None while it goes on.
        error: what went wrong, where `finish_reason` is "error".
        num_preemptions: how often it has had to give its blocks back so far.
        num_cached_tokens: of its prompt, those that its first prefill did not have to compute.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0


@dataclasses.dataclass(eq=False)
class Request:
    """A request on its way through the engine.

    Attributes:
        request_id: what messages call it, such as "prompt 3".
        prompt_ids: at least one token.
        sampling: how to continue it.
        model: the name of the model that is asked.
        priority, tenant: by which waiting requests are put in order; lower priorities go first.
        times: see `RequestTimes`.
        token_ids: generated so far.
        seed: of its noise.
        attempt: the one under way; None while it waits for a place, and at its end.
        num_preemptions: how often it had to give its blocks back and start over from its tokens.
        num_cached_tokens: of its prompt, those that the prefill that made its first token did not have to compute.
        num_failures: how many of its attempts a failing instance or hand-off ended.
        finish_reason, error: why it ended, and what went wrong where that is why.
        num_told: how many of its tokens the client has been told.
        failed_at: the instance whose failure ended its last failed attempt.
        chain: names of what the prefix cache may have of it; None: nothing, and it leaves nothing there.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    model: str = ""
    priority: int = 0
    tenant: str = ""
    times: RequestTimes = dataclasses.field(default_factory=lambda: RequestTimes(0.0))
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = dataclasses.field(default_factory=lambda: [None])
    seed: int = 0
    attempt: "Attempt | None" = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_failures: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_told: int = 0
    failed_at: str = ""
    chain: BlockChain | None = None
    _stop_ids: frozenset[int] = dataclasses.field(init=False, default=frozenset())

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(64) if self.sampling.seed is None else self.sampling.seed
        self._stop_ids = frozenset(self.sampling.stop_token_ids)

    @property
    def num_tokens(self) -> int:
        """The most tokens its cache will hold: the last generated one is never put in."""
        return len(self.prompt_ids) + self.sampling.max_tokens - 1

    @property
    def num_cached(self) -> int:
        """Tokens that its cache must hold for the next step: all but the newest generated one."""
        return len(self.prompt_ids) + max(len(self.token_ids) - 1, 0)

    @property
    def is_resumed(self) -> bool:
        """Whether it goes on from tokens that it has; the token that prefill makes is none of its own then."""
        return bool(self.token_ids)

    @property
    def will_decode(self) -> bool:
        """Whether it needs more than the token that prefill makes."""
        return self.sampling.max_tokens > 1

    @property
    def urgency(self) -> tuple[int, float, str]:
        """Smaller goes first."""
        return self.priority, self.times.arrival, self.request_id

    def prefill_slice(self, start: int, stop: int) -> list[int]:
        """Tokens `[start, stop)` of what a prefill computes: the prompt, and after a preemption also the generated
        tokens but the newest. Where `stop` is past them, what follows is the newest."""
        num_prompt = len(self.prompt_ids)
        return self.prompt_ids[start:stop] + self.token_ids[max(start - num_prompt, 0) : max(stop - num_prompt, 0)]

    def append(self, token_ids: Sequence[int]) -> int:
        """Take generated tokens until the request ends; return how many were taken."""
        if self.finish_reason is not None:
            return 0
        room = self.sampling.max_tokens - len(self.token_ids)
        taken = token_ids[:room] if len(token_ids) > room else token_ids
        if self._stop_ids and not self._stop_ids.isdisjoint(taken):
            first = self.sampling.min_tokens - len(self.token_ids)  # those before end nothing
            ends = (index for index, token in enumerate(taken) if token in self._stop_ids and index >= first)
            end = next(ends, None)
            if end is not None:
                taken, self.finish_reason = taken[: end + 1], "stop"
        self.token_ids += taken
        if self.finish_reason is None and len(self.token_ids) == self.sampling.max_tokens:
            self.finish_reason = "length"
        return len(taken)

    def output(self) -> RequestOutput:
        """The finished request."""
        if self.finish_reason is None:
            raise ValueError(f"{self.request_id} has not finished")
        return RequestOutput(
            self.prompt_ids,
            self.token_ids,
            self.finish_reason,
            None if self.sampling.logprobs is None else self.logprobs[: len(self.token_ids)],
            None if self.sampling.prompt_logprobs is None else self.prompt_logprobs,
        )

    def take_update(self) -> RequestUpdate:
        """What the client has not been told yet."""
        known, total = self.num_told, len(self.token_ids)
        self.num_told = total
        update = RequestUpdate(
            self.token_ids[known:], num_preemptions=self.num_preemptions, num_cached_tokens=self.num_cached_tokens
        )
        if self.sampling.logprobs is not None:
            update.logprobs = self.logprobs[known:total]
        if self.sampling.prompt_logprobs is not None and known == 0 and total:
            update.prompt_logprobs = self.prompt_logprobs
        update.finish_reason, update.error = self.finish_reason, self.error
        return update


def sampling_rows(requests: Sequence[Request]) -> SamplingRows:
    """How requests are sampled, a row each."""
    return SamplingRows.of(
        [one.sampling for one in requests], [one.seed for one in requests], [one.prompt_ids for one in requests]
    )


@dataclasses.dataclass(eq=False, slots=True)
class PrefillHold:
    """What an attempt has of a prefill instance, from its first chunk until its latents have been read.

    Attributes:
        place: of the instance's table of blocks.
        blocks: for all its tokens, those that were computed before included.
        has_joined: whether the executor has been told of them.
    """

    place: Lease
    blocks: Lease
    has_joined: bool = False


@dataclasses.dataclass(eq=False, slots=True)
class DecodeHold:
    """What an attempt has of a decode instance, reserved before its prefill.

    Attributes:
        rank: whose place and blocks they are.
        place: one of the rank's.
        blocks: of the rank's cache.
    """

    rank: int
    place: Lease
    blocks: Lease


@dataclasses.dataclass(eq=False, slots=True)
class Attempt:
    """One try at a request, from its admission to its end, a failure or a preemption.

    It owns what it holds. Plans and results name attempts by `id`, never requests: what belongs to one that is over
    has no effect.

    Attributes:
        id: unique in an engine, never used again.
        stage: "prefill", "handoff" (its latents travel) or "decode".
        num_prefill: tokens that its prefill computes: those of `Request.prefill_slice`.
        num_computed: of them so far, those of the chunk under way not counted.
        source, target: names of its prefill and its decode instance; no target where prefill's token is all.
        prefill, decode: what it holds there; None before and after.
        is_over: nothing is held any more.
    """

    id: int
    request: Request
    source: str
    target: str | None
    num_prefill: int
    num_computed: int = 0
    stage: Stage = "prefill"
    prefill: PrefillHold | None = None
    decode: DecodeHold | None = None
    is_over: bool = False

    def leases(self) -> list[Lease]:
        """All that it holds."""
        return [lease for hold in (self.prefill, self.decode) if hold for lease in (hold.place, hold.blocks)]

    def leave_source(self) -> None:
        """Its prefill instance needs it no longer."""
        if self.prefill is not None:
            self.prefill.place.give_back()
            self.prefill.blocks.give_back()
            self.prefill = None

    def end(self) -> None:
        """Give back all that it holds."""
        for lease in self.leases():
            lease.give_back()
        self.prefill = self.decode = None
        self.is_over = True
