"""What several tests share: one tolerance table, payloads that name their origin, skewed choices, tiny models."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from cmjax.checkpoint import save_hf
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.mesh import EP_AXIS
from cmjax.model import Model, ModelConfig, init_params, params_digest

# dtype name -> (rtol, atol) of one matrix product of unit-sized values; whatever only moves data is exact.
TOLERANCES = {"float32": (1e-5, 1e-6), "float16": (4e-3, 2e-3), "bfloat16": (2e-2, 1e-2)}


def assert_close(actual: Any, desired: Any, *, scale: float = 1.0) -> None:
    """Compare by the dtype of `actual`: floats by the table (times `scale`), everything else exactly."""
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape, f"shape {actual.shape}, expected {desired.shape}"
    if actual.dtype.name not in TOLERANCES:
        assert actual.dtype == desired.dtype, f"dtype {actual.dtype}, expected {desired.dtype}"
        np.testing.assert_array_equal(actual, desired)
        return
    rtol, atol = (scale * value for value in TOLERANCES[actual.dtype.name])
    np.testing.assert_allclose(actual.astype(np.float64), desired.astype(np.float64), rtol=rtol, atol=atol)


def assert_only_progress(err: str) -> None:
    """Standard error has nothing but lines of how far a command is."""
    lines = [
        line for line in err.splitlines() if not re.match("(compiling|prefill|decode|evaluating|quantizing)", line)
    ]
    assert lines == []


def max_error(actual: Any, desired: Any) -> float:
    """Largest absolute difference; NaN where either has one."""
    return float(np.abs(np.asarray(actual, np.float64) - np.asarray(desired, np.float64)).max())


def rank_coded(num_ranks: int, num_tokens: int, width: int, dtype: Any = np.float32) -> np.ndarray:
    """`[ranks, tokens, width]`, no two rows alike: a row that goes astray says where it came from.

    Column 0 is the source rank, column 1 the token (both exact in any float dtype up to 256), the rest their mixture.
    """
    rank, token = np.meshgrid(np.arange(num_ranks), np.arange(num_tokens), indexing="ij")
    mixed = (rank[..., None] * 7 + token[..., None] * 13 + np.arange(width)) % 251
    mixed[..., 0], mixed[..., 1] = rank, token
    return mixed.astype(dtype)


def skewed_topk(
    rng: np.random.Generator, num_tokens: int, num_topk: int, num_experts: int, *, skew: float = 1.5, none: float = 0.0
) -> np.ndarray:
    """`int32[tokens, topk]`: different experts for each token, popular ones first; a share `none` of them is -1."""
    popularity = (1.0 + np.arange(num_experts)) ** -skew
    # Gumbel's trick: the largest of log p + noise are a draw without replacement.
    keys = np.log(popularity) + rng.gumbel(size=(num_tokens, num_experts))
    topk_idx = np.argsort(-keys, axis=1)[:, :num_topk].astype(np.int32)
    topk_idx[rng.random(topk_idx.shape) < none] = -1
    return topk_idx


# Every size differs from every other, so that most mix-ups of axes fail by shape alone.
TINY = {
    "model_type": "deepseek_v3",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 5,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
}


def tiny_config(**changes: Any) -> ModelConfig:
    """A small V3 config in the words of Hugging Face, with some of them changed."""
    return ModelConfig.from_hf({**TINY, **changes})


def tiny_model(seed: int = 0, dtype: Any = np.float32, **changes: Any) -> Model:
    """A random model of `tiny_config(**changes)`."""
    config = tiny_config(**changes)
    params = init_params(config, seed, dtype)
    return Model(config, params, params_digest(config, params))


__all__ = [
    "EP_AXIS",
    "TINY",
    "TOLERANCES",
    "assert_close",
    "max_error",
    "rank_coded",
    "skewed_topk",
    "tiny_config",
    "tiny_model",
]


def save_with_tokenizer(folder: Path, model: Model) -> Path:
    """A model with the bundled tokenizer, in a folder, which is returned."""
    save_hf(folder, model.config, model.params)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, folder)
    return folder
