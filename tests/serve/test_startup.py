"""An engine that comes up: the first requests are served while most of its steps are still to be compiled."""

import collections
import dataclasses
import itertools
import threading
import time
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from cmjax.mesh import EP_AXIS
from cmjax.schedule import SERVING_SHAPES, CompilePlan, DecodeVariant, PrefillVariant
from cmjax.serve import SamplingParams
from cmjax.serve.instances import JaxExecutor
from cmjax.serve.instances.direct import plan_prompts
from cmjax.serve.startup import Startup, in_order
from tests.parity import load_case
from tests.serve.driving import make_engine, model_of

GREEDY, ANY = SERVING_SHAPES
RNG = np.random.default_rng(0)
SAMPLINGS = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 2},
    {"presence_penalty": 1.5, "repetition_penalty": 1.3},
    {"logprobs": 3, "prompt_logprobs": 2},
    {"min_tokens": 4, "stop_token_ids": tuple(range(8)), "allowed_token_ids": tuple(range(0, 90, 3))},
]


def test_steps_are_compiled_by_how_soon_they_are_needed():
    prefill = [PrefillVariant(size, ANY) for size in (128, 512, 2048)]
    assert [one.num_tokens for one in in_order(prefill)] == [128, 2048, 512]
    decode = [DecodeVariant(slots, 8, shape) for shape in SERVING_SHAPES for slots in (1, 2, 4, 8)]
    order = [(one.num_slots, one.sampling == ANY) for one in in_order(decode)]
    assert order == [*((slots, True) for slots in (1, 8, 2, 4)), *((slots, False) for slots in (1, 8, 2, 4))]
    assert in_order(decode[:1]) == decode[:1]


OneSize = collections.namedtuple("OneSize", "mesh")
OF_ONE_SIZE = OneSize(AbstractMesh((1,), (EP_AXIS,)))


class FakeFleet:
    """Instances whose steps take a second each to compile, on a clock of their own."""

    def __init__(self, *failing):
        self.now, self.used, self.told, self.failing = 0.0, [], [], failing
        self.is_open = False
        steps = {
            "prefill0": [PrefillVariant(size, ANY) for size in (128, 512)],
            "decode0": [DecodeVariant(slots, 8, shape) for shape in SERVING_SHAPES for slots in (1, 8)],
        }
        self.executors = {name: self.executor(name, variants) for name, variants in steps.items()}

    def executor(self, spec, variants):
        role = "decode" if spec == "decode" else "prefill"
        return types.SimpleNamespace(
            role=role, spec=OF_ONE_SIZE, serving_variants=lambda: tuple(variants), prepare=self.prepare
        )

    def prepare(self, variant):
        self.now += 1.0
        if variant in self.failing:
            raise RuntimeError("does not fit")

    def use(self, name, variant):
        self.used.append((name, variant))

    def compile_handoff(self):
        assert {name for name, _ in self.used} == set(self.executors)

    def open_for_serving(self):
        self.is_open = True

    def startup(self):
        return Startup(self, self.told.append, lambda: self.now)


def test_it_says_how_far_it_is():
    fleet = FakeFleet()
    startup = fleet.startup()
    startup.compile_first()
    assert fleet.is_open
    assert len(fleet.used) == 2
    startup.compile_rest()
    assert len(fleet.used) == 6
    told = fleet.told
    assert [one.num_done for one in told] == list(range(7))
    assert all(one.num_steps == 6 for one in told)
    assert told[0].left_s is None
    assert str(told[0]) == "compiled 0 of 6 steps in 0 s"
    for one in told[1:]:
        assert one.left_s == pytest.approx(one.elapsed_s / one.num_done * (6 - one.num_done))
    assert "about" not in str(told[-1])


def test_a_step_that_cannot_be_compiled_leaves_the_others():
    failing = DecodeVariant(8, 8, ANY)
    fleet = FakeFleet(failing)
    startup = fleet.startup()
    startup.compile_first()
    errors = []
    startup.compile_rest_behind(errors.append)
    startup._thread.join()
    assert [str(error) for error in errors] == ["does not fit"]
    assert ("prefill0", PrefillVariant(512, ANY)) in fleet.used
    assert ("decode0", failing) not in fleet.used


def test_instances_of_a_kind_come_after_the_first_of_each():
    fleet = FakeFleet()
    fleet.executors = {
        name: fleet.executor(name[:-1], [PrefillVariant(128, ANY)]) for name in ("prefill0", "prefill1", "decode0")
    }
    assert [*fleet.startup()._steps] == ["prefill0", "decode0", "prefill1"]


def test_nothing_is_compiled_after_the_end():
    fleet = FakeFleet()
    startup = fleet.startup()
    startup.compile_first()
    startup.stop()
    startup.compile_rest()
    assert len(fleet.used) == 2


class TwoOfAKind(FakeFleet):
    """`meet` is called by each instance that prepares its step."""

    def __init__(self, meet):
        super().__init__()
        self.meet, self.prepared = meet, []
        variants = [PrefillVariant(128, ANY)]
        self.executors = {name: self.executor("prefill", variants) for name in ("prefill0", "prefill1")}

    def prepare(self, variant):
        self.meet()
        self.prepared.append(variant)


def test_instances_prepare_a_step_side_by_side_where_they_share_nothing(monkeypatch):
    monkeypatch.setattr("cmjax.serve.startup.programs_are_shared", lambda mesh: False)
    fleet = TwoOfAKind(threading.Barrier(2, timeout=60).wait)
    fleet.startup().compile_first()
    assert len(fleet.prepared) == 2


