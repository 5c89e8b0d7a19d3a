"""Instances beside each other: working at the same time, and failing without taking the others along."""

import threading

import jax
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from cmjax.mesh import fabric
from cmjax.mesh.native import build
from cmjax.moe import FabricExchange
from cmjax.schedule import CompilePlan
from cmjax.serve import SamplingParams
from tests.helpers import tiny_model
from tests.serve.driving import chunk_plan, make_engine


def test_three_instances_at_the_same_time():
    """Two prefill instances and the decode instance, 384 devices in all, each driven by its own thread."""
    model = tiny_model(n_routed_experts=64, num_hidden_layers=2)
    engine = make_engine(model, 320, prefill_ep_size=32, num_prefill_instances=2, max_num_batched_tokens=64)
    assert len(engine.pools.devices) == 384
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    expected = engine.generate(prompts, SamplingParams(max_tokens=3)).outputs
    outcome: dict[str, list] = {}

    def run_prefill(name, source):
        batch = source.pack(chunk_plan(source, [(0, prompts[0], [0], 0, 5), (1, prompts[1], [1], 0, 3)]))
        outcome[name] = [np.asarray(source.step(batch).token_ids)[:2] for _ in range(6)]

    def run_steps():
        plan = CompilePlan(engine.decode.variants_for(4, ()))
        outcome["decode"] = [engine.decode.run(plan) for _ in range(6)]

    work = [threading.Thread(target=run_prefill, args=(f"prefill{i}", one)) for i, one in enumerate(engine.prefill)]
    work.append(threading.Thread(target=run_steps))
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(timeout=240)
    assert not any(thread.is_alive() for thread in work)
    assert set(outcome) == {"prefill0", "prefill1", "decode"}
    first = [output.token_ids[0] for output in expected]
    for name in ("prefill0", "prefill1"):
        for token_ids in outcome[name]:
            np.testing.assert_array_equal(token_ids, first)


class BreakableExchange(FabricExchange):
    """Fails on one rank, before its dispatch, while `broken` is set."""

    broken = False

    def dispatch(self, x, slot_idx, *, channel):
        def check(rank):
            if type(self).broken and int(rank) == 3:
                raise RuntimeError("rank 3 is broken")
            return np.int32(0)

        zero = io_callback(check, jax.ShapeDtypeStruct((), np.int32), lax.axis_index(self.axis_name))
        return super().dispatch(x, slot_idx + zero, channel=channel)


def test_one_rank_s_failure_ends_the_step_with_one_error_and_nothing_more():
    engine = make_engine(tiny_model(num_hidden_layers=2), 8, prefill_ep_size=4, exchange=BreakableExchange)
    prompts, sampling = [[1, 2, 3], [4, 5]], SamplingParams(max_tokens=5)
    expected = [output.token_ids for output in engine.generate(prompts, sampling).outputs]
    fabric.configure(timeout_s=0.5)
    BreakableExchange.broken = True
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"rank 3 is broken|missing ranks: 3"):
            engine.generate(prompts, sampling)
    finally:
        BreakableExchange.broken = False
        fabric.configure(timeout_s=120)
    assert build.load().library.cmjax_fabric_num_live() == 0
    assert [output.token_ids for output in engine.generate(prompts, sampling).outputs] == expected
