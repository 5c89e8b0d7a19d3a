"""The DeepSeek architecture (V2, V3, R1): config, parameters, MLA, layers, the MTP module, prefill and decode."""

from cmjax.model.config import ModelConfig
from cmjax.model.decode import DecodeBatch, decode_pass, draft_pass
from cmjax.model.model import Model, check_token_ids, expert_maps, token_id_array
from cmjax.model.params import (
    AttentionParams,
    LayerParams,
    Leaf,
    MlpParams,
    MoeParams,
    MtpParams,
    Params,
    abstract_params,
    aligned_empty,
    convert_params,
    init_params,
    named_leaves,
    num_bytes,
    num_params,
    params_digest,
    quant_mode,
)
from cmjax.model.placed import (
    default_wires,
    num_placed_layers,
    param_specs,
    place_params,
    placed_layer_names,
    plan_placement,
)
from cmjax.model.prefill import PrefillBatch, head_shards, local_tokens, prefill_pass, token_order
from cmjax.model.transformer import (
    PassOutput,
    RankSpec,
    lm_head,
    mtp_head,
)
from cmjax.model.yarn import YarnConfig

__all__ = [
    "AttentionParams",
    "DecodeBatch",
    "LayerParams",
    "Leaf",
    "MlpParams",
    "Model",
    "ModelConfig",
    "MoeParams",
    "MtpParams",
    "Params",
    "PassOutput",
    "PrefillBatch",
    "RankSpec",
    "YarnConfig",
    "abstract_params",
    "aligned_empty",
    "check_token_ids",
    "convert_params",
    "decode_pass",
    "default_wires",
    "draft_pass",
    "expert_maps",
    "head_shards",
    "init_params",
    "lm_head",
    "local_tokens",
    "mtp_head",
    "named_leaves",
    "num_bytes",
    "num_params",
    "num_placed_layers",
    "param_specs",
    "params_digest",
    "place_params",
    "placed_layer_names",
    "plan_placement",
    "prefill_pass",
    "quant_mode",
    "token_id_array",
    "token_order",
]
