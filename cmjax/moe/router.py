"""The router (gate): which experts a token goes to, and with what weights."""

import jax
import jax.numpy as jnp
from jax import lax

from cmjax.kernels import RouterConfig, choose
from cmjax.quant import Matrix, linear


def router_logits(x: jax.Array, weight: Matrix) -> jax.Array:
    """Return `float32[tokens, experts]`, what scores are made of, for `x[tokens, hidden]`, any float dtype, and
    `weight float32[experts, hidden]`."""
    # On its own: libtpu 0.0.50 crashes where it fuses a tall product with the reshape into groups after it.
    return lax.optimization_barrier(linear(x.astype(jnp.float32), weight))


def _sum_of_best_two(scores: jax.Array) -> jax.Array:
    """The sum of the two largest over the last axis, or the one there is. Maxima cost less than top-k or argmax."""
    best = scores.max(-1)
    is_best = scores == best[..., None]
    second = jnp.where(is_best.sum(-1) > 1, best, jnp.where(is_best, -jnp.inf, scores).max(-1))
    return best + jnp.where(jnp.isneginf(second), 0, second)


def _keep_best_groups(choice: jax.Array, config: RouterConfig) -> jax.Array:
    """Mask the experts outside each token's best groups with -inf (0 would win over negative biased scores)."""
    tokens = choice.shape[0]
    grouped = choice.reshape(tokens, config.num_expert_groups, config.num_experts // config.num_expert_groups)
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
    return _choices(router_logits(x, weight), bias, config)


def route_to_slots(
    x: jax.Array,
    weight: Matrix,
    bias: jax.Array | None,
    config: RouterConfig,
    expert_to_slot: jax.Array,
    is_valid: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `route`, in slots, and with the shared experts that are reached through dispatch.

    Args:
        expert_to_slot: `int32[routed + shared experts]`, this source rank's row of the placement.
        is_valid: `bool[tokens]`; a padding token goes nowhere.

    Returns:
        `(slot_idx int32[tokens, topk + shared], weights float32 of the same shape)`. Shared experts get every token,
        with weight 1; -1 is nowhere, and its weight says nothing.
    """
    return choose_slots(router_logits(x, weight), bias, config, expert_to_slot, is_valid)


def choose_slots(
    logits: jax.Array, bias: jax.Array | None, config: RouterConfig, expert_to_slot: jax.Array, is_valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`route_to_slots`, once `logits float32[tokens, experts]` are there."""
    return choose(_choose_form, logits, is_valid, expert_to_slot, bias, config)


def _choose_form(
    logits: jax.Array, is_valid: jax.Array, expert_to_slot: jax.Array, bias: jax.Array | None, spec: RouterConfig
) -> tuple[jax.Array, jax.Array]:
    """The XLA form of `kernels.choose`."""
    topk_idx, weights = _choices(logits, bias, spec)
    slots = jnp.take(expert_to_slot, topk_idx, axis=0)
    shared = expert_to_slot[spec.num_experts :]
    if shared.size:
        shape = (slots.shape[0], shared.size)
        slots = jnp.concatenate([slots, jnp.broadcast_to(shared, shape)], axis=1)
        weights = jnp.concatenate([weights, jnp.ones(shape, jnp.float32)], axis=1)
    return jnp.where(is_valid[:, None], slots, -1), weights


def _choices(logits: jax.Array, bias: jax.Array | None, config: RouterConfig) -> tuple[jax.Array, jax.Array]:
    scores = jax.nn.sigmoid(logits) if config.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = scores if bias is None else scores + bias
    if config.has_groups:
        choice = _keep_best_groups(choice, config)
    _, topk_idx = lax.top_k(choice, config.num_topk)
    topk_weights = jnp.take_along_axis(scores, topk_idx, axis=-1)
    if config.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdims=True) + 1e-20)
    return topk_idx.astype(jnp.int32), topk_weights * config.routed_scaling_factor
