"""The jitted steps themselves: tracing without memory, no needless compilation, and what was compiled."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cmjax import kernels
from cmjax.checkpoint.configs import find_config
from cmjax.mesh import fabric
from cmjax.model import PrefillBatch, abstract_params, num_params, place_params, reference
from cmjax.moe import FabricExchange
from cmjax.schedule import CompilePlan
from cmjax.serve import EngineSettings, Extras, SamplingParams, decode, prefill
from cmjax.serve.instances import AbstractInstance
from tests.helpers import max_error, tiny_model
from tests.serve.driving import Drive, fill_cache, make_engine, make_requests

V3 = find_config("deepseek-v3").config


def abstract_step(mesh):
    """An instance with V3's shapes."""
    settings = EngineSettings(
        max_model_len=4096,
        block_size=128,
        num_kv_blocks=64,
        steps_per_call=4,
        dispatch_dtype="int8",
        combine_dtype="bfloat16",
    )
    return AbstractInstance("decode", V3, settings, mesh)


def test_deepseek_v3_traces_on_320_devices_without_memory(make_mesh):
    assert 6.7e11 < num_params(abstract_params(V3)) < 6.9e11
    live = len(jax.live_arrays())
    instance = abstract_step(make_mesh(320))
    lowered = instance.trace().lower()
    output = lowered.out_info
    assert output.token_ids.shape == (4, 2560)
    assert output.cache.shape == instance.cache.shape
    assert output.slot_load.shape == (58, 320)
    text = lowered.as_text()
    assert "cmjax_fabric_start" in text
    assert len(jax.live_arrays()) == live


def test_deepseek_v3_prefill_traces_on_32_devices(make_mesh):
    instance = abstract_step(make_mesh(32))
    (params, maps, cache, _), static = instance.arguments()
    tokens = [jax.ShapeDtypeStruct((4096,), jnp.int32) for _ in range(4)]
    batch = PrefillBatch(*tokens, jax.ShapeDtypeStruct((33,), jnp.int32), jax.ShapeDtypeStruct((32, 64), jnp.int32))
    output = jax.eval_shape(
        lambda *args: prefill(*args, spec=static["spec"], extras=Extras(logits=True)), params, maps, cache, batch
    )
    assert output.all_logits.shape == (4096, 129280)
    assert output.last_hidden.shape == (32, 7168)
    assert output.last_hidden.dtype == jnp.bfloat16
    assert output.slot_load.shape == (59, 32 * 9)


class CountedExchange(FabricExchange):
    """Counts how often a step is traced, by the dispatches of its scanned MoE layers."""

    traced = 0

    def dispatch(self, *args, **kwargs):
        type(self).traced += 1
        return super().dispatch(*args, **kwargs)


def traces_of(function):
    before = CountedExchange.traced
    result = function()
    return result, CountedExchange.traced - before


@pytest.fixture(scope="module")
def engine():
    return make_engine(tiny_model(num_hidden_layers=2), 8, prefill_ep_size=4, exchange=CountedExchange)


ROWS = np.random.default_rng(2).integers(0, 101, (3, 24))


def test_one_trace_for_all_steps(engine):
    """Different prompts, lengths, numbers of requests and blocks: the first call traced it all."""
    sampling = SamplingParams(max_tokens=9)
    engine.generate([row.tolist() for row in ROWS], sampling)
    longer = [[5] * 60, [1], [2, 3]] * 5
    _, traces = traces_of(lambda: engine.generate(longer, sampling))
    assert traces == 0


def test_another_model_of_the_same_shape_does_not_recompile(engine):
    """Switching models on an instance: other params, the same compiled step."""
    other = tiny_model(seed=9, num_hidden_layers=2)
    first = run_steps(engine, ROWS, 12)
    switched = make_engine(other, 8, prefill_ep_size=4, exchange=CountedExchange)
    second, traces = traces_of(lambda: run_steps(switched, ROWS, 12))
    assert traces == 0
    assert max_error(second, first) > 0.1
    assert max_error(second, reference.logits(other.config, other.params, ROWS)) < 5e-5


def run_steps(engine, rows, num_prompt):
    """As `step_through`, by plain calls of the jitted steps."""
    target, num_steps = engine.decode, rows.shape[1] - num_prompt
    requests = make_requests(engine.model, rows[:, :num_prompt], num_steps + 1)
    drive = Drive(engine, requests)
    plan = drive.prefill(lambda request: int(rows[request.priority, num_prompt]))
    columns = drive.columns(plan)
    forced = np.full((num_steps, target.instance.ep_size * target.num_places), -1, np.int32)
    forced[: num_steps - 1, columns] = rows[:, num_prompt + 1 :].T
    output = decode(
        target.params, target.expert_to_slot, target.cache, target.enter(plan), forced, spec=target.spec,
        num_steps=num_steps, extras=Extras(logits=True),
    )  # fmt: skip
    target.cache = output.cache
    logits = np.stack([drive.logits[request] for request in requests])
    return np.concatenate([logits, np.asarray(output.logits)[:, columns].transpose(1, 0, 2)], axis=1)


