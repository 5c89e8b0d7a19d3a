"""A thousand streams at once on 384 devices: every one complete, and what one device says to the same prompts."""

import asyncio
import json

import httpx
import numpy as np
import pytest

import cmjax
from cmjax.bench.trace import Prompts
from cmjax.checkpoint import Tokenizer
from cmjax.cli.options import BUNDLED_MODEL, HELDOUT
from cmjax.mesh import Supernode, carve
from cmjax.serve import Engine, EngineSettings, SamplingParams
from tests.http.serving import served, wait_until_idle
from tests.serve.driving import make_engine

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
NUM_STREAMS, NUM_ALONE, MAX_TOKENS = 1000, 20, 24
CLEAR = 1e-3  # two best logits at least so far apart are the same ones whatever the order of sums


def clear_length(model, prompt, token_ids):
    """How many of the tokens come before the first close call of the model's two best."""
    logits = np.asarray(model.logits(np.array([[*prompt, *token_ids]])))[0][len(prompt) - 1 : -1]
    best = np.sort(logits, axis=-1)[:, -2:]
    close = np.flatnonzero(best[:, 1] - best[:, 0] < CLEAR)
    return int(close[0]) if len(close) else len(token_ids)


def assert_same(model, prompt, found, expected):
    if found != expected:
        parting = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        assert parting >= clear_length(model, prompt, expected), (prompt, found, expected)


def test_a_thousand_streams():
    model, tokenizer = cmjax.load(BUNDLED_MODEL), Tokenizer.from_folder(BUNDLED_MODEL)
    rng = np.random.default_rng(7)
    prompts = Prompts(rng, model.config.vocab_size, tokenizer, HELDOUT)
    asked = [prompts.cut(int(length)) for length in rng.integers(8, 64, NUM_STREAMS)]
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    one_device = make_engine(model, 1, max_num_seqs_per_rank=64, max_model_len=96, max_num_batched_tokens=1024)
    expected = [output.token_ids for output in one_device.generate(asked, sampling).outputs]
    for prompt, tokens in list(zip(asked, expected, strict=True))[:NUM_ALONE]:
        alone = one_device.generate([prompt], sampling).outputs[0].token_ids
        assert_same(model, prompt, alone, tokens)
    del one_device
    pools = carve(Supernode.preset("cloudmatrix384"))
    engine = Engine(model, pools, settings=EngineSettings(max_model_len=96, max_num_seqs_per_rank=8))
    assert len(pools.devices) == 384
    engine.start()
    running = []

    async def watch():
        while True:
            running.append(engine.stats().num_running)
            await asyncio.sleep(0.5)

    async def stream(client, prompt):
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True}
        ids, reason = [], None
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line.removeprefix("data: "))["choices"][0]
                    ids += choice["token_ids"]
                    reason = choice["finish_reason"] or reason
        assert reason == "length"
        return ids

    async def all_streams(address):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
            watching = asyncio.ensure_future(watch())
            found = await asyncio.gather(*(stream(client, prompt) for prompt in asked))
            watching.cancel()
            return found

    try:
        with served(engine) as address:
            found = asyncio.run(all_streams(address))
        wait_until_idle(engine)
    finally:
        engine.shutdown(timeout=0)
    assert max(running) > NUM_STREAMS // 4  # places for all of them, and prompts in turn
    for prompt, tokens, wanted in zip(asked, found, expected, strict=True):
        assert len(tokens) == MAX_TOKENS
        assert_same(model, prompt, tokens, wanted)
