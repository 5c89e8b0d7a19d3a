"""Two microbatches that take turns: one attends while the other is with its experts (paper section 4.2.3).

Attention is in parts, a share of the keys each, so that each of the four exchanges of a MoE layer stands between its
two halves beside work of the other microbatch that takes about as long, across layers too:

    A's dispatch   behind   the first part of B's attention
    A's combine    behind   the rest of B's attention
    B's dispatch   behind   the first part of A's attention in the next layer
    B's combine    behind   the rest of A's attention in the next layer

The scan over layers is cut where A has chosen its experts and B is done with the layer before: nothing is under way
there, so that no buffer that peers may be reading goes through the scan's carry, where XLA could copy it.

Rows are independent of each other: the tokens are those of one batch, and products of half the rows may round
differently in the last bit.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.loops import scan
from cmjax.mesh import fabric
from cmjax.model.mla import CoreAttention, rms_norm
from cmjax.model.params import LayerParams, MoeParams, Params, layer_at
from cmjax.model.transformer import (
    AttendInParts,
    Index,
    LayerRun,
    PassContext,
    RankSpec,
    after_attention,
    layer_runs,
    run_stack,
)
from cmjax.moe import InFlight, MlpParams, ReceivedRows, SplitExchange, run_experts, swiglu


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Half of a pass's tokens.

    Attributes:
        attend: how they attend.
        is_valid: `bool[tokens]`; padding goes to no expert.
    """

    attend: AttendInParts
    is_valid: jax.Array


@flax.struct.dataclass
class _Routed:
    """Tokens that have attended and chosen their experts: `x`, normalized `x`, and the choices."""

    x: jax.Array
    normed: jax.Array
    slot_idx: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One of a run's layers, and its place there."""

    params: LayerParams
    mlp: MoeParams
    index: Index


@dataclasses.dataclass(frozen=True)
class _Back:
    """Rows on their way back from the experts, and what the shared experts that every rank has made of the tokens."""

    in_flight: InFlight[jax.Array]
    shared: jax.Array | None


Pair = tuple[jax.Array, jax.Array]
Going = InFlight[tuple[ReceivedRows, Any]]  # a dispatch under way
Behind = jax.Array | tuple[jax.Array, ...]  # what an exchange hides behind


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
            channel = f"{whole.channel}/layer{run.first_layer}"
            (x_a, x_b), cache, load = _MoeRun(layers, experts, run, halves, maps, spec, channel).run((x_a, x_b), cache)
            x = jnp.concatenate([x_a, x_b])
            loads.append(load)
    return x, cache, loads


