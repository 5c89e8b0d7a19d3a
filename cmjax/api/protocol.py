"""What clients send: the fields of OpenAI's API, and those that vLLM's users know; `fields` has the others."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cmjax.options import options_of
from cmjax.schedule import MAX_BAD_WORD_TOKENS, MAX_LOGIT_BIAS, MOST_LOGIT_BIAS, SamplingParams
from cmjax.text import JsonObject

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_SALT = 1000  # characters
Id = Annotated[int, Field(ge=0, lt=2**31)]
# The first mistake is the one that is told; a list of a million would be as many.
Ids = Annotated[list[Id], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Prompts = Annotated[list[Ids], Field(fail_fast=True)]
Bias = Annotated[float, Field(ge=-MOST_LOGIT_BIAS, le=MOST_LOGIT_BIAS)]
Stop = str | Annotated[list[str], Field(max_length=MAX_STOPS)]


def _sampled(name: str, **more: int) -> Any:
    """A field that need not be given, with the bounds that `SamplingParams` has for it."""
    option, kind = options_of(SamplingParams)[name]
    bounds: dict[str, Any] = option.limits | more | ({"allow_inf_nan": False} if kind is float else {})
    return Field(None, **bounds)


def _with_nulls(schema: JsonObject) -> None:
    """Say in a schema that a field with a default may be null."""
    for name, field in schema.get("properties", {}).items():
        if name in schema.get("required", ()) or {"type": "null"} in field.get("anyOf", ()):
            continue
        moved = {key: field.pop(key) for key in list(field) if key not in ("title", "default", "description")}
        field["anyOf"] = [moved, {"type": "null"}]


class _Body(BaseModel):
    """Where a field is null, its default holds; fields that are none of its own are in `model_extra`."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_nulls)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class StreamOptions(_Body):
    """What a stream says besides tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampled(_Body):
    """What both kinds of completion take."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    temperature: float | None = _sampled("temperature")
    top_p: float | None = _sampled("top_p")
    top_k: int | None = _sampled("top_k", lt=2**31)
    min_p: float | None = _sampled("min_p")
    presence_penalty: float | None = _sampled("presence_penalty")
    frequency_penalty: float | None = _sampled("frequency_penalty")
    repetition_penalty: float | None = _sampled("repetition_penalty")
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[Ids, Field(max_length=64)] | None = None
    min_tokens: int = Field(0, ge=0)
    bad_words: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_BAD_WORD_TOKENS)] | None = None
    allowed_token_ids: Annotated[Ids, Field(min_length=1)] | None = None
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    request_id: Annotated[str, Field(max_length=256)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: str | Ids | Texts | Prompts
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = _sampled("logprobs")
    prompt_logprobs: int | None = _sampled("prompt_logprobs")
    echo: bool = False
    add_special_tokens: bool = True


class Part(BaseModel):
    """A piece of a message; templates may read other fields too."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a conversation; templates may read other fields too."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = _sampled("logprobs")
    tools: list[JsonObject] | None = None
    tool_choice: Any = None
    add_special_tokens: bool = False
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: JsonObject | None = None


class TokenizeRequest(_Body):
    """`POST /tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[JsonObject] | None = None
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool = False


class DetokenizeRequest(_Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[Ids, Field(max_length=2**20)]


Kind = Literal["completion", "chat", "tokenize", "detokenize"]
BODIES: dict[Kind, type[BaseModel]] = {
    "completion": CompletionRequest,
    "chat": ChatRequest,
    "tokenize": TokenizeRequest,
    "detokenize": DetokenizeRequest,
}
