"""The router (gate): which experts a token goes to, and with what weights."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from cmjax.quant import Matrix, linear

Scoring = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How scores become choices.

    `noaux_tc` (V3): experts are ranked by score plus correction bias, a group by the sum of its two largest; the
    weights are the unbiased scores. `group_limited_greedy` (V2): a group is ranked by its largest score. `greedy` (V2):
    groups are ignored.
    """

    num_experts: int
    num_topk: int
    num_expert_groups: int = 1
    num_topk_groups: int = 1
    scoring: Scoring = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0


def router_scores(x: jax.Array, weight: Matrix, config: RouterConfig) -> jax.Array:
    """Return `float32[tokens, experts]`, the scores of `x[tokens, hidden]` under `weight float32[experts, hidden]`."""
    # On its own: libtpu 0.0.50 crashes where it fuses a tall product with the reshape into groups after it.
    logits = lax.optimization_barrier(linear(x.astype(jnp.float32), weight))
    return jax.nn.sigmoid(logits) if config.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def _sum_of_best_two(scores: jax.Array) -> jax.Array:
    """The sum of the two largest over the last axis, or the one there is. Maxima cost less than top-k or argmax."""
    best = scores.max(-1)
    is_best = scores == best[..., None]
    second = jnp.where(is_best.sum(-1) > 1, best, jnp.where(is_best, -jnp.inf, scores).max(-1))
    return best + jnp.where(jnp.isneginf(second), 0, second)


def _keep_best_groups(choice: jax.Array, config: RouterConfig) -> jax.Array:
    """Mask the experts outside each token's best groups with -inf (0 would win over negative biased scores)."""
    tokens = choice.shape[0]
    grouped = choice.reshape(tokens, config.num_expert_groups, -1)
    if config.topk_method == "noaux_tc":
        group_scores = _sum_of_best_two(grouped)
    else:
        group_scores = grouped.max(-1)
    _, best = lax.top_k(group_scores, config.num_topk_groups)
    kept = (best[:, :, None] == jnp.arange(config.num_expert_groups)).any(1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


def route(x: jax.Array, weight: Matrix, bias: jax.Array | None, config: RouterConfig) -> tuple[jax.Array, jax.Array]:
    """Choose experts: `(topk_idx int32[tokens, topk], topk_weights float32[tokens, topk])`, logical experts.

    Args:
        x: `[tokens, hidden]`, any float dtype; scores are computed in float32.
        weight: `float32[experts, hidden]`.
        bias: `float32[experts]`, the correction bias of the loss-free balancing, or None.
    """
    scores = router_scores(x, weight, config)
    choice = scores if bias is None else scores + bias
    if config.topk_method != "greedy" and config.num_expert_groups > 1:
        choice = _keep_best_groups(choice, config)
    _, topk_idx = lax.top_k(choice, config.num_topk)
    topk_weights = jnp.take_along_axis(scores, topk_idx, axis=-1)
    if config.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdims=True) + 1e-20)
    return topk_idx.astype(jnp.int32), topk_weights * config.routed_scaling_factor
