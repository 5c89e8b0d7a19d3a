"""The whole model in NumPy, slow and obvious: what every faster form is compared with. For tests and scripts only.

It shares the parameter tree with the fast form, and no arithmetic. Values are computed in `dtype` (float64 unless told
otherwise), from weights as loaded. Letters: b batch, s sequence (t: of keys), d hidden, h heads, l latent, e experts,
k experts per token.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cmjax.model.config import LATENT_NORM_EPS, ModelConfig
from cmjax.model.params import AttentionParams, LayerParams, MlpParams, MoeParams, Params


def logits(config: ModelConfig, params: Params, input_ids: np.ndarray, dtype: DTypeLike = np.float64) -> np.ndarray:
    """Next-token logits [b, s, vocabulary] in `dtype`, for `input_ids` int[b, s]."""
    head = params.embed if params.head is None else params.head
    return hidden_states(config, params, input_ids, dtype) @ _as(head, dtype).T


def hidden_states(
    config: ModelConfig, params: Params, input_ids: np.ndarray, dtype: DTypeLike = np.float64
) -> np.ndarray:
    """Hidden states [b, s, d] after the final norm."""
    x = _as(params.embed, dtype)[input_ids]
    num_seen = {True: 0, False: 0}
    for layer_id in range(config.num_hidden_layers):
        sparse = config.is_moe_layer(layer_id)
        stack = params.moe if sparse else params.dense
        assert stack is not None
        x = decoder_layer(config, stack, num_seen[sparse], x)
        num_seen[sparse] += 1
    return rms_norm(x, params.norm, config.rms_norm_eps)


def mtp_logits(config: ModelConfig, params: Params, input_ids: np.ndarray, dtype: DTypeLike = np.float64) -> np.ndarray:
    """The MTP module's logits [b, s - 1, vocabulary]: position t sees tokens up to t + 1 and predicts t + 2."""
    mtp, eps = params.mtp, config.rms_norm_eps
    assert mtp is not None
    hidden = hidden_states(config, params, input_ids, dtype)[:, :-1]
    embedding = _as(params.embed if mtp.embed is None else mtp.embed, dtype)[input_ids[:, 1:]]
    joined = np.concatenate([rms_norm(embedding, mtp.enorm, eps), rms_norm(hidden, mtp.hnorm, eps)], axis=-1)
    x = decoder_layer(config, mtp.layer, 0, joined @ _as(mtp.eh_proj, dtype).T)
    own_or_main = params.head if mtp.head is None else mtp.head
    head = params.embed if own_or_main is None else own_or_main
    return rms_norm(x, mtp.norm, eps) @ _as(head, dtype).T


def greedy(config: ModelConfig, params: Params, prompt: np.ndarray, num_tokens: int) -> np.ndarray:
    """The most probable continuation int32[b, num_tokens] of `prompt` int[b, s], everything computed anew each step."""
    tokens = np.asarray(prompt)
    for _ in range(num_tokens):
        best = logits(config, params, tokens)[:, -1].argmax(-1)
        tokens = np.concatenate([tokens, best[:, None]], axis=1)
    return tokens[:, -num_tokens:].astype(np.int32)


def decoder_layer(config: ModelConfig, layer: LayerParams, idx: int, x: np.ndarray) -> np.ndarray:
    """Layer `idx` of a stack, on x [b, s, d]."""
    x = x + attention(config, layer.attn, idx, rms_norm(x, layer.input_norm[idx], config.rms_norm_eps))
    normed = rms_norm(x, layer.post_attn_norm[idx], config.rms_norm_eps)
    if isinstance(layer.mlp, MlpParams):
        return x + mlp(normed, layer.mlp.w13[idx], layer.mlp.w2[idx])
    flat = normed.reshape(-1, normed.shape[-1])
    return x + moe_layer(config, layer.mlp, idx, flat).reshape(x.shape)


