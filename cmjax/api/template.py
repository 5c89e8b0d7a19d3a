"""Conversations as a model was trained to read them: its chat template, in Hugging Face's environment."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cmjax.api.errors import ApiError
from cmjax.errors import UserError
from cmjax.text import JsonObject, Tokenizer

# What a template is given under names of its own; template arguments cannot replace it.
_FIELDS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
_END_OF_FINAL = "<end of the final message> "


class ChatTemplate:
    """A chat template, compiled once: Jinja, in a sandbox, with what transformers' `apply_chat_template` offers it.

    Attributes:
        source: of the default one.
        takes_parts: whether it looks into content that is a list of parts; another one is given their text.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, where: str = "chat template", tool_source: str | None = None
    ) -> None:
        """`tool_source`: of the template for requests with tools, where the model has one of its own.

        Raises:
            UserError: `where` it comes from, and what is wrong with it.
        """
        self.source = source
        self._made_of = source, tokenizer, where, tool_source
        self._special_tokens = tokenizer.special_tokens
        environment = _environment()
        self._plain = _compile(environment, source, where)
        self._with_tools = self._plain if tool_source is None else _compile(environment, tool_source, where)
        self.takes_parts = _looks_into_content(environment.parse(source))

    def __reduce__(self) -> tuple[type["ChatTemplate"], tuple[object, ...]]:
        return ChatTemplate, self._made_of  # a compiled template cannot be pickled

    @classmethod
    def find(cls, folder: Path, tokenizer: Tokenizer, override: str | None = None) -> "ChatTemplate | None":
        """The template given (a file's path, the name of one of the model's, or a text), or the model's own; None where
        there is none.

        Raises:
            UserError: there is no such file, or none of several is the default one; the template is broken.
        """
        templates = tokenizer.chat_templates
        if override is None:
            if not templates:
                return None
            if "default" not in templates and len(templates) > 1:
                names = ", ".join(sorted(templates))
                raise UserError(f"{folder}: none of its chat templates is the default; --chat-template takes {names}")
            name = "default" if "default" in templates else next(iter(templates))
            return cls(templates[name], tokenizer, f"{folder}: chat template", templates.get("tool_use"))
        if override in templates:
            return cls(templates[override], tokenizer, f"{folder}: chat template {override!r}")
        if "\n" in override or "{" in override:
            return cls(override, tokenizer, "--chat-template")
        try:
            source = Path(override).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"--chat-template {override}: {reason}") from error
        return cls(source, tokenizer, override)

    def render(
        self,
        messages: Sequence[JsonObject],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[object] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: as they were sent.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: end within the last message, for the model to go on with it.
            tools: that the model may call, by their JSON schemas.
            variables: other arguments; they come before special tokens of the same name.

        Raises:
            ApiError: 400, where the template refuses the messages or cannot be rendered with them.
        """
        variables = variables or {}
        for name in _FIELDS:
            if name in variables:
                message = f"chat_template_kwargs: {name!r} is no argument of a template but a field of the request"
                raise ApiError(400, message, param="chat_template_kwargs")
        if add_generation_prompt and continue_final_message:
            message = "continue_final_message: a prompt ends in the last message or begins a new one, not both"
            raise ApiError(400, f"{message}; add_generation_prompt is true", param="continue_final_message")
        given = [dict(message) if self.takes_parts else _with_plain_text(message) for message in messages]
        final = _mark_end(given) if continue_final_message else ""
        arguments = {**self._special_tokens, **variables, "messages": given, "tools": tools, "documents": None}
        template = self._plain if tools is None else self._with_tools
        try:
            text = template.render({**arguments, "add_generation_prompt": add_generation_prompt})
        except Exception as error:  # a template is a program of somebody's: it can fail in any way
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            message = f"messages: the chat template refuses them: {kind}{error}"
            raise ApiError(400, message, param="messages") from error
        return _until_mark(text, final) if continue_final_message else text


def _compile(environment: jinja2.Environment, source: str, where: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: {error}") from error


# -- content ----------------------------------------------------------------------------------------------------------


def _looks_into_content(tree: nodes.Template) -> bool:
    """Whether a template asks what kind of thing a `content` is, or loops over one."""
    names = {"content"}
    for assigned in tree.find_all(nodes.Assign):
        if _is_content(assigned.node, names) and isinstance(assigned.target, nodes.Name):
            names.add(assigned.target.name)
    asked = (test.node for test in tree.find_all(nodes.Test) if test.name in ("string", "iterable", "sequence"))
    looped = (loop.iter for loop in tree.find_all(nodes.For))
    return any(_is_content(node, names) for node in (*asked, *looped))


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _is_content(node.node, names)
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _with_plain_text(message: JsonObject) -> JsonObject:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": "".join(part.get("text") or "" for part in content)}


def _mark_end(messages: list[JsonObject]) -> str:
    """Put a mark behind the text of the last message, which is returned."""
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + _END_OF_FINAL
        return content
    parts = [dict(part) for part in content or []]
    for part in reversed(parts):
        if isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _END_OF_FINAL
            last["content"] = parts
            return text
    raise ApiError(400, "continue_final_message: the last message has no text to continue", param="messages")


def _until_mark(text: str, final: str) -> str:
    mark = _END_OF_FINAL.strip()
    if mark not in text or final.strip() not in text:
        message = "continue_final_message: the chat template does not show the last message as it is"
        raise ApiError(400, message, param="continue_final_message")
    at = text.rindex(mark)
    # A template that trims messages has trimmed what follows the mark, and would have trimmed what comes before it.
    found = text[:at] if text[at:].startswith(_END_OF_FINAL) else text[:at].rstrip()
    return found.replace(_END_OF_FINAL, "").replace(mark, "")  # of a template that shows it twice


# -- the environment --------------------------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the model is trained to say: its body as it is."""

    tags: set[str] = {"generation"}  # noqa: RUF012 # as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
