"""Ten minutes of mixed load with cancellations: afterwards no block, place, request or thread is left behind.

CMJAX_SOAK_MINUTES makes it shorter or longer.
"""

import asyncio
import gc
import os
import threading
import time

import httpx
import numpy as np
import psutil
import pytest

import cmjax
from cmjax.cli.options import BUNDLED_MODEL
from tests.http.serving import served, wait_until_idle
from tests.serve.driving import make_engine

MINUTES = float(os.environ.get("CMJAX_SOAK_MINUTES", "10"))
pytestmark = [pytest.mark.soak, pytest.mark.timeout(int(MINUTES * 60) + 600)]
NUM_CLIENTS = 48
MOST_GROWTH_MIB = 200


async def one_client(address, index, stop_at, counts):
    """Requests of all kinds, one after another; some are left in the middle."""
    rng = np.random.default_rng(index)
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        while time.monotonic() < stop_at:
            body = {
                "prompt": rng.integers(0, 2000, int(rng.integers(1, 120))).tolist(),
                "max_tokens": int(rng.integers(1, 60)),
                "temperature": float(rng.choice([0.0, 0.8])),
                "n": int(rng.integers(1, 4)),
                "stream": bool(rng.integers(2)),
                "priority": int(rng.integers(3)),
                "frequency_penalty": float(rng.choice([0.0, 0.5])),
                "logprobs": int(rng.integers(3)) if rng.integers(4) == 0 else None,
                "stop": ["\n\n"] if rng.integers(3) == 0 else None,
            }
            leaves = rng.integers(4) == 0
            try:
                if body["stream"]:
                    async with client.stream("POST", "/v1/completions", json=body) as answer:
                        assert answer.status_code == 200
                        async for _ in answer.aiter_lines():
                            if leaves and rng.integers(3) == 0:
                                break
                else:
                    timeout = float(rng.uniform(0.01, 0.5)) if leaves else 120
                    answer = await client.post("/v1/completions", json=body, timeout=timeout)
                    assert answer.status_code == 200
                counts["left" if leaves else "whole"] += 1
            except httpx.TimeoutException:
                assert leaves
                counts["left"] += 1


def test_nothing_is_left_behind():
    engine = make_engine(
        cmjax.load(BUNDLED_MODEL),
        8,
        prefill_ep_size=4,
        num_prefill_instances=2,
        max_num_seqs_per_rank=4,
        max_model_len=192,
        max_num_batched_tokens=512,
        num_kv_blocks=30,  # few: sequences are preempted
        num_speculative_tokens=1,
    )
    threads = set(threading.enumerate())
    engine.start()
    counts = {"whole": 0, "left": 0}
    memory = []

    async def load(address, seconds):
        stop_at = time.monotonic() + seconds
        await asyncio.gather(*(one_client(address, index, stop_at, counts) for index in range(NUM_CLIENTS)))

    try:
        with served(engine) as address:
            for _ in range(2):
                asyncio.run(load(address, MINUTES * 30))
                wait_until_idle(engine)
                gc.collect()
                memory.append(psutil.Process().memory_info().rss / 2**20)
        stats = engine.stats()
    finally:
        engine.shutdown(timeout=0)
    print(counts, memory, stats)
    assert counts["left"] > 10
    assert counts["whole"] > 10
    assert stats.num_preemptions > 0
    assert all(one.status == "ready" for one in stats.instances)
    assert memory[1] - memory[0] < MOST_GROWTH_MIB
    assert not {one for one in threading.enumerate() if one.is_alive()} - threads
