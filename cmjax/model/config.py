"""What a DeepSeek V2, V3 or R1 model is: every size and switch that its `config.json` holds, checked once.

`ModelConfig.from_hf` reads both styles of the file: the published one (`rope_theta`, `rope_scaling`, `scoring_func`,
`topk_method`) and the newer one (`rope_parameters`). Anything this package cannot compute exactly is a `UserError` that
names the field, its value and what is supported.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cmjax.errors import UserError
from cmjax.model.yarn import YarnConfig
from cmjax.moe import RouterConfig, Scoring, TopkMethod
from cmjax.text import JsonObject

_log = logging.getLogger(__name__)

# The published models normalize the low-rank latents of MLA with this, whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6

_ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
# Model types of the same architecture, for configs that name no architecture.
_SAME = {"kimi_k2": "deepseek_v3"}
_SCORING: dict[str, Scoring] = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}
_TOPK_METHODS: dict[str, tuple[TopkMethod, ...]] = {
    # The first of each is what an absent `topk_method` means.
    "deepseek_v2": ("greedy", "group_limited_greedy"),
    "deepseek_v3": ("noaux_tc",),
}
# Values of fields that shape no tensor, where `config.json` leaves them out.
_DEFAULTS: dict[str, JsonObject] = {
    "deepseek_v2": {"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "max_position_embeddings": 2048},
    "deepseek_v3": {"first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "max_position_embeddings": 4096},
}
_REQUIRED = object()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model's sizes and switches; `from_hf` makes it from the contents of a `config.json`.

    A model without MoE layers has 0 routed experts, and its other expert fields are 0 or their defaults. With
    `topk_method="greedy"` there is one group. Raises UserError where two fields contradict each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_intermediate_size: int = 0
    num_routed_experts: int = 0
    num_shared_experts: int = 0
    num_topk: int = 0
    num_expert_groups: int = 1
    num_topk_groups: int = 1
    scoring: Scoring = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    num_mtp_layers: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    yarn: YarnConfig | None = None
    max_position_embeddings: int = 4096
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, object]) -> "ModelConfig":
        """Config from the parsed contents of a `config.json`, of either style; UserError on what is not supported."""
        return _from_hf(_Fields(hf))

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.num_routed_experts:
            _check_experts(self)

    def to_hf(self) -> JsonObject:
        """Contents of a `config.json` in the published style; `from_hf` gives an equal config back."""
        renamed = {ours: getattr(self, ours) for ours in _HF_NAMES if ours not in ("yarn", "eos_token_id")}
        hf = {_HF_NAMES[ours]: value for ours, value in renamed.items()}
        hf["architectures"] = [_ARCHITECTURES[self.model_type]]
        hf["num_key_value_heads"] = self.num_attention_heads
        hf["hidden_act"] = "silu"
        hf["eos_token_id"] = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        scaling = None if self.yarn is None else {"type": "yarn", **asdict(self.yarn)}
        hf["rope_scaling"] = scaling and {key: value for key, value in scaling.items() if value is not None}
        return hf

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the fields: equal configs have equal digests, in every process.

        Fields at their defaults are left out, so that a field added later does not change the digest of old configs.
        """
        stated = _stated(self)
        if self.yarn is not None:
            stated["yarn"] = _stated(self.yarn)
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()

    def is_moe_layer(self, layer_id: int) -> bool:
        """Whether decoder layer `layer_id` has experts; the MTP module's layer is number `num_hidden_layers`."""
        sparse = layer_id >= self.first_k_dense_replace and layer_id % self.moe_layer_freq == 0
        return self.num_routed_experts > 0 and sparse

    @property
    def dense_layer_ids(self) -> tuple[int, ...]:
        """Layers with one MLP, in order, the MTP module's not among them."""
        return tuple(i for i in range(self.num_hidden_layers) if not self.is_moe_layer(i))

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Layers with experts, in order, the MTP module's not among them."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))

    @property
    def router(self) -> RouterConfig:
        """The router's part."""
        return RouterConfig(
            num_experts=self.num_routed_experts,
            num_topk=self.num_topk,
            num_expert_groups=self.num_expert_groups,
            num_topk_groups=self.num_topk_groups,
            scoring=self.scoring,
            topk_method=self.topk_method,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key, rotary part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Values cached per token and layer: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_cache_layers(self) -> int:
        """Layers that keep KV: the decoder's and the MTP module's."""
        return self.num_hidden_layers + self.num_mtp_layers

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by, YaRN's part included."""
        return self.qk_head_dim**-0.5 * (1.0 if self.yarn is None else self.yarn.softmax_factor)


# Our name -> the name in config.json, for every field of ModelConfig.
_HF_NAMES = {name: name for name in ModelConfig.__dataclass_fields__} | {
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_topk": "num_experts_per_tok",
    "num_expert_groups": "n_group",
    "num_topk_groups": "topk_group",
    "scoring": "scoring_func",
    "num_mtp_layers": "num_nextn_predict_layers",
    "yarn": "rope_scaling",
}


def _stated(config: "ModelConfig | YarnConfig") -> JsonObject:
    """The fields that are not at their defaults."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}


# Far above any model, so that nonsense is refused by name before anything is sized by it.
_MOST = {"num_hidden_layers": 10_000, "hidden_size": 2**24, "vocab_size": 2**28, "intermediate_size": 2**24}
_MOST |= {"num_routed_experts": 65_536, "num_shared_experts": 1024, "moe_intermediate_size": 2**24}


def _check_sizes(config: ModelConfig) -> None:
    positive = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads kv_lora_rank"
    positive += " qk_nope_head_dim qk_rope_head_dim v_head_dim moe_layer_freq max_position_embeddings"
    for name in positive.split() + (["q_lora_rank"] if config.q_lora_rank is not None else []):
        _check_range(config, name)
    if config.qk_rope_head_dim % 2:
        raise UserError(f"config: qk_rope_head_dim must be even, got {config.qk_rope_head_dim}")
    if config.first_k_dense_replace < 0:
        raise UserError(f"config: first_k_dense_replace must be at least 0, got {config.first_k_dense_replace}")
    if not 0 <= config.num_mtp_layers <= 1:
        raise UserError(f"config: num_nextn_predict_layers {config.num_mtp_layers} is not supported; supported: 0, 1")
    theta, eps = config.rope_theta, config.rms_norm_eps
    if not theta > 1 or not eps >= 0:
        raise UserError(f"config: rope_theta must be over 1 and rms_norm_eps at least 0, got {theta} and {eps}")
    _one_of("model_type", config.model_type, _ARCHITECTURES)
    _one_of("scoring_func", config.scoring, [_SCORING[config.model_type]], f"for {config.model_type}")
    _one_of("topk_method", config.topk_method, _TOPK_METHODS[config.model_type], f"for {config.model_type}")


def _check_range(config: ModelConfig, name: str, least: int = 1) -> None:
    value, most = getattr(config, name), _MOST.get(name, 2**31 - 1)
    if not least <= value <= most:
        bound = f"least {least}" if value < least else f"most {most}"
        raise UserError(f"config: {_HF_NAMES[name]} must be at {bound}, got {value}")


def _check_experts(config: ModelConfig) -> None:
    for name in ("num_routed_experts", "moe_intermediate_size", "num_topk", "num_expert_groups", "num_topk_groups"):
        _check_range(config, name)
    _check_range(config, "num_shared_experts", least=0)
    num_experts, num_groups, num_kept = config.num_routed_experts, config.num_expert_groups, config.num_topk_groups
    if num_experts % num_groups:
        raise UserError(f"config: n_routed_experts ({num_experts}) is not divisible by n_group ({num_groups})")
    if num_kept > num_groups:
        raise UserError(f"config: topk_group ({num_kept}) is more than n_group ({num_groups})")
    if config.topk_method == "noaux_tc" and num_experts // num_groups < 2:
        raise UserError(
            f"config: topk_method noaux_tc ranks a group by its two best experts, but n_routed_experts "
            f"({num_experts}) over n_group ({num_groups}) leaves one a group"
        )
    available = num_kept * (num_experts // num_groups)
    if config.num_topk > available:
        raise UserError(
            f"config: num_experts_per_tok ({config.num_topk}) is more than the {available} experts of the "
            f"{num_kept} kept groups (topk_group) of {num_experts // num_groups}"
        )


def _one_of(name: str, value: str, supported: Iterable[str], where: str = "") -> None:
    if value not in supported:
        listed = ", ".join(supported)
        raise UserError(f"config: {name} {value!r} is not supported{where and ' ' + where}; supported: {listed}")


class _Fields:
    """Typed access to a parsed `config.json`; every complaint names the field."""

    def __init__(self, values: object, where: str = "config") -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{where} must be a JSON object, got {type(values).__name__}")
        self.values, self.where = values, where

    def get(self, name: str, default: object, kinds: tuple[type, ...], wanted: str) -> Any:
        """The field, checked; `default` where it is absent or null, unless it is required."""
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.where}: {name} is missing")
            return default
        # bool is an int in Python, and JSON's NaN and Infinity are floats.
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{self.where}: {name} must be {wanted}, got {value!r}")
        return value

    def integer(self, name: str, default: object = _REQUIRED) -> Any:
        return self.get(name, default, (int,), "an integer")

    def number(self, name: str, default: object = _REQUIRED) -> Any:
        value = self.get(name, default, (int, float), "a number")
        try:
            return None if value is None else float(value)
        except OverflowError:
            raise UserError(f"{self.where}: {name} is too large a number") from None

    def flag(self, name: str, default: bool) -> bool:
        return self.get(name, default, (bool,), "true or false")

    def text(self, name: str, default: object = _REQUIRED) -> Any:
        return self.get(name, default, (str,), "a string")


def _from_hf(hf: _Fields) -> ModelConfig:
    model_type = _model_type(hf)
    num_heads = hf.integer("num_attention_heads")
    num_kv_heads = hf.integer("num_key_value_heads", num_heads)
    if num_kv_heads != num_heads:
        raise UserError(
            f"config: num_key_value_heads ({num_kv_heads}) must equal num_attention_heads ({num_heads}): "
            "MLA keeps one latent for all heads"
        )
    if hf.flag("mlp_bias", False):
        raise UserError("config: mlp_bias true is not supported; supported: false")
    _one_of("hidden_act", hf.text("hidden_act", "silu"), ["silu"])
    eos = hf.get("eos_token_id", None, (int, list), "an integer or a list of them")
    if isinstance(eos, list) and any(type(token) is not int for token in eos):
        raise UserError(f"config: eos_token_id must be an integer or a list of them, got {eos!r}")
    theta, yarn = _rope(hf)
    most = hf.integer("max_position_embeddings", _DEFAULTS[model_type]["max_position_embeddings"])
    required = "vocab_size hidden_size intermediate_size num_hidden_layers kv_lora_rank qk_nope_head_dim"
    required += " qk_rope_head_dim v_head_dim"
    if "q_lora_rank" not in hf.values:
        raise UserError("config: q_lora_rank is missing (null where queries are projected directly)")
    return ModelConfig(
        model_type=model_type,
        **{name: hf.integer(name) for name in required.split()},
        **_experts(hf, model_type),
        num_attention_heads=num_heads,
        q_lora_rank=hf.integer("q_lora_rank", None),
        num_mtp_layers=hf.integer("num_nextn_predict_layers", 0),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_interleave=hf.flag("rope_interleave", True),
        yarn=yarn,
        max_position_embeddings=most,
        attention_bias=hf.flag("attention_bias", False),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
        bos_token_id=hf.integer("bos_token_id", None),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
    )


def _model_type(hf: _Fields) -> str:
    """The family: the one of `architectures`, whatever another `model_type` calls it; without them, `model_type`'s."""
    names = hf.get("architectures", None, (list,), "a list of names")
    if names:
        _one_of("architectures", names[0], _ARCHITECTURES.values())
    implied = next((key for key, name in _ARCHITECTURES.items() if names and name == names[0]), None)
    model_type = hf.text("model_type", implied or _REQUIRED)
    family = _SAME.get(model_type, model_type)
    if implied is None:
        _one_of("model_type", model_type, [*_ARCHITECTURES, *_SAME])
    elif family in _ARCHITECTURES and family != implied:
        raise UserError(f"config: model_type {model_type!r} contradicts architectures {names!r}")
    return implied or family


def _experts(hf: _Fields, model_type: str) -> dict[str, Any]:
    """The fields about experts; all of them at rest where no layer has any."""
    first_dense = hf.integer("first_k_dense_replace", _DEFAULTS[model_type]["first_k_dense_replace"])
    freq = hf.integer("moe_layer_freq", 1)
    num_layers = hf.integer("num_hidden_layers") + hf.integer("num_nextn_predict_layers", 0)
    method = hf.text("topk_method", _TOPK_METHODS[model_type][0])
    found = {
        "first_k_dense_replace": first_dense,
        "moe_layer_freq": freq,
        "scoring": hf.text("scoring_func", _SCORING[model_type]),
        "topk_method": method,
        "norm_topk_prob": False if model_type == "deepseek_v2" else hf.flag("norm_topk_prob", True),
        "routed_scaling_factor": hf.number("routed_scaling_factor", _DEFAULTS[model_type]["routed_scaling_factor"]),
    }
    first_sparse = -(-max(first_dense, 0) // max(freq, 1)) * max(freq, 1)
    stated_none = "n_routed_experts" in hf.values and not hf.values["n_routed_experts"]
    if first_sparse >= num_layers or stated_none:
        return found
    if model_type == "deepseek_v2" and hf.flag("norm_topk_prob", False):
        _log.warning("config: norm_topk_prob true is ignored: DeepSeek-V2's router does not normalize its weights")
    if "n_shared_experts" not in hf.values:
        raise UserError("config: n_shared_experts is missing (null or 0 where there are none)")
    # Null is no limit to groups; a config that says nothing of them is incomplete.
    is_null = any(name in hf.values and hf.values[name] is None for name in ("n_group", "topk_group"))
    grouped = method != "greedy" and not is_null
    return found | {
        "moe_intermediate_size": hf.integer("moe_intermediate_size"),
        "num_routed_experts": hf.integer("n_routed_experts"),
        "num_shared_experts": hf.integer("n_shared_experts", 0),
        "num_topk": hf.integer("num_experts_per_tok"),
        "num_expert_groups": hf.integer("n_group") if grouped else 1,
        "num_topk_groups": hf.integer("topk_group") if grouped else 1,
    }


def _rope(hf: _Fields) -> tuple[float, YarnConfig | None]:
    """rope_theta and YaRN, from `rope_scaling` beside `rope_theta`, or from `rope_parameters`, which holds both."""
    name = "rope_scaling" if hf.values.get("rope_scaling") else "rope_parameters"
    rope = _Fields(hf.values.get(name) or {}, f"config: {name}")
    theta = rope.number("rope_theta", hf.number("rope_theta", 10000.0))
    for part in (rope, hf):
        if part.number("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{part.where}: partial_rotary_factor other than 1 is not supported")
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    _one_of(f"{name} type", rope_type, ["default", "yarn"])
    if rope_type == "default":
        if any(isinstance(value, Mapping) for value in rope.values.values()):
            raise UserError(f"config: {name} with a dict per layer type is not supported; supported: one for all")
        return theta, None
    limit = hf.integer("original_max_position_embeddings", None)
    limit = limit or rope.integer("original_max_position_embeddings", hf.integer("max_position_embeddings", None))
    if limit is None:
        raise UserError(f"config: {name}: original_max_position_embeddings is missing")
    return theta, YarnConfig(
        factor=rope.number("factor"),
        original_max_position_embeddings=limit,
        beta_fast=rope.number("beta_fast", None) or 32.0,
        beta_slow=rope.number("beta_slow", None) or 1.0,
        mscale=rope.number("mscale", 0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
        attention_factor=rope.number("attention_factor", None),
        truncate=rope.flag("truncate", True),
    )
