"""Requests: what a client asks for, what becomes of it, and the packing of prompts into prefill steps."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from cmjax.errors import UserError

FinishReason = Literal["length", "stop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Decoding is greedy.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        stop_token_ids: a generated token among these ends the request, and is its last. The model's own
            `eos_token_id` stops nothing unless it is listed here.
    """

    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens} is not positive")


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A finished request: `token_ids` continue `prompt_ids`."""

    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: FinishReason


@dataclasses.dataclass
class Request:
    """A request on its way through the engine.

    Attributes:
        request_id: its index among the prompts of the call.
        prompt_ids: at least one token.
        sampling: how to continue it.
        token_ids: generated so far.
        decode_rank, decode_place, decode_blocks: where it decodes, reserved before its prefill.
    """

    request_id: int
    prompt_ids: list[int]
    sampling: SamplingParams
    token_ids: list[int] = dataclasses.field(default_factory=list)
    decode_rank: int = -1
    decode_place: int = -1
    decode_blocks: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """The most tokens its cache will hold: the last generated one is never put in."""
        return len(self.prompt_ids) + self.sampling.max_tokens - 1

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
            raise ValueError(f"request {self.request_id} has not finished")
        return RequestOutput(self.prompt_ids, self.token_ids, self.finish_reason)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Part of a prompt prefilled in one step: tokens `[start, stop)` of the request at `index`."""

    index: int
    start: int
    stop: int


def plan_chunks(prompt_lengths: Sequence[int], max_tokens: int, max_sequences: int) -> list[list[Chunk]]:
    """Cut prompts into steps of at most `max_tokens` tokens and `max_sequences` chunks, in order.

    Example: lengths [5, 4] with 6 tokens a step give [[0: 0-5, 1: 0-1], [1: 1-4]].
    """
    steps: list[list[Chunk]] = []
    room = 0
    for index, length in enumerate(prompt_lengths):
        start = 0
        while start < length:
            if room == 0 or len(steps[-1]) == max_sequences:
                steps.append([])
                room = max_tokens
            stop = min(length, start + room)
            steps[-1].append(Chunk(index, start, stop))
            room -= stop - start
            start = stop
    return steps