@dataclasses.dataclass(frozen=True)
class _MoeRun:
    """Consecutive MoE layers: their parameters, whose rows they are for, and the names of their exchanges."""

    layers: LayerParams
    experts: MlpParams
    place: LayerRun
    halves: tuple[Microbatch, Microbatch]
    maps: jax.Array
    spec: RankSpec
    channel: str

    def run(self, x: Pair, cache: jax.Array) -> tuple[Pair, jax.Array, jax.Array]:
        """All of them; the last one is apart, since no attention follows it."""
        last = self.place.count - 1
        core, cache = self._begin(0, self._at(0), x[0], cache)
        routed, *_ = self._end(0, self._at(0), x[0], core, cache)

        def step(carry: tuple, index: jax.Array) -> tuple[tuple, jax.Array]:
            routed, x_b, cache = carry
            routed, x_b, cache, load = self._both(self._at(index), self._at(index + 1), routed, x_b, cache)
            return (routed, x_b, cache), load

        loads = []
        x_b = x[1]
        if last:
            (routed, x_b, cache), load = scan(step, (routed, x_b, cache), jnp.arange(last), length=last)
            loads.append(load)
        x_a, x_b, cache, load = self._both(self._at(last), None, routed, x_b, cache)
        return (x_a, x_b), cache, jnp.concatenate([*loads, load[None]])

    def _at(self, index: Index) -> _Layer:
        params = layer_at(self.layers, jnp.asarray(self.place.stack_start + index, jnp.int32))
        return _Layer(params, cast(MoeParams, params.mlp), index)

    def _both(
        self, layer: _Layer, following: _Layer | None, a: _Routed, x_b: jax.Array, cache: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """From A's choices in a layer to those in the following one (if there is none, its result), and B's result."""
        to_a = self._dispatch(0, a)
        core, cache = self._begin(1, layer, x_b, cache, to_a)
        back_a, load_a = self._experts(0, layer, a, to_a, core)
        b, behind, total = self._end(1, layer, x_b, core, cache, back_a.in_flight)
        to_b = self._dispatch(1, b)
        if behind is b.normed:
            behind = _after(to_b, behind)  # B's rows leave before A's are waited for
        x_a = self._combine(0, a, back_a, behind)
        if following is None:
            back_b, load_b = self._experts(1, layer, b, to_b, None)
            return x_a, self._combine(1, b, back_b, None), cache, load_a + load_b
        core, cache = self._begin(0, following, x_a, cache, to_b, total)
        back_b, load_b = self._experts(1, layer, b, to_b, core)
        a, behind, _ = self._end(0, following, x_a, core, cache, back_b.in_flight)
        return a, self._combine(1, b, back_b, behind), cache, load_a + load_b

    def _begin(
        self,
        which: int,
        layer: _Layer,
        x: jax.Array,
        cache: jax.Array,
        going: Going | None = None,
        total: jax.Array | None = None,
    ) -> tuple[CoreAttention, jax.Array]:
        """Attention up to its first part, which the other's dispatch `going` hides behind; it writes to the cache after
        the other's, of softmax sums `total`, has read it."""
        attend = self.halves[which].attend
        with _scope(which, "attention"):
            normed = rms_norm(x, layer.params.input_norm, self.spec.config.rms_norm_eps)
            if not attend.has_lanes:
                normed = _after(going, normed)
            with jax.named_scope("projections"):
                core, cache = attend.begin(layer.params.attn, normed, cache, self._cache_layer(layer), total)
            if attend.has_lanes:
                core = dataclasses.replace(core, query=_after(going, core.query))
            return self._part(which, layer, core, cache, 0), cache

    def _end(
        self,
        which: int,
        layer: _Layer,
        x: jax.Array,
        core: CoreAttention,
        cache: jax.Array,
        going: InFlight[jax.Array] | None = None,
    ) -> tuple[_Routed, Behind, jax.Array]:
        """The rest of attention, and the gate; also what the other's combine `going` hides behind, and its sums."""
        attend, spec = self.halves[which].attend, self.spec
        with _scope(which, "attention"):
            core = dataclasses.replace(core, query=_after(going, core.query))
            core = self._part(which, layer, core, cache, 1)
            behind = core.met
            if attend.has_lanes:
                core = self._part(which, layer, core, cache, 2)
            total = core.state.total
            attended = attend.end(layer.params.attn, core)
        with jax.named_scope("ab"[which]):
            x, normed = after_attention(layer.params, attended, x, spec.config)
            router = spec.router(layer.mlp, self.maps[self.place.stack_start + layer.index])
            slot_idx, weights = router.slots(normed, self.halves[which].is_valid)
        return _Routed(x, normed, slot_idx, weights), (behind if attend.has_lanes else normed), total

    def _part(self, which: int, layer: _Layer, core: CoreAttention, cache: jax.Array, index: int) -> CoreAttention:
        attend = self.halves[which].attend
        part = (index, 3 if attend.has_lanes else 2)
        with jax.named_scope(f"part{index}"):
            return attend.part(layer.params.attn, core, cache, self._cache_layer(layer), part)

    def _cache_layer(self, layer: _Layer) -> Index:
        return self.place.first_layer + layer.index

    def _dispatch(self, which: int, one: _Routed) -> Going:
        exchange = cast(SplitExchange, self.spec.exchange)
        with _scope(which, "dispatch"):
            return exchange.dispatch_start(one.normed, one.slot_idx, channel=f"{self.channel}/{'ab'[which]}/dispatch")

    def _experts(
        self, which: int, layer: _Layer, one: _Routed, going: Going, core: CoreAttention | None
    ) -> tuple[_Back, jax.Array]:
        """Receive the rows behind the other's attention `core`, run the experts, send the rows back."""
        exchange, shared = cast(SplitExchange, self.spec.exchange), layer.mlp.shared
        y = None
        if shared is not None:  # those that every rank has a copy of
            with _scope(which, "shared_expert"):
                y = swiglu(_after(going, one.normed), shared.w13, shared.w2).astype(jnp.float32)
        behind = (y, None if core is None else core.met)
        with _scope(which, "dispatch"):
            received, handle = going.done(behind)
        with jax.named_scope("ab"[which]):
            stack_index = self.place.stack_start + layer.index
            rows = run_experts(received, self.experts, stack_index, one.slot_idx.shape, one.x.dtype)
        with _scope(which, "combine"):
            back = exchange.combine_start(rows, one.weights, handle, channel=f"{self.channel}/{'ab'[which]}/combine")
        return _Back(back, y), received.num_tokens_per_expert

    def _combine(self, which: int, one: _Routed, back: _Back, behind: Behind | None) -> jax.Array:
        with _scope(which, "combine"):
            y = back.in_flight.done(behind)
            return one.x + (y if back.shared is None else y + back.shared).astype(one.x.dtype)


@contextlib.contextmanager
def _scope(which: int, name: str) -> Iterator[None]:
    with jax.named_scope("ab"[which]), jax.named_scope(name):
        yield


def _after(in_flight: InFlight[Any] | None, x: jax.Array) -> jax.Array:
    """`x`, once the exchange has been started; on one rank there is none."""
    return x if in_flight is None or in_flight.token is None else fabric.after(in_flight.token, x)
