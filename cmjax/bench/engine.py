"""The engine under requests: a full decode step beside one with a single request, and decode during a long prefill."""

import dataclasses

import numpy as np
from rich.table import Table

from cmjax.bench import bookkeeping
from cmjax.bench.report import machine
from cmjax.bench.tables import define, new_table
from cmjax.mesh import Supernode, carve
from cmjax.model import Model
from cmjax.schedule import Call
from cmjax.serve import Engine, EngineSettings, SamplingParams
from cmjax.text import JsonObject

_BLOCK_SIZE = 16
_SHORT = 12  # prompt tokens of the requests that fill the places
BOUNDS = {"full_over_one": 4.0, "longest_gap_over_median": 3.0, "bookkeeping_ms": bookkeeping.BOUND_MS}
DEFINITIONS = {
    "one": "a step while one request decodes",
    "full": "a step while every place of every rank decodes",
    "bookkeeping": "plan, pickle, unpickle and commit of a call with every place going on, plan and result pickled, "
    "without a device",
    "gap": "from the end of a decode call to the end of the next, while the long prompt is prefilled",
}


def run(model: Model, *, ep_size: int, seqs_per_rank: int, prompt_tokens: int, num_steps: int) -> JsonObject:
    """Measure on the preset machine; every call is one of the engine's own, between its own threads.

    Args:
        model: run with positions as far as the long prompt needs; what it says is of no interest here.
        ep_size, seqs_per_rank: of the decode instance.
        prompt_tokens: of the long prompt.
        num_steps: of a decode call.
    """
    longest = prompt_tokens + 2 * _BLOCK_SIZE
    config = dataclasses.replace(
        model.config, max_position_embeddings=max(longest, model.config.max_position_embeddings)
    )
    short = _SHORT + 12 * num_steps
    settings = EngineSettings(
        max_model_len=longest,
        max_num_seqs_per_rank=seqs_per_rank,
        steps_per_call=num_steps,
        num_kv_blocks=-(-longest // _BLOCK_SIZE) + seqs_per_rank * -(-short // _BLOCK_SIZE),
    )
    pools = carve(Supernode.preset("cloudmatrix384"), ep_size=ep_size)
    costs = bookkeeping.run(ep_size=ep_size, seqs_per_rank=seqs_per_rank, num_steps=num_steps)
    engine = Engine(Model(config, model.params, model.digest), pools, settings=settings)
    engine.start()
    try:
        one = _one(engine, num_steps)
        full = _full(engine, ep_size * seqs_per_rank, num_steps)
        gaps, calls = _gaps(engine, ep_size, prompt_tokens, num_steps)
    finally:
        engine.shutdown(timeout=0)
    return {
        "benchmark": "engine",
        "machine": machine(),
        "settings": {
            "ep_size": ep_size,
            "seqs_per_rank": seqs_per_rank,
            "prompt_tokens": prompt_tokens,
            "num_steps": num_steps,
            "prefill_instances": len(pools.prefill),
        },
        "step_s": {"one": one, "full": full},
        "gap_s": {"median": float(np.median(gaps)), "longest": max(gaps), "calls": len(calls)},
        "bookkeeping_ms": costs,
        "results": {
            "full_over_one": full / one,
            "longest_gap_over_median": max(gaps) / float(np.median(gaps)),
            "bookkeeping_ms": costs["total"],
        },
        "bounds": BOUNDS,
        "definitions": DEFINITIONS,
    }


def _prompt(index: int, length: int, engine: Engine) -> list[int]:
    return np.random.default_rng(index).integers(0, engine.model.config.vocab_size, length).tolist()


def _step_s(calls: list[Call], num_steps: int) -> float:
    return float(np.median([call.end - call.begin for call in calls])) / num_steps


def _calls(engine: Engine) -> list[Call]:
    (planner,) = engine.core.scheduler.decode.values()
    with engine.core.changed:
        return list(planner.calls)


def _one(engine: Engine, num_steps: int) -> float:
    seen = len(_calls(engine))
    engine.submit(_prompt(0, _SHORT, engine), SamplingParams(max_tokens=8 * num_steps + 1)).result()
    return _step_s(_calls(engine)[seen:], num_steps)


def _full(engine: Engine, num_places: int, num_steps: int) -> float:
    """Requests long enough that all of them decode together for some calls."""
    seen, sampling = len(_calls(engine)), SamplingParams(max_tokens=12 * num_steps)
    handles = [engine.submit(_prompt(index, _SHORT, engine), sampling) for index in range(num_places)]
    for handle in handles:
        handle.result()
    calls = _calls(engine)[seen:]
    most = max(call.num_seqs for call in calls)
    return _step_s([call for call in calls if call.num_seqs >= 0.99 * most], num_steps)


def _gaps(engine: Engine, ep_size: int, prompt_tokens: int, num_steps: int) -> tuple[list[float], list[Call]]:
    """One sequence a rank decodes while a long prompt is prefilled: seconds between the ends of calls meanwhile."""
    sampling = SamplingParams(max_tokens=12 * num_steps)
    running = [engine.submit(_prompt(index, _SHORT, engine), sampling) for index in range(ep_size)]
    while any(handle.times.first_token is None for handle in running):
        with engine.core.changed:
            engine.core.changed.wait(0.1)
    seen = len(_calls(engine))
    long = engine.submit(_prompt(1, prompt_tokens, engine), SamplingParams(max_tokens=2))
    long.result()
    for handle in running:
        handle.cancel()
    times = long.times
    assert times.scheduled is not None
    assert times.prefilled is not None
    calls = _calls(engine)[max(seen - 1, 0) :]
    during = [call for call in calls if call.end >= times.scheduled and call.begin <= times.prefilled]
    ends = [call.end for call in calls if call.end < times.scheduled][-1:] + [call.end for call in during]
    return np.diff(ends).tolist(), during


def tables(report: JsonObject) -> list[Table]:
    """The report as a table."""
    settings, results, bounds = report["settings"], report["results"], report["bounds"]
    title = (
        f"EP{settings['ep_size']}, {settings['seqs_per_rank']} places a rank, {settings['num_steps']} steps a call, "
        f"{settings['prefill_instances']} prefill instances"
    )
    found = new_table(title, "measure", "ms", "of", "ratio", "bound", numbers_from=1)
    step, gap = report["step_s"], report["gap_s"]
    rows = (
        ("full step", step["full"], f"{step['one'] * 1e3:.0f} for one request", "full_over_one"),
        (
            f"longest gap, prefill of {settings['prompt_tokens']:,} tokens",
            gap["longest"],
            f"{gap['median'] * 1e3:.0f} median of {gap['calls']}",
            "longest_gap_over_median",
        ),
    )
    for name, seconds, of, key in rows:
        found.add_row(name, f"{seconds * 1e3:.0f}", of, f"{results[key]:.2f}", f"{bounds[key]:g}")
    costs = report["bookkeeping_ms"]
    parts = ", ".join(f"{part} {costs[part]:.1f}" for part in ("plan", "pickle", "unpickle", "commit"))
    name = f"bookkeeping of a call, {costs['rows']:,} rows"
    found.add_row(name, f"{costs['total']:.1f}", parts, "", f"{bounds['bookkeeping_ms']:g} ms")
    return [define(found, report["definitions"])]