def rms_norm(x: np.ndarray, weight: ArrayLike, eps: float) -> np.ndarray:
    """x over its root mean square along the last axis, times `weight`."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.asarray(eps, x.dtype)) * _as(weight, x.dtype)


def attention(config: ModelConfig, attn: AttentionParams, idx: int, x: np.ndarray) -> np.ndarray:
    """Causal MLA of x [b, s, d] with keys and values materialized for every head."""
    rank, nope = config.kv_lora_rank, config.qk_nope_head_dim
    query_in = x
    if attn.q_a is not None:
        assert attn.q_a_norm is not None
        query_in = rms_norm(_linear(x, attn.q_a[idx], attn.q_a_bias, idx), attn.q_a_norm[idx], LATENT_NORM_EPS)
    queries = np.einsum("bsl,hql->bhsq", query_in, _as(attn.q_b[idx], x.dtype))
    latent = _linear(x, attn.kv_a[idx], attn.kv_a_bias, idx)
    normed = rms_norm(latent[..., :rank], attn.kv_a_norm[idx], LATENT_NORM_EPS)
    expanded = np.einsum("btl,hql->bhtq", normed, _as(attn.kv_b[idx], x.dtype))
    keys, values = expanded[..., :nope], expanded[..., nope:]

    q_pe = rotate(config, queries[..., nope:])
    k_pe = rotate(config, latent[:, None, :, rank:])  # one for all heads
    scores = np.einsum("bhsq,bhtq->bhst", queries[..., :nope], keys)
    scores = (scores + np.einsum("bhsq,bhtq->bhst", q_pe, np.broadcast_to(k_pe, q_pe.shape))) * softmax_scale(config)
    ahead = np.triu(np.ones(scores.shape[-2:], bool), k=1)
    attended = np.einsum("bhst,bhtv->bshv", softmax(np.where(ahead, -np.inf, scores)), values)
    return _linear(attended.reshape(*x.shape[:2], -1), attn.o[idx], attn.o_bias, idx)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax along the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= _yarn_magnitude(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, float64[rope / 2], and what cos and sin are multiplied by."""
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn
    frequencies = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    if yarn is None:
        return np.array(frequencies), 1.0

    def pair_turning(times: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    for pair, frequency in enumerate(frequencies):
        stretched = min(max((pair - low) / (high - low), 0), 1)
        frequencies[pair] = (1 - stretched) * frequency + stretched * frequency / yarn.factor
    if yarn.attention_factor is not None:
        return np.array(frequencies), yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        ratio = _yarn_magnitude(yarn.factor, yarn.mscale) / _yarn_magnitude(yarn.factor, yarn.mscale_all_dim)
        return np.array(frequencies), ratio
    return np.array(frequencies), _yarn_magnitude(yarn.factor, 1)


def rotate(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """RoPE of x [..., s, rope] at positions 0 .. s-1; each pair stays where it was."""
    frequencies, scale = rope_frequencies(config)
    angles = np.arange(x.shape[-2])[:, None] * frequencies
    cos, sin = (_as(table * scale, x.dtype) for table in (np.cos(angles), np.sin(angles)))
    half = x.shape[-1] // 2
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if config.rope_interleave else (slice(half), slice(half, None))
    )
    rotated = np.empty_like(x)
    rotated[..., first] = x[..., first] * cos - x[..., second] * sin
    rotated[..., second] = x[..., second] * cos + x[..., first] * sin
    return rotated


def mlp(x: np.ndarray, w13: ArrayLike, w2: ArrayLike) -> np.ndarray:
    """Gated MLP of x [..., d]: silu(gate) * up, then down."""
    gate, up = np.split(x @ _as(w13, x.dtype).T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ _as(w2, x.dtype).T


def moe_layer(config: ModelConfig, params: MoeParams, idx: int, x: np.ndarray) -> np.ndarray:
    """Routed and shared experts of MoE layer `idx`, on x [tokens, d]."""
    bias = None if params.router_bias is None else params.router_bias[idx]
    topk_idx, topk_weights = route(config, x, params.router[idx], bias)
    out = moe(x, topk_idx, topk_weights, params.experts.w13[idx], params.experts.w2[idx])
    if params.shared is not None:
        out = out + mlp(x, params.shared.w13[idx], params.shared.w2[idx])
    return out


def route(
    config: ModelConfig, x: np.ndarray, router: ArrayLike, router_bias: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Each token's experts and their weights: (int32[tokens, k], [tokens, k]), best choice first.

    `router` [e, d], `router_bias` [e]. Equal scores go to the lower index.
    """
    raw = x @ _as(router, x.dtype).T
    scores = 1 / (1 + np.exp(-raw)) if config.scoring == "sigmoid" else softmax(raw)
    choice = scores if router_bias is None else scores + _as(router_bias, x.dtype)
    topk_idx = np.zeros((len(x), config.num_topk), np.int32)
    topk_weights = np.zeros((len(x), config.num_topk), x.dtype)
    for token, row in enumerate(choice):
        if config.topk_method != "greedy":
            row = _only_best_groups(config, row)
        topk_idx[token] = np.argsort(-row, kind="stable")[: config.num_topk]
        topk_weights[token] = scores[token, topk_idx[token]]
    if config.norm_topk_prob:
        topk_weights /= topk_weights.sum(-1, keepdims=True) + 1e-20
    return topk_idx, topk_weights * x.dtype.type(config.routed_scaling_factor)


def _only_best_groups(config: ModelConfig, row: np.ndarray) -> np.ndarray:
    """One token's scores, with -inf for the experts outside its best groups."""
    groups = row.reshape(config.num_expert_groups, -1)
    num_counted = 2 if config.topk_method == "noaux_tc" else 1
    merit = np.sort(groups, axis=-1)[:, -num_counted:].sum(-1)
    kept = np.argsort(-merit, kind="stable")[: config.num_topk_groups]
    limited = np.full_like(groups, -np.inf)
    limited[kept] = groups[kept]
    return limited.reshape(-1)


def moe(x: np.ndarray, topk_idx: np.ndarray, topk_weights: np.ndarray, w13: np.ndarray, w2: np.ndarray) -> np.ndarray:
    """Weighted sum [tokens, d] over each token's experts; `w13` [e, 2f, d], `w2` [e, d, f].

    An index of -1 in `topk_idx` int[tokens, k] is no expert.
    """
    out = np.zeros_like(x)
    for expert in np.unique(topk_idx[topk_idx >= 0]):
        tokens, choices = np.nonzero(topk_idx == expert)
        # np.add.at: a token may have chosen the same expert twice.
        np.add.at(out, tokens, mlp(x[tokens], w13[expert], w2[expert]) * topk_weights[tokens, choices][:, None])
    return out


def _linear(x: np.ndarray, weight: ArrayLike, biases: np.ndarray | None, idx: int) -> np.ndarray:
    y = x @ _as(weight, x.dtype).T
    return y if biases is None else y + _as(biases[idx], x.dtype)


def _as(values: ArrayLike, dtype: DTypeLike) -> np.ndarray:
    return np.asarray(values).astype(dtype, copy=False)
