"""langchain-openai: its model for chats and the one for completions."""

import asyncio

from exchange import LONG, MAX_TOKENS, MESSAGES, PROMPT, STOP, TOOL, URL, answer, error_of, report, stream
from langchain_openai import ChatOpenAI, OpenAI

OPTIONS = {"model": "demo", "base_url": URL, "api_key": "none", "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(max_tokens=MAX_TOKENS, stream_usage=True, **OPTIONS)
completion = OpenAI(max_tokens=MAX_TOKENS, **OPTIONS)


def used(message):
    return message.usage_metadata["input_tokens"], message.usage_metadata["output_tokens"]


def whole(message):
    return answer(message.content, used(message), message.response_metadata["finish_reason"])


def joined(chunks):
    message = chunks[0]
    for chunk in chunks[1:]:
        message += chunk
    return stream([chunk.content for chunk in chunks], used(message), message.response_metadata["finish_reason"])


async def streamed():
    return joined([chunk async for chunk in chat.astream(MESSAGES)])


generated = completion.generate([PROMPT])
usage = generated.llm_output["token_usage"]
finish = generated.generations[0][0].generation_info["finish_reason"]
scored = chat.bind(logprobs=True, top_logprobs=1).invoke(MESSAGES).response_metadata["logprobs"]["content"]
report(
    chat=whole(chat.invoke(MESSAGES)),
    chat_stream=joined(list(chat.stream(MESSAGES))),
    chat_stream_async=asyncio.run(streamed()),
    together=[whole(message) for message in chat.batch([MESSAGES] * 6)],
    completion=answer(generated.generations[0][0].text, (usage["prompt_tokens"], usage["completion_tokens"]), finish),
    pieces=list(completion.stream(PROMPT)),
    stopped=completion.invoke(PROMPT, stop=[STOP]),
    logprobs=[one["logprob"] for one in scored],
    too_long=error_of(chat.invoke, LONG),
    tools=error_of(chat.bind_tools([TOOL]).invoke, MESSAGES),
)
