"""The `openai` package for Python, in blocking and asynchronous calls."""

import asyncio

import openai
from exchange import LONG, MAX_TOKENS, MESSAGES, PROMPT, STOP, TOOL, URL, answer, error_of, report, stream

GREEDY = {"model": "demo", "temperature": 0, "max_tokens": MAX_TOKENS}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
OPTIONS = {"base_url": URL, "api_key": "none", "max_retries": 0}
client = openai.OpenAI(**OPTIONS)


def used(usage):
    return usage.prompt_tokens, usage.completion_tokens


def whole(result):
    (choice,) = result.choices
    text = choice.message.content if hasattr(choice, "message") else choice.text
    return answer(text, used(result.usage), choice.finish_reason)


def joined(chunks):
    *events, last = chunks
    choices = [choice for event in events for choice in event.choices]
    pieces = [choice.delta.content if hasattr(choice, "delta") else choice.text for choice in choices]
    return stream(pieces, used(last.usage), choices[-1].finish_reason)


async def together(number):
    async with openai.AsyncOpenAI(**OPTIONS) as client:
        asked = [client.chat.completions.create(messages=MESSAGES, **GREEDY) for _ in range(number)]
        return [whole(result) for result in await asyncio.gather(*asked)]


async def streamed():
    async with openai.AsyncOpenAI(**OPTIONS) as client:
        events = await client.chat.completions.create(messages=MESSAGES, **GREEDY, **STREAM)
        return joined([event async for event in events])


chats, completions = client.chat.completions, client.completions
scored = chats.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY).choices[0].logprobs.content
report(
    models=[model.id for model in client.models.list()],
    chat=whole(chats.create(messages=MESSAGES, **GREEDY)),
    chat_stream=joined(chats.create(messages=MESSAGES, **GREEDY, **STREAM)),
    chat_stream_async=asyncio.run(streamed()),
    unlimited=whole(chats.create(model="demo", messages=MESSAGES, temperature=0)),
    together=asyncio.run(together(6)),
    completion=whole(completions.create(prompt=PROMPT, **GREEDY)),
    completion_stream=joined(completions.create(prompt=PROMPT, **GREEDY, **STREAM)),
    stopped=completions.create(prompt=PROMPT, stop=STOP, **GREEDY).choices[0].text,
    logprobs=[one.logprob for one in scored],
    tokens=[one.token for one in scored],
    too_long=error_of(completions.create, prompt=LONG, **GREEDY),
    tools=error_of(chats.create, messages=MESSAGES, tools=[TOOL], **GREEDY),
)
