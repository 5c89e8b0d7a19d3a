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

import dataclasses
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.loops import scan
from cmjax.model.config import ModelConfig
from cmjax.model.mla import CoreAttention, rms_norm
from cmjax.model.params import LayerParams, MoeParams, Params, layer_at
from cmjax.model.transformer import (
    AttendInParts,
    Index,
    LayerPlace,
    LayerRun,
    PassContext,
    RankSpec,
    after_attention,
    layer_runs,
    run_stack,
)
from cmjax.moe import InFlight, MlpParams, MoeLayer, Returning, Routed, after_start


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
class _Chosen:
    """Tokens that have attended and chosen their experts: before their norm, and after it."""

    x: jax.Array
    routed: Routed


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
        first, _ = self._at(0)
        core, cache = first.begin(x[0], cache)
        a, *_ = first.end(x[0], core, cache)

        def step(carry: tuple, index: jax.Array) -> tuple[tuple, jax.Array]:
            a, x_b, cache, load = _both(self._at(index), self._at(index + 1)[0], *carry)
            return (a, x_b, cache), load

        loads = []
        x_b = x[1]
        if last:
            (a, x_b, cache), load = scan(step, (a, x_b, cache), jnp.arange(last), length=last)
            loads.append(load)
        x_a, x_b, cache, load = _both(self._at(last), None, a, x_b, cache)
        return (x_a, x_b), cache, jnp.concatenate([*loads, load[None]])

    def _at(self, index: Index) -> "tuple[_Turn, _Turn]":
        """Both microbatches in one of the layers."""
        stack = self.place.stack_start + index
        params = layer_at(self.layers, jnp.asarray(stack, jnp.int32))
        place = LayerPlace(stack, stack, self.place.first_layer + index, self.channel)
        moe = self.spec.moe_layer(cast(MoeParams, params.mlp), self.experts, place, self.maps)
        moes = (dataclasses.replace(moe, channel=f"{self.channel}/{name}") for name in "ab")
        a, b = (_Turn(*one, params, place.cache, self.spec.config) for one in zip("ab", self.halves, moes, strict=True))
        return a, b


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A microbatch in a layer: what it does in its turns, in its scope, "a" or "b"."""

    name: str
    half: Microbatch
    moe: MoeLayer
    params: LayerParams
    cache_layer: Index
    config: ModelConfig

    def begin(
        self, x: jax.Array, cache: jax.Array, going: InFlight[Any] | None = None, total: jax.Array | None = None
    ) -> tuple[CoreAttention, jax.Array]:
        """Attention up to its first part, which the other's dispatch `going` hides behind; it writes to the cache after
        the other's, of softmax sums `total`, has read it."""
        attend = self.half.attend
        with jax.named_scope(f"{self.name}/attention"):
            normed = rms_norm(x, self.params.input_norm, self.config.rms_norm_eps)
            if not attend.has_lanes:
                normed = after_start(going, normed)
            with jax.named_scope("projections"):
                core, cache = attend.begin(self.params.attn, normed, cache, self.cache_layer, total)
            if attend.has_lanes:
                core = dataclasses.replace(core, query=after_start(going, core.query))
            return self._part(core, cache, 0), cache

    def end(
        self, x: jax.Array, core: CoreAttention, cache: jax.Array, going: InFlight[Any] | None = None
    ) -> tuple[_Chosen, Any, jax.Array]:
        """The rest of attention, and the gate; also what the other's combine `going` hides behind, and its sums."""
        attend = self.half.attend
        with jax.named_scope(f"{self.name}/attention"):
            core = self._part(dataclasses.replace(core, query=after_start(going, core.query)), cache, 1)
            behind = core.met
            if attend.has_lanes:
                core = self._part(core, cache, 2)
            attended = attend.end(self.params.attn, core)
        with jax.named_scope(self.name):
            x, normed = after_attention(self.params, attended, x, self.config)
            chosen = _Chosen(x, self.moe.route(normed, self.half.is_valid))
        return chosen, (behind if attend.has_lanes else normed), core.state.total

    def _part(self, core: CoreAttention, cache: jax.Array, index: int) -> CoreAttention:
        attend = self.half.attend
        with jax.named_scope(f"part{index}"):
            return attend.part(self.params.attn, core, cache, self.cache_layer, (index, 3 if attend.has_lanes else 2))

    def dispatch(self, one: _Chosen) -> InFlight[Any]:
        with jax.named_scope(self.name):
            return self.moe.dispatch(one.routed)

    def run(self, one: _Chosen, going: InFlight[Any], core: CoreAttention | None = None) -> Returning:
        """The experts, over rows received behind the other's attention `core`."""
        with jax.named_scope(self.name):
            return self.moe.run(one.routed, going, None if core is None else core.met)

    def combine(self, one: _Chosen, back: Returning, behind: Any = None) -> jax.Array:
        with jax.named_scope(self.name):
            return one.x + self.moe.combine(back, behind).astype(one.x.dtype)


def _both(
    layer: tuple[_Turn, _Turn], following: _Turn | None, a: _Chosen, x_b: jax.Array, cache: jax.Array
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """From A's choices in a layer to those in the following one (if there is none, its result), and B's result."""
    turn_a, turn_b = layer
    to_a = turn_a.dispatch(a)
    core, cache = turn_b.begin(x_b, cache, to_a)
    back_a = turn_a.run(a, to_a, core)
    b, behind, total = turn_b.end(x_b, core, cache, back_a.in_flight)
    to_b = turn_b.dispatch(b)
    if not turn_b.half.attend.has_lanes:
        behind = after_start(to_b, behind)  # B's rows leave before A's are waited for
    x_a = turn_a.combine(a, back_a, behind)
    load = back_a.num_tokens_per_expert
    if following is None:
        back_b = turn_b.run(b, to_b)
        return x_a, turn_b.combine(b, back_b), cache, load + back_b.num_tokens_per_expert
    core, cache = following.begin(x_a, cache, to_b, total)
    back_b = turn_b.run(b, to_b, core)
    a, behind, _ = following.end(x_a, core, cache, back_b.in_flight)
    return a, turn_b.combine(b, back_b, behind), cache, load + back_b.num_tokens_per_expert
