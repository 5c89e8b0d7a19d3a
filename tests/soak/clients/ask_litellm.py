"""litellm, by its provider for servers that are like vLLM, and by the one for those that are like OpenAI."""

import asyncio

import litellm
from exchange import LONG, MAX_TOKENS, MESSAGES, PROMPT, STOP, TOOL, URL, answer, error_of, report, stream

GREEDY = {"api_base": URL, "api_key": "none", "temperature": 0, "max_tokens": MAX_TOKENS, "num_retries": 0}
VLLM = {"model": "hosted_vllm/demo", **GREEDY}
OPENAI = {"model": "openai/demo", **GREEDY}
TEXT = {"model": "text-completion-openai/demo", **GREEDY}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def whole(result):
    (choice,) = result.choices
    text = choice.message.content if hasattr(choice, "message") else choice.text
    return answer(text, (result.usage.prompt_tokens, result.usage.completion_tokens), choice.finish_reason)


def joined(chunks):
    choices = [choice for chunk in chunks for choice in chunk.choices]
    pieces = [(choice.delta.content if hasattr(choice, "delta") else choice.text) or "" for choice in choices]
    (usage,) = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    (finish,) = {choice.finish_reason for choice in choices if choice.finish_reason}
    return stream(pieces, (usage.prompt_tokens, usage.completion_tokens), finish)


async def streamed():
    return joined([chunk async for chunk in await litellm.acompletion(messages=MESSAGES, **VLLM, **STREAM)])


report(
    chat=whole(litellm.completion(messages=MESSAGES, **VLLM)),
    chat_as_openai=whole(litellm.completion(messages=MESSAGES, **OPENAI)),
    chat_stream=joined(list(litellm.completion(messages=MESSAGES, **VLLM, **STREAM))),
    chat_stream_as_openai=joined(list(litellm.completion(messages=MESSAGES, **OPENAI, **STREAM))),
    chat_stream_async=asyncio.run(streamed()),
    completion=whole(litellm.text_completion(prompt=PROMPT, **TEXT)),
    completion_stream=joined(list(litellm.text_completion(prompt=PROMPT, **TEXT, **STREAM))),
    stopped=litellm.text_completion(prompt=PROMPT, stop=STOP, **TEXT).choices[0].text,
    too_long=error_of(litellm.completion, messages=[{"role": "user", "content": LONG}], **VLLM),
    too_long_as_openai=error_of(litellm.completion, messages=[{"role": "user", "content": LONG}], **OPENAI),
    tools=error_of(litellm.completion, messages=MESSAGES, tools=[TOOL], **VLLM),
)
