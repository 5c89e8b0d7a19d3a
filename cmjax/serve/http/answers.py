"""What clients get: OpenAI's JSON for completions and chats, whole or in events."""

import asyncio
import json
import time
import uuid

from cmjax.api import ChatRequest, CompletionRequest, Prompt
from cmjax.serve import TokenLogprobs
from cmjax.serve.http.run import Piece, Run
from cmjax.serve.http.state import ServerState
from cmjax.text import JsonObject

_PLACES_AT_ONCE = 256  # log probabilities of so many take some milliseconds


class Answer:
    """Builds the answer to one call, piece by piece."""

    def __init__(self, state: ServerState, run: Run) -> None:
        self.state, self.run, self.prompts = state, run, run.prompts
        body: CompletionRequest | ChatRequest = run.body
        self.body = body
        self.is_chat = isinstance(body, ChatRequest)
        kind = "chat.completion" if self.is_chat else "text_completion"
        self.id = ("chatcmpl-" if self.is_chat else "cmpl-") + (body.request_id or uuid.uuid4().hex)
        is_chunk = self.is_chat and body.stream
        self.head = {
            "id": self.id,
            "object": f"{kind}.chunk" if is_chunk else kind,
            "created": int(time.time()),
            "model": state.settings.model_name,
        }
        # The same for every event: encoded once.
        self._prefix = json.dumps(self.head)[:-1] + ', "choices": ['
        self._begun: set[int] = set()

    # -- whole --------------------------------------------------------------------------------------------------------

    async def whole(self) -> JsonObject:
        """Wait for all choices."""
        choices: dict[int, JsonObject] = {}
        async for piece in self.run.pieces():
            part = await self._choice(piece)
            if piece.index not in choices:
                choices[piece.index] = part
                continue
            known = choices[piece.index]
            if self.is_chat:
                known["message"]["content"] += part["message"]["content"]
            else:
                known["text"] += part["text"]
            known["logprobs"] = _joined(known["logprobs"], part["logprobs"])
            known |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
            if "token_ids" in known:
                known["token_ids"] += part["token_ids"]
        ordered = [choices[index] for index in sorted(choices)]
        return {**self.head, "choices": ordered, "usage": self.usage(), "system_fingerprint": None}

    # -- in events ----------------------------------------------------------------------------------------------------

    def first_events(self) -> list[bytes]:
        """A chat's stream begins with the role of each choice."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        count = len(self.run.prompts) * self.run.num_choices
        roles = ({"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(count))
        return [self._event(role) for role in roles]

    async def event(self, piece: Piece) -> bytes:
        """One piece as a server-sent event."""
        if _is_long(piece):
            return await asyncio.to_thread(self._event_of, piece)
        return self._event_of(piece)

    def _event_of(self, piece: Piece) -> bytes:
        part = self._choice_of(piece)
        if self.is_chat:
            part["delta"] = {"content": part.pop("message")["content"]}
        return self._event(part)

    def last_event(self) -> bytes | None:
        """What has been used, where asked for."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return None
        return b"data: " + json.dumps({**self.head, "choices": [], "usage": self.usage()}).encode() + b"\n\n"

    def _event(self, choice: JsonObject) -> bytes:
        options = self.body.stream_options
        usage = f', "usage": {json.dumps(self.usage())}' if options and options.continuous_usage_stats else ""
        return f"data: {self._prefix}{json.dumps(choice)}]{usage}}}\n\n".encode()

    def usage(self) -> JsonObject:
        """Tokens in and out so far."""
        num_prompt, num_completion = self.run.num_prompt_tokens, self.run.num_completion_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": self.run.num_cached_tokens},
        }

    # -- a choice -----------------------------------------------------------------------------------------------------

    async def _choice(self, piece: Piece) -> JsonObject:
        if _is_long(piece):
            return await asyncio.to_thread(self._choice_of, piece)
        return self._choice_of(piece)

    def _choice_of(self, piece: Piece) -> JsonObject:
        is_first = piece.index not in self._begun
        self._begun.add(piece.index)
        part: JsonObject = {"index": piece.index}
        if self.is_chat:
            part["message"] = {"role": "assistant", "content": piece.text}
            part["logprobs"] = self._chat_logprobs(piece)
        else:
            prompt = piece.index // self.run.num_choices
            echo = self.prompts[prompt].text if is_first and self._echoes else ""
            part["text"] = echo + piece.text
            part["logprobs"] = self._completion_logprobs(piece, self.prompts[prompt], is_first)
            if isinstance(self.body, CompletionRequest) and self.body.prompt_logprobs is not None and is_first:
                part["prompt_logprobs"] = [self._by_id(one) for one in piece.prompt_logprobs or []]
        part |= {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        if self.body.return_token_ids:
            part["token_ids"] = piece.token_ids
            if is_first:
                part["prompt_token_ids"] = list(self.prompts[piece.index // self.run.num_choices].token_ids)
        return part

    @property
    def _echoes(self) -> bool:
        return isinstance(self.body, CompletionRequest) and self.body.echo

    def _completion_logprobs(self, piece: Piece, prompt: Prompt, is_first: bool) -> JsonObject | None:
        if not isinstance(self.body, CompletionRequest) or self.body.logprobs is None:
            return None
        tokens: list[tuple[int, int, TokenLogprobs | None]] = []
        if is_first and self._echoes:
            tokens += zip(prompt.starts, prompt.token_ids, piece.prompt_logprobs or [], strict=False)
        begin = len(prompt.text) if self._echoes else 0
        own = zip(piece.starts, piece.logprobs or [], strict=False)
        tokens += [(begin + start, one.token_id, one) for start, one in own]
        found: dict[str, list] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for start, token_id, one in tokens:
            found["text_offset"].append(start)
            found["tokens"].append(self.state.token_text(token_id))
            found["token_logprobs"].append(None if one is None else one.logprob)
            # The token itself is always among them.
            top = None if one is None else {self.state.token_text(i): p for i, p in (*one.top, (token_id, one.logprob))}
            found["top_logprobs"].append(top)
        return found

    def _chat_logprobs(self, piece: Piece) -> JsonObject | None:
        if piece.logprobs is None:
            return None

        def entry(token_id: int, logprob: float) -> JsonObject:
            of_token = list(self.state.served.text_tokenizer().token_bytes(token_id))
            return {"token": self.state.token_text(token_id), "logprob": logprob, "bytes": of_token}

        content = [
            entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*top) for top in one.top]}
            for one in piece.logprobs
        ]
        return {"content": content, "refusal": None}

    def _by_id(self, one: TokenLogprobs | None) -> JsonObject | None:
        if one is None:
            return None
        chosen = (one.token_id, one.logprob)
        return {
            str(token): {"logprob": p, "decoded_token": self.state.token_text(token)} for token, p in (*one.top, chosen)
        }


def _is_long(piece: Piece) -> bool:
    """Whether it takes long to write."""
    return len(piece.prompt_logprobs or ()) > _PLACES_AT_ONCE


def _joined(one: JsonObject | None, other: JsonObject | None) -> JsonObject | None:
    """The log probabilities of two pieces in a row, either kind."""
    if one is None or other is None:
        return one or other
    return {key: values and values + other[key] for key, values in one.items()}
