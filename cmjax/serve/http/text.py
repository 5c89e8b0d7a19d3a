"""From tokens to text as they come: characters of several tokens, stop strings, and conversations."""

import dataclasses
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cmjax.checkpoint import Tokenizer
from cmjax.serve.http.errors import ApiError


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, and holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take the next piece: `(what may be shown, the stop string that ends it)`."""
        if not self._stops:
            return text, None
        held = self._held + text
        found = [(held.find(stop), order) for order, stop in enumerate(self._stops)]
        first = min((one for one in found if one[0] >= 0), default=None)
        if first is not None:
            self._held = ""
            return held[: first[0]], self._stops[first[1]]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Detokenizer:
    """Text of token ids, one after another; bytes of a character that is not whole yet are held back."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend, self._skip = tokenizer.backend, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that is certain with this token, perhaps none."""
        text: str | None = self._stream.step(self._backend, token_id)
        if text is None:
            self._pending.append(token_id)
            return ""
        self._pending = []
        return text

    def flush(self) -> str:
        """What is left when nothing more comes: replacement characters for bytes that never became one."""
        pending, self._pending = self._pending, []
        return str(self._backend.decode(pending, skip_special_tokens=self._skip)) if pending else ""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A conversation as the model was trained to read it: Jinja, in a sandbox, as Hugging Face renders it."""

    source: str
    tokenizer: Tokenizer

    @classmethod
    def find(cls, folder: Path, tokenizer: Tokenizer, override: str | None = None) -> "ChatTemplate | None":
        """The template given (a file's path or its text), or the model folder's own; None where there is none."""
        if override is not None:
            is_file = "\n" not in override and "{" not in override
            source = Path(override).read_text(encoding="utf-8") if is_file else override
            return cls(source, tokenizer)
        if (folder / "chat_template.jinja").is_file():
            return cls((folder / "chat_template.jinja").read_text(encoding="utf-8"), tokenizer)
        return None if tokenizer.chat_template is None else cls(tokenizer.chat_template, tokenizer)

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool, **variables: Any) -> str:
        """The text of a conversation.

        Raises:
            ApiError: 400, where the template refuses the messages or cannot be rendered with them.
        """
        try:
            return self._template().render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self.tokenizer.bos_token or "",
                eos_token=self.tokenizer.eos_token or "",
                **{"tools": None, "documents": None, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ApiError(400, f"messages: the chat template refuses them: {error}", param="messages") from error

    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.source)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
