"""Make small random checkpoints and what an independent implementation computes from them, for the parity tests.

    python scripts/make_reference.py tests/data/parity           # every case
    python scripts/make_reference.py /tmp/cases v3-tied v2-groups

The independent implementation is Hugging Face transformers on torch, float32, eager attention and experts; neither is
a dependency of cmjax. Each case is a folder with `config.json`, the weights, and `reference.npz`:

- `input_ids` int32[B, S] and `logits` float32[B, S, V]: one full forward;
- `prompt` int32[B, P], `generated` int32[B, N], `margin` float32[B, N]: greedy continuation, and the top logit minus
  the second one at each step;
- `mtp_logits` float32[B, S-1, V] where the case has an MTP module: position t sees tokens up to t+1.
"""

import argparse
import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

BATCH, LENGTH, PROMPT, GENERATED = 2, 24, 9, 12

# No two sizes of a case are equal, so that a mix-up of axes fails by shape.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 11,
    "qk_rope_head_dim": 10,
    "v_head_dim": 9,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 7,
    "n_group": 8,
    "topk_group": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "num_nextn_predict_layers": 0,
    "bos_token_id": 95,
    "eos_token_id": 96,
}

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

# name -> (model type, what differs from SIZES, how it is stored)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "v3-tied": (
        "deepseek_v3",
        {"tie_word_embeddings": True, "num_nextn_predict_layers": 1, "num_hidden_layers": 2},
        {"published": True},
    ),
    "v3-half-rope": ("deepseek_v3", {"rope_interleave": False, "rms_norm_eps": 1e-3}, {}),
    "v3-bias": ("deepseek_v3", {"attention_bias": True, "norm_topk_prob": False, "n_shared_experts": 2}, {}),
    "v3-odd": (
        "deepseek_v3",
        {
            "num_hidden_layers": 4,
            "moe_intermediate_size": 13,
            "first_k_dense_replace": 2,
            "n_routed_experts": 16,
            "n_shared_experts": 3,
            "routed_scaling_factor": 1.3,
        },
        {"published": True},
    ),
    "v3-bf16-shards": ("deepseek_v3", {}, {"dtype": torch.bfloat16, "max_shard_size": "90KB"}),
    "v3-noqlora": (
        "deepseek_v3",
        {"q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": YARN},
        {},
    ),
    "v3-dense": (
        "deepseek_v3",
        {"first_k_dense_replace": 3, "rope_parameters": YARN | {"attention_factor": 1.25, "truncate": False}},
        {},
    ),
    "v2-groups": (
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "qk_nope_head_dim": 8,  # transformers' V2 wants an even head
            "n_group": 12,
            "topk_group": 6,
            "n_shared_experts": 3,
            "routed_scaling_factor": 1.7,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        },
        {"published": True},
    ),
    "v2-bias": (
        "deepseek_v2",
        {"attention_bias": True, "q_lora_rank": None, "qk_nope_head_dim": 8, "first_k_dense_replace": 0},
        {},
    ),
    "kimi-k2": (
        "deepseek_v3",
        {
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "rope_parameters": YARN
            | {"rope_theta": 50000.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        {"published": True, "fp8_blocks": (16, 24), "changes": {"model_type": "kimi_k2"}},
    ),
    "moonlight": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "routed_scaling_factor": 2.446,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
        {"published": True, "dtype": torch.bfloat16, "changes": {"n_group": None, "topk_group": None}},
    ),
}


def build(model_type: str, values: dict[str, Any], dtype: torch.dtype) -> Any:
    """The transformers model, float32, with random weights that `dtype` holds exactly.

    An MTP module's decoder layer is one more layer at the end.
    """
    config = transformers.AutoConfig.for_model(model_type, **values)
    config.num_hidden_layers += config.num_nextn_predict_layers
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape) * 0.2 - 1)
            elif "norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape))
            elif name.endswith("bias"):
                tensor.copy_(0.3 * torch.randn(tensor.shape))
            elif "inv_freq" not in name:
                tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
            if "inv_freq" not in name:
                tensor.copy_(tensor.to(dtype))
    return model