def test_instances_of_a_kind_take_turns_at_a_step_that_they_share(monkeypatch):
    monkeypatch.setattr("cmjax.serve.startup.programs_are_shared", lambda mesh: True)
    alone = threading.Lock()

    def meet():
        assert alone.acquire(blocking=False)
        time.sleep(0.05)  # so that the other one would come
        alone.release()

    fleet = TwoOfAKind(meet)
    fleet.startup().compile_first()
    assert len(fleet.prepared) == 2


@pytest.mark.parametrize("leaves", [True, False])
def test_who_waits_for_a_turn_sees_what_has_happened_meanwhile(monkeypatch, leaves):
    """The server ends, or the instance is taken out."""
    monkeypatch.setattr("cmjax.serve.startup.programs_are_shared", lambda mesh: True)
    has_begun, may_go_on = threading.Event(), threading.Event()

    def meet():
        has_begun.set()
        assert may_go_on.wait(60)

    fleet = TwoOfAKind(meet)
    startup = fleet.startup()
    thread = threading.Thread(target=startup._on_all, args=(lambda name: startup._compile(name, startup._steps[name]),))
    thread.start()
    assert has_begun.wait(60)
    if leaves:
        fleet.executors = {}
    else:
        startup.stop()
    may_go_on.set()
    thread.join(60)
    assert len(fleet.prepared) == 1


@pytest.fixture(scope="module")
def model():
    return model_of(load_case("v3-small"))


def test_requests_are_served_before_most_steps_are_there(model, monkeypatch):
    """Of every kind, longer than the first prefill step and more than the first decode call takes, with the tokens that
    they have when everything is compiled."""
    prepare, may_go_on, first = JaxExecutor.prepare, threading.Event(), set()

    def wait(executor, variant):
        if executor in first:
            may_go_on.wait(120)
        first.add(executor)
        prepare(executor, variant)

    monkeypatch.setattr(JaxExecutor, "prepare", wait)
    monkeypatch.setattr("cmjax.serve.instances.forms.LEAST_STEP_TOKENS", 16)
    sizes = {"max_num_seqs_per_rank": 4, "max_model_len": 96, "max_num_batched_tokens": 64, "block_size": 8}
    engine = make_engine(model, 2, prefill_ep_size=1, **sizes)
    told = []
    engine.start(told.append, wait=False)
    try:
        assert told[-1].num_done == 2 < told[-1].num_steps
        assert [one.status for one in engine.stats().instances] == ["ready", "ready"]
        prompts = [RNG.integers(8, 90, length).tolist() for length in (3, 40, 80)]
        pairs = [(prompt, SamplingParams(max_tokens=8, **sampling)) for prompt in prompts for sampling in SAMPLINGS]
        before = [one.result(timeout=120) for one in [engine.submit(*pair) for pair in pairs]]
        planners = engine.core.scheduler.planners
        assert [len(one.variants) for one in planners] == [1, 1]
        may_go_on.set()
        engine._startup._thread.join(240)
        assert told[-1].num_done == told[-1].num_steps
        assert [one.variants for one in planners] == [one.serving_variants() for one in engine.fleet.executors.values()]
        after = [one.result(timeout=120) for one in [engine.submit(*pair) for pair in pairs]]
    finally:
        may_go_on.set()
        engine.shutdown(timeout=0)
    for one, other, (_, sampling) in zip(before, after, pairs, strict=True):
        assert one.token_ids == other.token_ids
        assert len(one.token_ids) == 8 or one.finish_reason == "stop"
        assert (one.logprobs is None) == (sampling.logprobs is None)
        for name in ("logprobs", "prompt_logprobs"):
            found, wanted = getattr(one, name) or [], getattr(other, name) or []
            for here, there in itertools.zip_longest(found, wanted):
                assert (here is None) == (there is None)
                if here is not None:
                    assert here.token_id == there.token_id
                    assert here.logprob == pytest.approx(there.logprob, abs=1e-3)


TRACED, LOWERED, COMPILED = (
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
MISSED = "/jax/compilation_cache/cache_misses"


@pytest.mark.usefixtures("empty_compile_cache")
def test_instances_of_a_kind_are_traced_lowered_and_compiled_once(model, jax_events):
    """Each runs on devices of its own, and answers alike."""
    jax.clear_caches()
    sizes = {"max_num_seqs_per_rank": 2, "max_model_len": 32, "max_num_batched_tokens": 32}
    engine = make_engine(model, 2, prefill_ep_size=2, num_prefill_instances=2, **sizes)
    prompts = [RNG.integers(8, 90, length).tolist() for length in (3, 14)]
    try:
        found = []
        for executor in engine.prefill:
            variant = executor.serving_variants()[-1]
            jax_events.clear()
            executor.prepare(variant)
            is_first = executor is engine.prefill[0]
            assert [jax_events[name] > 0 for name in (TRACED, LOWERED, MISSED)] == [is_first, is_first, is_first]
            plan = dataclasses.replace(plan_prompts(executor, prompts), variant=variant)
            found.append(executor.run(plan).token_ids.tolist())
            assert set(executor.cache.devices()) == set(executor.instance.devices)
        assert found[0] == found[1]
    finally:
        engine.shutdown(timeout=0)


def test_what_has_been_prepared_is_not_compiled_again(model, jax_events):
    engine = make_engine(model, 2, prefill_ep_size=1, max_num_seqs_per_rank=2, max_model_len=32)
    try:
        (source,), (target,) = engine.fleet.prefill.values(), engine.fleet.decode.values()
        for executor, variant in ((source, source.serving_variants()[0]), (target, target.serving_variants()[-1])):
            executor.compile(CompilePlan(()))  # what is no step
            executor.prepare(variant)
            assert jax_events[COMPILED]
            jax_events.clear()
            executor.compile(CompilePlan((variant,)))
            assert not jax_events[COMPILED]
    finally:
        engine.shutdown(timeout=0)
