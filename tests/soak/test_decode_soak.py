"""Decode steps by the thousand: no hang, no growth, and the last step as right as the first."""

import ctypes
import sys

import jax
import numpy as np
import psutil
import pytest

from cmjax.mesh.native import build
from cmjax.serve import SamplingParams
from tests.parity import load_case
from tests.schedule.invariants import check_scheduler
from tests.serve.driving import Drive, make_engine, make_requests, model_of

STEPS_PER_CALL = 10
MAX_GROWTH_BYTES = 40 * 2**20


def resident_bytes() -> int:
    """Memory in use; on Linux after returning what threads have freed and glibc keeps in their arenas."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize(
    ("ep_size", "num_turns", "calls_a_turn"),
    [(8, 2, 3), pytest.param(320, 5, 20, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])],
    ids=["60 steps on 8 devices", "a thousand steps on 320 devices"],
)
def test_many_decode_steps(ep_size, num_turns, calls_a_turn):
    """In turns of fresh requests, each of which runs to the end of its turn."""
    case = load_case("v3-ep320")
    engine = make_engine(
        model_of(case),
        ep_size,
        max_model_len=256,
        max_num_seqs_per_rank=8,
        block_size=16,
        steps_per_call=STEPS_PER_CALL,
    )
    before = 0
    for turn in range(num_turns):
        requests = make_requests(engine.model, case.prompt, STEPS_PER_CALL * calls_a_turn + 1)
        drive = Drive(engine, requests)
        plan = drive.prefill()
        for call in range(1, calls_a_turn + 1):
            drive.call(plan if call == 1 else None)
            assert drive.decode_planner.num_tokens == len(requests) * STEPS_PER_CALL * call
        assert {request.finish_reason for request in requests} == {"length"}
        check_scheduler(drive.scheduler)
        for row, request in enumerate(requests):
            num = min(case.num_clear(row), len(request.token_ids))
            np.testing.assert_array_equal(request.token_ids[:num], case.generated[row, :num])
        if turn == 1:
            before, arrays = resident_bytes(), len(jax.live_arrays())
    assert build.load().library.cmjax_fabric_num_live() == 0
    growth = resident_bytes() - before
    assert growth < MAX_GROWTH_BYTES, f"grew by {growth / 2**20:.0f} MiB in {num_turns - 2} turns"
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
