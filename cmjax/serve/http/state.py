"""What the handlers of a server share, and the checks that every request passes."""

import secrets
import time
from typing import Any

from cmjax.checkpoint import GenerationConfig, Tokenizer
from cmjax.errors import UserError
from cmjax.serve import SamplingParams
from cmjax.serve.http.backend import Backend
from cmjax.serve.http.errors import ApiError
from cmjax.serve.http.fields import check_fields
from cmjax.serve.http.metrics import Metrics
from cmjax.serve.http.protocol import ChatRequest, CompletionRequest, Sampled
from cmjax.serve.http.template import ChatTemplate
from cmjax.serve.settings import ServerSettings

# Fields that are the engine's own; where one is left out, the model's `generation_config.json` may say what holds.
_SAMPLED = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


class ServerState:
    """An engine behind HTTP.

    Attributes:
        engine: started.
        tokenizer: of the model; None: prompts and answers are token ids only.
        template: for conversations; None where the model has none.
        is_draining: nothing new is taken any more.
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
        self.engine, self.settings, self.tokenizer, self.template = engine, settings, tokenizer, template
        self._defaults, self._eos_ids = self._generation(generation or GenerationConfig())
        self.created = int(time.time())
        self.metrics = Metrics(engine, settings.model_name, settings.metrics_prefix)
        self.is_draining = False
        self.num_active = 0
        self._token_texts: dict[int, str] = {}

    def _generation(self, generation: GenerationConfig) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Sampling for what requests leave out, and the tokens that end a text."""
        generation.check(self.engine.model.config.vocab_size)
        defaults: dict[str, Any] = {"temperature": 1.0, **generation.defaults}
        try:
            SamplingParams(**defaults)
        except UserError as error:
            raise UserError(f"{generation.where}: {error}") from error
        if generation.eos_token_ids is not None:
            return defaults, generation.eos_token_ids
        eos = self.engine.model.config.eos_token_id
        return defaults, (eos,) if isinstance(eos, int) else tuple(eos or ())

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, or an error where the model has none."""
        if self.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer.json: give prompts as token ids", param="prompt")
        return self.tokenizer

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served."""
        if name is not None and name != self.settings.model_name:
            message = f"the model {name!r} is not served here; {self.settings.model_name!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_number(self, num_requests: int) -> None:
        """400 for a body of more prompts times choices than may ever be under way."""
        limit = self.settings.max_concurrent_requests
        if num_requests > limit:
            raise ApiError(
                400, f"prompt: {num_requests} prompts times choices, at most {limit} are taken", param="prompt"
            )

    def check_priority(self, priority: int) -> None:
        """400 for a priority that is not the client's to choose."""
        least = self.settings.min_priority
        if priority < least:
            raise ApiError(400, f"priority: {priority} is more urgent than {least}, the most allowed", param="priority")

    def admit(self, num_requests: int) -> None:
        """Count requests as under way, until `leave`; 503 while draining, 429 beyond the limit."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down")
        self.check_number(num_requests)
        limit = self.settings.max_concurrent_requests
        if self.num_active + num_requests > limit:
            raise ApiError(429, f"{self.num_active} requests are under way, at most {limit} may be: try again later")
        self.num_active += num_requests

    def leave(self, num_requests: int) -> None:
        """So many requests are over."""
        self.num_active -= num_requests

    def token_text(self, token_id: int) -> str:
        """The text of one token; its entry in the vocabulary, where it is part of a character."""
        text = self._token_texts.get(token_id)
        if text is None:
            try:
                text = self.text_tokenizer().token_bytes(token_id).decode()
            except UnicodeDecodeError:
                text = ""
            text = text or self.text_tokenizer().backend.id_to_token(token_id) or f"token_id:{token_id}"
            self._token_texts[token_id] = text
        return text

    def sampling(self, body: Sampled, num_prompt: int, bad_words: tuple[tuple[int, ...], ...] = ()) -> SamplingParams:
        """How the engine continues a prompt of so many tokens, for the first of its choices; the others differ by their
        seed.

        Raises:
            ApiError: 400, naming the field.
        """
        room = self.engine.settings.max_model_len - num_prompt
        wanted = max_tokens(body)
        is_scored = wanted == 0  # with echo: the one token is thrown away
        if wanted is None:
            wanted = max(room, 1)
        if "max_tokens" in self._defaults and not body.model_fields_set & {"max_tokens", "max_completion_tokens"}:
            wanted = min(wanted, self._defaults["max_tokens"])
        if wanted > room or num_prompt == 0:
            raise _too_long(self.engine.settings.max_model_len, num_prompt, wanted)
        stop_ids = [*(body.stop_token_ids or ()), *(() if body.ignore_eos else self._eos_ids)]
        top = prompt_top = None
        if isinstance(body, ChatRequest) and body.logprobs:
            top = body.top_logprobs or 0
        elif isinstance(body, CompletionRequest):
            top, prompt_top = body.logprobs, body.prompt_logprobs
            if body.echo and top is not None:
                prompt_top = top
            if is_scored and prompt_top is None:
                prompt_top = 0  # by which the engine knows that it is, and may be as long as the cache
        given = {name: value for name in _SAMPLED if (value := getattr(body, name)) is not None}
        allowed = body.allowed_token_ids
        settings = {
            "stop_token_ids": tuple(dict.fromkeys(stop_ids)),
            "min_tokens": body.min_tokens,
            "bad_words": bad_words,
            "allowed_token_ids": None if allowed is None else tuple(dict.fromkeys(allowed)),
            "logit_bias": self._logit_bias(body),
            "seed": choice_seed(body.seed, 0),
            "logprobs": top,
            "prompt_logprobs": prompt_top,
        }
        try:
            return SamplingParams(**{**self._defaults, **given, **settings, "max_tokens": max(wanted, 1)})
        except UserError as error:
            name = str(error).split()[0].rstrip(":")
            raise ApiError(400, str(error), param=name if name in type(body).model_fields else None) from error

    def _logit_bias(self, body: Sampled) -> dict[int, float]:
        size, bias = self.engine.model.config.vocab_size, {}
        for key, value in (body.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit() or int(key) >= size:
                message = f"logit_bias: {key!r} is no token id of the vocabulary (0 to {size - 1})"
                raise ApiError(400, message, param="logit_bias")
            bias[int(key)] = value
        return bias


def max_tokens(body: Sampled) -> int | None:
    """What a request says of it; None: as many as there is room for."""
    if isinstance(body, ChatRequest):
        return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    assert isinstance(body, CompletionRequest)
    return body.max_tokens


def _too_long(limit: int, num_prompt: int, max_tokens: int) -> ApiError:
    if num_prompt == 0:
        return ApiError(400, "prompt: it has no tokens; at least one is needed", param="prompt")
    # Clients know it by these words: litellm and others look for "prompt is too long".
    message = (
        f"the prompt is too long for max_tokens {max_tokens}: "
        f"with its {num_prompt} tokens that exceeds the maximum context length of {limit}"
    )
    return ApiError(400, message, param="prompt", code="context_length_exceeded")


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