def store_fp8(model: Any, folder: Path, blocks: tuple[int, int]) -> None:
    """Store the linear layers but the head in e4m3, a scale each block, and give the model what they stand for."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    parameters = dict(model.named_parameters())
    for name in [name for name in tensors if name.endswith(("_proj.weight", "_with_mqa.weight"))]:
        values = tensors[name]
        spread = [torch.arange(size) // block for size, block in zip(values.shape, blocks, strict=True)]
        place = spread[0][:, None] * (int(spread[1][-1]) + 1) + spread[1]
        largest = torch.zeros(int(place.max()) + 1).scatter_reduce(0, place.flatten(), values.abs().flatten(), "amax")
        scale = largest / 448
        stored = (values / scale[place]).to(torch.float8_e4m3fn)
        tensors[name] = stored
        tensors[name + "_scale_inv"] = scale.reshape(int(spread[0][-1]) + 1, -1)
        values.copy_(stored.float() * scale[place])
        put(parameters, name, values)
    save_file(tensors, file, {"format": "pt"})


def put(parameters: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
    """Write one matrix of a checkpoint into the model, whose experts are stacked."""
    expert = re.search(r"\.experts\.(\d+)\.(gate|up|down)_proj\.weight$", name)
    if expert is None:
        parameters[name].copy_(values)
        return
    is_down = expert[2] == "down"
    stack = parameters[name[: expert.start()] + f".experts.{'down' if is_down else 'gate_up'}_proj"][int(expert[1])]
    width = len(values)
    (stack if is_down else stack[:width] if expert[2] == "gate" else stack[width:]).copy_(values)


class MtpModule:
    """DeepSeek-V3's MTP module, put together from transformers' layers; it takes the model's last decoder layer."""

    def __init__(self, model: Any) -> None:
        hidden = model.config.hidden_size
        self.model, self.layer = model, model.model.layers[-1]
        model.model.layers = model.model.layers[:-1]
        self.eh_proj = torch.randn(hidden, 2 * hidden) * (2 * hidden) ** -0.5
        self.norms = {}
        for name in ("enorm", "hnorm", "shared_head.norm"):
            self.norms[name] = type(model.model.norm)(hidden, eps=model.config.rms_norm_eps)
            self.norms[name].weight.data = 1 + 0.2 * torch.randn(hidden)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the checkpoint holds beside the layer itself: neither an embedding nor a head, which it shares."""
        norms = {f"{name}.weight": norm.weight.data for name, norm in self.norms.items()}
        return norms | {"eh_proj.weight": self.eh_proj}

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, S-1, V], from hidden states after the final norm and the next tokens' embeddings."""
        hidden = self.model.model(input_ids).last_hidden_state[:, :-1]
        embedding = self.model.get_input_embeddings()(input_ids[:, 1:])
        joined = torch.cat([self.norms["enorm"](embedding), self.norms["hnorm"](hidden)], dim=-1) @ self.eh_proj.T
        length = joined.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        out = self.layer(
            joined,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self.model.model.rotary_emb(joined, positions),
        )
        return self.model.lm_head(self.norms["shared_head.norm"](out))


def save_weights(model: Any, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write them as transformers does, before any part is taken out of the model."""
    # A copy: converting the model itself would round its rotary frequencies too.
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").unlink()


def finish_config(folder: Path, num_layers: int, published: bool) -> None:
    """Give `config.json` its true number of layers and, for `published`, the style of the published checkpoints."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["num_hidden_layers"] = num_layers
    if published:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        v3 = config["model_type"] == "deepseek_v3"
        config |= {"scoring_func": "sigmoid" if v3 else "softmax", "moe_layer_freq": 1, "torch_dtype": "bfloat16"}
        config.setdefault("topk_method", "noaux_tc")
        for name in ("head_dim", "qk_head_dim", "rope_interleave", "dtype", "transformers_version"):
            config.pop(name, None)
    file.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def make_case(folder: Path, name: str) -> None:
    model_type, differences, stored = CASES[name]
    torch.manual_seed(list(CASES).index(name))
    values, dtype = SIZES | differences, stored.get("dtype", torch.float32)
    model = build(model_type, values, dtype)
    save_weights(model, folder, dtype, stored.get("max_shard_size", "1GB"))
    input_ids = torch.randint(0, values["vocab_size"], (BATCH, LENGTH))
    found: dict[str, Any] = {}
    if values["num_nextn_predict_layers"]:
        module = MtpModule(model)
        prefix = f"model.layers.{values['num_hidden_layers']}."
        file = folder / "model.safetensors"
        extra = {prefix + key: tensor for key, tensor in module.tensors().items()}
        save_file(load_file(file) | extra, file, {"format": "pt"})
        found["mtp_logits"] = module.logits(input_ids)
    finish_config(folder, values["num_hidden_layers"], stored.get("published", False))
    changes = dict(stored.get("changes", {}))
    if "fp8_blocks" in stored:
        store_fp8(model, folder, stored["fp8_blocks"])
        blocks = list(stored["fp8_blocks"])
        changes |= {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": blocks}}
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")

    tokens, margins = input_ids[:, :PROMPT], []
    for _ in range(GENERATED):
        best = model(tokens).logits[:, -1].topk(2)
        margins.append(best.values[:, 0] - best.values[:, 1])
        tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
    found |= {
        "logits": model(input_ids).logits,
        "margin": torch.stack(margins, dim=1),
        "input_ids": input_ids.int(),
        "prompt": input_ids[:, :PROMPT].int(),
        "generated": tokens[:, PROMPT:].int(),
    }
    np.savez(folder / "reference.npz", **{key: tensor.numpy() for key, tensor in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the folders of the cases go")
    parser.add_argument("cases", nargs="*", help=f"which ones (default: all): {', '.join(CASES)}")
    args = parser.parse_args()
    unknown = set(args.cases) - CASES.keys()
    if unknown:
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    for name in args.cases or CASES:
        make_case(args.folder / name, name)
        print(args.folder / name)


if __name__ == "__main__":
    main()
