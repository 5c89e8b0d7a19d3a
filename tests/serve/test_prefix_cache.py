"""The prefix cache on devices: an engine with it gives what one without it gives, wherever a prefix comes from."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.mesh import fabric
from cmjax.model import Model, convert_params, params_digest
from cmjax.schedule import LoadPlan, PrefillPlan, SendPlan, StorePlan
from cmjax.serve import Engine, SamplingParams
from cmjax.serve.caching import CacheSettings
from tests.helpers import tiny_model
from tests.serve import driving
from tests.serve.faults import Faults, check_nothing_is_left, make_load, under_faults

pytestmark = pytest.mark.usefixtures("one_shape_of_sampling")
BLOCK, UNIT = 4, 8  # tokens of a block of an instance, of a cached block
LONGEST = 96


def make_engine(model: Model, cache: CacheSettings | None, *, ep_size: int = 2, num_prefill: int = 1, **settings):
    defaults = {
        "prefill_ep_size": ep_size,
        "num_prefill_instances": num_prefill,
        "max_model_len": LONGEST,
        "max_num_seqs_per_rank": 8 // ep_size,
        "max_num_batched_tokens": 32,
        "block_size": BLOCK,
        "num_speculative_tokens": int(model.params.mtp is not None),
    }
    return driving.make_engine(model, ep_size, cache=cache, **{**defaults, **settings})


def cached(**fields) -> CacheSettings:
    return CacheSettings(**{"cache_block_size": UNIT, "dram_bytes": 1 << 24, "fetch": "always", **fields})


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=2, num_nextn_predict_layers=1)


def quantized(model: Model, quant: str) -> Model:
    params = convert_params(model.params, quant, model.dtype)
    return Model(model.config, params, params_digest(model.config, params))


@pytest.fixture(scope="module")
def plain(model):
    """Without a cache, on one device."""
    with started(make_engine(model, None, ep_size=1)) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(model):
    """Two prefill instances over one pool."""
    with started(make_engine(model, cached(), num_prefill=2)) as engine:
        yield engine


class started:  # noqa: N801  # reads as what it is for
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __enter__(self) -> Engine:
        self.engine.start()
        return self.engine

    def __exit__(self, *_: object) -> None:
        self.engine.shutdown(timeout=0)


@pytest.fixture
def base(model, request):
    """Tokens that no other test has."""
    seed = sum(map(ord, request.node.name))
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, LONGEST).tolist()


def forget_own_blocks(engine: Engine) -> None:
    """What the instances keep in place; the pool has it still."""
    engine.wait_until_stored()
    with engine.core.changed:
        for planner in engine.core.scheduler.prefill.values():
            planner.cache.clear()


def ask(engine: Engine, prompt: list[int], sampling: SamplingParams | None = None, **fields) -> tuple[list[int], int]:
    handle = engine.submit(prompt, sampling or SamplingParams(max_tokens=6), **fields)
    return handle.result(120).token_ids, handle.num_cached_tokens


def ask_all(engine: Engine, prompts, sampling: SamplingParams | None = None) -> list[tuple[list[int], int]]:
    """Together."""
    handles = [engine.submit(prompt, sampling or SamplingParams(max_tokens=6)) for prompt in prompts]
    return [(handle.result(120).token_ids, handle.num_cached_tokens) for handle in handles]


def edges(base: list[int]) -> list[list[int]]:
    """Prompts that share up to so many tokens with `base`, at the edges of blocks and of steps, and to either side."""
    lengths = sorted({edge + aside for edge in (UNIT, 2 * UNIT, 32, 64) for aside in (-1, 0, 1)})
    return [base[:length] + after for length in lengths for after in ([], [7], [7, 8, 9], [9] * UNIT)]


def most_cached(prompt: list[int], before: list[list[int]]) -> int:
    """Tokens of a prompt that can be cached when those before it have been served."""
    shared = 0
    for other in before:
        same = next((i for i, pair in enumerate(zip(prompt, other, strict=False)) if pair[0] != pair[1]), None)
        shared = max(shared, (min(len(prompt), len(other)) if same is None else same) // UNIT * UNIT)
    return min(shared, (len(prompt) - 1) // UNIT * UNIT)


def test_tokens_and_cached_tokens_at_every_edge(engine, plain, base):
    prompts = edges(base)
    for index, prompt in enumerate(prompts):
        tokens, num_cached = ask(engine, prompt)
        assert tokens == ask(plain, prompt)[0], (index, len(prompt))
        # What lies in the other instance alone may still be on its way to the pool.
        engine.pool.flush()
        assert num_cached <= most_cached(prompt, prompts[:index])
    before = engine.stats().cache
    for prompt in prompts:
        assert ask(engine, prompt)[1] == most_cached(prompt, prompts)
    forget_own_blocks(engine)
    for prompt in prompts:
        tokens, num_cached = ask(engine, prompt)
        assert (tokens, num_cached) == (ask(plain, prompt)[0], most_cached(prompt, prompts))
    after = engine.stats().cache
    assert after.num_hits > before.num_hits
    assert after.num_pool_hits > before.num_pool_hits
    assert after.num_failed_loads == after.num_failed_stores == 0


def test_what_moves_is_on_the_account_of_its_plane(engine, base):
    """Every byte of a block, from the CPUs of the pool, which come after the devices, to the ranks, and back."""
    ask(engine, base[:40])
    forget_own_blocks(engine)
    before = fabric.traffic.snapshot()
    assert ask(engine, base[:40])[1] == 4 * UNIT
    after = fabric.traffic.snapshot()
    layout = engine.prefill[0].caching.port.context.layout
    assert after.wire_bytes("ub", "cache_fetch") - before.wire_bytes("ub", "cache_fetch") == 4 * layout.num_bytes
    (entry,) = after.select("ub", "cache_fetch")
    assert set(np.nonzero(entry.num_bytes)[0].tolist()) == {jax.device_count()}
    (entry,) = after.select("ub", "cache_store")
    assert set(np.nonzero(entry.num_bytes)[1].tolist()) == {jax.device_count()}


@pytest.mark.parametrize(("plane", "links"), [("ub", 12), ("vpc", 2)])
def test_links_of_the_vpc_plane_belong_to_the_nodes(model, plane, links):
    engine = make_engine(model, cached(plane=plane), ep_size=12, max_num_seqs_per_rank=1)
    link = engine.prefill[0].caching.port._link
    fabric.configure(delay=fabric.DelayModel({plane: 0.5}, {plane: 10.0}, 2.0))
    try:
        assert link.delay_s(120) == pytest.approx(2 * (0.5 + 120 / links / 10))
    finally:
        fabric.configure(delay=None)
    assert link.delay_s(120) == 0
    engine.shutdown()


@pytest.mark.parametrize("reuse", [0, 0.125, 0.25, 0.5, 0.75, 0.9])
def test_every_share_of_reuse(engine, plain, base, reuse):
    length = 80
    shared = base[: round(reuse * length)]
    rng = np.random.default_rng(0)
    prompts = [shared + rng.integers(0, 101, length - len(shared)).tolist() for _ in range(4)]
    ask(engine, prompts[0])
    forget_own_blocks(engine)
    sampling = SamplingParams(max_tokens=8, temperature=0.8, seed=3)
    found = ask_all(engine, prompts[1:], sampling)
    assert [tokens for tokens, _ in found] == [ask(plain, prompt, sampling)[0] for prompt in prompts[1:]]
    assert {num_cached for _, num_cached in found} == {len(shared) // UNIT * UNIT}


def rows_sent(engine: Engine, monkeypatch) -> dict[tuple[int, ...], np.ndarray]:
    """Prompt -> what the cache holds of it `[layers, tokens, width]` when it is sent, filled as requests go."""
    found: dict[tuple[int, ...], np.ndarray] = {}
    for name, executor in engine.fleet.prefill.items():

        def run(plan, run=executor.run, executor=executor, name=name):
            if isinstance(plan, SendPlan):
                planner = engine.core.scheduler.prefill[name]
                for attempt_id, blocks in zip(plan.attempt_ids.tolist(), plan.segments.blocks, strict=True):
                    slots = (blocks[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
                    prompt = tuple(planner.attempts[attempt_id].request.prompt_ids)
                    cache = np.asarray(executor.cache)
                    assert all(np.array_equal(cache[0][:, slots], one[:, slots]) for one in cache)
                    found[prompt] = cache[0][:, slots][:, : len(prompt)]
            return run(plan)

        monkeypatch.setattr(executor, "run", run)
    return found


@pytest.mark.parametrize("is_from_pool", [False, True])
def test_latents_are_those_of_a_step_that_computes_them_and_the_mtp_modules_too(
    engine, plain, base, monkeypatch, is_from_pool
):
    # Continuations that part right after a block: what the MTP module has of its last token is each one's own.
    prompts = [[*base[: 3 * UNIT], token, 5, 6] for token in (1, 2, 3)]
    ask(engine, base[: 3 * UNIT + 2])
    if is_from_pool:
        forget_own_blocks(engine)
    wanted, found = rows_sent(plain, monkeypatch), rows_sent(engine, monkeypatch)
    for prompt in prompts:
        ask(plain, prompt)
        assert ask(engine, prompt)[1] == 3 * UNIT
        one, other = found[tuple(prompt)], wanted[tuple(prompt)]
        np.testing.assert_allclose(one[:-1], other[:-1], atol=2e-5)
        np.testing.assert_allclose(one[-1, :-1], other[-1, :-1], atol=2e-5)  # the last token's successor is not known
    last = 3 * UNIT - 1
    assert np.abs(wanted[tuple(prompts[0])][-1, last] - wanted[tuple(prompts[1])][-1, last]).max() > 1e-2


def test_drafts_are_kept_as_often_with_hits_as_without(engine, plain, base):
    sampling = SamplingParams(max_tokens=24, temperature=8.0, seed=1)  # noise that drafts share decides: many are kept

    def kept(one: Engine, prompt: list[int]) -> int:
        before = one.stats()
        ask(one, prompt, sampling)
        after = one.stats()
        return after.num_accepted_tokens - before.num_accepted_tokens

    ask(engine, base[:33])
    forget_own_blocks(engine)
    prompts = [[*base[:32], token] for token in range(12)]
    counts = [kept(engine, prompt) for prompt in prompts]
    assert counts == [kept(plain, prompt) for prompt in prompts]
    assert sum(counts) > 3 * len(prompts)


@pytest.mark.parametrize("changes", [{"namespace": "b"}, {"cache_salt": "b"}])
def test_namespaces_and_salts_share_nothing(engine, base, changes):
    prompt = base[:40]
    ask(engine, prompt)
    engine.pool.flush()
    assert ask(engine, prompt)[1] > 0
    assert ask(engine, prompt, **changes)[1] == 0
    forget_own_blocks(engine)
    assert ask(engine, prompt, **changes)[1] > 0
    assert ask(engine, prompt, namespace="c", cache_salt="c")[1] == 0


def test_a_restart_finds_what_another_process_stored_and_other_models_do_not(model, plain, base, tmp_path):
    prompt, cache = base[:40], cached(folder=str(tmp_path / "pool"))
    others = {
        "revision": tiny_model(seed=1, num_hidden_layers=2, num_nextn_predict_layers=1),
        "model": tiny_model(num_hidden_layers=2, num_nextn_predict_layers=1, rope_theta=20000.0),
        "quantization": quantized(model, "int8"),
    }
    for name, one, num_cached in (("", model, 0), ("", model, 32), *((k, m, 0) for k, m in others.items())):
        with started(make_engine(one, cache)) as engine:
            tokens, found = ask(engine, prompt)
            assert found == num_cached, name
            engine.pool.flush()
        if one is model:
            assert tokens == ask(plain, prompt)[0]
    with started(make_engine(model, dataclasses.replace(cache, key_file=str(tmp_path / "another.key")))) as engine:
        assert ask(engine, prompt)[1] == 0


@pytest.mark.parametrize("temperature", [0.0, 8.0])
def test_what_decode_made_is_found_by_the_next_turn(engine, plain, base, temperature):
    """The blocks that the answer filled, but for what the MTP module has not seen of it."""
    sampling = SamplingParams(max_tokens=40, temperature=temperature, seed=4)
    prompt = base[:13]
    answer, _ = ask(engine, prompt, sampling)
    assert answer == ask(plain, prompt, sampling)[0]
    whole = [*prompt, *answer]
    end = (len(whole) - 1 - 2) // UNIT * UNIT
    forget_own_blocks(engine)
    # A block goes by the token after it: where another follows, it is computed.
    other = [*whole[:end], (whole[end] + 1) % 101]
    assert ask(engine, other) == (ask(plain, other)[0], end - UNIT)
    forget_own_blocks(engine)
    # What prefill has computed for it goes by none.
    another = [*whole[:end], (whole[end] + 2) % 101]
    assert ask(engine, another) == (ask(plain, another)[0], end)
    forget_own_blocks(engine)
    for after in ([7, 7], [8]):
        assert ask(engine, [*whole, *after]) == (ask(plain, [*whole, *after])[0], end)


def test_what_decode_made_is_not_kept_where_it_is_not_wanted(model, base):
    with started(make_engine(model, cached(decode_blocks="never"))) as engine:
        answer, _ = ask(engine, base[:13], SamplingParams(max_tokens=40))
        engine.wait_until_stored()
        assert ask(engine, [*base[:13], *answer])[1] == UNIT


@pytest.mark.parametrize(("said", "thinks", "kept"), [("auto", True, "never"), ("auto", False, "always")])
def test_a_model_that_thinks_keeps_no_thoughts_unless_told_to(said, thinks, kept):
    assert CacheSettings(decode_blocks=said).for_model(thinks=thinks).decode_blocks == kept
    for told in ("always", "never"):
        assert CacheSettings(decode_blocks=told).for_model(thinks=thinks).decode_blocks == told


def test_reset_forgets_all(engine, base):
    prompt = base[:40]
    ask(engine, prompt)
    engine.pool.flush()
    engine.reset_prefix_cache()
    assert ask(engine, prompt)[1] == 0


def test_after_a_reset_answers_are_stored_anew(engine, base):
    sampling = SamplingParams(max_tokens=40)
    for _ in range(2):
        answer, _ = ask(engine, base[:13], sampling)
        forget_own_blocks(engine)
        assert ask(engine, [*base[:13], *answer, 5])[1] == 48
        engine.wait_until_stored()
        engine.reset_prefix_cache()


def test_any_salt_will_do(engine, base):
    """Lone surrogates, too, which JSON can bring."""
    for salt in ("\ud800", "\0", "a" * 1000, "ü"):
        assert ask(engine, base[:40], cache_salt=salt)[1] == 0
        assert ask(engine, base[:40], cache_salt=salt)[1] == 32


def test_an_engine_that_only_generates_uses_the_cache_from_call_to_call(model, plain, base, tmp_path):
    prompts = [base[:length] for length in (40, 44, 60)]
    engine = make_engine(model, cached(folder=str(tmp_path)))
    wanted = [ask(plain, prompt)[0] for prompt in prompts]
    for _ in range(2):
        result = engine.generate(prompts, SamplingParams(max_tokens=6))
        assert [output.token_ids for output in result.outputs] == wanted
        engine.wait_until_stored()
    assert engine.stats().cache.num_pool_hits > 0
    # One that cannot be made leaves the folder to others.
    engine.shutdown()
    with pytest.raises(UserError, match="max_model_len"):
        make_engine(model, cached(folder=str(tmp_path)), max_model_len=10**6)
    make_engine(model, cached(folder=str(tmp_path))).shutdown()


def test_under_pressure_readers_keep_what_they_read(model, plain, base):
    """Instances with few more blocks than a prompt needs, decode ranks that preempt, requests that share prefixes."""
    rng = np.random.default_rng(5)
    prefixes = [rng.integers(0, 101, 40).tolist() for _ in range(3)]
    prompts = [prefixes[i % 3][: 8 + 4 * (i % 9)] + rng.integers(0, 101, 1 + i % 7).tolist() for i in range(40)]
    # Answers so long that two on a rank do not fit, however fast prompts come.
    sampling = SamplingParams(max_tokens=44)
    wanted = [tokens for tokens, _ in ask_all(plain, prompts, sampling)]
    small = {"num_prefill_kv_blocks": LONGEST // BLOCK, "num_kv_blocks": LONGEST // BLOCK, "max_num_seqs_per_rank": 6}
    with started(make_engine(model, cached(dram_bytes=20_000), **small)) as engine:
        for _ in range(2):
            found = ask_all(engine, prompts, sampling)
            assert [tokens for tokens, _ in found] == wanted
        engine.wait_until_stored()  # what is stored still holds its blocks
        stats = engine.stats()
        assert sum(num_cached for _, num_cached in found) > 0
        assert stats.num_preemptions > 0
        assert sum(node.counters.evictions.get("dram", 0) for node in engine.pool.stats().nodes) > 0
        assert all(one.num_used_blocks == 0 for one in stats.instances)


def test_prompts_whose_log_probabilities_are_asked_for_are_computed(engine, plain, base):
    prompt, sampling = base[:40], SamplingParams(max_tokens=2, prompt_logprobs=1)
    ask(engine, prompt)
    handle = engine.submit(prompt, sampling)
    found, wanted = handle.result(60).prompt_logprobs, plain.submit(prompt, sampling).result(60).prompt_logprobs
    assert handle.num_cached_tokens == 0
    assert [one.token_id for one in found[1:]] == prompt[1:]
    np.testing.assert_allclose(*[[one.logprob for one in some[1:]] for some in (found, wanted)], atol=1e-3)


class TestFaults:
    """Whatever the pool does, requests get their tokens."""

    @pytest.fixture(autouse=True)
    def _stored(self, engine, base):
        ask(engine, base[:40])
        forget_own_blocks(engine)
        self.before = engine.stats().cache

    def check(self, engine, plain, base, num_cached):
        tokens, found = ask(engine, base[:40])
        assert (tokens, found) == (ask(plain, base[:40])[0], num_cached)
        return engine.stats().cache

    @pytest.mark.parametrize("method", ["get", "contains"])
    def test_a_pool_that_fails_is_a_miss(self, engine, plain, base, monkeypatch, method):
        def fail(*_):
            raise RuntimeError("gone")

        monkeypatch.setattr(engine.pool, method, fail)
        after = self.check(engine, plain, base, 0)
        assert after.num_failed_lookups - self.before.num_failed_lookups == (method == "contains")
        assert after.num_failed_loads - self.before.num_failed_loads == 4 * (method == "get")

    def test_a_hole_ends_the_hit(self, engine, plain, base, monkeypatch):
        get = engine.pool.get
        monkeypatch.setattr(engine.pool, "get", lambda ns, keys: [*get(ns, keys)[:2], None, *get(ns, keys)[3:]])
        after = self.check(engine, plain, base, 2 * UNIT)
        assert after.num_failed_loads - self.before.num_failed_loads == 2

    def test_blocks_of_other_tokens_are_not_served(self, engine, plain, base, monkeypatch):
        get = engine.pool.get
        monkeypatch.setattr(engine.pool, "get", lambda ns, keys: get(ns, keys[::-1]))
        after = self.check(engine, plain, base, 0)
        assert after.num_failed_loads - self.before.num_failed_loads == 4

    def test_blocks_of_another_form_are_not_served(self, engine, plain, base, monkeypatch):
        get = engine.pool.get

        def cut(ns, keys):
            return [
                dataclasses.replace(one, parts=(one.parts[0], one.parts[1][:-4], *one.parts[2:]))
                for one in get(ns, keys)
            ]

        monkeypatch.setattr(engine.pool, "get", cut)
        self.check(engine, plain, base, 0)

    def test_stores_that_fail_are_made_again(self, engine, plain, base, monkeypatch):
        engine.pool.clear()
        put = engine.pool.put
        monkeypatch.setattr(engine.pool, "put", lambda ns, items: [False] * len(items))
        after = self.check(engine, plain, base, 0)
        forget_own_blocks(engine)
        monkeypatch.setattr(engine.pool, "put", put)
        self.check(engine, plain, base, 0)
        forget_own_blocks(engine)
        self.check(engine, plain, base, 4 * UNIT)
        assert after.num_failed_stores >= self.before.num_failed_stores

    @pytest.mark.parametrize("kind", [LoadPlan, StorePlan, PrefillPlan])
    def test_plans_that_fail_leave_nothing_wrong_behind(self, engine, plain, base, monkeypatch, kind):
        failures = itertools.chain([True], itertools.repeat(False))
        for executor in engine.fleet.prefill.values():

            def run(plan, run=executor.run):
                if isinstance(plan, kind) and next(failures):
                    raise RuntimeError("broken")
                return run(plan)

            monkeypatch.setattr(executor, "run", run)
        for length in (40, 48):
            assert ask(engine, base[:length])[0] == ask(plain, base[:length])[0]
        monkeypatch.undo()
        forget_own_blocks(engine)
        assert ask(engine, base[:48])[0] == ask(plain, base[:48])[0]


def test_after_any_fault_requests_that_share_prefixes_get_their_tokens(engine, monkeypatch):
    load = make_load(np.random.default_rng(2), 101, 60, 40, 12)
    load = [(load[index % 4][0] + prompt[:9], params) for index, (prompt, params) in enumerate(load)]
    expected = [handle.result(timeout=120) for handle in [engine.submit(*one) for one in load]]
    monkeypatch.setattr(engine.core.scheduler, "handoff_timeout_s", 0.5)
    before = engine.stats().cache
    faults = Faults(engine, most=40, probability=0.03)  # so rare that few requests are hit three times
    outcomes = under_faults(engine, load, expected, faults, at_once=12)
    faults.remove()
    check_nothing_is_left(engine)
    after = engine.stats().cache
    assert faults.total == 40
    assert {kind for kind, _ in faults.counts} >= {"PrefillPlan", "LookupPlan", "FetchPlan", "LoadPlan"}
    assert outcomes["length"] + outcomes["stop"] > 0.8 * outcomes.total()
    assert after.num_hits > before.num_hits
    assert after.num_pool_hits > before.num_pool_hits


@pytest.mark.parametrize(("num_mtp", "quant", "prefill_ep"), [(0, None, 1), (1, "int8", 2)])
def test_models_of_other_kinds(num_mtp, quant, prefill_ep):
    model = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=num_mtp)
    if quant is not None:
        model = quantized(model, quant)
    prompts = edges(np.random.default_rng(3).integers(0, 101, LONGEST).tolist())[::3]
    with started(make_engine(model, None, ep_size=prefill_ep)) as plain:
        wanted = [ask(plain, prompt)[0] for prompt in prompts]
    with started(make_engine(model, cached(num_nodes=3), ep_size=prefill_ep)) as engine:
        for _ in range(2):
            assert [ask(engine, prompt)[0] for prompt in prompts] == wanted
            forget_own_blocks(engine)
        assert engine.stats().cache.num_pool_hits > 0