def test_another_placement_does_not_recompile(engine, rng):
    """Rebalancing: experts move to other slots, params and maps with them; the logits stay, and so does the program."""
    target = engine.decode
    before = run_steps(engine, ROWS, 12)
    old = target.placement
    order = rng.permutation(old.num_physical_experts)
    moved_to = np.argsort(order)
    new = dataclasses.replace(
        old, physical_to_logical=old.physical_to_logical[:, order], expert_to_slot=moved_to[old.expert_to_slot]
    )
    kept = target.params, target.expert_to_slot
    stored = engine.model.params if kernels.is_native() else engine.model.input_major_params
    target.params = place_params(stored, new, target.spec.mesh)
    maps = new.expert_to_slot.astype(np.int32)
    target.expert_to_slot = jax.device_put(maps, NamedSharding(target.spec.mesh, P(None, "ep")))
    after, traces = traces_of(lambda: run_steps(engine, ROWS, 12))
    target.params, target.expert_to_slot = kept
    assert traces == 0
    assert max_error(after, before) < 1e-5


def test_the_step_returns_the_load_of_every_slot(engine):
    target = engine.decode
    fill_cache(target)
    batch = target.enter(Drive(engine, make_requests(engine.model, [[3], [4], [5]], 5)).skip_prefill(7))
    output = decode(target.params, target.expert_to_slot, target.cache, batch, spec=target.spec, num_steps=4)
    target.cache = output.cache
    config = target.model.config
    assert output.slot_load.shape == (len(config.moe_layer_ids), target.placement.num_physical_experts)
    np.testing.assert_array_equal(np.asarray(output.slot_load).sum(1), 3 * 4 * config.num_topk)
    np.testing.assert_array_equal((np.asarray(output.token_ids) >= 0).sum(0), [4, 4, 4, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(output.state.batch.positions, -1)


def compiled_decode(engine, num_steps=3):
    target = engine.decode
    batch = target.empty_state(target.variants_for(num_steps, ())[0])
    return decode.lower(
        target.params, target.expert_to_slot, target.cache, batch, spec=target.spec, num_steps=num_steps
    ).compile()


def compiled_prefill(engine):
    source = engine.prefill[0]
    batch = source.empty_batch(source.num_step_tokens)
    return prefill.lower(source.params, source.expert_to_slot, source.cache, batch, spec=source.spec).compile()


def test_the_cache_is_updated_in_place():
    """It is aliased from argument to result, and no step copies it: temporary memory does not grow with it."""
    model = tiny_model(num_hidden_layers=2, max_position_embeddings=2048)
    temporary = {"prefill": [], "decode": []}
    for max_model_len in (512, 2048):  # both longer than a chunk of attention
        engine = make_engine(model, 8, max_num_seqs_per_rank=2, max_model_len=max_model_len)
        for name, compiled, instance in (
            ("decode", compiled_decode(engine), engine.decode),
            ("prefill", compiled_prefill(engine), engine.prefill[0]),
        ):
            memory = compiled.memory_analysis()
            num_bytes = instance.cache.nbytes // instance.instance.ep_size
            assert memory.alias_size_in_bytes == num_bytes
            temporary[name].append((num_bytes, memory.temp_size_in_bytes))
    for (small, before), (large, after) in temporary.values():
        assert after - before < 0.05 * (large - small), temporary


@pytest.mark.parametrize("compiled", [compiled_decode, compiled_prefill])
def test_no_collective_of_xla_is_left(engine, compiled):
    text = compiled(engine).as_text()
    found = re.findall(r"all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute", text)
    assert not found
    assert "cmjax_fabric_start" in text


def test_exchanges_of_a_step():
    """A MoE layer exchanges counts, offsets and rows, and the rows again on their way back; decode nothing else."""
    engine = make_engine(tiny_model(num_hidden_layers=4), 8, prefill_ep_size=4)
    source, target = engine.prefill[0], engine.decode
    (prefill_step,), (decode_call,) = source.variants_for(16, ()), target.variants_for(3, ())
    source.run(CompilePlan((prefill_step,)))
    target.run(CompilePlan((decode_call,)))
    for run, expected in (
        (lambda: target._warm_up(decode_call, 1), {"all_to_all": 3 * 3 * 2, "ragged_all_to_all": 3 * 3 * 2}),
        (
            lambda: source._warm_up(prefill_step, 1),
            {"all_gather": 4, "all_to_all": 3 * 2, "ragged_all_to_all": 3 * 2, "psum": 1},
        ),
    ):
        fabric.traffic.reset()
        run()
        calls = {entry.collective: entry.calls for entry in fabric.traffic.snapshot().select("ub")}
        assert calls == expected
