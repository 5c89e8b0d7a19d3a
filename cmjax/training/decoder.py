"""The decoder with a derivative: whole sequences on one device, and the losses of the model and its MTP module.

The layers are those of the served passes; attention and experts, whose loops have trip counts known only at run time,
take the forms of static shape that are handed to the layers here.
"""

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.model import (
    Attend,
    AttentionParams,
    Index,
    LayerPlace,
    ModelConfig,
    MoeParams,
    Params,
    PassContext,
    lm_head,
    main_pass,
    mla_prolog,
    mtp_head,
    mtp_pass,
    stack_loads,
)
from cmjax.moe import MlpParams, shared_ffn
from cmjax.quant import einsum_f32
from cmjax.training.experts import moe_ffn_blocks

_QUERY_BLOCK = 128


def _causal(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention, `[batch, heads, length, width]` each, by blocks of queries that see no key after them."""
    length = q.shape[2]
    outputs = []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        scores = einsum_f32("bhqd,bhkd->bhqk", q[:, :, start:stop], k[:, :, :stop]) * config.softmax_scale
        hidden = jnp.arange(stop) > jnp.arange(start, stop)[:, None]
        weights = jax.nn.softmax(jnp.where(hidden, -jnp.inf, scores), axis=-1)
        outputs.append(einsum_f32("bhqk,bhkd->bhqd", weights, v[:, :, :stop]))
    return jnp.concatenate(outputs, axis=2)


def attend_whole(config: ModelConfig, batch: int, length: int) -> Attend:
    """Attention of `batch` whole sequences of equal length, without a cache."""
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)

    def attend(p: AttentionParams, x: jax.Array, cache: jax.Array, layer: Index) -> tuple[jax.Array, jax.Array]:
        del layer
        q_nope, q_pe, latent = mla_prolog(p, config, x, positions)
        c_kv, k_pe = jnp.split(latent, [config.kv_lora_rank], axis=-1)
        kv = einsum_f32("tl,hdl->thd", c_kv, p.kv_b).astype(x.dtype)
        k_nope, v = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
        q = jnp.concatenate([q_nope, q_pe], axis=-1)
        k = jnp.concatenate([k_nope, jnp.broadcast_to(k_pe[:, None], q_pe.shape)], axis=-1)
        q, k, v = (a.reshape(batch, length, *a.shape[1:]).swapaxes(1, 2) for a in (q, k, v))
        out = _causal(config, q, k, v).swapaxes(1, 2)
        return out.reshape(batch * length, -1).astype(x.dtype), cache

    return attend


@flax.struct.dataclass
class TrainingOutput:
    """What a training pass returns.

    Attributes:
        logits: `float32[batch, length, vocabulary]`, predicting token t + 1 at t.
        mtp_logits: the same of the MTP module, predicting token t + 2 at t (at the last position: nothing); or None.
        expert_load: `int32[MoE layers, experts]`, tokens of each routed expert (the MTP layer's last).
    """

    logits: jax.Array
    mtp_logits: jax.Array | None
    expert_load: jax.Array


def training_pass(
    params: Params, token_ids: jax.Array, config: ModelConfig, *, with_mtp: bool = True, rows_per_block: int = 64
) -> TrainingOutput:
    """Run `token_ids int32[batch, length]` through the model; every part has a derivative.

    Args:
        params: with experts by logical id.
        token_ids: whole sequences of equal length.
        config: the model's.
        with_mtp: whether the MTP module runs.
        rows_per_block: see `cmjax.moe.block_layout`; the result does not depend on it.
    """
    batch, length = token_ids.shape

    def moe(x: jax.Array, mlp: MoeParams, experts: MlpParams, place: LayerPlace) -> tuple[jax.Array, jax.Array]:
        router, bias, layer = mlp.router, mlp.router_bias, place.stack
        y, load = moe_ffn_blocks(x, router, bias, experts, layer, config=config.router, rows_per_block=rows_per_block)
        return (y if mlp.shared is None else y + shared_ffn(x, mlp.shared)), load

    context = PassContext(
        config=config, channel="train", attend=attend_whole(config, batch, length), moe=moe, unroll=True
    )
    no_cache = jnp.zeros((0,))
    hidden, _, loads = main_pass(params, token_ids.reshape(-1), no_cache, context)
    mtp_logits = None
    if with_mtp and params.mtp is not None:
        following = jnp.roll(token_ids, -1, axis=1).reshape(-1)
        mtp_hidden, _, mtp_loads = mtp_pass(params, params.mtp, hidden, following, no_cache, context)
        mtp_logits = mtp_head(params, mtp_hidden).reshape(batch, length, -1)
        loads += mtp_loads
    logits = lm_head(params, hidden).reshape(batch, length, -1)
    return TrainingOutput(logits, mtp_logits, stack_loads(loads))


def cross_entropy(logits: jax.Array, token_ids: jax.Array, ahead: int) -> jax.Array:
    """Mean nats of token t + `ahead` under `logits[batch, length, vocabulary]` at t, where that token is there."""
    logits, targets = logits[:, :-ahead], token_ids[:, ahead:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)
