"""A checkpoint folder as one GGUF file, for llama.cpp's side of `cmjax bench peer`.

Run by whatever interpreter has the `gguf` package: this file imports nothing of cmjax.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "int8": gguf.LlamaFileType.MOSTLY_Q8_0,
}

# What llama.cpp's architecture "deepseek2" computes; anything else would be another model there.
_COMPUTED = {
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "rope_scaling": None,
    "rope_interleave": True,
    "rms_norm_eps": 1e-6,  # that of the latents too, which cmjax keeps at 1e-6 and llama.cpp does not tell apart
    "moe_layer_freq": 1,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.weight)")


def write_gguf(folder: str, target: str, number_format: str) -> None:
    """Write the float32 checkpoint in `folder` to the file `target`, its matrices as TYPES says.

    Vectors and the router are float32, as llama.cpp wants them; the tokenizer is the one without words. Raises
    ValueError where llama.cpp would compute something else than the config says.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    for key, wanted in _COMPUTED.items():
        if config.get(key) != wanted:
            raise ValueError(f"{key} {config.get(key)!r} cannot be written as GGUF; only {wanted!r} can")
    writer = gguf.GGUFWriter(target, "deepseek2")
    _write_config(writer, config, number_format)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    for hf_name, tensor in _for_llama(read_safetensors(Path(folder) / "model.safetensors"), config):
        stem = hf_name.replace("e_score_correction_bias", "e_score_correction.bias")
        name = names.get_name(stem, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"gguf has no name for {hf_name}")
        is_float32 = tensor.ndim == 1 or hf_name.endswith(".gate.weight")
        kind = gguf.GGMLQuantizationType.F32 if is_float32 else TYPES[number_format]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: gguf.GGUFWriter, config: dict[str, Any], number_format: str) -> None:
    latent, rope, nope = config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    integers: dict[Callable[[int], None], int | None] = {
        writer.add_block_count: config["num_hidden_layers"],
        writer.add_context_length: config["max_position_embeddings"],
        writer.add_embedding_length: config["hidden_size"],
        writer.add_feed_forward_length: config["intermediate_size"],
        writer.add_head_count: config["num_attention_heads"],
        writer.add_head_count_kv: 1,  # all heads read one latent
        writer.add_key_length: latent + rope,
        writer.add_value_length: latent,
        writer.add_key_length_mla: nope + rope,
        writer.add_value_length_mla: config["v_head_dim"],
        writer.add_q_lora_rank: config["q_lora_rank"],
        writer.add_kv_lora_rank: latent,
        writer.add_rope_dimension_count: rope,
        writer.add_leading_dense_block_count: config["first_k_dense_replace"],
        writer.add_expert_feed_forward_length: config["moe_intermediate_size"],
        writer.add_expert_count: config["n_routed_experts"],
        writer.add_expert_used_count: config["num_experts_per_tok"],
        writer.add_expert_shared_count: config["n_shared_experts"],
        writer.add_vocab_size: config["vocab_size"],
        writer.add_file_type: FILE_TYPES[number_format],
    }
    if config["topk_group"] < config["n_group"]:  # llama.cpp refuses groups that exclude nothing
        integers |= {
            writer.add_expert_group_count: config["n_group"],
            writer.add_expert_group_used_count: config["topk_group"],
        }
    for add, value in integers.items():
        if value is not None:
            add(value)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_tokenizer_model("none")


def _for_llama(tensors: Iterator[tuple[str, np.ndarray]], config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors as llama.cpp has them: a layer's experts in one, `kv_b` in its halves of keys and values."""
    experts: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for name, tensor in tensors:
        if expert := _EXPERT.fullmatch(name):
            merged = experts[f"{expert[1]}.{expert[3]}"]
            merged[int(expert[2])] = tensor
            if len(merged) == config["n_routed_experts"]:
                yield f"{expert[1]}.{expert[3]}", np.stack([merged[idx] for idx in range(len(merged))])
                merged.clear()
        elif name.endswith("kv_b_proj.weight"):
            split = tensor.reshape(heads, -1, tensor.shape[-1])  # a head's rows: its keys', then its values'
            yield name.replace("kv_b_proj", "k_b_proj"), split[:, :nope].swapaxes(1, 2)
            yield name.replace("kv_b_proj", "v_b_proj"), split[:, nope:]
        else:
            yield name, tensor


def read_safetensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file of float32, mapped into memory; the package `safetensors` need not be there."""
    whole = np.memmap(file, mode="r")
    begin = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:begin].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} is {entry['dtype']}, not F32")
        low, high = entry["data_offsets"]
        yield name, whole[begin + low : begin + high].view(np.float32).reshape(entry["shape"])
