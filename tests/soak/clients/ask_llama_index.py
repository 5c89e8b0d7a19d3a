"""llama-index: `OpenAILike`, as a chat model and as one that completes texts."""

import asyncio

from exchange import LONG, MAX_TOKENS, MESSAGES, PROMPT, STOP, URL, answer, error_of, report, stream
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

OPTIONS = {"model": "demo", "api_base": URL, "api_key": "none", "temperature": 0, "max_tokens": MAX_TOKENS}
OPTIONS |= {"max_retries": 0, "context_window": 256}
USAGE = {"stream_options": {"include_usage": True}}
chat = OpenAILike(is_chat_model=True, is_function_calling_model=True, **OPTIONS)
completion = OpenAILike(is_chat_model=False, **OPTIONS)
messages = [ChatMessage(**message) for message in MESSAGES]


def used(raw):
    return raw.usage.prompt_tokens, raw.usage.completion_tokens


def joined(events):
    raw = [event.raw for event in events]
    (finish,) = {choice.finish_reason for one in raw for choice in one.choices if choice.finish_reason}
    return stream([event.delta or "" for event in events], used(raw[-1]), finish)


async def streamed():
    return joined([event async for event in await chat.astream_chat(messages, **USAGE)])


def weather() -> str:
    """The weather."""
    return "fine"


answered, completed = chat.chat(messages), completion.complete(PROMPT)
report(
    chat=answer(answered.message.content, used(answered.raw), answered.raw.choices[0].finish_reason),
    chat_stream=joined(list(chat.stream_chat(messages, **USAGE))),
    chat_stream_async=asyncio.run(streamed()),
    completion=answer(completed.text, used(completed.raw), completed.raw.choices[0].finish_reason),
    completion_stream=joined(list(completion.stream_complete(PROMPT, **USAGE))),
    stopped=completion.complete(PROMPT, stop=[STOP]).text,
    too_long=error_of(completion.complete, LONG),
    tools=error_of(chat.chat_with_tools, [FunctionTool.from_defaults(weather)], chat_history=messages),
)
