"""What is to be continued, as token ids: texts, token ids or conversations, from the body of a request."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cmjax.checkpoint import Tokenizer, starts_in, token_starts
from cmjax.serve.http.errors import ApiError
from cmjax.serve.http.fields import check_template_arguments
from cmjax.serve.http.protocol import ChatRequest, CompletionRequest, Sampled, TokenizeRequest
from cmjax.serve.http.state import ServerState, max_tokens


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a request asks to continue.

    Attributes:
        token_ids: all of it.
        text: for echo; "" where nobody asked for one.
        starts: where each token begins in the text, in characters.
    """

    token_ids: list[int]
    text: str = ""
    starts: Sequence[int] = ()


def completion_prompts(state: ServerState, body: CompletionRequest) -> list[Prompt]:
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
    state.check_number(len(several) * body.n)  # before any of them costs anything
    return [_truncated(state, _prompt(state, one, body), body) for one in several]


def _truncated(state: ServerState, prompt: Prompt, body: Sampled) -> Prompt:
    """The last tokens of a prompt, where a request wants no more; -1: as many as leave room for the answer."""
    most, limit = body.truncate_prompt_tokens, state.engine.settings.max_model_len
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
    starts = [start - begin for start in prompt.starts[first:]]
    return Prompt(prompt.token_ids[first:], prompt.text[begin:], starts)


def bad_words(state: ServerState, body: Sampled) -> tuple[tuple[int, ...], ...]:
    """Token ids of a request's `bad_words`, as vLLM finds them: each word at the beginning of a text and, where that is
    another token, after a space."""
    found: list[tuple[int, ...]] = []
    for word in body.bad_words or ():
        texts = (prefix + word.lstrip() for prefix in ("", " ")) if word.strip() else (word, word)
        plain, spaced = (tuple(encode(state.text_tokenizer(), text, add_special_tokens=False)) for text in texts)
        if not plain:
            raise ApiError(400, f"bad_words: {word!r} has no tokens", param="bad_words")
        found.append(plain)
        if spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return tuple(dict.fromkeys(found))


def _prompt(state: ServerState, given: str | list[int], body: CompletionRequest) -> Prompt:
    if isinstance(given, str):
        tokenizer = state.text_tokenizer()
        if body.echo and body.add_special_tokens:
            ids, starts = starts_in(tokenizer, given)
            return Prompt(ids, given, starts)
        ids = encode(tokenizer, given, body.add_special_tokens)
        return Prompt(ids, given, token_starts(tokenizer, ids)) if body.echo else Prompt(ids)
    if not body.echo or state.tokenizer is None:
        return Prompt(given)  # the engine says which id is none of the vocabulary
    text = state.tokenizer.decode(given, skip_special_tokens=False)
    return Prompt(given, text, token_starts(state.tokenizer, given))


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text, with the special tokens around it or without."""
    return tokenizer.encode(text) if add_special_tokens else tokenizer.encode_with_ends(text)[0]


def chat_prompt(state: ServerState, body: ChatRequest) -> Prompt:
    """That of a conversation; a template writes special tokens itself, where it wants them."""
    text = conversation(state, body)
    return _truncated(state, Prompt(encode(state.text_tokenizer(), text, body.add_special_tokens)), body)


def conversation(state: ServerState, body: ChatRequest | TokenizeRequest) -> str:
    """The text of a conversation, by the model's chat template."""
    state.text_tokenizer()
    check_template_arguments(body.chat_template_kwargs)
    if state.template is None:
        raise ApiError(400, "messages: the model has no chat template; start the server with --chat-template")
    plain = []
    for message in body.messages or ():
        if isinstance(message.content, list):
            other = [part.type for part in message.content if part.type != "text"]
            if other:
                raise ApiError(400, f"messages: parts of type {other[0]!r} are not supported", param="messages")
            if any(part.text is None for part in message.content):
                raise ApiError(400, "messages: a part of type 'text' has no text", param="messages")
        plain.append(message.model_dump(exclude_unset=True))
    return state.template.render(
        plain,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tools=body.tools or None,
        variables=body.chat_template_kwargs,
    )
