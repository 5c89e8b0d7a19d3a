"""DeepSeek V2, V3 and R1: config, parameters, and loading them from Hugging Face folders and orbax checkpoints."""

from cmjax.model.checkpoint import restore, save
from cmjax.model.config import ModelConfig
from cmjax.model.decode import DecodeBatch, decode_pass, draft_pass
from cmjax.model.model import Model, check_token_ids, expert_maps, load, token_id_array
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
from cmjax.model.quantize import Techniques
from cmjax.model.quantize_folder import quantize_folder
from cmjax.model.tokenizer import Tokenizer
from cmjax.model.transformer import (
    PassOutput,
    RankSpec,
    lm_head,
    mtp_head,
)
from cmjax.model.weights import TensorSource, load_checkpoint, load_params, save_hf
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
    "Techniques",
    "TensorSource",
    "Tokenizer",
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
    "load",
    "load_checkpoint",
    "load_params",
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
    "quantize_folder",
    "restore",
    "save",
    "save_hf",
    "token_id_array",
    "token_order",
]
