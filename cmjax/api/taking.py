"""From the bytes of a body to what it asks for: parsed, checked, rendered, tokenized. No state, no JAX, no event loop:
it is the same in an event loop, in a thread and in a process of its own."""

import dataclasses
import json
from typing import Any

from pydantic import BaseModel, ValidationError

from cmjax.api.encoding import gathered, json_pieces
from cmjax.api.errors import ApiError
from cmjax.api.fields import check_fields
from cmjax.api.prompts import Prompt, bad_words, chat_prompt, completion_prompts, conversation, encode
from cmjax.api.protocol import BODIES, ChatRequest, CompletionRequest, DetokenizeRequest, Kind, TokenizeRequest
from cmjax.api.sampling import refuse_unsupported, sampling_of
from cmjax.api.served import Served
from cmjax.errors import UserError
from cmjax.schedule import SamplingParams
from cmjax.text import JsonObject


@dataclasses.dataclass
class Asked:
    """What a completion or a chat asks for.

    Attributes:
        body: as it came, but for what has gone into the rest: prompts, messages, settings of the engine.
        prompts: at least one.
        samplings: of each prompt's first choice.
    """

    body: CompletionRequest | ChatRequest
    prompts: list[Prompt]
    samplings: list[SamplingParams]


Taken = Asked | list[bytes]


def take(served: Served, kind: Kind, content_type: str, raw: bytes) -> Taken:
    """What a body asks for; of "tokenize" and "detokenize" the answer itself, as JSON in pieces.

    Raises:
        ApiError: what is wrong with it.
    """
    try:
        body: Any = _validated(BODIES[kind], _parsed(raw, content_type))
        served.check_model(body.model)
        if kind == "tokenize":
            return list(gathered(json_pieces(_tokenized(served, body))))
        if kind == "detokenize":
            return list(gathered(json_pieces(_detokenized(served, body))))
        return _asked(served, body)
    except UserError as error:
        raise ApiError(400, str(error)) from error


def _parsed(raw: bytes, content_type: str) -> object:
    if not raw:
        raise ApiError(400, "there is no body; it must be a JSON object")
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        sent = f"it came as {content_type[:80]!r}" if content_type else "it came without"
        raise ApiError(400, f"the body must be JSON with the header Content-Type: application/json; {sent}")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error.reason} at byte {error.start}") from error
    try:
        found = json.loads(raw)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error.msg} (character {error.pos})") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ApiError(400, "the body is not valid JSON: it is nested too deeply") from error
    _check_text(raw, found)
    return found


def _check_text(raw: bytes, found: object) -> None:
    """400 for half of a surrogate pair, which JSON can write and no text can have."""
    # Zeros: `json` takes them for another encoding.
    if not any(mark in raw for mark in (b"\\ud", b"\\uD", b"\0")):
        return
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        message = f"the body is not Unicode text: it has half of a surrogate pair, \\u{half:x}"
        raise ApiError(400, message) from error


def _validated(model: type[BaseModel], found: object) -> BaseModel:
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Alternatives of a union are named in the path; the field itself comes first.
        where = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where) from error


def _asked(served: Served, body: CompletionRequest | ChatRequest) -> Asked:
    refuse_unsupported(body)
    served.check_priority(body.priority)
    if body.stop:
        served.text_tokenizer()
    if isinstance(body, ChatRequest):
        served.check_number(body.n)
        prompts = [chat_prompt(served, body)]
        body.messages, body.tools, body.chat_template_kwargs = [], None, None
    else:
        prompts = completion_prompts(served, body)
        body.prompt = ""
    sampling = sampling_of(served, body, bad_words(served, body))
    samplings = [sampling(len(prompt.token_ids)) for prompt in prompts]
    body.logit_bias = body.allowed_token_ids = body.bad_words = None
    (body.model_extra or {}).clear()
    return Asked(body, prompts, samplings)


def _tokenized(served: Served, body: TokenizeRequest) -> JsonObject:
    check_fields(body.model_extra)
    tokenizer = served.text_tokenizer()
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: give either prompt or messages", param="prompt")
    if body.messages is not None:
        ids = encode(tokenizer, conversation(served, body), bool(body.add_special_tokens))
    else:
        ids = encode(tokenizer, body.prompt or "", body.add_special_tokens is not False)
    strings = [tokenizer.backend.id_to_token(i) for i in ids] if body.return_token_strs else None
    return {"tokens": ids, "count": len(ids), "max_model_len": served.max_model_len, "token_strs": strings}


def _detokenized(served: Served, body: DetokenizeRequest) -> dict[str, str]:
    outside = next((token for token in body.tokens if token >= served.vocab_size), None)
    if outside is not None:
        message = f"token id {outside} is outside the vocabulary (0 to {served.vocab_size - 1})"
        raise ApiError(400, message, param="tokens")
    return {"prompt": served.text_tokenizer().decode(body.tokens, skip_special_tokens=False)}
