"""pydantic-ai: an agent over `OpenAIChatModel`, with a history, streamed, and with a tool."""

import asyncio

from exchange import CHAT_STOP, LONG, MAX_TOKENS, MESSAGES, URL, answer, error_of, report, stream
from pydantic_ai import Agent
from pydantic_ai.messages import ModelRequest, ModelResponse, SystemPromptPart, TextPart, UserPromptPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

PARTS = {"system": SystemPromptPart, "user": UserPromptPart}
GREEDY = {"temperature": 0, "max_tokens": MAX_TOKENS}
agent = Agent(OpenAIChatModel("demo", provider=OpenAIProvider(base_url=URL, api_key="none")), model_settings=GREEDY)
history = [
    ModelResponse([TextPart(one["content"])])
    if one["role"] == "assistant"
    else ModelRequest([PARTS[one["role"]](one["content"])])
    for one in MESSAGES[:-1]
]
question = {"user_prompt": MESSAGES[-1]["content"], "message_history": history}


def used(usage):
    return usage.input_tokens, usage.output_tokens


async def streamed():
    async with agent.run_stream(**question) as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
        return stream(pieces, used(result.usage), result.response.finish_reason)


def weather() -> str:
    """The weather."""
    return "fine"


result = agent.run_sync(**question)
report(
    chat=answer(result.output, used(result.usage), result.response.finish_reason),
    chat_stream=asyncio.run(streamed()),
    stopped_chat=agent.run_sync(**question, model_settings={"stop_sequences": [CHAT_STOP]}).output,
    too_long=error_of(agent.run_sync, LONG),
    tools=error_of(Agent(agent.model, tools=[weather], model_settings=GREEDY).run_sync, **question),
)
