"""The graph of a step in two microbatches: what each exchange hides behind neither waits for it nor is waited for."""

import jax
import pytest

from cmjax.model import pipeline
from cmjax.moe import DispatchInFlight
from cmjax.serve import decode, prefill
from tests.helpers import tiny_model
from tests.serve.driving import make_engine

# (microbatch, exchange) -> the work beside it, as scopes of the program: the other's attention, B's of this layer and
# A's of the next.
BEHIND = {
    ("a", "dispatch"): ("b", "part0"),
    ("a", "combine"): ("b", "part1"),
    ("b", "dispatch"): ("a", "part0"),
    ("b", "combine"): ("a", "part1"),
}
# Prefill's third lane: (microbatch, whose arithmetic before or after an exchange, an operation of it) -> the other's
# work that goes on meanwhile.
BESIDE = {
    ("a", "dispatch", "pack"): ("b", "projections"),
    ("a", "combine", "reduce_sum"): ("b", "part2"),
    ("b", "combine", "reduce_sum"): ("a", "part2"),
}


def inner_jaxprs(eqn):
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(one, jax.extend.core.ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, jax.extend.core.Jaxpr):
                yield one


def layer_bodies(jaxpr):
    """Bodies of loops that hold the two halves of exchanges themselves."""
    for eqn in jaxpr.eqns:
        for inner in inner_jaxprs(eqn):
            names = [one.primitive.name for one in inner.eqns]
            if eqn.primitive.name == "scan" and "fabric_ragged_all_to_all_start" in names:
                yield inner
            yield from layer_bodies(inner)


class Graph:
    """The equations of one body, what each is for, and which depend on which."""

    def __init__(self, jaxpr):
        self.eqns = jaxpr.eqns
        made_by = {var: i for i, eqn in enumerate(self.eqns) for var in eqn.outvars}
        self.needs = []  # all that an equation depends on, directly or not
        for eqn in self.eqns:
            direct = {made_by[var] for var in eqn.invars if not hasattr(var, "val") and var in made_by}
            self.needs.append(direct.union(*(self.needs[i] for i in direct)))
        self.scopes = [str(eqn.source_info.name_stack).split("/") for eqn in self.eqns]

    def find(self, microbatch, scope, *names):
        """Equations of a microbatch in a scope, by primitive; the heavy ones where no name is given."""
        names = names or ("dot_general", "while", "scan", "pjit", "jit")
        found = []
        for i, eqn in enumerate(self.eqns):
            is_named = eqn.primitive.name in names or eqn.params.get("name") in names
            if is_named and microbatch in self.scopes[i] and scope in self.scopes[i]:
                found.append(i)
        return found


def faults(graph):
    """What keeps an exchange from being hidden, or leaves its place to chance."""
    for (microbatch, exchange), (other, work) in BEHIND.items():
        (start,) = graph.find(microbatch, exchange, "fabric_ragged_all_to_all_start")
        ends = graph.find(microbatch, exchange, "fabric_ragged_all_to_all_done")
        heavy = graph.find(other, work)
        name = f"{microbatch}/{exchange} behind {other}/{work}"
        if not heavy:
            yield f"{name}: there is no such work"
        between = [i for i in heavy if start in graph.needs[i] and i in graph.needs[ends[-1]]]
        if not between:
            yield f"{name}: no work is held between its halves"
        for i in heavy:
            if i in graph.needs[start]:
                yield f"{name}: its start waits for the work"
            if graph.needs[i].intersection(ends):
                yield f"{name}: the work waits for its end"


def waits_between(graph):
    """What keeps arithmetic and attention from being lanes of their own."""
    for (microbatch, exchange, operation), (other, work) in BESIDE.items():
        arithmetic = graph.find(microbatch, exchange, operation)
        beside = graph.find(other, work)
        name = f"{microbatch}/{exchange} beside {other}/{work}"
        if not arithmetic or not beside:
            yield f"{name}: there is no such work"
        if any(i in graph.needs[j] or j in graph.needs[i] for i in arithmetic for j in beside):
            yield f"{name}: one waits for the other"


@pytest.fixture(scope="module")
def traced():
    def trace(phase="decode"):
        # Long enough for a loop over several chunks of keys.
        settings = {"max_model_len": 512, "max_num_seqs_per_rank": 2, "max_num_batched_tokens": 64, "microbatches": 2}
        engine = make_engine(tiny_model(num_hidden_layers=4, max_position_embeddings=512), 4, **settings)
        if phase == "decode":
            target = engine.decode
            state = target.empty_state(target.variants_for(2, ())[0])
            arguments = (target.params, target.expert_to_slot, target.cache, state)
            jaxpr = decode.trace(*arguments, spec=target.spec, num_steps=2).jaxpr
        else:
            source = engine.prefill[0]
            batch = source.empty_batch(source.num_step_tokens)
            jaxpr = prefill.trace(source.params, source.expert_to_slot, source.cache, batch, spec=source.spec).jaxpr
        *_, body = layer_bodies(jaxpr.jaxpr)  # that of the layers is within that of the steps
        return Graph(body)

    return trace


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_exchange_stands_beside_the_others_attention(traced, phase):
    assert list(faults(traced(phase))) == []


def test_arithmetic_is_a_lane_in_prefill(traced):
    assert list(waits_between(traced("prefill"))) == []
    # In decode it is part of a microbatch's turn.
    assert len(list(waits_between(traced("decode")))) == len(BESIDE)


def test_the_check_sees_a_start_that_may_come_late(traced, monkeypatch):
    monkeypatch.setattr(pipeline, "after_start", lambda in_flight, x: x)
    jax.clear_caches()
    found = list(faults(traced()))
    jax.clear_caches()
    assert {fault.split(": ")[1] for fault in found} == {"no work is held between its halves"}


def test_the_check_sees_work_that_waits(traced, monkeypatch):
    """As in a step that does one after the other: B attends once A's rows have arrived."""
    after = pipeline.after_start

    def after_the_end(in_flight, x):
        if isinstance(in_flight, DispatchInFlight) and x.ndim == 2:
            with jax.named_scope("a"), jax.named_scope("dispatch"):
                received, _ = in_flight.done()
            x = x + 0 * received.messages[0, 0]
        return after(in_flight, x)

    monkeypatch.setattr(pipeline, "after_start", after_the_end)
    jax.clear_caches()
    found = list(faults(traced()))
    jax.clear_caches()
    assert "a/dispatch behind b/part0: the work waits for its end" in found
