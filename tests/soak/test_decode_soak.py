"""A thousand decode steps on 320 devices: no hang, no growth, and the last step as right as the first."""

import ctypes
import sys

import jax
import numpy as np
import psutil
import pytest

from cmjax.mesh.native import build
from cmjax.serve import SamplingParams
from tests.parity import load_case
from tests.serve.driving import make_engine, make_requests, model_of, prefill_and_hand_off, reserve

STEPS_PER_CALL, NUM_CALLS = 10, 100
WARM_UP_CALLS = 40
MAX_GROWTH_BYTES = 40 * 2**20


def resident_bytes() -> int:
    """Memory in use; on Linux after returning what threads have freed and glibc keeps in their arenas."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_thousand_decode_steps_on_320_devices():
    case = load_case("v3-ep320")
    engine = make_engine(
        model_of(case), 320, num_prefill_instances=2, max_model_len=256, max_num_seqs_per_rank=8, block_size=16
    )
    target = engine.decode
    for call in range(NUM_CALLS):
        if call % 20 == 0:
            # Fresh requests: with 200 steps each, they all run until the next turn.
            for request in target.router.running():
                target.router.release(request)
            requests = make_requests(case.prompt, 201)
            reserve(target, requests)
            ended, _ = prefill_and_hand_off(engine.prefill[0], target, requests)
            for one in ended:
                one.request.append([one.token_id])
                engine.prefill[0].router.release(one.request)
        assert target.call(STEPS_PER_CALL) == len(requests) * STEPS_PER_CALL
        target.take_expert_load()
        if call == WARM_UP_CALLS:
            before = resident_bytes()
        if call % 20 == 19:
            for row, request in enumerate(requests):
                num = case.num_clear(row)
                np.testing.assert_array_equal(request.token_ids[:num], case.generated[row, :num])
    assert build.load().library.cmjax_fabric_num_live() == 0
    growth = resident_bytes() - before
    assert growth < MAX_GROWTH_BYTES, f"grew by {growth / 2**20:.0f} MiB in {NUM_CALLS - WARM_UP_CALLS} calls"
    arrays = len(jax.live_arrays())
    target.call(1)
    assert len(jax.live_arrays()) <= arrays + 8


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_generate_again_and_again_does_not_grow():
    """Places and blocks come back, and so does memory: 40 calls with prefill, hand-off and decode on 384 devices."""
    case = load_case("v3-ep320")
    engine = make_engine(model_of(case), 320, num_prefill_instances=2, max_num_seqs_per_rank=2)
    results = []
    for call in range(40):
        outputs = engine.generate(case.prompt.tolist(), SamplingParams(max_tokens=8)).outputs
        results.append([output.token_ids for output in outputs])
        if call == 15:
            before = resident_bytes()
    assert all(tokens == results[0] for tokens in results)
    growth = resident_bytes() - before
    assert growth < MAX_GROWTH_BYTES, f"grew by {growth / 2**20:.0f} MiB in 24 calls"
