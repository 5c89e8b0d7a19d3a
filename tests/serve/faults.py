"""Faults on devices: an engine whose runs fail before, inside and after what they do, and whose rounds get lost."""

import collections
import itertools
import threading
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from cmjax.model import Model
from cmjax.schedule import (
    MAX_FAILURES,
    Attempt,
    CompilePlan,
    FetchPlan,
    LookupPlan,
    SamplingParams,
    SendPlan,
    StorePlan,
)
from cmjax.serve import Engine
from cmjax.serve.steps.sampling import _noise
from tests.schedule.invariants import check_scheduler

# Two scores so near each other may change places with the order of sums; a request that starts over from its tokens
# computes by prefill what decode had computed.
CLOSE = 2e-3
# What fails alone where it fails: it only reads the cache.
READING = (SendPlan, LookupPlan, FetchPlan, StorePlan)


class Faults:
    """Makes `most` runs of an engine's instances fail, each with some probability; at most two in a row of an instance,
    which gives up at the third.

    Attributes:
        counts: (kind of plan, where) -> faults.
        hits: request's id -> attempts of it that a failure ended.
    """

    WHERE = ("before", "inside", "after")

    def __init__(self, engine: Engine, most: int, probability: float, seed: int = 0) -> None:
        self.most, self.probability = most, probability
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._engine, self._lost = engine, set()
        self._put = engine.fleet._wire.put
        engine.fleet._wire.put = lambda name, key, payload: key in self._lost or self._put(name, key, payload)
        self._in_a_row: collections.Counter[int] = collections.Counter()
        self._executors = [*engine.prefill, *engine.fleet.decode.values()]
        self._runs = {id(one): one.run for one in self._executors}
        for executor in self._executors:
            executor.run = self._wrapped(executor)
        self.hits: collections.Counter[str] = collections.Counter()
        self._hit = engine.core.scheduler.hit
        engine.core.scheduler.hit = self._count_hit

    def remove(self) -> None:
        """Nothing fails any more."""
        for executor in self._executors:
            del executor.run
        del self._engine.core.scheduler.hit, self._engine.fleet._wire.put

    @property
    def total(self) -> int:
        """Faults so far."""
        return sum(self.counts.values())

    def _count_hit(self, attempt: Attempt, error: str, at: str) -> None:
        self.hits[attempt.request.request_id] += 1
        self._hit(attempt, error, at)

    def _wrapped(self, executor: Any) -> Any:
        run = self._runs[id(executor)]

        def faulty(plan: Any) -> Any:
            where = None if isinstance(plan, CompilePlan) else self._choose(executor, plan)
            if where is None:
                return run(plan)
            if where == "before":
                raise RuntimeError(f"{plan.kind}: broken before it began")
            if isinstance(plan, SendPlan):
                self._lost.add((plan.transfer_id, plan.round))
            result = run(plan)
            if isinstance(plan, SendPlan) and where == "inside":
                return result  # on its way, and lost
            if where == "inside" and not isinstance(plan, READING):
                executor.cache.delete()  # as a step that fails takes along what was donated to it
            raise RuntimeError(f"{plan.kind}: broken {where}")

        return faulty

    def _choose(self, executor: Any, plan: Any) -> str | None:
        with self._lock:
            name = type(plan).__name__
            if self.total >= self.most or self._in_a_row[id(executor)] == 2 or self._rng.random() > self.probability:
                if name in ("PrefillPlan", "DecodePlan"):
                    self._in_a_row[id(executor)] = 0
                return None
            where = self.WHERE[self._rng.integers(3)]
            self._in_a_row[id(executor)] += not isinstance(plan, READING)
            self.counts[name, where] += 1
            return where


def is_close_call(
    model: Model, prompt: list[int], found: list[int], expected: list[int], params: SamplingParams
) -> bool:
    """Whether two continuations part where the scores of both tokens are next to equal."""
    at = next(index for index, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1])
    prefix = [*prompt, *expected[:at]]
    scores = np.asarray(model.logits(np.array([prefix])))[0, -1].astype(np.float64)
    for token in set(expected[:at]):
        scores[token] -= params.presence_penalty + params.frequency_penalty * expected[:at].count(token)
    if params.temperature:
        seed = params.seed or 0
        halves = jnp.array([[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]], jnp.uint32)
        scores = scores / params.temperature + np.asarray(_noise(halves, jnp.array([len(prefix)]), len(scores)))[0]
    return bool(abs(scores[found[at]] - scores[expected[at]]) < CLOSE)


def make_load(rng, vocab_size, longest, count, max_tokens):
    """Short and long prompts, greedy and sampled ones, with penalties and without, all with a stop token."""
    load = []
    for index in range(count):
        length = int(rng.integers(1, longest if index % 4 == 0 else longest // 4))
        params = SamplingParams(
            max_tokens=int(rng.integers(1, max_tokens)),
            temperature=0.8 * (index % 3 == 1),
            seed=index,
            frequency_penalty=0.5 * (index % 5 == 2),
            stop_token_ids=(int(rng.integers(vocab_size)),),
        )
        load.append((rng.integers(0, vocab_size, length).tolist(), params))
    return load


def under_faults(engine, load, expected, faults, *, at_once, seed=0):
    """Submit the load again and again until there have been all the faults, some of it cancelled, and check every
    answer; how many ended in which way."""
    rng, outcomes = np.random.default_rng(seed), collections.Counter()
    under_way = collections.deque()
    for number in itertools.count():
        if faults.total >= faults.most:
            break
        index = number % len(load)
        handle = engine.submit(*load[index], priority=int(rng.integers(3)), tenant=str(number % 5))
        under_way.append((index, handle))
        if rng.random() < 0.05:
            under_way[rng.integers(len(under_way))][1].cancel()
        while len(under_way) >= at_once:
            outcomes[check_one(engine.model, load, expected, faults, *under_way.popleft())] += 1
    while under_way:
        outcomes[check_one(engine.model, load, expected, faults, *under_way.popleft())] += 1
    return outcomes


def check_one(model, load, expected, faults, index, handle):
    prompt, params = load[index]
    for _ in handle:  # to its end
        pass
    wanted = expected[index].token_ids
    is_whole = handle.finish_reason in ("stop", "length")
    # An error comes with the third hit, and with nothing else.
    assert (faults.hits[handle.request_id] == MAX_FAILURES) == (handle.finish_reason == "error")
    if handle.token_ids != (wanted if is_whole else wanted[: len(handle.token_ids)]):
        assert is_close_call(model, prompt, handle.token_ids, wanted, params), (index, handle.token_ids, wanted)
        return "close call"
    assert not is_whole or handle.finish_reason == expected[index].finish_reason
    return handle.finish_reason


def check_nothing_is_left(engine):
    """Blocks that a plan under way had are free when it has been committed."""
    deadline = time.monotonic() + 30
    while any(one.num_used_blocks for one in engine.stats().instances):
        assert time.monotonic() < deadline, engine.stats()
        time.sleep(0.01)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert all(one.status in ("ready", "starting") for one in stats.instances)
    assert not engine.core.handles
    with engine.core.changed:
        check_scheduler(engine.core.scheduler)
