"""Two microbatches that take turns: one attends while the other's rows travel to experts and back (section 4.2.3).

In a MoE layer each of the four exchanges, two dispatches and two combines, stands between its two halves beside the
other microbatch's work, across layers too:

    A's dispatch   behind   B's attention
    B's dispatch   behind   A's experts
    A's combine    behind   B's experts
    B's combine    behind   A's attention of the next layer

The scan over layers is cut where A has chosen its experts and B is done with the layer before: nothing is under way
there, so that no buffer that peers may be reading goes through the scan's carry, where XLA could copy it.

Rows are independent of each other: the tokens are those of one batch, and products of half the rows may round
differently in the last bit.
"""

import dataclasses
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from cmjax.mesh import fabric
from cmjax.model.params import LayerParams, MoeParams, Params
from cmjax.model.transformer import LayerRun, PassContext, RankSpec, attention_half, layer_runs, run_stack
from cmjax.moe import ExpertParams, SplitExchange, gate, run_experts, swiglu


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Half of a pass's tokens.

    Attributes:
        context: how they attend.
        is_valid: `bool[tokens]`; padding goes to no expert.
    """

    context: PassContext
    is_valid: jax.Array


@flax.struct.dataclass
class _Routed:
    """Tokens that have attended and chosen their experts: `x`, normalized `x`, and the choices."""

    x: jax.Array
    normed: jax.Array
    slot_idx: jax.Array
    weights: jax.Array


Pair = tuple[jax.Array, jax.Array]


def pipelined_layers(
    params: Params,
    x: jax.Array,
    cache: jax.Array,
    whole: PassContext,
    halves: tuple[Microbatch, Microbatch],
    maps: jax.Array,
    spec: RankSpec,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """All decoder layers, those with experts in two microbatches; results as of `run_layers`.

    Args:
        x: `[tokens, hidden]`, A's half first.
        whole: how all tokens attend, in layers without experts, which have no exchange to hide.
        halves: A and B; A's tokens never attend to B's.
        maps: `int32[moe layers, logical]`, this rank's rows of the placement.
    """
    loads = []
    for run in layer_runs(spec.config):
        layers, experts = run.take(params)
        if experts is None:
            x, cache, _ = run_stack(layers, None, run, x, cache, whole)
        else:
            x_a, x_b = jnp.split(x, 2)
            (x_a, x_b), cache, load = _MoeRun(layers, experts, run, halves, maps, spec).run((x_a, x_b), cache)
            x = jnp.concatenate([x_a, x_b])
            loads.append(load)
    return x, cache, loads


@dataclasses.dataclass(frozen=True)
class _MoeRun:
    """Consecutive MoE layers: their parameters, and whose rows they are for."""

    layers: LayerParams
    experts: ExpertParams
    place: LayerRun
    halves: tuple[Microbatch, Microbatch]
    maps: jax.Array
    spec: RankSpec

    def run(self, x: Pair, cache: jax.Array) -> tuple[Pair, jax.Array, jax.Array]:
        """All of them; the last one is apart, since no attention follows it."""
        last = self.place.count - 1
        routed, cache = self._attend(0, self._params(0), 0, x[0], cache)

        def step(carry: tuple, index: jax.Array) -> tuple[tuple, jax.Array]:
            routed, x_b, cache = carry
            routed, x_b, cache, load = self._layer(index, routed, x_b, cache, is_last=False)
            return (routed, x_b, cache), load

        loads = []
        x_b = x[1]
        if last:
            (routed, x_b, cache), load = lax.scan(step, (routed, x_b, cache), jnp.arange(last))
            loads.append(load)
        x_a, x_b, cache, load = self._layer(last, routed, x_b, cache, is_last=True)
        return (x_a, x_b), cache, jnp.concatenate([*loads, load[None]])

    def _params(self, index: Any) -> LayerParams:
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), self.layers)

    def _attend(
        self, which: int, layer: LayerParams, index: Any, x: jax.Array, cache: jax.Array
    ) -> tuple[_Routed, jax.Array]:
        half, spec = self.halves[which], self.spec
        mlp = cast(MoeParams, layer.mlp)
        with jax.named_scope("ab"[which]):
            x, normed, cache = attention_half(layer, self.place.first_layer + index, x, cache, half.context)
            slot_idx, weights = gate(
                normed,
                mlp.router,
                mlp.router_bias,
                self.maps[self.place.stack_start + index],
                half.is_valid,
                router_config=spec.config.router,
                num_dispatched_shared=spec.num_dispatched_shared,
            )
        return _Routed(x, normed, slot_idx, weights), cache

    def _layer(
        self, index: Any, a: _Routed, x_b: jax.Array, cache: jax.Array, *, is_last: bool
    ) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """From A's choices in layer `index` to those in the next (after the last: its result), and B's result."""
        exchange, layer = cast(SplitExchange, self.spec.exchange), self._params(index)
        channel = f"{self.halves[0].context.channel}/layer{self.place.first_layer}"

        def start(which: int, one: _Routed) -> Any:
            with jax.named_scope("ab"[which]), jax.named_scope("dispatch"):
                return exchange.dispatch_start(one.normed, one.slot_idx, channel=f"{channel}/{'ab'[which]}/dispatch")

        def compute(which: int, one: _Routed, going: Any, behind: Any, before: Any) -> tuple[jax.Array, Any, jax.Array]:
            """Receive rows behind some work, and run experts once `before` has been started."""
            with jax.named_scope("ab"[which]):
                with jax.named_scope("dispatch"):
                    received, handle = exchange.dispatch_done(going, hide_behind=behind)
                load = received.num_tokens_per_expert
                received = dataclasses.replace(received, messages=_after(before, received.messages))
                stack_index = self.place.stack_start + index
                rows = run_experts(received, self.experts, stack_index, one.slot_idx.shape, one.x.dtype)
                with jax.named_scope("combine"):
                    back = exchange.combine_start(rows, one.weights, handle, channel=f"{channel}/{'ab'[which]}/combine")
            return rows, back, load

        def finish(which: int, one: _Routed, shared: jax.Array | None, back: Any, behind: Any) -> jax.Array:
            with jax.named_scope("ab"[which]), jax.named_scope("combine"):
                y = exchange.combine_done(back, hide_behind=behind)
                return one.x + (y if shared is None else y + shared).astype(one.x.dtype)

        to_a = start(0, a)
        shared_a = self._shared(0, layer, _after(to_a, a.normed))
        b, cache = self._attend(1, layer, index, _after(to_a, x_b), cache)
        to_b = start(1, b)
        shared_b = self._shared(1, layer, _after(to_b, b.normed))
        rows_a, back_a, load_a = compute(0, a, to_a, (b.normed, shared_a), to_b)
        rows_b, back_b, load_b = compute(1, b, to_b, (rows_a, shared_b), back_a)
        result: Any = finish(0, a, shared_a, back_a, rows_b)
        behind = None
        if not is_last:
            result, cache = self._attend(0, self._params(index + 1), index + 1, _after(back_b, result), cache)
            behind = result.normed
        return result, finish(1, b, shared_b, back_b, behind), cache, load_a + load_b

    def _shared(self, which: int, layer: LayerParams, normed: jax.Array) -> jax.Array | None:
        """The shared experts that every rank has a copy of."""
        shared = cast(MoeParams, layer.mlp).shared
        if shared is None:
            return None
        with jax.named_scope("ab"[which]), jax.named_scope("shared_expert"):
            return swiglu(normed, shared.w13, shared.w2).astype(jnp.float32)


def _after(in_flight: Any, x: jax.Array) -> jax.Array:
    """`x`, once the exchange has been started; on one rank there is none."""
    return x if in_flight.token is None else fabric.after(in_flight.token, x)
