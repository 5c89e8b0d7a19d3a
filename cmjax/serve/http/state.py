"""What the handlers of a server share, and the checks that every request passes."""

import secrets

from cmjax.checkpoint import Tokenizer
from cmjax.serve import SamplingParams
from cmjax.serve.http.backend import Backend
from cmjax.serve.http.errors import ApiError
from cmjax.serve.http.metrics import Metrics
from cmjax.serve.http.protocol import ChatRequest, CompletionRequest, Sampled
from cmjax.serve.http.template import ChatTemplate
from cmjax.serve.settings import ServerSettings


class ServerState:
    """An engine behind HTTP.

    Attributes:
        engine: started.
        tokenizer: of the model; None: prompts and answers are token ids only.
        template: for conversations; None where the model has none.
        is_draining: nothing new is taken any more.
    """

    def __init__(
        self, engine: Backend, settings: ServerSettings, tokenizer: Tokenizer | None, template: ChatTemplate | None
    ) -> None:
        self.engine, self.settings, self.tokenizer, self.template = engine, settings, tokenizer, template
        self.metrics = Metrics(engine, settings.model_name, settings.metrics_prefix)
        self.is_draining = False
        self.num_active = 0
        self._token_texts: dict[int, str] = {}

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

    def sampling(self, body: Sampled, num_prompt: int, choice: int) -> SamplingParams:
        """How the engine continues a prompt of so many tokens; choices differ by their seed.

        Raises:
            ApiError: 400, naming the field.
        """
        room = self.engine.settings.max_model_len - num_prompt
        wanted = _max_tokens(body)
        if wanted is None:
            wanted = max(room, 1)
        if wanted > room or num_prompt == 0:
            raise _too_long(self.engine.settings.max_model_len, num_prompt, wanted)
        stop_ids = list(body.stop_token_ids or [])
        eos = self.engine.model.config.eos_token_id
        if not body.ignore_eos and eos is not None:
            stop_ids += [eos] if isinstance(eos, int) else list(eos)
        top = prompt_top = None
        if isinstance(body, ChatRequest) and body.logprobs:
            top = body.top_logprobs or 0
        elif isinstance(body, CompletionRequest):
            top, prompt_top = body.logprobs, body.prompt_logprobs
            if body.echo and top is not None:
                prompt_top = top
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
        given = {name: getattr(body, name) for name in names}
        return SamplingParams(
            max_tokens=max(wanted, 1),  # 0, with echo: the one token is thrown away
            stop_token_ids=tuple(dict.fromkeys(stop_ids)),
            logit_bias=self._logit_bias(body),
            seed=choice_seed(body.seed, choice),
            logprobs=top,
            prompt_logprobs=prompt_top,
            **{"temperature": 1.0} | {name: value for name, value in given.items() if value is not None},
        )

    def _logit_bias(self, body: Sampled) -> dict[int, float]:
        size, bias = self.engine.model.config.vocab_size, {}
        for key, value in (body.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit() or int(key) >= size:
                message = f"logit_bias: {key!r} is no token id of the vocabulary (0 to {size - 1})"
                raise ApiError(400, message, param="logit_bias")
            bias[int(key)] = value
        return bias


def _max_tokens(body: Sampled) -> int | None:
    if isinstance(body, ChatRequest):
        return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    assert isinstance(body, CompletionRequest)
    return body.max_tokens


def _too_long(limit: int, num_prompt: int, max_tokens: int) -> ApiError:
    if num_prompt == 0:
        return ApiError(400, "prompt: it has no tokens; at least one is needed", param="prompt")
    message = (
        f"a prompt of {num_prompt} tokens and max_tokens {max_tokens} exceed the maximum context length of {limit}"
    )
    return ApiError(400, message, param="prompt", code="context_length_exceeded")


def choice_seed(seed: int | None, choice: int) -> int:
    """A seed of its own for each choice, the same ones for the same request."""
    if seed is None:
        return secrets.randbits(64)
    return (seed + choice * 0x9E3779B97F4A7C15) % 2**64


def refuse_unsupported(body: Sampled) -> None:
    """400 for fields that would change the answer and cannot be honoured."""
    unsupported = {
        "repetition_penalty": body.repetition_penalty not in (None, 1.0),
        "min_tokens": body.min_tokens not in (None, 0),
    }
    if isinstance(body, CompletionRequest):
        unsupported |= {"suffix": bool(body.suffix), "best_of": body.best_of not in (None, body.n)}
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens: 0 makes sense with echo only", param="max_tokens")
    elif isinstance(body, ChatRequest):
        is_other = body.response_format is not None and body.response_format.type != "text"
        unsupported |= {"tools": bool(body.tools), "response_format": is_other}
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: it needs logprobs to be true", param="top_logprobs")
    for name, is_asked in unsupported.items():
        if is_asked:
            raise ApiError(400, f"{name}: not supported", param=name)
