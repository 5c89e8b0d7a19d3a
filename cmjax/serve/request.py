"""Requests: what a client asks for, and what becomes of it."""

import dataclasses
import math
import numbers
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from cmjax.errors import UserError

if TYPE_CHECKING:
    from cmjax.serve.handle import RequestHandle

# "abort": the client cancelled it; "error": it ended without a result.
FinishReason = Literal["length", "stop", "abort", "error"]


# Field -> (least, most, whether the least itself is allowed), as OpenAI and vLLM have them.
_RANGES = {
    "temperature": (0.0, float("inf"), True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "presence_penalty": (-2.0, 2.0, True),
    "frequency_penalty": (-2.0, 2.0, True),
}
MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. The defaults take the best token each time.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        stop_token_ids: a generated token among these ends the request, and is its last. The model's own
            `eos_token_id` stops nothing unless it is listed here.
        temperature: what logits are divided by before a token is drawn; 0 takes the best.
        top_k: draw from so many of the best only; 0 or -1 for all.
        top_p: draw from the best whose probabilities together reach it.
        min_p: draw from those at least so probable, as a share of the best one's probability.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens generated before, once and for each
            time.
        logit_bias: token id -> what is added to its logit, -100 to 100.
        seed: equal seeds give equal tokens, whatever else runs; None: another one each time.
        logprobs: None, or how many of the best tokens' log probabilities to return beside the generated one's.
        prompt_logprobs: the same for the prompt's tokens.
    """

    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
                raise UserError(f"{name} {value!r} is no integer")
        for name in _RANGES:
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), numbers.Real):
                raise UserError(f"{name} {getattr(self, name)!r} is no number")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens} is not positive")
        for name, (least, most, is_closed) in _RANGES.items():
            value = getattr(self, name)
            if not (least <= value <= most) or (value == least and not is_closed) or math.isinf(value):
                interval = f"{'from' if is_closed else 'above'} {least:g}" + (f" to {most:g}" if most < 1e9 else "")
                raise UserError(f"{name} {value} is out of range: it must be {interval}")
        if self.top_k < -1:
            raise UserError(f"top_k {self.top_k} is out of range: it must be positive, or 0 or -1 for all tokens")
        for token, value in self.logit_bias.items():
            if not -100 <= value <= 100:
                raise UserError(f"logit_bias of token {token} is {value}: it must be from -100 to 100")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UserError(f"seed {self.seed} is out of range: it must be from 0 to 2^64 - 1")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise UserError(f"{name} {count} is out of range: it must be from 0 to {MAX_LOGPROBS}")

    @property
    def has_penalties(self) -> bool:
        """Whether what was generated before counts."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one place, by the model's own logits.

    Attributes:
        token_id, logprob: of the token that is there.
        rank: its place among all tokens, 1 for the most probable.
        top: (token id, log probability) of the most probable, best first, as many as asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


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


Stage = Literal["waiting", "prefill", "handoff", "decode", "done"]


@dataclasses.dataclass(eq=False)
class Request:
    """A request on its way through the engine.

    Attributes:
        request_id: what messages call it, such as "prompt 3".
        prompt_ids: at least one token.
        sampling: how to continue it.
        token_ids: generated so far.
        seed: of its noise.
        arrival, priority, tenant: by which waiting requests are put in order; lower priorities go first.
        stage: "waiting" for a place, in "prefill", in "handoff", in "decode" or "done".
        num_attempts: how often it has been sent on its way; more than one after failures and preemptions.
        num_failures: of them, those that a failing instance or hand-off ended.
        prefill_name, num_computed, prefill_blocks: the prefill instance, how many tokens it has computed, and where.
        decode_name, decode_rank, decode_place, decode_blocks: where it decodes, reserved before its prefill.
        num_settled: how many of the newest tokens' hidden states the decode instance holds for the MTP module.
        finish_reason, error: why it ended, and what went wrong where that is why.
        handle: what its client holds, where there is one.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = dataclasses.field(default_factory=lambda: [None])
    seed: int = 0
    arrival: float = 0.0
    priority: int = 0
    tenant: str = ""
    stage: Stage = "waiting"
    num_attempts: int = 0
    num_failures: int = 0
    prefill_name: str = ""
    num_computed: int = 0
    prefill_blocks: list[int] = dataclasses.field(default_factory=list)
    decode_name: str = ""
    decode_rank: int = -1
    decode_place: int = -1
    decode_blocks: list[int] = dataclasses.field(default_factory=list)
    num_settled: int = 1
    finish_reason: FinishReason | None = None
    error: str | None = None
    handle: "RequestHandle | None" = None

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(64) if self.sampling.seed is None else self.sampling.seed

    @property
    def num_tokens(self) -> int:
        """The most tokens its cache will hold: the last generated one is never put in."""
        return len(self.prompt_ids) + self.sampling.max_tokens - 1

    @property
    def num_cached(self) -> int:
        """Tokens that its cache must hold for the next step: all but the newest generated one."""
        return len(self.prompt_ids) + max(len(self.token_ids) - 1, 0)

    @property
    def prefill_ids(self) -> list[int]:
        """What a prefill computes: the prompt, and after a preemption also the generated tokens but the newest."""
        return self.prompt_ids + self.token_ids[:-1]

    @property
    def is_resumed(self) -> bool:
        """Whether it goes on from tokens that it has; the token that prefill makes is none of its own then."""
        return bool(self.token_ids)

    @property
    def will_decode(self) -> bool:
        """Whether it needs more than the token that prefill makes."""
        return self.sampling.max_tokens > 1

    def append(self, token_ids: Sequence[int]) -> int:
        """Take generated tokens until the request ends; return how many were taken."""
        for taken, token in enumerate(token_ids):
            if self.finish_reason is not None:
                return taken
            self.token_ids.append(int(token))
            if int(token) in self.sampling.stop_token_ids:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.sampling.max_tokens:
                self.finish_reason = "length"
        return len(token_ids)

    def output(self) -> RequestOutput:
        """The finished request."""
        if self.finish_reason is None:
            raise ValueError(f"{self.request_id} has not finished")
        sampling = self.sampling
        return RequestOutput(
            self.prompt_ids,
            self.token_ids,
            self.finish_reason,
            None if sampling.logprobs is None else self.logprobs[: len(self.token_ids)],
            None if sampling.prompt_logprobs is None else self.prompt_logprobs,
        )


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Part of a prompt prefilled in one step: tokens `[start, stop)` of what the request has to compute, into its
    `blocks`."""

    request: Request
    blocks: list[int]
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether it ends the prompt."""
        return self.stop == self.request.num_cached
