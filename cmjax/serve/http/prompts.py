"""What is to be continued, as token ids: texts, token ids or conversations, from the body of a request."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cmjax.checkpoint import Tokenizer, starts_in, token_starts
from cmjax.serve.http.errors import ApiError
from cmjax.serve.http.protocol import ChatRequest, CompletionRequest, Message
from cmjax.serve.http.state import ServerState


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
    return [_prompt(state, one, body) for one in several]


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
    text = conversation(
        state,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
    )
    return Prompt(encode(state.text_tokenizer(), text, add_special_tokens=False))


def conversation(state: ServerState, messages: Sequence[Message], **options: Any) -> str:
    """The text of a conversation; the options are those of `ChatTemplate.render`."""
    state.text_tokenizer()
    if state.template is None:
        raise ApiError(400, "messages: the model has no chat template; start the server with --chat-template")
    plain = []
    for message in messages:
        if isinstance(message.content, list):
            other = [part.type for part in message.content if part.type != "text"]
            if other:
                raise ApiError(400, f"messages: parts of type {other[0]!r} are not supported", param="messages")
        plain.append(message.model_dump(exclude_unset=True))
    return state.template.render(plain, **options)
