"""The decoder on one rank: prefill and decode passes over local arrays and one mesh axis.

The functions here run inside `jax.shard_map`, on 1 device as on 320. The expert parameters are stored by physical slot,
`[layers, local slots, ...]`; everything else is replicated. Attention differs between the two passes, and is handed to
the layers as a function; all the rest is one code.
"""

import dataclasses
import operator
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.loops import scan
from cmjax.model.config import ModelConfig
from cmjax.model.mla import WHOLE, CoreAttention, Part, key_value_latent, rms_norm
from cmjax.model.params import AttentionParams, LayerParams, MoeParams, MtpParams, Params, layer_at, split_experts
from cmjax.moe import Exchange, LayerRouter, MlpParams, MoeLayer, swiglu
from cmjax.quant import linear

Index = jax.Array | int

# (attention params, normalized x, cache, cache layer) -> (attention output before o_proj, cache)
Attend = Callable[[AttentionParams, jax.Array, jax.Array, Index], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class AttendInParts:
    """An `Attend` that lets other work come in between: `begin`, `part` i of n for each i, `end`; called, all in a row.

    Attributes:
        begin: `(attention params, normalized x, cache, cache layer, sums) -> (core attention before any key, cache)`;
            what it writes comes after what has these softmax sums has read the cache (None: nobody else reads).
        part: `(attention params, core attention, cache, cache layer, (i, n)) -> core attention`.
        end: `(attention params, core attention) -> attention output before o_proj`.
        has_lanes: whether the arithmetic around exchanges is a lane of its own, which attention goes on beside
            (prefill), rather than part of the other microbatch's turn (decode).
    """

    begin: Callable[[AttentionParams, jax.Array, jax.Array, Index, jax.Array | None], tuple[CoreAttention, jax.Array]]
    part: Callable[[AttentionParams, CoreAttention, jax.Array, Index, Part], CoreAttention]
    end: Callable[[AttentionParams, CoreAttention], jax.Array]
    has_lanes: bool = False

    def __call__(self, p: AttentionParams, x: jax.Array, cache: jax.Array, layer: Index) -> tuple[jax.Array, jax.Array]:
        """The attention output before o_proj, and the cache."""
        core, cache = self.begin(p, x, cache, layer, None)
        return self.end(p, self.part(p, core, cache, layer, WHOLE)), cache


@dataclasses.dataclass(frozen=True)
class LayerPlace:
    """Which layer it is.

    Attributes:
        stack: its number among the layers of its stack.
        row: of the placement, where the layer has experts.
        cache: its layer of the cache.
        channel: the name of its exchanges.
    """

    stack: Index
    row: Index
    cache: Index
    channel: str


# (normalized x, MoE params, the stack's experts, which layer) -> (float32 output of all experts, tokens of each)
Moe = Callable[[jax.Array, MoeParams, MlpParams, LayerPlace], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankSpec:
    """What is static about a rank's pass.

    Attributes:
        config: the model's.
        axis_name: the mesh axis of the instance.
        block_size: tokens a cache block.
        exchange: how MoE rows travel.
        microbatches: 1, or 2 that take turns in decode (see `cmjax.model.pipeline`).
    """

    config: ModelConfig
    axis_name: str
    block_size: int
    exchange: Exchange
    microbatches: int = 1

    def moe_layer(self, mlp: MoeParams, experts: MlpParams, place: LayerPlace, expert_to_slot: jax.Array) -> MoeLayer:
        """A layer's experts wherever this rank's rows of the placement, `int32[moe layers, logical]`, have them."""
        router = LayerRouter(mlp.router, mlp.router_bias, expert_to_slot[place.row], self.config.router)
        return MoeLayer(router, experts, place.stack, mlp.shared, self.exchange, place.channel)


@flax.struct.dataclass
class PassOutput:
    """What a pass returns.

    Attributes:
        hidden: `[tokens, hidden]` of this rank, after the final norm.
        cache: the cache with the tokens' latents.
        slot_load: `int32[moe layers, local slots]`, rows each expert received (the MTP layer's last).
    """

    hidden: jax.Array
    cache: jax.Array
    slot_load: jax.Array


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """Consecutive layers of one kind: `count` of them, from `stack_start` in their stack and `first_layer` in all."""

    is_moe: bool
    stack_start: int
    first_layer: int
    count: int

    def take(self, params: Params, *, keep_experts: bool = False) -> tuple[LayerParams, MlpParams | None]:
        """The layers of the run's whole stack, and apart from them the experts; or the run's alone, with theirs.

        A scan over layers would copy all of a layer's matrices, and experts of which it reads a few.
        """
        layers = params.moe if self.is_moe else params.dense
        assert layers is not None  # a run has layers
        if not keep_experts:
            return split_experts(layers)
        index = slice(self.stack_start, self.stack_start + self.count)
        if index != slice(0, layers.input_norm.shape[0]):
            layers = jax.tree.map(operator.itemgetter(index), layers)
        return layers, None


def layer_runs(config: ModelConfig) -> list[LayerRun]:
    runs: list[LayerRun] = []
    seen = {False: 0, True: 0}
    for layer in range(config.num_hidden_layers):
        is_moe = layer in config.moe_layer_ids
        if runs and runs[-1].is_moe == is_moe:
            runs[-1] = dataclasses.replace(runs[-1], count=runs[-1].count + 1)
        else:
            runs.append(LayerRun(is_moe, seen[is_moe], layer, 1))
        seen[is_moe] += 1
    return runs


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What all layers of one pass share.

    Attributes:
        config: the model's.
        channel: the name of the pass: "prefill", "decode" or "train".
        attend, moe: how the pass attends, and how its tokens reach their experts.
        unroll: whether the scan over layers is unrolled, experts and all (training: a loop would keep what the backward
            pass needs in stacked copies, and add up the gradient of all experts once a layer).
    """

    config: ModelConfig
    channel: str
    attend: Attend
    moe: Moe
    unroll: bool = False


def after_attention(
    params: LayerParams, attended: jax.Array, x: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """A layer from its attention to its MLP: `(x, normalized x)`."""
    with jax.named_scope("oproj"):
        x = x + linear(attended, params.attn.o, params.attn.o_bias)
    return x, rms_norm(x, params.post_attn_norm, config.rms_norm_eps)


def _decoder_layer(
    params: LayerParams,
    experts: MlpParams | None,
    place: LayerPlace,
    x: jax.Array,
    cache: jax.Array,
    context: PassContext,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """One layer: `(x, cache, num_tokens_per_expert or None)`. `params` is this layer's, `experts` its whole stack's."""
    config = context.config
    with jax.named_scope("attention"):
        normed = rms_norm(x, params.input_norm, config.rms_norm_eps)
        attended, cache = context.attend(params.attn, normed, cache, place.cache)
    x, normed = after_attention(params, attended, x, config)
    mlp = params.mlp
    if not isinstance(mlp, MoeParams):
        with jax.named_scope("mlp"):
            return x + swiglu(normed, mlp.w13, mlp.w2), cache, None
    if experts is None:
        experts, place = jax.tree.map(lambda leaf: leaf[None], mlp.experts), dataclasses.replace(place, stack=0)
    y, load = context.moe(normed, mlp, experts, place)
    return x + y.astype(x.dtype), cache, load


def run_layers(
    params: Params, x: jax.Array, cache: jax.Array, context: PassContext
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """All decoder layers: `(x, cache, [num_tokens_per_expert [layers of a run, local slots]])`."""
    loads: list[jax.Array] = []
    for run in layer_runs(context.config):
        layers, experts = run.take(params, keep_experts=context.unroll)
        x, cache, load = run_stack(layers, experts, run, x, cache, context)
        if load is not None:
            loads.append(load)
    return x, cache, loads


def run_stack(
    layers: LayerParams,
    experts: MlpParams | None,
    run: LayerRun,
    x: jax.Array,
    cache: jax.Array,
    context: PassContext,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The layers of one run: `(x, cache, num_tokens_per_expert [layers, local slots] or None)`.

    `layers` and `experts` are as `LayerRun.take` gives them.
    """
    name = f"{context.channel}/layer{run.first_layer}"

    def step(carry: tuple, xs: tuple) -> tuple[tuple, jax.Array | None]:
        layer_params, stack_index, cache_layer = xs
        if layer_params is None:
            layer_params = layer_at(layers, stack_index)
        x, cache = carry
        place = LayerPlace(stack_index, stack_index, cache_layer, name)
        x, cache, load = _decoder_layer(layer_params, experts, place, x, cache, context)
        return (x, cache), load

    count = jnp.arange(run.count)
    xs = (layers if context.unroll else None, run.stack_start + count, run.first_layer + count)
    (x, cache), load = scan(step, (x, cache), xs, length=run.count, unroll=context.unroll)
    return x, cache, load


def embed(table: jax.Array, token_ids: jax.Array) -> jax.Array:
    return jnp.take(table, jnp.maximum(token_ids, 0), axis=0)


def lm_head(params: Params, hidden: jax.Array) -> jax.Array:
    """Return `float32[tokens, vocabulary]` for hidden states after the final norm."""
    head = params.embed if params.head is None else params.head
    with jax.named_scope("lm_head"):
        return linear(hidden, head).astype(jnp.float32)


def mtp_head(params: Params, hidden: jax.Array) -> jax.Array:
    """Return `float32[tokens, vocabulary]` for the MTP module's hidden states."""
    head = None if params.mtp is None else params.mtp.head
    if head is None:
        return lm_head(params, hidden)
    with jax.named_scope("lm_head"):
        return linear(hidden, head).astype(jnp.float32)


def main_pass(
    params: Params, token_ids: jax.Array, cache: jax.Array, context: PassContext
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """The model without its MTP module: `(hidden after the final norm, cache, loads)`."""
    x, cache, loads = run_layers(params, embed(params.embed, token_ids), cache, context)
    return rms_norm(x, params.norm, context.config.rms_norm_eps), cache, loads


def mtp_input(
    params: Params, mtp: MtpParams, hidden: jax.Array, next_token_ids: jax.Array, config: ModelConfig
) -> jax.Array:
    """What the MTP module's layer is given, `[tokens, hidden]`."""
    embedding = embed(params.embed if mtp.embed is None else mtp.embed, next_token_ids)
    parts = [rms_norm(embedding, mtp.enorm, config.rms_norm_eps), rms_norm(hidden, mtp.hnorm, config.rms_norm_eps)]
    with jax.named_scope("mtp_input"):
        return linear(jnp.concatenate(parts, axis=-1), mtp.eh_proj)


def mtp_latents(
    params: Params,
    mtp: MtpParams,
    hidden: jax.Array,
    next_token_ids: jax.Array,
    positions: jax.Array,
    config: ModelConfig,
) -> jax.Array:
    """What the MTP module's layer of the cache holds of tokens, `[tokens, latent width]`: it follows from a token's
    hidden state and the token after it alone."""
    layer = jax.tree.map(operator.itemgetter(0), split_experts(mtp.layer)[0])
    x = mtp_input(params, mtp, hidden, next_token_ids, config)
    return key_value_latent(layer.attn, config, rms_norm(x, layer.input_norm, config.rms_norm_eps), positions)


def mtp_pass(
    params: Params, mtp: MtpParams, hidden: jax.Array, next_token_ids: jax.Array, cache: jax.Array, context: PassContext
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """The MTP module: from the hidden state at t and the token at t+1, the hidden state that predicts t+2."""
    config = context.config
    x = mtp_input(params, mtp, hidden, next_token_ids, config)
    layers, experts = (mtp.layer, None) if context.unroll else split_experts(mtp.layer)
    layer = jax.tree.map(operator.itemgetter(0), layers)
    place = LayerPlace(0, -1, config.num_hidden_layers, f"{context.channel}/mtp")
    x, cache, load = _decoder_layer(layer, experts, place, x, cache, context)
    return rms_norm(x, mtp.norm, config.rms_norm_eps), cache, [] if load is None else [load[None]]


def exchanged_moe(spec: RankSpec, expert_to_slot: jax.Array, is_valid: jax.Array) -> Moe:
    """Experts wherever the placement has them, reached by the exchange."""

    def moe(x: jax.Array, mlp: MoeParams, experts: MlpParams, place: LayerPlace) -> tuple[jax.Array, jax.Array]:
        return spec.moe_layer(mlp, experts, place, expert_to_slot)(x, is_valid)

    return moe


def stack_loads(loads: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(loads) if loads else jnp.zeros((0, 0), jnp.int32)
