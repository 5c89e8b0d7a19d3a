"""Instances as shapes are those that an engine has; rows that devices store in tiles change nothing."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from cmjax.mesh import EP_AXIS
from cmjax.model import Model, convert_params, params_digest
from cmjax.quant import QuantArray
from cmjax.schedule import SERVING_SHAPES
from cmjax.serve import SamplingParams
from cmjax.serve.caching import CacheSettings
from cmjax.serve.instances import AbstractInstance
from tests.helpers import tiny_model
from tests.serve.driving import make_engine


def shapes(tree):
    """Shape, dtype and cut of every leaf; what is replicated or on the host is not cut."""

    def of(leaf):
        spec = getattr(getattr(leaf, "sharding", None), "spec", ())
        return leaf.shape, np.dtype(leaf.dtype).name, tuple(spec)

    return jax.tree.map(of, tree, is_leaf=lambda leaf: hasattr(leaf, "dtype") and not isinstance(leaf, QuantArray))


@pytest.mark.parametrize(
    ("ep_size", "quant", "shape", "settings"),
    [
        (4, None, 0, {}),
        (8, "int8", 0, {"num_speculative_tokens": 1, "microbatches": 2, "max_num_seqs_per_rank": 2}),
        (32, None, 1, {"num_speculative_tokens": 1}),
        (4, "int8", 1, {"num_kv_blocks": 9, "num_redundant_experts": None}),
    ],
)
def test_it_takes_what_the_engine_s_steps_take(ep_size, quant, shape, settings):
    model = tiny_model(num_nextn_predict_layers=1)
    # In bfloat16 decode keeps the matrices as they are stored, as everywhere but on a CPU.
    params = convert_params(model.params, quant, "bfloat16")
    model = Model(model.config, params, params_digest(model.config, params))
    engine = make_engine(model, ep_size, **settings)
    for executor in (engine.decode, engine.prefill[0]):
        sampling = SERVING_SHAPES[shape if executor.role == "decode" else -1]
        variant = [one for one in executor.serving_variants() if one.sampling == sampling][-1]  # the largest
        lowered = executor._lowered(variant, engine.settings.microbatches)
        abstract = AbstractInstance(
            executor.role,
            model.config,
            engine.settings,
            executor.instance.mesh,
            dtype=executor.model.dtype,
            quant=quant,
            shape=variant.sampling,
        )
        assert abstract.spec == executor.spec
        arguments, static = abstract.arguments()
        assert shapes(arguments[0]) == shapes(executor.params)
        assert shapes(arguments[1:3]) == shapes((executor.expert_to_slot, executor.cache))
        assert lowered.in_tree == abstract.trace().lower().in_tree
        wanted = [(a.shape, a.dtype) for a in jax.tree.leaves(lowered.args_info)]
        assert [(a.shape, a.dtype) for a in jax.tree.leaves(abstract.trace().lower().args_info)] == wanted
        assert static["spec"] == executor.spec
        assert abstract.local_bytes(abstract.cache) == abstract.cache_bytes


def test_an_abstract_mesh_traces():
    instance = AbstractInstance(
        "decode", tiny_model().config, make_engine(tiny_model(), 1).settings, AbstractMesh((320,), (EP_AXIS,))
    )
    traced = instance.trace()
    assert traced.out_info.token_ids.shape == (instance.settings.steps_per_call, 320)


def test_wide_rows_of_the_cache_change_no_token(monkeypatch):
    model = tiny_model(num_nextn_predict_layers=1)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, model.config.vocab_size, 40).tolist() for _ in range(3)]
    prompts += [prompts[0] + [7, 8, 9]]
    settings = {"num_speculative_tokens": 1, "max_num_seqs_per_rank": 2, "block_size": 4}

    def run():
        cache = CacheSettings(cache_block_size=8, dram_bytes=1 << 22, fetch="always")
        engine = make_engine(model, 2, num_decode_instances=1, cache=cache, **settings)
        tokens = [engine.generate([prompt], SamplingParams(max_tokens=8)).outputs[0].token_ids for prompt in prompts]
        return tokens, engine.decode.cache.shape[-1]

    plain, width = run()
    assert width == model.config.latent_width
    monkeypatch.setattr("cmjax.serve.steps.spec.stored_width", lambda width, mesh: -(-width // 128) * 128)
    wide, width = run()
    assert width == 128
    assert wide == plain
