"""An engine of one's own behind the API, asked by several clients at once; an instance joins while they are served.

python scripts/serve.py
"""

import asyncio
import threading
import time

import openai
import uvicorn

import cmjax
from cmjax.checkpoint import Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.mesh import Supernode, carve, virtual_devices
from cmjax.serve import Engine, EngineSettings
from cmjax.serve.http import ServerSettings, create_app

PROMPTS = ["import os\n", "def mean(values):\n", "class Node:\n", "for i in range("]


async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
    """Stream a continuation; returns its text."""
    stream = await client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0, stream=True)
    return "".join([chunk.choices[0].text async for chunk in stream])


async def ask_all(address: str) -> list[str]:
    """All prompts at once."""
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
        return list(await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS)))


def main() -> None:
    """Serve, ask, add an instance, ask again."""
    virtual_devices(12)  # four to decode, two and two to prefill, and some that are free
    pools = carve(Supernode.preset("cloudmatrix384"), ep_size=4, prefill_ep_size=2, num_prefill_instances=1)
    settings = EngineSettings(max_model_len=128, max_num_seqs_per_rank=2, max_num_batched_tokens=128)
    engine = Engine(cmjax.load(BUNDLED_MODEL), pools, settings=settings)
    engine.start(print)
    app = create_app(engine, ServerSettings(model_name="demo"), Tokenizer.from_folder(BUNDLED_MODEL))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    first = asyncio.run(ask_all(address))
    for prompt, text in zip(PROMPTS, first, strict=True):
        print(repr(prompt), "->", repr(text))
    print("joined:", engine.fleet.add("prefill", 2))
    print("the same texts:", asyncio.run(ask_all(address)) == first)
    for one in engine.stats().instances:
        print(one.name, one.role, one.status, one.num_calls, "calls,", one.num_tokens, "tokens")
    server.should_exit = True
    thread.join()
    engine.shutdown()


if __name__ == "__main__":
    main()
