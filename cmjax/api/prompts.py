"""What is to be continued, as token ids: texts, token ids or conversations, from the body of a request."""

import dataclasses
from array import array
from collections.abc import Sequence
from typing import Any

from cmjax.api.errors import ApiError, clipped
from cmjax.api.fields import check_template_arguments
from cmjax.api.protocol import ChatRequest, CompletionRequest, Sampled, TokenizeRequest
from cmjax.api.served import Served
from cmjax.text import Tokenizer, starts_in, token_starts


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a request asks to continue.

    Attributes:
        token_ids: int32, all of it; an array, which goes from one process to another in no time.
        text: for echo; "" where nobody asked for one.
        starts: where each token begins in the text, in characters.
    """

    token_ids: "array[int]"
    text: str = ""
    starts: "array[int]" = dataclasses.field(default_factory=lambda: _int32())


def _int32(values: Sequence[int] = ()) -> "array[int]":
    return array("i", values)


def max_tokens(body: Sampled) -> int | None:
    """What a request says of it; None: a chat that leaves it open."""
    if isinstance(body, ChatRequest):
        return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    assert isinstance(body, CompletionRequest)
    return body.max_tokens


def completion_prompts(served: Served, body: CompletionRequest) -> list[Prompt]:
    """Those of a completion: one or several, texts or token ids."""
    given = body.prompt
    if isinstance(given, str):
        several: list[Any] = [given]
    elif given and isinstance(given[0], int):
        several = [given]
    else:
        several = list(given)
    if not several:
        raise ApiError(400, "prompt: it is empty", param="prompt")
    served.check_number(len(several) * body.n)  # before any of them costs anything
    for one in several:
        check_length(served, body, one)
    return [_truncated(served, _prompt(served, one, body), body) for one in several]


def check_length(served: Served, body: Sampled, prompt: str | Sequence[int]) -> None:
    """400 for a prompt that cannot fit: a text is not tokenized for it."""
    if body.truncate_prompt_tokens is not None:
        return
    limit, is_text = served.max_model_len, isinstance(prompt, str)
    least = served.text_tokenizer().least_tokens(prompt) if isinstance(prompt, str) else len(prompt)
    if least > limit:
        raise too_long(limit, f"{'at least ' if is_text else ''}{least}", max_tokens(body))


def too_long(limit: int, num_prompt: int | str, wanted: int | None) -> ApiError:
    """The error for a prompt, or a prompt and its answer, that do not fit."""
    answer = "" if wanted is None else f" and max_tokens {wanted}"
    # Clients know it by words: litellm looks for "prompt is too long".
    message = f"the prompt is too long: {num_prompt} tokens{answer} exceed the maximum context length of {limit}"
    return ApiError(400, message, param="prompt", code="context_length_exceeded")


def _truncated(served: Served, prompt: Prompt, body: Sampled) -> Prompt:
    """The last tokens of a prompt, where a request wants no more; -1: as many as leave room for the answer."""
    most, limit = body.truncate_prompt_tokens, served.max_model_len
    if most is None:
        return prompt
    if most == 0 or most > limit:
        message = f"truncate_prompt_tokens: {most} must be from 1 to {limit}, or -1 for the most that there is room for"
        raise ApiError(400, message, param="truncate_prompt_tokens")
    if most == -1:
        wanted = max_tokens(body)
        most = max(limit - (1 if wanted is None else wanted), 1)
    first = max(len(prompt.token_ids) - most, 0)
    if not len(prompt.starts):
        return Prompt(prompt.token_ids[first:], prompt.text)
    begin = prompt.starts[first] if first else 0
    starts = _int32([start - begin for start in prompt.starts[first:]])
    return Prompt(prompt.token_ids[first:], prompt.text[begin:], starts)


def bad_words(served: Served, body: Sampled) -> tuple[tuple[int, ...], ...]:
    """Token ids of a request's `bad_words`, as vLLM finds them: each word at the beginning of a text and, where that is
    another token, after a space."""
    found: list[tuple[int, ...]] = []
    for word in body.bad_words or ():
        texts = (prefix + word.lstrip() for prefix in ("", " ")) if word.strip() else (word, word)
        plain, spaced = (tuple(encode(served.text_tokenizer(), text, add_special_tokens=False)) for text in texts)
        if not plain:
            raise ApiError(400, f"bad_words: {clipped(word)} has no tokens", param="bad_words")
        found.append(plain)
        if spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return tuple(dict.fromkeys(found))


def _prompt(served: Served, given: str | list[int], body: CompletionRequest) -> Prompt:
    if isinstance(given, str):
        tokenizer = served.text_tokenizer()
        if body.echo and body.add_special_tokens:
            ids, starts = starts_in(tokenizer, given)
            return Prompt(_int32(ids), given, _int32(starts))
        ids = encode(tokenizer, given, body.add_special_tokens)
        return _with_text(tokenizer, ids, given) if body.echo else Prompt(_int32(ids))
    if not body.echo or served.tokenizer is None:
        return Prompt(_int32(given))  # the engine says which id is none of the vocabulary
    return _with_text(served.tokenizer, given, served.tokenizer.decode(given, skip_special_tokens=False))


def _with_text(tokenizer: Tokenizer, ids: list[int], text: str) -> Prompt:
    return Prompt(_int32(ids), text, _int32(token_starts(tokenizer, ids)))


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text, with the special tokens around it or without."""
    return tokenizer.encode(text) if add_special_tokens else tokenizer.encode_with_ends(text)[0]


def chat_prompt(served: Served, body: ChatRequest) -> Prompt:
    """That of a conversation; a template writes special tokens itself, where it wants them."""
    text = conversation(served, body)
    check_length(served, body, text)
    ids = encode(served.text_tokenizer(), text, body.add_special_tokens)
    return _truncated(served, Prompt(_int32(ids)), body)


def conversation(served: Served, body: ChatRequest | TokenizeRequest) -> str:
    """The text of a conversation, by the model's chat template."""
    served.text_tokenizer()
    check_template_arguments(body.chat_template_kwargs)
    if served.template is None:
        raise ApiError(400, "messages: the model has no chat template; start the server with --chat-template")
    plain = []
    for message in body.messages or ():
        if isinstance(message.content, list):
            other = [part.type for part in message.content if part.type != "text"]
            if other:
                raise ApiError(400, f"messages: parts of type {clipped(other[0])} are not supported", param="messages")
            if any(part.text is None for part in message.content):
                raise ApiError(400, "messages: a part of type 'text' has no text", param="messages")
        plain.append(message.model_dump(exclude_unset=True))
    return served.template.render(
        plain,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tools=body.tools or None,
        variables=body.chat_template_kwargs,
    )
