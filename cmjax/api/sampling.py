"""How a request is to be continued: the engine's settings, from the body's fields and what holds where they are not."""

import secrets
from collections.abc import Callable
from typing import Any

from cmjax.api.errors import ApiError, clipped
from cmjax.api.fields import check_fields
from cmjax.api.prompts import max_tokens, too_long
from cmjax.api.protocol import ChatRequest, CompletionRequest, Sampled
from cmjax.api.served import Served
from cmjax.errors import UserError
from cmjax.schedule import SamplingParams

# Fields that are the engine's own; where one is left out, the model's `generation_config.json` may say what holds.
_SAMPLED = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


def sampling_of(
    served: Served, body: Sampled, bad_words: tuple[tuple[int, ...], ...] = ()
) -> Callable[[int], SamplingParams]:
    """How the engine continues a prompt of so many tokens, but for the seed, which each of its choices has of its own.
    Prompts with as much to be generated share theirs.

    Raises:
        ApiError: 400, naming the field; from the function too.
    """
    known: dict[int, SamplingParams] = {}
    settings = _settings(served, body, bad_words)

    def of(num_prompt: int) -> SamplingParams:
        wanted = _wanted(served, body, num_prompt)
        if wanted not in known:
            try:
                known[wanted] = SamplingParams(**{**settings, "max_tokens": wanted})
            except UserError as error:
                name = str(error).split()[0].rstrip(":")
                raise ApiError(400, str(error), param=name if name in type(body).model_fields else None) from error
        return known[wanted]

    return of


def _settings(served: Served, body: Sampled, bad_words: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    """All but `max_tokens`, which the prompt decides too."""
    stop_ids = [*(body.stop_token_ids or ()), *(() if body.ignore_eos else served.eos_ids)]
    top = prompt_top = None
    if isinstance(body, ChatRequest) and body.logprobs:
        top = body.top_logprobs or 0
    elif isinstance(body, CompletionRequest):
        top, prompt_top = body.logprobs, body.prompt_logprobs
        if body.echo and top is not None:
            prompt_top = top
        if body.max_tokens == 0 and prompt_top is None:
            prompt_top = 0  # by which the engine knows that it is scored, and may be as long as the cache
    given = {name: value for name in _SAMPLED if (value := getattr(body, name)) is not None}
    allowed = body.allowed_token_ids
    return {
        **served.defaults,
        **given,
        "stop_token_ids": tuple(dict.fromkeys(stop_ids)),
        "min_tokens": body.min_tokens,
        "bad_words": bad_words,
        "allowed_token_ids": None if allowed is None else tuple(dict.fromkeys(allowed)),
        "logit_bias": _logit_bias(served, body),
        "seed": choice_seed(body.seed, 0),
        "logprobs": top,
        "prompt_logprobs": prompt_top,
    }


def _wanted(served: Served, body: Sampled, num_prompt: int) -> int:
    """Tokens to generate after a prompt of so many: one at least, which is thrown away where none is wanted."""
    if num_prompt == 0:
        raise ApiError(400, "prompt: it has no tokens; at least one is needed", param="prompt")
    room = served.max_model_len - num_prompt
    wanted = max_tokens(body)
    if wanted is None:
        bound = max(int(served.defaults.get("max_tokens", served.default_max_tokens)), body.min_tokens)
        wanted = min(bound, max(room, 1))
    elif "max_tokens" in served.defaults and not body.model_fields_set & {"max_tokens", "max_completion_tokens"}:
        wanted = min(wanted, int(served.defaults["max_tokens"]))
    if wanted > room:
        raise too_long(served.max_model_len, num_prompt, wanted)
    return max(wanted, 1)


def _logit_bias(served: Served, body: Sampled) -> dict[int, float]:
    size, bias = served.vocab_size, {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) >= size:
            message = f"logit_bias: {clipped(key)} is no token id of the vocabulary (0 to {size - 1})"
            raise ApiError(400, message, param="logit_bias")
        bias[int(key)] = value
    return bias


def choice_seed(seed: int | None, choice: int) -> int:
    """A seed of its own for each choice, the same ones for the same request."""
    if seed is None:
        return secrets.randbits(64)
    return (seed + choice * 0x9E3779B97F4A7C15) % 2**64


def refuse_unsupported(body: Sampled) -> None:
    """400 for fields that would change the answer and cannot be honoured."""
    check_fields(body.model_extra, body.n)
    if isinstance(body, CompletionRequest):
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens: 0 makes sense with echo only", param="max_tokens")
    elif isinstance(body, ChatRequest):
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: it needs logprobs to be true", param="top_logprobs")
        if body.echo:
            raise ApiError(400, "echo: not supported in chats", param="echo")
        if body.tools and body.tool_choice != "none":
            message = 'tools: calls are not supported; tool_choice "none" has the template show them to the model'
            raise ApiError(400, message, param="tools")
        if body.tool_choice not in (None, "none"):
            raise ApiError(400, "tool_choice: not supported, but for none", param="tool_choice")
