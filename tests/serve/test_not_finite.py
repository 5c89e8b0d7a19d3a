"""NaN in a checkpoint ends a request with an error, never with tokens."""

import jax
import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.mesh import carve
from cmjax.model import Model
from cmjax.serve import Engine, EngineSettings, SamplingParams
from tests.helpers import tiny_model

SETTINGS = EngineSettings(max_model_len=32, max_num_seqs_per_rank=2, max_num_batched_tokens=16)


def on_one(devices):
    return carve(devices[:2], ep_size=1, num_prefill_instances=1)


def test_nan_weights_are_an_error_that_names_the_prompt(devices):
    good = tiny_model(num_hidden_layers=2)
    params = jax.tree.map(np.array, good.params)
    # One embedding row: prompt 1 reads it at once, prompt 0 only if it generates that token.
    params.embed[9] = np.nan
    engine = Engine(Model(good.config, params, "nan"), on_one(devices), settings=SETTINGS)
    with pytest.raises(UserError, match="prompt 1: its logits are not finite"):
        engine.generate([[1, 2, 3], [4, 9]], SamplingParams(max_tokens=3))
    with pytest.raises(UserError, match="prompt 0: its logits are not finite"):
        engine.generate([[9]], SamplingParams(max_tokens=3))


def test_nan_met_while_decoding_is_an_error(devices):
    good = tiny_model(num_hidden_layers=2)
    first = Engine(good, on_one(devices), settings=SETTINGS).generate([[1, 2]], SamplingParams(max_tokens=1))
    params = jax.tree.map(np.array, good.params)
    params.embed[first.outputs[0].token_ids[0]] = np.nan
    assert first.outputs[0].token_ids[0] not in (1, 2)
    engine = Engine(Model(good.config, params, "nan"), on_one(devices), settings=SETTINGS)
    with pytest.raises(UserError, match="prompt 0: its logits are not finite"):
        engine.generate([[1, 2]], SamplingParams(max_tokens=4))
