"""The ratio of prefill to decode can change while requests run: instances of a small mesh."""

import pytest

from cmjax.errors import UserError
from cmjax.mesh import carve
from cmjax.serve import Engine, EngineSettings, SamplingParams
from cmjax.serve.instances import JaxExecutor
from tests.helpers import tiny_model
from tests.serve.driving import MACHINE


def test_instances_join_and_leave_while_requests_run(monkeypatch):
    monkeypatch.setattr(
        JaxExecutor, "serving_shapes", JaxExecutor.serving_shapes[:1]
    )  # greedy ones alone: fewer programs
    model = tiny_model(num_hidden_layers=2)
    pools = carve(MACHINE, ep_size=4, prefill_ep_size=2, num_prefill_instances=1)
    settings = EngineSettings(max_model_len=64, max_num_seqs_per_rank=1, max_num_batched_tokens=32, steps_per_call=4)
    engine = Engine(model, pools, settings=settings)
    prompts = [[1 + index, 2, 3] * (1 + index % 5) for index in range(16)]
    sampling = SamplingParams(max_tokens=24)
    expected = [output.token_ids for output in engine.generate(prompts, sampling).outputs]
    engine.start()
    try:
        with pytest.raises(UserError, match="prefill0 is the last prefill instance"):
            engine.fleet.drain("prefill0")
        with pytest.raises(UserError, match="no 1000 neighbouring devices are free for another decode instance"):
            engine.fleet.add("decode", 1000)
        with pytest.raises(UserError, match="there is no running instance prefill9; there are prefill0, decode0"):
            engine.fleet.remove("prefill9")

        handles = [engine.submit(prompt, sampling) for prompt in prompts]
        names = [engine.fleet.add("prefill", 3), engine.fleet.add("decode", 2)]
        handles += [engine.submit(prompt, sampling) for prompt in prompts]
        engine.fleet.remove("decode0", timeout=0)  # at once: what it has goes on at the other one
        engine.fleet.remove("prefill0")
        handles += [engine.submit(prompt, sampling) for prompt in prompts]
        assert [handle.result(timeout=120).token_ids for handle in handles] == expected * 3
        stats = engine.stats()
        assert [one.name for one in stats.instances] == names == ["prefill1", "decode1"]
        assert all(one.num_tokens > 0 and one.num_used_blocks == 0 for one in stats.instances)
    finally:
        engine.shutdown(timeout=0)
