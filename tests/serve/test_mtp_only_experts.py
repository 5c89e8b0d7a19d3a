"""A model whose only MoE layer is the MTP module's: prefill meets experts, decode none."""

import numpy as np

from cmjax.mesh import carve
from cmjax.model import Model, ModelConfig, init_params, reference
from cmjax.serve import Engine, EngineSettings, SamplingParams

CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    first_k_dense_replace=2,
    num_attention_heads=3,
    q_lora_rank=None,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    num_routed_experts=6,
    num_shared_experts=1,
    num_topk=2,
    num_mtp_layers=1,
)


def test_it_generates_the_references_tokens(devices):
    params = init_params(CONFIG, seed=3)
    engine = Engine(
        Model(CONFIG, params, "none"),
        carve(devices[:6], ep_size=3, num_prefill_instances=1),
        settings=EngineSettings(max_model_len=32, max_num_seqs_per_rank=1, max_num_batched_tokens=12),
    )
    prompt = [5, 9, 60, 2]
    result = engine.generate([prompt], SamplingParams(max_tokens=4))
    ids = list(prompt)
    for token in result.outputs[0].token_ids:
        logits = reference.logits(CONFIG, params, np.array([ids]))[0, -1]
        assert token == int(np.argmax(logits))
        ids.append(token)
    assert result.prefill_load.sum() == (len(prompt) - 1) * CONFIG.num_topk
    assert result.decode_load.sum() == 0
