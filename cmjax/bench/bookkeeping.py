"""What the bookkeeping of a decode call costs: plan, pickle, unpickle and commit, without a device."""

import pickle
import time

import numpy as np

from cmjax.schedule import (
    DecodePlan,
    DecodePlanner,
    DecodeResult,
    DecodeSizes,
    DecodeVariant,
    PrefillPlan,
    PrefillPlanner,
    PrefillResult,
    PrefillSizes,
    PrefillVariant,
    ReceivePlan,
    Request,
    RequestTimes,
    SamplingParams,
    SamplingShape,
    Scheduler,
    SendPlan,
)
from cmjax.serve import RequestHandle
from cmjax.text import JsonObject

BOUND_MS = 10.0
PARTS = ("plan", "pickle", "unpickle", "commit", "deliver")
_PROMPT = 128
_NO_LOAD = np.zeros((0, 0), np.int64)


def run(*, ep_size: int = 320, seqs_per_rank: int = 8, num_steps: int = 8, rounds: int = 30) -> JsonObject:
    """Time calls in which every place of every rank goes on; the tokens are made up.

    Args:
        ep_size, seqs_per_rank: of the decode instance.
        num_steps: of a call.
        rounds: calls; each figure is the median.

    Returns:
        Milliseconds of each of `PARTS`, plan and result pickled as they would be for an executor in another process;
        "deliver", what is new of each request and its way to the client's handle, comes after it and is in no sum.
    """
    scheduler, planner, handles = _filled(ep_size, seqs_per_rank, num_steps, rounds + 1)
    rng = np.random.default_rng(0)
    taken: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in range(rounds + 1):
        times = [time.perf_counter()]
        plan = planner.plan(float(number))
        times.append(time.perf_counter())
        assert isinstance(plan, DecodePlan)
        assert len(plan.places) == ep_size * seqs_per_rank
        token_ids = rng.integers(0, 32_000, (num_steps, len(plan.places)), dtype=np.int32)
        result = DecodeResult(token_ids, np.zeros((58, ep_size), np.int64), 0.1)
        begin = time.perf_counter()
        packed = pickle.dumps(plan), pickle.dumps(result)
        middle = time.perf_counter()
        _, result = (pickle.loads(one) for one in packed)
        end = time.perf_counter()
        planner.commit(plan, result, float(number))
        committed = time.perf_counter()
        for request, update in scheduler.take_updates():
            handles[request].update(update, float(number))
        done = time.perf_counter()
        if number:  # the first one joins all rows
            parts = (times[1] - times[0], middle - begin, end - middle, committed - end, done - committed)
            for part, seconds in zip(PARTS, parts, strict=True):
                taken[part].append(seconds * 1e3)
    found = {part: float(np.median(values)) for part, values in taken.items()}
    return found | {"total": sum(found[part] for part in PARTS[:-1]), "rows": ep_size * seqs_per_rank}


def _filled(
    ep_size: int, seqs_per_rank: int, num_steps: int, num_calls: int
) -> tuple[Scheduler, DecodePlanner, dict[Request, RequestHandle]]:
    """A decode instance whose every place has a request that lasts for so many calls."""
    max_blocks = -(-(_PROMPT + num_steps * num_calls + 1) // 16)
    scheduler, shape, count = Scheduler(handoff_timeout_s=1e9), SamplingShape(), ep_size * seqs_per_rank
    prefill = PrefillSizes(count * max_blocks, 16, count, (PrefillVariant(count * _PROMPT, shape),))
    decode = DecodeSizes(
        num_ranks=ep_size,
        num_places=seqs_per_rank,
        num_blocks=seqs_per_rank * max_blocks,
        block_size=16,
        max_blocks=max_blocks,
        variants=(DecodeVariant(seqs_per_rank, num_steps, shape),),
    )
    source = scheduler.prefill["prefill0"] = PrefillPlanner("prefill0", "", 1, prefill, scheduler)
    target = scheduler.decode["decode0"] = DecodePlanner("decode0", "", decode, scheduler)
    source.is_compiled = target.is_compiled = target.is_patient = True
    handles = {}
    sampling = SamplingParams(max_tokens=num_steps * num_calls + 1, stop_token_ids=(40_000,))
    for index in range(count):
        request = Request(f"request {index}", [1] * _PROMPT, sampling, times=RequestTimes(0.0))
        handles[request] = RequestHandle(request.request_id, request.prompt_ids, request.times, lambda: None)
        scheduler.submit(request)
    while target.num_attempts > int(target.num_running):
        plan = source.plan(0.0)
        if isinstance(plan, PrefillPlan):
            source.commit(plan, PrefillResult(np.ones(len(plan.places), np.int32), _NO_LOAD, 0.0), 0.0)
        elif plan is not None:
            assert isinstance(plan, SendPlan)
            source.commit(plan, None, 0.0)
            received = target.plan(0.0, [(plan.transfer_id, plan.round)])
            assert isinstance(received, ReceivePlan)
            target.commit(received, None, 0.0)
    return scheduler, target, handles
