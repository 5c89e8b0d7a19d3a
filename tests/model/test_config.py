"""Config: both styles of config.json, what an absent field means, and one clear error for what is not supported."""

import json
import math
import re

import jax
import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.model import ModelConfig, YarnConfig, abstract_params, num_bytes, num_params
from tests.parity import CASES, FOLDER

V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 11,
    "qk_rope_head_dim": 10,
    "v_head_dim": 9,
    "n_routed_experts": 24,
    "n_shared_experts": 2,
    "num_experts_per_tok": 7,
    "n_group": 8,
    "topk_group": 3,
    "first_k_dense_replace": 1,
}
V2 = V3 | {"model_type": "deepseek_v2"}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.5}

DEEPSEEK_V3 = {  # the published sizes
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def read(hf: dict, **changes: object) -> ModelConfig:
    return ModelConfig.from_hf(hf | changes)


def test_both_styles_mean_the_same():
    newer = read(V3, rope_parameters={"rope_type": "default", "rope_theta": 12345.0}, rope_interleave=True, head_dim=10)
    published = read(
        V3,
        rope_theta=12345.0,
        rope_scaling=None,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    assert newer == published
    assert newer.rope_theta == 12345.0


def test_both_styles_of_yarn_mean_the_same():
    newer = read(V3, rope_parameters=YARN | {"rope_theta": 5e4, "rope_type": "yarn"})
    assert newer == read(V3, rope_scaling=YARN, rope_theta=5e4)
    assert newer.yarn == YarnConfig(
        factor=40.0,
        original_max_position_embeddings=4096,
        mscale=1.0,
        mscale_all_dim=0.5,
        beta_fast=32.0,
        beta_slow=1.0,
    )


@pytest.mark.parametrize(
    ("hf", "scoring", "method", "normalized", "scaling"),
    [(V3, "sigmoid", "noaux_tc", True, 2.5), (V2, "softmax", "greedy", False, 1.0)],
    ids=["v3", "v2"],
)
def test_model_type_decides_what_is_absent(hf, scoring, method, normalized, scaling):
    config = read(hf)
    assert (config.scoring, config.topk_method) == (scoring, method)
    assert (config.norm_topk_prob, config.routed_scaling_factor) == (normalized, scaling)
    assert config.rope_interleave
    assert config.yarn is None
    assert (config.rope_theta, config.rms_norm_eps, config.moe_layer_freq) == (10000.0, 1e-6, 1)
    assert not config.attention_bias
    assert not config.tie_word_embeddings
    assert config.num_mtp_layers == 0
    assert config.moe_layer_ids == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(("name", "model_type"), [("V2", "deepseek_v2"), ("V3", "deepseek_v3")])
def test_the_architecture_alone_names_the_model_type(name, model_type):
    hf = {key: value for key, value in V3.items() if key != "model_type"}
    assert read(hf, architectures=[f"Deepseek{name}ForCausalLM"]).model_type == model_type


def test_other_makers_models_of_the_same_architecture():
    for changes in (
        {"model_type": "kimi_k2"},
        {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]},
        {"model_type": "someone_else", "architectures": ["DeepseekV3ForCausalLM"]},
    ):
        assert read(V3, **changes) == read(V3)
    assert read(V3, model_type="someone_else", architectures=["DeepseekV2ForCausalLM"]) == read(V2)


def test_null_groups_are_no_groups():
    for groups in ((None, None), (None, 1), (None, 3), (8, None)):
        assert read(V3, n_group=groups[0], topk_group=groups[1]) == read(V3, n_group=1, topk_group=1)
    limited = V2 | {"topk_method": "group_limited_greedy"}
    assert read(limited, n_group=None, topk_group=None) == read(limited, n_group=1, topk_group=1)


def test_greedy_has_one_group_whatever_the_file_says():
    assert read(V2, n_group=7, topk_group=9, topk_method="greedy") == read(V2, n_group=None, topk_group=None)


def test_v2_ignores_norm_topk_prob_and_says_so(caplog):
    assert not read(V2, norm_topk_prob=True).norm_topk_prob
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "norm_topk_prob" in caplog.text


@pytest.mark.parametrize(
    ("changes", "dense", "sparse"),
    [
        ({"first_k_dense_replace": 0}, (), (0, 1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 3, "moe_layer_freq": 2}, (0, 1, 2, 3, 5), (4,)),
        ({"first_k_dense_replace": 6}, (0, 1, 2, 3, 4, 5), ()),
        ({"first_k_dense_replace": 9}, (0, 1, 2, 3, 4, 5), ()),
        ({"n_routed_experts": None}, (0, 1, 2, 3, 4, 5), ()),
        ({"n_routed_experts": 0, "n_shared_experts": None}, (0, 1, 2, 3, 4, 5), ()),
        ({"first_k_dense_replace": 5, "moe_layer_freq": 7}, (0, 1, 2, 3, 4, 5), ()),
    ],
)
def test_which_layers_have_experts(changes, dense, sparse):
    config = read(V3, **changes)
    assert (config.dense_layer_ids, config.moe_layer_ids) == (dense, sparse)
    params = abstract_params(config)
    assert (params.dense is None, params.moe is None) == (not dense, not sparse)
    assert bool(config.num_routed_experts) == bool(sparse)


def test_the_mtp_layer_follows_the_same_rule():
    config = read(V3, num_nextn_predict_layers=1, first_k_dense_replace=6)
    assert config.moe_layer_ids == ()
    assert config.is_moe_layer(6)
    assert abstract_params(config).mtp.layer.mlp.router.shape == (1, 24, 40)
    assert config.num_cache_layers == 7


def test_no_shared_experts():
    config = read(V3, n_shared_experts=None)
    assert config.num_shared_experts == 0
    assert abstract_params(config).moe.mlp.shared is None


def test_derived_sizes():
    config = read(V3)
    assert (config.latent_width, config.qk_head_dim, config.num_cache_layers) == (24, 21, 6)
    assert config.softmax_scale == 21**-0.5


def test_yarn_scales():
    def m(mscale: float) -> float:
        return 0.1 * mscale * math.log(40) + 1

    both = read(V3, rope_scaling=YARN)
    assert both.softmax_scale == pytest.approx(21**-0.5 * m(0.5) ** 2)
    assert both.yarn.rope_factor == pytest.approx(m(1.0) / m(0.5))
    for absent in ("mscale", "mscale_all_dim"):
        yarn = read(V3, rope_scaling={key: value for key, value in YARN.items() if key != absent}).yarn
        assert yarn == read(V3, rope_scaling=YARN | {absent: 0}).yarn
        assert yarn.rope_factor == pytest.approx(m(1.0))
        assert yarn.softmax_factor == pytest.approx(1 if absent == "mscale_all_dim" else m(0.5) ** 2)
    assert read(V3, rope_scaling=YARN | {"attention_factor": 1.5}).yarn.rope_factor == 1.5
    assert read(V3, rope_scaling=YARN | {"factor": 1.0}).yarn.softmax_factor == 1.0


def test_yarn_correction_range_of_the_published_model():
    yarn = ModelConfig.from_hf(DEEPSEEK_V3 | {"rope_scaling": YARN}).yarn
    assert yarn.correction_range(64, 10000.0) == (10, 23)
    low, high = YarnConfig(factor=4, original_max_position_embeddings=4096, truncate=False).correction_range(64, 1e4)
    assert (low, high) == (pytest.approx(10.472, abs=1e-3), pytest.approx(22.513, abs=1e-3))


def test_yarn_takes_the_original_length_from_where_it_is():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert read(V3, rope_parameters=yarn, max_position_embeddings=77).yarn.original_max_position_embeddings == 77
    assert read(V3, rope_scaling=YARN, original_max_position_embeddings=55).yarn.original_max_position_embeddings == 55
    with pytest.raises(UserError, match="original_max_position_embeddings is missing"):
        read(V3, rope_parameters=yarn)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (V3, {"model_type": "llama"}, "model_type 'llama' is not supported; supported: deepseek_v2, deepseek_v3"),
        (V3, {"model_type": None}, "model_type is missing"),
        (V3, {"architectures": ["LlamaForCausalLM"]}, "architectures 'LlamaForCausalLM' is not supported"),
        (V3, {"architectures": ["DeepseekV2ForCausalLM"]}, "model_type 'deepseek_v3' contradicts architectures"),
        (V3, {"topk_method": "greedy"}, "topk_method 'greedy' is not supported for deepseek_v3; supported: noaux_tc"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported for deepseek_v2"),
        (
            V3,
            {"scoring_func": "softmax"},
            "scoring_func 'softmax' is not supported for deepseek_v3; supported: sigmoid",
        ),
        (
            V2,
            {"scoring_func": "sigmoid"},
            "scoring_func 'sigmoid' is not supported for deepseek_v2; supported: softmax",
        ),
        (V3, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        (
            V3,
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling type 'linear' is not supported; supported: default, yarn",
        ),
        (V3, {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters type 'llama3' is not supported"),
        (V3, {"rope_parameters": {"full_attention": {}}}, "a dict per layer type is not supported"),
        (V3, {"rope_scaling": [4]}, "rope_scaling must be a JSON object, got list"),
        (V3, {"rope_scaling": {"type": "yarn"}, "max_position_embeddings": 9}, "rope_scaling: factor is missing"),
        (V3, {"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling: factor must be a number, got '4'"),
        (V3, {"rope_scaling": YARN | {"factor": -4}}, "rope_scaling: factor (-4.0)"),
        (V3, {"rope_scaling": YARN | {"beta_fast": -1}}, "beta_fast (-1.0)"),
        (V3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported"),
        (V3, {"rope_theta": 0}, "rope_theta must be over 1"),
        (V3, {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number, got nan"),
        (V3, {"rms_norm_eps": -1e-6}, "rms_norm_eps at least 0"),
        (V3, {"mlp_bias": True}, "mlp_bias true is not supported"),
        (V3, {"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        (V3, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers 2 is not supported; supported: 0, 1"),
        (V3, {"num_key_value_heads": 3}, "num_key_value_heads (3) must equal num_attention_heads (5)"),
        (V3, {"n_group": 7}, "n_routed_experts (24) is not divisible by n_group (7)"),
        (V3, {"topk_group": 9}, "topk_group (9) is more than n_group (8)"),
        (V3, {"topk_group": 2}, "num_experts_per_tok (7) is more than the 6 experts of the 2 kept groups"),
        (V2, {"num_experts_per_tok": 25}, "num_experts_per_tok (25) is more than the 24 experts"),
        (V3, {"n_group": 24, "topk_group": 24}, "leaves one a group"),
        (V3, {"model_type": "kimi_k2", "architectures": ["KimiForCausalLM"]}, "architectures 'KimiForCausalLM' is not"),
        (V3, {"model_type": "kimi_k2", "architectures": ["DeepseekV2ForCausalLM"]}, "model_type 'kimi_k2' contradicts"),
        (V3, {"n_group": 0}, "n_group must be at least 1, got 0"),
        (V3, {"num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1, got 0"),
        (V3, {"n_routed_experts": -4}, "n_routed_experts must be at least 1, got -4"),
        (V3, {"n_shared_experts": -1}, "n_shared_experts must be at least 0, got -1"),
        (V3, {"moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1, got 0"),
        (V3, {"moe_layer_freq": 0}, "moe_layer_freq must be at least 1, got 0"),
        (V3, {"moe_layer_freq": [1, 0]}, "moe_layer_freq must be an integer, got [1, 0]"),
        (V3, {"first_k_dense_replace": -1}, "first_k_dense_replace must be at least 0, got -1"),
        (V3, {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        (V3, {"hidden_size": 40.5}, "hidden_size must be an integer, got 40.5"),
        (V3, {"hidden_size": True}, "hidden_size must be an integer, got True"),
        (V3, {"vocab_size": "97"}, "vocab_size must be an integer, got '97'"),
        (V3, {"num_hidden_layers": -3}, "num_hidden_layers must be at least 1, got -3"),
        (V3, {"q_lora_rank": 0}, "q_lora_rank must be at least 1, got 0"),
        (V3, {"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, got 7"),
        (V3, {"eos_token_id": "</s>"}, "eos_token_id must be an integer or a list of them"),
        (V3, {"eos_token_id": [1, None]}, "eos_token_id must be an integer or a list of them"),
    ],
)
def test_what_is_not_supported_is_one_clear_error(base, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(base, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in V3 if name not in ("model_type", "first_k_dense_replace")])
def test_every_size_must_be_there(name):
    with pytest.raises(UserError, match=f"{name} is missing"):
        ModelConfig.from_hf({key: value for key, value in V3.items() if key != name})


def test_the_file_must_hold_an_object():
    with pytest.raises(UserError, match="must be a JSON object, got list"):
        ModelConfig.from_hf([V3])


@pytest.mark.parametrize("name", CASES)
def test_to_hf_gives_the_same_config_back(name):
    config = ModelConfig.from_hf(json.loads((FOLDER / name / "config.json").read_text()))
    again = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert again == config
    assert again.digest == config.digest


def test_to_hf_keeps_yarn_and_several_eos_tokens():
    yarn = YARN | {"attention_factor": 1.25, "truncate": False}
    config = read(V3, rope_scaling=yarn, eos_token_id=[1, 5], q_lora_rank=None, n_shared_experts=0)
    assert config.eos_token_id == (1, 5)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_digest_tells_configs_apart():
    configs = [read(V3), read(V3, rms_norm_eps=1e-5), read(V3, topk_group=4), read(V3, rope_scaling=YARN)]
    configs += [read(V3, rope_scaling=YARN | {"mscale": 0.9}), read(V3, eos_token_id=3)]
    assert len({config.digest for config in configs}) == len(configs)


def test_shapes_and_memory_of_deepseek_v3_need_no_memory():
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    main = num_params(abstract_params(config).replace(mtp=None))
    assert main == 671_026_419_200  # as published: 671B
    whole = abstract_params(config, "bfloat16")
    assert num_params(whole) - main == pytest.approx(14e9, rel=0.05)
    assert whole.moe.mlp.experts.w13.shape == (58, 256, 4096, 7168)
    small = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(whole) if leaf.dtype == np.float32)
    assert num_bytes(whole) == 2 * num_params(whole) + 2 * small
